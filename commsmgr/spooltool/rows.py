"""
What stands in a spool's tables, row by row, as objects ready to be written as JSON.

Nothing is collected: a row is read when it is asked for, and a body only where it is to be shown.
"""

from __future__ import annotations

import sqlite3
from base64 import b64encode
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeAlias

import msgspec

from commsmgr.instants import rfc3339
from commsmgr.spool import lossbook
from commsmgr.spool.records import Lane, command_checksum, entry_checksum, first_seq

Row: TypeAlias = dict[str, Any]

_STATES = first_seq(Lane.STATE)
_ENTRY = "SELECT seq, kind, id, key, accepted_at, expires_at, length(body), crc, {body} FROM entry"
_DEAD = "SELECT seq, kind, id, key, accepted_at, died_at, reason, length(body), typeof(body), {body} FROM dead_letter"
_COMMAND = (
    "SELECT c.id, c.digest, c.accepted_at, c.offered, c.finished_at, c.status, c.result_id, length(c.body), c.crc,"
    " {command}, r.crc, {result} FROM command c LEFT JOIN remembered r ON r.key = c.key"
)


NAMED = "(id = ?1 OR (seq = ?2 AND seq < ?3) OR (key = ?1 AND key <> ''))"
"""What in SQL has a name, among entries and among dead letters; see :func:`meanings`."""


class Table(Enum):
    """What can be asked for."""

    EVENTS = "events"
    STATES = "states"
    DEAD = "dead"
    COMMANDS = "commands"
    LOSSES = "losses"


def listing(db: sqlite3.Connection, table: Table, *, bodies: bool = False) -> Iterator[Row]:
    """
    Yield what is in ``table``: the oldest first, but dead letters the latest first and commands without a result first.

    :param bodies: with them, and with whether a row is damaged.
    """
    match table:
        case Table.EVENTS:
            return _entries(db, "WHERE seq < ? ORDER BY seq", (_STATES,), bodies)
        case Table.STATES:
            return _entries(db, "WHERE seq > ? ORDER BY seq", (_STATES,), bodies)
        case Table.DEAD:
            return _dead(db, "ORDER BY n DESC", (), bodies)
        case Table.COMMANDS:
            return _all_commands(db, bodies)
        case Table.LOSSES:
            return _losses(db)


def named(db: sqlite3.Connection, name: str) -> Iterator[Row]:
    """
    Yield, with their bodies, all that ``name`` may mean.

    :param name: an id; or an event's number, which its dead letter keeps; or what a state is the state of.
    """
    values = meanings(name)
    yield from _entries(db, f"WHERE {NAMED} ORDER BY seq", values, True)
    yield from _dead(db, f"WHERE {NAMED} ORDER BY n", values, True)
    yield from _commands(db, "WHERE c.id = ? ORDER BY c.key", (name,), True)


def meanings(name: str) -> tuple[str, int | None, int]:
    """Return the values for :data:`NAMED`: the name, the number that it is written as, and the first of states."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 18 else None
    return name, number, _STATES


def _entries(db: sqlite3.Connection, where: str, values: tuple[Any, ...], bodies: bool) -> Iterator[Row]:
    statement = f"{_ENTRY} {where}".format(body="body" if bodies else "NULL")
    for seq, kind, name, key, accepted_at, expires_at, size, crc, body in db.execute(statement, values):
        row: Row = _place(seq, key, Table.STATES.value if seq > _STATES else Table.EVENTS.value)
        row |= {"kind": kind, "id": name, "accepted_at": moment(accepted_at), "bytes": size}
        if expires_at is not None:
            row["expires_at"] = moment(expires_at)
        if bodies:
            whole = is_whole(entry_checksum, crc, seq, kind, name, key, accepted_at, expires_at, body)
            row |= content("body", body) | ({} if whole else {"damaged": True})
        yield row


def _dead(db: sqlite3.Connection, where: str, values: tuple[Any, ...], bodies: bool) -> Iterator[Row]:
    statement = f"{_DEAD} {where}".format(body="body" if bodies else "NULL")
    for seq, kind, name, key, accepted_at, died_at, reason, size, type_, body in db.execute(statement, values):
        row = _place(seq, key, Table.DEAD.value) | {"kind": kind, "id": name, "reason": reason}
        row |= {"accepted_at": moment(accepted_at), "died_at": moment(died_at), "bytes": size}
        texts = all(isinstance(each, str) for each in (kind, name, key, reason))
        if not (texts and isinstance(seq, int) and type_ == "blob"):  # of its checks there is no other
            row["damaged"] = True
        yield row | (content("body", body) if bodies else {})


def _all_commands(db: sqlite3.Connection, bodies: bool) -> Iterator[Row]:
    yield from _commands(db, "WHERE c.finished_at IS NULL ORDER BY c.key", (), bodies)
    yield from _commands(db, "WHERE c.finished_at IS NOT NULL ORDER BY c.key", (), bodies)


def _commands(db: sqlite3.Connection, where: str, values: tuple[Any, ...], bodies: bool) -> Iterator[Row]:
    statement = f"{_COMMAND} {where}".format(
        command="c.body" if bodies else "NULL", result="r.body" if bodies else "NULL"
    )
    for found in db.execute(statement, values):
        name, digest, accepted_at, offered, finished_at, status, result_id, size, crc, body, *result = found
        row: Row = {"table": Table.COMMANDS.value, "id": name, "digest": digest, "accepted_at": moment(accepted_at)}
        if finished_at is None:
            row |= {"state": "offered" if offered else "waiting", "bytes": size}
            if bodies:
                whole = is_whole(command_checksum, crc, name, digest, body)
                row |= content("body", body) | ({} if whole else {"damaged": True})
        else:
            row |= {"state": "finished", "finished_at": moment(finished_at), "status": status, "result_id": result_id}
            if bodies and result[1] is not None:
                whole = is_whole(command_checksum, result[0], result_id, "", result[1])
                row |= content("result", result[1]) | ({} if whole else {"damaged": True})
        yield row


def _losses(db: sqlite3.Connection) -> Iterator[Row]:
    """Yield the losses of the receipt that is being reported, then those that come after it."""
    for name, body in db.execute("SELECT id, body FROM loss_receipt"):
        row: Row = {"table": Table.LOSSES.value, "receipt_id": name}
        losses = lossbook.reported(body)
        if losses is None:
            yield row | {"damaged": True}
        else:
            yield from (row | _loss(*msgspec.structs.astuple(loss)) for loss in losses)
    for found, loss in lossbook.read(db):
        yield {"table": Table.LOSSES.value, **_loss(*found)} | ({} if loss else {"damaged": True})


def _loss(reason: Any, kind: Any, count: Any, first_at: Any, last_at: Any) -> Row:
    return {
        "reason": reason,
        "kind": kind,
        "count": count,
        "first_at": moment(first_at),
        "last_at": moment(last_at),
    }


def _place(seq: Any, key: Any, table: str) -> Row:
    """Return the names of an entry. A state's number is beyond what readers of JSON can hold: it goes by its key."""
    return {"table": table, "key": key} if isinstance(seq, int) and seq > _STATES else {"table": table, "seq": seq}


def is_whole(checksum: Any, crc: Any, *fields: Any) -> bool:
    """Say whether the checksum of a row is right, whatever types its damage has left."""
    try:
        return bool(checksum(*fields) == crc)
    except (TypeError, UnicodeEncodeError):
        return False


def decoded(body: bytes) -> Any:
    """
    :raise ValueError: it is no JSON.
    """
    try:
        body.decode("utf-8")  # msgspec looks at it only where it needs to
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError("no JSON") from error


def content(name: str, body: Any) -> Row:
    """Return ``body`` under ``name``: as it is when it is JSON, or else in base64 and said so."""
    try:
        decoded(body)
    except ValueError:
        raw = body if isinstance(body, bytes) else str(body).encode()
        return {f"{name}_base64": b64encode(raw).decode("ascii")}
    # Digit for digit as it would be sent, but on one line.
    return {name: msgspec.Raw(msgspec.json.format(body, indent=-1))}


def moment(timestamp: Any) -> Any:
    """Return seconds since the epoch as RFC 3339 has it; a value that is none, for it is damaged, as it is."""
    try:
        return rfc3339(timestamp)
    except ValueError:
        return str(timestamp)
