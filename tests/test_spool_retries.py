"""What is tried again, on a disk that fails and without memory: after pauses that grow, and nothing is lost for it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from random import Random
from struct import unpack_from
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import globalLogPublisher

from commsmgr import config
from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool import Entry, Lane, Spool, files, resting
from commsmgr.spool.batch import Outcome, Work
from commsmgr.spool.books import Books
from commsmgr.spool.outbox_jobs import Ask
from commsmgr.spool.records import Page
from commsmgr.spool.resting import RestingWriter
from commsmgr.spool.writer import Writer
from tests.faulty_vfs import Disk, FaultyVFS, Operation
from tests.test_spool_store import OnClock

A_MINUTE = 12
"""Batches that what is repeated may make in a minute: after 1, 2, 4, 8, 16 and 32 seconds, and some to begin with."""


class Retries(OnClock):
    """One spool, and a count of the batches that its writer is given."""

    memory = False

    def setUp(self) -> None:
        super().setUp()
        vfs = FaultyVFS()
        vfs.install()
        self.addCleanup(vfs.uninstall)
        self.disk: Disk = vfs.disk(self.directory, Random(1))
        self.patch(resting, "OPEN", 1)
        self.patch(resting, "_open", resting._Open())
        self.batches: list[int] = []
        self.mend: Callable[[], object] = lambda: None
        kind = RestingWriter if self.memory else Writer
        really = kind.run

        def run(writer: Writer, jobs: Sequence[Work]) -> Outcome:
            if writer is self.writer:
                self.batches.append(len(jobs))
                if len(self.batches) > 1000:  # a loop without a pause: virtual time would never go on
                    self.mend()
            return really(writer, jobs)

        self.patch(kind, "run", run)
        self.opened = self.begin()
        self.writer = self.opened._store._writer

    def begin(self) -> Spool:
        self.writer = None
        spool = self.memory_spool() if self.memory else self.spool()
        self.done(spool.open())
        self.addCleanup(lambda: self.done(spool.close()))
        return spool

    def memory_spool(self) -> Spool:
        settings = config.Spool(durability="memory")
        return Spool(settings, reactor=self.clock, wall=lambda: 1e9 + self.clock.seconds(), executor=self.executor)

    def listen(self) -> list[str]:
        """Return a list that gets the reason of each line about trouble."""
        said: list[str] = []

        def observe(event: dict[str, Any]) -> None:
            if event.get("event") == "spool.write-failed":
                said.append(event["reason"])

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        return said

    def filled(self, count: int) -> list[int]:
        written = [self.put(self.opened, f"e{n}") for n in range(count)]
        self.pass_time()
        return [self.successResultOf(each) for each in written]

    def take(self) -> list[Entry]:
        """Take all there is."""
        got: list[Entry] = []
        while entries := self.opened.outbox.reader(Lane.EVENT).take(100, 1 << 20):
            got += entries
            self.pass_time()
        return got

    def rewind(self) -> None:
        for lane in Lane:
            self.opened.outbox.reader(lane).rewind()

    @contextmanager
    def failing(self, *codes: int, kinds: Sequence[str] = ("read", "write")) -> Iterator[None]:
        """Let the disk fail for a while, each time in another way, and look at everything anew."""
        self.batches.clear()
        operations = 0

        def hook(operation: Operation) -> int:
            nonlocal operations
            if operation.kind not in kinds:
                return sqlite3.SQLITE_OK
            operations += 1
            return codes[operations % len(codes)]

        self.disk.hook = hook

        def mend() -> None:
            self.disk.hook = None

        self.mend = mend
        yield
        mend()


class OnDisk(Retries):
    """On a disk."""

    def test_receipts(self) -> None:
        """More of them than make a batch are tried at the pace of one, and keep nothing else from being refused."""
        seqs = self.filled(1500)
        self.take()
        for code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_NOMEM):
            now, seqs = seqs[:700], seqs[700:]
            with self.failing(code):
                receipts = [self.opened.outbox.forget([seq]) for seq in now]
                self.pass_time(1.5)
                receipts += [self.opened.outbox.forget([seq]) for seq in range(9000, 9400)]
                self.pass_time(60.0)
                self.assertTrue(4 < len(self.batches) <= A_MINUTE, self.batches)
                refused = self.put(self.opened, "refused")
                self.pass_time()
                self.failureResultOf(refused, SpoolWriteFailed)
                self.assertIn("the spool cannot be read or written", self.opened.trouble)
                for each in receipts:
                    self.assertNoResult(each)
            self.pass_time(61.0)
            for each in receipts:
                self.successResultOf(each)
            self.assertEqual((self.opened.trouble, self.opened.outbox.stats.events), ("", len(seqs)))

    def test_pages(self) -> None:
        """Those that cannot be read are asked for after pauses; in the end none is read in vain, and all is there."""
        self.filled(600)
        self.take()
        for code in (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_NOMEM):
            self.done(self.opened._store._executor(self.writer._disconnect))
            with self.failing(code):
                self.rewind()
                self.pass_time(60.0)
                self.assertTrue(4 < len(self.batches) <= A_MINUTE, self.batches)
                self.assertEqual(self.take(), [])
                for _ in range(300):
                    self.rewind()
                    self.pass_time(0.05)
                self.assertLess(max(self.batches), 10)
            pages = self.count_pages()
            self.pass_time(61.0)
            self.assertEqual([entry.id for entry in self.take()], [f"e{n}" for n in range(600)])
            self.assertLess(len(pages), 6)

    def test_rows_that_lead_back(self) -> None:
        """A page that would be read again and again, for the tree behind it leads to earlier rows, is damage."""
        self.filled(3000)
        self.done(self.opened.close())
        path = os.path.join(self.directory, files.DATABASE)
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entry'").fetchone()
        with open(path, "r+b") as file:
            file.seek(start := (root - 1) * 4096)
            page = bytearray(file.read(4096))
            (cells,) = unpack_from(">H", page, 3)
            cell = unpack_from(f">{cells}H", page, 12)
            # The number of the page comes first in each cell, and for the last part before all cells.
            for place in (*cell[cells // 2 :], 8):
                page[place : place + 4] = page[cell[0] : cell[0] + 4]
            file.seek(start)
            file.write(page)
        pages = self.count_pages(most=50)
        self.done(self.opened.open())
        got = [entry.id for entry in self.take()]
        self.assertEqual(got, [f"e{n}" for n in range(len(got))])
        self.assertTrue(1000 < len(got) < 3000, len(got))
        self.assertLess(len(pages), 20)
        self.assertIn("lead back", self.opened.trouble)
        self.done(self.opened.close())
        salvaged = self.done(self.opened.open()).salvaged
        self.assertEqual((salvaged.events, salvaged.lost, self.opened.trouble), (3000, 0, ""))
        # Those too behind the last part, where the tree says that there is nothing.
        self.assertEqual([entry.id for entry in self.take()], [f"e{n}" for n in range(3000)])

    def test_rewinds_while_it_hangs(self) -> None:
        """Of the pages that were asked for meanwhile those are read that are still awaited."""
        self.filled(600)
        self.take()
        self.executor.hangs = True
        pages = self.count_pages()
        for _ in range(300):
            self.rewind()
        self.executor.go_on()
        self.pass_time()
        self.assertEqual(len(self.take()), 600)
        self.assertLess(len(pages), 6)

    def count_pages(self, most: int = 1000) -> list[Lane]:
        """Return a list that gets the lane of each page that is read; more than ``most`` are a mistake."""
        pages: list[Lane] = []
        page = Books.page

        def read(books: Books, lane: Lane, after: int, now: float) -> Page:
            pages.append(lane)
            if len(pages) > most:
                raise ZeroDivisionError
            return page(books, lane, after, now)

        self.patch(Books, "page", read)
        return pages

    def test_committed_all_the_same(self) -> None:
        """What was written when memory ran out is not taken for the next batch, which never was."""
        self.filled(1)
        with self.failing(sqlite3.SQLITE_NOMEM, kinds=("sync",)):
            first = self.put(self.opened, "first")
            self.pass_time()
            self.failureResultOf(first, SpoolWriteFailed)
        with self.failing(sqlite3.SQLITE_IOERR_WRITE, kinds=("write",)):
            second = self.put(self.opened, "second")
            self.pass_time()
            self.failureResultOf(second, SpoolWriteFailed)
        self.done(self.put(self.opened, "third"))
        self.assertIn([entry.id for entry in self.take()], (["e0", "third"], ["e0", "first", "third"]))

    def test_start(self) -> None:
        """A start without memory is one that may be made again."""
        self.done(self.opened.close())
        with self.failing(sqlite3.SQLITE_NOMEM, kinds=("open",)):
            opening = self.opened.open()
            self.pass_time()
            self.assertIn("out of memory", self.failureResultOf(opening, SpoolWriteFailed).value.fact)
        self.assertIsNone(self.done(self.opened.open()).set_aside)

    def test_an_idle_spool(self) -> None:
        """The trouble of one that has nothing ends when it works again, and not with the next message only."""
        with self.failing(sqlite3.SQLITE_IOERR_WRITE):
            refused = self.put(self.opened, "refused")
            self.pass_time()
            self.failureResultOf(refused, SpoolWriteFailed)
        self.assertIn("has failed", self.opened.trouble)
        self.assertEqual(self.done(self.opened.outbox.expire()), 0)
        self.assertEqual(self.opened.trouble, "")
        self.batches.clear()
        self.assertEqual(self.done(self.opened.outbox.expire()), 0)
        self.assertEqual(self.batches, [])


class Stubborn:
    """A connection that finds no memory for some statements."""

    def __init__(self, db: Any, *refused: str) -> None:
        self.db = db
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)

    def execute(self, statement: str, *values: Any) -> Any:
        if statement in self._refused:
            raise MemoryError
        return self.db.execute(statement, *values)


class InMemory(Retries):
    """In memory."""

    memory = True

    def asleep(self, *errors: Exception) -> list[float]:
        """Have another spool's database open, and this one's not be opened; return when that is tried."""
        self.done(self.put(self.other, "other"))
        self.assertIsNone(self.writer._books)
        self.batches.clear()
        really, tried = resting._awake, []
        failing = True

        def awake(image: bytes) -> sqlite3.Connection:
            tried.append(self.clock.seconds())
            if failing:
                raise errors[len(tried) % len(errors)]
            return really(image)

        def mend() -> None:
            nonlocal failing
            failing = False

        self.mend = mend
        self.patch(resting, "_awake", awake)
        return tried

    def setUp(self) -> None:
        super().setUp()
        self.other = self.memory_spool()
        self.done(self.other.open())
        self.addCleanup(lambda: self.done(self.other.close()))

    def test_waking(self) -> None:
        """Receipts, refusals and pages wait until the database can be opened; what is new is refused; it is said."""
        seqs = self.filled(1500)
        self.assertEqual(len(self.take()), 1500)
        said = self.listen()
        tried = self.asleep(MemoryError(), sqlite3.OperationalError("unable to open database"))
        waiting: list[Deferred[Any]] = [self.opened.outbox.forget([seq]) for seq in seqs[:1200]]
        waiting.append(self.opened.outbox.bury(seqs[1200], "refused: no"))
        waiting.append(self.opened.losses.pending_report("loss"))
        for _ in range(600):
            self.rewind()
            self.pass_time(0.1)
        self.assertTrue(len(tried) == len(self.batches) <= 600 + A_MINUTE, len(tried))  # each rewind asks
        tried.clear()
        self.pass_time(60.0)
        self.assertTrue(0 < len(tried) < 4, tried)
        refused = self.put(self.opened, "refused")
        self.pass_time()
        self.failureResultOf(refused, SpoolWriteFailed)
        self.assertRegex(
            self.opened.trouble, "^the spool in memory has failed: .*(out of memory|unable to open database)"
        )
        self.assertEqual([each for each in waiting if each.called], [])
        self.assertEqual(self.take(), [])
        self.assertTrue(0 < len(said) < 12, len(said))
        self.mend()
        self.pass_time(61.0)
        for each in waiting:
            self.successResultOf(each)
        self.assertEqual(self.opened.trouble, "")
        self.assertEqual([entry.seq for entry in self.take()], seqs[1201:])
        stats = self.opened.outbox.stats
        self.assertEqual((stats.events, stats.dead_letters, stats.dropped), (299, 1, {"refused": 1}))
        self.rewind()
        self.pass_time()
        self.assertEqual([entry.seq for entry in self.take()], seqs[1201:])

    def test_what_one_job_takes(self) -> None:
        """A job for which there is not enough memory waits alone, and is done when there is."""
        seqs = self.filled(3)
        self.take()
        attempts: list[float] = []
        said = self.listen()
        delete = Books.delete

        def without_memory(books: Books, seqs: Sequence[int]) -> None:
            attempts.append(self.clock.seconds())
            raise MemoryError

        patched = self.patch(Books, "delete", without_memory)
        receipt = self.opened.outbox.forget(seqs[:1])
        for n in range(60):
            self.done(self.put(self.opened, f"new{n}"))
            self.pass_time(0.8)
        self.assertNoResult(receipt)
        self.assertTrue(4 < len(attempts) <= 2 * A_MINUTE, attempts)
        self.assertIn("out of memory", self.opened.trouble)
        self.assertEqual(set(said), {"out of memory"})
        patched.restore()
        self.assertIs(Books.delete, delete)
        self.pass_time(61.0)
        self.successResultOf(receipt)
        self.assertEqual((self.opened.outbox.stats.events, self.opened.trouble), (62, ""))

    def test_commit(self) -> None:
        """What cannot be committed is undone, and all else is still there."""
        self.filled(2)
        self.take()
        books = self.writer._books
        for refused in (("COMMIT",), ("COMMIT", "ROLLBACK")):
            books.db = Stubborn(books.db, *refused)
            putting = self.put(self.opened, "refused")
            self.pass_time()
            self.failureResultOf(putting, SpoolWriteFailed)
            books.db = books.db.db
        self.done(self.put(self.opened, "after"))
        self.rewind()
        self.pass_time()
        self.assertEqual([entry.id for entry in self.take()], ["e0", "e1", "after"])

    def test_lent(self) -> None:
        """A database that is lent is not handed on with a transaction in it."""
        self.assertIsNone(self.writer._books)

        def broken(books: Books) -> None:
            books.db = Stubborn(books.db, "ROLLBACK")
            raise MemoryError

        asked = self.opened._store.submit(Ask(broken))
        self.pass_time()
        self.failureResultOf(asked, SpoolWriteFailed)
        books = self.writer._books
        books.db = books.db.db
        self.done(self.put(self.other, "other"))
        self.done(self.put(self.opened, "after"))
        self.assertEqual(self.opened.outbox.stats.events, 1)

    def test_not_undone(self) -> None:
        """Of a transaction that cannot be undone nothing is seen, in the totals or at rest, and nothing is lost."""
        self.filled(2)
        self.take()
        reload, left = Books.reload, 5

        def without_memory(books: Books) -> None:
            nonlocal left
            if left and books is self.writer._books:
                left -= 1
                raise MemoryError
            reload(books)

        def broken(books: Books) -> None:
            books.add_event("note", "never", b"{}", 1e9, None)
            raise MemoryError

        self.patch(Books, "reload", without_memory)
        for job in (Ask(broken), Ask(broken)):
            asked = self.opened._store.submit(job)
            self.pass_time()
            self.failureResultOf(asked, SpoolWriteFailed)
            self.assertEqual(self.opened.outbox.stats.events, 2)
            self.done(self.put(self.other, f"other{left}"))
        self.done(self.put(self.opened, "after"))
        self.assertEqual(left, 0)
        self.assertEqual(self.opened.outbox.stats.events, 3)
        self.rewind()
        self.pass_time()
        self.assertEqual([entry.id for entry in self.take()], ["e0", "e1", "after"])
