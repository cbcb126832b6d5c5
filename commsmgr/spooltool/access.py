"""
Changing a spool that no agent uses.

The tool takes the very lock that an agent takes, and so neither can be there while the other is. A superuser acts as
the owner of the spool's directory meanwhile: whatever file comes into being, also when this process dies half-way,
belongs to the agent's user, who would else be locked out of its own spool.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from commsmgr import config
from commsmgr.errors import SpoolError, SpoolLocked, SpoolWriteFailed
from commsmgr.spool import files
from commsmgr.spool.ballast import Ballast
from commsmgr.spool.books import Books
from commsmgr.spool.directory import require_private
from commsmgr.spool.faults import is_full, is_torn, is_unreadable
from commsmgr.spool.opening import Opening
from commsmgr.spool.replacing import PLAN
from commsmgr.spool.schema import NewerVersion
from commsmgr.spooltool.snapshot import Unusable, require

T = TypeVar("T")


class InUse(SpoolLocked):
    """An agent uses the spool."""

    advice = "stop the agent first; ls, show, export and verify work beside it"


@contextmanager
def owned(directory: str) -> Iterator[None]:
    """Be the owner of ``directory`` meanwhile, if this process may become that."""
    status = os.stat(directory)
    before = os.geteuid(), os.getegid()
    if before[0] != 0 or status.st_uid == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([status.st_gid])
    os.setegid(status.st_gid)
    os.seteuid(status.st_uid)
    try:
        yield
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])
        os.setgroups(groups)


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """
    Have the spool in ``directory`` for oneself.

    :raise InUse: an agent has it, or another tool.
    :raise Absent: there is none.
    :raise SpoolUnusable: others than its owner can change it.
    """
    require(directory)
    with owned(directory):
        require_private(directory)
        try:
            lock = files.lock(directory)
        except SpoolLocked as error:
            raise InUse(error.fact) from None
        try:
            try:
                # Before anything of it is written: whoever has it may have lost the lock's file.
                files.require_unused(os.path.join(directory, files.DATABASE))
            except SpoolLocked as error:
                raise InUse(error.fact) from None
            yield
        finally:
            os.close(lock)


def change(settings: config.Spool, work: Callable[[Books], T]) -> T:
    """
    Do ``work`` in one transaction, while the spool is :func:`locked`: all of it is done or, whatever happens, nothing.

    :raise Unusable: the database is damaged, or the disk cannot read all of it.
    :raise WriteFailed: the disk does not let us; nothing is changed.
    """
    return with_room(settings.path, lambda: _change(settings, work))


def _change(settings: config.Spool, work: Callable[[Books], T]) -> T:
    path = os.path.join(settings.path, files.DATABASE)
    reason = files.damage(path)
    if reason == "newer":
        raise SpoolError(f"the spool in {settings.path} was written by a newer commsmgr; use that one's tools")
    if reason == "foreign":
        raise SpoolError(f"{path} is not a commsmgr spool; nothing was changed")
    if reason is None and needs_salvage(settings.path):
        reason = "damaged"
    if reason is not None:
        raise Broken(f"the spool in {settings.path} cannot be used ({reason})")
    return transaction(Opening(path, settings, time.time).connect(), work)


def needs_salvage(directory: str) -> bool:
    """Say whether the database was found damaged, or its replacement was interrupted."""
    return files.is_marked(directory) or is_half_replaced(directory)


def is_half_replaced(directory: str) -> bool:
    """Say whether putting another database in the place of one that could not be used was interrupted."""
    return os.path.lexists(os.path.join(directory, files.DATABASE + PLAN))


def transaction(books: Books, work: Callable[[Books], T]) -> T:
    """Do ``work`` and close the database; what was not committed then is undone."""
    db = books.flush()
    try:
        db.execute("BEGIN IMMEDIATE")
        with books.lenient():
            done = work(books)
        books.write_counter()
        db.execute("COMMIT")
        with suppress(sqlite3.Error):
            # What is free now goes back to the disk. Should that fail the agent will use it.
            db.executescript("PRAGMA incremental_vacuum")
        return done
    finally:
        db.close()


def with_room(directory: str, work: Callable[[], T]) -> T:
    """
    Do ``work``; on a full disk once more, without the reserve, which is there for what makes the spool smaller. The
    agent takes it again when it can.

    :raise Unusable: the database is damaged, or the disk cannot read all of it.
    :raise WriteFailed: the disk does not let us.
    """
    try:
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            if not is_full(error):
                raise
        Ballast(directory).drop()
        return work()
    except NewerVersion:
        raise SpoolError(f"the spool in {directory} was written by a newer commsmgr; use that one's tools") from None
    except (sqlite3.Error, OSError) as error:
        if is_torn(error):
            raise Broken(f"the database in {directory} is damaged: {error}") from None
        if is_unreadable(error):
            raise Broken(f"not everything in {directory} can be read: {error}") from None
        if isinstance(error, OSError) and not is_full(error):
            raise
        raise WriteFailed(f"the spool in {directory} cannot be written: {error}") from None


class Broken(Unusable):
    """The database that was to be changed is damaged, or the disk cannot read all of it."""

    advice = "nothing was changed; commsmgr spool verify says what is wrong, commsmgr spool repair mends it"


class WriteFailed(SpoolWriteFailed):
    """The spool's disk is full or failing."""

    advice = "nothing was changed; look at the disk that holds it"
