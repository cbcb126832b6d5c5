"""Accepting a message durably, beside a file that is flushed and what else keeps a queue on disk; a long backlog."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target
from benchmarks.servers.filled_spools import QUEUED, SIZE

FILLED = {"spools": Server(("filled_spools",))}
RAW, OURS = "append + fdatasync", "commsmgr"


# Each opening begins a new log, which costs more until it has grown to its full size, after about 450 commits, and is
# written over from then on. With so many operations that is a part of what is measured, and not most of it.
SINGLY = 2500


def _enqueue(name: str, title: str, batch: int, operations: int, least: float) -> Benchmark:
    work = {"operations": operations, "size": SIZE, "batch": batch}
    return Benchmark(
        name=name,
        title=title,
        reference=RAW,
        metrics=("rate", "cpu"),
        contenders=(
            Contender(RAW, "raw_log:run", work),
            Contender(OURS, "commsmgr_spool:run", work),
            Contender("SQLite, one table, WAL, FULL", "queues:sqlite", work),
            # It commits each put by itself, so it has no hundred at a time.
            *([Contender("persist-queue", "queues:persist_queue", work)] if batch == 1 else []),
            Contender("diskcache, FULL", "queues:diskcache", {**work, "synchronous": 2}),
            Contender("diskcache, not power-safe", "queues:diskcache", {**work, "synchronous": 1}),
        ),
        targets=(
            Target(OURS, "rate", RAW, at_least=least),
            *([Target(OURS, "rate", "persist-queue", at_least=1.0)] if batch == 1 else []),
            Target(OURS, "rate", "diskcache, FULL", at_least=1.0),
        ),
    )


def _waiting(queued: int) -> str:
    return f"commsmgr, {queued} waiting"


BENCHMARKS = (
    _enqueue("spool-singly", f"one event of {SIZE} bytes made durable, one at a time", 1, SINGLY, 0.5),
    _enqueue("spool-by-100", f"one event of {SIZE} bytes made durable, a hundred at a time", 100, 30_000, 0.45),
    Benchmark(
        name="spool-queued",
        title=f"one event of {SIZE} bytes made durable and one acknowledged, while others wait",
        reference=_waiting(QUEUED[0]),
        metrics=("cpu", "us_CPU_to_enqueue", "us_CPU_to_drain"),
        servers=FILLED,
        contenders=tuple(
            Contender(_waiting(queued), "commsmgr_spool:queued", {"queued": queued, "operations": 10_000}, "spools")
            for queued in QUEUED
        ),
        targets=tuple(
            Target(_waiting(QUEUED[-1]), metric, _waiting(QUEUED[0]), at_most=1.2)
            for metric in ("us_CPU_to_enqueue", "us_CPU_to_drain")
        ),
    ),
    Benchmark(
        name="spool-drain",
        title=f"one of a million waiting events of {SIZE} bytes taken and acknowledged, a hundred at a time",
        reference=OURS,
        metrics=("rate", "cpu", "start", "drain_ratio", "drain_ratio_by_CPU", "memory_ratio", "megabytes"),
        servers=FILLED,
        contenders=(Contender(OURS, "commsmgr_spool:drained", {"queued": QUEUED[-1]}, "spools"),),
        targets=(
            Target(OURS, "start", at_most=0.1),
            Target(OURS, "drain_ratio", at_least=0.9),
            Target(OURS, "drain_ratio_by_CPU", at_least=0.9),
            Target(OURS, "memory_ratio", at_most=1.1),
        ),
    ),
)
