"""Parts of a file by range requests, from servers that behave, change their mind, stall, redirect and lie."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import swarm_kit as kit
import trio
from swarm_together import FileHost
from web_host import Asked, WebHost, head, status

from tightwad_agent.errors import OriginError
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm import web_source
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.origin import Origins
from tightwad_agent.swarm.store import Store
from tightwad_agent.swarm.web_source import MAX_FAILED_READS, WebSource
from tightwad_agent.web import Patience

DATA = kit.llama(4, tensor_kb=256)
SHA = hashlib.sha256(DATA).digest()
HASTY = Patience(connect_s=5, read_s=5, n_tries=3, backoff_s=0.001)
SECRET = "hf_verysecret"


def manifest(url: str, data: bytes = DATA) -> Manifest:
    sha = hashlib.sha256(data).digest()
    return Manifest(SafeName("m.gguf"), len(data), sha, (Piece(0, len(data), sha),), origin=url)


def opened(url: str, *, on_hub: bool = False, patience: Patience = HASTY) -> AbstractAsyncContextManager[WebSource]:
    return web_source.opened(manifest(url), {}, on_hub=on_hub, patience=patience)


@pytest.fixture
async def host(nursery: trio.Nursery) -> FileHost:
    return await FileHost(DATA).start(nursery)


@pytest.fixture
async def odd(nursery: trio.Nursery) -> WebHost:
    return await WebHost().start(nursery)


async def refused(source: WebSource, words: str, *, given_up: bool = True) -> None:
    with pytest.raises(OriginError, match=words):
        await source.read(100, 50)
    assert bool(source.given_up) is given_up


async def test_exactly_the_bytes_that_were_asked(host: FileHost) -> None:
    async with opened(f"{host.url}/m.gguf") as source:
        assert source.name == "127.0.0.1"
        assert await source.read(0, 1) == DATA[:1]
        got: dict[int, bytes] = {}

        async def read(at: int) -> None:
            got[at] = await source.read(at, 70_000)

        async with trio.open_nursery() as readers:
            for at in (5, 100_000, 300_000):
                readers.start_soon(read, at)
        assert all(data == DATA[at : at + 70_000] for at, data in got.items())
        assert await source.read(len(DATA) - 7, 7) == DATA[-7:]
        assert host.sent == 1 + 3 * 70_000 + 7
        for at, n in ((-1, 5), (0, 0), (len(DATA) - 1, 2), (0, web_source.MAX_PIECE_BYTES + 1)):
            with pytest.raises(OriginError, match="no part of"):
                await source.read(at, n)
        assert not source.given_up


async def test_of_several_files_each_is_asked_at_its_own_address_and_given_up_by_itself(
    host: FileHost, tmp_path: Path
) -> None:
    files = kit.shards()
    store = Store(tmp_path)
    store.open()
    landed = [tmp_path / f"landed-{i}" for i in (1, 2, 3)]
    for path, data in zip(landed, files, strict=True):
        path.write_bytes(data)
    made = store.manifest(store.adopt_all(landed, "m.gguf").root)
    assert made is not None
    several = replace(made, origin=f"{host.url}/x/m-00001-of-00003.gguf")
    host.more = {f"/x/m-{i:05d}-of-00003.gguf": data for i, data in enumerate(files, 1)}
    host.more["/x/m-00002-of-00003.gguf"] = files[1][:-1]
    async with web_source.opened(several, {}, patience=HASTY) as source:
        for index, piece in enumerate(several.pieces):
            file, at = several.place(index)
            if file == 1:
                with pytest.raises(OriginError, match="bytes by now"):
                    await source.read(piece.offset, piece.length)
            else:
                assert await source.read(piece.offset, piece.length) == files[file][at : at + piece.length]
        assert "bytes by now" in source.given_up
        with pytest.raises(OriginError, match="no part of"):
            await source.read(len(files[0]) - 1, 2)
    host.more["/x/m-00003-of-00003.gguf"] = bytes(len(files[2]))
    async with web_source.opened(several, {}, patience=HASTY) as source:
        last = several.pieces[-1]
        with pytest.raises(OriginError, match="other bytes than were added"):
            await source.read(last.offset, last.length)


async def test_a_server_without_ranges_is_given_up_without_reading_its_body(nursery: trio.Nursery) -> None:
    host = await FileHost(DATA, ranges=False).start(nursery)
    async with opened(f"{host.url}/m.gguf") as source:
        await refused(source, "no range requests")
        await refused(source, "asked no more: .*no range requests")
        assert len(host.asked) == 1


async def test_a_file_of_another_length_is_given_up(host: FileHost) -> None:
    host.data = DATA + b"x"
    async with opened(f"{host.url}/m.gguf") as source:
        await refused(source, f"has {len(DATA) + 1} bytes by now, not {len(DATA)}")


async def test_a_file_that_changes_while_it_is_read_is_given_up(host: FileHost) -> None:
    async with opened(f"{host.url}/m.gguf") as source:
        await source.read(0, 10)
        host.tag = '"two"'
        await refused(source, "changed while it was read")


async def test_the_hub_says_that_it_is_another_file(host: FileHost) -> None:
    host.tag = f'"{"0" * 64}"'
    async with opened(f"{host.url}/m.gguf", on_hub=True) as source:
        await refused(source, f"its SHA-256 is {'0' * 64}, not {SHA.hex()}")
    async with opened(f"{host.url}/m.gguf") as source:
        assert await source.read(0, 10) == DATA[:10], "elsewhere an entity tag means nothing"
    host.tag = f'"{SHA.hex()}"'
    async with opened(f"{host.url}/m.gguf", on_hub=True) as source:
        assert await source.read(0, 10) == DATA[:10]


async def test_a_server_with_other_bytes_is_given_up_after_two_pieces(host: FileHost) -> None:
    pieces = tuple(Piece(at, 1000, hashlib.sha256(DATA[at : at + 1000]).digest()) for at in range(0, 10_000, 1000))
    one = Manifest(SafeName("m.gguf"), 10_000, SHA, pieces, origin=f"{host.url}/m.gguf")
    host.data = DATA[:2500] + bytes([DATA[2500] ^ 1]) + DATA[2501:9500] + b"?" * 500
    async with web_source.opened(one, {}, patience=HASTY) as source:
        assert await source.read(0, 1000) == DATA[:1000]
        for at in (2000, 9000):
            assert not source.given_up
            with pytest.raises(OriginError, match="other bytes than were added"):
                await source.read(at, 1000)
        assert source.given_up
        n_asked = len(host.asked)
        with pytest.raises(OriginError, match="asked no more: it has other bytes"):
            await source.read(1000, 1000)
        assert len(host.asked) == n_asked


def partial(first: int, last: int, body: bytes, total: int = len(DATA)) -> bytes:
    return head(206, Content_Range=f"bytes {first}-{last}/{total}", Content_Length=len(body)) + body


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (partial(0, 49, bytes(50)), "other bytes than asked"),
        (partial(100, 199, bytes(100)), "more came than the 50 bytes"),
        (head(416, Content_Range=f"bytes */{len(DATA)}", Content_Length=0), "other bytes than asked"),
        (head(416, Content_Range="bytes */7", Content_Length=0), "has 7 bytes by now"),
        (head(404, Content_Length=0), "HTTP 404"),
        (head(403, Content_Length=0), "HTTP 403"),
    ],
)
async def test_answers_that_are_none_end_it(odd: WebHost, answer: bytes, words: str) -> None:
    async def say(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(answer)

    odd.routes["/m.gguf"] = say
    async with opened(f"{odd.url}/m.gguf") as source:
        await refused(source, words)
        assert len(odd.asked) == 1


async def test_a_passing_fault_is_tried_again_and_a_lasting_one_ends_it(odd: WebHost) -> None:
    answers = [head(503, Content_Length=0), partial(100, 149, bytes(20)), partial(100, 149, DATA[100:150])]

    async def say(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(answers.pop(0) if answers else head(503, Content_Length=0))

    odd.routes["/m.gguf"] = say
    async with opened(f"{odd.url}/m.gguf") as source:
        assert await source.read(100, 50) == DATA[100:150]
        for n in range(MAX_FAILED_READS):
            await refused(source, "HTTP 503", given_up=n == MAX_FAILED_READS - 1)
        n_asked = len(odd.asked)
        await refused(source, "asked no more: HTTP 503")
        assert len(odd.asked) == n_asked


async def test_a_server_that_stalls_meets_the_deadline(odd: WebHost) -> None:
    async def silent(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(partial(100, 149, b"")[:-2] + b"\r\n")
        await trio.sleep_forever()

    async def begins(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(206, Content_Range=f"bytes 100-149/{len(DATA)}", Content_Length=50) + bytes(10))
        await trio.sleep_forever()

    hasty = Patience(connect_s=5, read_s=0.2, n_tries=2, backoff_s=0.001)
    for answer, words in ((silent, "ended after 0"), (begins, "did not answer in time")):
        odd.routes["/m.gguf"] = answer
        async with opened(f"{odd.url}/m.gguf", patience=hasty) as source:
            with trio.fail_after(60):
                await refused(source, words, given_up=False)


async def test_a_server_that_drips_meets_the_window_and_a_read_can_be_cancelled(odd: WebHost) -> None:
    begun = trio.Event()

    async def drips(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(206, Content_Range=f"bytes 100-149/{len(DATA)}", Content_Length=50))
        begun.set()
        while True:
            await stream.send_all(b"x")
            await trio.sleep(0.05)

    odd.routes["/m.gguf"] = drips
    hasty = Patience(connect_s=5, read_s=5, window_s=0.2, window_bytes=1000, n_tries=1)
    async with opened(f"{odd.url}/m.gguf", patience=hasty) as source:
        await refused(source, "too slowly", given_up=False)
        begun = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.read, 100, 50)
            await begun.wait()
            nursery.cancel_scope.cancel()


# The hub


async def test_the_token_is_for_the_hub_alone_also_after_a_redirect(
    odd: WebHost, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cdn = await WebHost().start(nursery)

    async def part(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(partial(0, 9, DATA[:10]))

    path = "/org/repo/resolve/main/m.gguf"
    cdn.routes["/cdn"] = part
    cdn.routes[path] = part
    odd.routes[path] = status(302, Location=f"{cdn.url.replace('127.0.0.1', 'localhost')}/cdn")
    origins = Origins(odd.url, SECRET)
    async with origins.outside(manifest(odd.url + path)) as source:
        assert source is not None
        assert await source.read(0, 10) == DATA[:10]
    assert odd.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    assert "authorization" not in cdn.asked[0].headers
    async with origins.outside(manifest(cdn.url + path)) as source:
        assert source is not None
        assert await source.read(0, 10) == DATA[:10]
    assert "authorization" not in cdn.asked[1].headers, "another host, though the path looks like the hub's"
    async with origins.outside(manifest("")) as source:
        assert source is None
    assert SECRET not in caplog.text
    assert SECRET not in repr(origins)
    assert origins.headers_for(f"{odd.url}/api/whoami") == {}
    store = Store(tmp_path / "m")
    store.downloads.mkdir(parents=True)
    cdn.routes["/cdn"] = status(404)
    with pytest.raises(OriginError) as caught:
        await origins.fetch(store, origins.parse("hf:org/repo/m.gguf"), lambda *_: None)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    assert "authorization" not in cdn.asked[-1].headers


async def fetch_from_hub(odd: WebHost, cdn: WebHost, tmp_path: Path, linked: str, etag: str) -> bytes:
    async def whole(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=len(DATA), ETag=etag) + DATA)

    cdn.routes["/cdn"] = whole
    odd.routes["/org/repo/resolve/main/m.gguf"] = status(302, Location=f"{cdn.url}/cdn", X_Linked_ETag=linked)
    origins, store = Origins(odd.url), Store(tmp_path / "m")
    landed = await origins.fetch(store, origins.parse("hf:org/repo/m.gguf"), lambda *_: None)  # type: ignore[arg-type]
    return landed.paths[0].read_bytes()


@pytest.mark.parametrize(
    ("linked", "etag"),
    [
        (f'"{SHA.hex()}"', '"of the cdn"'),
        (f'"{SHA.hex().upper()}"', f'"{"1" * 64}"'),
        ("", f'"{SHA.hex()}"'),
        (f'W/"{SHA.hex()}"', '"x"'),
        ('"' + "a" * 40 + '"', '"x"'),
        ("", '"x"'),
    ],
)
async def test_what_the_hub_says_of_the_hash_is_true(
    odd: WebHost, nursery: trio.Nursery, tmp_path: Path, linked: str, etag: str
) -> None:
    cdn = await WebHost().start(nursery)
    assert await fetch_from_hub(odd, cdn, tmp_path, linked, etag) == DATA


@pytest.mark.parametrize(("linked", "etag"), [(f'"{"0" * 64}"', '"x"'), ("", f'"{"0" * 64}"')])
async def test_a_file_that_is_not_what_the_hub_says_is_refused_by_both_hashes(
    odd: WebHost, nursery: trio.Nursery, tmp_path: Path, linked: str, etag: str
) -> None:
    cdn = await WebHost().start(nursery)
    with pytest.raises(OriginError, match=f"its SHA-256 is {SHA.hex()}, expected {'0' * 64}"):
        await fetch_from_hub(odd, cdn, tmp_path, linked, etag)
    assert not [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
