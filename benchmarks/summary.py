"""What the documentation says first: some rows out of all that the benchmarks have shown, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from benchmarks.measure import Figure, Result
from benchmarks.report import plain, times

AUTOBAHN, LOADS = "autobahn, encoded before", "autobahn + json.loads"
PAHO, NATS, NATS_ASYNC = "paho-mqtt QoS 1", "nats-py JetStream", "nats-py publish_async"
RAW, LIBRARIES, CONNECTION = "append + fdatasync", "twistd, the same libraries", "autobahn connections"

MEASURES = {
    "cpu": "CPU",
    "wall": "time",
    "rate": "rate (more is better)",
    "resident": "memory, resident",
    "10_MB": "CPU",
    "start": "seconds",
    "drain_ratio": "rate, last parts to first",
    "percent_of_a_core": "% of a core",
    "wakes_a_second": "wakes a second",
    "bytes_each": "memory, bytes",
    "us_CPU_per_command": "CPU",
}
"""What the metrics of the rows are in words; CPU is processor time."""


class Row(Struct, frozen=True):
    """
    One figure.

    :ivar work: what is done, in words.
    :ivar against: the contender that it is a ratio to: the benchmark's reference, or one that a target names. Empty
        when the figure itself is shown.
    """

    work: str
    benchmark: str
    contender: str
    metric: str = "cpu"
    against: str = ""


def _results(window: int) -> tuple[Row, ...]:
    work = f"durable result with its receipt, {window} at a time"
    return tuple(Row(work, f"results-{window}", "commsmgr, durable", against=each) for each in (PAHO, NATS, NATS_ASYNC))


def _http(work: str, benchmark: str) -> Row:
    return Row(f"HTTP POST with retries, deadline, breaker and metrics, {work}", benchmark, "commsmgr", against="treq")


def _start(metric: str) -> Row:
    return Row("start of ``twistd commsmgr``", "start", "twistd commsmgr", metric, LIBRARIES)


def _fleet(work: str, metric: str, against: str = CONNECTION) -> Row:
    return Row(f"10 000 managers in one process: {work}", "fleet", "commsmgr managers", metric, against)


ROWS = (
    *_results(20),
    *_results(1000),
    Row(
        "WebSocket, sent, with session and receipts",
        "websocket-send",
        "commsmgr, session, with receipts",
        "cpu",
        AUTOBAHN,
    ),
    Row(
        "the same with checks and redaction",
        "websocket-send",
        "commsmgr, session, results checked and redacted",
        against=AUTOBAHN,
    ),
    Row("WebSocket, received, parsed, checked", "websocket-receive", "commsmgr, session", against=LOADS),
    Row(
        "a command, through the inbox (in memory) to the handler",
        "websocket-receive",
        "commsmgr, manager, inbox in memory",
        against=LOADS,
    ),
    Row("a result of 10 MB with its receipt", "growth-websocket-size", "commsmgr, durable", "10_MB", "autobahn"),
    _http("one at a time", "http-singly"),
    _http("ten at a time", "http-concurrent"),
    _http("over TLS", "https-singly"),
    Row("event made durable, one at a time", "spool-singly", "commsmgr", "rate", RAW),
    Row("event made durable, a hundred at a time", "spool-by-100", "commsmgr", "rate", RAW),
    Row("start with a million events waiting", "spool-drain", "commsmgr", "start"),
    Row("drain of a million events", "spool-drain", "commsmgr", "drain_ratio"),
    _start("wall"),
    _start("cpu"),
    _start("resident"),
    Row("connected and idle, a heartbeat every 30 s", "idle", "commsmgr", "cpu", "autobahn"),
    Row("connected and idle, a heartbeat every 30 s", "idle", "commsmgr", "percent_of_a_core"),
    Row("connected and idle, a heartbeat every 30 s", "idle", "commsmgr", "wakes_a_second"),
    _fleet("memory of one", "bytes_each", ""),
    _fleet("memory of one", "bytes_each"),
    _fleet("one connected and registered", "cpu"),
    _fleet("a command to one that rests, and its result", "us_CPU_per_command"),
)


def found(row: Row, results: Sequence[Result]) -> tuple[Figure, int]:
    """
    Return what a row shows, and of how many rounds.

    :raise LookupError: it is not among the results.
    """
    for result in results:
        if result.name != row.benchmark:
            continue
        if not row.against:
            return result.figures[row.contender][row.metric], result.rounds
        if row.against == result.reference:
            return result.ratios[row.contender][row.metric], result.rounds
        wanted = (row.contender, row.metric, row.against)
        for verdict in result.verdicts:
            if (verdict.target.contender, verdict.target.metric, verdict.target.against) == wanted:
                return verdict.figure, result.rounds
    raise LookupError(f"there is no figure for {row}")


def restructured(results: Sequence[Result]) -> str:
    """Return the rows as a table in reStructuredText; work that is that of the row before is not said again."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 36 15 20 29", ""]
    cells = [("work", "measure", "ratio to", "median [least to most]")]
    work = ""
    for row in ROWS:
        figure, rounds = found(row, results)
        shown = (times if row.against else plain)(figure, rounds) + " (one run)" * (rounds == 1)
        cells.append(("" if row.work == work else row.work, MEASURES[row.metric], row.against or "\\–", shown))
        work = row.work
    lines += [f"   {' ' if index else '*'} - {cell}" for each in cells for index, cell in enumerate(each)]
    return "\n".join(lines)
