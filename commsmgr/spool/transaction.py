"""One transaction: the jobs of a batch, in order, and what is left when it fails. Runs within an executor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct
from twisted.python.failure import Failure

from commsmgr.errors import CommsError, SpoolWriteFailed
from commsmgr.spool.batch import Work
from commsmgr.spool.books import Books
from commsmgr.spool.faults import ERRORS


class Attempt(Struct):
    """
    What became of a transaction.

    :ivar results: of the jobs, as far as it came; a Failure for one that decided so before it wrote.
    :ivar error: what has kept it from being committed, if something has.
    :ivar commit: the number of its commit, once it came so far; None as well when there was nothing to commit.
    :ivar rows: that were changed.
    :ivar size: bytes of bodies that were written.
    """

    results: list[Any]
    error: Exception | None = None
    commit: int | None = None
    rows: int = 0
    size: int = 0


def transact(books: Books, jobs: Sequence[Work]) -> Attempt:
    """
    Do ``jobs`` in one transaction, and undo it when it fails: then the totals are those of the last commit again, or
    :attr:`.Books.stale` says that this could not be done.
    """
    attempt = Attempt([])
    try:
        books.db.execute("BEGIN IMMEDIATE")
        _do(books, jobs, attempt)
    except BaseException as error:
        books.stale = True
        with suppress(*ERRORS):
            undo(books)
        if not isinstance(error, Exception):
            raise
        attempt.error = error
    return attempt


def undo(books: Books) -> None:
    """
    Undo the transaction, of which nothing is known to be left when this returns.

    :raise sqlite3.Error: it cannot be undone; also MemoryError.
    """
    if books.db.in_transaction:
        books.db.execute("ROLLBACK")
    books.reload()


def _do(books: Books, jobs: Sequence[Work], attempt: Attempt) -> None:
    db, results, size = books.db, attempt.results, 0
    before = db.total_changes
    for job in jobs:
        try:
            if books.nothing_new and not job.essential:
                raise SpoolWriteFailed(books.nothing_new)
            results.append(job.work(books))
            size += job.size
        except CommsError:
            results.append(Failure())
    books.flush()
    attempt.rows, attempt.size = db.total_changes - before, size
    if attempt.rows:
        attempt.commit = books.write_counter()
    # Once a read has met damage SQLite commits this transaction no more, though there be nothing to commit.
    db.execute("COMMIT" if attempt.rows or not books.damaged else "ROLLBACK")
