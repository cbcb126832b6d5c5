"""
A process that uses a spool until it kills itself at a given point. Run by test_spool_disk, which audits what it left.

It writes ``A id`` for each event it was told is accepted and ``F id`` for each that it was told is forgotten.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from itertools import count
from typing import Any

from twisted.internet import defer, task

from commsmgr import config
from commsmgr.spool import Accepted, Lane, Spool

DIRECTORY, POINT, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = count(1)


def die_in_time() -> None:
    """Kill this process at the ``COUNT``-th call."""
    if next(calls) >= COUNT:
        os.kill(os.getpid(), signal.SIGKILL)


def say(text: str) -> None:
    """Write a line at once: what is in a buffer would die with the process."""
    os.write(1, f"{text}\n".encode())


class Watched(sqlite3.Connection):
    """A connection that may be the last thing this process does."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]  # same, less precise
        if POINT == "before-commit" and statement == "COMMIT":
            die_in_time()
        result = super().execute(statement, *values)
        if POINT == "after-commit" and statement == "COMMIT":
            die_in_time()
        if POINT == "in-job" and statement.startswith(("INSERT", "DELETE", "UPDATE")):
            die_in_time()
        if POINT == "opening" and statement.startswith(("PRAGMA application_id =", "PRAGMA journal", "PRAGMA sync")):
            die_in_time()
        if POINT == "checkpoint" and "PASSIVE" in statement:
            die_in_time()
        return result

    def executescript(self, script: str) -> sqlite3.Cursor:
        result = super().executescript(script)
        if POINT == "opening":
            die_in_time()
        return result


async def work() -> None:
    """Accept, complete, send and forget for ever."""
    spool = Spool(config.Spool(path=DIRECTORY), reactor=reactor, wall=time.time)
    await spool.open()
    if POINT == "opening":
        os.kill(os.getpid(), signal.SIGKILL)
    reader = spool.outbox.reader(Lane.EVENT)
    number = 0
    while True:
        waiting: list[defer.Deferred[Any]] = []
        for _ in range(9):
            number += 1
            name = f"e{number}"
            body = b"x" * (50_000 if POINT == "checkpoint" else 100)
            put = spool.outbox.put(lane=Lane.EVENT, kind="note", id=name, body=body)
            waiting.append(put.addCallback(lambda _, name=name: say(f"A {name}")))
        number += 1
        answer = await spool.inbox.accept(id=f"c{number}", digest="d", body=b"run")
        assert isinstance(answer, Accepted)
        await spool.inbox.offered([answer.command.key])
        done = spool.inbox.complete(
            key=answer.command.key, command_id=f"c{number}", status="success", result_id=f"r{number}", body=b"done"
        )
        waiting.append(done.addCallback(lambda _, name=f"r{number}": say(f"A {name}")))
        entries = reader.take(4, 1 << 20)
        forgotten = spool.outbox.forget(entry.seq for entry in entries)
        waiting.append(forgotten.addCallback(lambda _, got=entries: [say(f"F {entry.id}") for entry in got]))
        await defer.gatherResults(waiting)


real_connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: real_connect(*args, factory=Watched, **options)  # type: ignore[assignment]
if __name__ == "__main__":
    from twisted.internet import reactor

    task.react(lambda _: defer.Deferred.fromCoroutine(work()))
