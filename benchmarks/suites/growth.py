"""What a post and a result cost as things grow: backends, how many at the same time, bytes. It shall cost no more."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

SERVERS = {"posts": Server(("posts",)), "commsmgr.v1": Server(("v1_backend",))}
LEAST = 1000
"""Bytes from which on copies are counted: below, an exchange's own objects are larger than its body."""

_BACKENDS = (1, 10, 100)
_CONCURRENT = (1, 10, 100, 1000)
_SIZES = {"100 B": (100, 800), "10 kB": (10_000, 800), "1 MB": (1_000_000, 60), "10 MB": (10_000_000, 10)}
_OUTPUTS = {
    "100 B": {"size": 100, "operations": 3000, "window": 20},
    "10 kB": {"size": 10_000, "operations": 2000, "window": 20},
    "1 MB": {"size": 1_000_000, "operations": 40, "window": 1, "warm": 2},
    "10 MB": {"size": 10_000_000, "operations": 6, "window": 1, "warm": 1},
}


def _contender(name: str, run: str = "commsmgr", **arguments: object) -> Contender:
    given = {"operations": 1500, "size": 512, "concurrent": 10, **arguments}
    return Contender(name, f"posts:{run}", given, server="posts")


def _result(name: str, run: str = "commsmgr", **arguments: object) -> Contender:
    """Return one whose results go by WebSocket."""
    given = {"operations": 5000, "window": 100, "warm": 500, **arguments}
    if run == "commsmgr":
        given = {"durability": "memory", **given}
    return Contender(name, f"results:{run}", given, server="commsmgr.v1")


def _backends(number: int) -> str:
    return f"commsmgr, {number} backend" + "s" * (number > 1)


def _at_a_time(number: int) -> str:
    return f"commsmgr, {number} at a time"


BENCHMARKS = (
    Benchmark(
        name="growth-backends",
        title="POST of 512 bytes, by the number of backends",
        reference=_backends(1),
        contenders=tuple(_contender(_backends(number), backends=number) for number in _BACKENDS),
        servers=SERVERS,
        targets=(Target(_backends(100), "cpu", against=_backends(1), at_most=1.1),),
        rounds=3,
    ),
    Benchmark(
        name="growth-in-flight",
        title="POST of 512 bytes, by the number that wait for their answers at the same time",
        reference=_at_a_time(10),
        contenders=tuple(_contender(_at_a_time(number), concurrent=number, operations=3000) for number in _CONCURRENT),
        servers=SERVERS,
        targets=(Target(_at_a_time(1000), "cpu", against=_at_a_time(10), at_most=1.2),),
        rounds=3,
    ),
    *(
        Benchmark(
            name=f"growth-size-{name.replace(' ', '')}",
            title=f"POST of {name}",
            reference="treq",
            contenders=tuple(
                _contender(run, run, size=size, operations=operations, concurrent=1) for run in ("commsmgr", "treq")
            ),
            servers=SERVERS,
            targets=(Target("commsmgr", "cpu", against="treq", at_most=1.0),),
            rounds=3,
        )
        for name, (size, operations) in _SIZES.items()
    ),
    Benchmark(
        name="growth-websocket-backends",
        title="result of 230 bytes by WebSocket, by the number of backends",
        reference=_backends(1),
        contenders=tuple(_result(_backends(number), backends=number) for number in _BACKENDS),
        servers=SERVERS,
        targets=(Target(_backends(100), "cpu", against=_backends(1), at_most=1.1),),
        rounds=3,
    ),
    Benchmark(
        name="growth-websocket-in-flight",
        title="result of 230 bytes by WebSocket, by the number that wait for their receipts at the same time",
        reference=_at_a_time(10),
        contenders=tuple(_result(_at_a_time(number), window=number) for number in _CONCURRENT),
        servers=SERVERS,
        targets=(Target(_at_a_time(1000), "cpu", against=_at_a_time(10), at_most=1.2),),
        rounds=3,
    ),
    *(
        Benchmark(
            name=f"growth-websocket-size-{name.replace(' ', '')}",
            title=f"result with an output of {name} by WebSocket",
            reference="autobahn",
            contenders=(
                _result("commsmgr, durable", durability="full", **how),
                _result("commsmgr, in memory", **how),
                _result("autobahn", "autobahn", **how),
            ),
            servers=SERVERS,
            rounds=3,
        )
        for name, how in _OUTPUTS.items()
    ),
    Benchmark(
        name="growth-copies",
        title="memory that a POST takes beyond its body, in bytes by the body's",
        reference="treq, 10 MB",
        metrics=("copies",),
        contenders=tuple(
            _contender(f"{run}, {name}", run, size=size, operations=3, concurrent=1, traced=True)
            for name, (size, _) in _SIZES.items()
            for run in ("commsmgr", "treq")
            if size > LEAST
        ),
        servers=SERVERS,
        targets=(Target("commsmgr, 10 MB", "copies", at_most=0.1),),
        rounds=3,
    ),    Benchmark(
        name="growth-websocket-copies",
        title="memory that a result by WebSocket takes beyond its output, in bytes by the output's",
        reference="autobahn, 10 MB",
        metrics=("copies",),
        contenders=tuple(
            _result(f"{run}, {name}", run, size=size, operations=3, window=1, warm=1, traced=True)
            for name, size in (("10 kB", 10_000), ("1 MB", 1_000_000), ("10 MB", 10_000_000))
            for run in ("commsmgr", "autobahn")
        ),
        servers=SERVERS,
        rounds=3,
    ),
)
