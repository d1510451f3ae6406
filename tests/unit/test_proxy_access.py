"""Who may ask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import Forbidden, Unauthorized
from tightwad_agent.proxy.access import Access, check, check_admin, is_loopback, machine_names, presents_key

KEY = "tw-secret"
GUARD = Access(machine_names("Box.home", ["192.168.1.5"]))
LOCAL, LAN = "127.0.0.1", "192.168.1.9"
BEARER = (b"authorization", b"Bearer tw-secret")


def ask(peer=LOCAL, host=b"localhost:8088", *more, method="POST", guard=GUARD):
    return check(guard, holder, peer, method, [(b"host", host), *more])


def holder(key):
    return {KEY.encode(): "mine"}.get(key, "")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "::1%lo"])
def test_loopback(address):
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["192.168.1.5", "::ffff:192.168.1.5", "fe80::1%eth0", "", "localhost", "::2"])
def test_not_loopback(address):
    assert not is_loopback(address)


@pytest.mark.parametrize(
    "host",
    [
        b"localhost",
        b"LOCALHOST:8088",
        b"127.0.0.1:8088",
        b"[::1]:8088",
        b"10.0.0.7:1",
        b"box.home",
        b"box",
        b"box.local",
        b"a.localhost",
        b"localhost.",
        b"[::ffff:127.0.0.1]:8088",
        b"[fe80::1%eth0]",
        b"[2001:db8::7]:8088",
    ],
)
def test_own_hosts(host):
    ask(LOCAL, host)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"",
        b"\xff",
        b"[::1",
        b"a@evil",
        b"x:y",
        b"evil@localhost",
        b"evil:x@localhost",
        b"localhost/evil",
        b"localhost?x",
        b"localhost#x",
        b"localhost\\evil",
        b" localhost",
        b"localhost ",
        b"localhost:8088:1",
        b"localhost:",
        b"localhost:123456",
        b"localhost, evil.example",
        b"[localhost]",
        b"[::1]evil",
        b"::1",
        b"2130706433",
        b"0x7f.1",
        b"127.1",
        b"a" * 300 + b".localhost",
        b"local\xe2\x93\x97host",
        b"[::ffff:127.0.0.1.evil.example]",
    ],
)
def test_rebinding(host):
    with pytest.raises(Forbidden):
        ask(LOCAL, host)


def test_key_is_past_host_and_origin():
    ask(LOCAL, b"ai.example.com", BEARER, (b"origin", b"https://chat.example"))


@pytest.mark.parametrize("origin", [b"http://localhost:3000", b"http://127.0.0.1", b"http://[::1]:1"])
def test_own_origins(origin):
    ask(LOCAL, b"localhost:8088", (b"origin", origin))


def test_page_of_the_endpoint_itself():
    ask(LOCAL, b"192.168.1.5:8088", (b"origin", b"http://192.168.1.5:8088"))


@pytest.mark.parametrize(
    "origin", [b"https://evil.example", b"null", b"http://203.0.113.5", b"", b"\xff", b"file://", b"http://[", b"x"]
)
def test_other_origins(origin):
    with pytest.raises(Forbidden):
        ask(LOCAL, b"localhost:8088", (b"origin", origin))


def test_a_second_origin_does_not_hide_the_first():
    with pytest.raises(Forbidden):
        ask(LOCAL, b"localhost", (b"origin", b"http://localhost"), (b"origin", b"https://evil.example"))


def test_cross_site_without_origin():
    with pytest.raises(Forbidden):
        ask(LOCAL, b"localhost", (b"sec-fetch-site", b"cross-site"), method="GET")
    ask(LOCAL, b"localhost", (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"), method="GET")
    with pytest.raises(Forbidden):
        ask(LOCAL, b"localhost", (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"))
    ask(LOCAL, b"localhost", (b"sec-fetch-site", b"same-origin"))


@pytest.mark.parametrize(
    "header",
    [BEARER, (b"authorization", b"bearer  tw-secret"), (b"x-api-key", b"tw-secret")],
)
def test_key_opens_from_elsewhere(header):
    ask(LAN, b"whatever", header)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer \xe9")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer tw-secret2")],
        [(b"authorization", b"Basic tw-secret")],
        [(b"authorization", b"")],
        [(b"x-api-key", b"")],
        [BEARER, (b"x-api-key", b"wrong")],
        [BEARER, BEARER, BEARER],
    ],
)
def test_wrong_key(headers):
    with pytest.raises(Unauthorized, match="tightwad-agent key"):
        ask(LAN, b"localhost", *headers)


@given(st.binary(max_size=60))
def test_any_bytes_as_key(value):
    if value != b"Bearer tw-secret":
        assert not presents_key([(b"authorization", value)], KEY)


def test_an_empty_key_opens_nothing():
    assert not presents_key([(b"authorization", b"Bearer "), (b"x-api-key", b"")], "")


SITE, MODE, DEST = b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"


@pytest.mark.parametrize(
    ("method", "host", "headers", "taken"),
    [
        ("POST", b"localhost:8088", [(SITE, b"same-origin")], True),
        ("POST", b"localhost:8088", [(SITE, b"none")], True),
        ("GET", b"localhost:8088", [(SITE, b"same-site")], True),  # another port of this machine
        ("GET", b"box.home:8088", [(SITE, b"same-site")], False),  # another machine under the same name
        ("GET", b"box.home:8088", [(SITE, b"Same-Site"), (MODE, b"no-cors")], False),
        ("GET", b"box.home:8088", [(SITE, b"same-site"), (MODE, b"navigate")], True),
        ("GET", b"localhost", [(SITE, b"cross-site"), (MODE, b"navigate"), (DEST, b"document")], True),
        ("GET", b"localhost", [(SITE, b"cross-site"), (MODE, b"navigate"), (DEST, b"iframe")], False),
        ("HEAD", b"localhost", [(SITE, b"cross-site"), (MODE, b"no-cors"), (DEST, b"image")], False),
        ("POST", b"localhost", [(SITE, b"cross-site"), (MODE, b"navigate"), (DEST, b"document")], False),
        ("GET", b"localhost", [(b"origin", b"null"), (b"upgrade", b"websocket")], False),
        ("GET", b"localhost", [(b"origin", b"https://evil.example"), (b"upgrade", b"websocket")], False),
        ("GET", b"localhost", [(b"origin", b"http://[::ffff:127.0.0.1]:3000")], True),
        ("POST", b"localhost", [(b"origin", b"http://localhost.evil.example")], False),
        ("POST", b"localhost", [(b"origin", b"http://localhost@evil.example")], False),
        ("POST", b"localhost", [(b"origin", b"http://" + b"a" * 10_000)], False),
        ("POST", b"10.0.0.7", [(b"origin", b"http://10.0.0.8")], False),
        ("POST", b"10.0.0.7:8088", [(b"origin", b"http://10.0.0.7:9999")], False),
        ("POST", b"10.0.0.7:8088", [(b"origin", b"http://10.0.0.7:8088")], True),
        (
            "OPTIONS",
            b"localhost",
            [(b"origin", b"https://evil.example"), (b"access-control-request-method", b"POST")],
            0,
        ),
    ],
)
def test_what_browsers_send(method, host, headers, taken):
    if taken:
        assert ask(LOCAL, host, *headers, method=method) == ""
    else:
        with pytest.raises(Forbidden):
            ask(LOCAL, host, *headers, method=method)


def test_whose_key_it_is():
    assert ask(LAN, b"whatever", BEARER) == "mine"
    assert ask(LAN, b"whatever", BEARER, (b"x-api-key", KEY.encode())) == "mine"
    assert ask(LOCAL, b"localhost", (b"x-api-key", b"any")) == "", "programs here send what they like"


def test_a_key_that_is_not_in_force_is_called_that():
    with pytest.raises(Unauthorized, match="not in force"):
        ask(LAN, b"whatever", (b"x-api-key", b"revoked"))


@pytest.mark.parametrize(
    "browser", [(b"origin", b"http://evil.example"), (SITE, b"same-origin"), (b"user-agent", b"Mozilla/5.0 (X11)")]
)
def test_rebinding_of_another_machine_with_an_open_endpoint(browser):
    """A page that had its own name lead to this machine is same-origin in the eyes of the browser."""
    guard = Access(machine_names("Box.home"), open_endpoint=True)
    with pytest.raises(Forbidden):
        ask(LAN, b"evil.example", browser, method="GET", guard=guard)
    ask(LAN, b"box.home:8088", (b"user-agent", b"Mozilla/5.0"), guard=guard)
    ask(LAN, b"my.own.dns.name", (b"user-agent", b"curl/8"), guard=guard)


def test_open_endpoint():
    guard = Access(open_endpoint=True)
    ask(LAN, b"any.name", guard=guard)
    with pytest.raises(Forbidden):
        ask(LAN, b"any.name", (b"origin", b"https://evil.example"), guard=guard)
    with pytest.raises(Forbidden):
        ask(LOCAL, b"evil.example", guard=guard)


class TestAdmin:
    def test_key_on_loopback(self):
        check_admin(KEY, LOCAL, [BEARER])

    def test_not_from_elsewhere_even_with_the_key(self):
        with pytest.raises(Forbidden):
            check_admin(KEY, LAN, [BEARER])

    @pytest.mark.parametrize("header", [(b"origin", b"http://localhost"), (b"sec-fetch-site", b"none")])
    def test_not_from_browsers(self, header):
        with pytest.raises(Forbidden):
            check_admin(KEY, LOCAL, [BEARER, header])

    def test_not_without_the_key(self):
        with pytest.raises(Unauthorized):
            check_admin(KEY, LOCAL, [])
