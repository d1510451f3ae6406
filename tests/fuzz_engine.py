"""Mutation fuzzing: valid inputs are damaged, and each decoder must take them or refuse them with its own error.

A target says how to run one input and which errors may come out. Anything else is a finding: another exception, more
CPU time than `CPU_S`, more memory than `MEMORY_BYTES`. An input whose outcome (result, or shape of the error's text)
has not been seen before is kept and damaged further, so the texts of the errors lead the search; no tracing is needed.

Everything follows from the seed, which is printed. `scripts/fuzz` runs for hours, `tests/shell/test_fuzz.py` for
seconds.
"""

from __future__ import annotations

import base64
import random
import re
import resource
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

CORPUS = Path(__file__).parent / "data" / "fuzz"
CPU_S = 5.0
"""One input may take this much user time; all limits are for inputs of at most `MAX_INPUT`."""
MEMORY_BYTES = 256 << 20
"""Address space that all inputs together may add to that of the start."""
MAX_INPUT = 64 << 10
MAX_POOL = 2_000
MAX_KEPT = 40
KEPT_BYTES = 1_200
"""So many inputs of a target, of at most this size, are kept in the repository."""

_INTERESTING = [0, 1, 2, 7, 8, 15, 16, 31, 32, 127, 128, 255, 256, 1023, 1024, 4096, 65535, 65536, 10_000_000]
_INTERESTING += [n + d for n in (1 << 24, 1 << 26, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64) for d in (-1, 0, 1)]


class Finding(AssertionError):
    """An input that did what no input may do."""

    def __init__(self, target: str, data: bytes, what: str) -> None:
        super().__init__(f"{target}: {what}\ninput ({len(data)} bytes): {data[:200].hex()}")
        self.target = target
        self.data = data


class TooSlow(BaseException):
    """The CPU time of one input is used up. No `Exception`, so that no decoder takes it for one of its own."""


@dataclass(frozen=True)
class Target:
    """`run` takes one input and checks what can be checked about its result. It may raise only `allowed`; a text
    that it returns tells kinds of success apart.

    `repair` makes checksums right again, so that damage behind them is reached; it is used on half of the inputs.
    """

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    repair: Callable[[bytes, random.Random], bytes] | None = None
    words: Sequence[bytes] = ()


@dataclass
class Report:
    """What a run saw. `outcomes`: how often each shape of result came."""

    target: str
    seed: int
    runs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    new: list[bytes] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(n for outcome, n in self.outcomes.items() if outcome.startswith("ok"))


# One input


def outcome_of(target: Target, data: bytes) -> str:
    """The shape of what came out; raises `Finding` for what must not."""
    try:
        with cpu_limit(CPU_S):
            result = target.run(data)
    except TooSlow:
        raise Finding(target.name, data, f"took more than {CPU_S:g} s of CPU time") from None
    except MemoryError:
        raise Finding(target.name, data, f"took more than {MEMORY_BYTES >> 20} MiB of memory") from None
    except target.allowed as exc:
        return f"{type(exc).__name__}: {shape(str(exc))}"
    except Exception as exc:
        raise Finding(target.name, data, f"{type(exc).__name__}: {exc}") from exc
    return f"ok {result}"[:80] if isinstance(result, str) else "ok"


def shape(text: str) -> str:
    """An error's text without what depends on the input."""
    text = re.sub(r"'[^']*'?|\"[^\"]*\"?|b'.*", "'", text)
    return re.sub(r"[0-9a-f]{12}|\d+", "#", text)[:80]


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `TooSlow` inside the block. Main thread only."""
    before = signal.signal(signal.SIGVTALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow


@contextmanager
def memory_limit(n_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """`MemoryError` inside the block for who wants more than `n_bytes` beyond what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Many inputs


def fuzz(target: Target, seed: int, *, runs: int | None = None, seconds: float | None = None) -> Report:
    """Damages the target's seeds, the kept corpus, and what was new, until the count or the time is reached."""
    rng = random.Random(f"{target.name}/{seed}")
    report = Report(target.name, seed)
    pool = [*target.seeds, *kept(target.name)]
    with memory_limit():
        for data in pool:
            _note(report, outcome_of(target, data), data)
        report.new.clear()
        end = time.monotonic() + (seconds if seconds is not None else 1e9)
        while (runs is None or report.runs < runs) and time.monotonic() < end:
            data = damaged(rng, target, pool)
            if _note(report, outcome_of(target, data), data) and len(pool) < MAX_POOL:
                pool.append(data)
    return report


def _note(report: Report, outcome: str, data: bytes) -> bool:
    report.runs += 1
    is_new = outcome not in report.outcomes
    report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
    if is_new:
        report.new.append(data)
    return is_new


def kept(name: str, folder: Path = CORPUS) -> list[bytes]:
    """The inputs that earlier runs kept for a target: one a line, base64 of zlib."""
    path = folder / f"{name}.txt"
    return [zlib.decompress(base64.b64decode(line)) for line in path.read_text().split()] if path.exists() else []


def keep(name: str, inputs: Sequence[bytes], folder: Path = CORPUS) -> int:
    """Adds small inputs to those that are kept, as long as there is room; how many were added."""
    known = kept(name, folder)
    fresh = [data for data in sorted(set(inputs), key=lambda d: (len(d), d)) if len(data) <= KEPT_BYTES]
    fresh = [data for data in fresh if data not in known][: max(0, MAX_KEPT - len(known))]
    lines = [base64.b64encode(zlib.compress(data, 9)).decode() for data in (*known, *fresh)]
    if not fresh:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return len(fresh)


# Damage


def damaged(rng: random.Random, target: Target, pool: Sequence[bytes]) -> bytes:
    """One to six damages to one of the inputs."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        how = rng.choice(_WAYS)
        how(rng, data, target, pool)
        del data[MAX_INPUT:]
    if target.repair is not None and rng.random() < 0.5:
        return target.repair(bytes(data), rng)
    return bytes(data)


Way = Callable[[random.Random, bytearray, Target, Sequence[bytes]], None]


def _at(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def _span(rng: random.Random, data: bytearray) -> slice:
    at = _at(rng, data)
    return slice(at, at + int(rng.choice([1, 2, 4, 8, 32, 400]) * (0.5 + rng.random())))


def _flip(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    """An interesting number in place of 1, 2, 4 or 8 bytes."""
    width = rng.choice([1, 2, 4, 8])
    value = rng.choice(_INTERESTING) % (1 << 8 * width)
    at = _at(rng, data)
    data[at : at + width] = value.to_bytes(width, rng.choice(["little", "big"]))


def _step(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    """A number in place becomes a little more or less."""
    width = rng.choice([1, 2, 4, 8])
    order = rng.choice(["little", "big"])
    at = _at(rng, data)
    old = int.from_bytes(data[at : at + width], order)
    data[at : at + width] = ((old + rng.randint(-9, 9)) % (1 << 8 * width)).to_bytes(width, order)


def _delete(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    del data[_span(rng, data)]


def _cut(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    del data[_at(rng, data) :]


def _repeat(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    span = _span(rng, data)
    data[span.stop : span.stop] = data[span] * rng.choice([1, 1, 2, 30, 500])


def _swap(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    one, two = sorted((_at(rng, data), _at(rng, data)))
    n = rng.choice([1, 4, 8, 44])
    data[one : one + n], data[two : two + n] = data[two : two + n], data[one : one + n]


def _insert(rng: random.Random, data: bytearray, _target: Target, _pool: Sequence[bytes]) -> None:
    at = _at(rng, data)
    data[at:at] = rng.randbytes(rng.choice([1, 2, 8, 50]))


def _splice(rng: random.Random, data: bytearray, _target: Target, pool: Sequence[bytes]) -> None:
    other = bytearray(rng.choice(pool))
    data[_at(rng, data) :] = other[_at(rng, other) :]


def _word(rng: random.Random, data: bytearray, target: Target, _pool: Sequence[bytes]) -> None:
    """A word of the format, put in or over."""
    if target.words:
        word = rng.choice(target.words)
        at = _at(rng, data)
        data[at : at + rng.choice([0, len(word)])] = word


_WAYS: Sequence[Way] = [_flip, _byte, _number, _number, _step, _delete, _cut, _repeat, _swap, _insert, _splice, _word]
