"""Accepting a message durably: what a spool may cost."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender

BENCHMARKS = (
    Benchmark(
        name="spool-singly",
        title="one record of 300 bytes made durable, one at a time",
        reference="append + fdatasync",
        metrics=("rate", "cpu"),
        contenders=(Contender("append + fdatasync", "raw_log:run", {"operations": 2000, "size": 300, "batch": 1}),),
    ),
)
