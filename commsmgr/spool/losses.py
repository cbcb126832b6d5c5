"""
What was given up, until the backend has been told: counted durably, reported one report at a time.

The jobs for the writer; their statements are in :mod:`.lossbook`. :mod:`commsmgr.loss_reports` sends what is pending.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from commsmgr.spool.batch import Outcome
from commsmgr.spool.books import Books
from commsmgr.spool.records import PendingLossReport
from commsmgr.spool.store import Job, Store


class Losses:
    """
    Made by :class:`commsmgr.spool.Spool`. Both Deferreds fire after the commit, and wait as long as the disk fails;
    cancelling one undoes nothing. They fail with NotRunning unless the spool is open.

    :ivar unreported: how many losses no acknowledged report has told of, as of the last commit.
    :ivar on_change: called after :attr:`unreported` changed.
    """

    log = Logger()

    def __init__(self, wall: Callable[[], float]) -> None:
        self.unreported = 0
        self.on_change: Callable[[], None] | None = None
        self._wall = wall
        self._store: Store

    def attach(self, store: Store) -> None:
        """Use ``store``; called once, by the spool."""
        self._store = store

    def pending_report(self, new_id: str) -> Deferred[PendingLossReport | None]:
        """
        Return the outstanding report, across restarts the same one; without one, make it of all that was counted.

        :param new_id: the id of one that has to be made.
        :return: None when nothing was lost that the backend does not know.
        """
        return self._store.submit(_PendingReport(new_id, self._wall()))

    def forget(self, id: str) -> Deferred[None]:
        """Take note that the backend knows this report, or never will; an unknown id is ignored."""
        return self._store.submit(_Forget(id))

    def after_batch(self, outcome: Outcome) -> None:
        """Take over the total, and tell who listens."""
        if outcome.counter is not None and outcome.counter.losses != self.unreported:
            self.unreported = outcome.counter.losses
            if self.on_change is not None:
                with self.log.failuresHandled("A listener of losses failed.", event="spool.listener-failed"):
                    self.on_change()


class _PendingReport(Job):
    __slots__ = ("new_id", "now")
    essential = True
    persistent = True

    def __init__(self, new_id: str, now: float) -> None:
        self.new_id, self.now = new_id, now

    def work(self, books: Books) -> PendingLossReport | None:
        with books.lenient():
            return books.lossbook.pending_report(self.new_id, self.now)


class _Forget(Job):
    __slots__ = ("id",)
    essential = True
    persistent = True

    def __init__(self, id: str) -> None:
        self.id = id

    def work(self, books: Books) -> None:
        books.counter.losses = books.lossbook.forget(self.id)
