"""What nodes tell one another of API keys: who they are for and until when, never the keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from tightwad_agent.wire.codec import NATURAL, Max

MAX_RECORDS = 500
"""Records of keys, revoked ones among them."""
DIGEST_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")


class KeyName(str):
    """What people call a key: letters, digits, dots, dashes and underscores, at most 32."""

    __slots__ = ()

    def __new__(cls, text: str) -> KeyName:
        if not isinstance(text, str) or _NAME.match(text) is None:
            raise ValueError("not a name of a key")
        return super().__new__(cls, text)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. `digest`: SHA-256 of its text, which has 256 random bits. Times are Unix seconds; `expires` 0: never,
    `revoked` 0: not."""

    digest: Annotated[bytes, Max(DIGEST_BYTES)]
    name: KeyName
    created: Annotated[int, NATURAL]
    expires: Annotated[int, NATURAL] = 0
    revoked: Annotated[int, NATURAL] = 0

    @property
    def short(self) -> str:
        """Enough to tell two keys of one name apart; says nothing of the key itself."""
        return self.digest.hex()[:8]
