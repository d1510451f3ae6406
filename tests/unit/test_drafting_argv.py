"""The drafter's command line, its commands, and what counts as an answer of its server."""

from __future__ import annotations

import pytest

from tightwad_agent.engine.argv import draft_argv
from tightwad_agent.engine.commands import DrafterStarted, StartDrafter
from tightwad_agent.engine.draft_server import MAX_BODY, Broken, parse_head
from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import Epoch, ModelId


def argv(**more: object) -> list[str]:
    given = {"model": "/m/draft.gguf", "port": 4711, "context": 2048, "slots": 3} | more
    return draft_argv("/e/llama-server", **given)  # type: ignore[arg-type]


def value(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


def test_a_drafter_listens_on_loopback_and_fetches_nothing() -> None:
    args = argv()
    assert args[0] == "/e/llama-server"
    assert (value(args, "--host"), value(args, "--port")) == ("127.0.0.1", "4711")
    assert {"--offline", "--no-ui", "--no-slots"} <= set(args)
    assert value(args, "--cors-origins") == "localhost"


def test_a_drafter_can_go_back_at_once_in_one_context_for_all() -> None:
    args = argv()
    assert {"--kv-unified", "--swa-full"} <= set(args)
    assert (value(args, "-c"), value(args, "-np"), value(args, "--cache-ram")) == ("2048", "3", "0")
    assert value(args, "-m") == "/m/draft.gguf"


@pytest.mark.parametrize(("devices", "named"), [((), "none"), (("CUDA0", "CUDA1"), "CUDA0,CUDA1")])
def test_a_drafter_uses_the_devices_it_is_given_and_no_others(devices: tuple[str, ...], named: str) -> None:
    assert value(argv(devices=devices), "-dev") == named


def test_threads_are_the_default_unless_given() -> None:
    assert "-t" not in argv()
    assert value(argv(threads=2), "-t") == "2"


def test_an_order_survives_the_way_to_the_drafter() -> None:
    order = StartDrafter(Epoch(3, "n"), ModelId("c" * 64), 4096, 4, 7)
    assert StartDrafter.of_params(order.to_params()) == order
    started = DrafterStarted(49152, 4096, 4)
    assert DrafterStarted.of_plain(started.to_plain()) == started
    with pytest.raises(ProtocolError):
        DrafterStarted.of_plain({"n_vocab": "many", "context": 1, "slots": 1})


@pytest.mark.parametrize(
    ("head", "parsed"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12", (200, 12, True)),
        (b"HTTP/1.1 503 Service Unavailable\r\nX: content-length\r\ncontent-length:0", (503, 0, True)),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1", (200, 1, False)),
    ],
)
def test_heads(head: bytes, parsed: tuple[int, int, bool]) -> None:
    assert parse_head(head) == parsed


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 2x0 OK\r\nContent-Length: 1",
        b"SSH-2.0-x\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d" % (MAX_BODY + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000,
    ],
)
def test_heads_that_are_none(head: bytes) -> None:
    with pytest.raises(Broken):
        parse_head(head)
