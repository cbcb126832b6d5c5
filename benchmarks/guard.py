"""
The guard against getting slower: ``python -m benchmarks.guard``, part of ``.ci/run``.

It counts instructions, not seconds: valgrind's cachegrind gives the same count, to a fraction of a percent, on a busy
machine as on an idle one. What is compared with a bound is the ratio of commsmgr's count to the bare library's for the
same work, both counted in this run, so that another processor, Python or Twisted changes both alike.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.counted import FEW, MANY
from benchmarks.measure import Missing, environment, program

MOST = {"websocket": 2.1, "http": 0.96, "registration": 1.3, "spool": 4.3}
"""
The most that commsmgr may take of what the bare library takes, by kind of work.

About a seventh above what was counted when they were set. Whoever gets below lowers them; whoever has a reason to get
above says it where he raises them.
"""

PATIENCE = 900.0
"""Seconds that it may take: valgrind makes a program some thirty times slower."""


def count() -> dict[str, float]:
    """
    Return the instructions for doing each piece of work once.

    :raise Missing: valgrind is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="commsmgr-guard-") as name:
        directory = Path(name)
        command = [
            program("valgrind", package="valgrind"),
            "--tool=cachegrind",
            "--cache-sim=no",
            f"--cachegrind-out-file={directory}/%p.out",
            f"--log-file={directory}/%p.log",
            sys.executable,
            "-m",
            "benchmarks.counted",
            name,
        ]
        done = subprocess.run(command, env=environment(), capture_output=True, timeout=PATIENCE, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the work that is counted failed:\n{done.stderr.decode(errors='replace')[-4000:]}")
        counts: dict[str, dict[int, int]] = {}
        for path in directory.glob("*.work"):
            work, times = path.read_text().split()
            counts.setdefault(work, {})[int(times)] = instructions(path.with_suffix(".log").read_text())
    return {work: (found[MANY] - found[FEW]) / (MANY - FEW) for work, found in counts.items()}


def instructions(log: str) -> int:
    """Return what cachegrind has counted, as its log says it."""
    found = re.search(r"I\s+refs:\s+([\d,]+)", log)
    if found is None:
        raise RuntimeError(f"cachegrind says no count:\n{log[-2000:]}")
    return int(found[1].replace(",", ""))


def judge(counts: dict[str, float]) -> tuple[list[str], bool]:
    """Return a line for each kind of work, and whether all are within their bounds."""
    lines, good = [], True
    for kind, most in MOST.items():
        own, bare = counts[f"{kind}/commsmgr"], counts[f"{kind}/bare"]
        ratio = own / bare
        good &= ratio <= most
        told = "" if ratio <= most else "  TOO MUCH"
        lines.append(f"{kind}: {own:,.0f} instructions, bare {bare:,.0f}: x{ratio:.2f}, at most x{most}{told}")
    return lines, good


def main() -> int:
    """Count, and return 1 when something has become too slow."""
    try:
        lines, good = judge(count())
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
