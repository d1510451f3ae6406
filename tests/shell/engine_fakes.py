"""Programs that behave like llama.cpp's, without a model: for faults that the real ones show too rarely.

`control` is a JSON file beside the programs; they read it when they start (and `slots` with each request):
`version`: what the worker's HELLO says · `worker`: ok | exit | mute · `server`: ok | exit | abort | loading ·
`connects`: how often the server connects to each worker while loading · `slots`: the body of `/slots` ·
`verifier`: ok | mute | loading | refuse | garbage | close | exit | abort, in answer to `Load` · `refused`: fields of
its refusal · `open`: ok | garbage | hang | exit | abort, in answer to a request.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.engine.hello import probe
from tightwad_agent.engine.plan import DeviceUse, Plan, WorkerUse
from tightwad_agent.engine.pool import Back, PoolPhase, PoolService, PoolState
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.engine.target import Loss, PoolLimits, ServedBy, TargetSpec
from tightwad_agent.engine.worker import WorkerLimits, WorkerPhase, WorkerService
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.testing import MemoryMesh, MemoryNode

WORKER = r"""
import json, os, pathlib, socket, sys, time
control = json.loads((pathlib.Path(__file__).parent / "control").read_text())
print("args:", *sys.argv[1:], flush=True)
if control["worker"] == "exit":
    sys.exit("no such device")
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])), backlog=1)
while True:
    client, _ = listener.accept()
    with client:
        data = b""
        while len(data) < 33 and (more := client.recv(33 - len(data))):
            data += more
        if control["worker"] == "mute":
            time.sleep(600)
        if len(data) == 33:
            client.sendall((28).to_bytes(8, "little") + bytes(control["version"]) + bytes(25))
        while (data := client.recv(65536)):
            client.sendall(data)
"""

SERVER = r"""
import http.server, json, os, pathlib, socket, sys, threading
path = pathlib.Path(__file__).parent / "control"
control = json.loads(path.read_text())
args = dict(zip(sys.argv[1:], sys.argv[2:]))
print("args:", *sys.argv[1:], flush=True)
if control["server"] == "exit":
    sys.exit("error: failed to load model")
if control["server"] == "abort":
    os.abort()
held = []
for address in filter(None, args.get("--rpc", "").split(",")):
    for i in range(control["connects"]):
        client = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        client.sendall(bytes([14]) + (24).to_bytes(8, "little") + bytes(24))
        got = b""
        while len(got) < 36:
            more = client.recv(36 - len(got))
            if not more:
                os.abort()
            got += more
        if i + 1 < control["connects"]:
            client.close()
        else:
            client.sendall(b"x" * 1000)
            held.append(client)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        status, body = 200, b"{}"
        if self.path == "/health" and control["server"] == "loading":
            status = 503
        if self.path == "/slots":
            body = json.dumps(json.loads(path.read_text())["slots"]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(args["--port"])), Handler).serve_forever()
"""

VERIFIER = r"""
import json, os, pathlib, socket, sys, time
folder, sys.path[0:0] = pathlib.Path(sys.argv[1]), sys.argv[3:]
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import *
control = json.loads((folder / "control").read_text())
sock = socket.socket(fileno=int(sys.argv[2]))
decoder = FrameDecoder(MAX_HEADER)
tell = lambda message: sock.sendall(encode(FROM_VERIFIER.encode(message)))
requests = {}

def misbehave(how):
    if how == "garbage":
        sock.sendall(b"\xff" * 64)
    if how == "close":
        sock.shutdown(socket.SHUT_RDWR)
        time.sleep(600)
    if how == "exit":
        sys.exit("error: no such thing")
    if how == "abort":
        os.abort()
    if how in ("hang", "mute"):
        time.sleep(600)

def load(message):
    how = control["verifier"]
    held = []
    for port in message.rpc_ports:  # as libllama: a connection that stays
        held.append(socket.create_connection(("127.0.0.1", port)))
        held[-1].sendall(b"x" * 1000)
    requests["held"] = held
    print("load:", message, flush=True)
    if how == "refuse":
        tell(Refused(**control["refused"]))
        sys.exit(0)
    if how == "loading":
        tell(Loading(7))
        time.sleep(600)
    misbehave(how)
    tell(Loaded(message.context, message.context, message.slots, 49152, Rollback.FULL))

def advance(message, draft):
    end, left = requests[message.request]
    n = 0
    while n < len(draft) and draft[n] == end + n:
        n += 1
    tokens = list(range(end, end + n + 1))[:left]
    requests[message.request] = (end + len(tokens), left - len(tokens))
    ended = Ended.LENGTH if left == len(tokens) else Ended.NOT
    pieces = tuple(b"%d " % token for token in tokens)
    tell(Accepted(message.request, end, pack_tokens(tokens), pieces, len(draft), n, ended))

while data := sock.recv(65536):
    for frame in decoder.feed(data):
        match TO_VERIFIER.decode(frame.header):
            case Load() as message:
                load(message)
            case Tokenize() as message:
                tell(Tokenized(message.call, pack_tokens(list(message.text))))
            case Detokenize() as message:
                tell(Text(message.call, bytes(unpack_tokens(message.tokens))))
            case Open() as message:
                misbehave(control["open"])
                requests[message.request] = (len(message.prompt) // 4, message.max_tokens)
                advance(message, [])
            case Round() as message if message.request in requests:
                for draft in [unpack_tokens(message.draft)] + [[]] * message.free:
                    if requests[message.request][1]:
                        advance(message, draft)
            case Close() as message:
                requests.pop(message.request, None)
"""
"""Its model says the number of each position; a draft is right where it says so too."""

DEFAULTS: dict[str, Any] = {
    "version": [7, 0, 0],
    "worker": "ok",
    "server": "ok",
    "connects": 17,
    "slots": [],
    "verifier": "ok",
    "refused": {"kind": "internal", "reason": "no"},
    "open": "ok",
}
BUSY = {"id": 0, "is_processing": True, "id_task": 1, "next_token": [{"n_decoded": 5}]}
POLICY = RestartPolicy(first_delay_s=0.02, max_delay_s=0.1, max_crashes=4)


@dataclass
class FakeEngine:
    """A folder with the two programs."""

    folder: Path
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.control()
        for name, code in (("ggml-rpc-server", WORKER), ("llama-server", SERVER)):
            path = self.folder / name
            path.write_text(f"#!{sys.executable} -IS\n{code}")
            path.chmod(0o755)
        self.engine = Engine(self.folder, "d" * 64, "7.0.0")

    def verifier(self, fd: int) -> list[str]:
        """The command line of a verifier that is none."""
        return [sys.executable, "-I", "-S", "-c", VERIFIER, str(self.folder), str(fd), *filter(None, sys.path)]

    def control(self, **changes: object) -> None:
        path = self.folder / "control"
        temporary = self.folder / "control.new"
        temporary.write_text(json.dumps(DEFAULTS | changes))
        temporary.replace(path)


@dataclass
class Worker:
    """A node with a worker service."""

    node: MemoryNode
    fake: FakeEngine
    service: WorkerService
    states: list[str]

    @property
    def id(self) -> NodeId:
        return self.node.node

    @property
    def pid(self) -> int:
        assert self.service.state.pid is not None
        return self.service.state.pid

    def use(self) -> WorkerUse:
        return WorkerUse(self.id, (DeviceUse("CPU", 1 << 30),), self.fake.engine.digest)

    async def until(self, phase: WorkerPhase) -> None:
        await until(lambda: self.service.state.phase is phase)


async def until(met: Callable[[], object], deadline_s: float = 20) -> None:
    """Waits for something that only shows in a state."""
    with trio.fail_after(deadline_s):
        while not met():
            await trio.sleep(0.005)


class Rig:
    """Nodes in one process over `MemoryMesh`, with fake programs; `c` is the coordinator."""

    def __init__(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        self.nursery = nursery
        self.tmp_path = tmp_path
        self.mesh = MemoryMesh(nursery)
        self.home = self.mesh.add("c")
        self.epoch = Epoch(3, self.home.node)
        self.fake = FakeEngine(tmp_path / "c" / "engine")
        self.losses: list[Loss] = []
        self.backs: list[Back] = []
        self.states: list[PoolState] = []
        self.model = tmp_path / "model.gguf"
        self.model.write_bytes(b"x" * 1000)

    def spawner(self, name: str) -> Spawner:
        return Spawner(self.nursery, self.tmp_path / name)

    async def worker(self, name: str, **options: Any) -> Worker:
        fake = FakeEngine(self.tmp_path / name / "engine")
        states: list[str] = []
        settings: dict[str, Any] = {
            "engine": lambda: fake.engine,
            "spawner": self.spawner(name),
            "probe": probe,
            "accepts": lambda epoch, peer: peer == self.home.node,
            "offered": lambda: ("CPU",),
            "limits": WorkerLimits(start_s=5, hello_s=5),
            "policy": POLICY,
            "on_change": lambda: states.append(str(service.state.phase)),
        }
        service = WorkerService(**(settings | options))
        node = self.mesh.add(name)
        node.methods |= service.methods
        node.streams |= service.streams
        await self.nursery.start(service.run)
        return Worker(node, fake, service, states)

    async def pool(self, **options: Any) -> PoolService:
        settings: dict[str, Any] = {
            "engine": lambda: self.fake.engine,
            "spawner": self.spawner("c"),
            "probe": probe,
            "call": self.home.call,
            "open_stream": self.home.open_stream,
            "on_lost": self.losses.append,
            "on_back": self.backs.append,
            "on_change": lambda: self.states.append(pool.state),
            "stall_s": 5,
            "verifier": self.fake.verifier,
            "limits": PoolLimits(start_worker_s=8, hello_s=5),
            "policy": POLICY,
        }
        pool = PoolService(**(settings | options))
        await self.nursery.start(pool.run)
        return pool

    def spec(self, *workers: Worker, epoch: Epoch | None = None, verified: bool = False) -> TargetSpec:
        plan = Plan(ModelId("a" * 64), tuple(worker.use() for worker in workers), None, 512)
        served_by = ServedBy.VERIFIER if verified else ServedBy.LLAMA_SERVER
        return TargetSpec(self.model, None, plan, epoch or self.epoch, "demo", served_by)

    def args(self, who: str, name: str) -> list[str]:
        """The command line of the newest start."""
        log = (self.tmp_path / who / "logs" / f"{name}.log").read_text().splitlines()
        return [line for line in log if line.startswith("args:")][-1].split()[1:]


async def phase(pool: PoolService, wanted: PoolPhase) -> None:
    await until(lambda: pool.state.phase is wanted)
