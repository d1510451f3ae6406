"""Pages of package indexes and pip's configuration, read into values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import OriginError
from tightwad_agent.package_index import JSON_PAGE, IndexFile, Listed, choose, config_from_list, page_url, parse_page

SHA = "ab" * 32
URL = "https://index.invalid/simple/demo/"


def listed(*names: str, yanked: bool = False) -> list[Listed]:
    return [Listed(IndexFile(name, f"https://x.invalid/{name}", SHA), yanked) for name in names]


def chosen(*names: str, version: str | None = None, sdist: bool = False) -> str | None:
    found = choose(listed(*names), "Demo.Pkg", version, "sdist" if sdist else "wheel")
    return found and found.filename


def test_the_newest_final_version_is_chosen() -> None:
    wheels = [f"demo_pkg-{v}-py3-none-any.whl" for v in ("1.9", "1.10", "2.0rc1", "2.0.dev3", "1.10.0+local", "9" * 70)]
    assert chosen(*wheels) == "demo_pkg-1.10-py3-none-any.whl"
    assert chosen(*wheels, version="2.0rc1") == "demo_pkg-2.0rc1-py3-none-any.whl"
    assert chosen(*wheels, version="3") is None
    assert chosen("demo_pkg-9.0.tar.gz", "demo_pkg-1!1.0.tar.gz", sdist=True) == "demo_pkg-1!1.0.tar.gz"
    assert chosen("demo_pkg-1.0.tar.gz", "demo_pkg-1.0.post2.tar.gz", sdist=True) == "demo_pkg-1.0.post2.tar.gz"


def test_a_wheel_for_every_platform_is_preferred() -> None:
    both = ("demo_pkg-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", "demo_pkg-1.0-1-py3-none-any.whl")
    assert chosen(*both) == chosen(*reversed(both)) == both[1]
    assert chosen(both[0]) == both[0]
    assert chosen("demo_pkg-1.0.zip", "demo_pkg-1.0.tar.gz", sdist=True) == "demo_pkg-1.0.tar.gz"


@pytest.mark.parametrize(
    "name",
    [
        "demo-1.0-py3-none-any.whl",
        "demo_pkg.whl",
        "demo_pkg-1.0.whl",
        "demo_pkg-1-2-3-4-5-6.whl",
        "demo_pkg-1.0.exe",
        "",
    ],
)
def test_other_files_are_passed_over(name: str) -> None:
    assert chosen(name) is None
    assert chosen(name, sdist=True) is None
    assert chosen("nodash.tar.gz", sdist=True) is None


def test_a_yanked_version_needs_asking() -> None:
    entries = listed("demo-1.0.tar.gz", yanked=True)
    assert choose(entries, "demo", None, "sdist") is None
    assert choose(entries, "demo", "1.0", "sdist") is not None


def test_damaged_hashes_and_sizes_are_unknown_ones() -> None:
    files = [
        {"filename": "a", "url": "a", "hashes": {"sha256": SHA.upper()}, "size": 7, "yanked": "why"},
        {"filename": "b", "url": "/b", "hashes": {"sha256": "short"}, "size": -1},
        {"filename": "c", "url": "https://c.invalid/c", "hashes": {"sha256": 7}, "size": "7"},
    ]
    found = parse_page(URL, f"{JSON_PAGE}; charset=utf-8", json.dumps({"files": files}).encode())
    assert [(e.file.url, e.file.sha256, e.file.size, e.yanked) for e in found] == [
        ("https://index.invalid/simple/demo/a", SHA, 7, True),
        ("https://index.invalid/b", "", None, False),
        ("https://c.invalid/c", "", None, False),
    ]


def test_links_of_a_page_that_is_html() -> None:
    html = b'<b>x</b></a><a>no address</a><a href="http://[x">no address either</a>'
    html += b'<a href="f.whl#md5=1"> f.whl\n</a><a href="g.whl#sha256=xyz">g.whl</a>'
    found = parse_page(URL, "text/html", html)
    assert [(e.file.filename, e.file.url, e.file.sha256) for e in found] == [
        ("f.whl", URL + "f.whl", ""),
        ("g.whl", URL + "g.whl", ""),
    ]


@given(st.binary(max_size=400), st.sampled_from([JSON_PAGE, "text/html", ""]))
def test_no_page_raises_anything_else(body: bytes, content_type: str) -> None:
    try:
        assert isinstance(parse_page(URL, content_type, body), list)
    except OriginError:
        pass


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["files", "filename", "url", "hashes", "sha256"]), x, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_no_json_raises_anything_else(plain: object) -> None:
    for page in (plain, {"files": plain}, {"files": [plain]}):
        try:
            parse_page(URL, JSON_PAGE, json.dumps(page).encode())
        except OriginError:
            pass


def test_the_configuration_of_pip_in_its_own_order() -> None:
    text = """\
a warning without a sign
global.index-url='https://global.invalid/s'
download.index-url='https://download.invalid/s'
global.timeout=60
global.broken='unclosed
global.cert='/ca'
"""
    assert config_from_list(text, {}, "https://default.invalid").indexes == ("https://download.invalid/s",)
    assert config_from_list(text, {}, "https://default.invalid").cert == "/ca"
    assert config_from_list("", {}, "https://default.invalid").indexes == ("https://default.invalid",)
    uv = {"UV_DEFAULT_INDEX": "https://uv.invalid/s", "UV_INDEX_URL": "https://old.invalid/s"}
    assert config_from_list(text, uv, "").indexes == ("https://uv.invalid/s",)
    with pytest.raises(OriginError, match="no-index"):
        config_from_list(":env:.no-index='1'", {}, "https://default.invalid")
    named = text + "\n:env:.index-url='https://env.invalid/s'"
    assert config_from_list(named, uv, "").indexes == ("https://env.invalid/s",)


def test_page_addresses_are_normalised() -> None:
    assert page_url("https://x.invalid/simple/", "Demo__Pkg.x") == "https://x.invalid/simple/demo-pkg-x/"
    with pytest.raises(OriginError):
        page_url("https://x.invalid", "a/../b")
