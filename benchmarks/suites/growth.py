"""
What a post over HTTP and a result over WebSocket cost as things grow: it shall be no more.

What grows is backends, how many wait for their answers at the same time, and bytes. But for the backends, which a
process has from its start, a contender does all of it in one process, after a few that do not count.
"""

from __future__ import annotations

from typing import Any

from benchmarks.measure import Benchmark, Contender, Server, Target

POST: dict[str, Any] = {"operations": 100, "size": 512, "concurrent": 10}
RESULT: dict[str, Any] = {"operations": 100, "size": 26, "window": 10, "durability": "memory"}
BARE_RESULT = {name: value for name, value in RESULT.items() if name != "durability"}

_BACKENDS = (1, 10, 100)
_AT_A_TIME = (1, 10, 100, 1000)
_SIZES = {"100_B": (100, 1000), "10_kB": (10_000, 1000), "1_MB": (1_000_000, 20), "10_MB": (10_000_000, 5)}
"""Bytes, and how many of these."""
_LARGE = ("10_kB", "1_MB", "10_MB")
"""Of which copies are counted: what goes with a small one is larger than itself."""
_TEN_TIMES = "10_MB/1_MB"
"""What ten times as many bytes cost: ten times as much, with a tenth for what disturbs."""
_MANY = f"{_AT_A_TIME[-1]}_at_a_time"
_FLAT = f"{_MANY}/{_AT_A_TIME[1]}_at_a_time"


def _at_a_time(name: str) -> dict[str, dict[str, int]]:
    """Return the ways of an argument of that name to grow."""
    return {f"{number}_at_a_time": {name: number, "operations": max(number, 1000)} for number in _AT_A_TIME}


def _sizes(**at_a_time: int) -> dict[str, dict[str, int]]:
    few = dict.fromkeys(at_a_time, 1)
    return {
        name: {"size": size, "operations": operations, **(at_a_time if size < 100_000 else few)}
        for name, (size, operations) in _SIZES.items()
    }


def _copies(**one: int) -> dict[str, dict[str, int]]:
    return {name: {"size": _SIZES[name][0], "operations": 3, "traced": True, **one} for name in _LARGE}


def _benchmark(name: str, title: str, contenders: tuple[Contender, ...], metrics: Any, *targets: Target) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        reference=contenders[-1].name,
        metrics=tuple(metrics),
        servers={each.server: Server((each.server,)) for each in contenders},
        contenders=contenders,
        targets=targets,
    )


def _posts(**grow: Any) -> tuple[Contender, ...]:
    return tuple(
        Contender(name, f"posts:{name}", POST | {"grow": grow}, server="posts") for name in ("commsmgr", "treq")
    )


def _result(name: str, run: str = "commsmgr", **given: Any) -> Contender:
    return Contender(name, f"results:{run}", (RESULT if run == "commsmgr" else BARE_RESULT) | given, "v1_backend")


def _results(**grow: Any) -> tuple[Contender, ...]:
    return _result("commsmgr, in memory", grow=grow), _result("autobahn", "autobahn", grow=grow)


def _backends(number: int) -> str:
    return f"commsmgr, {number} backend" + "s" * (number > 1)


_NO_MORE = Target(_backends(100), "cpu", against=_backends(1), at_most=1.1)

BENCHMARKS = (
    _benchmark(
        "growth-backends",
        "POST of 512 bytes, by the number of backends",
        tuple(
            Contender(_backends(number), "posts:commsmgr", POST | {"operations": 1000, "backends": number}, "posts")
            for number in reversed(_BACKENDS)
        ),
        ("cpu", "wall"),
        _NO_MORE,
    ),
    _benchmark(
        "growth-in-flight",
        "us CPU for a POST of 512 bytes, by the number that wait for their answers at the same time",
        _posts(**_at_a_time("concurrent")),
        (*_at_a_time("concurrent"), _FLAT),
        Target("commsmgr", _FLAT, at_most=1.2),
        Target("commsmgr", _MANY, "treq", at_most=1.0),
    ),
    _benchmark(
        "growth-size",
        "us CPU for a POST, by its size",
        _posts(**_sizes(concurrent=1)),
        _SIZES,
        *(Target("commsmgr", size, "treq", at_most=1.0) for size in _SIZES),
        Target("commsmgr", _TEN_TIMES, at_most=11.0),
    ),
    _benchmark(
        "growth-copies",
        "memory that a POST takes beyond its body, in bytes by the body's",
        _posts(**_copies(concurrent=1)),
        _LARGE,
        Target("commsmgr", "10_MB", "treq", at_most=1.1),
    ),
    _benchmark(
        "growth-websocket-backends",
        "result of 230 bytes by WebSocket, by the number of backends",
        tuple(
            _result(_backends(number), operations=4000, window=100, warm=400, backends=number)
            for number in reversed(_BACKENDS)
        ),
        ("cpu", "wall"),
        _NO_MORE,
    ),
    _benchmark(
        "growth-websocket-in-flight",
        "us CPU for a result by WebSocket, by the number that wait for their receipts at the same time",
        _results(**_at_a_time("window")),
        (*_at_a_time("window"), _FLAT),
        Target("commsmgr, in memory", _FLAT, at_most=1.2),
    ),
    _benchmark(
        "growth-websocket-size",
        "us CPU for a result by WebSocket, by the size of its output",
        (_result("commsmgr, durable", durability="full", grow=_sizes(window=20)), *_results(**_sizes(window=20))),
        _SIZES,
        *(Target(name, _TEN_TIMES, at_most=11.0) for name in ("commsmgr, durable", "commsmgr, in memory")),
    ),
    _benchmark(
        "growth-websocket-copies",
        "memory that a result by WebSocket takes beyond its output, in bytes by the output's",
        _results(**_copies(window=1)),
        _LARGE,
        # What is stored is one that autobahn has not.
        Target("commsmgr, in memory", "10_MB", "autobahn", at_most=1.5),
    ),
)
