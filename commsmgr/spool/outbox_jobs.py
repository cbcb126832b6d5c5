"""What the writer does for the outbox; what it means says :mod:`.outbox`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.python.failure import Failure

from commsmgr.spool.books import Books
from commsmgr.spool.records import Entry, Gone, Lane, Page
from commsmgr.spool.store import Job

if TYPE_CHECKING:
    from commsmgr.spool.outbox import Outbox


class _OutboxJob(Job):
    __slots__ = ("outbox",)

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox


class PutEvent(_OutboxJob):
    __slots__ = ("accepted_at", "body", "expires_at", "id", "kind", "size")

    def __init__(
        self, outbox: Outbox, kind: str, id: str, body: bytes, accepted_at: float, expires_at: float | None
    ) -> None:
        super().__init__(outbox)
        self.kind, self.id, self.body = kind, id, body
        self.accepted_at, self.expires_at = accepted_at, expires_at
        self.size = len(body)
        outbox.reserve(self.size)

    def work(self, books: Books) -> Entry:
        self.outbox.require_room(self.size, books.counter)
        return books.add_event(self.kind, self.id, self.body, self.accepted_at, self.expires_at)

    def settled(self, result: Any) -> Any:
        self.outbox.release(self.size)
        if isinstance(result, Failure):
            return result
        self.outbox.committed(result)
        return result.seq


class PutState(_OutboxJob):
    __slots__ = ("accepted_at", "body", "expires_at", "id", "key", "kind", "size")

    def __init__(
        self, outbox: Outbox, kind: str, id: str, body: bytes, accepted_at: float, expires_at: float | None, key: str
    ) -> None:
        super().__init__(outbox)
        self.kind, self.id, self.body, self.key = kind, id, body, key
        self.accepted_at, self.expires_at = accepted_at, expires_at
        self.size = len(body)

    def work(self, books: Books) -> tuple[Entry, int | None]:
        return books.set_state(self.kind, self.id, self.body, self.accepted_at, self.expires_at, self.key)

    def settled(self, result: Any) -> Any:
        if isinstance(result, Failure):
            return result
        entry, older = result
        if older is not None:
            self.outbox.discard(older)
        self.outbox.committed(entry)
        return entry.seq


class Forget(_OutboxJob):
    __slots__ = ("seqs",)
    essential = True
    persistent = True
    patient = True

    def __init__(self, outbox: Outbox, seqs: list[int]) -> None:
        super().__init__(outbox)
        self.seqs = seqs

    def work(self, books: Books) -> None:
        books.delete(self.seqs)

    def settled(self, result: Any) -> Any:
        self.outbox.forgotten(self.seqs)
        return result


class Bury(_OutboxJob):
    __slots__ = ("now", "reason", "seq")
    essential = True
    persistent = True

    def __init__(self, outbox: Outbox, seq: int, reason: str, now: float) -> None:
        super().__init__(outbox)
        self.seq, self.reason, self.now = seq, reason, now

    def work(self, books: Books) -> list[Gone]:
        return books.bury(self.seq, self.reason, self.now)

    def settled(self, result: Any) -> Any:
        self.outbox.forgotten([self.seq])
        if isinstance(result, Failure):
            return result
        self.outbox.given_up(result)
        return None


class Expire(_OutboxJob):
    __slots__ = ("now", "oldest")
    essential = True

    def __init__(self, outbox: Outbox, now: float, oldest: float | None) -> None:
        super().__init__(outbox)
        self.now, self.oldest = now, oldest

    def work(self, books: Books) -> tuple[list[Gone], bool]:
        # Read here, in the writer and as late as can be, so that little is taken between the look and the act.
        sent = {lane: self.outbox.reader(lane).taken for lane in Lane}
        return books.expire(self.now, self.oldest, sent)

    def settled(self, result: Any) -> Any:
        if not isinstance(result, Failure):
            gone: list[Gone] = result[0]
            self.outbox.given_up(gone)
            for reason in dict.fromkeys(each.reason for each in gone):
                self.outbox.log.warn(
                    "{count} messages that were not delivered in time or are damaged are dead letters now ({reason})",
                    event="spool.given-up",
                    count=sum(each.reason == reason for each in gone),
                    reason=reason,
                )
        return result


class Fetch(_OutboxJob):
    __slots__ = ("after", "generation", "lane", "now")
    essential = True
    persistent = True

    def __init__(self, outbox: Outbox, lane: Lane, after: int, generation: int, now: float) -> None:
        super().__init__(outbox)
        self.lane, self.after, self.generation, self.now = lane, after, generation, now

    def wanted(self) -> bool:
        return self.outbox.reader(self.lane).awaits(self.generation)

    def work(self, books: Books) -> Page:
        if not self.wanted():  # each rewind asks for one, and all may have waited for the disk
            return Page([], self.after, False, [])
        return books.page(self.lane, self.after, self.now)

    def settled(self, result: Any) -> Any:
        reader = self.outbox.reader(self.lane)
        if isinstance(result, Failure):
            reader.unpaged(self.generation)
        else:
            self.outbox.given_up(result.damaged)
            reader.paged(self.generation, result)
        return result


class Ask(Job):
    __slots__ = ("question",)
    essential = True

    def __init__(self, question: Callable[[Books], Any]) -> None:
        self.question = question

    def work(self, books: Books) -> Any:
        return self.question(books)
