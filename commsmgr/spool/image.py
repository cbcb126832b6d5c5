"""
A database file that SQLite can read, made of what is left of a torn spool; the originals are only read.

Where the database is there, begins as it should and has no log, it is its own image. Otherwise a copy is made, in which

* a first page that cannot be used is replaced by that of a new database: it holds the schema, and as the tables were
  made in the same order, and nothing moves a root (``auto_vacuum`` is incremental, and does so only when a table is
  dropped), they have the same roots;
* the log is folded in, also what stands behind a bad frame (see :mod:`.wal`). It is done here because SQLite throws the
  log away when the database is empty, and all that it takes for torn.

Pages that the disk cannot read are zeros in it, which SQLite takes for damage.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from typing import BinaryIO, Final
from urllib.parse import quote

from msgspec import Struct

from commsmgr.spool import layout, wal
from commsmgr.spool.files import NOT_OURS, beginning, size_of
from commsmgr.spool.schema import MIGRATIONS
from commsmgr.spool.wal import PAGE_SIZE, around, part

_CHUNK: Final = 1 << 20

_COUNTING: Final = frozenset(("counter",))
_MAIN: Final = _COUNTING | {"entry", "command"}

# What a ruined page may make of a read; MemoryError and OverflowError by a length that is none.
UNREADABLE: Final = (sqlite3.Error, MemoryError, OverflowError)


class Image(Struct, frozen=True):
    """
    :ivar path: the file to read; nothing else belongs to it.
    :ivar log_lost: whether there was a log whose latest transactions cannot be had, so that rows may be out of date.
    :ivar log_blank: whether nothing at all could be had of a log, so that the totals are of before it.
    :ivar map_lost: whether the database's beginning is lost, so that nothing tells which pages are in use.
    :ivar totals: what the row of them may say, by column; the likelier one first.
    """

    path: str
    log_lost: bool
    log_blank: bool
    map_lost: bool
    totals: tuple[dict[str, object], ...]


def make(path: str, scratch: str, first_page: bytes, *, use_log: bool) -> Image | None:
    """
    Make the image of the database at ``path``.

    :param scratch: the name of the copy, if one is needed; a file of that name is overwritten.
    :param first_page: of a new database.
    :param use_log: False when the log is not this database's.
    :return: None when it turns out, with the log, to be another program's or a newer version's.
    :raise OSError: the copy cannot be written.
    """
    size = size_of(path)
    log = size_of(path + "-wal") > wal.HEADER
    if size and beginning(path, around) is None and _has_schema(path) and not (log and use_log):
        return Image(path, log, log_blank=False, map_lost=False, totals=(_totals(path),))
    lost = blank = False
    with open(scratch, "w+b", opener=_private) as copy:
        if size:
            _copy(path, copy)
        if log and use_log:
            with open(path + "-wal", "rb") as source:
                lost, blank = _fold_in(source, copy)
    found = beginning(scratch, part)
    if found in NOT_OURS:
        return None
    totals: tuple[dict[str, object], ...] = ()
    if found is not None or not _has_schema(scratch):
        if found is None and _has_schema(scratch, _COUNTING):  # another table is missing, and then roots have moved
            totals = (_totals(scratch),)
        with open(scratch, "r+b") as copy:
            # So that SQLite goes by the file's size: the number of pages that stands in this page is another's.
            copy.write(first_page[:92] + bytes(4) + first_page[96:])
    totals += (_totals(scratch),)
    return Image(scratch, lost or (log and not use_log), blank, map_lost=size < 2 * PAGE_SIZE, totals=totals)


def connect(path: str) -> sqlite3.Connection:
    """Open the image at ``path``, so that it is not changed, and not even locked."""
    db = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None)
    # With this on, a file shorter than it should be is read as far as it goes.
    db.execute("PRAGMA writable_schema = ON")
    db.text_factory = _text
    return db


def _text(raw: bytes) -> str | bytes:
    """Leave text that is none as bytes, so that the row is seen to be damaged."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _has_schema(path: str, needed: frozenset[str] = _MAIN) -> bool:
    """Say whether the tables that are there are defined as they should be, those that are ``needed`` among them."""
    db = connect(path)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        found, right = layout.of(db), layout.made_by(MIGRATIONS[:version])
        return needed <= found.keys() and all(columns == found.get(name, columns) for name, columns in right.items())
    except (sqlite3.Error, UnicodeDecodeError):  # the latter where SQLite would quote what is no text
        return False
    finally:
        db.close()


def _totals(path: str) -> dict[str, object]:
    """Return the row of the totals as it is; empty when it cannot be read."""
    with closing(connect(path)) as db, suppress(*UNREADABLE, UnicodeDecodeError):
        found = db.execute("SELECT * FROM counter")
        if (row := found.fetchone()) is not None:
            return dict(zip((name for name, *_ in found.description), row, strict=True))
    return {}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _copy(path: str, copy: BinaryIO) -> None:
    """Copy what can be read."""
    with open(path, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        copy.writelines(around(source, start, _CHUNK) for start in range(0, size, _CHUNK))
    copy.flush()  # its size will be asked for


def _fold_in(log: BinaryIO, copy: BinaryIO) -> tuple[bool, bool]:
    """
    Write the log's transactions into ``copy``.

    :return: whether some are lost, or parts of them; and whether all are, if there were any.
    """
    found = wal.read(log, os.fstat(copy.fileno()).st_size, around)
    for number, position in found.latest.items():
        if 0 < number <= found.pages:
            copy.seek((number - 1) * PAGE_SIZE)
            copy.write(around(log, position, PAGE_SIZE))
    if found.pages:
        copy.truncate(found.pages * PAGE_SIZE)
    room = os.fstat(log.fileno()).st_size >= wal.HEADER + wal.FRAME
    return found.lost, room and not (found.whole or found.pages)
