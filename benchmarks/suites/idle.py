"""Doing nothing: what an agent that is connected costs while there is neither command nor result."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

# The interval of heartbeats: one falls into it.
SECONDS = 30.0

BENCHMARKS = (
    Benchmark(
        name="idle",
        title=f"a second of {SECONDS:.0f}, connected by WebSocket, heartbeats (commsmgr) or pings every 30 s",
        reference="autobahn",
        metrics=("cpu", "percent_of_a_core", "wakes_a_second", "resident"),
        servers={"backend": Server(("reference_backend",))},
        contenders=(
            Contender("commsmgr", "idlers:agent", {"seconds": SECONDS}, server="backend"),
            Contender("autobahn", "idlers:bare", {"seconds": SECONDS}, server="backend"),
        ),
        targets=(
            Target("commsmgr", "percent_of_a_core", at_most=0.1),
            Target("commsmgr", "wakes_a_second", at_most=1.0),
        ),
        rounds=1,
    ),
)
