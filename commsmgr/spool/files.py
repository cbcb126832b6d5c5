"""
The spool's files: who may have them, and whether they are what they should be.

SQLite must not be let near a doubtful file: a missing or empty database beside a valid write-ahead log makes it delete
the log, a foreign log is applied, and ``journal_mode = WAL`` modifies a foreign database. So the first bytes are read
before connecting, and whatever is not ours is put aside, database and logs together, untouched: a torn spool never
stops the start.

The database is renamed first. After a crash between the renames the next start finds logs without a database, and puts
them aside as well; the other way round it would find a database whose latest commits had silently gone.
"""

from __future__ import annotations

import fcntl
import os
from time import gmtime, strftime

from commsmgr.errors import SpoolLocked, SpoolWriteFailed
from commsmgr.spool.schema import APPLICATION_ID, VERSION

DATABASE = "spool.db"
LOCK = "spool.lock"

_BESIDE = ("-wal", "-shm", "-journal")
_MAGIC = b"SQLite format 3\0"
_WAL_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
_WAL_HEADER = 32


def make_directory(path: str) -> None:
    """Create the spool's directory with mode 0700 if it is not there; an existing one keeps its mode."""
    os.makedirs(path, mode=0o700, exist_ok=True)


def lock(directory: str) -> int:
    """
    Take the lock of the spool in ``directory``; it ends when the returned descriptor is closed, or with the process.

    It is on a file of its own: opening and closing the database by hand would drop the locks that SQLite holds on it.

    :raise SpoolLocked: somebody has it, in this process or another.
    """
    path = os.path.join(directory, LOCK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SpoolLocked(f"{directory} is in use by another process") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def damage(path: str) -> str | None:
    """
    Judge the database at ``path`` by its first bytes, before SQLite sees it.

    :return: in one word what is wrong with it, or None when it may be opened: it is not there at all, or it is ours.
    :raise SpoolWriteFailed: it cannot be read and written.
    """
    wal = _size(path + "-wal")
    if not os.path.lexists(path):
        return "missing" if wal else None
    if not os.access(path, os.R_OK | os.W_OK) or not os.path.isfile(path):
        # SQLite would report this as an I/O error at a lock.
        raise SpoolWriteFailed(f"{path} is not a file that can be read and written")
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        return "empty"
    if len(header) < 100 or not header.startswith(_MAGIC):
        return "garbage"
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        return "foreign"
    if int.from_bytes(header[60:64], "big") > VERSION:
        return "newer"
    if wal >= _WAL_HEADER:
        with open(path + "-wal", "rb") as file:
            if file.read(4) not in _WAL_MAGIC:
                # The database alone may be half of a checkpoint.
                return "garbage-wal"
    return None


def create(path: str) -> None:
    """Make the file ``path`` if it is not there, so that it has mode 0600; SQLite gives its logs the same."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync_directory(os.path.dirname(path))


def set_aside(path: str, reason: str, now: float) -> str:
    """
    Put the database at ``path`` and its logs out of the way, unchanged.

    :param reason: one word, which becomes part of the name.
    :param now: seconds since the epoch.
    :return: the database's new path; the logs have the same with their own endings, so that SQLite finds them.
    """
    stem = f"{path}.{strftime('%Y%m%dT%H%M%SZ', gmtime(now))}.{reason}"
    name, number = stem, 1
    while any(os.path.lexists(name + ending) for ending in ("", *_BESIDE)):
        number += 1
        name = f"{stem}.{number}"
    for ending in ("", *_BESIDE):
        if os.path.lexists(path + ending):
            os.rename(path + ending, name + ending)
    sync_directory(os.path.dirname(path))
    return name


def sync_directory(directory: str) -> None:
    """Make renames and new names in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
