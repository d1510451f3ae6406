"""A real process that fetches a model is killed with SIGKILL, again and again; what it left must be enough, and right.

After each kill the journal is compared with the bytes on the disk and with what was sent: all that was sent must be
durable, but for the pieces in flight. Before some restarts the state is damaged the way disks and people do it. What is
fetched afterwards must be exactly what is missing then.

`scripts/kills --kills 200` does it for long, `tests/shell/test_swarm_kill.py` for a few.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import swarm_kit as kit

from tightwad_agent.swarm.manifest import Manifest, decode
from tightwad_agent.swarm.part import claimed_pieces, part_paths

CHILD = textwrap.dedent(
    """
    import os, random, sys
    from pathlib import Path
    import trio
    from tightwad_agent.swarm import manifest, exchange, transfer
    from tightwad_agent.swarm.pieces import Limits
    from tightwad_agent.swarm.service import SwarmService
    from tightwad_agent.swarm.store import Store
    from tightwad_agent.testing import MemoryMesh, sockets

    manifest.PIECE_BYTES, manifest.SMALL_TENSOR_BYTES = 1 << 16, 1 << 14

    def tell(line):  # in one piece, whoever is killed meanwhile
        os.write(1, line.encode() + b"\\n")

    def count_uploads(path):
        fd, real = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), exchange.Exchange.uploaded
        def uploaded(self, link, n_bytes):
            os.write(fd, b"%d\\n" % n_bytes)
            real(self, link, n_bytes)
        exchange.Exchange.uploaded = uploaded

    async def main(folder, source, per_peer):
        count_uploads(folder / "uploaded")
        async with trio.open_nursery() as nursery:
            mesh = MemoryMesh(nursery, sockets)
            services = []
            for name in ("seed", "leech"):
                node = mesh.add(name)
                store, limits = Store(folder / name), Limits(per_peer=per_peer)
                service = SwarmService(store, node.open_stream, node.node, random.Random(), limits=limits)
                node.streams["swarm"] = service.handle
                await nursery.start(service.run)
                services.append((node.node, service))
            (seed_id, seed), (_, leech) = services
            model = (await seed.add(str(source))).model
            tell("ready")
            leech.set_holders(model, frozenset({seed_id}))
            leech.want(model)
            while leech.path_of(model) is None:
                await trio.sleep(0.001)
            tell(f"done {leech.snapshot().transfers[0].from_each_peer.get(seed_id, 0)}")
            nursery.cancel_scope.cancel()

    for line in sys.stdin:  # imported once, forked for each run
        folder, source, per_peer = line.rstrip("\\n").split("\\t")
        pid = os.fork()
        if pid == 0:
            trio.run(main, Path(folder), Path(source), int(per_peer))
            os._exit(0)
        tell(f"pid {pid}")
        tell(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
    """
)


Files = dict[str, bytes]
"""What a model consists of, by name."""

LONGEST_S = 60.0
"""A run that takes longer hangs."""
LOOK_S = 0.001
"""So often it is looked how much was sent."""


class Runs:
    """One process after the other, each in its own right."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._parent = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, what: object, where: TracebackType | None) -> None:
        self._parent.communicate(timeout=60)

    def run(self, folder: Path, per_peer: int, kill_at: int | None, then_s: float = 0.0) -> int | None:
        """Bytes that came over the line in a run that ended by itself; None for one that was killed, `then_s` after
        `kill_at` bytes were sent in it."""
        assert self._parent.stdin is not None
        folder.mkdir(exist_ok=True)
        before = _uploaded(folder)
        self._parent.stdin.write(f"{folder}\t{self._source}\t{per_peer}\n")
        self._parent.stdin.flush()
        over, killer = threading.Event(), None
        pid, came = 0, None
        while True:
            word, number = self._line()
            pid = number if word == "pid" else pid
            came = number if word == "done" else came
            if word == "exit":
                break
            if word == "ready":
                how = (over, pid, folder, None if kill_at is None else before + kill_at, then_s)
                killer = threading.Thread(target=_kill_in_time, args=how)
                killer.start()
        over.set()
        if killer is not None:
            killer.join()
        assert number in (0, -signal.SIGKILL)
        assert number == 0 or kill_at is not None, f"it was not complete after {LONGEST_S:g} s"
        return came if number == 0 else None

    def _line(self) -> tuple[str, int]:
        assert self._parent.stdout is not None
        word, _, number = self._parent.stdout.readline().strip().partition(" ")
        assert word, "the process ended"
        return word, int(number or 0)


def _kill_in_time(over: threading.Event, pid: int, folder: Path, kill_at: int | None, then_s: float) -> None:
    """Kills when so much was sent, or when it takes too long; not at all once `over` is set."""
    give_up_at = time.monotonic() + LONGEST_S
    while time.monotonic() < give_up_at and (kill_at is None or _uploaded(folder) < kill_at):
        if over.wait(LOOK_S if kill_at is not None else LONGEST_S):
            return
    if not over.wait(then_s):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was faster


@dataclass
class Left:
    """What a leecher has on its disk: pieces that are journalled and right, or the whole file under its name."""

    folder: Path
    files: Files
    plan: Manifest | None = None
    good: set[int] = field(default_factory=set)
    complete: bool = False

    @classmethod
    def at(cls, folder: Path, files: Files) -> Left:
        """Raises `AssertionError` where there is a wrong byte under a final name."""
        left = cls(folder, files)
        found = list((folder / "leech").glob("*.gguf"))
        for path in found:
            assert path.read_bytes() == files[path.name], f"a wrong byte under the final name {path.name}"
        left.complete = len(found) == len(files)
        manifests = list(left.state.glob("*.manifest"))
        if manifests:
            left.plan = decode(manifests[0].read_bytes())
            left.good = {i for i in claimed_pieces(left.part, left.journal, left.plan) if left.is_right(i)}
        return left

    @property
    def state(self) -> Path:
        return self.folder / "leech" / ".swarm"

    @property
    def part(self) -> Path:
        """The (first) file."""
        return self.state / f"{self.plan.root if self.plan else 'none'}.part"

    @property
    def parts(self) -> list[Path]:
        return sorted(self.state.glob("*.part"))

    @property
    def journal(self) -> Path:
        return next(self.state.glob("*.journal"), self.state / "none.journal")

    @property
    def n_bytes(self) -> int:
        if self.complete:
            return size_of(self.files)
        return sum(self.plan.pieces[i].length for i in self.good) if self.plan else 0

    def is_right(self, piece: int) -> bool:
        path, offset = self.place(piece)
        assert self.plan is not None
        with path.open("rb") as file:
            file.seek(offset)
            wanted = self.plan.pieces[piece]
            return hashlib.sha256(file.read(wanted.length)).digest() == wanted.sha256

    def place(self, piece: int) -> tuple[Path, int]:
        """(file that is on its way, offset in it)"""
        assert self.plan is not None
        index, offset = self.plan.place(piece)
        return part_paths(self.part, self.plan)[index], offset

    def largest(self) -> int:
        return max(p.length for p in self.plan.pieces) if self.plan else 0


# What happens to a disk between two runs; each changes `good` to what may still be believed


def untouched(_left: Left, _rng: random.Random) -> None:
    """Nothing."""


def flipped_bit(left: Left, rng: random.Random) -> None:
    """In a finished piece."""
    if left.plan is None or not left.good:
        return
    piece = rng.choice(sorted(left.good))
    path, offset = left.place(piece)
    at = offset + rng.randrange(left.plan.pieces[piece].length)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ (1 << rng.randrange(8))
        file.seek(at)
        file.write(bytes([byte]))
    left.good.discard(piece)


def lost_file(left: Left, rng: random.Random) -> None:
    """The state is kept."""
    if left.parts:
        rng.choice(left.parts).unlink()
        left.good.clear()


def lost_state(left: Left, _rng: random.Random) -> None:
    """The file is kept."""
    left.journal.unlink(missing_ok=True)
    left.good.clear()


def other_file(left: Left, rng: random.Random) -> None:
    """Another file of the same name and size."""
    if left.parts:
        victim = rng.choice(left.parts)
        other = left.state / "other"
        other.write_bytes(rng.randbytes(victim.stat().st_size))
        os.replace(other, victim)
        left.good.clear()


def torn_record(left: Left, rng: random.Random) -> None:
    """The last record of the journal was written in part; it is not believed."""
    if left.journal.exists() and left.good:
        with left.journal.open("r+b") as file:
            file.truncate(left.journal.stat().st_size - rng.randint(1, 15))
        assert left.plan is not None
        left.good = {i for i in claimed_pieces(left.part, left.journal, left.plan) if left.is_right(i)}


Damage = Callable[[Left, random.Random], None]
DAMAGES: tuple[Damage, ...] = (untouched, untouched, flipped_bit, lost_file, lost_state, other_file, torn_record)


@dataclass
class Outcome:
    """Of many kills: how often each damage happened, how often a run went on from what was there, and the most bytes
    that were sent and not durable when a process was killed."""

    killed: int = 0
    models: int = 0
    resumed: int = 0
    damages: Counter[str] = field(default_factory=Counter)
    worst_lost: int = 0
    worst_pieces: float = 0.0


def model_of(n_layers: int, n_files: int) -> Files:
    """A model in one file or in several."""
    if n_files == 1:
        return {"toy.gguf": kit.llama(n_layers, tensor_kb=64)}
    made = {}
    for i in range(n_files):
        split = {"split.no": i, "split.count": n_files}
        tensors = [(f"blk.{i}.{j}.w", (256, 64), "F32") for j in range(n_layers // n_files)]
        data = (
            kit.make_gguf(tensors, split, seed=100 + i) if i else kit.llama(n_layers // n_files, tensor_kb=64, **split)
        )
        made[f"toy-{i + 1:05d}-of-{n_files:05d}.gguf"] = data
    return made


def size_of(files: Files) -> int:
    return sum(len(data) for data in files.values())


def kill_many(
    base: Path, files: Files, kills: int, seed: int, *, damages: tuple[Damage, ...] = DAMAGES, watch: bool = False
) -> Outcome:
    """Kills so many fetches of a model at random moments. Raises `AssertionError` that begins with the seed."""
    source, *_ = [kit.write(base / "files" / name, data) for name, data in files.items()]
    rng = random.Random(seed)
    outcome = Outcome()
    with Runs(source) as runs:
        assert runs.run(base / "undisturbed", 2, kill_at=None) == size_of(files)
        while outcome.killed < kills:
            folder = base / str(outcome.models)
            try:
                _one_model(runs, folder, files, kills, rng, outcome, damages)
            except AssertionError as exc:
                raise AssertionError(f"seed {seed}, after {outcome.killed} kills: {exc}") from exc
            shutil.rmtree(folder)
            outcome.models += 1
            if watch:
                print(f"{outcome.killed} kills, {outcome.models} models, {outcome.resumed} resumed", flush=True)
    return outcome


def _one_model(
    runs: Runs,
    folder: Path,
    files: Files,
    kills: int,
    rng: random.Random,
    outcome: Outcome,
    damages: tuple[Damage, ...],
) -> None:
    """One model, killed until it got through; the last kill comes half way and leaves its disk as it was."""
    per_peer = rng.choice([1, 2, 4])
    size, here = size_of(files), 0
    while True:
        before, is_last = _uploaded(folder), outcome.killed == kills - 1
        kill_at = (size - here) // 2 if is_last else rng.randint(0, size - here)
        then_s = rng.choice([0.0, rng.uniform(0.0, 0.02)])  # also after the last byte, while it gets its name
        came = runs.run(folder, per_peer, kill_at if outcome.killed < kills else None, then_s)
        sent = _uploaded(folder) - before
        left = Left.at(folder, files)
        assert sent <= size - here, f"{sent} bytes were sent, {size - here} were missing"
        if came is not None:
            assert left.complete
            assert came == size - here, f"{came} bytes were fetched, {size - here} were missing"
            assert not list(left.state.glob("*.part"))
            outcome.resumed += here > 0
            return
        outcome.killed += 1
        lost = sent - (left.n_bytes - here)
        largest = left.largest()
        assert lost <= per_peer * largest, f"{lost} bytes are lost, {per_peer} pieces were in flight"
        outcome.worst_lost = max(outcome.worst_lost, lost)
        outcome.worst_pieces = max(outcome.worst_pieces, lost / largest if largest else 0)
        if not left.complete and not list((folder / "leech").glob("*.gguf")):
            damage = untouched if is_last else rng.choice(damages)  # so that something is left to go on from
            damage(left, rng)
            outcome.damages[damage.__name__] += 1
        here = left.n_bytes


def _uploaded(folder: Path) -> int:
    path = folder / "uploaded"
    return sum(map(int, path.read_text().split())) if path.exists() else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--layers", type=int, default=80, help="the model's tensors, 64 KiB each (80)")
    parser.add_argument("--files", type=int, default=1, help="in so many files (1)")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="tightwad-kills-") as folder:
        outcome = kill_many(Path(folder), model_of(args.layers, args.files), args.kills, args.seed, watch=True)
    print(
        f"{outcome.killed} kills while {outcome.models} models came; {outcome.resumed} were finished from what was "
        f"there; at most {outcome.worst_lost} bytes ({outcome.worst_pieces:.2f} pieces) were sent in vain by one kill; "
        f"before restarts: {', '.join(f'{n} x {name}' for name, n in sorted(outcome.damages.items()))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
