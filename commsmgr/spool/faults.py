"""What an error says about the disk, the database and memory: damaged, or full; and how to read past damage."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, Final

ERRORS: Final = (sqlite3.Error, MemoryError)
"""What SQLite raises; the latter when it finds no memory."""

_TORN: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))
"""The codes by which SQLite says that a database is damaged."""

_TROUBLE: Final = frozenset(
    (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_PERM,
    )
)

_UNREADABLE: Final = frozenset((errno.EIO, errno.EUCLEAN, errno.EBADMSG))


def code(error: sqlite3.Error) -> int:
    """Return the primary result code; sqlite3 leaves it out of errors of its own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_trouble(error: BaseException) -> bool:
    """Say whether the disk is to blame, or a lack of memory, and not what was to be written."""
    return isinstance(error, OSError | MemoryError) or (isinstance(error, sqlite3.Error) and code(error) in _TROUBLE)


def is_torn(error: BaseException) -> bool:
    """Say whether ``error`` means that the database is damaged."""
    return isinstance(error, sqlite3.Error) and code(error) in _TORN


def is_full(error: BaseException) -> bool:
    """Say whether ``error`` means that there is no room on the disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.Error) and code(error) == sqlite3.SQLITE_FULL


def is_unreadable(error: BaseException) -> bool:
    """
    Say whether ``error`` means that a part of a file cannot be read, or may mean it.

    Where Linux says EIO, SQLite says that the database is damaged; plain code gets EIO for a failed write as well.
    """
    if isinstance(error, OSError):
        return error.errno in _UNREADABLE
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_READ


class Cause(Enum):
    """
    What has kept a transaction from being committed; what the writer does about each says :mod:`.writer`.

    :cvar MISTAKE: one of ours, or what was to be written.
    :cvar FULL: there is no room on the disk.
    :cvar TORN: the database is damaged.
    :cvar PART: perhaps a part only, of the disk or of the work, cannot be had.
    :cvar DISK: any other trouble with the disk.
    """

    MISTAKE = auto()
    FULL = auto()
    TORN = auto()
    PART = auto()
    DISK = auto()


def cause_of(error: BaseException) -> Cause:
    """Return what is to blame for ``error``."""
    if not is_trouble(error):
        return Cause.MISTAKE
    if is_full(error):
        return Cause.FULL
    if is_torn(error):
        return Cause.TORN
    # Some job may take much memory.
    return Cause.PART if isinstance(error, MemoryError) or is_unreadable(error) else Cause.DISK


def in_words(error: BaseException) -> str:
    """Return what ``error`` says to operators; a MemoryError has no words."""
    return "out of memory" if isinstance(error, MemoryError) else str(error)


def torn(reason: str) -> sqlite3.DatabaseError:
    """Return the error by which SQLite would say that the database is damaged, for damage that it does not see."""
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


@contextmanager
def lenient(db: sqlite3.Connection) -> Iterator[None]:
    """Read text that is no UTF-8 as well, for a row that is damaged."""
    before, db.text_factory = db.text_factory, readable
    try:
        yield
    finally:
        db.text_factory = before


def readable(text: bytes) -> str:
    """Return text that may be none; for ``text_factory``."""
    return text.decode("utf-8", "replace")


def one(found: sqlite3.Cursor) -> tuple[Any, ...]:
    """
    Return the row that a look for a known key has found.

    :raise sqlite3.DatabaseError: there is none. In a damaged tree a walk may come to rows that no look finds.
    """
    row: tuple[Any, ...] | None = found.fetchone()
    if row is None:
        raise torn("a row that is there is not found by its number")
    return row
