"""The spool as the rest of commsmgr sees it: opened, closed, an outbox and an inbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime

from commsmgr import config
from commsmgr.spool.executor import Executor, InlineExecutor, ThreadExecutor
from commsmgr.spool.inbox import Inbox
from commsmgr.spool.outbox import Outbox
from commsmgr.spool.records import Opened, StoredCommand
from commsmgr.spool.store import Store
from commsmgr.spool.writer import Outcome, Writer


class Spool:
    """
    What must not be lost. Making one opens nothing.

    :param reactor: for time, and, unless ``durability`` is ``memory``, for threads.
    :param wall: seconds since the epoch.
    :param executor: does what may block; None: one thread, or for ``memory`` none at all.
    :ivar trouble: what is wrong with the disk or the database, for operators; empty when all is well. The next success
        ends it, but for damage, which ends when the spool is closed. May be read from any thread.
    """

    def __init__(
        self,
        settings: config.Spool,
        *,
        reactor: IReactorTime,
        wall: Callable[[], float],
        executor: Executor | None = None,
    ) -> None:
        if executor is None:
            in_memory = settings.durability == "memory"
            executor = InlineExecutor(reactor) if in_memory else ThreadExecutor(cast(IReactorFromThreads, reactor))
        self.trouble = ""
        self.outbox = Outbox(settings, wall)
        self.inbox = Inbox(settings, wall, self.outbox)
        self._store = Store(Writer(settings, wall), executor, reactor, self._after_batch)
        self.outbox.attach(self._store)
        self.inbox.attach(self._store)
        self._turn = DeferredLock()
        self._opened: Opened | None = None

    def open(self) -> Deferred[Opened]:
        """
        Open the spool; a damaged, foreign or newer one is set aside and an empty one begun.

        :return: what was found; when it is open already, what was found then. Fails with SpoolLocked when another
            process has it, with SpoolWriteFailed when the disk does not allow it. Cancelling it does not stop it.
        """
        return self._turn.run(lambda: Deferred.fromCoroutine(self._open()))

    def close(self) -> Deferred[None]:
        """
        Refuse new work, finish and commit what was handed over, release the lock. Idempotent; :meth:`open` works again.

        :return: fires when that is done. On a disk that hangs it does not: whoever waits should have a deadline, after
            which the process may end, for nothing that was said to be accepted depends on it.
        """
        return self._turn.run(lambda: Deferred.fromCoroutine(self._close()))

    async def _open(self) -> Opened:
        if self._opened is None:
            aside = await self._store.open()
            interrupted: list[StoredCommand] = []
            waiting: list[StoredCommand] = []
            try:
                unfinished = await self.inbox.unfinished()
            except BaseException:
                await self._store.close()
                raise
            for command, whole in unfinished:
                (interrupted if command.offered or not whole else waiting).append(command)
            self.outbox.start()
            self._opened = Opened(aside, tuple(interrupted), tuple(waiting))
        return self._opened

    async def _close(self) -> None:
        await self._store.close()
        self.outbox.stop()
        self.trouble = ""
        self._opened = None

    def _after_batch(self, outcome: Outcome) -> None:
        self.trouble = outcome.trouble
        self.inbox.after_batch(outcome)
        self.outbox.after_batch(outcome)
