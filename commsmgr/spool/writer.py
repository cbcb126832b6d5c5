"""
The one that writes: owns the connection, the lock and every transaction. Runs wholly within an executor.

Theory of operation
===================

A batch is one transaction. Its jobs are done in the order in which they were handed over, so that whatever one job
reads includes all that earlier jobs wrote, and nobody is told of an outcome before COMMIT has returned. With
``synchronous = FULL`` that return means that the write-ahead log was flushed to the disk.

What a crash means: before the flush, nothing of the batch is there, and nobody was told otherwise. After it and before
the outcome was told, all of it is there although nobody knows: an entry is sent although its submitter never heard of
success, a command waits in the inbox although it was never acknowledged. Both are what "at least once" allows.

What goes wrong without a crash. A job that raises a :class:`CommsError` decided so before it wrote; the batch goes on
without it. Everything else undoes the transaction (see :mod:`.transaction`), and what is done then depends on the
:class:`.Cause`:

* ``MISTAKE``, a job raises something of another kind: the jobs are done again one by one, so that it fails alone.
* ``FULL``: the ballast (see :mod:`.ballast`) gives room, and the batch is tried again.
* ``DISK``: whether the batch is in the database is not known, for a log frame whose flush failed can come back at the
  next recovery. The connection is closed and opened again, which recovers; then the number of the last commit, which is
  kept in the database, says whether the batch is in. If not, it is tried once more. If even that fails, its jobs fail
  with :class:`SpoolWriteFailed`, the connection stays closed, and the next batch tries to open it again.
* ``PART``, that cannot be read, and still cannot when opened anew: the jobs are done one by one, so that only those
  fail that touch it. ``DISK`` is not borne so: the disk may fail altogether, and each attempt cost seconds. When memory
  runs out it is done likewise, for one job may take more of it than the others. A database in memory is never opened
  anew, for it is all there is; when a transaction cannot even be undone, that is done before the next one.
* ``TORN``, and still so when opened anew: the jobs are done one by one, so that only those fail that touch the damaged
  part. From then on pages leave out what cannot be read, and the spool stays in trouble until it is opened anew: a mark
  beside the database has the next opening take over what can be read (see :mod:`.opening`).

A file of the spool that is removed or replaced under the running agent fails nothing by itself: nothing new is taken
any more, and what is open is not let go, for it is all that is left (see :mod:`.presence`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import SpoolError, SpoolLocked, SpoolUnusable, SpoolWriteFailed
from commsmgr.spool import ballast, directory, files
from commsmgr.spool.ballast import Ballast
from commsmgr.spool.batch import Outcome, Work
from commsmgr.spool.books import Books
from commsmgr.spool.faults import ERRORS, Cause, cause_of, code, in_words, is_full, is_unreadable
from commsmgr.spool.opening import Opening, disconnect
from commsmgr.spool.presence import Presence
from commsmgr.spool.replacing import SetAside
from commsmgr.spool.transaction import Attempt, transact, undo
from commsmgr.spool.trouble import Trouble

CHECKPOINT_BYTES: Final = 4 << 20
"""The log is folded into the database when about this much was written to it, after the outcome was told."""

_NO_ROOM: Final = (
    "the disk that holds the spool is full:"
    f" what could wait is refused until {2 * ballast.SIZE >> 20} MiB of it are free"
)

_REPAIR: Final = (
    "; where that is a part that cannot be read, and will not be again, commsmgr spool repair takes over what can be"
)

_ROW_BYTES: Final = 256
_BATCH_BYTES: Final = 8 << 10


class Writer:
    """
    :param wall: seconds since the epoch.
    """

    log = Logger()

    def __init__(self, settings: config.Spool, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._in_memory = settings.durability == "memory"
        path = ":memory:" if self._in_memory else os.path.join(os.path.abspath(settings.path), files.DATABASE)
        self._directory = os.path.dirname(path)
        self._opening = Opening(path, settings, wall)
        self._ballast = None if self._in_memory else Ballast(self._directory)
        self._presence = Presence(path)
        self._trouble = Trouble(self._directory, wall)
        self._lock: int | None = None
        self._books: Books | None = None
        self._reopened = False
        self._partly = False
        self._nothing_new = ""
        self._written = 0

    # -- opening and closing

    def open(self) -> SetAside | None:
        """
        Take the lock and open the database, a new one if what is there cannot be used.

        :return: what was set aside, or None.
        :raise SpoolLocked: another process has it, with or without the lock.
        :raise SpoolUnusable: the path cannot be used, and waiting cannot help.
        :raise SpoolWriteFailed: the disk does not let us, now.
        """
        self._trouble = Trouble(self._directory, self._wall)
        if self._ballast is None:
            self._books = self._opening.connect()
            return None
        try:
            directory.make(self._directory)
            directory.require_private(self._directory)
            self._lock = files.lock(self._directory)
            try:
                self._books, aside = self._opening.open()
            except (*ERRORS, OSError) as error:
                if not is_full(error):
                    raise
                # What the run before has kept for the worst moment.
                self._ballast.drop()
                self._books, aside = self._opening.open()
        except (*ERRORS, OSError) as error:
            self.close()
            if isinstance(error, sqlite3.Error) and code(error) == sqlite3.SQLITE_BUSY:
                raise SpoolLocked(f"the database in {self._directory} is in use by another program") from error
            if isinstance(error, OSError) and files.cannot_heal(error):
                raise SpoolUnusable(f"the spool in {self._directory} cannot be used: {error}") from error
            fact = f"the spool in {self._directory} cannot be opened: {in_words(error)}"
            raise SpoolWriteFailed(fact + _REPAIR if is_unreadable(error) else fact) from error
        except BaseException:
            self.close()
            raise
        self._ballast.restore()
        self._presence.opened()
        return aside

    def close(self) -> None:
        """Close the database and release the lock. Never fails: what is committed is safe."""
        self._disconnect()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _disconnect(self) -> None:
        books, self._books = self._books, None
        if books is not None:
            disconnect(books)
            self._presence.closed()

    def _connect(self) -> Books:
        if not self._in_memory:
            self._presence.require()
        return self._opening.connect(damaged=self._trouble.damaged)

    # -- a batch

    def run(self, jobs: Sequence[Work]) -> Outcome:
        """Do ``jobs`` in one transaction. Never raises."""
        self._partly = False
        return self._outcome(self._run(jobs))

    def _outcome(self, results: list[Any]) -> Outcome:
        failed = next((each.value for each in results if _is_refused(each)), None)
        # Whoever is told looks at once: on a disk that fails a batch each time, that would go round without a pause.
        reopened = self._reopened and self._books is not None and failed is None
        self._reopened &= not reopened
        counter, oldest = None, None
        if self._books is not None and not self._books.stale:
            counter = self._books.snapshot()
            with suppress(*ERRORS):  # it may be in a damaged part
                oldest = self._books.oldest_event_at()
        if failed is not None:
            self._trouble.failed(failed.fact)
        elif self._nothing_new:
            self._trouble.failed(self._nothing_new)
        else:
            self._trouble.succeeded()
        return Outcome(
            results,
            counter,
            oldest,
            reopened,
            self._written >= CHECKPOINT_BYTES,
            self._trouble.text,
            self._trouble.damaged or self._partly,
        )

    def _run(self, jobs: Sequence[Work]) -> list[Any]:
        attempt = self._with_recovery(jobs)
        if (error := attempt.error) is None:
            return attempt.results
        match cause_of(error):
            case Cause.TORN:
                self._found_damage(str(error))
                if self._books is not None:
                    self._books.damaged = True
                    return self._one_by_one(jobs)
            case Cause.PART if self._books is not None:
                self._partly = True
                return self._one_by_one(jobs)
            case Cause.MISTAKE if len(jobs) > 1:
                # One of the jobs cannot be done at all. Done one by one, it fails alone.
                return [self._run([job])[0] for job in jobs]
        return [Failure(_typed(error))] * len(jobs)

    def _found_damage(self, reason: str) -> None:
        if self._trouble.found_damage(reason) and self._ballast is not None:
            files.mark(self._directory, reason)

    def _one_by_one(self, jobs: Sequence[Work]) -> list[Any]:
        """Do each of ``jobs`` in a transaction of its own, on this connection: it is new, and that did not help."""
        results: list[Any] = []
        for job in jobs:
            attempt = self._attempt([job])
            if attempt.error is None:
                results += attempt.results
                continue
            self._forgo(attempt)
            results.append(Failure(_typed(attempt.error)))
            if self._books is None:  # it fails altogether: whatever else is tried would only take its time
                break
        return results + results[-1:] * (len(jobs) - len(results))

    def _with_recovery(self, jobs: Sequence[Work]) -> Attempt:
        """Do ``jobs``, and where the disk is to blame for a failure do what may help, and try once more."""
        attempt = self._attempt(jobs)
        if attempt.error is None or (cause := cause_of(attempt.error)) is Cause.MISTAKE:
            return attempt
        if self._trouble.worth_a_line():
            self.log.warn(
                "The spool could not be read or written ({reason}); trying again.",
                event="spool.write-failed",
                reason=in_words(attempt.error),
            )
        if self._in_memory or (self._trouble.damaged and cause is Cause.TORN):
            return attempt
        if cause is Cause.FULL:
            self._make_room()
        else:
            try:
                if self._recovered(attempt):
                    return Attempt(attempt.results)
            except Exception as error:
                return Attempt([], error)
        again = self._attempt(jobs)
        self._forgo(again)
        return again

    def _attempt(self, jobs: Sequence[Work]) -> Attempt:
        """Do ``jobs`` in one transaction, once, on a connection that is opened if need be."""
        try:
            books = self._ready()
        except Exception as error:
            return Attempt([], error)
        attempt = transact(books, jobs)
        if books.stale and not self._in_memory:
            self._disconnect()  # the totals in memory are those of a batch that was undone
        if attempt.error is None and attempt.rows:
            self._written += attempt.size + attempt.rows * _ROW_BYTES + _BATCH_BYTES
            if self._nothing_new:
                self._give_back()
        return attempt

    def _ready(self) -> Books:
        """Return the books, ready for a transaction."""
        if self._books is None:
            self._books = self._connect()
            self._reopened = True
        if self._books.stale:
            undo(self._books)
        self._nothing_new = self._books.nothing_new = self._why_nothing_new()
        return self._books

    def _forgo(self, failed: Attempt) -> None:
        """
        Close the database if what was written may be in it all the same, which only the next recovery tells.

        Should it come back it must not be taken for the next batch, with the same number.
        """
        if failed.error is None or self._in_memory:
            return
        cause = cause_of(failed.error)
        if cause is Cause.DISK or (cause is Cause.PART and failed.commit is not None):
            self._disconnect()

    def _why_nothing_new(self) -> str:
        """Return why what could wait is to be refused now, or nothing."""
        if self._ballast is None:
            return ""
        missing = self._presence.missing()
        if missing and missing != self._nothing_new:
            self.log.critical("{reason}", event="spool.file-gone", reason=missing)
        return missing or ("" if self._ballast.restore() else _NO_ROOM)

    def _recovered(self, attempt: Attempt) -> bool:
        """Open the database anew, and say whether the batch that was being committed is in it after all."""
        self._presence.require()
        self._disconnect()
        self._books = self._connect()
        self._reopened = True
        return attempt.commit is not None and self._books.counter.commits == attempt.commit

    # -- room

    def checkpoint(self) -> None:
        """Fold the log into the database, so that it begins anew; when that fails the log just grows on."""
        self._written = 0
        if self._books is not None:
            try:
                self._books.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except ERRORS as error:
                if self._trouble.worth_a_line():  # on a full disk it is tried with each batch
                    self.log.warn(
                        "The spool's checkpoint failed: {reason}",
                        event="spool.checkpoint-failed",
                        reason=in_words(error),
                    )

    def _make_room(self) -> None:
        if self._ballast is not None:
            self._ballast.drop()
        self.checkpoint()

    def _give_back(self) -> None:
        """Return freed pages to the disk, which is the only way for a full one to recover by our own doing."""
        assert self._books is not None
        db = self._books.db
        with suppress(*ERRORS):
            (free,) = db.execute("PRAGMA freelist_count").fetchone()
            if free >= 256:
                # Through execute() this would free a single page.
                db.executescript("PRAGMA incremental_vacuum(1024)")
                self.checkpoint()


def _is_refused(result: Any) -> bool:
    """Say whether a job's result is that the disk did not let it be done."""
    return isinstance(result, Failure) and isinstance(result.value, SpoolWriteFailed)


def _typed(error: Exception) -> SpoolError:
    if cause_of(error) is not Cause.MISTAKE:
        return SpoolWriteFailed(f"the spool cannot be read or written: {in_words(error)}")
    return SpoolError(f"the spool cannot take this: {error}")
