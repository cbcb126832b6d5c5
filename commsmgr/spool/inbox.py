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
from typing import Any, Final

from twisted.internet.defer import Deferred, fail
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import AlreadyCompleted, SpoolWriteFailed
from commsmgr.spool.books import SLICE, Books
from commsmgr.spool.outbox import Outbox
from commsmgr.spool.records import (
    RESULT_KIND,
    Accepted,
    Duplicate,
    Entry,
    StoredCommand,
    command_checksum,
)
from commsmgr.spool.store import Job, Store
from commsmgr.spool.writer import Outcome

MAX_FINISHED: Final = 1_000_000
"""Finished commands that are remembered, at some 200 to 350 bytes each; to count so many takes 50 ms."""


class Inbox:
    """
    Made by :class:`commsmgr.spool.Spool`. All Deferreds fire after the commit; cancelling one undoes nothing. All fail
    with NotRunning unless the spool is open, and with SpoolWriteFailed when the disk does not take it.

    :ivar open_count: commands accepted and not finished, as of the last commit.
    """

    def __init__(self, settings: config.Spool, wall: Callable[[], float], outbox: Outbox) -> None:
        self.open_count = 0
        self._settings = settings
        self._wall = wall
        self._outbox = outbox
        self._store: Store
        self._told: set[int] = set()

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
        return self._store.submit(_Accept(self._outbox, id, digest, body, self._wall(), self._told))

    def known(self, id: str, digest: str) -> Deferred[Duplicate | None]:
        """
        Ask for a command without storing it: the same answer as :meth:`accept` has for one that is known, else None.

        The result of a finished one is in the outbox after this, put there again if need be.
        """
        return self._store.submit(_Known(self._outbox, id, digest, self._wall()))

    def offered(self, keys: Iterable[int]) -> Deferred[None]:
        """Take note that the agent is about to see these commands; wait for the Deferred before it does."""
        return self._store.submit(_Offered(list(keys)))

    def complete(
        self, *, key: int | None, command_id: str, status: str, result_id: str, body: bytes, ttl: float | None = None
    ) -> Deferred[int]:
        """
        Accept the result of a command: put it into the outbox as an event and mark the command finished, in one commit.

        :param key: the command's; None means the oldest unfinished one with ``command_id``. A result whose command is
            not known at all is accepted as an event all the same.
        :param body: the result, as it will be sent.
        :param ttl: seconds after which the result need not be sent any more.
        :return: the event's number. Fails with AlreadyCompleted when the command has a result (without ``key``: when
            all known commands of that id have), with QueueFull at the outbox's bounds, as :meth:`Outbox.put` does, and
            with SpoolWriteFailed on a full disk when the command is not known.
        """
        if (refusal := self._outbox.refusal(len(body))) is not None:
            return fail(refusal)
        now = float(self._wall())
        expires_at = None if ttl is None else now + ttl
        job = _Complete(self._outbox, key, command_id, status, result_id, body, now, expires_at, self._told)
        return self._store.submit(job)

    def forget_finished(self) -> Deferred[int]:
        """
        Forget commands that were finished longer ago than ``spool.remember_commands``, in slices, and of the others
        those that were finished first, beyond :data:`MAX_FINISHED` of them.

        One whose result still waits in the outbox is kept: the backend has every reason to send it again.

        :return: how many.
        """
        return Deferred.fromCoroutine(self._forget_finished())

    async def _forget_finished(self) -> int:
        total, more = 0, True
        while more:
            before = self._wall() - self._settings.remember_commands
            count: int = await self._store.submit(_ForgetFinished(before, SLICE))
            total += count
            more = count == SLICE
        surplus: int = await self._store.submit(_CountFinished()) - MAX_FINISHED
        while surplus > 0:
            count = await self._store.submit(_ForgetFinished(math.inf, min(surplus, SLICE)))
            if not count:
                break  # the results of all the others wait, of which spool.max_events is the bound
            total += count
            surplus -= count
        return total

    def unfinished(self) -> Deferred[list[tuple[StoredCommand, bool]]]:
        """Return all commands without a result, in order of acceptance, each with whether it is whole."""
        return self._store.submit(_Unfinished(self._told))

    def resurfaced(self) -> Deferred[list[tuple[StoredCommand, bool]]]:
        """
        Return those of the unfinished commands that nobody was told of yet.

        Their acceptance failed with the disk, and they are there all the same once it works again. Duplicates of them
        are not accepted any more, so they must be offered.
        """
        return self._store.submit(_Resurfaced(self._told))

    def stop(self) -> None:
        """The spool is closed."""
        self._told.clear()

    def after_batch(self, outcome: Outcome) -> None:
        """Take over the totals."""
        if outcome.counter is not None:
            self.open_count = outcome.counter.open_commands


class _Known(Job):
    __slots__ = ("digest", "id", "now", "outbox")
    # It settles what was begun before, and must be answered just when there is no room for anything new.
    essential = True

    def __init__(self, outbox: Outbox, id: str, digest: str, now: float) -> None:
        super().__init__()
        self.outbox, self.id, self.digest, self.now = outbox, id, digest, float(now)

    def work(self, books: Books) -> tuple[Accepted | Duplicate | None, Entry | None]:
        known = books.db.execute(
            # Without a digest the id decides alone: one command may come by a plain link and, again, in the answer to a
            # heartbeat, which speaks commsmgr.v1.
            "SELECT key, finished_at, status, result_id, result_seq FROM command"
            " WHERE id = ? AND (digest = ? OR digest = '' OR ? = '') ORDER BY key LIMIT 1",
            (self.id, self.digest, self.digest),
        ).fetchone()
        if known is None:
            return None, None
        key, finished_at, status, result_id, result_seq = known
        if finished_at is None:
            return Duplicate(key, False), None
        return _repeat(self.outbox, books, key, status, result_id, result_seq, self.now)

    def settled(self, result: Any) -> Any:
        if isinstance(result, Failure):
            return result
        answer, repeated = result
        if repeated is not None:
            self.outbox.committed(repeated)
        return answer


class _Accept(_Known):
    __slots__ = ("body", "size", "told")
    essential = False

    def __init__(self, outbox: Outbox, id: str, digest: str, body: bytes, now: float, told: set[int]) -> None:
        super().__init__(outbox, id, digest, now)
        self.body = body
        self.size = len(body)
        self.told = told

    def work(self, books: Books) -> tuple[Accepted | Duplicate | None, Entry | None]:
        answer, repeated = super().work(books)
        if answer is not None:
            return answer, repeated
        crc = command_checksum(self.id, self.digest, self.body)
        key = books.db.execute(
            "INSERT INTO command (id, digest, accepted_at, crc, body) VALUES (?, ?, ?, ?, ?)",
            (self.id, self.digest, self.now, crc, self.body),
        ).lastrowid
        assert key is not None
        books.counter.open_commands += 1
        return Accepted(StoredCommand(key, self.id, self.digest, self.body, False, self.now)), None

    def settled(self, result: Any) -> Any:
        answer = super().settled(result)
        if isinstance(answer, Accepted):
            self.told.add(answer.command.key)
        return answer


def _repeat(
    outbox: Outbox, books: Books, key: int, status: str, result_id: str, result_seq: int, now: float
) -> tuple[Duplicate, Entry | None]:
    """Put the result of a finished command into the outbox, unless it is still there."""
    if books.has(result_seq):
        return Duplicate(key, True, status, result_id), None
    row = books.db.execute("SELECT crc, body FROM remembered WHERE key = ?", (key,)).fetchone()
    if row is None or command_checksum(result_id, "", row[1]) != row[0]:
        return Duplicate(key, True, status, result_id, result_missing=True), None
    if (refusal := outbox.refusal(len(row[1]), books.counter)) is not None:
        raise refusal
    entry = books.add_event(RESULT_KIND, result_id, row[1], now, None)
    books.db.execute("UPDATE command SET result_seq = ? WHERE key = ?", (entry.seq, key))
    return Duplicate(key, True, status, result_id), entry


class _Offered(Job):
    __slots__ = ("keys",)
    essential = True

    def __init__(self, keys: list[int]) -> None:
        super().__init__()
        self.keys = keys

    def work(self, books: Books) -> None:
        books.db.executemany("UPDATE command SET offered = 1 WHERE key = ?", [(key,) for key in self.keys])


class _Complete(Job):
    __slots__ = ("body", "command_id", "expires_at", "key", "now", "outbox", "result_id", "size", "status", "told")
    essential = True

    def __init__(
        self,
        outbox: Outbox,
        key: int | None,
        command_id: str,
        status: str,
        result_id: str,
        body: bytes,
        now: float,
        expires_at: float | None,
        told: set[int],
    ) -> None:
        super().__init__()
        self.told = told
        self.outbox, self.key, self.command_id, self.status = outbox, key, command_id, status
        self.result_id, self.body, self.now, self.expires_at = result_id, body, now, expires_at
        self.size = len(body)
        outbox.reserve(self.size)

    def work(self, books: Books) -> tuple[Entry, int | None]:
        key = self._find(books)
        if key is None and books.nothing_new:
            # Room is kept for the results of commands that were taken. Of an agent's own there may be any number.
            raise SpoolWriteFailed(books.nothing_new)
        self.outbox.require_room(self.size, books.counter)
        entry = books.add_event(RESULT_KIND, self.result_id, self.body, self.now, self.expires_at)
        if key is not None:
            # The command's own body has served; to know a duplicate its digest is enough.
            books.db.execute(
                "UPDATE command SET finished_at = ?, status = ?, result_id = ?, result_seq = ?, crc = 0, body = x''"
                " WHERE key = ?",
                (self.now, self.status, self.result_id, entry.seq, key),
            )
            books.counter.open_commands -= 1
            _remember(books, key, self.result_id, self.body)
        return entry, key

    def _find(self, books: Books) -> int | None:
        """Return the key of the command to be finished, None when it is not known; nothing is written yet."""
        if self.key is None:
            rows = books.db.execute(
                "SELECT key, finished_at FROM command WHERE id = ? ORDER BY finished_at IS NOT NULL, key LIMIT 1",
                (self.command_id,),
            )
        else:
            rows = books.db.execute(
                "SELECT key, finished_at FROM command WHERE key = ? AND id = ?", (self.key, self.command_id)
            )
        row = rows.fetchone()
        if row is None:
            return None
        if row[1] is not None:
            raise AlreadyCompleted(f"command {self.command_id} has a result already; this one was not accepted")
        return int(row[0])

    def settled(self, result: Any) -> Any:
        self.outbox.release(self.size)
        if isinstance(result, Failure):
            return result
        entry, key = result
        self.told.discard(key)
        self.outbox.committed(entry)
        return entry.seq


def _remember(books: Books, key: int, result_id: str, body: bytes) -> None:
    """Keep the result for duplicates of the command, as far as the bound allows."""
    if len(body) > books.max_remembered:
        return  # it would push out all the others, and then itself
    counter = books.counter
    books.db.execute(
        "INSERT INTO remembered (key, crc, body) VALUES (?, ?, ?)", (key, command_checksum(result_id, "", body), body)
    )
    counter.remembered_bytes += len(body)
    while counter.remembered_bytes > books.max_remembered:
        (oldest,) = books.db.execute("SELECT min(key) FROM remembered").fetchone()
        if oldest is None:
            counter.remembered_bytes = 0  # it was wrong
            return
        _forget_result(books, oldest)


def _forget_result(books: Books, key: int) -> None:
    row = books.db.execute("SELECT length(body) FROM remembered WHERE key = ?", (key,)).fetchone()
    if row is not None:
        books.db.execute("DELETE FROM remembered WHERE key = ?", (key,))
        books.counter.remembered_bytes -= row[0] or 0  # a damaged one may be NULL


class _CountFinished(Job):
    essential = True

    def work(self, books: Books) -> int:
        (count,) = books.db.execute("SELECT count(*) FROM command WHERE finished_at IS NOT NULL").fetchone()
        return int(count)


class _ForgetFinished(Job):
    __slots__ = ("before", "limit")
    essential = True

    def __init__(self, before: float, limit: int) -> None:
        super().__init__()
        self.before, self.limit = before, limit

    def work(self, books: Books) -> int:
        rows = books.db.execute(
            "SELECT key FROM command WHERE finished_at <= ?"
            " AND NOT EXISTS (SELECT 1 FROM entry WHERE seq = result_seq) ORDER BY finished_at LIMIT ?",
            (self.before, self.limit),
        ).fetchall()
        for (key,) in rows:
            _forget_result(books, key)
            books.db.execute("DELETE FROM command WHERE key = ?", (key,))
        return len(rows)


class _Unfinished(Job):
    __slots__ = ("told",)
    essential = True

    def __init__(self, told: set[int]) -> None:
        super().__init__()
        self.told = told

    def work(self, books: Books) -> list[tuple[StoredCommand, bool]]:
        found: list[tuple[StoredCommand, bool]] = []
        with books.lenient():
            rows = books.db.execute(
                "SELECT key, id, digest, body, offered, accepted_at, crc FROM command"
                " WHERE finished_at IS NULL ORDER BY key"
            ).fetchall()
        for key, name, digest, body, offered, accepted_at, crc in rows:
            try:
                whole = command_checksum(name, digest, body) == crc
            except TypeError:  # the damage is such that the body is no bytes any more
                whole = False
            command = StoredCommand(key, name, digest, body if whole else b"", bool(offered), accepted_at)
            found.append((command, whole))
        return found

    def settled(self, result: Any) -> Any:
        if not isinstance(result, Failure):
            self.told.update(command.key for command, _ in result)
        return result


class _Resurfaced(_Unfinished):
    def settled(self, result: Any) -> Any:
        if isinstance(result, Failure):
            return result
        return super().settled([pair for pair in result if pair[0].key not in self.told])
