"""Starting an agent: how long it takes until the reactor turns, and the memory that takes."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Target

TIMES = 2
LIBRARIES = "twistd, the same libraries"

BENCHMARKS = (
    Benchmark(
        name="start",
        title="from the call of the program to the first turn of its event loop",
        reference=LIBRARIES,
        metrics=("cpu", "wall", "resident", "proportional", "modules"),
        contenders=(
            Contender("twistd commsmgr", "starts:agent", {"times": TIMES}),
            Contender(LIBRARIES, "starts:libraries", {"times": TIMES}),
            Contender("twistd, nothing imported", "starts:nothing", {"times": TIMES}),
            Contender("asyncio + aiohttp", "starts:loop", {"times": TIMES}),
        ),
        targets=(
            Target("twistd commsmgr", "wall", LIBRARIES, at_most=1.15),
            Target("twistd commsmgr", "cpu", LIBRARIES, at_most=1.15),
            Target("twistd commsmgr", "resident", LIBRARIES, at_most=1.1),
        ),
    ),
)
