"""The fuzzer for a few seconds, over everything; and that it finds the kinds of faults it is there for."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import fuzz_engine
import fuzz_targets
import pytest
from fuzz_engine import Finding, Target, damaged, fuzz, keep, kept

from tightwad_agent.errors import BadManifest
from tightwad_agent.swarm import manifest, part
from tightwad_agent.swarm.manifest import Piece, decode
from tightwad_agent.swarm.peer import Conversation
from tightwad_agent.wire.frames import FrameDecoder

NAMES = list(fuzz_targets.targets())
RUNS_EACH = 1_500
RUNS = {
    "frames": 300,
    "token": 200,
    "http": 150,
    "graphs": 300,
    "coded-graphs": 300,
    "weights": 300,
    "coded-weights": 300,
    "conversation": 1_000,
    "journal": 800,
    "catalogue": 800,
}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_taken_or_refused_and_nothing_else(name: str) -> None:
    target = fuzz_targets.targets()[name]
    for data in target.seeds:
        target.run(data)  # what is valid is accepted
    report = fuzz(target, 7, runs=RUNS.get(name, RUNS_EACH) + len(kept(name)))
    assert report.accepted >= len(target.seeds)
    assert len(report.outcomes) >= (2 if name in ("frames", "graphs", "weights") else 4), "it got past the first check"


def test_kept_inputs_lead_to_many_different_places() -> None:
    for name, at_least in (("manifest", 20), ("gguf", 20), ("conversation", 20), ("codec-swarm", 20), ("journal", 8)):
        target = fuzz_targets.targets()[name]
        outcomes = {fuzz_engine.outcome_of(target, data) for data in kept(name)}
        assert len(outcomes) >= at_least, f"{name}: {outcomes}"


# Negative controls: each of these faults must be found within what CI runs

_N = struct.Struct("!H")


def _sound(data: bytes) -> int:
    """A toy decoder: u16 count, and so many u16."""
    if len(data) < 2 or len(data) < 2 + 2 * _N.unpack_from(data)[0]:
        raise BadManifest("cut short")
    return sum(_N.unpack_from(data, 2 + 2 * i)[0] for i in range(_N.unpack_from(data)[0]))


def _believes_the_count(data: bytes) -> int:
    if len(data) < 2:
        raise BadManifest("cut short")
    return sum(_N.unpack_from(data, 2 + 2 * i)[0] for i in range(_N.unpack_from(data)[0]))


def _allocates_by_the_count(data: bytes) -> int:
    return len(bytearray(_N.unpack(data[:2].ljust(2))[0] << 20)) + _sound(data)


def _hangs(data: bytes) -> int:
    while len(data) > 2 and data[0] == 255:
        pass
    return _sound(data)


def _found(run: object, *seeds: bytes) -> Finding:
    target = Target("planted", seeds, run, (BadManifest,))  # type: ignore[arg-type]
    with pytest.raises(Finding) as caught:
        fuzz(target, 1, runs=RUNS_EACH)
    return caught.value


SEED = _N.pack(3) + bytes(6)


def test_a_sound_decoder_gives_no_finding() -> None:
    assert fuzz(Target("sound", [SEED], _sound, (BadManifest,)), 1, runs=RUNS_EACH).accepted > 10


def test_an_error_of_another_type_is_found() -> None:
    assert "error: unpack_from requires" in str(_found(_believes_the_count, SEED))


def test_memory_without_a_bound_is_found() -> None:
    assert "MiB of memory" in str(_found(_allocates_by_the_count, SEED))


def test_an_endless_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_engine, "CPU_S", 0.3)
    assert "CPU time" in str(_found(_hangs, SEED))


def test_a_manifest_decoder_that_believes_the_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def believes_the_count(data: bytes) -> tuple[int, bytes, tuple[Piece, ...]]:
        at = len(manifest._MAGIC)
        size, sha256, n = manifest._FIXED.unpack_from(data, at)
        at += manifest._FIXED.size
        pieces = (manifest._PIECE.unpack_from(data, at + i * manifest._PIECE.size) for i in range(n))
        return size, sha256, tuple(Piece(*p) for p in pieces)

    monkeypatch.setattr(manifest, "_read_canonical", believes_the_count)
    with pytest.raises(Finding, match="error"):
        fuzz(fuzz_targets.targets()["manifest"], 1, runs=RUNS_EACH)


def test_a_manifest_without_its_rules_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "check", lambda *_args, **_more: None)
    with pytest.raises(Finding):
        fuzz(fuzz_targets.targets()["manifest"], 1, runs=RUNS_EACH)


def test_a_peer_whose_piece_numbers_are_not_checked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "_in_range", lambda _self, pieces: pieces)
    with pytest.raises(Finding):
        fuzz(fuzz_targets.targets()["conversation"], 1, runs=RUNS_EACH)


def test_a_journal_that_is_believed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part.PartFile, "_verified", lambda _self, journalled, _tick: journalled)
    with pytest.raises(Finding):
        fuzz(fuzz_targets.targets()["journal"], 1, runs=RUNS_EACH)


def test_a_stream_parser_that_depends_on_the_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrameDecoder.feed

    def forgets(self: FrameDecoder, data: bytes) -> object:
        if len(data) == 1 and data == b"\x93":
            data = b""
        return real(self, data)

    monkeypatch.setattr(FrameDecoder, "feed", forgets)
    with pytest.raises(Finding):
        fuzz(fuzz_targets.targets()["frames"], 1, runs=5)


# The engine itself


def test_the_same_seed_gives_the_same_run() -> None:
    target = fuzz_targets.targets()["manifest"]
    one, two, other = (fuzz(target, seed, runs=200) for seed in (3, 3, 4))
    assert (one.outcomes, one.new) == (two.outcomes, two.new)
    assert one.new != other.new


def test_the_corpus_is_kept_and_bounded(tmp_path: Path) -> None:
    inputs = [b"", b"x" * 2_000, *(bytes([i]) for i in range(100))]
    assert keep("t", inputs, tmp_path) == fuzz_engine.MAX_KEPT
    assert keep("t", [b"zz"], tmp_path) == 0
    got = kept("t", tmp_path)
    assert got[:2] == [b"", b"\0"]
    assert len(got) == fuzz_engine.MAX_KEPT
    assert kept("unknown", tmp_path) == []


def test_damage_is_bounded() -> None:
    rng = random.Random(1)
    target = Target("t", [bytes(60_000)], len, ())
    assert max(len(damaged(rng, target, target.seeds)) for _ in range(300)) <= fuzz_engine.MAX_INPUT


def test_the_script(tmp_path: Path) -> None:
    script = Path(fuzz_engine.__file__).with_name("fuzz_run.py")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=120, check=False)

    good = run("--seconds", "0.5", "--seed", "5", "advert")
    assert (good.returncode, good.stderr) == (0, "")
    assert "advert: seed 5," in good.stdout
    assert "0 findings" in good.stdout
    assert run("nothing").returncode == 2
    (tmp_path / "in").write_bytes(b"rubbish")
    again = run("--replay", str(tmp_path / "in"), "manifest")
    assert again.returncode == 1
    assert "BadManifest" in again.stderr


def test_decode_of_a_seed_is_the_seed() -> None:
    for data in fuzz_targets.targets()["manifest"].seeds:
        assert decode(data).encode() == data
