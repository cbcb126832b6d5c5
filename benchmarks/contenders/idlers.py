"""Programs that are connected and have nothing to do, watched from outside by what the kernel tells of threads."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contenders.starts import CONFIGURATION
from benchmarks.sample import Sample

SETTLING = 3.0
"""Seconds after the connection, in which what a start brings along comes to its end: the first inventory, above all."""

SOON = """
[heartbeat]
jitter = 1
[inventory]
jitter = 1
"""
"""So that the first ones come before that; how often they come is as by default."""


def agent(seconds: float, port: int) -> Sample:
    """Watch ``twistd commsmgr`` with its defaults: heartbeats and keep-alive every 30 s, the spool on disk."""
    text = CONFIGURATION.replace("127.0.0.1:9", f"127.0.0.1:{port}") + SOON
    Path("agent.toml").write_text(text, "utf-8")
    twistd = "from twisted.scripts.twistd import run; run()"
    command = [sys.executable, "-c", twistd, "-n", "--pidfile=", "commsmgr", "--config", "agent.toml"]
    return _watched(command, b"link.registered", seconds)


def bare(seconds: float, port: int) -> Sample:
    """Watch autobahn's own client with a ping every 30 s, and nothing beside that."""
    return _watched([sys.executable, "-m", "benchmarks.programs.bare_websocket", str(port)], b"connected", seconds)


def _watched(command: list[str], sign: bytes, seconds: float) -> Sample:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            _await(process, sign)
            time.sleep(SETTLING)
            wakes, cpu, began = _wakes(process.pid), _cpu(process.pid), time.perf_counter()
            time.sleep(seconds)
            wakes, cpu, wall = _wakes(process.pid) - wakes, _cpu(process.pid) - cpu, time.perf_counter() - began
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text("utf-8"))
            assert resident is not None
            extra = {
                "wakes_a_second": wakes / wall,
                "percent_of_a_core": cpu / wall * 100,
                "resident": int(resident[1]) / 1024,
            }
            return Sample(max(round(wall), 1), cpu, wall, extra)
        finally:
            process.kill()


def _await(process: subprocess.Popen[bytes], sign: bytes) -> None:
    """Wait for a line with ``sign``. The little that is written afterwards fits into the pipe."""
    assert process.stdout is not None
    said = b""
    while sign not in said:
        readable, _, _ = select.select([process.stdout], [], [], 30)
        part = os.read(process.stdout.fileno(), 65536) if readable else b""
        if not part:
            raise RuntimeError(f"it does not connect:\n{said.decode(errors='replace')}")
        said += part


def _wakes(process: int) -> int:
    """Return how often the threads of ``process`` have gone to sleep, and so been woken (proc_pid_status(5))."""
    return sum(
        int(found[1])
        for path in Path(f"/proc/{process}/task").glob("*/status")
        if (found := re.search(r"^voluntary_ctxt_switches:\s+(\d+)", path.read_text("utf-8"), re.MULTILINE))
    )


def _cpu(process: int) -> float:
    """Return the seconds that its threads ran, to the nanosecond: the clock of times(2) is too coarse for these."""
    paths = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(path.read_text("utf-8").split()[0]) for path in paths) / 1e9
