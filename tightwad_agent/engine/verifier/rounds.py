"""One round of one request: what of a draft is worth evaluating, and what of it the model agreed with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from tightwad_agent.wire.verify import Ended


def ahead(draft: Sequence[int], at: int, tokens: Sequence[int]) -> list[int]:
    """What of a draft from position `at` lies behind the sequence `tokens`. Nothing if the draft differs from the
    sequence where they overlap, or leaves a gap."""
    n_behind = len(tokens) - at
    if n_behind < 0 or list(draft[:n_behind]) != list(tokens[at : at + len(draft)]):
        return []
    return list(draft[n_behind:])


def sensible(draft: Sequence[int], n_vocab: int, eog: Container[int]) -> list[int]:
    """The draft up to the first id that is no token, and no further than a token that ends the generation."""
    kept = []
    for token in draft:
        if not 0 <= token < n_vocab:
            break
        kept.append(token)
        if token in eog:
            break
    return kept


def room(n_prompt: int, n_tokens: int, max_tokens: int, context: int) -> int:
    """Draft tokens that can still matter to a sequence of `n_tokens`: a round brings one token more than its draft."""
    return max(0, min(max_tokens - (n_tokens - n_prompt), context - n_tokens) - 1)


def verify(draft: Sequence[int], sample: Callable[[int], int], eog: Container[int]) -> list[int]:
    """The round's tokens: sampled one position after the other until the model leaves the draft, or ends.

    `sample(i)` draws the token behind the first `i` of the draft; it is called once per token of the result, in order.
    """
    tokens: list[int] = []
    for guess in (*draft, None):
        token = sample(len(tokens))
        tokens.append(token)
        if token != guess or token in eog:
            break
    return tokens


def agreed(draft: Sequence[int], tokens: Sequence[int]) -> int:
    """How many of the draft the model chose itself."""
    n = 0
    while n < len(draft) and n < len(tokens) and draft[n] == tokens[n]:
        n += 1
    return n


def ended(tokens: Sequence[int], n_prompt: int, max_tokens: int, context: int, eog: Container[int]) -> Ended:
    """Whether a sequence goes on after its last token."""
    if len(tokens) > n_prompt and tokens[-1] in eog:
        return Ended.EOG
    if len(tokens) - n_prompt >= max_tokens or len(tokens) >= context:
        return Ended.LENGTH
    return Ended.NOT
