"""Requests that can be answered twice with the same words. Pure."""

from __future__ import annotations

import json

from tightwad_agent.proxy.openai import MAX_PARSED

SEEDED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


def with_seed(path: str, body: bytes, seed: int) -> bytes:
    """The body of a request for a stream with this seed where the client left it to dice; any other as it is.

    Only so can llama-server say the same again when it was lost in the middle. What is not understood here is for the
    engine to judge.
    """
    if path not in SEEDED_PATHS or len(body) > MAX_PARSED or b'"stream"' not in body:
        return body
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(plain, dict) or plain.get("stream") is not True or plain.get("seed", -1) not in (None, -1):
        return body
    return body.rstrip()[:-1] + b',"seed":%d}' % seed  # of a name that is there twice the last one counts
