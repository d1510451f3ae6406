"""Whether the verifier has work for a request, and which of its answers belongs to which round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightwad_agent.wire.verify import Accepted

MOST_PASSED = 3


@dataclass(slots=True)
class Sent:
    """A round that is to be answered. `unsure`: the verifier may have been at work when it was sent, and may answer
    that first. The last `n_copied` tokens of `draft` are copies from the text. `passed`: answers of others that came
    since."""

    at: int
    draft: Sequence[int]
    when: float
    source: str = ""
    draft_s: float = 0.0
    n_copied: int = 0
    unsure: bool = False
    passed: int = 0


class Outstanding:
    """At most one round is waited for. Answers carry no number, and a round that was sent into free rounds can be
    overtaken by a free one that had begun already. An answer without a draft, where there should be one, is another's.
    Where it may be either it is taken for the round's own, so that nobody waits for ever; the next round is then
    `unsure` too, so that the mistake does not last."""

    __slots__ = ("_unsure", "free", "running", "sent")

    def __init__(self) -> None:
        self.sent: Sent | None = None
        self.free = 0
        """Rounds the verifier still does by itself."""
        self.running = True
        """It works, or will by itself: at first on the prompt."""
        self._unsure = False

    def submit(self, sent: Sent, free: int) -> None:
        """A round is being sent."""
        sent.unsure = self.running or self._unsure
        self.sent, self.free, self.running = sent, free, True

    def came(self, answer: Accepted, sequence: Sequence[int]) -> Sent | None:
        """The round this is the answer of; `None`: a free one, or the prompt's. `sequence` is without its tokens."""
        sent = self.sent
        if sent is None:
            self.free = max(0, self.free - 1)
            self.running = self.free > 0
            return None
        if not self._is_its(answer, sent, sequence):
            sent.passed += 1
            return None
        self._unsure = answer.n_draft == 0 and (sent.unsure or bool(sent.draft))
        self.sent, self.running = None, self.free > 0
        return sent

    @staticmethod
    def _is_its(answer: Accepted, sent: Sent, sequence: Sequence[int]) -> bool:
        if answer.n_draft > len(sent.draft):
            return False
        if answer.n_draft or not sent.unsure or sent.passed >= MOST_PASSED:
            return True
        n_behind = answer.at - sent.at
        return n_behind >= len(sent.draft) or list(sequence[sent.at :]) != list(sent.draft[:n_behind])
