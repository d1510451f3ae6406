"""Addresses that may be asked, those that may be shared, and how a manifest carries one."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tightwad_agent.errors import BadManifest, UsageError
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm.addresses import MAX_ADDRESS, check_shared, may_be_shared, web_address
from tightwad_agent.swarm.manifest import Manifest, Piece, decode
from tightwad_agent.wire.codec import pack

H = bytes(range(32))
PLAIN = Manifest(SafeName("m.gguf"), 5, H, (Piece(0, 5, H),))


@pytest.mark.parametrize(
    "url", ["https://example.org/a.gguf", "http://127.0.0.1:80/a", "http://[::1]/a", "http://localhost/a", "https://h"]
)
def test_addresses_that_may_be_shared(url: str) -> None:
    check_shared(url)
    assert may_be_shared(url)
    one = replace(PLAIN, origin=url)
    assert decode(one.encode()) == one
    assert one.root == PLAIN.root, "where it came from is not part of the identity"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/a", "not encrypted"),
        ("http://127.0.0.1.example.org/a", "not encrypted"),
        ("https://user@example.org/a", "password"),
        ("https://user:secret@example.org/a", "password"),
        ("https://:@example.org/a", "password"),
        ("https://example.org/a?token=secret", "query"),
        ("https://example.org/a#secret", "query"),
        ("https:///a", "no web address"),
        ("https://[::1/a", "no web address"),
        ("https://example.org:port/a", "no web address"),
        ("ftp://example.org/a", "no web address"),
        ("file:///etc/passwd", "no web address"),
        ("https://example.org/a b", "escaped"),
        ("https://example.org/a\r\nX: y", "escaped"),
        ("https://example.org/\u00e4", "escaped"),
        ("https://example.org/" + "x" * MAX_ADDRESS, "at most"),
    ],
)
def test_addresses_that_may_not(url: str, words: str) -> None:
    assert not may_be_shared(url)
    with pytest.raises(UsageError, match=words) as caught:
        check_shared(url)
    assert "secret" not in str(caught.value).replace("may be secret", "")
    with pytest.raises(BadManifest, match="origin"):
        replace(PLAIN, origin=url)
    head = pack([str(PLAIN.name), [], url])
    with pytest.raises(BadManifest, match="origin"):
        decode(b"TWM1" + struct.pack("!I", len(head)) + head + PLAIN.canonical)


def test_an_address_with_a_query_may_be_asked() -> None:
    assert web_address("https://example.org/a.gguf?download=true").path == "/a.gguf"


def test_manifests_from_before_there_were_origins() -> None:
    head = pack([str(PLAIN.name), []])
    old = decode(b"TWM1" + struct.pack("!I", len(head)) + head + PLAIN.canonical)
    assert old == PLAIN
    assert old.origin == ""
