"""Tokens to text: characters whole, whichever way their bytes were spread over tokens."""

from __future__ import annotations

import codecs

_decoder = codecs.getincrementaldecoder("utf-8")


class TextDecoder:
    """Bytes in as tokens bring them, text out as soon as a character is whole.

    However the same bytes are split, the texts joined are the same: what `bytes.decode("utf-8", "replace")` gives.
    """

    def __init__(self) -> None:
        self._codec = _decoder("replace")

    def feed(self, data: bytes) -> str:
        """The characters that are whole now; the beginning of one is held back."""
        return self._codec.decode(data)

    def rest(self) -> str:
        """What a beginning that was never completed stands for: a replacement character, or nothing."""
        return self._codec.decode(b"", final=True)


def token_text(piece: bytes) -> str:
    """One token for a person to read. A piece that is no text by itself is written as `bytes:\\xf0\\x9f`."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
