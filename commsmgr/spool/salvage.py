"""
What can be read of a torn spool, taken over into a new one. Runs in the writer's thread, before anything else does.

Theory of operation
===================

The originals are read only; see :mod:`.image` for what is made of them, and :mod:`.walk` for how rows are found. Every
row keeps its number, so that the order is kept whatever the order of finding.

What is taken over, and when:

* entries, if their checksum is right; one that is not becomes a dead letter, as when it is found while running;
* unfinished commands; one whose content is damaged has an id at least, to be reported as interrupted. If the latest
  transactions are lost, nobody knows which were offered, so all count as offered: none may be run twice;
* finished commands, remembered results, dead letters and losses, if they have the right form;
* an entry that is lost in a gap but is the result of a finished command whose body is remembered: it is put back under
  its number. It may have been delivered before, which is what ids are for.

What is missing compared with the totals is counted as lost, for the reason ``damaged``. Without totals only what is
seen can be counted, and where something is known to be missing it counts as one; so it does where nothing is left of
a log that the totals do not know. A result that was put back makes up for nothing that is missing, for nobody knows
whether it was waiting: rather a loss too many is told than one too few.

Numbers go on well ahead of all that are known: what was lost had some as well.

The new database is built under another name without a flush, and flushed once at the end. A crash before that leaves
the originals where they were, so that the next start begins again.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from twisted.logger import Logger

from commsmgr.spool.books import Books
from commsmgr.spool.counter import Counter
from commsmgr.spool.image import UNREADABLE, Image
from commsmgr.spool.lossbook import reported
from commsmgr.spool.records import (
    LEAP,
    MAX_NUMBER,
    RESULT_KIND,
    Lane,
    Reason,
    Salvaged,
    command_checksum,
    entry_checksum,
    first_seq,
    lane_of,
)
from commsmgr.spool.walk import Gaps, Table, Walk

_BATCH_BYTES: Final = 1 << 20
_BATCHES_PER_CHECKPOINT: Final = 8
_LONGEST_NAME: Final = 64

_ENTRY: Final = Table(
    "entry", ("seq", "kind", "id", "key", "accepted_at", "expires_at", "crc", "body"), frozenset((4, 5))
)
_DEAD: Final = Table(
    "dead_letter",
    ("n", "seq", "kind", "id", "key", "accepted_at", "died_at", "reason", "body"),
    frozenset((5, 6)),
)
_COMMAND: Final = Table(
    "command",
    (
        "key", "id", "digest", "accepted_at", "offered", "finished_at", "status", "result_id", "result_seq", "crc",
        "body",
    ),
    frozenset((3, 5)),
)  # fmt: skip
_REMEMBERED: Final = Table("remembered", ("key", "crc", "body"))


class Salvage:
    """
    :param source: made of the torn spool.
    :param books: the new spool, empty.
    :param now: seconds since the epoch.
    """

    log = Logger()

    def __init__(self, source: Image, books: Books, now: float) -> None:
        self._source = source
        self._books = books
        self._now = now
        self._gaps: Mapping[str, Gaps] = {}
        self._keys: dict[str, int] = {}
        self._bad: set[int] = set()
        self._finished = self._put_back = 0
        self._uncounted = False
        self._written = self._batches = 0
        self._top = {Lane.EVENT: 0, Lane.STATE: 0}

    def run(self) -> Salvaged:
        """
        Take over what can be read.

        :raise sqlite3.Error: the new spool cannot be written.
        """
        db = self._books.flush()
        with Walk(self._source) as walk:
            self._gaps = walk.gaps
            db.execute("BEGIN IMMEDIATE")
            totals = self._totals()
            self._losses(walk.db, totals)
            for table, take in (
                (_DEAD, self._dead_letter),
                (_ENTRY, self._entry),
                (_COMMAND, self._command),
                (_REMEMBERED, self._remembered),
            ):
                try:
                    self._take_over(walk.rows(table), take)
                except sqlite3.Error:
                    raise
                except Exception:
                    # What was had is better than no start.
                    self.log.failure(
                        "The salvage of {table} broke off.", event="spool.salvage-failed", table=table.name
                    )
            lost = self._settle(totals)
            self._commit()
        counter = self._books.counter
        return Salvaged(
            events=counter.events,
            states=counter.states,
            commands=counter.open_commands,
            finished=self._finished,
            dead_letters=counter.dead_letters,
            lost=lost,
            uncounted=self._uncounted,
        )

    # -- reading

    def _take_over(self, rows: Iterable[tuple[Any, ...]], take: Callable[..., int]) -> None:
        for row in rows:
            try:
                self._written += 256 + take(*row)
            except (TypeError, ValueError, OverflowError, sqlite3.IntegrityError, sqlite3.DataError):
                continue  # it has not the form of such a row
            if self._written >= _BATCH_BYTES:
                self._commit()
                self._books.flush().execute("BEGIN IMMEDIATE")

    def _totals(self) -> Counter | None:
        """Return the totals, None when they cannot be had or cannot be right."""
        for found in self._source.totals:
            known = [name for name in Counter.__struct_fields__ if name in found]
            row = {name: value for name in known if isinstance(value := found[name], int) and 0 <= value < MAX_NUMBER}
            if row and len(row) == len(known):
                totals = Counter(**(dict.fromkeys(Counter.__struct_fields__, 0) | row))
                if totals.events < totals.next_event and totals.states < totals.next_state:
                    return totals
        return None

    # -- what is taken over; each returns the bytes of the body

    def _entry(
        self, seq: int, kind: Any, name: Any, key: Any, accepted_at: Any, expires_at: Any, crc: Any, body: Any
    ) -> int:
        counter, lane = self._books.counter, lane_of(seq)
        whole = isinstance(body, bytes) and crc == entry_checksum(seq, kind, name, key, accepted_at, expires_at, body)
        if not whole:
            kind, name, key, expires_at = _name(kind), _name(name), "", None
            accepted_at = accepted_at if _is_time(accepted_at) else self._now
            crc, body = 0, body if isinstance(body, bytes) else b""
            self._bad.add(seq)
        if key:
            older = self._keys.get(key, 0)
            if older > seq:
                return 0
            if older:
                self._books.delete([older])
            self._keys[key] = seq
        self._books.flush().execute(
            _insert(_ENTRY),
            (seq, kind, name, key, accepted_at, expires_at, crc, body),
        )
        self._seen(seq)
        if lane is Lane.EVENT:
            counter.events += 1
            counter.event_bytes += len(body)
        else:
            counter.states += 1
        return len(body)

    def _dead_letter(
        self, n: int, seq: Any, kind: Any, id: Any, key: Any, accepted_at: Any, died_at: Any, reason: Any, body: Any
    ) -> int:
        if not isinstance(seq, int):
            raise TypeError("seq")
        body = body if isinstance(body, bytes) else b""
        times = (each if _is_time(each) else self._now for each in (accepted_at, died_at))
        self._books.flush().execute(
            _insert(_DEAD),
            (n, seq, _text(kind), _text(id), _text(key), *times, _text(reason), body),
        )
        self._seen(seq)
        self._books.counter.dead_letters += 1
        self._books.counter.dead_bytes += len(body)
        return len(body)

    def _command(
        self,
        key: int,
        id: Any,
        digest: Any,
        accepted_at: Any,
        offered: Any,
        finished_at: Any,
        status: Any,
        result_id: Any,
        result_seq: Any,
        crc: Any,
        body: Any,
    ) -> int:
        if not (isinstance(id, str) and isinstance(digest, str)):
            raise TypeError("id")
        if key >= MAX_NUMBER:
            raise ValueError("key")
        if finished_at is None:
            # A damaged one stays as it is: that its checksum is wrong has it reported as interrupted.
            body = body if isinstance(body, bytes) else b""
            crc = crc if isinstance(crc, int) else -1
            offered = int(bool(offered) or self._source.log_lost)
            status, result_id, result_seq = "", "", None
        elif not (
            _is_time(finished_at)
            and isinstance(status, str)
            and isinstance(result_id, str)
            and isinstance(result_seq, int)
        ):
            raise TypeError("finished_at")
        else:
            crc, body, offered = 0, b"", 1
            self._seen(result_seq)
        accepted_at = accepted_at if _is_time(accepted_at) else self._now
        self._books.flush().execute(
            _insert(_COMMAND),
            (key, id, digest, accepted_at, offered, finished_at, status, result_id, result_seq, crc, body),
        )
        if finished_at is None:
            self._books.counter.open_commands += 1
        else:
            self._finished += 1
        return len(body)

    def _remembered(self, key: int, crc: Any, body: Any) -> int:
        books = self._books
        command = (
            books.flush()
            .execute(
                "SELECT result_id, result_seq, finished_at FROM command WHERE key = ? AND finished_at IS NOT NULL",
                (key,),
            )
            .fetchone()
        )
        if command is None or crc != command_checksum(command[0], "", body):
            raise ValueError("of no command, or damaged")
        books.flush().execute(_insert(_REMEMBERED), (key, crc, body))
        books.counter.remembered_bytes += len(body)
        result_id, seq, finished_at = command
        if seq in self._bad:
            self._bad.remove(seq)
            books.delete([seq])
        elif seq not in self._gaps[_ENTRY.name] or books.has(seq):
            return len(body)
        else:
            self._put_back += 1
        whole = entry_checksum(seq, RESULT_KIND, result_id, "", finished_at, None, body)
        self._entry(seq, RESULT_KIND, result_id, "", finished_at, None, whole, body)
        return 2 * len(body)

    def _losses(self, source: sqlite3.Connection, totals: Counter | None) -> None:
        """Take over what is still to be reported; these tables are a page each."""
        books = self._books
        with suppress(*UNREADABLE):
            for reason, kind, count, first_at, last_at in source.execute(
                "SELECT reason, kind, n, first_at, last_at FROM loss"
            ):
                right = isinstance(count, int) and 0 < count < MAX_NUMBER and _is_time(first_at) and _is_time(last_at)
                if right and isinstance(reason, str) and isinstance(kind, str):
                    added = books.flush().execute(
                        "INSERT OR IGNORE INTO loss (reason, kind, n, first_at, last_at) VALUES (?, ?, ?, ?, ?)",
                        (reason, kind, count, first_at, last_at),
                    )
                    books.counter.losses += count * added.rowcount
        with suppress(*UNREADABLE):
            for name, body in source.execute("SELECT id, body FROM loss_receipt"):
                if isinstance(name, str) and isinstance(body, bytes):
                    books.flush().execute(
                        "INSERT OR IGNORE INTO loss_receipt (one, id, body) VALUES (1, ?, ?)", (name, body)
                    )
                    books.counter.losses += _told(body)
        if totals is not None and totals.losses > books.counter.losses:
            books.count_loss(Reason.DAMAGED, "unknown", self._now, totals.losses - books.counter.losses)

    # -- the end

    def _settle(self, totals: Counter | None) -> int:
        """Bury what is damaged, count what is missing, and see that no number is used again."""
        books = self._books
        counter = books.counter
        found = {"": counter.events - self._put_back, "state": counter.states, "command": counter.open_commands}
        lost = len(self._bad)
        for seq in sorted(self._bad):
            books.bury(seq, Reason.DAMAGED, self._now)
        source = self._source
        if totals is None:
            some, commands = bool(self._gaps[_ENTRY.name]), bool(self._gaps[_COMMAND.name])
            self._uncounted = some or commands or source.log_lost
            missing = {
                "unknown": int(some or source.log_lost),
                "command": int(commands and not source.map_lost),
            }
        else:
            self._uncounted = source.log_blank
            missing = {
                "unknown": max(totals.events - found[""], int(source.log_blank)),
                "state": totals.states - found["state"],
                "command": totals.open_commands - found["command"],
            }
        for kind, count in missing.items():
            if count > 0:
                books.count_loss(Reason.DAMAGED, kind, self._now, count)
                lost += count
        if totals is not None:
            counter.commits = totals.commits
            self._top[Lane.EVENT] = max(self._top[Lane.EVENT], totals.next_event)
            self._top[Lane.STATE] = max(self._top[Lane.STATE], totals.next_state)
        counter.next_event = self._top[Lane.EVENT] + LEAP
        counter.next_state = self._top[Lane.STATE] + LEAP
        books.flush().execute("DELETE FROM sqlite_sequence WHERE name = 'command'")
        books.flush().execute(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'command', coalesce(max(key), 0) + ? FROM command", (LEAP,)
        )
        return lost

    def _seen(self, seq: int) -> None:
        """The number ``seq`` was in use, unless it is wild, as a damaged row's may be."""
        lane = Lane.STATE if seq >= first_seq(Lane.STATE) else Lane.EVENT
        number = seq - first_seq(lane)
        if number < MAX_NUMBER:
            self._top[lane] = max(self._top[lane], number)

    def _commit(self) -> None:
        self._books.write_counter()
        self._books.flush().execute("COMMIT")
        self._written = 0
        self._batches += 1
        if self._batches % _BATCHES_PER_CHECKPOINT == 0:
            self._books.flush().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _insert(table: Table) -> str:
    return f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({', '.join('?' * len(table.columns))})"


def _told(body: bytes) -> int:
    """Return how many losses a receipt tells of; one that is damaged will tell of one."""
    losses = reported(body)
    return 1 if losses is None else sum(loss.count for loss in losses)


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _name(value: object) -> str:
    """Return a damaged row's own word for itself, so far as it can be one."""
    name = _text(value)[:_LONGEST_NAME]
    return name if name and name.isprintable() else "unknown"
