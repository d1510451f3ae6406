"""Downloads from servers on loopback that behave, break off, lie, stall and redirect."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from web_host import Asked, Resource, WebHost, head, page, status

from tightwad_agent import fetch
from tightwad_agent.errors import DiskFull, EnvironmentFault, OriginError
from tightwad_agent.web import Patience, shown

DATA = bytes(range(256)) * 14_000  # 3.6 MB: several chunks
SHA = hashlib.sha256(DATA).hexdigest()
HASTY = Patience(connect_s=5, read_s=5, n_tries=3, backoff_s=0.001)


@pytest.fixture
async def host(nursery: trio.Nursery) -> WebHost:
    return await WebHost().start(nursery)


async def get(host: WebHost, dest: Path, path: str = "/f", **options: object) -> None:
    await fetch.download(host.url + path, dest, **({"patience": HASTY} | options))  # type: ignore[arg-type]


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


async def test_a_file_arrives_whole_with_its_progress(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA)
    told: list[tuple[int, int | None]] = []
    await get(host, tmp_path / "sub" / "f", sha256=SHA.upper(), size=len(DATA), progress=lambda *p: told.append(p))
    assert (tmp_path / "sub" / "f").read_bytes() == DATA
    assert leftovers(tmp_path / "sub") == ["f"]
    assert told[0] == (0, len(DATA))
    assert told[-1] == (len(DATA), len(DATA))
    assert told == sorted(told)


async def test_an_empty_file(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(b"")
    await get(host, tmp_path / "f", sha256=hashlib.sha256().hexdigest())
    assert (tmp_path / "f").read_bytes() == b""


async def test_a_body_without_a_length_is_taken_to_its_end(host: WebHost, tmp_path: Path) -> None:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200) + DATA)

    host.routes["/f"] = answer
    await get(host, tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_broken_connection_is_resumed_where_it_broke(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA, cuts=[1_500_000, 700_000])
    await get(host, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    ranges = [a.headers.get("range") for a in host.asked]
    assert ranges[0] is None
    assert ranges[1:] == ["bytes=1500000-", "bytes=2200000-"]


async def test_a_part_from_an_earlier_run_is_resumed_by_its_tag(host: WebHost, tmp_path: Path) -> None:
    resource = Resource(DATA, cuts=[2_000_000])
    host.routes["/f"] = resource
    with pytest.raises(OriginError, match=r"connection failed|ended after"):
        await get(host, tmp_path / "f", patience=Patience(n_tries=1))
    assert (tmp_path / "f.part").stat().st_size == 2_000_000
    await get(host, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert host.asked[1].headers["range"] == "bytes=2000000-"
    assert host.asked[1].headers["if-range"].startswith('"')
    assert leftovers(tmp_path) == ["f"]


async def test_a_file_that_changed_meanwhile_is_fetched_anew(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(b"old" * 700_000, cuts=[1_000_000])
    with pytest.raises(OriginError):
        await get(host, tmp_path / "f", patience=Patience(n_tries=1))
    host.routes["/f"] = Resource(DATA)
    await get(host, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_server_without_ranges_sends_all_again(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA, ranges=False, cuts=[1_000_000])
    await get(host, tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_without_tag_and_hash_nothing_is_resumed(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA, etag=False, cuts=[1_000_000])
    await get(host, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert "range" not in host.asked[1].headers


async def test_a_part_that_is_already_whole_needs_no_more(host: WebHost, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(DATA)
    host.routes["/f"] = Resource(DATA)
    await get(host, tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(host.asked) == 1


@pytest.mark.parametrize("junk", [b"x" * 1000, DATA + b"x"])
async def test_a_part_with_other_bytes_is_thrown_away(host: WebHost, tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "f.part").write_bytes(junk)
    host.routes["/f"] = Resource(DATA)
    await get(host, tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_wrong_hash_leaves_nothing(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA)
    with pytest.raises(OriginError, match=f"SHA-256 is {SHA}, expected {'0' * 64}"):
        await get(host, tmp_path / "f", sha256="0" * 64)
    assert leftovers(tmp_path) == []


async def test_a_wrong_size_is_refused_before_the_body(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA)
    with pytest.raises(OriginError, match=f"it has {len(DATA)} bytes, expected 7"):
        await get(host, tmp_path / "f", size=7)
    assert leftovers(tmp_path) == []


async def test_a_server_that_always_breaks_off_is_given_up(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA, cuts=[1000] * 50)
    with pytest.raises(OriginError, match="connection failed"):
        await get(host, tmp_path / "f", sha256=SHA)
    assert len(host.asked) == HASTY.n_tries
    assert not (tmp_path / "f").exists()


async def test_a_long_file_over_a_bad_line_goes_on_as_long_as_it_comes_further(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = Resource(DATA * 3, cuts=[1_100_000] * 8)
    await get(host, tmp_path / "f", patience=Patience(n_tries=2, backoff_s=0.001))
    assert (tmp_path / "f").read_bytes() == DATA * 3


@pytest.mark.parametrize("code", [500, 502, 503, 429])
async def test_a_passing_fault_is_tried_again(host: WebHost, tmp_path: Path, code: int) -> None:
    resource, n_faults = Resource(DATA), 2

    async def answer(asked: Asked, stream: trio.abc.Stream) -> None:
        await (resource if len(host.asked) > n_faults else status(code))(asked, stream)

    host.routes["/f"] = answer
    await get(host, tmp_path / "f", sha256=SHA)
    assert len(host.asked) == 3


@pytest.mark.parametrize(
    ("code", "words"),
    [(404, "no such file"), (410, "no such file"), (401, "access token"), (403, "access token"), (418, "HTTP 418")],
)
async def test_what_stays_wrong_is_said_at_once(host: WebHost, tmp_path: Path, code: int, words: str) -> None:
    host.routes["/f"] = status(code)
    with pytest.raises(OriginError, match=words):
        await get(host, tmp_path / "f")
    assert len(host.asked) == 1
    assert leftovers(tmp_path) == []


async def test_an_absurd_length_is_refused(host: WebHost, tmp_path: Path) -> None:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=10**18) + b"x")

    host.routes["/f"] = answer
    with pytest.raises(OriginError, match="at most"):
        await get(host, tmp_path / "f")
    host.routes["/f"] = Resource(DATA)
    with pytest.raises(OriginError, match="at most 1000 are taken"):
        await get(host, tmp_path / "f", limit_bytes=1000)


async def test_a_body_without_end_stops_at_the_limit(host: WebHost, tmp_path: Path) -> None:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200))
        while True:
            await stream.send_all(b"x" * 65536)

    host.routes["/f"] = answer
    with pytest.raises(OriginError, match="more than 1000000 bytes came"):
        await get(host, tmp_path / "f", limit_bytes=1_000_000)


async def test_a_file_larger_than_the_disk(host: WebHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.routes["/f"] = Resource(DATA)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1_000_000))
    with pytest.raises(DiskFull, match=r"0\.00 GB more are needed for f, 0\.00 GB are free"):
        await get(host, tmp_path / "f")
    assert not (tmp_path / "f").exists()


async def test_a_folder_that_cannot_be_written(host: WebHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    host.routes["/f"] = Resource(DATA)
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        await get(host, tmp_path / "file" / "f")


async def test_a_server_that_says_nothing_meets_the_deadline(
    host: WebHost, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=100) + b"x")
        await trio.sleep_forever()

    host.routes["/f"] = answer
    autojump_clock.autojump_threshold = 0.2  # real sockets need a moment
    began = trio.current_time()
    with pytest.raises(OriginError, match="did not answer in time"):
        await get(host, tmp_path / "f", patience=Patience(read_s=30, n_tries=2))
    assert 60 <= trio.current_time() - began < 90


async def test_a_server_that_drips_meets_the_window(
    host: WebHost, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=10**6))
        while True:
            await trio.sleep(10)
            await stream.send_all(b"x")

    host.routes["/f"] = answer
    autojump_clock.autojump_threshold = 0.2
    with pytest.raises(OriginError, match="sends too slowly: 6 bytes in 60 s"):
        await get(host, tmp_path / "f", patience=Patience(n_tries=1))


async def test_a_cancelled_download_keeps_what_came(host: WebHost, tmp_path: Path) -> None:
    sent = trio.Event()

    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=len(DATA), ETag='"a"') + DATA[:2_000_000])
        sent.set()
        await trio.sleep_forever()

    host.routes["/f"] = answer
    async with trio.open_nursery() as inner:

        def told(done: int, _total: int | None) -> None:
            if done >= 1_000_000:
                inner.cancel_scope.cancel()

        inner.start_soon(lambda: get(host, tmp_path / "f", progress=told))
    part = (tmp_path / "f.part").read_bytes()
    assert len(part) >= 1_000_000
    assert DATA.startswith(part)
    host.routes["/f"] = Resource(DATA)
    await get(host, tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == DATA


# Addresses


async def test_redirects_on_loopback_are_followed(host: WebHost, tmp_path: Path) -> None:
    host.routes |= {"/f": status(302, Location="/g"), "/g": status(307, Location=f"{host.url}/h"), "/h": Resource(DATA)}
    await get(host, tmp_path / "f", sha256=SHA)
    assert [a.path for a in host.asked] == ["/f", "/g", "/h"]


async def test_a_redirect_loop_ends(host: WebHost, tmp_path: Path) -> None:
    host.routes["/f"] = status(302, Location="/f")
    with pytest.raises(OriginError, match="more than 8 redirects"):
        await get(host, tmp_path / "f")


@pytest.mark.parametrize("target", ["http://192.0.2.1/f", "ftp://127.0.0.1/f", "file:///etc/passwd"])
async def test_redirects_to_plain_http_elsewhere_are_refused(host: WebHost, tmp_path: Path, target: str) -> None:
    host.routes["/f"] = status(302, Location=target)
    with pytest.raises(OriginError, match=r"refused|only https|scheme"):
        await get(host, tmp_path / "f")
    assert leftovers(tmp_path) == []


async def test_credentials_do_not_follow_to_another_host(host: WebHost, tmp_path: Path, nursery: trio.Nursery) -> None:
    other = await WebHost().start(nursery)
    other.routes["/f"] = Resource(DATA)
    host.routes["/f"] = status(302, Location=f"{other.url}/f")
    await get(host, tmp_path / "f", headers={"Authorization": "Bearer secret"})
    assert host.asked[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in other.asked[0].headers


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1/f",
        "http://example.invalid/f",
        "ftp://127.0.0.1/",
        "nonsense",
        "https://",
        "https://h:99999/",
        "https://[x/",
        "https://h:x/",
    ],
)
async def test_addresses_that_are_no_https_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(OriginError):
        await fetch.download(url, tmp_path / "f", patience=HASTY)


async def test_a_name_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OriginError, match=r"the name no-such-host\.invalid cannot be resolved"):
        await fetch.download("https://no-such-host.invalid/f", tmp_path / "f", patience=HASTY)


async def test_nobody_listening_is_said(tmp_path: Path) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(OriginError, match="connection failed"):
        await fetch.download(f"http://127.0.0.1:{port}/f", tmp_path / "f", patience=HASTY)


class TlsHost:
    """An https server on loopback with a certificate nobody knows; it answers everything with `answer`."""

    def __init__(self, folder: Path, answer: bytes) -> None:
        self.cert, key = self_signed(folder)
        self.answer = answer
        self.n_connections = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(self.cert, key)

    async def start(self, nursery: trio.Nursery) -> str:
        listeners = await nursery.start(
            lambda task_status: trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)
        )
        return f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.n_connections += 1
        tls = trio.SSLStream(stream, self._context, server_side=True)
        with trio.move_on_after(5), suppress(trio.BrokenResourceError):
            await tls.receive_some(65536)
            await tls.send_all(self.answer)
        await trio.aclose_forcefully(tls)


async def test_an_untrusted_certificate_is_said_at_once(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = TlsHost(tmp_path, head(200, Content_Length=2) + b"ok")
    url = await server.start(nursery)
    with pytest.raises(OriginError, match="certificate is not trusted"):
        await fetch.download(f"{url}/f", tmp_path / "f", patience=HASTY)
    assert server.n_connections == 1
    await fetch.download(f"{url}/f", tmp_path / "f", cert=str(server.cert), patience=HASTY)
    assert (tmp_path / "f").read_bytes() == b"ok"


async def test_a_redirect_from_https_to_http_is_refused_even_to_loopback(
    host: WebHost, tmp_path: Path, nursery: trio.Nursery
) -> None:
    host.routes["/f"] = Resource(DATA)
    server = TlsHost(tmp_path, head(302, Content_Length=0, Location=f"{host.url}/f"))
    url = await server.start(nursery)
    with pytest.raises(OriginError, match="redirects from https to plain http"):
        await fetch.download(f"{url}/f", tmp_path / "f", cert=str(server.cert), patience=HASTY)
    assert host.asked == []


def self_signed(folder: Path) -> tuple[Path, Path]:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, None)
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


async def test_an_error_never_shows_what_is_secret(host: WebHost, tmp_path: Path) -> None:
    url = host.url.replace("//", "//user:hunter2@") + "/gone?X-Signature=hunter3"
    with pytest.raises(OriginError) as caught:
        await fetch.download(url, tmp_path / "f", patience=HASTY)
    assert "hunter" not in str(caught.value)
    assert "/gone" in str(caught.value)
    assert shown("https://[::1]:8443/a?b=c") == "https://[::1]:8443/a?…"
    assert shown("https://u:p@h?b=c") == "https://h"
    assert shown("https://u:p@h:99999/a") == "https://h:99999/a"


# The package index


@pytest.fixture
def index(host: WebHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WebHost:
    """pip is configured with `host`, and with nothing of this machine."""
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:9/wrong\n")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", f"{host.url}/simple")
    return host


def listing(*files: dict[str, object]) -> bytes:
    return json.dumps({"meta": {"api-version": "1.1"}, "name": "demo", "files": files}).encode()


JSON_TYPE = "application/vnd.pypi.simple.v1+json"


async def test_the_index_that_pip_is_configured_with_is_asked(index: WebHost) -> None:
    files = [
        {
            "filename": f"demo_pkg-{v}-py3-none-any.whl",
            "url": f"../../files/{v}.whl",
            "hashes": {"sha256": SHA},
            "size": 5,
        }
        for v in ("0.9", "0.10", "1.0rc1", "0.10.post1")
    ]
    index.routes["/simple/demo-pkg/"] = page(listing(*files), JSON_TYPE)
    found = await fetch.index_file("Demo_Pkg")
    assert (found.filename, found.sha256, found.size) == ("demo_pkg-0.10.post1-py3-none-any.whl", SHA, 5)
    assert found.url == f"{index.url}/files/0.10.post1.whl"
    assert (await fetch.index_file("demo.pkg", "1.0rc1")).url == f"{index.url}/files/1.0rc1.whl"
    assert index.asked[0].headers["accept"].startswith(JSON_TYPE)


async def test_an_html_index_and_a_yanked_file(index: WebHost) -> None:
    html = f"""<!DOCTYPE html><html><body>
        <a href="/p/demo-2.0.tar.gz#sha256={SHA}" data-yanked="broken">demo-2.0.tar.gz</a>
        <a href="/p/demo-1.5.tar.gz#sha256={SHA.upper()}">demo-1.5.tar.gz</a>
        <a href="/p/demo-1.5-py3-none-any.whl">demo-1.5-py3-none-any.whl</a></body></html>"""
    index.routes["/simple/demo/"] = page(html.encode(), "text/html; charset=utf-8")
    found = await fetch.index_file("demo", kind="sdist")
    assert (found.filename, found.url, found.sha256) == ("demo-1.5.tar.gz", f"{index.url}/p/demo-1.5.tar.gz", SHA)
    assert (await fetch.index_file("demo", "2.0", kind="sdist")).filename == "demo-2.0.tar.gz"
    assert (await fetch.index_file("demo")).sha256 == ""


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"{", JSON_TYPE, "damaged page"),
        (b'{"files": 7}', JSON_TYPE, "damaged page"),
        (b'{"files": [{"url": "x"}]}', JSON_TYPE, "damaged page"),
        (b"[" * 100_000, JSON_TYPE, "damaged page"),
        (b"\xff<<<", "text/html", "no wheel"),
    ],
)
async def test_a_damaged_page(index: WebHost, body: bytes, content_type: str, words: str) -> None:
    index.routes["/simple/demo/"] = page(body, content_type)
    with pytest.raises(OriginError, match=words):
        await fetch.index_file("demo")


async def test_an_index_that_stumbles_is_asked_again_and_one_that_lies_down_is_said(index: WebHost) -> None:
    listed = page(listing({"filename": "demo-1.0.tar.gz", "url": "d.tar.gz", "hashes": {}}), JSON_TYPE)

    async def answer(asked: Asked, stream: trio.abc.Stream) -> None:
        await (listed if len(index.asked) > 2 else status(503))(asked, stream)

    index.routes["/simple/demo/"] = answer
    url = f"{index.url}/simple/demo/"
    code, _headers, body = await fetch.fetch_bytes(url, limit_bytes=1000, patience=HASTY)
    assert (code, b"demo-1.0" in body) == (200, True)
    with pytest.raises(OriginError, match="more than 10 bytes came"):
        await fetch.fetch_bytes(url, limit_bytes=10, patience=HASTY)
    index.routes["/simple/demo/"] = status(503)
    with pytest.raises(OriginError, match="HTTP 503"):
        await fetch.fetch_bytes(url, limit_bytes=10, patience=HASTY)
    index.routes["/simple/demo/"] = status(403)
    with pytest.raises(OriginError, match="HTTP 403"):
        await fetch.index_file("demo")


async def test_an_unknown_package_and_a_name_that_is_none(index: WebHost) -> None:
    with pytest.raises(OriginError, match=r"no sdist of demo 1\.0"):
        await fetch.index_file("demo", "1.0", "sdist")
    for name in ("../../etc", "a b", "", "x" * 200):
        with pytest.raises(OriginError, match="no name of a Python package"):
            await fetch.index_file(name)


async def test_without_any_setting_the_default_is_what_this_pip_says() -> None:
    from pip._internal.models.index import PyPI

    config = await fetch.index_config({"PATH": "/usr/bin", "PIP_CONFIG_FILE": "/dev/null"})
    assert config.indexes[0] == PyPI.simple_url


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "https://from-file.invalid/simple"),
        ({"UV_INDEX_URL": "https://uv.invalid/s"}, "https://uv.invalid/s"),
        ({"PIP_INDEX_URL": "https://env.invalid/s", "UV_INDEX_URL": "https://uv.invalid/s"}, "https://env.invalid/s"),
    ],
)
async def test_pips_file_is_read_and_its_environment_wins(
    tmp_path: Path, environ: dict[str, str], expected: str
) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://from-file.invalid/simple\ncert = /ca.pem\n"
        "extra-index-url =\n  https://extra.invalid/simple\n  file:///opt/x\n[download]\ntrusted-host = a b:81\n"
    )
    config = await fetch.index_config({"PATH": "/usr/bin", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **environ})
    assert config.indexes == (expected, "https://extra.invalid/simple")
    assert (config.cert, config.trusted_hosts) == ("/ca.pem", ("a", "b:81"))


async def test_no_index_is_respected(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nno-index = true\n")
    with pytest.raises(OriginError, match="no-index"):
        await fetch.index_config({"PATH": "/usr/bin", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")})
