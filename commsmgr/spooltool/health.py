"""
Is a spool as it should be? Looks at a copy, finds everything that is wrong, changes nothing.

SQLite checks its own structures, but not what is in them: a flipped bit in a body passes. So every row is read and held
against its checksum, and the totals against the rows.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from msgspec import Struct, structs

from commsmgr.spool import ballast, files, lossbook
from commsmgr.spool.counter import read_counter
from commsmgr.spool.faults import is_torn
from commsmgr.spool.records import Lane, command_checksum, entry_checksum, first_seq
from commsmgr.spool.totals import NEXT, TOTALS, recount
from commsmgr.spooltool.access import is_half_replaced
from commsmgr.spooltool.rows import Row, is_whole
from commsmgr.spooltool.snapshot import Snapshot, require, taken

MAX_FINDINGS: Final = 100
"""Sentences that are taken from SQLite's own check."""

_LOGS: Final = ("-wal", "-shm", "-journal")
_STATES: Final = first_seq(Lane.STATE)


def verify(directory: str) -> Iterator[Row]:
    """
    Yield a row for each problem, and at last one that says how it all stands, with ``ok``.

    :raise SpoolError: there is nothing to look at, or it cannot be read.
    """
    found = 0
    require(directory)
    report: Row = {"ok": False, "problems": 0, "path": directory}
    for problem in _file_problems(directory):
        found += 1
        yield problem
    with taken(directory) as snapshot:
        report |= {"version": snapshot.version, "database_bytes": snapshot.database_bytes}
        report |= {"log_bytes": snapshot.log_bytes, "reserve_bytes": _reserve(directory)}
        for problem in _problems(snapshot, report):
            found += 1
            yield problem
    report["set_aside"] = set_aside(directory)
    report |= {"ok": not found, "problems": found}
    yield report


def _problem(what: str, text: str, **more: Any) -> Row:
    return {"problem": what, **more, "text": text}


def _problems(snapshot: Snapshot, report: Row) -> Iterator[Row]:
    """Look at the copy; add the totals, as taken from the rows, to ``report``."""
    db = snapshot.db
    if db is None:
        text = f"the database cannot be opened: {snapshot.damage}"
        if snapshot.explanation:
            text += f": {snapshot.explanation}"
        yield _problem("file", text, reason=snapshot.damage)
        return
    yield from _guarded(lambda: structure(db))
    yield from _guarded(lambda: _row_problems(db))
    yield from _guarded(lambda: wrong_totals(db, report))


def _guarded(look: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield what ``look`` does, and what stops it."""
    try:
        yield from look()
    except sqlite3.DatabaseError as error:
        if not is_torn(error):
            raise
        yield _problem("structure", f"not everything can be read: {error}")


def structure(db: sqlite3.Connection) -> Iterator[Row]:
    """Yield what SQLite finds wrong with its own structures."""
    for (text,) in db.execute(f"PRAGMA integrity_check({MAX_FINDINGS})"):
        if text != "ok":
            yield _problem("structure", str(text))


class Damaged(Struct, frozen=True):
    """
    A row whose checksum is wrong.

    :ivar table: as SQL knows it.
    :ivar key: its primary key; 0 for a loss.
    """

    table: str
    key: int
    id: Any


def damaged_rows(db: sqlite3.Connection) -> Iterator[Damaged]:
    """Yield the rows whose checksum is wrong. Dead letters and finished commands have none."""
    for row in db.execute("SELECT crc, seq, kind, id, key, accepted_at, expires_at, body FROM entry ORDER BY seq"):
        if not is_whole(entry_checksum, *row):
            yield Damaged("entry", row[1], row[3])
    for key, *row in db.execute("SELECT key, crc, id, digest, body FROM command WHERE finished_at IS NULL"):
        if not is_whole(command_checksum, *row):
            yield Damaged("command", key, row[1])
    remembered = "SELECT r.key, r.crc, c.result_id, r.body FROM remembered r LEFT JOIN command c ON c.key = r.key"
    for key, crc, name, body in db.execute(remembered):
        if not is_whole(command_checksum, crc, name, "", body):
            yield Damaged("remembered", key, name)
    for (reason, *_), loss in lossbook.read(db):
        if loss is None:
            yield Damaged("loss", 0, reason)


def _row_problems(db: sqlite3.Connection) -> Iterator[Row]:
    for row in damaged_rows(db):
        match row.table:
            case "entry" if row.key < _STATES:
                yield _problem("row", f"event {row.key} is damaged: it will not be sent", table="events", id=row.id)
            case "entry":
                yield _problem("row", "a state is damaged: it will not be sent", table="states", id=row.id)
            case "command":
                text = "a command is damaged: the next start reports it as interrupted"
                yield _problem("row", text, table="commands", id=row.id)
            case "loss":
                text = f"a loss by the reason {row.id} is damaged: it is reported as one of unknown kind"
                yield _problem("row", text, table="losses", id=row.id)
            case _:
                text = "a remembered result is damaged: a duplicate of its command gets the status alone"
                yield _problem("row", text, table="commands", id=row.id)


def wrong_totals(db: sqlite3.Connection, report: Row | None = None) -> Iterator[Row]:
    """Yield the totals that do not agree with the rows, each with what would be right."""
    right = recount(db)
    if report is not None:
        report["totals"] = {name: right[name] for name in (*TOTALS, "losses")}
    found = read_counter(db)
    if found is None:
        yield _problem("total", "the totals are damaged: the next start, or repair, counts anew", total="", right=0)
        return
    counter = structs.asdict(found)
    for name, value in right.items():
        wrong = counter[name] < value if name in NEXT else counter[name] != value
        if wrong:
            text = f"the total {name} is {counter[name]}, and {value} would be right"
            yield _problem("total", text, total=name, right=value)


def _file_problems(directory: str) -> Iterator[Row]:
    """Yield the files that the agent could not use, or that others could read."""
    owner = os.stat(directory).st_uid
    for name in (files.DATABASE, f"{files.DATABASE}-wal", files.LOCK, ballast.NAME):
        try:
            status = os.stat(os.path.join(directory, name))
        except FileNotFoundError:
            continue
        if status.st_uid != owner:
            text = f"{name} belongs to user {status.st_uid}, its directory to user {owner}: chown it"
            yield _problem("permissions", text, file=name)
        if status.st_mode & 0o077:
            yield _problem("permissions", f"{name} is open to others than its owner: chmod 600 it", file=name)
    if is_half_replaced(directory):
        text = (
            "putting a new database in the place of a damaged one was interrupted: the next start, or repair, ends it"
        )
        yield _problem("file", text, reason="damaged")
    elif files.is_marked(directory):
        why = files.reason_of_mark(directory) or "nobody could write down how"
        text = f"the database was found damaged ({why}): the next start, or repair, takes over what can be read"
        yield _problem("file", text, reason="damaged")
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if _reserve(directory) < ballast.SIZE and free < 2 * ballast.SIZE:
        yield _problem("room", f"the disk is nearly full ({free} bytes are free) and the reserved room is given up")


def _reserve(directory: str) -> int:
    with suppress(OSError):
        return os.stat(os.path.join(directory, ballast.NAME)).st_size
    return 0


def set_aside(directory: str) -> list[str]:
    """Return the names of databases that were put aside earlier."""
    pattern = re.compile(re.escape(files.DATABASE) + r"\.\d{8}T\d{6}Z\.[a-z-]+(\.\d+)?")
    return sorted(name for name in os.listdir(directory) if pattern.fullmatch(name) and not name.endswith(_LOGS))
