"""The devices of an engine as they are now: `--list-devices` run again, because free memory changes."""

from __future__ import annotations

import os
import subprocess
import sys

import trio

from tightwad_agent.engine.capability import parse_devices
from tightwad_agent.engine.process import Engine, clean_environment
from tightwad_agent.errors import EngineBroken
from tightwad_agent.wire.rows import Device

LIST_S = 30.0
"""A GPU driver that has slept takes seconds to answer."""


async def list_devices(engine: Engine) -> tuple[Device, ...]:
    """Accelerators with their free memory; () where there is only a CPU. Raises `EngineBroken`."""
    environ = clean_environment(os.environ, frozen=bool(getattr(sys, "frozen", False)))
    try:
        with trio.fail_after(LIST_S):
            done = await trio.run_process(
                [engine.server, "--list-devices"], capture_stdout=True, stderr=subprocess.DEVNULL, env=environ
            )
    except trio.TooSlowError:
        raise EngineBroken(f"llama-server --list-devices did not end within {LIST_S:g} s") from None
    except (OSError, subprocess.CalledProcessError) as exc:
        raise EngineBroken(f"llama-server --list-devices failed: {exc}") from None
    return parse_devices(done.stdout.decode("utf-8", "replace"))
