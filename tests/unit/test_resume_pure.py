"""What is kept of an answer so that it can go on elsewhere: journal entries, the book, answers told again, seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import NotReady, ProtocolError
from tightwad_agent.proxy import book as book_module
from tightwad_agent.proxy import retelling as retelling_module
from tightwad_agent.proxy.book import WORTH, Book
from tightwad_agent.proxy.ports import Chunk, Token
from tightwad_agent.proxy.retelling import AnswerChanged, Retelling
from tightwad_agent.proxy.seeding import with_seed
from tightwad_agent.proxy.transcript import Transcript
from tightwad_agent.wire.journal import (
    JOURNAL,
    MAX_PAYLOAD,
    Aside,
    Began,
    Broke,
    Choice,
    Ended,
    JournalDecoder,
    Resume,
    Said,
    Whole,
    entry,
    split_resume,
    with_resume,
)
from tightwad_agent.wire.verify import Ended as Why
from tightwad_agent.wire.verify import pack_tokens, unpack_tokens

VECTORS = Path(__file__).parent.parent / "vectors"
BEGAN = Began("chatcmpl-1", 1_700_000_000, 3600, 42, "demo", "tightwad-1", b"digest")
OTHER = Began("chatcmpl-2", 1_800_000_000, 0, 43, "demo", "tightwad-2", b"digest")


def said(*ids: int, index: int = 0, text: str = "", **more: object) -> Said:
    return Said(index, pack_tokens(ids), text, **more)  # type: ignore[arg-type]


class TestJournal:
    ENTRIES = (
        (BEGAN, b""),
        (said(1, 2, text="Hé", n_cached=3), b"data: 1\n\n"),
        (Aside(), b":\n\n"),
        (said(index=1, over=True, n_answer=9), b""),
        (Whole(), b"{}"),
        (Ended(), b"data: [DONE]\n\n"),
        (Broke("peer_gone", "gone", "wait", 502, lost=True), b""),
    )

    @given(st.lists(st.integers(0, 400), max_size=6))
    def test_in_any_cut(self, cuts):
        data = b"".join(entry(message, payload) for message, payload in self.ENTRIES)
        decoder, found, at = JournalDecoder(), [], 0
        for cut in [*sorted(cut for cut in cuts if cut < len(data)), len(data)]:
            found += decoder.feed(data[at:cut])
            at = cut
        assert found == [*self.ENTRIES]

    def test_what_is_no_entry(self):
        for data in (b"\xff" * 8, entry(Aside())[:-1] + b"\xc1", b"\0\0\0\1\xff\xff\xff\xff\x90"):
            with pytest.raises(ProtocolError):
                JournalDecoder().feed(data)
        with pytest.raises(ProtocolError):
            JournalDecoder().feed((1).to_bytes(4, "big") + (MAX_PAYLOAD + 1).to_bytes(4, "big"))

    def test_golden_bytes(self):
        """What nodes of this version send; append to it, never change it."""
        known = json.loads((VECTORS / "journal.json").read_text())
        assert [bytes.fromhex(one) for one in known["entries"]] == [entry(*one) for one in self.ENTRIES]
        resume = Resume(BEGAN, (Choice(0, pack_tokens([1, 2]), 3), Choice(1, b"", 0, True, 7)), opened=True)
        assert bytes.fromhex(known["resume"]) == with_resume(resume, b"")[1]

    def test_an_older_node_s_entry_is_understood(self):
        """Fields that it does not know have defaults."""
        import msgpack

        assert JOURNAL.decode(msgpack.packb([2, 0, pack_tokens([5])])) == said(5)

    def test_a_beginning_before_a_body(self):
        resume = Resume(BEGAN, (Choice(0, pack_tokens([1, 2]), 3), Choice(1, b"", 0, True, 7)), opened=True)
        n, body = with_resume(resume, b'{"a": 1}')
        assert split_resume(n, body) == (resume, b'{"a": 1}')

    @pytest.mark.parametrize("n", [0, -1, 10**9, 3])
    def test_a_beginning_that_is_none(self, n):
        _, body = with_resume(Resume(BEGAN, ()), b"{}")
        with pytest.raises(ProtocolError):
            split_resume(n, body)


class TestBook:
    def test_nothing_to_go_on_from(self):
        book = Book()
        assert book.resume() is None
        book.begin(BEGAN)
        assert book.resume() is None
        assert book.texts() == {}

    def test_all_that_was_said_once(self):
        book = Book()
        book.begin(BEGAN)
        book.add(said(1, 2, text="ab", n_cached=5), sent=False)
        assert not book.opened
        book.add(said(3, text="c", n_cached=7), sent=True)
        book.add(said(9, index=1, text="x", over=True, n_answer=4), sent=True)
        book.begin(OTHER)  # who goes on does so under the first one's name
        assert book.resume() == Resume(
            BEGAN,
            (Choice(0, pack_tokens([1, 2, 3]), 5), Choice(1, pack_tokens([9]), 0, True, 4)),
            opened=True,
        )
        assert (book.texts(), book.finished(), book.began) == ({0: "abc", 1: "x"}, {1}, BEGAN)

    def test_made_anew(self):
        book = Book()
        book.begin(BEGAN)
        book.add(said(1), sent=True)
        book.restart()
        assert book.resume() is None
        book.begin(OTHER)
        book.add(said(2), sent=True)
        assert book.resume() == Resume(OTHER, (Choice(0, pack_tokens([2])),), opened=True)

    def test_progress_is_more_than_a_little_behind_the_last_loss(self):
        book = Book()
        book.begin(BEGAN)
        assert not book.progressed()
        book.add(said(*range(WORTH)), sent=True)
        assert book.progressed()
        assert not book.progressed()
        book.add(said(*range(WORTH - 1)), sent=True)
        assert not book.progressed()
        book.restart()
        book.add(said(*range(2 * WORTH)), sent=True)
        assert not book.progressed(), "the same again is no progress"

    def test_no_room(self, monkeypatch):
        def none_left(_n: int) -> None:
            raise NotReady("no room")

        for book, most in ((Book(none_left), 100), (Book(), 10)):
            monkeypatch.setattr(book_module, "MAX_BYTES", most)
            book.begin(BEGAN)
            book.add(said(1, 2, 3, text="abc"), sent=True)
            book.add(said(4), sent=True)
            assert book.is_full
            assert book.resume() is None
            assert book.n_tokens == 4


SAYS = "Grüße 😀 STO and ST".encode() + b"\xf0\x9f" + b" STOP"
ROUNDS = (3, 1, 2, 5)


def answering(resume: Resume | None) -> bytes:
    """The journal of a node that answers, or goes on: a stop string and half characters are held back."""
    known = {c.index: unpack_tokens(c.tokens) for c in resume.choices} if resume else {}
    begun = known.get(0, [])
    chunks, at = [Chunk(tuple(Token(t, bytes([t])) for t in begun))] if begun else [], len(begun)
    sizes = [ROUNDS[i % 4] for i in range(len(SAYS))]
    ends = [sum(sizes[: i + 1]) for i in range(len(SAYS))]
    for end in (end for end in ends if end > at):
        ids = SAYS[at:end]
        chunks.append(Chunk(tuple(Token(t, bytes([t])) for t in ids), Why.LENGTH if end >= len(SAYS) else Why.NOT))
        at = end
        if end >= len(SAYS):
            break
    transcript, made = Transcript(["STOP", "nope"]), entry(BEGAN if resume is None else resume.began)
    for chunk in chunks:
        part = transcript.feed(chunk)
        if begun and chunk is chunks[0]:
            continue
        made += entry(said(*part.ids, text=part.text, over=bool(part.finish)), part.text.encode())
        if part.finish:
            break
    return made + entry(Ended(), b"|end %d" % transcript.n_tokens)


class Client:
    """A node with a client: what it shows, and what it asks for next."""

    def __init__(self) -> None:
        self.book, self.shown, self.done = Book(), b"", False

    def hear(self, data: bytes) -> None:
        for message, payload in JournalDecoder().feed(data):
            if isinstance(message, Began):
                self.book.begin(message)
            elif isinstance(message, Said):
                self.book.add(message, sent=bool(payload))
            self.shown += payload
            self.done = isinstance(message, Ended)


class TestGoingOn:
    def test_cut_after_every_byte(self):
        whole = answering(None)
        expected = Client()
        expected.hear(whole)
        n_tokens = SAYS.index(b"STOP") + len(b"STOP")
        assert expected.shown == f"Grüße 😀 STO and ST\ufffd |end {n_tokens}".encode()
        for cut in range(len(whole)):
            client = Client()
            client.hear(whole[:cut])
            assert not client.done
            client.hear(answering(client.book.resume()))
            assert (client.shown, client.done) == (expected.shown, True), cut

    @given(st.lists(st.floats(0, 1), max_size=6))
    def test_cut_again_and_again(self, shares):
        expected, client = Client(), Client()
        expected.hear(answering(None))
        for share in shares:
            data = answering(client.book.resume())
            client.hear(data[: int(share * (len(data) - 1))])
        client.hear(answering(client.book.resume()))
        assert client.shown == expected.shown

    def test_an_id_that_is_dropped_shows(self):
        """The control."""
        whole, expected, wrong = answering(None), Client(), 0
        expected.hear(whole)
        for cut in range(0, len(whole), 50):
            client = Client()
            client.hear(whole[:cut])
            if (resume := client.book.resume()) is None:
                continue
            [choice] = resume.choices
            client.hear(answering(Resume(resume.began, (Choice(0, choice.tokens[:-4]),), resume.opened)))
            wrong += client.shown != expected.shown
        assert wrong


def chat(text: str | None = None, *, index: int = 0, **more: object) -> bytes:
    delta = {} if text is None else {"content": text}
    delta |= more.pop("delta", {})  # type: ignore[arg-type, operator]
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return event({"id": "chatcmpl-1", "created": 5, "choices": [choice]})


def event(plain: object) -> bytes:
    return b"data: " + json.dumps(plain, separators=(",", ":")).encode() + b"\n\n"


def renamed(events: list[bytes]) -> list[bytes]:
    """As another server says the same."""
    return [e.replace(b"chatcmpl-1", b"chatcmpl-2").replace(b'"created":5', b'"created":6') for e in events]


DONE = b"data: [DONE]\n\n"
ROLE = chat(delta={"role": "assistant", "content": None})
END = chat(finish_reason="stop", timings={"n": 1})
USAGE = event({"id": "chatcmpl-1", "created": 5, "choices": [], "usage": {"total_tokens": 7}})
CALL = {"index": 0, "id": "one", "type": "function", "function": {"name": "f", "arguments": ""}}
TOOL = [
    chat(delta={"tool_calls": [CALL]}),
    chat(delta={"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
    chat(delta={"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
]
TOOL_AGAIN = [chat(delta={"tool_calls": [{**CALL, "id": "two"}]}), *TOOL[1:]]
TEXT = [ROLE, chat(delta={"reasoning_content": "Hm."}), chat("Hel"), chat("lo, "), chat("wörld"), END, USAGE, DONE]


def told(events: list[bytes]) -> tuple[dict[object, str], list[object]]:
    """The texts of a stream by choice and path, and the rest of it."""
    texts: dict[object, str] = {}
    rest: list[object] = []
    for data in events:
        body = data.removeprefix(b"data: ").strip()
        if body == b"[DONE]":
            rest.append("done")
            continue
        plain = json.loads(body)
        assert (plain["id"], plain["created"]) == ("chatcmpl-1", 5)
        for choice in plain["choices"]:
            for path, holder, name in retelling_module._texts(choice):
                key = (choice["index"], path)
                texts[key] = texts.get(key, "") + holder[name]
            if choice["finish_reason"]:
                rest.append((choice["index"], choice["finish_reason"]))
        if not plain["choices"]:
            rest.append("usage")
    return texts, rest


def parts(data: bytes) -> list[bytes]:
    return [part + b"\n\n" for part in data.split(b"\n\n") if part]


class TestRetelling:
    @pytest.mark.parametrize("events", [TEXT, [ROLE, *TOOL, END, DONE]])
    def test_undisturbed_it_changes_nothing(self, events):
        retelling = Retelling()
        assert retelling.empty
        retelling.again()  # nothing was told: the first telling is the first
        assert [retelling.pass_on(e) for e in events] == events
        assert retelling.done

    @given(st.lists(st.integers(1, len(TEXT)), min_size=1, max_size=4), st.data())
    def test_told_again_after_any_event(self, cuts, data):
        retelling, out = Retelling(), b""
        for cut in cuts:
            if retelling.done:
                break
            for one in self._split(data, TEXT, cut):
                out += retelling.pass_on(one)
            retelling.again()
        if not retelling.done:
            out += b"".join(retelling.pass_on(one) for one in renamed(self._split(data, TEXT, len(TEXT))))
        assert told(parts(out)) == told(TEXT)

    @staticmethod
    def _split(data, events, n):
        """The same text in other pieces."""
        made = []
        for one in events[:n]:
            plain = json.loads(one[6:]) if one != DONE else {}
            text = plain["choices"][0]["delta"].get("content") if plain.get("choices") else None
            if not text:
                made.append(one)
                continue
            at = data.draw(st.integers(0, len(text)))
            made += [chat(part) for part in (text[:at], text[at:])]
        return made

    def test_tools_have_other_ids_each_time(self):
        whole = [ROLE, *TOOL, END, DONE]
        for cut in range(1, len(whole)):
            retelling = Retelling()
            out = b"".join(map(retelling.pass_on, whole[:cut]))
            retelling.again()
            out += b"".join(map(retelling.pass_on, renamed([ROLE, *TOOL_AGAIN, END, DONE])))
            texts, rest = told(parts(out))
            ids = [text for key, text in texts.items() if key[1][-1] == "id"]
            assert ids in (["one"], ["two"])
            assert (0, ("delta", "tool_calls", 0, "function", "arguments")) in texts
            assert texts[0, ("delta", "tool_calls", 0, "function", "arguments")] == '{"a":1}'
            assert rest == [(0, "stop"), "done"]

    @pytest.mark.parametrize(
        "again",
        [
            [chat("Help")],
            [chat("He"), chat("y")],
            [chat("Hel"), END],
            [chat("Hel"), DONE],
        ],
    )
    def test_something_else_is_said(self, again):
        retelling = Retelling()
        assert retelling.pass_on(chat("Hel") + chat("lo"))
        retelling.again()
        with pytest.raises(AnswerChanged, match="took over"):
            retelling.pass_on(b"".join(again))

    def test_a_choice_that_is_complete_is_left_out(self):
        retelling = Retelling()
        retelling.pass_on(chat("a") + END + chat("b", index=1))
        retelling.again()
        both = event(
            {
                "id": "x",
                "choices": [{"index": i, "delta": {"content": t}, "finish_reason": None} for i, t in enumerate("zb")],
            }
        )
        assert retelling.pass_on(chat("other") + END + both) == b""
        left = json.loads(retelling.pass_on(chat("c", index=1))[6:])
        assert [c["delta"]["content"] for c in left["choices"]] == ["c"]

    def test_probabilities_of_a_part_are_left_out(self):
        retelling = Retelling()
        retelling.pass_on(chat("ab"))
        retelling.again()
        left = json.loads(retelling.pass_on(chat("abc", logprobs={"content": [1]}))[6:])
        assert left["choices"][0]["logprobs"] is None
        assert left["choices"][0]["delta"]["content"] == "c"

    def test_completions(self):
        def one(text):
            return event({"id": "a", "created": 1, "choices": [{"text": text, "index": 0, "finish_reason": None}]})

        retelling = Retelling()
        retelling.pass_on(one("ab"))
        retelling.again()
        assert retelling.pass_on(one("a")) == b""
        assert retelling.pass_on(one("bc")) == one("c")

    def test_events_without_choices_are_compared_one_by_one(self):
        events = [event({"type": "delta", "delta": t, "item_id": "1"}) for t in "abc"] + [b"data: no JSON\n\n"]
        again = [e.replace(b'"1"', b'"2"') for e in events]
        for cut in range(1, len(events)):
            retelling = Retelling()
            out = [retelling.pass_on(e) for e in events[:cut]]
            retelling.again()
            out += [retelling.pass_on(e) for e in again]
            assert [e for e in out if e] == [*events[:cut], *again[cut:]]
        retelling = Retelling()
        retelling.pass_on(events[0])
        retelling.again()
        with pytest.raises(AnswerChanged):
            retelling.pass_on(events[1])

    def test_comments(self):
        retelling = Retelling()
        assert retelling.pass_on(b": hello\n\n") == b": hello\n\n"
        retelling.pass_on(chat("a"))
        retelling.again()
        assert retelling.pass_on(b": hello\n\n") == b""
        retelling.pass_on(chat("a"))
        assert retelling.pass_on(b": hello\n\n") == b": hello\n\n"

    def test_what_a_verifier_began(self):
        retelling = Retelling()
        retelling.knows({0: "Hel", 1: "x"}, {1}, {"id": "chatcmpl-1", "created": 5}, chat=True)
        assert not retelling.empty
        retelling.again()
        out = [retelling.pass_on(e) for e in renamed([ROLE, chat("Hell"), chat("o"), chat("y", index=1), END, DONE])]
        assert told([e for e in out if e]) == ({(0, ("delta", "content")): "lo"}, [(0, "stop"), "done"])
        completions = Retelling()
        completions.knows({0: "a"}, set(), {}, chat=False)
        completions.again()
        choice = {"text": "ab", "index": "odd", "finish_reason": None}
        assert json.loads(completions.pass_on(event({"choices": [choice]}))[6:])["choices"][0]["text"] == "b"

    def test_no_room(self, monkeypatch):
        monkeypatch.setattr(retelling_module, "MAX_BYTES", 5)
        for data in (chat("abcdef"), event({"n": 1})):
            retelling = Retelling()
            assert retelling.pass_on(data) == data
            assert retelling.is_full
        assert Retelling().n_chars == 0

    def test_deep_nesting_is_not_followed(self):
        deep: object = "x"
        for _ in range(50):
            deep = {"a": deep}
        lists: object = "x"
        for _ in range(50):
            lists = [lists]
        retelling = Retelling()
        for one in (chat(delta={"deep": deep, "list": [1, {"b": "c"}]}), event({"deep": deep, "lists": lists})):
            assert retelling.pass_on(one) == one
        assert retelling.pass_on(b"data: " + b"[" * 100_000 + b"\n\n")

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data):
        retelling = Retelling()
        assert retelling.pass_on(data) == data

    def test_n_chars(self):
        retelling = Retelling()
        retelling.pass_on(chat("abc"))
        retelling.again()
        retelling.pass_on(chat("abcde"))
        assert retelling.n_chars == 5


class TestSeeds:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b'{"stream": false}',
            b'{"stream": true, "seed": 5}',
            b'{"stream": true, "seed": 0}',
            b'["stream"]',
            b'{"stream": tru}',
            b'{"stream": true}' + b" " * (1 << 20),
            b'{"stream":' + b"[" * 100_000,
        ],
    )
    def test_left_as_it_is(self, body):
        assert with_seed("/v1/chat/completions", body, 7) == body

    @pytest.mark.parametrize("extra", [b"", b', "seed": null', b', "seed": -1', b', "seed": null, "a": {}'])
    def test_drawn_here(self, extra):
        body = b'{"stream": true%s} \n' % extra
        assert json.loads(with_seed("/v1/completions", body, 7))["seed"] == 7
        assert with_seed("/v1/embeddings", body, 7) == body
