"""What the writer is given to do at once, and what became of it."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec import Struct

from commsmgr.spool.books import Books
from commsmgr.spool.counter import Counter


class Work(Protocol):
    """What the writer needs to know of a job."""

    size: int
    essential: bool

    def work(self, books: Books) -> Any: ...


class Outcome(Struct, frozen=True):
    """
    What became of a batch.

    :ivar results: one for each job, a Failure where it failed.
    :ivar counter: the totals, None when there is no database to ask.
    :ivar reopened: the database was opened anew: entries may be in it of which nobody was told.
    :ivar checkpoint: it is time for :meth:`~commsmgr.spool.writer.Writer.checkpoint`.
    :ivar trouble: what is wrong with the disk or the database now, for operators; empty when all is well.
    :ivar partly: whether the jobs that failed touch what is damaged or cannot be had, and others can be done.
    """

    results: list[Any]
    counter: Counter | None
    oldest_event_at: float | None
    reopened: bool
    checkpoint: bool
    trouble: str = ""
    partly: bool = False
