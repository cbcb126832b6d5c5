"""
What the writer does to the database within a transaction: the statements of the outbox, and the totals.

Runs in the writer's thread only. Nothing here begins or ends a transaction; :mod:`.writer` does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

from msgspec import structs

from commsmgr.errors import QueueFull
from commsmgr.spool.counter import Counter, read_counter, write_counter
from commsmgr.spool.faults import is_torn, lenient, torn
from commsmgr.spool.lossbook import LossBook
from commsmgr.spool.records import DeadLetter, Entry, Gone, Lane, Page, Reason, entry_checksum, first_seq, lane_of, runs

SLICE: Final = 500
"""Rows touched by one job of expiry and the like, so that nobody waits long behind it."""

PAGE_ROWS: Final = 500
PAGE_BYTES: Final = 1 << 20
MAX_STATES: Final = 1000
"""Keys of the state lane; each holds one message, and the agent chooses them."""

_COLUMNS: Final = "seq, kind, id, key, accepted_at, expires_at, crc, body"
_VALUES: Final = f"({', '.join('?' * len(_COLUMNS.split(', ')))})"
_INSERT: Final = f"INSERT INTO entry ({_COLUMNS}) VALUES {_VALUES}"
_TOGETHER: Final = 10
"""Rows that one statement inserts while there are as many: a fifth cheaper; more gain nothing."""
_INSERT_TOGETHER: Final = _INSERT + f", {_VALUES}" * (_TOGETHER - 1)


class Books:
    """
    The database, seen by one transaction.

    New entries are inserted together, which takes half the time: they wait for :meth:`flush`, which goes before each
    statement that has to see them.

    :param max_dead_letters: dead letters kept; the oldest give way.
    :param max_dead_bytes: bytes of their bodies kept.
    :param max_remembered: bytes of the bodies of results kept for duplicates of their commands.
    :ivar db: the connection, for what does not concern the table of entries; :meth:`flush` returns it for the rest.
    :ivar lossbook: what was given up and not yet reported.
    :ivar damaged: whether pages leave out what cannot be read, instead of failing.
    :ivar stale: whether the totals are those of a transaction that could not be undone; :meth:`reload` ends that.
    :ivar nothing_new: why what is new is refused in this transaction; empty when it is not.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        *,
        max_dead_letters: int,
        max_dead_bytes: int,
        max_remembered: int,
        damaged: bool = False,
    ) -> None:
        self.db = db
        self._rows: list[tuple[Any, ...]] = []
        self._oldest: tuple[int, float] | None = None
        self._oldest_known = False
        self.lossbook = LossBook(db)
        self.damaged = damaged
        self.stale = False
        self.nothing_new = ""
        self.max_remembered = max_remembered
        self._max_dead_letters = max_dead_letters
        self._max_dead_bytes = max_dead_bytes
        self.reload()

    def flush(self) -> sqlite3.Connection:
        """Insert what was added, and return the connection, for any statement."""
        if self._rows:
            rows, end = self._rows, len(self._rows) // _TOGETHER * _TOGETHER
            if end:
                together = [sum(rows[first : first + _TOGETHER], ()) for first in range(0, end, _TOGETHER)]
                self.db.executemany(_INSERT_TOGETHER, together)
            self.db.executemany(_INSERT, rows[end:])
            self._rows = []  # not if that fails: then the batch must, too
        return self.db

    def lenient(self) -> AbstractContextManager[None]:
        """Read text that is no UTF-8 as well, for a row that is damaged."""
        return lenient(self.db)

    def reload(self) -> None:
        """
        Take the totals from the database, after it was opened or a transaction was undone.

        :raise sqlite3.DatabaseError: also when they cannot be right, with the code that damage has.
        """
        self._rows.clear()
        self._oldest_known = False
        with self.lenient():
            counter = read_counter(self.db)
        if counter is None:
            raise torn("the totals are damaged")
        self.counter = counter
        self.stale = False

    def snapshot(self) -> Counter:
        """Return the totals as they are now."""
        return structs.replace(self.counter)

    def write_counter(self) -> int:
        """
        Write the totals and return the number of this commit.

        Those that were too low, for whatever reason, end at nothing: below it they would pass for damage.
        """
        self.counter.commits += 1
        if min(structs.astuple(self.counter)) < 0:
            self.counter = Counter(*(max(total, 0) for total in structs.astuple(self.counter)))
        write_counter(self.flush(), self.counter)
        return self.counter.commits

    def oldest_event_at(self) -> float | None:
        """Return when the oldest event was accepted; it is read again only when that one has gone."""
        if not self._oldest_known:
            self._oldest = (
                self.flush()
                .execute(
                    "SELECT seq, accepted_at FROM entry WHERE seq < ? AND typeof(accepted_at) = 'real'"
                    " ORDER BY seq LIMIT 1",
                    (first_seq(Lane.STATE),),
                )
                .fetchone()
            )
            self._oldest_known = True
        return None if self._oldest is None else self._oldest[1]

    def add_event(self, kind: str, id: str, body: bytes, accepted_at: float, expires_at: float | None) -> Entry:
        """Append an event."""
        counter = self.counter
        seq = counter.next_event
        entry = Entry(seq, Lane.EVENT, kind, id, body, accepted_at, expires_at)
        self._append(entry)
        if self._oldest is None:
            self._oldest_known = False
        counter.next_event = seq + 1
        counter.events += 1
        counter.event_bytes += len(body)
        return entry

    def set_state(
        self, kind: str, id: str, body: bytes, accepted_at: float, expires_at: float | None, key: str
    ) -> tuple[Entry, int | None]:
        """
        Append a state and remove the older one of its key.

        :return: the new one, and the older one's number.
        :raise QueueFull: there are too many keys.
        """
        counter = self.counter
        row = self.flush().execute("SELECT seq FROM entry WHERE key = ? AND key <> ''", (key,)).fetchone()
        older: int | None = None
        if row is not None:
            older = row[0]
            self.delete([row[0]])
        elif counter.states >= MAX_STATES:
            raise QueueFull(f"state of {MAX_STATES} keys is waiting already")
        seq = first_seq(Lane.STATE) + counter.next_state
        entry = Entry(seq, Lane.STATE, kind, id, body, accepted_at, expires_at, key)
        self._append(entry)
        counter.next_state += 1
        counter.states += 1
        return entry, older

    def _append(self, entry: Entry) -> None:
        seq, kind, name, key, body = entry.seq, entry.kind, entry.id, entry.key, entry.body
        accepted_at, expires_at = entry.accepted_at, entry.expires_at
        crc = entry_checksum(seq, kind, name, key, accepted_at, expires_at, body)
        self._rows.append((seq, kind, name, key, accepted_at, expires_at, crc, body))

    def delete(self, seqs: Iterable[int]) -> None:
        """Remove entries; those that are not there any more do not matter."""
        counter, db = self.counter, self.flush()
        for first, last in runs(seqs):
            # The lengths come from the records' headers: a large body is not read. A damaged one may be NULL.
            count, size = db.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0) FROM entry WHERE seq BETWEEN ? AND ?", (first, last)
            ).fetchone()
            if not count:
                continue
            db.execute("DELETE FROM entry WHERE seq BETWEEN ? AND ?", (first, last))
            if lane_of(first) is Lane.EVENT:
                counter.events -= count
                counter.event_bytes -= size
                if self._oldest is not None and first <= self._oldest[0] <= last:
                    self._oldest_known = False
            else:
                counter.states -= count

    def has(self, seq: int) -> bool:
        """Say whether the entry is there."""
        return self.flush().execute("SELECT 1 FROM entry WHERE seq = ?", (seq,)).fetchone() is not None

    def page(self, lane: Lane, after: int, now: float) -> Page:
        """
        Read entries of ``lane`` with numbers greater than ``after``, in order.

        Damaged ones become dead letters at once: they must not stop those behind them. Where the database itself is
        damaged, and :attr:`damaged` says that this is known, they are left out and left where they are.
        """
        if self.damaged:
            return self._readable_page(lane, after, now)
        try:
            return self._page(lane, after, now, PAGE_ROWS)
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise
        # A flipped bit in a text column: read it anyway, its checksum will tell which one it was.
        with self.lenient():
            return self._page(lane, after, now, PAGE_ROWS)

    def _readable_page(self, lane: Lane, after: int, now: float) -> Page:
        """Read as :meth:`page` does, leaving out what cannot be read; takes some dozens of attempts at most."""
        limit = PAGE_ROWS
        while limit:
            # Up to the damaged part: fewer and fewer.
            if (page := self._attempt(lane, after, now, limit)) is not None:
                return page
            limit //= 2
        next_number = self.counter.next_event if lane is Lane.EVENT else self.counter.next_state
        end = first_seq(lane) + next_number
        # Behind it: the first number after which there is something to be had, found by doubling and halving the step.
        bad, step = after, 1
        while (found := self._attempt(lane, after + step, now, 1)) is None:
            bad = after + step
            step *= 2
            if after + step >= end:
                return Page([], max(after, end - 1), True, [])
        good = after + step
        while good - bad > 1:
            middle = (bad + good) // 2
            if (page := self._attempt(lane, middle, now, 1)) is None:
                bad = middle
            else:
                good, found = middle, page
        return found

    def _attempt(self, lane: Lane, after: int, now: float, limit: int) -> Page | None:
        """Return a page, or None if it cannot be read or leads nowhere."""
        try:
            with self.lenient():
                page = self._page(lane, after, now, limit)
        except sqlite3.DatabaseError as error:
            if not is_torn(error):
                raise
            return None
        return page if page.complete or page.last > after else None

    def _page(self, lane: Lane, after: int, now: float, limit: int) -> Page:
        rows = self.flush().execute(
            f"SELECT {_COLUMNS} FROM entry WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?",
            (after, first_seq(lane + 1), limit),
        )
        entries: list[Entry] = []
        damaged: list[int] = []
        size, last, read, full = 0, after, 0, False
        for row in rows:
            read += 1
            if row[0] <= last:
                continue  # in a damaged database anything may come
            last = row[0]
            entry = _entry(row)
            if entry is None:
                damaged.append(last)
                continue
            entries.append(entry)
            size += len(entry.body)
            if size >= PAGE_BYTES:
                full = True
                break
        rows.close()
        complete = not full and read < limit
        if not complete and last == after and not self.damaged:
            raise torn("the rows behind one lead back")  # the next page would be this one again
        # In a damaged database to bury them might fail half-way.
        gone = [] if self.damaged else [each for seq in damaged for each in self.bury(seq, Reason.DAMAGED, now)]
        return Page(entries, last, complete, gone)

    def bury(self, seq: int, reason: str, now: float) -> list[Gone]:
        """Make a dead letter of an entry, and of nothing when it is not there any more."""
        with self.lenient():
            found = self.flush().execute("SELECT kind, length(body) FROM entry WHERE seq = ?", (seq,)).fetchone()
        if found is None:
            return []
        kind, size = str(found[0]), int(found[1] or 0)
        if self._max_dead_letters and size <= self._max_dead_bytes:
            self.flush().execute(
                "INSERT INTO dead_letter (seq, kind, id, key, accepted_at, died_at, reason, body)"
                # What is damaged may be NULL, which the table does not take.
                " SELECT seq, coalesce(kind, ''), coalesce(id, ''), coalesce(key, ''), coalesce(accepted_at, ?), ?, ?,"
                " coalesce(body, x'') FROM entry WHERE seq = ?",
                (now, now, reason, seq),
            )
            self.counter.dead_letters += 1
            self.counter.dead_bytes += size
            self._trim_dead_letters(now)
        self.delete([seq])
        return [Gone(seq, self.count_loss(reason, kind, now))]

    def _trim_dead_letters(self, now: float) -> None:
        counter = self.counter
        while counter.dead_letters > self._max_dead_letters or counter.dead_bytes > self._max_dead_bytes:
            with self.lenient():
                oldest = (
                    self.flush()
                    .execute("SELECT n, kind, coalesce(length(body), 0) FROM dead_letter ORDER BY n LIMIT 1")
                    .fetchone()
                )
            if oldest is None:
                counter.dead_letters = counter.dead_bytes = 0  # they were wrong
                return
            n, kind, size = oldest
            self.flush().execute("DELETE FROM dead_letter WHERE n = ?", (n,))
            counter.dead_letters -= 1
            counter.dead_bytes -= size
            self.count_loss(Reason.EVICTED, str(kind), now)

    def count_loss(self, reason: str, kind: str, now: float, count: int = 1) -> str:
        """Count losses, of which the backend will be told; see :meth:`LossBook.count`."""
        self.counter.losses += count
        return self.lossbook.count(reason, kind, now, count)

    def expire(self, now: float, oldest: float | None, sent: dict[Lane, int]) -> tuple[list[Gone], bool]:
        """
        Make dead letters of at most :data:`SLICE` entries whose time is over, and of events with a time that is none.

        :param oldest: events accepted at or before this are over age; None: none are.
        :param sent: the greatest number of each lane that was taken for sending; what is in flight is left alone.
        :return: what was given up, and whether there may be more.
        """
        event, state = sent[Lane.EVENT], sent[Lane.STATE]
        over = (
            self.flush()
            .execute(
                "SELECT seq FROM entry WHERE expires_at <= ? AND (seq > ? AND seq < ? OR seq > ?) LIMIT ?",
                (now, event, first_seq(Lane.STATE), state, SLICE),
            )
            .fetchall()
        )
        gone = [each for (seq,) in over for each in self.bury(seq, Reason.EXPIRED, now)]
        more = len(over) == SLICE
        if oldest is not None and not more:
            # In order of acceptance, hence of age, save for steps of the clock, which only make one wait longer.
            aged: list[tuple[int, Reason]] = []
            rows = self.flush().execute(
                "SELECT seq, CASE typeof(accepted_at) WHEN 'real' THEN accepted_at END FROM entry"
                " WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?",
                (event, first_seq(Lane.STATE), SLICE),
            )
            for seq, accepted_at in rows:
                if accepted_at is not None and accepted_at > oldest:
                    break
                aged.append((seq, Reason.DAMAGED if accepted_at is None else Reason.OVER_AGE))
            rows.close()
            gone += [each for seq, reason in aged for each in self.bury(seq, reason, now)]
            more = len(aged) == SLICE
        return gone, more

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return the latest dead letters, the latest first."""
        with self.lenient():
            rows = self.flush().execute(
                "SELECT seq, kind, id, key, accepted_at, died_at, reason, body FROM dead_letter"
                " ORDER BY n DESC LIMIT ?",
                (limit,),
            )
            return [DeadLetter(*row) for row in rows]


def _entry(row: tuple[Any, ...]) -> Entry | None:
    """Return the entry of a row, or None when it is damaged, in whichever way."""
    seq, kind, name, key, accepted_at, expires_at, crc, body = row
    try:
        if crc != entry_checksum(seq, kind, name, key, accepted_at, expires_at, body):
            return None
    except TypeError:
        return None
    return Entry(seq, lane_of(seq), kind, name, body, accepted_at, expires_at, key)
