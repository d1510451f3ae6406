"""A llama-server that counts instead of drafting (each token is the one before, plus one), and misbehaves as told.

`control` is a JSON file beside it, read with each completion: `answer`: ok | status | garbage | half | nojson |
notutf8 | close | hang | die | fewer | more | words | endless | huge · `status` for `status` · `delay_s` before each
answer · `once`: be like that for one completion only · `keep`: 0 closes each connection after its answer · `n_vocab` ·
`load`: ok | exit | hang (never healthy) | odd (does not say its vocabulary).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.engine.drafter import DrafterLimits, DrafterService
from tightwad_agent.engine.drafting import DrafterSpec, DraftingService
from tightwad_agent.engine.leased import Phase
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.ids import Epoch, ModelId
from tightwad_agent.testing import MemoryMesh, MemoryNode
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import unpack_tokens

SERVER = r"""
import http.server, json, os, pathlib, sys, time
path = pathlib.Path(__file__).parent / "control"
args = dict(zip(sys.argv[1:], sys.argv[2:]))
print("args:", *sys.argv[1:], flush=True)
if json.loads(path.read_text())["load"] == "exit":
    sys.exit("error: failed to load model")

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def reply(self, status, body, length=None, keep=True):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if not keep:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        control = json.loads(path.read_text())
        model = {"meta": {"n_vocab": control["n_vocab"], "n_ctx": int(args["-c"])}}
        if self.path == "/health":
            self.reply(503 if control["load"] == "hang" else 200, b"{}")
        else:
            self.reply(200, json.dumps({"data": [model if control["load"] != "odd" else {}]}).encode())
    def do_POST(self):
        control = json.loads(path.read_text())
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        how = control["answer"]
        if control["once"]:
            path.write_text(json.dumps(control | {"answer": "ok", "once": False}))
        with (path.parent / "asked").open("a") as log:
            log.write(json.dumps({k: asked.get(k) for k in ("prompt", "n_predict", "id_slot")}) + "\n")
        time.sleep(control["delay_s"])
        n = asked["n_predict"]
        made = [
            {"tokens": [(p[-1] + 1 + i) % 1000 for i in range(n)], "stop_type": "eos" if p[-1] == 665 else "limit",
             "timings/prompt_ms": 20.0, "timings/predicted_ms": 0.1}
            for p in asked["prompt"]
        ]
        if how == "fewer": made = made[1:] or [{}]
        if how == "more": made[0]["tokens"] += [1]
        if how == "words": made[0]["tokens"] = ["one"]
        body = json.dumps(made if len(made) > 1 else made[0]).encode()
        if how == "status":
            self.reply(control["status"], json.dumps({"error": {"message": "no such luck"}}).encode())
        elif how == "garbage": self.wfile.write(b"\x00\xff" * 40 + b"\r\n\r\n")
        elif how == "half":
            self.reply(200, body[:9], len(body)); self.close_connection = True
        elif how == "nojson": self.reply(200, b"<html>")
        elif how == "notutf8": self.reply(200, body + b"\xe2\x82")
        elif how == "close": self.close_connection = True
        elif how == "hang": time.sleep(600)
        elif how == "die": os._exit(3)
        elif how == "huge": self.reply(200, b"", 10**12)
        elif how == "endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True: self.wfile.write(b"X-More: " + b"y" * 1000 + b"\r\n")
        else: self.reply(200, body, keep=control["keep"])
    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer.daemon_threads = True
http.server.ThreadingHTTPServer(("127.0.0.1", int(args["--port"])), Handler).serve_forever()
"""

DRAFT = ModelId("a" * 64)
POLICY = RestartPolicy(first_delay_s=0.02, max_delay_s=0.1, max_crashes=3)


async def until(met: Callable[[], object], deadline_s: float = 20) -> None:
    with trio.fail_after(deadline_s):
        while not met():
            await trio.sleep(0.005)


@dataclass
class Inbox:
    """What a session was told."""

    events: list[Drafted | NoDraft] = field(default_factory=list)

    def __call__(self, event: Drafted | NoDraft) -> None:
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [token for e in self.events if isinstance(e, Drafted) for token in unpack_tokens(e.tokens)]

    @property
    def refusals(self) -> list[str]:
        return [e.reason for e in self.events if isinstance(e, NoDraft)]

    async def drafted(self, n: int) -> list[int]:
        """The first `n` tokens."""
        await until(lambda: len(self.tokens) >= n or self.refusals)
        assert not self.refusals
        return self.tokens[:n]

    async def refusal(self) -> str:
        await until(lambda: self.refusals)
        return self.refusals[0]


@dataclass
class Rig:
    """A coordinator `c` and a drafter `d` on one memory mesh."""

    nursery: trio.Nursery
    tmp_path: Path
    mesh: MemoryMesh = field(init=False)
    home: MemoryNode = field(init=False)
    node: MemoryNode = field(init=False)
    epoch: Epoch = field(init=False)
    model: Path = field(init=False)
    service: DrafterService = field(init=False)
    drafting: DraftingService = field(init=False)
    accepted: bool = True
    phases: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mesh = MemoryMesh(self.nursery)
        self.home, self.node = self.mesh.add("c"), self.mesh.add("d")
        self.epoch = Epoch(3, self.home.node)
        self.model = self.tmp_path / "draft.gguf"
        self.model.touch()
        self.folder = self.tmp_path / "engine"
        self.folder.mkdir()
        (self.folder / "llama-server").write_text(f"#!{sys.executable} -IS\n" + SERVER)
        (self.folder / "llama-server").chmod(0o755)
        self.control()

    def control(self, **values: Any) -> None:
        plain = {"answer": "ok", "status": 500, "delay_s": 0, "once": False, "keep": 1, "n_vocab": 1000, "load": "ok"}
        (self.folder / "new").write_text(json.dumps(plain | values))
        (self.folder / "new").replace(self.folder / "control")

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]

    async def open(self, **options: Any) -> Rig:
        given = {"limits": DrafterLimits(start_s=5, load_s=5), "policy": POLICY} | options
        self.service = DrafterService(
            engine=lambda: Engine(self.folder, "d" * 64, "7.0.0"),
            spawner=Spawner(self.nursery, self.tmp_path / "state"),
            path_of=lambda model: self.model if model == DRAFT else None,
            accepts=lambda epoch, peer: self.accepted,
            on_change=lambda: self.phases.append(str(self.service.state.phase)),
            **given,
        )
        self.node.methods |= self.service.methods
        self.node.streams |= self.service.streams
        await self.nursery.start(self.service.run)
        self.drafting = DraftingService(
            call=self.home.call,
            open_stream=self.home.open_stream,
            policy=RestartPolicy(first_delay_s=0.02, max_delay_s=0.05),
        )
        await self.nursery.start(self.drafting.run)
        return self

    def order(self, **values: Any) -> dict[str, Any]:
        return {
            "epoch": [self.epoch.counter, str(self.epoch.node)],
            "model": str(DRAFT),
            "context": 200,
            "slots": 2,
            "run": 0,
        } | values

    async def start(self, **values: Any) -> dict[str, Any]:
        with trio.fail_after(10):
            return await self.home.call(self.node.node, "draft.start", self.order(**values))

    def spec(self, **values: Any) -> DrafterSpec:
        given = {"model": DRAFT, "epoch": self.epoch, "n_vocab": 1000, "context": 200, "slots": 2} | values
        return DrafterSpec(node=self.node.node, name="d", **given)

    async def ready(self, **values: Any) -> Any:
        """A drafter that can be asked."""
        self.drafting.set_drafters([self.spec(**values)])
        await until(self.drafting.ready)
        return self.drafting.ready()[0]

    async def until_phase(self, phase: Phase) -> None:
        await until(lambda: self.service.state.phase is phase)
