"""
Puts a new database in the place of one that cannot be used, so that it may be interrupted anywhere.

Theory of operation
===================

The new one is built beside the old one, under the name :data:`BUILDING`, with all that can be read of the old one (see
:mod:`.salvage`), or empty where that is not ours to read, and flushed. Then, each step flushed before the next:

1. the plan is written, under the name :data:`PLAN`: which name the old files get, why, and what was taken over. From
   here on the new database is complete, and what it was made of has served;
2. the old files get their new names: set aside, never deleted, never changed;
3. the new database gets the name of the old one, and the mark that damage left (:func:`.files.mark`) is removed;
4. the plan is removed.

A crash before 1 leaves everything where it was, and the next start begins again. After a crash behind 1 the next start
goes on with what is left of the plan, and says what the first one would have said: nothing is read or judged a second
time, so that it does not matter what half of the old files would look like. Nobody uses the new database before 4, so
nothing that was accepted later can be concerned.

A plan that cannot be read was not written by us, or was damaged since. It is carried out only where the old database
has no name and a new one is waiting for it; otherwise it is forgotten, as before 1: the originals can be read again.

The first database of all is made under :data:`BUILDING` too: half of one would look like a damaged spool.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from twisted.logger import Logger

from commsmgr.spool import files, image, wal
from commsmgr.spool.books import Books
from commsmgr.spool.records import Salvaged
from commsmgr.spool.salvage import Salvage
from commsmgr.spool.wal import PAGE_SIZE

BUILDING: Final = ".building"
PLAN: Final = ".plan"
IMAGE: Final = ".image"

ENDINGS: Final = (BUILDING, PLAN, PLAN + files.NEW, IMAGE)
"""Of the database's name: the files that there are while it is replaced."""

_LOG_NOT_OURS: Final = "foreign-wal"


class SetAside(Struct, frozen=True):
    """
    What became of a spool that could not be used.

    :ivar name: the file's new name.
    :ivar salvaged: what was taken over; None when nothing was to be.
    """

    name: str
    salvaged: Salvaged | None


class _Plan(Struct, frozen=True):
    """
    :ivar name: that the old database gets, in its directory; its logs have the same with their own endings.
    :ivar reason: in one word why.
    """

    name: Annotated[str, Meta(pattern=rf"^{files.DATABASE}\.[\w.-]+$")]
    reason: str
    salvaged: Salvaged | None


class Replacement:
    """
    :param path: the database's.
    :param wall: seconds since the epoch.
    :param connect: opens the new database at a path, and makes it if need be, with the given ``synchronous``.
    """

    log = Logger()

    def __init__(self, path: str, wall: Callable[[], float], connect: Callable[[str, str], Books]) -> None:
        self._path = path
        self._directory = os.path.dirname(path)
        self._wall = wall
        self._connect = connect

    def resume(self) -> SetAside | None:
        """
        Finish, or forget, what a crash has interrupted.

        :return: what was set aside, if it was the last step that was missing as well.
        """
        files.remove(self._path + IMAGE)
        files.remove(self._path + PLAN + files.NEW)
        plan = self._planned()
        if plan is not None:
            return self._carry_out(plan)
        files.remove(self._path + BUILDING)
        files.remove(self._path + PLAN)
        return None

    def begin(self) -> None:
        """Make the first database. It has its name only when it is whole: killed before that we leave nothing torn."""
        files.unmark(self._directory)
        self._build(salvage=False)
        os.rename(self._path + BUILDING, self._path)
        files.sync_directory(self._directory)

    def replace(self, reason: str) -> SetAside | None:
        """
        Put a new database in the place of what is there.

        :param reason: in one word what is wrong with that.
        :return: what was set aside; None when it has gone meanwhile.
        :raise OSError: the disk does not let us; also :class:`sqlite3.Error`. Before the plan nothing has changed.
        """
        salvaged = self._build(salvage=reason not in files.NOT_OURS, use_log=reason != _LOG_NOT_OURS)
        plan = self._plan(reason, salvaged)
        files.write(self._path + PLAN, msgspec.json.encode(plan))
        return self._carry_out(plan)

    def _plan(self, reason: str, salvaged: Salvaged | None) -> _Plan:
        return _Plan(os.path.basename(files.free_name(self._path, reason, self._wall())), reason, salvaged)

    def _planned(self) -> _Plan | None:
        try:
            with open(self._path + PLAN, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=_Plan)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            half_done = self._is_half_done()
            self.log.error(
                "{path} cannot be read ({reason}): {consequence}.",
                event="spool.plan-damaged",
                path=self._path + PLAN,
                reason=str(error),
                consequence="the new database is used, and how much was taken over into it is not known"
                if half_done
                else "it is forgotten, for the database is in its place, or there is no new one",
            )
            return self._plan("damaged", None) if half_done else None

    def _is_half_done(self) -> bool:
        """
        Say whether what is there shows that the old database was moved and the new one has to come in its place.

        Where the old one still has its name nothing was moved, and it can be read once more.
        """
        building = self._path + BUILDING
        return (
            not os.path.lexists(self._path)
            and os.path.lexists(building)
            and files.beginning(building, wal.part) is None
        )

    def _build(self, *, salvage: bool, use_log: bool = True) -> Salvaged | None:
        """Make a new database, of what can be read of the old one if that is to be."""
        building, copy = self._path + BUILDING, self._path + IMAGE
        files.create(building)
        try:
            self._connect(building, "FULL").db.close()
            salvaged = self._take_over(building, copy, use_log=use_log) if salvage else None
            files.sync(building)
        except BaseException:
            files.remove(building)
            raise
        finally:
            files.remove(copy)
        return salvaged

    def _take_over(self, building: str, copy: str, *, use_log: bool) -> Salvaged | None:
        with open(building, "rb") as file:
            first_page = file.read(PAGE_SIZE)
        source = image.make(self._path, copy, first_page, use_log=use_log)
        if source is None:
            return None
        books = self._connect(building, "OFF")
        with closing(books.db) as db:
            salvaged = Salvage(source, books, self._wall()).run()
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return salvaged

    def _carry_out(self, plan: _Plan) -> SetAside | None:
        """Do what is left to do; return what was set aside, unless nothing has that name."""
        name = os.path.join(self._directory, plan.name)
        if os.path.lexists(self._path + BUILDING):
            files.move(self._path, name)
            os.rename(self._path + BUILDING, self._path)
        files.unmark(self._directory)
        files.sync_directory(self._directory)
        aside = SetAside(name, plan.salvaged) if files.is_any(name) else None
        if aside is not None:
            self._tell(plan, name)
        files.remove(self._path + PLAN)
        files.sync_directory(self._directory)
        return aside

    def _tell(self, plan: _Plan, name: str) -> None:
        self.log.error(
            "The spool {path} could not be used ({reason}) and was set aside as {name}: {salvaged}.",
            event="spool.set-aside",
            path=self._path,
            reason=plan.reason,
            name=name,
            salvaged="nothing was taken over" if plan.salvaged is None else str(plan.salvaged),
        )
