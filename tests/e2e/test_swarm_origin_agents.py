"""Real agents on loopback that add one web address at the same time, in ordinary processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import swarm_kit as kit
from lab import Agent, Lab, LabError

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

DATA = kit.llama(60, tensor_kb=512)  # 30 MB
ADD_S = 180.0


class Origin:
    """A web server with one file and range requests; counts what it sends."""

    def __init__(self) -> None:
        self.sent = 0
        self.present = True
        self.pause_s = 0.0
        """Before each 64 KiB."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not outer.present:
                    self.send_error(404)
                    return
                low, _, high = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
                start, end = int(low), int(high) + 1 if high else len(DATA)
                self.send_response(206)
                self.send_header("ETag", '"one"')
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}")
                self.send_header("Content-Length", str(end - start))
                self.end_headers()
                for at in range(start, end, 1 << 16):
                    chunk = DATA[at : min(at + (1 << 16), end)]
                    outer.sent += len(chunk)
                    time.sleep(outer.pause_s)
                    try:
                        self.wfile.write(chunk)
                    except OSError:
                        return  # its reader is gone

            def log_message(self, *_args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/web.gguf"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def origin() -> Iterator[Origin]:
    made = Origin()
    yield made
    made.close()


@pytest.fixture
def lab(engine_dir: Path) -> Iterator[Lab]:
    with Lab(3, namespaces=False, flags=("--engine-dir", str(engine_dir), "--threads", "1")) as made:
        made.start()
        yield made


def test_three_agents_add_one_address_and_it_is_sent_once(lab: Lab, origin: Origin) -> None:
    lab.agents[0].cli("stop")  # nothing is served, so nothing but `add` brings files
    with ThreadPoolExecutor(3) as pool:
        added = list(pool.map(lambda agent: agent.cli("add", origin.url, timeout_s=ADD_S), lab.agents))
    assert len({model["id"] for model in added}) == 1
    assert origin.sent <= 1.05 * len(DATA)
    for agent in lab.agents:
        (path,) = (agent.state_dir.parent).glob(f"{agent.name}/**/web.gguf")
        assert path.read_bytes() == DATA
    assert all("127.0.0.1" not in str(agent.cli("models")) for agent in lab.agents), "the address stays where it is"
    origin.present = False
    with pytest.raises(LabError, match="404"):
        lab.agents[0].cli("add", origin.url + "x", timeout_s=ADD_S)
    assert lab.agents[0].cli("add", origin.url, timeout_s=ADD_S)["id"] == added[0]["id"], "it is here, if not there"


def test_the_agent_that_downloads_is_killed_and_another_finishes(lab: Lab, origin: Origin) -> None:
    lab.agents[0].cli("stop")
    origin.pause_s = 0.01
    with ThreadPoolExecutor(3) as pool:
        adds = {a.name: pool.submit(a.cli, "add", origin.url, timeout_s=ADD_S) for a in lab.agents}

        def half() -> Agent | None:
            parts = {a.name: list(a.state_dir.parent.glob(f"{a.name}/**/downloads/*/file.part")) for a in lab.agents}
            return next((a for a in lab.agents if any(p.stat().st_size > len(DATA) // 2 for p in parts[a.name])), None)

        owner: Agent = lab.agents[0].wait(half, "for half of the file", ADD_S)
        owner.kill()
        at_death, origin.pause_s = origin.sent, 0.0
        rest = [a for a in lab.agents if a is not owner]
        got = [adds[a.name].result(ADD_S) for a in rest]
        assert adds[owner.name].exception(ADD_S) is not None
    assert len({model["id"] for model in got}) == 1
    on_way = 8 << 20
    assert origin.sent <= at_death + on_way + 1.05 * len(DATA)
    for agent in rest:
        (path,) = (agent.state_dir.parent).glob(f"{agent.name}/**/web.gguf")
        assert path.read_bytes() == DATA
