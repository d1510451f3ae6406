"""What is fuzzed: everything that takes bytes from a peer, a file or a disk that may have been damaged.

The checks here are the promises of each decoder: what was accepted obeys its rules, stays accepted after encoding it
again, and does not depend on how the bytes were cut.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_http
import fuzz_messages as messages
import graph_kit
import swarm_kit as kit
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzz_engine import Target

from tightwad_agent.engine.graph_codec import GRAPH_COMPUTE, GraphDecoder, GraphEncoder
from tightwad_agent.engine.weights_codec import Extent, Weights, WeightsDecoder, WeightsEncoder
from tightwad_agent.errors import BadGguf, BadManifest, PeerRefused, ProtocolError, TokenError
from tightwad_agent.ids import Address, ClusterId, ModelId, NodeName, SafeName
from tightwad_agent.mesh import advert, tokens
from tightwad_agent.swarm import peer
from tightwad_agent.swarm.facts import facts_of, vocabulary_of
from tightwad_agent.swarm.gguf import HeaderIncomplete, parse
from tightwad_agent.swarm.manifest import MAX_PIECE_BYTES, FileHash, Manifest, Piece, cut, decode
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.peer import Conversation, Effect, Joined, Progress, Received, Refused, Updated
from tightwad_agent.swarm.pieces import PieceTracker
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import node_id
from tightwad_agent.wire import control, draft, frames, handshake, verify
from tightwad_agent.wire.codec import Codec
from tightwad_agent.wire.frames import FrameDecoder
from tightwad_agent.wire.swarm import CODEC, MAX_QUEUED, MAX_SWARM_HEADER

_CODECS = {
    "swarm": CODEC,
    "control": control.CONTROL,
    "call": control.CALL,
    "link": handshake.LINK,
    "join": handshake.JOIN,
    "to-drafter": draft.TO_DRAFTER,
    "from-drafter": draft.FROM_DRAFTER,
    "to-verifier": verify.TO_VERIFIER,
    "from-verifier": verify.FROM_VERIFIER,
}


@cache
def scratch() -> Path:
    """A folder in memory where there is one: these targets sync what they write."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tightwad-fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Manifest


def plan(data: bytes, lengths: Iterable[int], name: str = "toy.gguf") -> Manifest:
    pieces, at = [], 0
    for n in lengths:
        pieces.append(Piece(at, n, hashlib.sha256(data[at : at + n]).digest()))
        at += n
    return Manifest(SafeName(name), len(data), hashlib.sha256(data).digest(), tuple(pieces))


def _manifests() -> list[bytes]:
    toy = kit.llama(3, tensor_kb=1)
    gguf = kit.read(toy)
    return [
        plan(b"x", [1]).encode(),
        plan(bytes(3000), [1000, 1500, 500]).encode(),
        plan(toy, [n for _, n in cut(len(toy), gguf)]).encode(),
        Manifest(SafeName("big"), 3 * MAX_PIECE_BYTES, bytes(32), _large(3), facts_of(gguf)).encode(),
        Manifest(SafeName("web.gguf"), MAX_PIECE_BYTES, bytes(32), _large(1), origin="https://example.org/a").encode(),
        Manifest.of_files(
            SafeName("parts.gguf"),
            (FileHash(MAX_PIECE_BYTES, bytes(32)), FileHash(2 * MAX_PIECE_BYTES, bytes(32))),
            _large(3),
            facts_of(gguf),
        ).encode(),
    ]


def _large(n: int) -> tuple[Piece, ...]:
    return tuple(Piece(i * MAX_PIECE_BYTES, MAX_PIECE_BYTES, bytes([i]) * 32) for i in range(n))


def run_manifest(data: bytes) -> object:
    got = decode(data)
    assert sum(p.length for p in got.pieces) == got.size
    assert all(a.offset + a.length == b.offset for a, b in zip(got.pieces, got.pieces[1:], strict=False))
    assert all(0 < p.length <= MAX_PIECE_BYTES and len(p.sha256) == 32 for p in got.pieces)
    names = got.file_names
    assert len({name.casefold() for name in names}) == len(names) == len(got.sizes)
    assert all(SafeName.is_valid(name) and Path(name).parts == (name,) for name in (got.name, *names))
    assert sum(got.sizes) == got.size
    for i, piece in enumerate(got.pieces):
        file, offset = got.place(i)
        assert 0 <= offset <= offset + piece.length <= got.sizes[file], "no piece is in two files"
    again = decode(got.encode(), got.root)
    assert again == got
    assert again.root == got.root
    return got


def repair_manifest(data: bytes, rng: random.Random) -> bytes:
    """The head's length as it is, after damage to its tree."""
    at = data.find(b"tightwad manifest")
    if at < 8:
        return data
    head = messages.damage_tree(data[8:at], rng) if rng.random() < 0.7 else data[8:at]
    return data[:4] + struct.pack("!I", len(head)) + head + data[at:]


# GGUF


def _ggufs() -> list[bytes]:
    metadata = {
        "general.file_type": 15,
        "tokenizer.ggml.tokens": ["a", "bb", ""],
        "numbers": [1, 2, 3],
        "merges": ["a b"],
        "yes": True,
        "half": 0.5,
        "general.alignment": 64,
        "llama.attention.head_count_kv": [2, 0],
        "llama.block_count": 2,
        "u64": (10, b"\xff" * 8),
        "f64": (12, struct.pack("<d", 0.5)),
    }
    tensors = [("a.weight", (256, 4), "Q4_K"), ("b", (33,), "F32"), ("none", (0, 4), "F32"), ("one", (), "F16")]
    made = [
        kit.make_gguf(tensors, metadata, alignment=64),
        kit.make_gguf([("w", (32, 2), "Q8_0")], version=2),
        kit.make_gguf(()),
        kit.make_gguf([(f"t{i}", (1,), "I8") for i in range(40)]),
    ]
    return [*made, kit.llama(2, tensor_kb=1)]


def run_gguf(data: bytes) -> object:
    if (missing := _missing(data)) is not None:
        assert missing > len(data)
    whole, error = _parsed(data, data)
    by_parts, error_by_parts = _parsed(lambda at, n: data[at : at + min(n, 613)], data)
    assert (repr(whole), error) == (repr(by_parts), error_by_parts), f"{error!r} or {error_by_parts!r}"
    if whole is None:
        raise BadGguf(error)
    assert all(whole.data_start <= t.offset <= t.offset + t.n_bytes <= len(data) for t in whole.tensors)
    facts = facts_of(whole)
    assert min(facts.n_params, facts.n_layers, facts.context_train, facts.kv_bytes_per_token) >= 0
    assert len(vocabulary_of(whole).digest) in (0, 32)
    spans = cut(len(data), whole)
    assert sum(n for _, n in spans) == len(data)
    Manifest(SafeName("x"), len(data), bytes(32), tuple(Piece(o, n, bytes(32)) for o, n in spans), facts)
    return whole


def _missing(data: bytes) -> int | None:
    """How many bytes of the file are needed if these are its first ones; None if they are enough, or bad."""
    try:
        parse(data, 1 << 40)
    except HeaderIncomplete as exc:
        return exc.n_bytes
    except BadGguf:
        pass
    return None


def _parsed(source: Any, data: bytes) -> tuple[Any, str]:
    try:
        return parse(source, len(data)), ""
    except BadGguf as exc:
        return None, exc.message


# Messages


def run_codec(codec: Codec, data: bytes) -> object:
    message = codec.decode(data)
    again = codec.decode(codec.encode(message))
    assert again == message, "a valid message stays valid"
    if isinstance(message, handshake.Open) and message.args != b"\x01\x02":
        assert isinstance(handshake.unpack_args(message.args), dict)
    return message


def run_frames(data: bytes) -> object:
    whole, error = _framed([data])
    by_bytes, error_by_bytes = _framed([data[i : i + 1] for i in range(len(data))])
    assert error == error_by_bytes
    assert whole == (by_bytes if not error else by_bytes[: len(whole)])
    assert _streamed([data]) == _streamed([data[i : i + 1] for i in range(len(data))]) == (by_bytes, error)
    if error:
        raise ProtocolError(error)
    return whole


def _framed(parts: list[bytes]) -> tuple[list[frames.Frame], str]:
    decoder = FrameDecoder(1000, 2000)
    got: list[frames.Frame] = []
    try:
        for part in parts:
            got += decoder.feed(part)
            assert len(decoder.buffered) <= 3008
    except ProtocolError as exc:
        return got, exc.message
    return got, ""


def _streamed(parts: list[bytes]) -> tuple[list[frames.Frame], str]:
    """The whole frames, payloads put together again."""
    decoder = frames.StreamingDecoder(1000, 2000)
    got: list[frames.Frame] = []
    try:
        for data in parts:
            for part in decoder.feed(memoryview(data)):
                if isinstance(part, frames.Begun):
                    header, payload, n_payload = part.header, b"", part.n_payload
                else:
                    payload += part
                assert len(payload) + decoder.left == n_payload
                if not decoder.left:
                    got.append(frames.Frame(header, payload))
    except ProtocolError as exc:
        return got, exc.message
    return got, ""


def damage_frames(data: bytes, rng: random.Random) -> bytes:
    """One frame of a stream is damaged, doubled, dropped or moved; lengths are right again."""
    found = split_frames(data)
    if not found:
        return data
    at = rng.randrange(len(found))
    header, payload = found[at]
    match rng.randrange(6):
        case 0:
            del found[at]
        case 1:
            found.insert(rng.randrange(len(found) + 1), (header, payload))
        case 2:
            found.insert(rng.randrange(len(found)), found.pop(at))
        case 3:
            found[at] = (header, payload[: len(payload) // 2])
        case _:
            found[at] = (messages.damage_tree(header, rng), payload)
    return b"".join(frames.encode(h, p) for h, p in found)


def split_frames(data: bytes) -> list[tuple[bytes, bytes]]:
    """The whole frames at the beginning."""
    found, at = [], 0
    while at + 8 <= len(data):
        n_header, n_payload = frames.PREFIX.unpack_from(data, at)
        end = at + 8 + n_header + n_payload
        if end > len(data):
            break
        found.append((data[at + 8 : at + 8 + n_header], data[at + 8 + n_header : end]))
        at = end
    return found


# A conversation between two nodes

MODEL = ModelId("ab" * 32)
BLOCK = 64
LENGTHS = [7, 64, 65, 300, 1, 128, 200, 64, 64, 13, 500, 77]
OURS = {0, 2, 4, 6}


class Talk:
    """Our side of a conversation: a tracker, and what `exchange` does with effects. `reads` empties what is to be sent
    after each message; otherwise nothing is ever sent, as to a peer that does not read.
    """

    def __init__(self, *, reads: bool) -> None:
        self.talk = Conversation(MODEL, LENGTHS)
        self.have = set(OURS)
        self.tracker = PieceTracker(LENGTHS, self.have, random.Random(1))
        self.talk.hello(self.have, ())
        self.reads = reads
        self.log: list[object] = []
        self.n_bytes: dict[int, int] = {}
        self.sent: list[bytes] = []
        if reads:
            self.send()

    def take(self, header: bytes, payload: bytes) -> None:
        for effect in self.talk.handle(CODEC.decode(header), payload):
            self.log.append((type(effect).__name__, str(effect)))
            self.on_effect(effect)
        if self.talk.joined and "p" in self.tracker.peers:
            while self.talk.may_ask and (piece := self.tracker.choose("p", 0.0)) is not None:
                if self.talk.is_asked(piece):
                    self.tracker.returned("p", piece)
                    break
                self.talk.request(piece)
                if piece % 3 == 2:
                    self.talk.cancel(piece)
                    self.tracker.returned("p", piece)
                    break
        assert self.talk.n_queued <= MAX_QUEUED
        if self.reads:
            self.send()

    def on_effect(self, effect: Effect) -> None:
        match effect:
            case Joined(has, fetching) | Updated(has, fetching):
                if isinstance(effect, Joined):
                    self.tracker.peer_joined("p")
                self.tracker.peer_has("p", has)
                self.tracker.peer_fetching("p", fetching)
            case Progress(n_bytes):
                assert 0 <= n_bytes <= BLOCK
                self.tracker.progress("p", 0.0)
            case Refused(piece):
                self.tracker.rejected("p", piece)
            case Received(piece, data, offset, last):
                assert offset in (0, self.n_bytes.get(piece, 0))
                self.n_bytes[piece] = offset + len(data)
                assert last == (self.n_bytes[piece] == LENGTHS[piece])
                if not last:
                    return
                del self.n_bytes[piece]
                self.tracker.arrived("p", piece)
                self.have.add(piece)
                self.tracker.finished(piece)
                self.talk.we_have([piece])

    def send(self) -> int:
        """Everything that is to be sent; how many messages that were."""
        n = 0
        while (out := self.talk.outgoing()) is not None:
            n += 1
            payload = bytes(out.span.length) if out.span else b""
            self.sent.append(frames.encode(CODEC.encode(out.message), payload))
            assert n <= 2 * MAX_QUEUED * (1 + max(LENGTHS) // BLOCK) + 3 * len(LENGTHS) + 8, "what waits is bounded"
        return n


def converse(parts: Iterable[bytes], *, reads: bool) -> tuple[list[object], list[bytes], str]:
    """(effects, frames sent, error) of a peer that sends these bytes."""
    decoder = FrameDecoder(MAX_SWARM_HEADER, BLOCK)
    with mock.patch.object(peer, "BLOCK_BYTES", BLOCK):
        us = Talk(reads=reads)
        try:
            for part in parts:
                frame = decoder.feed_one(part)
                while frame is not None:
                    us.take(frame.header, frame.payload)
                    frame = decoder.feed_one(b"")
        except (ProtocolError, PeerRefused) as exc:
            return us.log, us.sent, f"{type(exc).__name__} {exc}"
        us.send()
        return us.log, us.sent, ""


def run_conversation(data: bytes) -> object:
    whole = converse([data], reads=True)
    assert whole == converse((data[i : i + 1] for i in range(len(data))), reads=True), "the cut does not matter"
    _, _, error = converse([data], reads=False)
    assert error or not whole[2], "who does not read is forgiven nothing"
    if whole[2]:
        raise ProtocolError(whole[2])
    return whole


def transcripts() -> list[bytes]:
    """What peers send that keep the rules, as bytes."""
    with mock.patch.object(peer, "BLOCK_BYTES", BLOCK):
        return [_transcript(have) for have in (set(range(len(LENGTHS))), {1, 3, 5}, set())]


def _transcript(have: set[int]) -> bytes:
    us, them = Talk(reads=False), Conversation(MODEL, LENGTHS)
    them.hello(have, [7])
    said = b""
    for turn in range(60):
        if (out := them.outgoing()) is not None:
            header, payload = CODEC.encode(out.message), bytes(out.span.length) if out.span else b""
            said += frames.encode(header, payload)
            us.take(header, payload)
        if (mine := us.talk.outgoing()) is not None:
            them.handle(mine.message, bytes(mine.span.length) if mine.span else b"")
        if turn == 10 and them.may_ask:
            them.request(0)
            them.request(6)
            them.cancel(6)
        if turn == 20:
            them.we_have([9])
            them.keep_alive()
    return said


# Compute graphs on their way to a worker


def _graphs() -> list[bytes]:
    """What the engine sends; `run_graphs` codes it, `run_coded_graphs` gets it coded."""
    said = [graph_kit.message(GRAPH_COMPUTE, graph_kit.graph(n, n_layers=1)) for n in (1, 2, 1)]
    return [
        graph_kit.GREETING + said[0] + said[1] + said[2],
        graph_kit.GREETING + said[0] + graph_kit.message(graph_kit.SET_TENSOR, bytes(500)) + said[0],
        graph_kit.GREETING + graph_kit.message(graph_kit.SET_TENSOR, bytes(50)),
    ]


def _coded_graphs() -> list[bytes]:
    return [b"".join(map(bytes, GraphEncoder().feed(data))) for data in _graphs()]


def run_graphs(data: bytes) -> object:
    """All comes through as it was, whatever it is."""
    coded = [bytes(part) for part in GraphEncoder().feed(data)]
    decoder = GraphDecoder()
    whole = b"".join(bytes(out) for part in coded for out in decoder.feed(part))
    assert data.startswith(whole), "what is not whole yet may be held"
    return f"{len(b''.join(coded)) < len(data)}"


def run_coded_graphs(data: bytes) -> object:
    whole, error = _decoded([data])
    by_parts, error_by_parts = _decoded(data[i : i + 61] for i in range(0, len(data), 61))
    assert error == error_by_parts
    if error:
        raise ProtocolError(error)
    assert whole == by_parts
    return str(whole[0] > len(data))


def _decoded(parts: Iterable[bytes]) -> tuple[tuple[int, str], str]:
    """((bytes that came out, their hash), error); what comes out may be far more than what went in."""
    decoder, digest, n = GraphDecoder(), hashlib.sha256(), 0
    try:
        for part in parts:
            for out in decoder.feed(part):
                digest.update(out)
                n += len(out)
    except ProtocolError as exc:
        return (n, digest.hexdigest()), exc.message
    return (n, digest.hexdigest()), ""


# Weights on their way to a worker that holds the file

_WEIGHTS_FILE = random.Random(8).randbytes(40_000)
_WEIGHTS = Weights({b"a": (100, 20_000), b"b": (20_100, 19_900)})


def _weights() -> list[bytes]:
    """What the engine sends; `run_weights` codes it, `run_coded_weights` gets it coded."""

    def tensor(name: bytes, data: bytes) -> bytes:
        return graph_kit.message(graph_kit.SET_TENSOR, bytes(228) + name.ljust(64, b"\0") + bytes(13) + data)

    a, b = tensor(b"a", _WEIGHTS_FILE[100:20_100]), tensor(b"b", _WEIGHTS_FILE[20_100:])
    small = tensor(b"a", bytes(50))
    return [graph_kit.GREETING + a + small + b, graph_kit.GREETING + small + graph_kit.message(8, bytes(312)), b + a]


def _coded_weights() -> list[bytes]:
    return [b"".join(map(bytes, WeightsEncoder(_WEIGHTS).feed(data))) for data in _weights()]


def run_weights(data: bytes) -> object:
    """All comes through as it was, whatever it is, but for what is not of the file."""
    coded = b"".join(map(bytes, WeightsEncoder(Weights(_WEIGHTS.places)).feed(data)))
    by_parts = WeightsEncoder(Weights(_WEIGHTS.places))
    assert coded == b"".join(bytes(out) for i in range(0, len(data), 61) for out in by_parts.feed(data[i : i + 61]))
    decoder = WeightsDecoder(len(_WEIGHTS_FILE))
    n = sum(out.n_bytes if isinstance(out, Extent) else len(out) for out in decoder.feed(coded))
    assert n <= len(data), "what is not whole yet may be held"
    return f"{len(coded) < len(data)}"


def run_coded_weights(data: bytes) -> object:
    whole, error = _filled([data])
    by_parts, error_by_parts = _filled(data[i : i + 61] for i in range(0, len(data), 61))
    assert error == error_by_parts
    if error:
        raise ProtocolError(error)
    assert whole == by_parts
    return str(len(whole) > len(data))


def _filled(parts: Iterable[bytes]) -> tuple[bytes, str]:
    """What the worker gets, with the blocks of the file, and the error."""
    decoder, got = WeightsDecoder(len(_WEIGHTS_FILE)), bytearray()
    try:
        for part in parts:
            for out in decoder.feed(part):
                if isinstance(out, Extent):
                    assert out.place + out.n_bytes <= len(_WEIGHTS_FILE)
                    out = _WEIGHTS_FILE[out.place : out.place + out.n_bytes]  # noqa: PLW2901 - it is that part
                got += out
    except ProtocolError as exc:
        return bytes(got), exc.message
    return bytes(got), ""


# Journal and catalogue

_INODE = 0x1122334455667788
"""Stands for the inode of the file that the journal lies beside."""
_PART = random.Random(3).randbytes(600)
_PART_LENGTHS = [50, 100, 1, 149, 200, 100]


def _journals() -> list[bytes]:
    return [_journal(pieces) for pieces in ((), (0,), (0, 1, 2, 3, 4, 5), (5, 5, 3))]


def _journal(pieces: Iterable[int]) -> bytes:
    made = plan(_PART, _PART_LENGTHS)
    head = struct.pack("!4s32sQ", b"TWJ1", bytes.fromhex(made.root), _INODE)
    records = (struct.pack("!I8s", i, made.pieces[i].sha256[:8]) for i in pieces)
    return _with_crc(head) + b"".join(_with_crc(r) for r in records)


def _with_crc(data: bytes) -> bytes:
    return data + struct.pack("!I", zlib.crc32(data))


def repair_journal(data: bytes, _rng: random.Random) -> bytes:
    records = (data[at : at + 12] for at in range(48, len(data), 16))
    return _with_crc(data[:44]) + b"".join(_with_crc(r) for r in records)


def run_journal(data: bytes) -> object:
    """The journal beside a file of which the third piece is damaged."""
    folder = scratch() / "part"
    folder.mkdir(exist_ok=True)
    path, journal = folder / "x.part", folder / "x.journal"
    damaged = _PART[:150] + bytes([_PART[150] ^ 1]) + _PART[151:]
    path.write_bytes(damaged)
    if data[36:44] == _INODE.to_bytes(8, "big") and _with_crc(data[:44]) == data[:48]:
        data = _with_crc(data[:36] + path.stat().st_ino.to_bytes(8, "big")) + data[48:]
    journal.write_bytes(data)
    made = plan(_PART, _PART_LENGTHS)
    have = _opened_part(path, journal, made)
    assert _opened_part(path, journal, made) == have, "what was believed once is believed again"
    return str(sorted(have))


def _opened_part(path: Path, journal: Path, made: Manifest) -> set[int]:
    part = PartFile.open(path, journal, made, lambda _path: 1 << 40)
    try:
        for i in part.have:
            piece = made.pieces[i]
            assert part.read(i, 0, piece.length) == _PART[piece.offset : piece.offset + piece.length]
        return set(part.have)
    finally:
        part.close()


def _catalogues() -> list[bytes]:
    """As a store writes them, but for its path."""
    folder = scratch() / "seeds"
    store = Store(folder / "m")
    store.open()
    found = []
    for i in range(3):
        store.share(kit.write(folder / f"{i}.gguf", kit.llama(1, tensor_kb=1, seed=i)))
        found.append((store.state_dir / "catalogue").read_bytes())
    store.close()
    path = os.fsencode(folder)
    return [data.replace(path, b"/".ljust(len(path), b"x")) for data in found]


def run_catalogue(data: bytes) -> object:
    store = Store(scratch() / "m")
    store.downloads.mkdir(parents=True, exist_ok=True)
    (store.state_dir / "catalogue").write_bytes(data)
    store.open()
    try:
        entries = store.entries()
        assert len({e.root for e in entries}) == len(entries)
        for entry in entries:
            assert ModelId.is_valid(entry.root)
            assert SafeName.is_valid(entry.name)
            store.problem(entry)
            entry.held()
        return f"{len(entries)} entries"
    finally:
        store.close()


# Tokens and adverts

_CA = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_SEED = bytes(range(32, 64))


def _token() -> bytes:
    made = tokens.issue(_CA, _SEED, bytes(8), now=1e9, uses=3, addresses=[Address("192.0.2.1", 8089)])
    return made.text.encode()


def run_token(data: bytes) -> object:
    got = tokens.parse(data.decode("latin-1"))
    assert tokens.parse(got.text) == got
    return got


def repair_token(data: bytes, rng: random.Random) -> bytes:
    """Claims after damage, signed by the right key."""
    del data
    whole = tokens.parse(_token().decode())
    claims = messages.damage_tree(whole.claims_bytes, rng)
    signed = tokens._TOKEN_DOMAIN + whole.ca_public + whole.public_key + claims
    return tokens.Token(whole.ca_public, _SEED, _CA.sign(signed), whole.claims, claims).text.encode()


def _adverts() -> list[bytes]:
    made = advert.Advert(
        cluster=advert.cluster_hash(ClusterId("b" * 52)),
        node=node_id("attic"),
        port=8089,
        name=NodeName("attic"),
        engine="b11434",
        devices=(advert.ShortDevice("CUDA0", 24 << 30),),
        memory_total=63 << 30,
        models=(advert.ShortModel(SafeName("x (1).gguf"), 40),),
    )
    return ["\0".join(f"{k}={v}" for k, v in advert.to_txt(made).items()).encode()]


def run_advert(data: bytes) -> object:
    pairs = (item.partition(b"=") for item in data.split(b"\0"))
    got, why = advert.parse({key: value if equals else None for key, equals, value in pairs})
    if got is None:
        assert why
        raise TokenError(why)  # any error: `parse` says it in words
    advert.to_txt(got)
    return got


# All


def _codec_target(name: str, codec: Codec) -> Target:
    seeds = list(messages.headers_of(codec))
    run: Callable[[bytes], object] = partial(run_codec, codec)
    return Target(f"codec-{name}", seeds, run, (ProtocolError,), messages.damage_tree, messages.WORDS)


@cache
def targets() -> dict[str, Target]:
    """All, by name."""
    words = [b"GGUF", b"TWM1", b"tightwad manifest 1\n", b"\x08\0\0\0", b"\x09\0\0\0", b"general.alignment"]
    made = [
        Target("manifest", _manifests(), run_manifest, (BadManifest,), repair_manifest, messages.WORDS),
        Target("gguf", _ggufs(), run_gguf, (BadGguf,), None, words),
        Target("frames", transcripts(), run_frames, (ProtocolError,), damage_frames),
        Target("conversation", transcripts(), run_conversation, (ProtocolError,), damage_frames),
        Target("graphs", _graphs(), run_graphs, (ProtocolError,)),
        Target("coded-graphs", _coded_graphs(), run_coded_graphs, (ProtocolError,)),
        Target("weights", _weights(), run_weights, (ProtocolError,)),
        Target("coded-weights", _coded_weights(), run_coded_weights, (ProtocolError,)),
        Target("journal", _journals(), run_journal, (), repair_journal),
        Target("catalogue", _catalogues(), run_catalogue, (), messages.damage_tree, messages.WORDS),
        fuzz_http.target(),
        Target("token", [_token()], run_token, (TokenError,), repair_token),
        Target("advert", _adverts(), run_advert, (TokenError,), None, [b";", b":", b"=", b"+", b"\0", b"GiB"]),
        *(_codec_target(name, codec) for name, codec in _CODECS.items()),
    ]
    return {target.name: target for target in made}


def replay(name: str, data: bytes) -> object:
    """One input outside the engine, with its traceback."""
    return targets()[name].run(data)
