"""
What the writer does for the inbox; what it means, and what a crash in between means, says :mod:`.inbox`.

Entries that wait to be inserted together do not concern the tables here, so most statements leave them waiting
(:attr:`.Books.db`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.python.failure import Failure

from commsmgr.errors import AlreadyCompleted, SpoolWriteFailed
from commsmgr.spool.books import Books
from commsmgr.spool.outbox import Outbox
from commsmgr.spool.records import (
    RESULT_KIND,
    Accepted,
    Duplicate,
    Entry,
    StoredCommand,
    command_checksum,
)
from commsmgr.spool.store import Job

if TYPE_CHECKING:
    from commsmgr.spool.inbox import Inbox


class Known(Job):
    __slots__ = ("digest", "id", "now", "outbox")
    # It settles what was begun before, and must be answered just when there is no room for anything new.
    essential = True

    def __init__(self, outbox: Outbox, id: str, digest: str, now: float) -> None:
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


class Accept(Known):
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


class Offered(Job):
    __slots__ = ("keys",)
    essential = True

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys

    def work(self, books: Books) -> None:
        books.db.executemany("UPDATE command SET offered = 1 WHERE key = ?", [(key,) for key in self.keys])


class Complete(Job):
    __slots__ = (
        "body", "command_id", "expires_at", "found", "inbox", "key", "now", "outbox", "result_id", "size", "status",
    )  # fmt: skip
    essential = True

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        *,
        key: int | None,
        command_id: str,
        status: str,
        result_id: str,
        body: bytes,
        now: float,
        expires_at: float | None,
    ) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.key, self.command_id, self.status = key, command_id, status
        self.result_id, self.body, self.now, self.expires_at = result_id, body, now, expires_at
        self.size = len(body)
        outbox.reserve(self.size)

    def work(self, books: Books) -> Entry:
        key = self.found = self._find(books)
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
        return entry

    def _find(self, books: Books) -> int | None:
        """Return the key of the command to be finished, None when it is not known; nothing is written yet."""
        # Of several that bear the id one that is open, and the first of these: chosen here, for SQLite takes longer
        # to sort them than to find them.
        statement = "SELECT finished_at IS NOT NULL, key FROM command WHERE id = ?"
        if self.key is None:
            rows = books.db.execute(statement, (self.command_id,))
        else:
            rows = books.db.execute(f"{statement} AND key = ?", (self.command_id, self.key))
        row = min(rows.fetchall(), default=None)
        if row is None:
            return None
        if row[0]:
            raise AlreadyCompleted(f"command {self.command_id} has a result already; this one was not accepted")
        return int(row[1])

    def settled(self, result: Any) -> Any:
        self.outbox.release(self.size)
        if isinstance(result, Failure):
            return result
        self.inbox.completed(self.found, self.size)
        self.outbox.committed(result)
        return self.result_id


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


class CountFinished(Job):
    essential = True

    def work(self, books: Books) -> int:
        (count,) = books.db.execute("SELECT count(*) FROM command WHERE finished_at IS NOT NULL").fetchone()
        return int(count)


class ForgetFinished(Job):
    __slots__ = ("before", "limit")
    essential = True

    def __init__(self, before: float, limit: int) -> None:
        self.before, self.limit = before, limit

    def work(self, books: Books) -> int:
        rows = (
            books.flush()
            .execute(
                "SELECT key FROM command WHERE finished_at <= ?"
                " AND NOT EXISTS (SELECT 1 FROM entry WHERE seq = result_seq) ORDER BY finished_at LIMIT ?",
                (self.before, self.limit),
            )
            .fetchall()
        )
        for (key,) in rows:
            _forget_result(books, key)
            books.flush().execute("DELETE FROM command WHERE key = ?", (key,))
        return len(rows)


class Unfinished(Job):
    __slots__ = ("told",)
    essential = True

    def __init__(self, told: set[int]) -> None:
        self.told = told

    def work(self, books: Books) -> list[tuple[StoredCommand, bool]]:
        found: list[tuple[StoredCommand, bool]] = []
        with books.lenient():
            rows = (
                books.flush()
                .execute(
                    "SELECT key, id, digest, body, offered, accepted_at, crc FROM command"
                    " WHERE finished_at IS NULL ORDER BY key"
                )
                .fetchall()
            )
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


class Resurfaced(Unfinished):
    def settled(self, result: Any) -> Any:
        if isinstance(result, Failure):
            return result
        return super().settled([pair for pair in result if pair[0].key not in self.told])
