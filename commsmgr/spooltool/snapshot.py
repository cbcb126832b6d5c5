"""
A copy of a spool to read in, consistent although an agent goes on writing.

Theory of operation
===================

An agent holds an exclusive lock within SQLite, so nobody can read beside it by SQLite's own means. So the files are
copied: first the database, then its log, and before and after them the log's header is read. When it begins anew its
header gets new random salts, and never the same again: the same header twice is the proof that both copies were made
while the log only grew. Let that be so.

The agent writes to the database file at checkpoints alone, and what it writes then are pages of transactions that stand
committed in this very log. It does not take them out of it: that happens when the log begins anew, with the first
commit after the checkpoint. So however torn the copy of the database is by a checkpoint that went on meanwhile, half of
its pages old, half of them new, one of them torn in itself: each page that was written has a frame in the log, before
the commit that was the log's last when the copy of the database was done. That part of the log is never written again,
and is in the copy that was begun after it. SQLite reads a page from the log if it is in it, wherever in the database's
file it ends; and all other pages were not touched. So the copies are together what a crash would leave, as of a commit
that is no older than the moment when the copy of the database was done.

What is appended to the log while it is copied may be torn in the copy. Each frame's checksum goes on from the frame
before it, so SQLite drops the torn rest, and what an unfinished transaction has left, back to the last whole commit.

The other order would not do: a checkpoint after the log was copied may write pages of commits that are not in the copy.

While there is no log, or an empty one, nothing is written to the database but by way of a new log, or by another file
in its place: the database file itself, its size and its time must not have changed.

Nothing is opened, locked or created in the spool's directory, so that an agent may start, stop or die meanwhile, and
whoever may read the files can use this. The copies lose their names as soon as SQLite has them open: whatever ends this
process, nothing is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Final

from msgspec import Struct

from commsmgr.errors import SpoolError
from commsmgr.spool import files, wal
from commsmgr.spool.faults import is_full, is_torn, is_unreadable
from commsmgr.spool.faults import readable as text_of
from commsmgr.spool.replacing import PLAN
from commsmgr.spool.schema import NewerVersion, prepare

ATTEMPTS: Final = 50
"""Copies that are begun when the spool changes during each; with the pauses between them this takes some seconds."""

LONGEST_PAUSE: Final = 0.1
"""Seconds between two attempts."""


class Absent(SpoolError):
    """There is no spool."""

    advice = "is it the right directory? an agent makes its spool when it first starts"


class Unusable(SpoolError):
    """The database is damaged."""

    advice = "commsmgr spool verify says what is wrong; with the agent stopped, commsmgr spool repair mends it"


def require(directory: str) -> None:
    """
    :raise Absent: nothing in ``directory`` is a spool's database or its log.
    :raise SpoolError: it is no directory, or what is in it is no file.
    :raise OSError: this user may not look into it.
    """
    if os.path.exists(directory):
        if not os.path.isdir(directory):
            raise SpoolError(f"{directory} is no directory; name the one that holds {files.DATABASE}")
        if not os.access(directory, os.X_OK, effective_ids=True):  # every file would seem to be absent
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
    path = os.path.join(directory, files.DATABASE)
    if not any(os.path.lexists(path + ending) for ending in ("", "-wal", PLAN)):
        raise Absent(f"there is no {files.DATABASE} in {directory}")
    files.require_files(path)


def copy(directory: str, target: str) -> str:
    """
    Copy the spool in ``directory`` into the directory ``target``.

    :return: the path of the database's copy; a copy of the log stands beside it.
    :raise Absent: there is none.
    :raise SpoolError: it could not be read, or changed too fast, or there is no room for the copy.
    """
    require(directory)
    source = os.path.join(directory, files.DATABASE)
    path = os.path.join(target, files.DATABASE)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(LONGEST_PAUSE, 0.002 * attempt))
        before = _state(source)
        for ending in ("", "-wal"):
            _copy(source + ending, path + ending)
        if _state(source) == before:
            return path
    raise SpoolError(f"the spool in {directory} changes faster than it can be copied; try again, or stop the agent")


class Snapshot(Struct):
    """
    What the copy is.

    :ivar damage: in one word why it cannot be opened, as :func:`.files.damage` has it; None: it can.
    :ivar explanation: the same in SQLite's words, if it was SQLite that noticed.
    :ivar version: of its layout, as the file says; 0 when it says nothing. In ``db`` it is the present one.
    :ivar database_bytes: of the file, as ``log_bytes`` of the log.
    :ivar db: a connection, which may change what it likes; None when it cannot be opened.
    """

    damage: str | None
    explanation: str
    version: int
    database_bytes: int
    log_bytes: int
    db: sqlite3.Connection | None


@contextmanager
def taken(directory: str) -> Iterator[Snapshot]:
    """
    Copy the spool in ``directory`` and open the copy. Damage in the midst of it may be met by any later statement.

    :raise SpoolError: as :func:`copy`.
    """
    for _ in range(ATTEMPTS):
        with TemporaryDirectory(prefix="commsmgr-spool-") as target:
            path = copy(directory, target)
            snapshot = _judged(path)
            if snapshot.damage != "damaged-wal" or not _overtaken(os.path.join(directory, files.DATABASE), path):
                break
    else:
        raise SpoolError(f"the spool in {directory} changes faster than it can be copied; try again, or stop the agent")
    try:
        yield snapshot
    finally:
        if snapshot.db is not None:
            snapshot.db.close()


@contextmanager
def readable(directory: str) -> Iterator[sqlite3.Connection]:
    """
    Give a connection to a copy of the spool in ``directory``.

    :raise SpoolError: as :func:`copy`, or it cannot be opened.
    """
    with taken(directory) as snapshot:
        if snapshot.db is None:
            if snapshot.damage == "newer":
                raise SpoolError(f"the spool in {directory} was written by a newer commsmgr; use that one's tools")
            why = f"{snapshot.damage}: {snapshot.explanation}" if snapshot.explanation else snapshot.damage
            raise Unusable(f"the spool in {directory} cannot be opened ({why})")
        yield snapshot.db


def _judged(path: str) -> Snapshot:
    """Open the copy at ``path``, with the layout of today."""
    # It may have been set aside, and the new one not be in its place yet.
    damage = files.damage(path) if os.path.lexists(path) else "missing"
    snapshot = Snapshot(damage, "", 0, files.size_of(path), files.size_of(path + "-wal"), None)
    if snapshot.damage in (None, "newer"):
        with open(path, "rb") as file:
            snapshot.version = int.from_bytes(file.read(64)[60:], "big")
    if snapshot.damage is None:
        db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            prepare(db, synchronous="OFF", in_memory=False)
        except NewerVersion as error:
            snapshot.damage, snapshot.version = "newer", error.args[0]
        except sqlite3.DatabaseError as error:
            if not is_torn(error):
                raise
            snapshot.damage, snapshot.explanation = "damaged", str(error)
        else:
            # What is no UTF-8 is damaged, and shown all the same.
            db.text_factory = text_of
            snapshot.db = db
        finally:
            if snapshot.db is None:
                db.close()
    return snapshot


def _state(path: str) -> object:
    """Return what changes when the copies made meanwhile may not fit together."""
    try:
        with open(path + "-wal", "rb") as file:
            header = file.read(wal.HEADER)
    except FileNotFoundError:
        header = b""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return header
    # Another file may come in the database's place, when a damaged one is set aside, a moment before its log goes.
    return (header, status.st_ino) if header else (status.st_ino, status.st_size, status.st_mtime_ns)


def _overtaken(source: str, path: str) -> bool:
    """
    Say whether the log's copy only looks damaged, for the agent has written faster than it was copied.

    What was behind the bad frame had been written already, and so had that one before it: by now it is there.
    """
    with open(path + "-wal", "rb") as copied:
        bad = wal.read(copied, files.size_of(path), wal.part).bad
        try:
            with open(source + "-wal", "rb") as log:
                return bad is None or wal.part(log, bad, wal.FRAME) != wal.part(copied, bad, wal.FRAME)
        except FileNotFoundError:
            return True


def _copy(source: str, target: str) -> None:
    try:
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            if os.path.lexists(target):
                os.unlink(target)
    except OSError as error:
        if is_full(error):
            raise SpoolError(
                f"there is no room for a copy of {source} in {os.path.dirname(target)}; name a directory with room"
                " by the environment variable TMPDIR"
            ) from error
        if is_unreadable(error):
            raise Unusable(f"{source} cannot be copied: {error.strerror}") from error
        raise
