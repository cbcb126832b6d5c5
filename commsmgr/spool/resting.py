"""
The writer of a spool in memory, whose database rests while others are at work.

Theory of operation. An open database takes some 60 kB before anything is in it: SQLite's buffers, the parsed schema,
the prepared statements. As bytes it takes 12 kB, and with nothing in it none, for all begin as the same bytes. So a
process that runs thousands of managers, as a simulator does, has :data:`OPEN` databases open at most, those that were
used last, and the bytes of the others. To open one again takes half a millisecond, which a process with fewer managers
never pays. Those that have nothing yet take turns with a single open one, until one of them writes, and keeps it.

A database rests between two batches only, when no transaction is under way. Spools in memory do their work in one
thread, the reactor's; should a program have several, each has databases of its own open.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, cached_property
from typing import Final

from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool.batch import Outcome, Work
from commsmgr.spool.faults import ERRORS, in_words
from commsmgr.spool.replacing import SetAside
from commsmgr.spool.schema import prepare
from commsmgr.spool.trouble import Trouble
from commsmgr.spool.writer import Writer

OPEN: Final = 128
"""Databases in memory that are open at the same time, besides large ones."""

LARGE: Final = 256 << 10
"""Bytes of a database from which on it stays open: there its contents weigh more than what an open one takes."""


class _Open(threading.local):
    """
    What a thread has open.

    :ivar writers: the one that was used last at the end.
    :ivar empty: a database with nothing in it, which is lent to writers that have nothing.
    """

    def __init__(self) -> None:
        self.writers: dict[RestingWriter, None] = {}
        self.empty: sqlite3.Connection | None = None

    @cached_property
    def source(self) -> sqlite3.Connection:
        """What an image is read by."""
        return sqlite3.connect(":memory:")


_open = _Open()


class RestingWriter(Writer):
    """A writer whose database is in memory, and open only while it is among those that were used last."""

    def __init__(self, settings: config.Spool, wall: Callable[[], float]) -> None:
        super().__init__(settings, wall)
        self._image: bytes | None = None
        self._changes = 0

    def open(self) -> SetAside | None:
        """
        Begin with nothing.

        :raise SpoolWriteFailed: there is no memory.
        """
        self._trouble = Trouble(self._directory, self._wall)
        try:
            self._image = _blank()
        except ERRORS as error:
            raise SpoolWriteFailed(f"a spool in memory cannot be opened: {in_words(error)}") from error
        return None

    def run(self, jobs: Sequence[Work]) -> Outcome:
        """As :meth:`Writer.run`, on a database that was opened for that if need be."""
        lent: sqlite3.Connection | None = None
        if self._books is None and self._image is not None:
            try:
                lent = self._wake(self._image)
            except ERRORS as error:
                return self._cannot_wake(jobs, in_words(error))
        outcome = super().run(jobs)
        books = self._books
        if lent is not None and lent.total_changes == self._changes and books is not None and not books.stale:
            # Most spools of a fleet never have anything in them.
            _open.empty, self._books = lent, None
            return outcome
        opened = _open.writers
        # To the end, whether it was there already or not.
        opened.pop(self, None)
        opened[self] = None
        if len(opened) > OPEN:
            try:
                next(iter(opened)).rest()
            except ERRORS:
                # It stays open. What was committed here must not be told of as if it were not.
                self.log.failure("A spool in memory cannot be put to rest.", event="spool.no-rest")
        return outcome

    def _wake(self, image: bytes) -> sqlite3.Connection | None:
        """Open the database; return it if it is one that is lent."""
        lent: sqlite3.Connection | None = None
        if image is _blank():
            lent, _open.empty = _open.empty or _awake(image), None
        db = lent or _awake(image)
        try:
            self._books, self._changes = self._opening.books(db), db.total_changes
        except BaseException:
            db.close()
            raise
        return lent

    def _cannot_wake(self, jobs: Sequence[Work], reason: str) -> Outcome:
        """Refuse ``jobs`` for now: what is in the spool stays where it is, and the next batch tries again."""
        if self._trouble.worth_a_line():
            self.log.warn(
                "A spool in memory could not be opened ({reason}); trying again.",
                event="spool.write-failed",
                reason=reason,
            )
        refused = Failure(SpoolWriteFailed(f"the spool cannot be read or written: {reason}"))
        return self._outcome([refused] * len(jobs))

    def rest(self) -> None:
        """Close the database, and keep what is in it. Not during :meth:`run`."""
        _open.writers.pop(self, None)
        if self._books is None or self._books.stale:
            return
        db = self._books.db
        (pages,), (size,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        if pages * size >= LARGE:
            return
        if db.total_changes != self._changes:
            self._image = db.serialize()
        self._disconnect()

    def close(self) -> None:
        """Close the database; all that was in it is gone."""
        _open.writers.pop(self, None)
        self._image = None
        super().close()


@cache
def _blank() -> bytes:
    """Return a database in which nothing is."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        prepare(db, synchronous="FULL", in_memory=True)
        return db.serialize()


def _awake(image: bytes) -> sqlite3.Connection:
    """Return a database with that content. Not the one that SQLite makes of bytes, which cannot grow without bound."""
    db = sqlite3.connect(":memory:", isolation_level=None, timeout=0)
    try:
        source = _open.source
        source.deserialize(image)
        (size,) = source.execute("PRAGMA page_size").fetchone()
        db.execute(f"PRAGMA page_size = {size}")
        source.backup(db)
    except BaseException:
        db.close()
        raise
    return db
