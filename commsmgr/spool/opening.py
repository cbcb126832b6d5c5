"""
Opens the spool's database, whatever is there: a torn spool never stops the start.

What is there is judged three times, and replaced (see :mod:`.replacing`) if it cannot be used: by the first bytes,
before SQLite sees it (see :mod:`.files`); by reading all that the start needs, before anything is written to it; and by
whatever is met while it is made ready. What is not ours, or was written by a newer version, is set aside and never read
into ours.

On a full disk the ballast that the run before has left gives the little room that opening needs. Where even that is not
enough, or the new database finds no room, the start has failed for now, and nothing has changed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final

from msgspec import structs
from twisted.logger import Logger

from commsmgr import config
from commsmgr.spool import ballast, files, layout, totals
from commsmgr.spool.books import Books
from commsmgr.spool.counter import write_counter
from commsmgr.spool.faults import is_torn, torn
from commsmgr.spool.records import MAX_NUMBER, Lane, first_seq
from commsmgr.spool.replacing import ENDINGS, Replacement, SetAside
from commsmgr.spool.schema import MIGRATIONS, NewerVersion, look, prepare

_NUMBERED: Final = {"entry": "seq", "dead_letter": "seq", "command": "result_seq"}
"""Where the numbers of entries stand."""


class Opening:
    """
    :param path: the database's, or ``:memory:``.
    :param wall: seconds since the epoch.
    """

    log = Logger()

    def __init__(self, path: str, settings: config.Spool, wall: Callable[[], float]) -> None:
        self._path = path
        self._in_memory = path == ":memory:"
        self._settings = settings
        self._wall = wall
        self._synchronous = "NORMAL" if self._settings.durability == "normal" else "FULL"
        self._replacement = Replacement(path, wall, self._connect)
        self._aside: SetAside | None = None

    def open(self) -> tuple[Books, SetAside | None]:
        """
        Open the database, a new one if what is there cannot be used. The lock must be held.

        :return: it, and what was set aside.
        :raise SpoolLocked: another process has it all the same.
        :raise SpoolUnusable: it is no file.
        :raise OSError: the disk does not let us; also :class:`sqlite3.Error`.
        """
        books = self._open()
        # Of an attempt that has failed behind that as well.
        aside, self._aside = self._aside, None
        return books, aside

    def _open(self) -> Books:
        files.require_files(self._path)
        files.require_unused(self._path)
        self._clear()
        self._aside = self._replacement.resume() or self._aside
        reason = files.damage(self._path)
        if reason is None and not os.path.lexists(self._path):
            self._replacement.begin()
        elif reason is None and files.is_marked(os.path.dirname(self._path)):
            reason = "damaged"
        if reason is None:
            self._make_durable()
            with ExitStack() as doubtful:
                db = sqlite3.connect(self._path, isolation_level=None, timeout=0)
                doubtful.callback(_close, db)
                try:
                    _read(db)
                    self._prepare(db, self._synchronous)
                    self._correct(db)
                    books = self.books(db, damaged=False)
                    self._catch_up(books)
                    doubtful.pop_all()
                    return books
                except NewerVersion:
                    reason = "newer"
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                    # The latter is all that comes of a sentence of SQLite's that quotes damaged text.
                    if isinstance(error, sqlite3.Error) and not is_torn(error):
                        raise
                    reason = "damaged"
                # Still connected: when SQLite closes a database it folds the log in, unless that has another name.
                self._aside = self._replacement.replace(reason)
        else:
            self._aside = self._replacement.replace(reason)
        return self.connect()

    def _clear(self) -> None:
        """Where we keep a file there may be somebody's directory: nothing of the spool, and no reason not to start."""
        directory = os.path.dirname(self._path)
        others = (os.path.join(directory, name) for name in (files.MARK, ballast.NAME))
        databases = [self._path + ending for ending in ("", *ENDINGS)]
        for path in (*others, *(each + ending for each in databases for ending in ("", *files.BESIDE))):
            if (name := files.clear(path, self._wall())) is not None:
                self.log.warn(
                    "{path} was no file, and is now called {name}: this name is for a file of the spool.",
                    event="spool.name-cleared",
                    path=path,
                    name=name,
                )

    def _correct(self, db: sqlite3.Connection) -> None:
        """Count anew totals that cannot be right though the rows are: they are no reason to set a spool aside."""
        if (counter := totals.corrected(db)) is None:
            return
        self.log.warn(
            "The totals of the spool {path} could not be right and were counted anew: {found} are now {totals}.",
            event="spool.totals-counted",
            path=self._path,
            found=totals.found(db),
            totals=structs.asdict(counter),
        )
        db.execute("BEGIN IMMEDIATE")
        write_counter(db, counter)
        db.execute("COMMIT")

    def _catch_up(self, books: Books) -> None:
        """
        Have the next numbers greater than all that are in use.

        With a lesser one nothing could be accepted, or the result of a command, or a dead letter, be taken for another
        message. But of finished commands and dead letters nothing need be readable for a start.
        """
        db, counter = books.db, books.counter
        behind: dict[str, int] = {}
        for name, lane in (("next_event", Lane.EVENT), ("next_state", Lane.STATE)):
            last = _last(db, lane, "entry")
            for table in ("dead_letter", "command"):
                with suppress(sqlite3.DatabaseError):
                    last = max(last, _last(db, lane, table))
            if last >= getattr(counter, name):
                behind[name] = last + 1
        if not behind:
            return
        self.log.warn(
            "The spool {path} would have used numbers again: now {numbers}.",
            event="spool.numbers-raised",
            path=self._path,
            numbers=behind,
        )
        for name, number in behind.items():
            setattr(counter, name, number)
        db.execute("BEGIN IMMEDIATE")
        books.write_counter()
        db.execute("COMMIT")

    def connect(self, *, damaged: bool = False) -> Books:
        """
        Open the database as it is.

        :param damaged: whether it is known to be damaged.
        :raise OSError: the disk does not let us; also :class:`sqlite3.Error`.
        """
        self._make_durable()
        return self._connect(self._path, self._synchronous, damaged=damaged)

    def _make_durable(self) -> None:
        """What is read of the log will count as accepted, but a flush may have failed, now or in the life before."""
        if self._in_memory:
            return
        files.write_again(self._path + "-wal")

    def _connect(self, path: str, synchronous: str, *, damaged: bool = False) -> Books:
        db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            self._prepare(db, synchronous)
            return self.books(db, damaged=damaged)
        except BaseException:
            _close(db)
            raise

    def _prepare(self, db: sqlite3.Connection, synchronous: str) -> None:
        prepare(db, synchronous=synchronous, in_memory=self._in_memory)

    def books(self, db: sqlite3.Connection, *, damaged: bool = False) -> Books:
        """Return the books in a database that is ready."""
        quarter = self._settings.max_bytes // 4
        return Books(
            db,
            max_dead_letters=self._settings.max_dead_letters,
            max_dead_bytes=quarter,
            max_remembered=quarter,
            damaged=damaged,
        )


def _read(db: sqlite3.Connection) -> None:
    """
    Read what the start needs, and write nothing.

    :raise NewerVersion: it is a newer version's.
    :raise sqlite3.DatabaseError: it is damaged, or the disk does not let us.
    """
    version = look(db)
    if not version:
        raise torn("nothing is in it")
    db.text_factory = bytes  # of a row that is damaged it may be no UTF-8
    for table in layout.made_by(MIGRATIONS[:version]):
        db.execute(f"SELECT 1 FROM {table} NOT INDEXED LIMIT 1").fetchall()
    db.execute("SELECT id, digest, body FROM command WHERE finished_at IS NULL").fetchall()
    for lane in Lane:
        _last(db, lane, "entry")
    totals.found(db)
    db.text_factory = str


def _last(db: sqlite3.Connection, lane: Lane, table: str) -> int:
    """Return the greatest number within ``lane`` that ``table`` has; 0 without any, and wild ones do not count."""
    first, column = first_seq(lane), _NUMBERED[table]
    (last,) = db.execute(
        f"SELECT max({column}) FROM {table} WHERE {column} > ? AND {column} < ?", (first, first + MAX_NUMBER)
    ).fetchone()
    return 0 if last is None else int(last) - first


def disconnect(books: Books) -> None:
    """Close the database. Never fails: what is committed is safe."""
    _close(books.db)


def _close(db: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        db.close()
