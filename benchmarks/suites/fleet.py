"""A fleet of agents in one process, as a load test or a simulator runs it."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

AGENTS = 10_000

BENCHMARKS = (
    Benchmark(
        name="fleet",
        title=f"one of {AGENTS} agents in one process connected and registered",
        reference="autobahn connections",
        metrics=("bytes_each", "registered_per_CPU_second", "cpu", "us_CPU_per_command"),
        servers={"backend": Server(("fleet",))},
        contenders=tuple(
            Contender(name, f"fleet:{function}", {"count": AGENTS}, server="backend")
            for name, function in (
                ("commsmgr managers", "commsmgr"),
                ("autobahn connections", "autobahn"),
                ("aiohttp connections", "aiohttp"),
            )
        ),
        targets=(
            Target("commsmgr managers", "bytes_each", at_most=65536),
            Target("commsmgr managers", "registered_per_CPU_second", at_least=1000),
        ),
        rounds=1,
    ),
)
