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

What goes wrong without a crash:

* A job raises a :class:`CommsError`: it decided so before it wrote; the batch goes on without it.
* A job raises anything else: the transaction is undone and the jobs are done again one by one, so that it fails alone.
* The disk is full: the transaction is undone, the ballast (see :mod:`.ballast`) gives room, and the batch is tried
  again.
* The disk fails: whether the batch is in the database is not known, for a log frame whose flush failed can come back at
  the next recovery. The connection is closed and opened again, which recovers; then the number of the last commit,
  which is kept in the database, says whether the batch is in. If not, it is tried once more. If even that fails, its
  jobs fail with :class:`SpoolWriteFailed`, the connection stays closed, and the next batch tries to open it again.
* A part of the database cannot be read, and still cannot when opened anew: the jobs are done one by one, so that only
  those fail that touch it. No other error is borne so: the disk may fail altogether, and each attempt cost seconds.
* Memory runs out: likewise, for one job may take more of it than the others. A database in memory is never opened anew,
  for it is all there is; when a transaction cannot even be undone, that is done before the next one.
* A file of the spool is removed or replaced under the running agent: nothing new is taken any more, and what is open is
  not let go, for it is all that is left (see :mod:`.presence`).
* The database is damaged, and still is when opened anew: the jobs are done one by one, so that only those fail that
  touch the damaged part. From then on pages leave out what cannot be read, and the spool stays in trouble until it is
  opened anew: a mark beside the database has the next opening take over what can be read (see :mod:`.opening`).
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
from commsmgr.errors import CommsError, SpoolError, SpoolLocked, SpoolUnusable, SpoolWriteFailed
from commsmgr.spool import ballast, directory, files
from commsmgr.spool.ballast import Ballast
from commsmgr.spool.batch import Outcome, Work
from commsmgr.spool.books import Books
from commsmgr.spool.faults import ERRORS, code, in_words, is_full, is_torn, is_trouble, is_unreadable, may_be_partial
from commsmgr.spool.opening import Opening, disconnect
from commsmgr.spool.presence import Presence
from commsmgr.spool.replacing import SetAside
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
        self._attempted: int | None = None
        self._reopened = False
        self._partly = False
        self._not_undone = False
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
        self._not_undone = False
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
        if self._books is not None and not self._not_undone:
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
        try:
            return self._with_recovery(jobs)
        except Exception as error:
            if is_torn(error):
                self._found_damage(str(error))
                if self._books is not None:
                    self._books.damaged = True
                    return self._one_by_one(jobs)
            elif may_be_partial(error) and self._books is not None:
                self._partly = True
                return self._one_by_one(jobs)
            if len(jobs) == 1 or is_trouble(error):
                return [Failure(_typed(error))] * len(jobs)
        # One of the jobs cannot be done at all. Done one by one, it fails alone.
        return [self._run([job])[0] for job in jobs]

    def _found_damage(self, reason: str) -> None:
        if self._trouble.found_damage(reason) and self._ballast is not None:
            files.mark(self._directory, reason)

    def _one_by_one(self, jobs: Sequence[Work]) -> list[Any]:
        results: list[Any] = []
        for job in jobs:
            results.append(self._alone(job))
            if self._books is None:  # it fails altogether: whatever else is tried would only take its time
                break
        return results + results[-1:] * (len(jobs) - len(results))

    def _alone(self, job: Work) -> Any:
        """Do ``job`` in a transaction of its own, and on this connection: it was opened anew, and that did not help."""
        results: list[Any] = []
        try:
            self._transaction([job], results)
            return results[0]
        except Exception as error:
            if self._may_come_back(error):
                self._disconnect()  # whether it is in the database only the next recovery tells
            return Failure(_typed(error))

    def _with_recovery(self, jobs: Sequence[Work]) -> list[Any]:
        results: list[Any] = []
        try:
            self._transaction(jobs, results)
            return results
        except (*ERRORS, OSError) as error:
            if not is_trouble(error):
                raise
            if self._trouble.worth_a_line():
                self.log.warn(
                    "The spool could not be read or written ({reason}); trying again.",
                    event="spool.write-failed",
                    reason=in_words(error),
                )
            if self._in_memory or (self._trouble.damaged and is_torn(error)):
                raise
            trouble = error
        if is_full(trouble):
            self._make_room()
        elif self._recovered():
            return results
        results = []
        try:
            self._transaction(jobs, results)
        except ERRORS as error:
            if self._may_come_back(error):
                # What was written may yet come back, and must not be taken for the next batch, with the same number.
                self._disconnect()
            raise
        return results

    def _may_come_back(self, error: Exception) -> bool:
        """Say whether what was written before ``error`` may be in the database all the same."""
        if self._in_memory or not is_trouble(error) or is_full(error) or is_torn(error):
            return False
        return self._attempted is not None or not may_be_partial(error)

    def _transaction(self, jobs: Sequence[Work], results: list[Any]) -> None:
        self._attempted = None
        if self._books is None:
            self._books = self._connect()
            self._reopened = True
        books, db = self._books, self._books.db
        if self._not_undone:
            self._undo(books)
        self._nothing_new = books.nothing_new = self._why_nothing_new()
        changes = db.total_changes
        db.execute("BEGIN IMMEDIATE")
        try:
            size = 0
            for job in jobs:
                try:
                    if self._nothing_new and not job.essential:
                        raise SpoolWriteFailed(self._nothing_new)
                    results.append(job.work(books))
                    size += job.size
                except CommsError:
                    results.append(Failure())
            books.flush()
            changed = db.total_changes - changes
            if changed:
                self._attempted = books.write_counter()
            # Once a read has met damage SQLite commits this transaction no more, though there be nothing to commit.
            db.execute("COMMIT" if changed or not books.damaged else "ROLLBACK")
        except BaseException:
            self._not_undone = True
            with suppress(*ERRORS):
                self._undo(books)
            if self._not_undone and not self._in_memory:
                self._disconnect()  # the totals in memory are those of a batch that was undone
            raise
        if changed:
            self._written += size + changed * _ROW_BYTES + _BATCH_BYTES
            if self._nothing_new:
                self._give_back()

    def _undo(self, books: Books) -> None:
        """Undo the transaction, of which nothing is known to be left when this returns."""
        if books.db.in_transaction:
            books.db.execute("ROLLBACK")
        books.reload()
        self._not_undone = False

    def _why_nothing_new(self) -> str:
        """Return why what could wait is to be refused now, or nothing."""
        if self._ballast is None:
            return ""
        missing = self._presence.missing()
        if missing and missing != self._nothing_new:
            self.log.critical("{reason}", event="spool.file-gone", reason=missing)
        return missing or ("" if self._ballast.restore() else _NO_ROOM)

    def _recovered(self) -> bool:
        """Open the database anew, and say whether the batch that was being committed is in it."""
        self._presence.require()
        self._disconnect()
        self._books = self._connect()
        self._reopened = True
        return self._attempted is not None and self._books.counter.commits == self._attempted

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
    if is_trouble(error):
        return SpoolWriteFailed(f"the spool cannot be read or written: {in_words(error)}")
    return SpoolError(f"the spool cannot take this: {error}")
