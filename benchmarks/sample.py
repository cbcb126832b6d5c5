"""What one run of a contender yields, and the watch it is taken with."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from msgspec import Struct


class Sample(Struct, frozen=True):
    """
    One run.

    :ivar operations: how many were done.
    :ivar cpu: seconds, user and system, of all threads of the process.
    :ivar wall: seconds.
    :ivar extra: what else was measured, such as latencies, by name.
    """

    operations: int
    cpu: float
    wall: float
    extra: dict[str, float] = {}

    def value(self, metric: str) -> float:
        """
        Return ``cpu`` or ``wall`` in microseconds an operation, ``rate`` in operations a second, or an extra.

        ``one/other`` is the ratio of two of these.
        """
        if "/" in metric:
            one, _, other = metric.partition("/")
            return self.value(one) / self.value(other)
        if metric in ("cpu", "wall"):
            return float(getattr(self, metric)) / self.operations * 1e6
        if metric == "rate":
            return self.operations / self.wall
        return self.extra[metric]


class Watch:
    """Measures from :meth:`start` to :meth:`stop`, so that neither imports nor warming up count."""

    def start(self) -> None:
        """Begin."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, operations: int, **extra: float) -> Sample:
        """Return what the operations since the start took."""
        return Sample(operations, time.process_time() - self._cpu, time.perf_counter() - self._wall, extra)


def resident() -> float:
    """Return the bytes that this process has in memory now (proc(5))."""
    with open("/proc/self/statm") as statm:
        return float(int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE"))


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value below which ``part``, from 0 to 1, of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
