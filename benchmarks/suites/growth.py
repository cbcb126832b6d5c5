"""What a post costs as things grow: backends, posts at the same time, bytes. It shall cost no more."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

SERVERS = {"posts": Server(("posts",))}
LEAST = 1000
"""Bytes from which on copies are counted: below, an exchange's own objects are larger than its body."""

_BACKENDS = (1, 10, 100)
_CONCURRENT = (1, 10, 100, 1000)
_SIZES = {"100 B": (100, 800), "10 kB": (10_000, 800), "1 MB": (1_000_000, 60), "10 MB": (10_000_000, 10)}


def _contender(name: str, run: str = "commsmgr", **arguments: object) -> Contender:
    given = {"operations": 1500, "size": 512, "concurrent": 10, **arguments}
    return Contender(name, f"posts:{run}", given, server="posts")


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
    ),
)
