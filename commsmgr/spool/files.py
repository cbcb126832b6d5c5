"""
The spool's files: who may have them, and whether they are what they should be.

SQLite must not be let near a doubtful file: a missing or empty database beside a valid write-ahead log makes it delete
the log, a foreign log is applied, and ``journal_mode = WAL`` modifies a foreign database. So the first bytes are read
before connecting, and whatever is not ours is put aside, database and logs together, untouched: a torn spool never
stops the start.

How it is put aside, and what a crash in between means, says :mod:`.replacing`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from time import gmtime, strftime

from commsmgr.errors import SpoolLocked, SpoolUnusable, SpoolWriteFailed
from commsmgr.spool import wal
from commsmgr.spool.faults import is_unreadable
from commsmgr.spool.schema import APPLICATION_ID, VERSION

DATABASE = "spool.db"
LOCK = "spool.lock"

MARK = "spool.damaged"
"""Says to the next start that the database was found damaged while it was in use: opening alone would not see it."""

NEW = ".new"
"""Ends the name of a file that is being written and has its right name only when it is whole; see :func:`write`."""

NOT_OURS = ("foreign", "newer")
"""What :func:`beginning` says of a database that we must not read."""

_SQLITE_LOCK = 510, 0x40000002
"""The number of bytes, and the first of them, that SQLite locks in a database that it reads or writes."""

_LONGEST_REASON = 1000
BESIDE = ("-wal", "-shm", "-journal")
"""Ends the names of what SQLite keeps beside a database."""

_MAGIC = b"SQLite format 3\0"
_OURS = APPLICATION_ID.to_bytes(4, "big")
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
"""Open no file that a link leads to: it is none of ours. ELOOP says so."""

_CANNOT_HEAL = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
)


def lock(directory: str) -> int:
    """
    Take the lock of the spool in ``directory``; it ends when the returned descriptor is closed, or with the process.

    It is on a file of its own: opening and closing the database by hand would drop the locks that SQLite holds on it.
    The file says which process has it, for whoever is refused; what is left in it afterwards means nothing.

    :raise SpoolLocked: somebody has it, in this process or another.
    :raise SpoolUnusable: something else has its name.
    """
    path = os.path.join(directory, LOCK)
    _require_file(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).strip().decode("ascii", "replace")
        os.close(descriptor)
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise SpoolLocked(f"{directory} is in use by {who}") from None
    except BaseException:
        os.close(descriptor)
        raise
    with suppress(OSError):  # a full disk must not keep anybody out
        os.pwrite(descriptor, f"{os.getpid():<20}\n".encode(), 0)
    return descriptor


def require_files(path: str) -> None:
    """
    See that the database at ``path`` and its log are files, or not there. Opening what is none may block for ever.

    :raise SpoolUnusable: one is something else. A link to a file is not followed: SQLite keeps the log beside the file
        that it leads to, where nobody else would look for it.
    """
    for ending in ("", "-wal"):
        _require_file(path + ending)


def _require_file(path: str) -> None:
    if os.path.islink(path):
        raise SpoolUnusable(
            f"{path} is a symbolic link to {os.readlink(path)}, and has to be a file: set spool.path to the directory"
            " that holds the file itself"
        )
    if not _is_free(path):
        raise SpoolUnusable(f"{path} is not a file")


def _is_free(path: str) -> bool:
    """Say whether there is a file at ``path``, or nothing."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True


def require_unused(path: str) -> None:
    """
    See that no other process has the database at ``path`` open, whoever has :func:`lock`: that file can be removed.

    To be asked before anything is done to the files: SQLite would say so too, but only when it is let near them.

    :raise SpoolLocked: one has.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | _SAFELY)
    except OSError:  # it is not there, or it is for others to say what is wrong with it
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, *_SQLITE_LOCK)
    except (BlockingIOError, PermissionError):
        raise SpoolLocked(
            f"{path} is in use by a process that does not hold {LOCK}: perhaps that file was removed under an agent"
        ) from None
    finally:
        os.close(descriptor)


def damage(path: str) -> str | None:
    """
    Judge the database at ``path`` by its first bytes, before SQLite sees it.

    :return: in one word what is wrong with it, or None when it may be opened: it is not there at all, or it is ours; or
        it is marked as damaged (see :func:`mark`) and the disk cannot read it.
    :raise SpoolUnusable: it is somebody else's.
    :raise SpoolWriteFailed: the file system is read-only.
    :raise OSError: the disk cannot read it.
    """
    log = size_of(path + "-wal")
    if not os.path.lexists(path):
        return "missing" if log else None
    if not os.access(path, os.R_OK | os.W_OK):
        # SQLite would report this as an I/O error at a lock.
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise SpoolWriteFailed(f"{path} is on a file system that is read-only now")
        raise SpoolUnusable(f"{path} cannot be read and written by this user")
    try:
        reason = beginning(path, wal.part)
        return reason if reason is not None or log < wal.HEADER else _damage_of_log(path, log)
    except OSError as error:
        # A disk that cannot read now may do so later, and nothing is set aside for that. But what is marked will be.
        if is_unreadable(error) and is_marked(os.path.dirname(path)):
            return None
        raise


def beginning(path: str, take: wal.Take) -> str | None:
    """
    Say what is wrong with the first bytes of the file; None when they are those of a database of ours.

    :param take: what reads them.
    """
    with open(path, "rb") as file:
        return _judged(take(file, 0, 100))


def _judged(header: bytes) -> str | None:
    if not header:
        return "empty"
    if len(header) < 100 or not header.startswith(_MAGIC):
        return "garbage"
    if header[68:72] != _OURS:
        return "foreign"
    if int.from_bytes(header[60:64], "big") > VERSION:
        return "newer"
    return None


def _damage_of_log(path: str, size: int) -> str | None:
    with open(path + "-wal", "rb") as file, open(path, "rb") as database:
        header = wal.part(file, 0, wal.HEADER)
        if header[:4] not in wal.MAGIC:
            # The database alone may be half of a checkpoint. But a log without a whole frame holds nothing, and after a
            # power cut its header may be half-written, or zeros.
            return "garbage-wal" if size >= wal.HEADER + wal.FRAME else None
        if wal.is_whole(header) and int.from_bytes(header[8:12], "big") != wal.PAGE_SIZE:
            return "foreign-wal"
        log = wal.read(file, size_of(path), wal.part)
        if not log.whole:
            # SQLite takes it for empty, which it was if a power cut has left its header half-written.
            return "garbage-wal" if log.bad is not None or wal.is_news(log, file, database) else None
        if 1 in log.latest:
            # SQLite would fold another database's log in. Nothing tells it from ours but the first page, if it has it.
            found = _judged(wal.part(file, log.latest[1], 100))
            if found is not None:
                return "newer" if found == "newer" else "foreign-wal"
        return None if log.bad is None else "damaged-wal"


def cannot_heal(error: OSError) -> bool:
    """Say whether waiting cannot help: the path is wrong, or somebody else's."""
    return error.errno in _CANNOT_HEAL


def mark(directory: str, reason: str) -> None:
    """Remember in ``directory`` that the database is damaged; a disk that takes not even this is no reason to fail."""
    path = os.path.join(directory, MARK)
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | _SAFELY, 0o600)
        try:
            # The name alone counts, so that a full disk may leave the file empty.
            with suppress(OSError):
                os.write(descriptor, f"{reason}\n".encode())
        finally:
            os.close(descriptor)
        sync_directory(directory)


def is_marked(directory: str) -> bool:
    """Say whether :func:`mark` was called and :func:`unmark` was not."""
    return os.path.lexists(os.path.join(directory, MARK))


def reason_of_mark(directory: str) -> str:
    """Return what :func:`mark` was given; empty when that had no room, or cannot be read."""
    path = os.path.join(directory, MARK)
    with suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read(_LONGEST_REASON).decode("utf-8", "replace").strip()
    return ""


def unmark(directory: str) -> None:
    """The database that was damaged is not the one that will be opened any more."""
    remove(os.path.join(directory, MARK))


def create(path: str) -> None:
    """Make the file ``path`` if it is not there, so that it has mode 0600; SQLite gives its logs the same."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600))
    sync_directory(os.path.dirname(path))


def write(path: str, content: bytes) -> None:
    """Make a file of mode 0600 at ``path`` that is there with all of ``content``, or not at all, whenever we die."""
    descriptor = os.open(path + NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.rename(path + NEW, path)
    sync_directory(os.path.dirname(path))


def free_name(path: str, reason: str, now: float) -> str:
    """
    Return a name that neither a database nor a log has, for what is at ``path``.

    :param reason: one word, which becomes part of the name.
    :param now: seconds since the epoch.
    """
    stem = f"{path}.{strftime('%Y%m%dT%H%M%SZ', gmtime(now))}.{reason}"
    name, number = stem, 1
    while is_any(name):
        number += 1
        name = f"{stem}.{number}"
    return name


def is_any(path: str) -> bool:
    """Say whether there is a database at ``path``, or a log of one."""
    return any(os.path.lexists(path + ending) for ending in ("", *BESIDE))


def move(path: str, name: str) -> None:
    """
    Rename the database at ``path`` and its logs, or whatever there is of them, to ``name``, unchanged.

    The logs keep their own endings, so that SQLite finds them.
    """
    for ending in ("", *BESIDE):
        if os.path.lexists(path + ending):
            os.rename(path + ending, name + ending)
    sync_directory(os.path.dirname(path))


def clear(path: str, now: float) -> str | None:
    """
    See that there is a file at ``path``, or nothing: whatever else is there is renamed.

    :return: its new name, or None when nothing had to be done.
    """
    if _is_free(path):
        return None
    name = free_name(path, "no-file", now)
    os.rename(path, name)
    sync_directory(os.path.dirname(path))
    return name


def remove(path: str) -> None:
    """Remove the database at ``path`` and its logs, or whatever there is of them."""
    for ending in ("", *BESIDE):
        with suppress(FileNotFoundError):
            os.unlink(path + ending)


def sync(path: str) -> None:
    """Make what is in the file ``path``, which no connection has open, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | _SAFELY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_again(path: str) -> None:
    """
    Write what is in the file ``path``, which no connection has open, over itself, and flush it.

    When a flush has failed Linux takes for written what was not: that can still be read, no later flush writes it, and
    a power cut brings back what stood there before.
    """
    if not size_of(path):
        return
    descriptor = os.open(path, os.O_RDWR | _SAFELY)
    try:
        start = 0
        while part := os.pread(descriptor, 1 << 20, start):
            # What is all zeros may be a hole, of gigabytes, and is nobody's page.
            start += os.pwrite(descriptor, part, start) if part != bytes(len(part)) else len(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(os.path.dirname(path))


def sync_directory(directory: str) -> None:
    """Make renames and new names in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(path: str) -> int:
    """Return the bytes of the file, 0 when it is not there."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
