"""The spool as the rest of commsmgr sees it: opened, closed, an outbox and an inbox."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime

from commsmgr import config
from commsmgr.errors import NotRunning, SpoolError, SpoolWriteFailed
from commsmgr.spool.batch import Outcome
from commsmgr.spool.executor import Executor, InlineExecutor, ThreadExecutor
from commsmgr.spool.inbox import Inbox
from commsmgr.spool.losses import Losses
from commsmgr.spool.outbox import Outbox
from commsmgr.spool.records import Opened, StoredCommand
from commsmgr.spool.replacing import SetAside
from commsmgr.spool.resting import RestingWriter
from commsmgr.spool.store import Store
from commsmgr.spool.writer import Writer


class Spool:
    """
    What must not be lost. Making one opens nothing.

    :param reactor: for time, and, unless ``durability`` is ``memory``, for threads.
    :param wall: seconds since the epoch.
    :param executor: does what may block; None: one thread, or for ``memory`` none at all.
    :ivar trouble: what is wrong with the disk or the database, for operators; empty when all is well. The next success
        ends it, but for damage, which ends when the spool is closed. May be read from any thread.
    :ivar on_resurfaced: called with the unfinished commands that a failing disk has accepted although it had seemed not
        to, when it works again.
    """

    def __init__(
        self,
        settings: config.Spool,
        *,
        reactor: IReactorTime,
        wall: Callable[[], float],
        executor: Executor | None = None,
    ) -> None:
        in_memory = settings.durability == "memory"
        if executor is None:
            executor = InlineExecutor(reactor) if in_memory else ThreadExecutor(reactor)
        # Where SQLite is older than 3.36 or made without it, a database cannot be had as bytes, and stays open.
        rests = in_memory and hasattr(sqlite3.Connection, "serialize")
        writer = (RestingWriter if rests else Writer)(settings, wall)
        self.trouble = ""
        self.on_resurfaced: Callable[[Opened], object] | None = None
        self.outbox = Outbox(settings, wall)
        self.inbox = Inbox(settings, wall, self.outbox)
        self.losses = Losses(wall)
        self._store = Store(writer, executor, reactor, self._after_batch)
        self.outbox.attach(self._store)
        self.inbox.attach(self._store)
        self.losses.attach(self._store)
        self._turn = DeferredLock()
        self._opened: Opened | None = None
        self._aside: SetAside | None = None

    def open(self) -> Deferred[Opened]:
        """
        Open the spool; a damaged, foreign or newer one is set aside and a new one begun, with what can be read of a
        damaged one.

        :return: what was found; when it is open already, what was found then. Fails with SpoolLocked when another
            process has it, with SpoolUnusable when the path is wrong, with SpoolWriteFailed when the disk does not
            allow it now: :attr:`trouble` says so until it does, or the spool is closed. Cancelling it has
            it closed again, which waits for the disk.
        """
        return self._turn.run(lambda: Deferred.fromCoroutine(self._open()))

    def close(self) -> Deferred[None]:
        """
        Refuse new work, finish and commit what was handed over, release the lock. Idempotent; :meth:`open` works again.

        :return: fires when that is done. On a disk that hangs it does not: whoever waits should have a deadline, after
            which the process may end, for nothing that was said to be accepted depends on it. Cancelling it only stops
            waiting: where the process goes on, the lock is released as soon as the disk goes on.
        """
        return self._turn.run(lambda: Deferred.fromCoroutine(self._close()))

    def answer(self) -> Deferred[None]:
        """
        Fire when the writer has come round; at once when the spool is not open. Never fails. Cancelling is harmless.

        A disk that is full or fails lets the writer answer, one that hangs does not.
        """
        return self._store.answer()

    async def _open(self) -> Opened:
        if self._opened is None:
            try:
                # Where the rest of the start fails the next one finds nothing to be set aside, and still has to tell.
                self._aside = await self._store.open() or self._aside
            except SpoolWriteFailed as error:
                self.trouble = error.fact
                raise
            try:
                # In one batch with what the outbox's readers begin with.
                asked = self.inbox.unfinished()
                self.outbox.start()
                unfinished = await asked
            except BaseException:
                self.outbox.stop()
                await self._store.close()
                raise
            aside, self._aside = self._aside, None
            self._opened = Opened(
                None if aside is None else aside.name,
                *_parted(unfinished),
                None if aside is None else aside.salvaged,
            )
        return self._opened

    async def _close(self) -> None:
        try:
            await self._store.close()
        finally:  # it goes on when nobody waits for it any more
            self.outbox.stop()
            self.inbox.stop()
            self.trouble = ""
            self._opened = None

    def _after_batch(self, outcome: Outcome) -> None:
        self.trouble = outcome.trouble
        self.inbox.after_batch(outcome)
        self.outbox.after_batch(outcome)
        self.losses.after_batch(outcome)
        if outcome.reopened:
            # Should this fail with the disk, it is opened anew once more, and comes here again.
            looking = self.inbox.resurfaced().addCallback(self._resurfaced)
            looking.addErrback(lambda failure: failure.trap(SpoolError, NotRunning))

    def _resurfaced(self, unfinished: list[tuple[StoredCommand, bool]]) -> None:
        if unfinished and self.on_resurfaced is not None:
            self.on_resurfaced(Opened(None, *_parted(unfinished)))


def _parted(
    unfinished: list[tuple[StoredCommand, bool]],
) -> tuple[tuple[StoredCommand, ...], tuple[StoredCommand, ...]]:
    """Part commands, each with whether it is whole, into those that may have been begun and those that wait."""
    interrupted = tuple(command for command, whole in unfinished if command.offered or not whole)
    waiting = tuple(command for command, whole in unfinished if whole and not command.offered)
    return interrupted, waiting
