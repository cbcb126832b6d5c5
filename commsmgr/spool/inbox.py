"""
Commands that the backend sent, until they have a result, and after that for as long as duplicates may come.

Theory of operation
===================

============================  ==========================================================================================
step, each one commit         what a crash after it means
============================  ==========================================================================================
:meth:`Inbox.accept`          the command may be acknowledged now; if it was not, it comes again and is a Duplicate
:meth:`Inbox.offered`         the agent may see it now; whether it did nobody knows: ``interrupted`` at the next open
:meth:`Inbox.complete`        it has a result, which is in the outbox by the same commit; it is never offered again
:meth:`Inbox.forget_finished` a duplicate that comes even later would be taken for a new command
============================  ==========================================================================================

A command is the same as another when id *and* digest are, for plain backends make ids that collide. Where either has
no digest (commsmgr.v1, where ids are unique) the id alone decides.

The results of finished commands are remembered, so that a duplicate can be answered with the original. Their bodies may
take a quarter of ``spool.max_bytes`` beside the outbox; those of the commands accepted first give way. A result that is
put again takes room in the outbox as any other: while there is none the duplicate is refused, and may come later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger

from commsmgr import config
from commsmgr.spool.batch import Outcome
from commsmgr.spool.books import SLICE
from commsmgr.spool.inbox_jobs import (
    Accept,
    Complete,
    CountFinished,
    ForgetFinished,
    Known,
    Offered,
    Resurfaced,
    Unfinished,
)
from commsmgr.spool.outbox import Outbox
from commsmgr.spool.records import Accepted, Duplicate, StoredCommand
from commsmgr.spool.store import Store

MAX_FINISHED: Final = 1_000_000
"""Finished commands that are remembered, at some 200 to 350 bytes each; to count so many takes 50 ms."""


class Inbox:
    """
    Made by :class:`commsmgr.spool.Spool`. All Deferreds fire after the commit; cancelling one undoes nothing. All fail
    with NotRunning unless the spool is open, and with SpoolWriteFailed when the disk does not take it.

    :ivar open_count: commands accepted and not finished, as of the last commit.
    :ivar on_completed: called, once per batch, with how many results :meth:`complete` has accepted and the bytes of
        their bodies.
    """

    log = Logger()

    def __init__(self, settings: config.Spool, wall: Callable[[], float], outbox: Outbox) -> None:
        self.open_count = 0
        self.on_completed: Callable[[int, int], None] | None = None
        self._settings = settings
        self._wall = wall
        self._outbox = outbox
        self._store: Store
        self._told: set[int] = set()
        # On a disk those of an earlier run.
        self._may_have_finished = self._begins_with_some = settings.durability != "memory"
        self._completed = 0
        self._results = self._result_bytes = 0

    def attach(self, store: Store) -> None:
        """Use ``store``; called once, by the spool."""
        self._store = store

    def accept(self, *, id: str, digest: str, body: bytes) -> Deferred[Accepted | Duplicate]:
        """
        Store a command, unless the same one is known.

        When that one is finished its original result is in the outbox after this, put there again if need be.

        :param digest: made of the content; with ``id`` it identifies the command.
        :return: fails with QueueFull when the outbox has no room for that result: it has to be asked for again later.
        """
        return self._store.submit(Accept(self._outbox, id, digest, body, self._wall(), self._told))

    def known(self, id: str, digest: str) -> Deferred[Duplicate | None]:
        """
        Ask for a command without storing it: the same answer as :meth:`accept` has for one that is known, else None.

        The result of a finished one is in the outbox after this, put there again if need be.
        """
        return self._store.submit(Known(self._outbox, id, digest, self._wall()))

    def offered(self, keys: Iterable[int]) -> Deferred[None]:
        """Take note that the agent is about to see these commands; wait for the Deferred before it does."""
        return self._store.submit(Offered(list(keys)))

    def complete(
        self, *, key: int | None, command_id: str, status: str, result_id: str, body: bytes, ttl: float | None = None
    ) -> Deferred[str]:
        """
        Accept the result of a command: put it into the outbox as an event and mark the command finished, in one commit.

        :param key: the command's; None means the oldest unfinished one with ``command_id``. A result whose command is
            not known at all is accepted as an event all the same.
        :param body: the result, as it will be sent.
        :param ttl: seconds after which the result need not be sent any more.
        :return: ``result_id``. Fails with AlreadyCompleted when the command has a result (without ``key``: when
            all known commands of that id have), with QueueFull at the outbox's bounds, as :meth:`Outbox.put` does, and
            with SpoolWriteFailed on a full disk when the command is not known.
        """
        if (refusal := self._outbox.refusal(len(body))) is not None:
            return fail(refusal)
        now = float(self._wall())
        expires_at = None if ttl is None else now + ttl
        self._may_have_finished = True
        self._completed += 1
        job = Complete(
            self,
            self._outbox,
            key=key,
            command_id=command_id,
            status=status,
            result_id=result_id,
            body=body,
            now=now,
            expires_at=expires_at,
        )
        return self._store.submit(job)

    def completed(self, key: int | None, size: int) -> None:
        """A result of ``size`` bytes is in the database, and its command, if it had one that is known, is finished."""
        if key is not None:
            self._told.discard(key)
        self._results += 1
        self._result_bytes += size

    def forget_finished(self) -> Deferred[int]:
        """
        Forget commands that were finished longer ago than ``spool.remember_commands``, in slices, and of the others
        those that were finished first, beyond :data:`MAX_FINISHED` of them.

        One whose result still waits in the outbox is kept: the backend has every reason to send it again.

        :return: how many.
        """
        return Deferred.fromCoroutine(self._forget_finished())

    async def _forget_finished(self) -> int:
        if not self._may_have_finished:
            return 0
        total, more = 0, True
        while more:
            before = self._wall() - self._settings.remember_commands
            count: int = await self._store.submit(ForgetFinished(before, SLICE))
            total += count
            more = count == SLICE
        completed = self._completed
        left: int = await self._store.submit(CountFinished())
        # An idle spool is not looked into again and again.
        self._may_have_finished = left > 0 or self._completed != completed
        surplus = left - MAX_FINISHED
        while surplus > 0:
            count = await self._store.submit(ForgetFinished(math.inf, min(surplus, SLICE)))
            if not count:
                break  # the results of all the others wait, of which spool.max_events is the bound
            total += count
            surplus -= count
        return total

    def unfinished(self) -> Deferred[list[tuple[StoredCommand, bool]]]:
        """Return all commands without a result, in order of acceptance, each with whether it is whole."""
        return self._store.submit(Unfinished(self._told))

    def resurfaced(self) -> Deferred[list[tuple[StoredCommand, bool]]]:
        """
        Return those of the unfinished commands that nobody was told of yet.

        Their acceptance failed with the disk, and they are there all the same once it works again. Duplicates of them
        are not accepted any more, so they must be offered.
        """
        return self._store.submit(Resurfaced(self._told))

    def stop(self) -> None:
        """The spool is closed."""
        self._told.clear()
        self._may_have_finished = self._begins_with_some

    def after_batch(self, outcome: Outcome) -> None:
        """Take over the totals."""
        if outcome.reopened:
            self._may_have_finished = True
        if outcome.counter is not None:
            self.open_count = outcome.counter.open_commands
        if self._results:
            count, size = self._results, self._result_bytes
            self._results = self._result_bytes = 0
            if self.on_completed is not None:
                with self.log.failuresHandled("A listener of results failed.", event="spool.listener-failed"):
                    self.on_completed(count, size)
