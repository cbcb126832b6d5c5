"""``python -m benchmarks [NAME ...]``: run the benchmarks, all of them or some."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

from benchmarks import report, suites
from benchmarks.measure import Benchmark, Missing, Result, compare


def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name, in the order of their modules' names."""
    found: dict[str, Benchmark] = {}
    for info in pkgutil.iter_modules(suites.__path__):
        module = importlib.import_module(f"benchmarks.suites.{info.name}")
        found.update((each.name, each) for each in module.BENCHMARKS)
    return found


def main() -> int:
    """Return 0 when all was measured, 1 when something needed is missing; whether targets are reached is said only."""
    known = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run the benchmarks, all of them or some, and say which targets are reached.",
        epilog="The exit status is 1 when something that is needed is not installed. "
        "A target that is not reached is said, and does not change it.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; all when none is given")
    parser.add_argument("--rounds", type=int, default=0, help="how often each contender runs (default: as each says)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (SVG)")
    given = parser.parse_args()
    unknown = set(given.names) - known.keys()
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results: list[Result] = []
    missing = 0
    began = time.monotonic()
    for name in given.names or known:
        started = time.monotonic()
        try:
            result = compare(known[name], given.rounds, lambda line: print(line, file=sys.stderr, flush=True))
        except Missing as error:
            print(f"{name}: not measured: {error}\n", flush=True)
            missing += 1
            continue
        print(f"{report.table(result)}\n  took {time.monotonic() - started:.0f} s\n", flush=True)
        missing += len(result.missing)
        results.append(result)
        # Written each time anew: what was measured is not lost when a later one is interrupted.
        if given.json is not None:
            report.write_json(results, given.json)
    print(f"all of it took {time.monotonic() - began:.0f} s")
    if given.plot is not None and results:
        report.write_plot(results, given.plot)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
