"""
``python -m benchmarks.programs.tick ARGUMENTS-OF-TWISTD``: twistd up to the first turn of its reactor.

There it says in one line of JSON how long that took and what memory it then has, and ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = "BENCHMARK_BEGAN"
"""The variable with the moment, by the monotonic clock, in which the process was asked for."""


def tell() -> None:
    """Say how long it took to get here, and end at once: how a program stops is not what is measured."""
    wall, cpu = time.monotonic() - float(os.environ[BEGAN]), time.process_time()
    memory = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        memory[name.rstrip(":")] = int(value)
    figures = {
        "wall": wall,
        "cpu": cpu,
        "resident": memory["Rss"] / 1024,
        "proportional": memory["Pss"] / 1024,
        "modules": len(sys.modules),
    }
    sys.__stdout__.write(json.dumps(figures) + "\n")
    sys.__stdout__.flush()
    os._exit(0)


def main() -> None:
    """Run twistd; its services have been started when the reactor turns for the first time."""
    from twisted.application import app
    from twisted.scripts.twistd import run

    turning = app.runReactorWithLogging

    def turn(*arguments: Any) -> None:
        from twisted.internet import reactor

        reactor.callLater(0, tell)
        turning(*arguments)

    app.runReactorWithLogging = turn
    sys.argv[:1] = ["twistd", "--nodaemon", "--pidfile="]
    run()


if __name__ == "__main__":
    main()
