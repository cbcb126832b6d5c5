"""
Mends what :mod:`.health` finds wrong, with the agent stopped.

Where SQLite cannot open the file, or finds its own structures broken, or the disk cannot read all of it, the very steps
of the agent's start are taken: the file is set aside and what can be read of it is taken over into a new one. Then, in
one transaction, the totals are counted anew, damaged entries become dead letters, and damaged commands are marked as
begun. A death at any point leaves something that repair, or the agent's start, goes on with.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing

from msgspec import structs

from commsmgr import config
from commsmgr.errors import SpoolError
from commsmgr.spool import files
from commsmgr.spool.books import Books
from commsmgr.spool.faults import is_torn, is_unreadable, one
from commsmgr.spool.opening import Opening, disconnect
from commsmgr.spool.records import Reason, command_checksum
from commsmgr.spool.schema import NewerVersion
from commsmgr.spool.totals import NEXT, recount
from commsmgr.spooltool import access
from commsmgr.spooltool.health import damaged_rows, set_aside, structure, wrong_totals
from commsmgr.spooltool.rows import Row


def repair(settings: config.Spool, wall: Callable[[], float]) -> Iterator[Row]:
    """
    Yield a row for each thing that was mended, and at last one with their number.

    :param wall: seconds since the epoch.
    :raise SpoolError: the spool is in use, absent, another program's or a newer version's, or the disk does not let us.
    """
    done: list[Row] = []
    failed: SpoolError | OSError | None = None
    try:
        with access.locked(settings.path):
            _repair(settings, wall, done)
    except (SpoolError, OSError) as error:
        failed = error
    yield from done  # what stays, although the rest has failed
    if failed is not None:
        raise Unfinished(failed.fact) if done and isinstance(failed, SpoolError) else failed
    yield {"done": "repaired", "count": len(done)}


class Unfinished(SpoolError):
    """The spool was replaced, and then something went wrong."""

    advice = "what is listed was done, and nothing else; look at the disk that holds the spool, and call repair again"


def _repair(settings: config.Spool, wall: Callable[[], float], done: list[Row]) -> None:
    """Add to ``done`` whatever was done, as soon as nothing undoes it."""
    opening = Opening(os.path.join(settings.path, files.DATABASE), settings, wall)
    access.with_room(settings.path, lambda: _judge(opening, settings.path))
    before = set(set_aside(settings.path))
    try:
        # Of an attempt without room that had replaced the spool already the second one knows.
        books, aside = access.with_room(settings.path, opening.open)
    except (SpoolError, OSError):
        done += ({"done": "set_aside", "name": name} for name in set_aside(settings.path) if name not in before)
        raise
    disconnect(books)
    if aside is not None:
        row: Row = {"done": "set_aside", "name": os.path.basename(aside.name)}
        done.append(row | ({} if aside.salvaged is None else structs.asdict(aside.salvaged)))
    done += access.with_room(
        settings.path, lambda: access.transaction(opening.connect(), lambda books: _mend(books, wall()))
    )


def _judge(opening: Opening, directory: str) -> None:
    """
    Have a database that is damaged, or that the disk cannot read all of, set aside when it is opened.

    An agent waits for a disk that cannot read, for it may come back. Here somebody has said to go on without it.
    """
    path = os.path.join(directory, files.DATABASE)
    found = ""
    try:
        reason = files.damage(path)
        if reason in files.NOT_OURS:
            raise SpoolError(f"{path} is {reason}: it is no spool of this version; nothing was changed")
        if reason is None and not access.needs_salvage(directory):
            found = _broken(opening)
    except (OSError, sqlite3.Error) as error:
        if not is_unreadable(error):
            raise
        found = str(error)
    if found:
        files.mark(directory, found)


def _broken(opening: Opening) -> str:
    """Return what is wrong with SQLite's own structures; empty when nothing is."""
    try:
        with closing(opening.connect().db) as db:
            return next((problem["text"] for problem in structure(db)), "")
    except NewerVersion:
        raise
    except sqlite3.Error as error:
        if not is_torn(error):
            raise
        return str(error)


def _mend(books: Books, now: float) -> list[Row]:
    db = books.flush()
    wrong = list(wrong_totals(db))
    done: list[Row] = [{"done": "recounted", "total": each["total"], "right": each["right"]} for each in wrong]
    if done:
        right = recount(db)
        right |= {name: max(right[name], getattr(books.counter, name)) for name in NEXT}
        books.counter = structs.replace(books.counter, **right)
    for row in list(damaged_rows(db)):
        if row.table == "entry":
            books.bury(row.key, Reason.DAMAGED, now)
            done.append({"done": "buried", "id": row.id, "reason": Reason.DAMAGED})
        elif row.table == "loss":
            books.lossbook.mend(now)  # all of them, once
            done.append({"done": "recounted", "table": "losses", "reason": row.id})
        elif row.table == "remembered":
            (size,) = one(db.execute("SELECT length(body) FROM remembered WHERE key = ?", (row.key,)))
            db.execute("DELETE FROM remembered WHERE key = ?", (row.key,))
            books.counter.remembered_bytes -= size or 0
            done.append({"done": "forgotten", "table": "commands", "id": row.id})
        else:
            # It may have been begun, and what it was is not known: the next start reports it as interrupted.
            name, digest = one(db.execute("SELECT id, digest FROM command WHERE key = ?", (row.key,)))
            whole = command_checksum(name, digest, b"")
            db.execute("UPDATE command SET offered = 1, body = x'', crc = ? WHERE key = ?", (whole, row.key))
            done.append({"done": "marked", "table": "commands", "id": row.id, "reason": "interrupted"})
    return done
