"""What was given up, until the backend has been told: counted durably, reported in one receipt at a time."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from commsmgr.spool.batch import Outcome
from commsmgr.spool.books import Books
from commsmgr.spool.records import LossReceipt
from commsmgr.spool.store import Job, Store


class Losses:
    """
    Made by :class:`commsmgr.spool.Spool`. Both Deferreds fire after the commit, and wait as long as the disk fails;
    cancelling one undoes nothing. They fail with NotRunning unless the spool is open.

    :ivar unreported: how many losses no acknowledged receipt has told of, as of the last commit.
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

    def receipt(self, new_id: str) -> Deferred[LossReceipt | None]:
        """
        Return the outstanding receipt, across restarts the same one; without one, make it of all that was counted.

        :param new_id: the id of one that has to be made.
        :return: None when nothing was lost that the backend does not know.
        """
        return self._store.submit(_Receipt(new_id, self._wall()))

    def forget(self, id: str) -> Deferred[None]:
        """Take note that the backend knows this receipt, or never will; an unknown id is ignored."""
        return self._store.submit(_Forget(id))

    def after_batch(self, outcome: Outcome) -> None:
        """Take over the total, and tell who listens."""
        if outcome.counter is not None and outcome.counter.losses != self.unreported:
            self.unreported = outcome.counter.losses
            if self.on_change is not None:
                with self.log.failuresHandled("A listener of losses failed.", event="spool.listener-failed"):
                    self.on_change()


class _Receipt(Job):
    __slots__ = ("new_id", "now")
    essential = True
    persistent = True

    def __init__(self, new_id: str, now: float) -> None:
        self.new_id, self.now = new_id, now

    def work(self, books: Books) -> LossReceipt | None:
        with books.lenient():
            return books.lossbook.receipt(self.new_id, self.now)


class _Forget(Job):
    __slots__ = ("id",)
    essential = True
    persistent = True

    def __init__(self, id: str) -> None:
        self.id = id

    def work(self, books: Books) -> None:
        books.counter.losses = books.lossbook.forget(self.id)
