"""
Dead letters sent again, and what waits given up, by an operator's decision. Each is done within one transaction.

The books stay right: what is given up unsent is a loss by the reason ``dropped``, and a dead letter; what is sent again
is no loss any more, if the backend was not told of it yet.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from commsmgr import config
from commsmgr.errors import QueueFull, SpoolError
from commsmgr.spool.books import SLICE, Books
from commsmgr.spool.faults import one
from commsmgr.spool.records import Lane, Reason, first_seq
from commsmgr.spooltool.rows import NAMED, Row, Table, meanings

Work: TypeAlias = Callable[[Books], list[Row]]
"""For :func:`.access.change`; returns a row for each that was named, or one for all."""

_STATES: Final = first_seq(Lane.STATE)
_CLASS: Final = "substr(reason, 1, instr(reason || ':', ':') - 1)"
# Dead letters have no checksum: damage may show in the types.
_WHOLE: Final = (
    f"({_CLASS} <> '{Reason.DAMAGED}' AND typeof(seq) = 'integer' AND typeof(kind) = 'text' AND typeof(id) = 'text'"
    " AND typeof(key) = 'text' AND typeof(reason) = 'text' AND typeof(body) = 'blob')"
)
_SENDABLE: Final = f"key = '' AND {_WHOLE}"


class NotFound(SpoolError):
    """Nothing in the spool has this name."""

    advice = "nothing was changed; ls shows what there is"


class NoRoom(QueueFull):
    """There is no room for all of them."""

    advice = "nothing was changed; take fewer, by --limit, or raise the bound in the configuration that --config names"


class Refused(SpoolError):
    """This cannot be done with what was named."""

    advice = "nothing was changed"


def requeue(names: Sequence[str], settings: config.Spool, now: float) -> Work:
    """
    Make these dead letters events again: with the same id and body, at the end of the lane, accepted now.

    :param names: ids or numbers.
    """

    def work(books: Books) -> list[Row]:
        letters = sorted({n for name in names for n in _letters(books, name)})
        _check_room(books, len(letters), sum(_size(books, n) for n in letters), settings)
        return list(_all_again(books, letters, now))

    return work


def requeue_all(reason: str | None, limit: int | None, settings: config.Spool, now: float) -> Work:
    """
    Make all dead letters that can be sent events again, the oldest first.

    :param reason: only those that died of this, which is compared with the part before the first colon.
    :param limit: only so many.
    """
    wanted = f"SELECT n, length(body) AS size FROM dead_letter WHERE {_SENDABLE} AND {_CLASS} = coalesce(?, {_CLASS})"
    chosen = f"{wanted} ORDER BY n LIMIT ?"
    values = reason, _most(limit)

    def work(books: Books) -> list[Row]:
        db = books.flush()
        count, size = db.execute(f"SELECT count(*), coalesce(sum(size), 0) FROM ({chosen})", values).fetchone()
        _check_room(books, count, size, settings)
        told = sum(row["loss_reported"] for row in _all_again(books, _column(books.flush(), chosen, *values), now))
        (left,) = books.flush().execute("SELECT count(*) FROM dead_letter").fetchone()
        return [{"done": "requeued", "count": count, "bytes": size, "losses_reported": told, "left": left}]

    return work


def _letters(books: Books, name: str) -> Iterator[int]:
    found = (
        books.flush()
        .execute(f"SELECT n, key, {_WHOLE} FROM dead_letter WHERE {NAMED} ORDER BY n", meanings(name))
        .fetchall()
    )
    if not found:
        raise NotFound(f"no dead letter is called {name}")
    for n, key, whole in found:
        if key:
            raise Refused(f"{name} is a state: the agent sends the latest by itself, an older one is of no use")
        if not whole:
            raise Refused(f"{name} is damaged: what would be sent is not what was accepted")
        yield n


def _check_room(books: Books, count: int, size: int, settings: config.Spool) -> None:
    events, held = books.counter.events, books.counter.event_bytes
    if events + count > settings.max_events:
        raise NoRoom(
            f"{events} events are waiting, {count} more would exceed spool.max_events, which is {settings.max_events}"
        )
    if held + size > settings.max_bytes:
        raise NoRoom(
            f"{held} bytes of events are waiting, {size} more would exceed spool.max_bytes, which is"
            f" {settings.max_bytes}"
        )


def _all_again(books: Books, letters: Sequence[int], now: float) -> Iterator[Row]:
    db = books.flush()
    db.execute("CREATE TEMP TABLE moved (old INTEGER PRIMARY KEY, new INTEGER NOT NULL)")
    for n in letters:
        seq, kind, name, died_at, reason, body = one(
            db.execute("SELECT seq, kind, id, died_at, reason, body FROM dead_letter WHERE n = ?", (n,))
        )
        entry = books.add_event(kind, name, body, now, None)
        db.execute("INSERT OR REPLACE INTO moved VALUES (?, ?)", (seq, entry.seq))
        _delete_letter(books, n, len(body))
        told = not books.lossbook.take_back(reason, kind, died_at)
        if not told:
            books.counter.losses -= 1
        row: Row = {"done": "requeued", "id": name, "kind": kind, "seq": entry.seq, "bytes": len(body)}
        yield row | {"loss_reported": told}
    # The command that one is the result of must know that it waits, or a duplicate would put it into the lane twice.
    db.execute(
        "UPDATE command SET result_seq = (SELECT new FROM moved WHERE old = result_seq)"
        " WHERE result_seq IN (SELECT old FROM moved)"
    )


def drop(names: Sequence[str], now: float) -> Work:
    """
    Give up what waits, as dead letters, and delete dead letters for good.

    :param names: ids, numbers, or what a state is the state of.
    """

    def work(books: Books) -> list[Row]:
        # All are found before any is dropped: the dead letter that a dropped entry leaves is not meant.
        found = [_found(books, name) for name in names]
        waiting = sorted({seq for seqs, _ in found for seq in seqs})
        letters = sorted({n for _, ns in found for n in ns})
        # Letters first: what waited becomes letters too, which may push the oldest out.
        deleted = [_delete(books, n) for n in letters]
        return [_bury(books, seq, now) for seq in waiting] + deleted

    return work


def drop_all(table: Table, limit: int | None, now: float) -> Work:
    """
    Do the same with all that is in ``table``.

    :param limit: only so many, the oldest.
    """

    def work(books: Books) -> list[Row]:
        count = size = 0
        while batch := _oldest(books.flush(), table, SLICE if limit is None else min(SLICE, limit - count)):
            for each in batch:
                row = _delete(books, each) if table is Table.DEAD else _bury(books, each, now)
                size += row["bytes"]
            count += len(batch)
        return [{"done": "dropped", "table": table.value, "count": count, "bytes": size}]

    return work


def _oldest(db: sqlite3.Connection, table: Table, count: int) -> list[int]:
    match table:
        case Table.EVENTS:
            return _column(db, "SELECT seq FROM entry WHERE seq < ? ORDER BY seq LIMIT ?", _STATES, count)
        case Table.STATES:
            return _column(db, "SELECT seq FROM entry WHERE seq > ? ORDER BY seq LIMIT ?", _STATES, count)
        case Table.DEAD:
            return _column(db, "SELECT n FROM dead_letter ORDER BY n LIMIT ?", count)
        case _:
            raise Refused(f"{table.value} cannot be dropped")


def _found(books: Books, name: str) -> tuple[list[int], list[int]]:
    values = meanings(name)
    waiting = _column(books.flush(), f"SELECT seq FROM entry WHERE {NAMED}", *values)
    letters = _column(books.flush(), f"SELECT n FROM dead_letter WHERE {NAMED}", *values)
    if not waiting and not letters:
        if _column(books.flush(), "SELECT key FROM command WHERE id = ? LIMIT 1", name):
            raise Refused(f"{name} is a command: were it forgotten it might be run twice")
        raise NotFound(f"nothing that waits and no dead letter is called {name}")
    return waiting, letters


def _bury(books: Books, seq: int, now: float) -> Row:
    kind, name, key, size = one(
        books.flush().execute("SELECT kind, id, key, coalesce(length(body), 0) FROM entry WHERE seq = ?", (seq,))
    )
    books.bury(seq, Reason.DROPPED, now)
    row: Row = {"done": "dropped", "table": Table.STATES.value if key else Table.EVENTS.value, "id": name}
    return row | ({"key": key} if key else {"seq": seq}) | {"kind": kind, "bytes": size}


def _delete(books: Books, n: int) -> Row:
    kind, name, reason = one(books.flush().execute("SELECT kind, id, reason FROM dead_letter WHERE n = ?", (n,)))
    size = _size(books, n)
    _delete_letter(books, n, size)
    row: Row = {"done": "dropped", "table": Table.DEAD.value, "id": name, "kind": kind}
    return row | {"reason": reason, "bytes": size}


def _delete_letter(books: Books, n: int, size: int) -> None:
    books.flush().execute("DELETE FROM dead_letter WHERE n = ?", (n,))
    books.counter.dead_letters -= 1
    books.counter.dead_bytes -= size


def _size(books: Books, n: int) -> int:
    (size,) = one(books.flush().execute("SELECT coalesce(length(body), 0) FROM dead_letter WHERE n = ?", (n,)))
    return int(size)


def _column(db: sqlite3.Connection, statement: str, *values: Any) -> list[int]:
    return [row[0] for row in db.execute(statement, values)]


def _most(limit: int | None) -> int:
    return -1 if limit is None else limit
