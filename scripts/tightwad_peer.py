"""The same question to Tightwad 0.5.4 from PyPI: its proxy, in an environment of its own, over llama-server as target
and as draft. It answers texts, not token ids, and counts words: so both are asked over HTTP and timed by the wall.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import trio
from rig import ANSWER_S, START_S, LlamaServer, Rig, RigError

from tightwad_agent.engine.argv import draft_argv
from tightwad_agent.engine.process import free_port

REQUIREMENT = "tightwad==0.5.4"
INSTALL_S = 300.0
_RUN = """\
import os, sys
target, draft, port = sys.argv[1:]
os.environ.update(
    TIGHTWAD_HOST="127.0.0.1", TIGHTWAD_TARGET_URL=target, TIGHTWAD_TARGET_BACKEND="llamacpp",
    TIGHTWAD_TARGET_MODEL="target",
    TIGHTWAD_DRAFT_URL=draft, TIGHTWAD_DRAFT_BACKEND="llamacpp", TIGHTWAD_DRAFT_MODEL="draft",
)
import uvicorn
from tightwad.config import load_proxy_from_env
from tightwad.proxy import create_app
uvicorn.run(create_app(load_proxy_from_env()), host="127.0.0.1", port=int(port), log_level="warning")
"""


def installed(folder: Path) -> Path:
    """The Python of an environment with Tightwad in it, made once. Raises `RigError`."""
    python = folder / "bin" / "python"
    marker = folder / "is-complete"
    if marker.exists():
        return python
    try:
        for argv in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT],
        ):
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.CalledProcessError as exc:
        raise RigError(f"{REQUIREMENT} cannot be installed: {exc.stderr[-500:]}") from None
    except subprocess.TimeoutExpired:
        raise RigError(f"{REQUIREMENT} was not installed within {INSTALL_S:g} s") from None
    marker.touch()
    return python


@dataclass(frozen=True, slots=True)
class Answer:
    """`alone`: from its target without it. `tokens`: of the text, as the target counts."""

    rtt_ms: float
    repeat: int
    prompt: int
    alone: bool
    wall_s: float
    tokens: int
    text: str


class Peer:
    """Its proxy, the llama-server that it verifies with, and one that drafts for it, a network away."""

    def __init__(self, proxy: httpx.AsyncClient, target: LlamaServer) -> None:
        self._proxy = proxy
        self._target = target
        self.answers: list[Answer] = []

    @classmethod
    async def start(cls, rig: Rig, python: Path, target: Path, draft: Path) -> Peer:
        """Raises `RigError`."""
        server = await rig.server(target, await rig.workers())
        draft_port = await free_port()
        argv = draft_argv(
            rig.engine.server, model=str(draft), port=draft_port, context=2048, slots=1, threads=rig.threads
        )
        await rig.port_of(await rig.start("peer-draft", argv), draft_port)
        urls = [server.url, f"http://127.0.0.1:{await rig.link(draft_port)}"]
        port = await free_port()
        proxy = await rig.start("peer-proxy", [str(python), "-I", "-c", _RUN, *urls, str(port)])
        await rig.port_of(proxy, port, START_S)
        base = f"http://127.0.0.1:{port}"
        client = await rig.enter(httpx.AsyncClient(base_url=base, timeout=ANSWER_S, trust_env=False))
        return cls(client, server)

    async def ask(self, prompts: Sequence[str], n_tokens: int, rtt_ms: float, repeat: int) -> None:
        """Each prompt once through the proxy and once past it, in turn."""
        for i, prompt in enumerate(prompts):
            for alone in (True, False) if (i + repeat) % 2 else (False, True):
                began = time.perf_counter()
                text = await self._complete(self._target.client if alone else self._proxy, prompt, n_tokens)
                wall_s = time.perf_counter() - began
                n = len(await self._target.tokenize(text))
                self.answers.append(Answer(rtt_ms, repeat, i, alone, wall_s, n, text))

    async def _complete(self, client: httpx.AsyncClient, prompt: str, n_tokens: int) -> str:
        body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": False}
        try:
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["text"])
        except (httpx.HTTPError, KeyError, ValueError) as exc:
            raise RigError(f"Tightwad's proxy or its target did not answer: {exc!r}") from None

    def report(self) -> dict[str, Any]:
        """Rates by round trip, and how many prompts it answered otherwise than its target does alone."""
        return {
            "requirement": REQUIREMENT,
            "rows": [self._row(rtt_ms) for rtt_ms in sorted({a.rtt_ms for a in self.answers})],
            "answers": [asdict(a) for a in self.answers],
        }

    def _row(self, rtt_ms: float) -> dict[str, Any]:
        mine = [a for a in self.answers if a.rtt_ms == rtt_ms]
        rate = {
            alone: statistics.median(a.tokens / a.wall_s for a in mine if a.alone is alone) for alone in (True, False)
        }
        alone = {a.prompt: a.text for a in mine if a.alone}
        other = {a.prompt for a in mine if not a.alone and not _same(a.text, alone[a.prompt])}
        return {
            "rtt_ms": rtt_ms,
            "tokens_per_s": round(rate[False], 3),
            "target_alone_tokens_per_s": round(rate[True], 3),
            "ratio": round(rate[False] / rate[True], 4),
            "prompts": len(alone),
            "different": len(other),
        }


def _same(left: str, right: str) -> bool:
    """As far as both go: it counts words where the other counts tokens."""
    n = min(len(left), len(right))
    return left[:n] == right[:n]


async def install(cache_dir: Path) -> Path:
    return await trio.to_thread.run_sync(installed, cache_dir / "tightwad-0.5.4")
