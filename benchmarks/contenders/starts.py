"""Programs that are started again and again, up to the first turn of their event loop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.programs.tick import BEGAN
from benchmarks.sample import Sample

PROGRAMS = Path(__file__).resolve().parent.parent / "programs"

CONFIGURATION = """
machine_id = "m-1"
[[backends]]
url = "http://127.0.0.1:9"
[spool]
path = "spool"
"""
"""What a user has to write; nobody is there, but that shows after the first turn only."""


def agent(times: int) -> Sample:
    """Start ``twistd commsmgr``: the configuration is read and checked, and all services are started."""
    Path("agent.toml").write_text(CONFIGURATION, "utf-8")
    return _started(["commsmgr", "--config", "agent.toml"], times)


def libraries(times: int) -> Sample:
    """Start ``twistd libraries``, found as a plugin as commsmgr is."""
    return _started(["libraries"], times)


def nothing(times: int) -> Sample:
    """Start twistd with an application that imports nothing."""
    return _started(["-y", str(PROGRAMS / "nothing.py")], times)


def loop(times: int) -> Sample:
    """Start asyncio with aiohttp imported."""
    return _started([], times, program="loop")


def _started(arguments: list[str], times: int, program: str = "tick") -> Sample:
    """Run a program once for nothing, to have all bytecode compiled and in memory, and then ``times`` times."""
    command = [sys.executable, "-m", f"benchmarks.programs.{program}", *arguments]
    found = [_once(command) for _ in range(times + 1)][1:]
    return Sample(
        operations=times,
        cpu=sum(each.pop("cpu") for each in found),
        wall=sum(each.pop("wall") for each in found),
        extra={name: statistics.median(each[name] for each in found) for name in found[0]},
    )


def _once(command: list[str]) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] += f":{PROGRAMS}"
    environment[BEGAN] = repr(time.monotonic())
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    # Whatever else it says is the log, in front of the figures.
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr.decode(errors='replace')[-4000:]}")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures
