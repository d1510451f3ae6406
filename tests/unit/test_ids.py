from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.ids import NO_EPOCH, Address, ClusterId, Epoch, ModelId, NodeId, NodeName, SafeName

GOOD = "abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst"
KINDS = [NodeId, ClusterId, ModelId, SafeName, NodeName]


def test_ids_are_hashes_of_keys() -> None:
    assert NodeId.of_spki(b"") == "4oymiquy7qobjgx36tejs35zeqt24qpemsnzgtfeswmrw6csxbkq"
    assert ClusterId.of_ca_key(b"") == NodeId.of_spki(b"")
    assert NodeId.of_spki(b"a") != NodeId.of_spki(b"b")
    assert NodeId(GOOD).short == ClusterId(GOOD).short == "abcdefgh"
    assert ModelId("0f" * 32).short == "0f0f0f0f0f0f"


@pytest.mark.parametrize("kind", [NodeId, ClusterId])
@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[:-1],
        GOOD + "a",
        GOOD.upper(),
        GOOD + "\n",
        "\n" + GOOD[1:],
        "0" + GOOD[1:],
        "1" * 52,
        "=" * 52,
        "é" * 52,
        "٢" * 52,
    ],
)
def test_ids_of_another_form_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"is not a {kind.__name__}"):
        kind(text)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "٠" * 64])
def test_model_ids_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a ModelId"):
        ModelId(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, 5, b"name", ["name"], {"name": 1}, object()])
def test_what_is_no_text_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=f"a {type(value).__name__} is not a {kind.__name__}"):
        kind(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_short_whatever_was_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="is not a") as caught:
        kind("\x1b" * 1_000_000)
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "model (1).gguf",
        "a..b",
        "x+y@z,[1]=2",
        "con1.gguf",
        "console.gguf",
        "m" * 200,
        "0",
    ],
)
def test_safe_names_are_file_names_on_every_system(text: str) -> None:
    name = SafeName(text)
    assert PurePosixPath("/models", name).parts == ("/", "models", text)
    assert PureWindowsPath("C:/models", name).parts == ("C:\\", "models", text)
    assert not PureWindowsPath(name).is_reserved()


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "C:x", ".hidden", "-rf", " x", "x ", "x.",
        "x\n", "x\0y", "x\ty",
        "con", "CON", "con.gguf", "nul", "NUL.txt", "aux.tar.gz", "com1", "LPT9.gguf", "con .gguf",
        "m" * 201, "naïve.gguf",
        "a:b", "a*b", "a?b", 'a"b', "a<b", "a|b", "a;b", "a$b", "a`b", "a'b", "a&b", "~x", "x\u202egguf.exe",
        "x\u2044y",
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder_or_surprise_a_shell_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a SafeName"):
        SafeName(text)


@given(st.text(max_size=20))
def test_any_safe_name_is_one_path_component(text: str) -> None:
    if SafeName.is_valid(text):
        assert PurePosixPath(text).name == text == PureWindowsPath(text).name
        assert not PureWindowsPath(text).is_reserved()


@pytest.mark.parametrize("text", ["a", "Attic-2", "box.lan", "n" * 63, "0"])
def test_node_names(text: str) -> None:
    assert NodeName(text) == text


@pytest.mark.parametrize("text", ["", "n" * 64, "-a", ".a", "a b", "a\n", "a/b", "é", "a:b"])
def test_node_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a NodeName"):
        NodeName(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("attic", "attic"),
        ("Jo's MacBook", "Jo-s-MacBook"),
        ("", "node"),
        ("---", "node"),
        ("日本", "node"),
        ("_a_", "a"),
        ("x" * 100, "x" * 63),
        ("box\n", "box"),
    ],
)
def test_any_host_name_becomes_a_node_name(text: str, name: str) -> None:
    assert NodeName.cleaned(text) == name


@given(st.text())
def test_cleaning_never_fails(text: str) -> None:
    name = NodeName.cleaned(text)
    assert type(name) is NodeName
    assert NodeName.cleaned(name) == name


@pytest.mark.parametrize("kind", [NodeId, ClusterId])
def test_checked_text_keeps_its_type_where_it_should(kind: Any) -> None:
    value = kind(GOOD)
    assert type(value) is kind
    assert value == GOOD
    assert hash(value) == hash(GOOD)
    assert type(deepcopy(value)) is type(pickle.loads(pickle.dumps(value))) is kind
    assert kind(value) == value


def test_epochs_are_ordered_by_counter_and_then_node() -> None:
    assert NO_EPOCH < Epoch(1, "a") < Epoch(1, "b") < Epoch(2, "a") < Epoch(10, "a")
    assert str(Epoch(3, GOOD)) == "3@abcdefgh"


@pytest.mark.parametrize(
    ("text", "default", "address"),
    [
        ("10.0.0.1:80", None, Address("10.0.0.1", 80)),
        ("attic.lan:80", None, Address("attic.lan", 80)),
        ("attic", 8089, Address("attic", 8089)),
        ("my_box", 8089, Address("my_box", 8089)),
        ("[::1]:80", None, Address("::1", 80)),
        ("[::1]", 8089, Address("::1", 8089)),
        ("::1", 8089, Address("::1", 8089)),
        ("[fe80::1%eth0]:80", None, Address("fe80::1%eth0", 80)),
        ("::ffff:10.0.0.1", 1, Address("::ffff:10.0.0.1", 1)),
        ("a:65535", None, Address("a", 65535)),
    ],
)
def test_addresses_people_write(text: str, default: int | None, address: Address) -> None:
    assert Address.parse(text, default) == address
    assert Address.parse(str(address)) == address
    assert Address.checked(*address) == address


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "a:", "a:b", "a:0", "a:65536", "a:-1", "a:+1", "a: 1", "a:1 ", "a:1.5", "a:٨٠",
        "a:" + "9" * 5000, "a",
        "[::1", "[]:80", "[::1]80", "[::1]x:80", "[attic]:", "::1", "1:2:3", "::g", "http://a:80",
        "https://a/", "a b:80", "a/b:80",
        "a\n:80", "user@a:80", "10.0.0.256:80", "1.2.3:80", "-a:80", "é:80", "a" * 254 + ":80", "[fe80::1%]:80",
        "[fe80::1%a b]:80",
        "[fe80::1%eth0/24]:80",
    ],
)  # fmt: skip
def test_texts_that_are_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["http://a:80", "1:2:3", "a b", "10.0.0.256", "", "[::1", "x" * 300])
def test_a_default_port_makes_no_address_of_them(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Address.parse(text, 8089)


@pytest.mark.parametrize(
    ("host", "port"), [("", 1), ("a", 0), ("a", -1), ("a", 65536), ("a b", 1), ("x" * 4000, 1), ("\n", 1)]
)
def test_addresses_from_peers_are_checked(host: str, port: int) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Address.checked(host, port)


@given(st.text(max_size=30), st.none() | st.just(8089))
def test_any_text_is_an_address_that_reads_back_or_a_value_error(text: str, default: int | None) -> None:
    try:
        address = Address.parse(text, default)
    except ValueError:
        return
    assert Address.parse(str(address)) == address == Address.checked(*address)
