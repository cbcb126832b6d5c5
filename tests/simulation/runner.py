"""Seeds side by side in several processes, and what is to be said of them."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from twisted.logger import globalLogBeginner

from tests.simulation.scenario import Outcome, run

LAST_LINES = 40
WORST = 12
"""Violations shown of one seed; one defect often makes many."""


class Summary:
    """The figures of all seeds together."""

    def __init__(self) -> None:
        self.seeds = 0
        self.failed: list[int] = []
        self.cpu = 0.0
        self.figures: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        """Take one more seed into account."""
        self.seeds += 1
        self.cpu += outcome.cpu
        self.figures.update(outcome.figures)  # type: ignore[arg-type]  # a Counter adds floats just as well
        if outcome.violations:
            self.failed.append(outcome.seed)

    def __str__(self) -> str:
        figures = dict(self.figures)
        hours = figures.pop("virtual hours", 0)
        lines = [
            f"{self.seeds} seeds, {hours:.2f} virtual hours, {self.cpu / max(self.seeds, 1):.3f} CPU seconds a seed"
        ]
        kinds = {name.removeprefix("fault "): int(figures.pop(name)) for name in list(figures) if "fault " in name}
        lines.append(", ".join(f"{int(count)} {name}" for name, count in figures.items()))
        lines.append("faults: " + ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())))
        lines.append(f"objected to: {self.failed}" if self.failed else "nothing is objected to")
        return "\n".join(lines)


def told(outcome: Outcome) -> str:
    """Return what is to be said of a seed that was objected to."""
    history = outcome.history.splitlines()
    violations = outcome.violations[:WORST]
    if more := len(outcome.violations) - len(violations):
        violations.append(f"and {more} more")
    return "\n".join(
        [
            f"seed {outcome.seed}: {outcome.setting}",
            *(f"  {fault}" for fault in outcome.plan),
            f"the last {min(LAST_LINES, len(history))} of {len(history)} lines of its history:",
            *(f"  {line}" for line in history[-LAST_LINES:]),
            f"seed {outcome.seed} is wrong:",
            *(f"  {violation}" for violation in violations),
            f"again: {sys.executable} -m tests.simulation --seed {outcome.seed} --history",
            "",
        ]
    )


def outcomes(seeds: Iterator[int], jobs: int) -> Iterator[Outcome]:
    """Run seeds in so many processes, and yield what became of them, in order."""
    if jobs == 1:
        prepare()
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, prepare) as pool:
        # A few ahead of what was asked for: whoever stops asking stops the rest.
        waiting = [pool.apply_async(run, (seed,)) for seed in islice(seeds, 2 * jobs)]
        while waiting:
            yield waiting.pop(0).get()
            waiting += [pool.apply_async(run, (seed,)) for seed in islice(seeds, 1)]


def prepare() -> None:
    """Make this process fit for seeds: nothing is logged, and what is loaded is not collected again and again."""
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False, discardBuffer=True)
    gc.collect()
    gc.freeze()
