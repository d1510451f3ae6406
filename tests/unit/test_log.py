from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent import log

TOKEN = "tw1" + "AbC-_9" * 34
KEY = "twk_" + "Zy0-" * 8
PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\nc2VjcmV0\n-----END PRIVATE KEY-----"
LOGGER = logging.getLogger("tightwad_agent.mesh.links")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def fail(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


def lines(level: str = "debug", json: bool = False) -> io.StringIO:
    stream = io.StringIO()
    logging.getLogger().handlers.clear()  # pytest's own would format the records first
    log.setup(level, json, stream)
    return stream


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"joined with {TOKEN}.", "joined with tw1[hidden]."),
        (f"--join={TOKEN}", "--join=tw1[hidden]"),
        (f"['up', '--join', '{TOKEN}']", "['up', '--join', 'tw1[hidden]']"),
        (f"key {KEY}!", "key twk_[hidden]!"),
        ("Authorization: Bearer sk-12345678", "Authorization: [hidden]"),
        ("authorization: Basic dXNlcjpwYXNz\r\nHost: x", "authorization: [hidden]\r\nHost: x"),
        ("{'Authorization': 'Bearer abcdef123'}", "{'Authorization': '[hidden]'}"),
        ("[(b'authorization', b'Bearer abcdef123')]", "[(b'authorization', b'[hidden]')]"),
        ('{"api_key": "abcdef"}', '{"api_key": "[hidden]"}'),
        ("sent (bearer abcdef123), then", "sent (bearer [hidden]), then"),
        ("X-Api-Key=hunter22", "X-Api-Key=[hidden]"),
        (f"wrote {PEM} to disk", "wrote [hidden] to disk"),
        (repr(PEM), "'[hidden]'"),
        ("-----BEGIN EC PRIVATE KEY-----\ncut off here", "[hidden]"),
    ],
)
def test_secrets_are_taken_out(text: str, shown: str) -> None:
    assert log.redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "tw1 is how a token begins",
        "the authorization of beta failed",
        "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----",
        "a basic placement of 3 workers",
        "no secret was sent",
        "model tiny.gguf, sha256 " + "0f" * 32,
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert log.redact(text) == text


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("secret", [TOKEN, KEY, PEM])
def test_no_part_of_a_record_shows_a_secret(secret: str, as_json: bool) -> None:
    stream = lines(json=as_json)
    try:
        fail(RuntimeError(secret), ValueError(f"inner {secret}"))
    except RuntimeError:
        LOGGER.exception(
            "got %s and %r", secret, {"k": secret}, stack_info=True, extra={"deep": {secret: [secret]}, "flat": secret}
        )
    LOGGER.warning(secret, "too many", "arguments")
    LOGGER.error(ValueError(secret))
    text = stream.getvalue()
    assert "Traceback" in text
    assert "hidden" in text
    for part in (secret[:24], secret[-24:], "c2VjcmV0"):
        assert part not in text


@pytest.mark.parametrize("as_json", [False, True])
def test_a_key_in_the_source_does_not_come_out_with_the_stack(as_json: bool) -> None:
    stream = lines(json=as_json)
    LOGGER.info("calling", stack_info=True)  # twk_0123456789
    assert "twk_[hidden]" in stream.getvalue()


def test_a_line_for_people() -> None:
    stream = lines()
    log.node.set("attic")
    LOGGER.warning("lost %s: timed out", "beta", extra={"peer": "abcd", "n": 2})
    text = stream.getvalue()
    assert text[2] == text[5] == ":"
    assert text[12:] == " warning [attic] mesh.links: lost beta: timed out peer=abcd n=2\n"


def test_the_node_is_that_of_the_task_that_logs() -> None:
    import trio

    stream = lines(json=True)

    async def node(name: str) -> None:
        log.node.set(name)
        await trio.lowlevel.checkpoint()
        LOGGER.info("hello")

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node, "a")
            nursery.start_soon(node, "b")

    trio.run(both)
    assert {json.loads(line)["node"] for line in stream.getvalue().splitlines()} == {"a", "b"}


def test_what_another_machine_wrote_cannot_forge_lines_or_move_the_cursor() -> None:
    stream = lines()
    LOGGER.info("peer said %s", "no\n12:00:00.000 info mesh: all is well\x1b[2J\x9b\u202egpj\ud800")
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert text.splitlines()[1].startswith("    12:00")
    assert "\x1b" not in text
    assert r"\x1b[2J\x9b\x202egpj\xd800" in text


def test_a_json_line_holds_every_field() -> None:
    stream = lines(json=True)
    LOGGER.info(
        "piece.verified",
        extra={"index": 3, "share": float("nan"), "level": "mine", "path": io, "deep": [[[[[[[["x"]]]]]]]]},
    )
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert entry["message"] == "piece.verified"
    assert (entry["level"], entry["level_"], entry["logger"]) == ("info", "mine", "tightwad_agent.mesh.links")
    assert (entry["index"], entry["share"], entry["deep"]) == (3, "nan", [[[[[["…"]]]]]])
    assert isinstance(entry["time"], float)
    assert "exception" not in entry


def test_a_json_exception_is_one_line() -> None:
    stream = lines(json=True)
    try:
        fail(ValueError("two\nlines"))
    except ValueError:
        LOGGER.exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: two\nlines")


def test_levels_and_quiet_libraries() -> None:
    stream = lines("info")
    LOGGER.debug("hidden")
    logging.getLogger("httpx").info("HTTP Request: GET …")
    logging.getLogger("zeroconf").info("chatter")
    logging.getLogger("zeroconf").warning("trouble")
    assert stream.getvalue().count("\n") == 1
    assert "zeroconf: trouble" in stream.getvalue()


def test_a_second_setup_replaces_the_first() -> None:
    first = lines()
    second = io.StringIO()
    log.setup("error", False, second)
    LOGGER.warning("nobody")
    LOGGER.error("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        log.setup("loud")


@given(st.text(alphabet="abc \n\"'=:,\\", max_size=30), st.text(alphabet="abc \n\"'=:,\\.", max_size=30))
def test_a_secret_is_found_in_any_surroundings(before: str, after: str) -> None:
    for secret in (TOKEN, KEY):
        assert secret[8:40] not in log.redact(before + secret + after)


@given(st.text())
def test_redaction_is_stable(text: str) -> None:
    once = log.redact(text)
    assert log.redact(once) == once
