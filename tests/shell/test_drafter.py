"""The drafter's service and the coordinator's side of it, over memory streams, with a server that only counts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from draft_fakes import DRAFT, Inbox, Rig, until

from tightwad_agent.engine import draft_desk, draft_link, outbox
from tightwad_agent.engine.drafter import DrafterLimits
from tightwad_agent.engine.drafting import DrafterSpec
from tightwad_agent.engine.leased import Phase
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.errors import RemoteError
from tightwad_agent.ids import Epoch, ModelId
from tightwad_agent.proxy import ports
from tightwad_agent.streams import Framed
from tightwad_agent.wire.draft import FROM_DRAFTER, MAX_SESSIONS, TO_DRAFTER, Ask, Drafted, Hello, NoDraft
from tightwad_agent.wire.verify import pack_tokens


@pytest.fixture
async def rig(nursery: trio.Nursery, tmp_path: Path) -> Rig:
    return await Rig(nursery, tmp_path).open()


async def refused(rig: Rig, params: dict[str, Any], method: str = "draft.start") -> tuple[str, str]:
    with pytest.raises(RemoteError) as caught, trio.fail_after(10):
        await rig.home.call(rig.node.node, method, params)
    return caught.value.code, caught.value.message


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


# Commands


async def test_a_start_answers_once_the_model_is_loaded(rig: Rig) -> None:
    assert rig.service.state.phase is Phase.IDLE
    assert await rig.start() == {"n_vocab": 1000, "context": 200, "slots": 2}
    assert rig.phases == ["starting", "ready"]
    assert rig.service.state.model == DRAFT
    assert rig.service.state.epoch == rig.epoch
    assert str(rig.model) in psutil.Process(rig.service.state.pid).cmdline()


async def test_the_same_start_is_one_process_and_any_other_a_fresh_one(rig: Rig) -> None:
    await rig.start()
    pid = rig.service.state.pid
    await rig.start()
    assert rig.service.state.pid == pid
    for change in ({"run": 1}, {"slots": 3}, {"context": 100}, {"epoch": [4, rig.home.node]}):
        await rig.start(**change)
        assert rig.service.state.pid != pid
        pid = rig.service.state.pid
    assert len(children()) == 1


async def test_an_epoch_that_is_over_is_not_obeyed(rig: Rig) -> None:
    await rig.start(epoch=[4, rig.home.node])
    assert (await refused(rig, rig.order()))[0] == "stale_epoch"
    assert (await refused(rig, rig.order(), "draft.stop"))[0] == "stale_epoch"
    other = rig.mesh.add("other")
    with pytest.raises(RemoteError, match="is not the coordinator"):
        await other.call(rig.node.node, "draft.start", rig.order(epoch=[5, str(rig.home.node)]))
    assert rig.service.state.phase is Phase.READY


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": None},
        {"model": "../../etc/passwd"},
        {"model": None},
        {"context": 63},
        {"context": 2**40},
        {"context": "200"},
        {"slots": 0},
        {"slots": 17},
        {"run": 1.5},
    ],
)
async def test_a_command_that_is_none(rig: Rig, change: dict[str, Any]) -> None:
    assert (await refused(rig, rig.order(**change)))[0] == "protocol"


async def test_a_model_that_is_not_here_is_said(rig: Rig) -> None:
    code, text = await refused(rig, rig.order(model="b" * 64))
    assert code == "model_not_found"
    assert "bbbbbbbbbbbb is not on this machine" in text
    assert rig.service.state.phase is Phase.IDLE


async def test_a_server_that_cannot_load_is_given_up_with_its_last_words(rig: Rig) -> None:
    rig.control(load="exit")
    code, text = await refused(rig, rig.order())
    assert code == "engine"
    assert "3 times in a row" in text
    assert "failed to load model" in text
    assert rig.service.state.phase is Phase.FAILED
    rig.control()
    await rig.start()


@pytest.mark.parametrize("load", ["hang", "odd"])
async def test_a_server_that_never_gets_ready_is_replaced(nursery: trio.Nursery, tmp_path: Path, load: str) -> None:
    limits = DrafterLimits(start_s=5, load_s=0.5)
    rig = await Rig(nursery, tmp_path).open(limits=limits, policy=RestartPolicy(first_delay_s=0.01, max_crashes=2))
    rig.control(load=load)
    assert "was not ready within 0.5 s" in (await refused(rig, rig.order()))[1]


async def test_a_stop_ends_it_unless_it_is_about_another_run(rig: Rig) -> None:
    await rig.start(run=2)
    for run, phase in ((1, Phase.READY), (2, Phase.IDLE)):
        await rig.home.call(rig.node.node, "draft.stop", {"epoch": list(rig.epoch), "run": run})
        await rig.until_phase(phase)
    assert not children()


async def test_a_drafter_without_a_stream_is_stopped(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await Rig(nursery, tmp_path).open(limits=DrafterLimits(lease_s=0.3))
    await rig.start()
    await rig.until_phase(Phase.IDLE)


async def test_a_drafter_is_kept_while_it_is_used_by_a_coordinator_that_is_one(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await Rig(nursery, tmp_path).open(limits=DrafterLimits(lease_s=0.5))
    await rig.ready()
    await trio.sleep(1)
    assert rig.service.state.phase is Phase.READY
    rig.accepted = False  # the epoch is over
    await rig.until_phase(Phase.IDLE)
    assert not children()


# Drafting


async def test_tokens_come_one_by_one_and_go_on_when_more_are_asked_for(rig: Rig) -> None:
    drafter: ports.Drafter = await rig.ready()
    inbox = Inbox()
    session = drafter.open(inbox)
    session.ask(0, 0, [5, 6], 3)
    assert await inbox.drafted(3) == [7, 8, 9]
    made = [e for e in inbox.events if isinstance(e, Drafted)]
    assert [e.offset for e in made] == [sum(len(e.tokens) // 4 for e in made[:i]) for i in range(len(made))]
    assert len(made) > 1
    session.extend(0, 2)
    assert await inbox.drafted(5) == [7, 8, 9, 10, 11]
    assert [asked["prompt"] for asked in rig.asked][-1] == [[5, 6, 7, 8, 9, 10]]
    assert {asked["id_slot"] for asked in rig.asked} == {0}
    state, [seen] = rig.service.state, rig.drafting.states()
    assert state.sessions == 1
    assert 1 < state.tokens_per_s <= 50  # the server says 20 ms; asking takes what it takes
    assert (seen.phase, seen.name) == ("ready", "d")
    assert seen.tokens_per_s > 1
    assert seen.first_token_ms > 0
    session.forget()
    await until(lambda: rig.service.state.sessions == 0)


async def test_what_the_drafter_is_told_about_itself_is_what_is_wanted_of_it(rig: Rig) -> None:
    rtt = [0.01]
    spec = DrafterSpec(
        node=rig.node.node, name="d", model=DRAFT, epoch=rig.epoch, n_vocab=1000, context=200, slots=2,
        rtt_s=lambda: rtt[0],
    )  # fmt: skip
    rig.drafting.set_drafters([spec])
    await until(rig.drafting.ready)
    [drafter] = rig.drafting.ready()
    assert drafter.info == ports.DrafterInfo(rig.node.node, "d", DRAFT, 2, 0.01)
    rtt[0] = 0.02
    assert drafter.info.rtt_s == 0.02


async def test_a_new_branch_replaces_the_old_one(rig: Rig) -> None:
    rig.control(delay_s=0.05)
    inbox = Inbox()
    session = (await rig.ready()).open(inbox)
    session.ask(0, 0, [5], 50)
    await inbox.drafted(2)
    n = len(inbox.events)
    session.ask(1, 2, [100], 2)
    assert (await inbox.drafted(n + 2))[n:] == [101, 102]
    assert rig.asked[-1]["prompt"] == [[5, 6, 100, 101]]
    assert all(e.branch == 1 for e in inbox.events[n:])
    assert len(rig.asked) < 25  # of the 50 that were wanted first


async def test_the_model_may_end_the_text(rig: Rig) -> None:
    inbox = Inbox()
    session = (await rig.ready()).open(inbox)
    session.ask(0, 0, [664], 9)
    await until(lambda: any(isinstance(e, Drafted) and e.ended for e in inbox.events))
    assert inbox.tokens == [665, 666]
    session.extend(0, 5)
    await trio.sleep(0.05)
    assert inbox.tokens == [665, 666]


async def test_sessions_are_drafted_for_together(rig: Rig) -> None:
    rig.control(delay_s=0.02)
    drafter, inboxes = await rig.ready(), [Inbox(), Inbox()]
    for i, inbox in enumerate(inboxes):
        drafter.open(inbox).ask(0, 0, [100 * i], 8)
    assert [await inbox.drafted(8) for inbox in inboxes] == [list(range(1, 9)), list(range(101, 109))]
    shared = [asked for asked in rig.asked if len(asked["prompt"]) == 2]
    assert len(shared) >= 6
    assert {asked["id_slot"] for asked in shared} == {None}


async def test_who_finds_no_slot_is_told(rig: Rig) -> None:
    drafter, inboxes = await rig.ready(), [Inbox(), Inbox(), Inbox()]
    for inbox in inboxes:
        drafter.open(inbox).ask(0, 0, [1], 3)
    assert await inboxes[2].refusal() == "all 2 slots are in use"
    assert await inboxes[1].drafted(3) == [2, 3, 4]


async def test_a_full_context_is_said(rig: Rig) -> None:
    drafter, inbox = await rig.ready(context=64), Inbox()
    session = drafter.open(inbox)
    session.ask(0, 0, list(range(61)), 5)
    assert "the context of 64 tokens is full" in await inbox.refusal()
    assert inbox.tokens == [61, 62]
    session.ask(1, 0, [1] * 100, 5)
    await until(lambda: len(inbox.refusals) == 2)


async def test_a_long_prompt_whose_session_is_gone_is_given_up(rig: Rig) -> None:
    drafter, inbox = await rig.ready(), Inbox()
    rig.control(answer="hang", once=True)
    session = drafter.open(inbox)
    session.ask(0, 0, list(range(100)), 5)
    await until((rig.folder / "asked").exists)
    [pid] = [p.pid for p in children()]
    await until(lambda: n_connections(pid) == 1)
    session.forget()
    await until(lambda: n_connections(pid) == 0)
    other = Inbox()
    drafter.open(other).ask(0, 0, [1], 1)
    assert await other.drafted(1) == [2]
    assert inbox.events == []


def n_connections(pid: int) -> int:
    """Connections of this process to a server that are up."""
    ports_of = {c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    mine = [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port in ports_of]
    return sum(c.status == psutil.CONN_ESTABLISHED for c in mine)


# A server that misbehaves


async def test_a_connection_that_is_closed_after_each_answer_is_opened_again(rig: Rig) -> None:
    rig.control(keep=0)
    inbox = Inbox()
    (await rig.ready()).open(inbox).ask(0, 0, [1], 5)
    assert await inbox.drafted(5) == [2, 3, 4, 5, 6]


async def test_a_kept_connection_that_turns_out_closed_is_tried_once_more(rig: Rig) -> None:
    inbox = Inbox()
    session = (await rig.ready()).open(inbox)
    session.ask(0, 0, [1], 1)
    await inbox.drafted(1)
    rig.control(answer="close", once=True)
    session.ask(1, 0, [7], 1)
    assert (await inbox.drafted(2))[1:] == [8]
    assert rig.service.state.restarts == 0


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_an_error_is_no_draft_with_its_message(rig: Rig, status: int) -> None:
    rig.control(answer="status", status=status)
    inbox = Inbox()
    session = (await rig.ready()).open(inbox)
    session.ask(0, 0, [1], 2)
    assert await inbox.refusal() == "llama-server: no such luck"
    rig.control()
    session.ask(1, 0, [1], 1)
    await until(lambda: inbox.tokens == [2])
    assert rig.service.state.restarts == 0


async def test_an_error_for_several_is_found_out_one_by_one(rig: Rig) -> None:
    rig.control(delay_s=0.02)
    drafter, inboxes = await rig.ready(), [Inbox(), Inbox()]
    for inbox in inboxes:
        drafter.open(inbox).ask(0, 0, [1], 40)
    await inboxes[1].drafted(3)
    rig.control(answer="status", once=True, delay_s=0.02)
    for inbox in inboxes:
        assert await inbox.drafted(40) == list(range(2, 42))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("garbage", "this is no answer of llama-server"),
        ("half", "answer broke off"),
        ("nojson", "answer is no JSON"),
        ("notutf8", "answer is no JSON"),
        ("close", "closed the connection without an answer"),
        ("fewer", "answer is no completion"),
        ("more", "answer is no completion"),
        ("words", "answer is no completion"),
        ("endless", "has no end of its headers"),
        ("huge", "answers with 1000000000000 bytes"),
        ("die", "draft-server exited with code 3"),
    ],
)
async def test_a_server_that_cannot_be_trusted_is_replaced(rig: Rig, answer: str, reason: str) -> None:
    drafter, inbox = await rig.ready(), Inbox()
    pid = rig.service.state.pid
    drafter.open(inbox).ask(0, 0, [1], 2)
    await inbox.drafted(2)
    rig.control(answer=answer)
    drafter.open(inbox).ask(0, 0, [5], 2)
    await inbox.refusal()
    await until(lambda: rig.service.state.restarts)
    assert reason in rig.service.state.problem
    await until(lambda: not drafter.alive)
    rig.control()
    await until(lambda: rig.drafting.ready() and rig.drafting.ready()[0] is not drafter)
    assert rig.service.state.pid != pid
    after = Inbox()
    rig.drafting.ready()[0].open(after).ask(0, 0, [5], 2)
    assert await after.drafted(2) == [6, 7]


async def test_a_silent_server_is_replaced_in_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_desk, "TURN_DEADLINE_S", 0.3)
    drafter, inbox = await rig.ready(), Inbox()
    drafter.open(inbox).ask(0, 0, [1], 90)
    await inbox.drafted(2)
    assert rig.service.state.pid is not None
    os.kill(rig.service.state.pid, signal.SIGSTOP)
    assert "did not answer within" in await inbox.refusal()
    await until(lambda: rig.drafting.ready() and rig.drafting.ready()[0] is not drafter)


async def test_a_killed_server_ends_the_drafts_and_comes_back(rig: Rig) -> None:
    rig.control(delay_s=0.05)
    drafter, inbox, quiet = await rig.ready(), Inbox(), Inbox()
    session = drafter.open(inbox)
    drafter.open(quiet)
    session.ask(0, 0, [1], 90)
    await inbox.drafted(2)
    assert rig.service.state.pid is not None
    os.kill(rig.service.state.pid, signal.SIGKILL)
    await inbox.refusal()
    await until(lambda: not drafter.alive)
    assert quiet.events == []
    session.ask(1, 0, [1], 1)
    session.extend(1, 1)
    assert inbox.refusals[1:] == ["the drafter is lost"]
    session.forget()
    session.ask(2, 0, [1], 1)
    assert len(inbox.refusals) == 2
    await until(rig.drafting.ready)
    assert "SIGKILL" in rig.service.state.problem


async def test_a_loss_is_told_once_and_what_fails_afterwards_is_not(rig: Rig) -> None:
    said: list[str] = []
    await rig.ready()
    rig.drafting.tell = said.append
    await rig.mesh.cut(rig.home.node, rig.node.node)
    await until(lambda: "no address" in rig.drafting.states()[0].reason)
    (text,) = said
    assert text.startswith("the drafter on d was lost: ")
    rig.mesh.heal(rig.home.node, rig.node.node)
    await until(rig.drafting.ready)
    assert said[1:] == ["d drafts now"]


# The stream, from the drafter's side


async def stream_of(rig: Rig) -> trio.abc.Stream:
    await rig.start()
    return await rig.home.open_stream(rig.node.node, "draft", {"epoch": list(rig.epoch)})


async def test_hello_says_what_is_drafted_with(rig: Rig) -> None:
    framed = Framed(await stream_of(rig), FROM_DRAFTER)
    assert await framed.expect(Hello, deadline_s=5) == Hello(DRAFT, 1000, 200, 2)


@pytest.mark.parametrize(
    "data", [b"\0\0\0\1\0\0\0\0\xff", b"\xff" * 16, b"\0\0\0\2\0\0\0\0\x91\x09", b"\0\0\0\4\0\0\0\0\x94\x02\xc3\x01"]
)
async def test_bytes_that_are_no_message_end_the_stream_and_nothing_else(rig: Rig, data: bytes) -> None:
    stream = await stream_of(rig)
    await stream.send_all(data)
    framed = Framed(stream, FROM_DRAFTER)
    await framed.expect(Hello, deadline_s=5)
    with trio.fail_after(5):
        assert await stream.receive_some() == b""
    assert rig.service.state.phase is Phase.READY


async def test_sessions_and_tokens_of_a_stream_are_bounded(rig: Rig) -> None:
    stream = await stream_of(rig)
    framed, asking = Framed(stream, FROM_DRAFTER), Framed(stream, TO_DRAFTER)
    await framed.expect(Hello, deadline_s=5)
    for number in range(MAX_SESSIONS + 1):
        await asking.send(Ask(number, 0, 0, pack_tokens([1] * (300 if number < MAX_SESSIONS else 1)), 1))
    for number in range(MAX_SESSIONS):
        assert await framed.expect(NoDraft, deadline_s=5) == NoDraft(number, 0, "the context of 200 tokens is full")
    assert (await framed.expect(NoDraft, deadline_s=5)).reason == "64 sessions are open"


async def test_a_coordinator_that_does_not_read_is_dropped(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_desk, "MAX_OUTBOX", 2000)
    await rig.start()
    mine, theirs = trio.testing.lockstep_stream_pair()  # holds nothing: what is not read is not sent
    over = trio.Event()

    async def serve() -> None:
        await rig.service.streams["draft"](rig.home.node, theirs, rig.order())
        over.set()

    async def ask() -> None:
        for number in range(MAX_SESSIONS):  # each is refused, in some forty bytes
            await Framed(mine, TO_DRAFTER).send(Ask(number, 0, 0, b"", 1))

    rig.nursery.start_soon(serve)
    rig.nursery.start_soon(ask)
    with trio.fail_after(5):
        await over.wait()


async def test_only_the_current_coordinator_gets_a_stream_and_only_some(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await Rig(nursery, tmp_path).open(limits=DrafterLimits(max_streams=1))
    other = rig.mesh.add("other")

    async def ends(node: Any, epoch: Epoch) -> bool:
        stream = await node.open_stream(rig.node.node, "draft", {"epoch": list(epoch)})
        with trio.fail_after(5):
            return await stream.receive_some() == b""

    assert await ends(rig.home, rig.epoch)  # not started
    await rig.start()
    assert await ends(other, rig.epoch)
    assert await ends(rig.home, Epoch(2, rig.home.node))
    assert not await ends(rig.home, rig.epoch)
    assert await ends(rig.home, rig.epoch)


# The coordinator's side


async def fake_drafter(rig: Rig, *, hello: Hello, then: list[object]) -> None:
    """In place of the service: starts, says hello, then what it is told, with the first ask."""

    async def start(peer: Any, params: dict[str, Any]) -> dict[str, Any]:
        return {"n_vocab": hello.n_vocab, "context": hello.context, "slots": hello.slots}

    async def draft(peer: Any, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        framed = Framed(stream, FROM_DRAFTER)
        await framed.send(hello)
        await stream.receive_some()
        for message in then:
            await framed.send(message)
        await trio.sleep_forever()

    rig.node.methods["draft.start"] = start
    rig.node.streams["draft"] = draft


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(DRAFT, 1129, 200, 2), "its vocabulary has 1129 tokens, the target's 1000"),
        (Hello("b" * 64, 1000, 200, 2), "it drafts with the model bbbbbbbbbbbb"),
    ],
)
async def test_a_drafter_that_does_not_fit_is_refused_for_good(rig: Rig, hello: Hello, reason: str) -> None:
    await fake_drafter(rig, hello=hello, then=[])
    rig.drafting.set_drafters([rig.spec()])
    await until(lambda: rig.drafting.states()[0].phase == "refused")
    assert reason in rig.drafting.states()[0].reason
    await trio.sleep(0.2)
    assert rig.drafting.states()[0].phase == "refused"
    assert rig.drafting.ready() == ()


async def test_a_token_that_the_target_does_not_know_ends_the_draft(rig: Rig) -> None:
    await fake_drafter(
        rig, hello=Hello(DRAFT, 1100, 200, 2), then=[Drafted(1, 0, 0, pack_tokens([998, 999, 1000, 1]), 7)]
    )
    inbox = Inbox()
    (await rig.ready()).open(inbox).ask(0, 0, [1], 8)
    assert "token 1000, which the target does not know" in await inbox.refusal()
    assert inbox.tokens == [998, 999]


@pytest.mark.parametrize(
    "message",
    [
        Drafted(1, 0, 1, pack_tokens([1])),
        Drafted(1, 0, 0, pack_tokens([1, 2, 3])),
        Drafted(1, 0, 0, b""),
        Drafted(1, 0, 0, b"\1\2\3"),
        Hello(DRAFT, 1, 1, 1),
    ],
)
async def test_a_drafter_that_says_what_nobody_asked_for_is_lost(rig: Rig, message: object) -> None:
    await fake_drafter(rig, hello=Hello(DRAFT, 1000, 200, 2), then=[message])
    drafter, inbox = await rig.ready(), Inbox()
    drafter.open(inbox).ask(0, 0, [1], 2)
    await inbox.refusal()
    await until(lambda: not drafter.alive)


async def test_what_belongs_to_an_older_branch_is_not_delivered(rig: Rig) -> None:
    old, new = Drafted(1, 0, 0, pack_tokens([1])), Drafted(1, 1, 0, pack_tokens([2]))
    then = [old, NoDraft(1, 0, "x"), Drafted(9, 0, 0, b""), new, NoDraft(1, 1, "full"), NoDraft(1, 1, "again")]
    await fake_drafter(rig, hello=Hello(DRAFT, 1000, 200, 2), then=then)
    inbox = Inbox()
    session = (await rig.ready()).open(inbox)
    session.ask(0, 0, [1], 2)
    session.ask(1, 0, [1], 2)
    await inbox.refusal()
    await trio.sleep(0.02)
    assert inbox.events == [new, NoDraft(1, 1, "full")]


async def test_a_drafter_that_does_not_read_is_lost_and_asking_never_waits(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _theirs = trio.testing.lockstep_stream_pair()
    monkeypatch.setattr(draft_link, "MAX_OUTBOX", 3000)
    spec = rig.spec()
    link = draft_link.DraftLink(mine, Hello(DRAFT, 1000, 200, 2), 1000, lambda slots: spec_info(spec, slots))
    inbox = Inbox()
    rig.nursery.start_soon(link.run)
    session = link.open(inbox)
    session.ask(0, 0, [1], 1)
    await trio.testing.wait_all_tasks_blocked()
    for branch in range(1, 30):
        session.ask(branch, 0, [1] * 50, 1)
    assert "does not read" in await inbox.refusal()
    assert not link.alive


def spec_info(spec: DrafterSpec, slots: int) -> ports.DrafterInfo:
    return ports.DrafterInfo(spec.node, spec.name, spec.model, slots, 0.0)


async def test_a_send_that_goes_nowhere_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEND_S", 0.1)
    mine, _theirs = trio.testing.lockstep_stream_pair()
    box = outbox.Outbox(mine, TO_DRAFTER, 1 << 20)
    box.post(Ask(1, 0, 0, b"", 1))
    with trio.fail_after(5):
        assert await box.carry(FROM_DRAFTER, 1 << 16, lambda messages: None) == "nothing could be sent for 0.1 s"


async def test_more_sessions_than_a_stream_may_have_get_no_draft(rig: Rig) -> None:
    drafter = await rig.ready()
    for _ in range(MAX_SESSIONS):
        drafter.open(Inbox())
    inbox = Inbox()
    drafter.open(inbox).ask(0, 0, [1], 1)
    assert inbox.refusals == ["64 sessions are open"]


async def test_a_drafter_that_is_not_wanted_any_more_is_stopped(rig: Rig) -> None:
    drafter, inbox = await rig.ready(), Inbox()
    drafter.open(inbox).ask(0, 0, [1], 1)
    rig.drafting.set_drafters([])
    assert rig.drafting.ready() == ()
    assert rig.drafting.states() == ()
    await rig.until_phase(Phase.IDLE)
    assert not drafter.alive
    assert not children()


async def test_what_is_wanted_unchanged_goes_on_and_what_changed_begins_anew(rig: Rig) -> None:
    drafter = await rig.ready()
    rig.drafting.set_drafters([rig.spec(rtt_s=lambda: 0.5)])
    assert rig.drafting.ready() == (drafter,)
    assert drafter.info.rtt_s == 0.5
    pid = rig.service.state.pid
    rig.drafting.set_drafters([rig.spec(run=1)])
    await until(rig.drafting.ready)
    assert rig.drafting.ready() != (drafter,)
    assert rig.service.state.pid != pid


async def test_a_cut_link_is_tried_again_until_it_heals(rig: Rig) -> None:
    drafter, inbox = await rig.ready(), Inbox()
    drafter.open(inbox).ask(0, 0, [1], 90)
    await inbox.drafted(1)
    await rig.mesh.cut(rig.home.node, rig.node.node)
    await inbox.refusal()
    await until(lambda: rig.service.state.sessions == 0)
    await until(lambda: "no address" in rig.drafting.states()[0].reason)
    assert rig.drafting.states()[0].phase == "waiting"
    rig.mesh.heal(rig.home.node, rig.node.node)
    await until(rig.drafting.ready)


async def test_what_its_own_machine_has_given_up_is_left_alone_for_a_while(rig: Rig) -> None:
    rig.control(load="exit")
    rig.drafting.set_drafters([rig.spec()])
    await until(lambda: rig.drafting.states()[0].phase == "waiting")
    assert "3 times in a row" in rig.drafting.states()[0].reason
    await trio.sleep(0.5)
    assert rig.service.state.phase is Phase.FAILED
    rig.control()
    rig.drafting.set_drafters([rig.spec(run=1)])
    await until(rig.drafting.ready)


async def test_a_model_that_takes_long_to_load_is_not_ready_and_is_waited_for(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await Rig(nursery, tmp_path).open(limits=DrafterLimits(start_s=0.1, load_s=20))
    rig.control(load="hang")
    assert (await refused(rig, rig.order()))[0] == "not_ready"
    rig.drafting.set_drafters([rig.spec()])
    await until(lambda: "not ready yet" in rig.drafting.states()[0].reason)
    pid = children()[0].pid
    rig.control()
    await until(rig.drafting.ready)
    assert rig.service.state.pid == pid


async def test_a_model_that_arrives_later_is_drafted_with_then(rig: Rig) -> None:
    rig.drafting.set_drafters([rig.spec(model=ModelId("b" * 64))])
    await until(lambda: "is not on this machine" in rig.drafting.states()[0].reason)
    rig.drafting.set_drafters([rig.spec()])
    await until(rig.drafting.ready)


async def test_cancelling_leaves_nothing_behind(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        rig = await Rig(nursery, tmp_path).open()
        inbox = Inbox()
        rig.control(delay_s=0.02)
        (await rig.ready()).open(inbox).ask(0, 0, [1], 90)
        await inbox.drafted(2)
        nursery.cancel_scope.cancel()
    assert not children()
    assert inbox.refusals
