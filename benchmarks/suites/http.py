"""Posting over HTTP: what retries, breaker, deadline, limits and metrics cost on top of treq."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

SIZE = 512
SERVER = "posts"


def _contender(name: str, run: str, **arguments: object) -> Contender:
    return Contender(name, f"posts:{run}", {"size": SIZE, **arguments}, server=SERVER)


def _benchmark(name: str, title: str, contenders: tuple[Contender, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        reference="treq",
        contenders=contenders,
        servers={SERVER: Server((SERVER,))},
        targets=(Target("commsmgr", "cpu", against="treq", at_most=1.0),),
    )


BENCHMARKS = (
    _benchmark(
        "http-singly",
        "POST of 512 bytes of JSON, one at a time",
        (
            _contender("commsmgr", "commsmgr", operations=1000, concurrent=1),
            _contender("treq", "treq", operations=1000, concurrent=1),
            _contender("twisted.web Agent", "agent", operations=1000, concurrent=1),
            _contender("aiohttp", "aiohttp", operations=1000, concurrent=1),
            _contender("requests", "requests", operations=500, concurrent=1),
        ),
    ),
    _benchmark(
        "http-concurrent",
        "POST of 512 bytes of JSON, 10 at a time",
        (
            _contender("commsmgr", "commsmgr", operations=1000, concurrent=10),
            _contender("treq", "treq", operations=1000, concurrent=10),
            _contender("twisted.web Agent", "agent", operations=1000, concurrent=10),
            _contender("aiohttp", "aiohttp", operations=1000, concurrent=10),
        ),
    ),
    _benchmark(
        "https-singly",
        "POST of 512 bytes of JSON over TLS, one at a time",
        (
            _contender("commsmgr", "commsmgr", operations=1000, concurrent=1, secure=True),
            _contender("treq", "treq", operations=1000, concurrent=1, secure=True),
        ),
    ),
)
