"""
Run seeds, side by side, and say what the oracles object to.

    python -m tests.simulation [--seeds N] [--from S] [--jobs J] [--minutes M] [--stop]
    python -m tests.simulation --seed S [--history]

The exit status is 1 when any seed is objected to. Such a seed prints its setting, its plan, the last lines of its
history, what is wrong, and the command that runs it again, which gives the same history to the byte.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TextIO

from tests.simulation.runner import Summary, outcomes, told

SEEDS = 300


def main(arguments: list[str], out: TextIO) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=None, metavar="N", help=f"how many; {SEEDS} by default")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="S", help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="processes")
    parser.add_argument("--minutes", type=float, default=None, metavar="M", help="as many seeds as fit, unless --seeds")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that is objected to")
    parser.add_argument("--seed", type=int, default=None, metavar="S", help="run this seed only")
    parser.add_argument("--history", action="store_true", help="with --seed: print plan and history")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        (outcome,) = outcomes(iter([options.seed]), 1)
        if options.history:
            print(outcome.setting, *outcome.plan, outcome.history, sep="\n", file=out)
        print(*outcome.violations, f"{len(outcome.violations)} violations", sep="\n", file=out)
        return 1 if outcome.violations else 0
    count = options.seeds if options.seeds is not None else SEEDS if options.minutes is None else sys.maxsize
    ends = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    summary = Summary()
    for outcome in outcomes(iter(range(options.first, options.first + count)), options.jobs):
        summary.add(outcome)
        if outcome.violations:
            print(told(outcome), file=out, flush=True)
        if time.monotonic() > ends or (options.stop and outcome.violations):
            break
    print(summary, file=out)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout))
