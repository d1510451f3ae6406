"""llama-server's helpers `/tokenize` and `/detokenize`: what is asked, and whether it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightwad_agent.proxy.fields import BadField, Fields, shown
from tightwad_agent.proxy.neutral import NEUTRAL
from tightwad_agent.wire.verify import MAX_TEXT, MAX_TOKENS


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """`/tokenize`: `parts` are texts and token ids, in order."""

    parts: tuple[str | int, ...]
    add_special: bool
    parse_special: bool
    with_pieces: bool


def tokenize_request(body: Mapping[str, Any]) -> TokenizeRequest:
    fields = Fields(body)
    content = fields.take("content")
    parts = [content] if isinstance(content, str) else [] if content is None else content
    if not isinstance(parts, list) or not all(type(p) in (str, int) for p in parts) or len(parts) > MAX_TOKENS:
        raise fields.wrong("content", "text, or a list of texts and token ids", content)
    request = TokenizeRequest(
        tuple(parts), fields.flag("add_special"), fields.flag("parse_special", default=True), fields.flag("with_pieces")
    )
    fields.refuse_rest(NEUTRAL)
    return request


def detokenize_request(body: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids of `/detokenize`."""
    fields = Fields(body)
    tokens = fields.take("tokens") or []
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens) or len(tokens) > MAX_TOKENS:
        raise fields.wrong("tokens", "a list of token ids", tokens)
    fields.refuse_rest(NEUTRAL)
    return tuple(tokens)


def check_tokens(tokens: Sequence[int], n_vocab: int, param: str) -> None:
    """Raises `BadField` for an id the model does not have."""
    wrong = next((t for t in tokens if not 0 <= t < n_vocab), None)
    if wrong is not None:
        raise BadField(f"`{param}`: the model has no token {shown(wrong)}; its ids are 0 to {n_vocab - 1}", param=param)


def check_text(text: str, param: str) -> bytes:
    """Its bytes. Raises `BadField` where they are more than a prompt may have."""
    data = text.encode()
    if len(data) > MAX_TEXT:
        raise BadField(f"`{param}` is longer than {MAX_TEXT >> 20} MiB", param=param)
    return data
