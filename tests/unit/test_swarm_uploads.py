"""How many pieces go out at once, against lines and peers of known speed."""

from __future__ import annotations

from collections import Counter

from tightwad_agent.swarm.uploads import FIRST, FIRST_TRY_S, LAST_TRY_S, LEAST, MOST, PATIENCE, Slots, Turn, Uploads

BLOCK = 1 << 18


def one_slot() -> Uploads:
    uploads = Uploads()
    uploads._slots.n = 1
    return uploads


def test_first_come_first_served_one_at_a_time() -> None:
    uploads, woken = one_slot(), Counter[str]()
    turns = {name: uploads.ask(lambda name=name: woken.update([name])) for name in "abc"}  # type: ignore[misc]
    assert [turn.granted for turn in turns.values()] == [True, False, False]
    uploads.over(turns["a"])
    assert [turn.granted for turn in turns.values()] == [False, True, False]
    uploads.over(turns["c"])  # gave up while it waited
    uploads.over(turns["b"])
    assert not any(turn.granted for turn in turns.values())
    assert uploads.ask(lambda: None).granted
    assert woken == {"a": 1, "b": 1}
    uploads.over(turns["b"])  # again: of no effect
    assert not uploads.ask(lambda: None).granted


def test_who_wants_what_fewest_others_can_give_is_next() -> None:
    uploads, copies = one_slot(), {"a": 3.0, "b": 1.0, "c": 1.0}
    first = uploads.ask(lambda: None)
    turns = {name: uploads.ask(lambda: None, lambda name=name: copies[name]) for name in "abc"}  # type: ignore[misc]
    copies["c"] = 0.0  # since it asked, whoever had it left
    uploads.over(first)
    order = []
    while left := [name for name, turn in turns.items() if turn.granted]:
        order += left
        uploads.over(turns[left[0]])
    assert order == ["c", "b", "a"]


def test_nobody_waits_for_ever() -> None:
    uploads = one_slot()
    turn, common = uploads.ask(lambda: None), uploads.ask(lambda: None, lambda: 2.0)
    n_passed = 0
    while not common.granted and n_passed < 100:
        rare = uploads.ask(lambda: None, lambda: 0.0)
        uploads.over(turn)
        turn, n_passed = rare, n_passed + 1
    assert n_passed == 2 * PATIENCE + 1


class Line:
    """Sends blocks of `piece_bytes` pieces to peers with these rates over a line of `rate`; counts pieces."""

    def __init__(self, rate: float, peers: list[float], piece_bytes: int = 16 * BLOCK) -> None:
        self.rate, self.peers, self.piece_bytes = rate, peers, piece_bytes
        self.uploads = Uploads()
        self.turns = [self.uploads.ask(lambda: None) for _ in peers]
        self.left = [float(piece_bytes)] * len(peers)
        self.sent = [0.0] * len(peers)
        self.now = 0.0

    def run(self, seconds: float, step: float = 0.02) -> list[int]:
        """The numbers of slots over time."""
        seen = []
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self._step(step)
            seen.append(self.uploads.n_slots)
        return seen

    def _step(self, step: float) -> None:
        active = [i for i, turn in enumerate(self.turns) if turn.granted]
        free, rates = self.rate, {}
        for i in sorted(active, key=lambda i: self.peers[i]):  # max-min fair, as TCP is roughly
            rates[i] = min(self.peers[i], free / (len(active) - len(rates)))
            free -= rates[i]
        for i, rate in rates.items():
            self.sent[i] += rate * step
            self.left[i] -= rate * step
            self.uploads.sent(int(rate * step), self.now)
            if self.left[i] <= 0:
                self.uploads.over(self.turns[i])
                self.turns[i], self.left[i] = self.uploads.ask(lambda: None), float(self.piece_bytes)


def test_a_line_that_one_peer_fills_is_shared_by_few() -> None:
    line = Line(25e6, [25e6] * 7)
    line.run(20)
    assert Counter(line.run(60)).most_common(1)[0][0] == LEAST


def test_peers_slower_than_the_line_are_served_together() -> None:
    line = Line(100e6, [20e6] * 7)
    line.run(20)
    assert sorted(line.run(40))[400] > FIRST
    before = sum(line.sent)
    line.run(20)
    assert (sum(line.sent) - before) / 20 > 0.8 * 100e6


def test_slow_peers_do_not_hold_the_others_up() -> None:
    line = Line(25e6, [25e6] * 3 + [0.5e6] * 6, piece_bytes=64 * BLOCK)
    line.run(60)
    assert sum(line.sent) > 0.85 * 60 * 25e6


def test_some_that_become_slow_are_noticed_at_once() -> None:
    line = Line(25e6, [25e6] * 6, piece_bytes=64 * BLOCK)
    line.run(100)  # by now the next trial is half a minute away
    for i in range(6):
        line.peers[i] = 1e6 if line.turns[i].granted else 25e6
    before = sum(line.sent)
    line.run(6)
    assert sum(line.sent) - before > 0.45 * 6 * 25e6


def test_when_the_slow_ones_have_gone_few_share_it_again() -> None:
    line = Line(25e6, [25e6] * 6 + [0.5e6] * 8, piece_bytes=64 * BLOCK)
    assert max(line.run(30)) > FIRST
    line.peers = [25e6] * 14
    line.run(4 * LAST_TRY_S)
    assert Counter(line.run(30)).most_common(1)[0][0] == LEAST


def test_without_anybody_waiting_nothing_is_tried() -> None:
    slots = Slots()
    for i in range(1000):
        slots.sent(BLOCK, i * 0.05, waiting=False)
    assert slots.n == FIRST


def test_there_is_an_upper_limit() -> None:
    line = Line(1e9, [10e6] * 40)
    assert max(line.run(120)) == MOST


def test_the_first_trial_comes_soon() -> None:
    assert FIRST + 1 in Line(100e6, [10e6] * 9).run(FIRST_TRY_S + 2.0)


def test_a_turn_that_is_over_calls_nobody() -> None:
    turn = Turn(lambda: None, lambda: 0.0, 0)
    Uploads().over(turn)
    assert not turn.granted
