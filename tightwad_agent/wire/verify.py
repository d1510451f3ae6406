"""What the agent and its verifier process say to each other over a socket pair: `frames` around msgpack headers.

The verifier holds requests. Each has a sequence of tokens: its prompt and what was sampled so far; the newest
sampled token is not yet in the KV cache. A round evaluates that token and a draft behind it in one forward pass,
samples position by position, and keeps what the model itself chose: the accepted part of the draft and one token
more.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.codec import NATURAL, Codec, Max

Natural = Annotated[int, NATURAL]

MAX_TOKENS = 1 << 20
"""Tokens of one prompt."""
MAX_TEXT = 16 << 20
"""Bytes of a text to tokenize."""
MAX_HEADER = MAX_TEXT + (1 << 16)
MAX_GRAMMAR = 48 << 10
"""Characters of a grammar."""
MAX_ROUND = 4096
"""Draft tokens of one round, and tokens that one answer brings."""

Packed = Annotated[bytes, Max(4 * MAX_TOKENS)]
"""Token ids, 32 bits each, little endian."""


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Ids as the wire has them. `OverflowError` for one that is no 32-bit integer."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`. Raises `ProtocolError` for a broken length."""
    if len(data) % 4:
        raise ProtocolError(f"{len(data)} bytes are no whole number of tokens")
    ids = array("i")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


# To the verifier


@dataclass(frozen=True, slots=True)
class Load:
    """Brings the model up; the first message, sent once.

    `library`: folder of the engine's shared libraries. `rpc_ports`: loopback ports of the forwarders, in the order
    of the plan; `rpc_shares` and `local_shares` relative sizes per device, as in `engine.argv.ServerOptions`.
    `offload_layers` -1: all. `context`: tokens of the unified KV cache; `slots`: sequences at once.
    """

    library: Annotated[str, Max(4096)]
    model: Annotated[str, Max(4096)]
    context: Natural
    slots: Natural = 4
    batch: Natural = 512
    threads: Natural = 0
    rpc_ports: tuple[Natural, ...] = ()
    rpc_shares: tuple[Natural, ...] = ()
    local_devices: tuple[Annotated[str, Max(64)], ...] = ()
    local_shares: tuple[Natural, ...] = ()
    offload_layers: int = -1


@dataclass(frozen=True, slots=True)
class Sampling:
    """libllama's sampler chain in llama-server's order: logit bias, penalties, top-k, top-p, min-p, temperature, draw.

    `temperature` 0 is greedy, after bias and penalties. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1, and zero
    penalties switch a step off; `repeat_last_n` -1 is the whole context. The same `seed` gives the same tokens.
    `grammar` (GBNF, from its rule `root` on; empty: none): what is said follows it; it is drawn as without a grammar
    where that does.
    """

    temperature: float = 0.8
    top_k: Natural = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: Natural = 0
    logit_bias: Annotated[tuple[tuple[int, float], ...], Max(4096)] = ()
    grammar: Annotated[str, Max(MAX_GRAMMAR)] = ""


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Answered with `Tokenized` of the same `call`. `special`: control tokens written out in the text count as such.
    `begin`: with the begin-of-sequence token, if the model wants one."""

    call: Natural
    text: Annotated[bytes, Max(MAX_TEXT)]
    special: bool = True
    begin: bool = True


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Answered with `Text`."""

    call: Natural
    tokens: Packed


@dataclass(frozen=True, slots=True)
class Open:
    """A request. Its prompt is evaluated as soon as a slot is free, and its first token comes as `Accepted`; then it
    waits for a `Round`. `max_tokens`: it ends by itself after so many. `n_probs`: alternatives to report per token.

    `said`: tokens of the answer that another verifier has sampled already. They come back first, in `Accepted`s of
    their own with `batch` 0, and count for `max_tokens`; then the answer goes on as that one would have gone on.
    """

    request: Natural
    prompt: Packed
    sampling: Sampling
    max_tokens: Natural
    n_probs: int = -1
    said: Packed = b""


@dataclass(frozen=True, slots=True)
class Round:
    """Evaluates once more, with `draft` as a guess of the tokens from position `at` of the sequence (prompt included).

    A draft that begins earlier than the sequence ends (because `free` rounds went on) is cut to what is still ahead, or
    dropped where it differs from what was sampled. `free`: so many rounds without a draft may follow by themselves,
    until another `Round` of the request arrives.
    """

    request: Natural
    at: Natural
    draft: Annotated[bytes, Max(4 * MAX_ROUND)] = b""
    free: Natural = 0


@dataclass(frozen=True, slots=True)
class Close:
    """The request is over or given up. Its tokens stay in its slot's cache for others with the same beginning."""

    request: Natural


# From the verifier


class Rollback(StrEnum):
    """Whether sampled tokens can be taken out of the model's memory again."""

    FULL = "full"
    WINDOW = "window"  # sliding-window attention: those of the last decode can, older ones only within the window
    NONE = "none"  # recurrent or hybrid


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress; about ten a second at most."""

    percent: Natural


@dataclass(frozen=True, slots=True)
class Loaded:
    """Ready. `eog`: tokens that end a generation. Templates and special texts are those of the GGUF, empty if none."""

    context: Natural
    context_train: Natural
    slots: Natural
    n_vocab: Natural
    rollback: Rollback
    window: Natural = 0
    eog: Packed = b""
    bos: int = -1
    eos: int = -1
    adds_bos: bool = False
    bos_text: Annotated[str, Max(256)] = ""
    eos_text: Annotated[str, Max(256)] = ""
    chat_template: Annotated[str, Max(1 << 20)] = ""
    load_ms: Natural = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot serve this; the process ends after it. `kind`: `build` (another libllama than this was written
    for), `memory` (`needed` bytes on `device`), `model`, `device`, or `internal`. After `build` llama-server may
    still be able to."""

    kind: Annotated[str, Max(32)]
    reason: Annotated[str, Max(4000)]
    needed: Natural = 0
    device: Annotated[str, Max(200)] = ""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The answer to `Tokenize`."""

    call: Natural
    tokens: Packed


@dataclass(frozen=True, slots=True)
class Text:
    """The answer to `Detokenize`: bytes, because tokens may cut a character."""

    call: Natural
    text: Annotated[bytes, Max(MAX_TEXT)]


@dataclass(frozen=True, slots=True)
class Probability:
    """One token with the natural logarithm of its probability before temperature and cuts."""

    token: int
    logprob: float
    piece: Annotated[bytes, Max(1024)] = b""


@dataclass(frozen=True, slots=True)
class TokenProbabilities:
    """Of one sampled token: itself, and the most likely ones, best first."""

    chosen: Probability
    top: Annotated[tuple[Probability, ...], Max(64)] = ()


class Ended(StrEnum):
    """Why a request will get no more tokens."""

    NOT = ""
    EOG = "eog"  # the last token ends the generation; it is among `tokens`
    LENGTH = "length"  # max_tokens, or the context is full


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a round (or, first, the prompt) brought.

    `tokens` and the bytes each stands for. `n_draft` were in the round and `n_accepted` of them were right; `at`:
    position of the first of `tokens`. `decode_us`: the forward pass, with sampling; `batch` tokens of `requests`
    requests were in it. `n_prompt`, `n_cached`: only with the first, tokens of the prompt and how many needed no
    evaluation (what was `said` already counts as prompt here); `prompt_us` then the time since its evaluation began.
    """

    request: Natural
    at: Natural
    tokens: Annotated[bytes, Max(4 * MAX_ROUND)]
    pieces: Annotated[tuple[Annotated[bytes, Max(1024)], ...], Max(MAX_ROUND)]
    n_draft: Natural = 0
    n_accepted: Natural = 0
    ended: Ended = Ended.NOT
    decode_us: Natural = 0
    batch: Natural = 0
    requests: Natural = 0
    n_prompt: Natural = 0
    n_cached: Natural = 0
    prompt_us: Natural = 0
    probabilities: Annotated[tuple[TokenProbabilities, ...], Max(MAX_ROUND)] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over. `code`: `context` (prompt longer than the context), `cache` (no room beside the others),
    `input` (empty prompt, token out of range), or `internal`."""

    request: Natural
    code: Annotated[str, Max(32)]
    reason: Annotated[str, Max(1000)] = ""


TO_VERIFIER = Codec(
    "verifier commands",
    {1: Load, 2: Tokenize, 3: Detokenize, 4: Open, 5: Round, 6: Close},
)
FROM_VERIFIER = Codec(
    "verifier answers",
    {1: Loading, 2: Loaded, 3: Refused, 4: Tokenized, 5: Text, 6: Accepted, 7: Failed},
)

GREEDY = Sampling(temperature=0.0)

__all__ = [
    "FROM_VERIFIER",
    "GREEDY",
    "MAX_HEADER",
    "MAX_ROUND",
    "MAX_TEXT",
    "MAX_TOKENS",
    "TO_VERIFIER",
    "Accepted",
    "Close",
    "Detokenize",
    "Ended",
    "Failed",
    "Load",
    "Loaded",
    "Loading",
    "Open",
    "Probability",
    "Refused",
    "Rollback",
    "Round",
    "Sampling",
    "Text",
    "TokenProbabilities",
    "Tokenize",
    "Tokenized",
    "pack_tokens",
    "unpack_tokens",
]
