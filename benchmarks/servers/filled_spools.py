"""
Spools on disk in which events wait, made once for all contenders and rounds of a benchmark: to make them takes longer
than the work itself.

It says in which directory (``spools``) each of them has one with the number of its events as its name.
"""

from __future__ import annotations

import os
import signal
import time

import msgspec

from commsmgr import config
from commsmgr.spool.books import Books
from commsmgr.spool.writer import Writer

QUEUED = (1000, 10_000, 100_000, 1_000_000)
SIZE = 300
BATCH = 1000


class _Put:
    """Adds events, as a job of the spool's writer."""

    essential = False
    size = BATCH * SIZE

    def __init__(self, first: int) -> None:
        self._first = first

    def work(self, books: Books) -> None:
        """Add them."""
        for number in range(self._first, self._first + BATCH):
            books.add_event("command_result", f"{number:032x}", b"r" * SIZE, time.time(), None)


def fill(path: str, queued: int) -> None:
    """Make the spool ``path`` with as many events."""
    writer = Writer(config.Spool(path=path), time.time)
    writer.open()
    for first in range(0, queued, BATCH):
        outcome = writer.run([_Put(first)])
        if outcome.trouble or outcome.counter is None or outcome.counter.events != first + BATCH:
            raise RuntimeError(f"the spool cannot be filled: {outcome}")
        if outcome.checkpoint:
            writer.checkpoint()
    writer.close()


def main() -> None:
    """Make them, say where, and wait to be killed."""
    for queued in QUEUED:
        fill(str(queued), queued)
    print(msgspec.json.encode({"spools": os.getcwd()}).decode(), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
