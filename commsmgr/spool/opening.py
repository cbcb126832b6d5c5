"""
Opens the spool's database, whatever is there: a torn spool never stops the start.

Theory of operation
===================

What cannot be used is replaced. A new database is built beside it under the name :data:`BUILDING`, with all that can be
read of the old one (:mod:`.salvage`), and flushed. Then, each step flushed before the next:

1. it is renamed to :data:`BUILT`: from here on it is complete, and what it was made of has served;
2. the old files are renamed: set aside, never deleted, never changed;
3. the mark that damage left (:func:`.files.mark`) is removed;
4. it is renamed to the database's name.

A crash before 1 leaves everything where it was, and the next start begins again; it removes what it finds under
:data:`BUILDING`. A crash after 1 has the next start go on at 2, so that nothing is taken over twice, and nothing that
was accepted later can be concerned, for the database has its name only after 4.

What is not ours, or was written by a newer version, is set aside and never read into ours.

The first database of all is made under :data:`BUILDING` too: half of one would look like a damaged spool.

On a full disk the ballast that the run before has left gives the little room that opening needs. Where even that is not
enough, or the new database finds no room, the start has failed for now, and nothing has changed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Final

from msgspec import Struct
from twisted.logger import Logger

from commsmgr import config
from commsmgr.spool import files, image
from commsmgr.spool.books import Books
from commsmgr.spool.faults import is_torn
from commsmgr.spool.records import Salvaged
from commsmgr.spool.salvage import Salvage
from commsmgr.spool.schema import NewerVersion, prepare
from commsmgr.spool.wal import PAGE_SIZE

BUILDING: Final = ".building"
BUILT: Final = ".built"
_IMAGE: Final = ".image"

_LOG_NOT_OURS: Final = "foreign-wal"


class SetAside(Struct, frozen=True):
    """
    What became of a spool that could not be used.

    :ivar name: the file's new name.
    :ivar salvaged: what was taken over; None when nothing was to be.
    """

    name: str
    salvaged: Salvaged | None


class Opening:
    """
    :param path: the database's, or ``:memory:``.
    :param wall: seconds since the epoch.
    """

    log = Logger()

    def __init__(self, path: str, settings: config.Spool, wall: Callable[[], float]) -> None:
        self._path = path
        self._settings = settings
        self._wall = wall

    def open(self) -> tuple[Books, SetAside | None]:
        """
        Open the database, a new one if what is there cannot be used. The lock must be held.

        :return: it, and what was set aside.
        :raise SpoolUnusable: it is no file.
        :raise OSError: the disk does not let us; also :class:`sqlite3.Error`.
        """
        aside = self._resume()
        reason = files.damage(self._path)
        if reason is None and files.is_marked(os.path.dirname(self._path)):
            reason = "damaged"
        if reason is not None:
            aside = self._replace(reason)
        try:
            return self._open(), aside
        except NewerVersion:
            aside = self._replace("newer")
        except sqlite3.DatabaseError as error:
            if not is_torn(error):
                raise
            aside = self._replace("damaged")
        return self._open(), aside

    def connect(self, *, damaged: bool = False) -> Books:
        """
        Open the database as it is.

        What is read of its log will count as accepted, so first of all that is made durable: a flush may have failed,
        now or in the life before.

        :param damaged: whether it is known to be damaged.
        :raise OSError: the disk does not let us; also :class:`sqlite3.Error`.
        """
        files.write_again(self._path + "-wal")
        synchronous = "NORMAL" if self._settings.durability == "normal" else "FULL"
        return self._connect(self._path, synchronous, damaged=damaged)

    def _open(self) -> Books:
        if not os.path.lexists(self._path):
            self._begin()
        books = self.connect()
        try:
            # What opening needs is read here, where a torn file can still be set aside.
            with books.lenient():
                for table in ("entry", "command", "remembered", "dead_letter", "loss", "loss_receipt"):
                    books.db.execute(f"SELECT 1 FROM {table} NOT INDEXED LIMIT 1").fetchall()
                books.db.execute("SELECT id, digest, body FROM command WHERE finished_at IS NULL").fetchall()
        except BaseException:
            disconnect(books)
            raise
        return books

    def _begin(self) -> None:
        """Make the first database. It has its name only when it is whole: killed before that we leave nothing torn."""
        building = self._path + BUILDING
        files.create(building)
        try:
            self._connect(building, "FULL", damaged=False).db.close()
            files.sync(building)
        except BaseException:
            files.remove(building)
            raise
        os.rename(building, self._path)
        files.sync_directory(os.path.dirname(self._path))

    def _connect(self, path: str, synchronous: str, *, damaged: bool) -> Books:
        db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            prepare(db, synchronous=synchronous, in_memory=path == ":memory:")
            quarter = self._settings.max_bytes // 4
            return Books(
                db,
                max_dead_letters=self._settings.max_dead_letters,
                max_dead_bytes=quarter,
                max_remembered=quarter,
                damaged=damaged,
            )
        except BaseException:
            with suppress(sqlite3.Error):
                db.close()
            raise

    # -- a new one for an old one

    def _resume(self) -> SetAside | None:
        """Finish, or forget, what a crash has interrupted."""
        files.remove(self._path + _IMAGE)
        files.remove(self._path + BUILDING)
        if not os.path.lexists(self._path + BUILT):
            return None
        reason = files.damage(self._path) or "damaged"
        return self._put_in_place(reason, None)

    def _replace(self, reason: str) -> SetAside | None:
        salvaged = None
        if reason not in files.NOT_OURS:
            salvaged = self._build(use_log=reason != _LOG_NOT_OURS)
            os.rename(self._path + BUILDING, self._path + BUILT)
            files.sync_directory(os.path.dirname(self._path))
        return self._put_in_place(reason, salvaged)

    def _build(self, *, use_log: bool) -> Salvaged:
        """Make a new database of what can be read of the old one."""
        building, copy = self._path + BUILDING, self._path + _IMAGE
        files.create(building)
        try:
            # No flush before the end: if it is not reached the file counts for nothing.
            self._connect(building, "OFF", damaged=False).db.close()
            with open(building, "rb") as file:
                first_page = file.read(PAGE_SIZE)
            source = image.make(self._path, copy, first_page, use_log=use_log)
            books = self._connect(building, "OFF", damaged=False)
            with closing(books.db) as db:
                salvaged = Salvaged() if source is None else Salvage(source, books, self._wall()).run()
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            files.sync(building)
        except BaseException:
            files.remove(building)
            raise
        finally:
            files.remove(copy)
        return salvaged

    def _put_in_place(self, reason: str, salvaged: Salvaged | None) -> SetAside | None:
        directory = os.path.dirname(self._path)
        aside = None
        if any(os.path.lexists(self._path + ending) for ending in ("", "-wal")):
            name = files.set_aside(self._path, reason, self._wall())
            aside = SetAside(name, salvaged)
            self.log.error(
                "The spool {path} could not be used ({reason}) and was set aside as {name}: {salvaged}.",
                event="spool.set-aside",
                path=self._path,
                reason=reason,
                name=name,
                salvaged="nothing was taken over" if salvaged is None else str(salvaged),
            )
        files.unmark(directory)
        if os.path.lexists(self._path + BUILT):
            os.rename(self._path + BUILT, self._path)
        files.sync_directory(directory)
        return aside


def disconnect(books: Books) -> None:
    """Close the database. Never fails: what is committed is safe."""
    with suppress(sqlite3.Error):
        books.db.close()
