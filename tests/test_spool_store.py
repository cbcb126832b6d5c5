"""The spool goes on: beside a part that cannot be read, after a mistake of our own, and to the end of its closing."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from random import Random
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import NotRunning, SpoolError, SpoolLocked, SpoolWriteFailed
from commsmgr.spool import Lane, Spool, files
from commsmgr.spool.executor import InlineExecutor
from commsmgr.spool.inbox_jobs import Unfinished
from commsmgr.spool.presence import Presence
from commsmgr.spool.trouble import Trouble
from commsmgr.spool.writer import Writer
from commsmgr.waiters import Overrun, bounded
from tests.faulty_vfs import Disk, FaultyVFS, Operation


class Hanging(InlineExecutor):
    """Does nothing while the disk hangs, and then all of it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.hangs = False
        self._held: list[Callable[[], object]] = []

    def __call__(self, work: Callable[[], Any], /) -> Deferred[Any]:
        """Do ``work`` in the next turn, or when the disk goes on."""
        if not self.hangs:
            return super().__call__(work)
        done: Deferred[Any] = Deferred()
        self._held.append(lambda: super(Hanging, self).__call__(work).chainDeferred(done))
        return done

    def go_on(self) -> None:
        """The disk works again."""
        self.hangs = False
        while self._held:
            self._held.pop(0)()


def failing(number: int) -> Callable[[str], None]:
    """Return what fails as a system call does."""

    def fail(_: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


class OnClock(SynchronousTestCase):
    """A directory, and spools in it on a virtual clock."""

    def setUp(self) -> None:
        self.directory = self.mktemp()
        os.mkdir(self.directory, 0o700)
        self.clock = Clock()
        self.executor = Hanging(self.clock)

    def spool(self) -> Spool:
        """A spool that is not open yet."""
        settings = config.Spool(path=self.directory, durability="full")
        wall = lambda: 1e9 + self.clock.seconds()  # noqa: E731
        return Spool(settings, reactor=self.clock, wall=wall, executor=self.executor)

    def pass_time(self, seconds: float = 0.2) -> None:
        for _ in range(round(seconds * 100)):
            self.clock.advance(0.01)

    def done(self, deferred: Deferred[Any]) -> Any:
        """Return what a Deferred fires with soon."""
        self.pass_time()
        return self.successResultOf(deferred)

    def put(self, spool: Spool, id: str, body: bytes = b"{}") -> Deferred[int]:
        return spool.outbox.put(lane=Lane.EVENT, kind="note", id=id, body=body)


class UnreadableTests(OnClock):
    """A part of the database cannot be read, for which SQLite has an I/O error."""

    def setUp(self) -> None:
        super().setUp()
        vfs = FaultyVFS()
        vfs.install()
        self.addCleanup(vfs.uninstall)
        self.disk: Disk = vfs.disk(self.directory, Random(1))
        self.opened = 0

    def unreadable(self, first: int, last: int) -> None:
        """Let reads of these bytes of the database fail, and count how often a file is opened."""

        def hook(operation: Operation) -> int:
            self.opened += operation.kind == "open"
            bad = operation.kind == "read" and operation.path.endswith(files.DATABASE)
            return sqlite3.SQLITE_IOERR_READ if bad and first <= operation.offset < last else sqlite3.SQLITE_OK

        self.disk.hook = hook

    def filled(self) -> Spool:
        """An open spool with 600 events, of which one page near the end cannot be read."""
        spool = self.spool()
        self.done(spool.open())
        written = [self.put(spool, f"e{n}", b"x" * 3000) for n in range(600)]
        self.pass_time()
        self.assertEqual(len([self.successResultOf(each) for each in written]), 600)
        self.done(spool.close())
        page = os.path.getsize(os.path.join(self.directory, files.DATABASE)) * 9 // 10 // 4096 * 4096
        spool = self.spool()
        self.done(spool.open())
        self.addCleanup(lambda: self.done(spool.close()))
        self.unreadable(page, page + 4096)
        return spool

    def taken(self, spool: Spool) -> list[str]:
        """Take what there is."""
        got: list[str] = []
        while entries := spool.outbox.reader(Lane.EVENT).take(100, 1 << 20):
            got += [entry.id for entry in entries]
            self.pass_time()
        return got

    def test_the_rest_goes_on(self) -> None:
        """Only what touches that part waits; it is said all the while, costs little, and ends with its cause."""
        spool = self.filled()
        got = self.taken(spool)
        self.assertTrue(300 < len(got) < 600, len(got))
        receipt = spool.outbox.forget([1])
        for n in range(300):
            self.done(self.put(spool, f"new{n}"))
            self.assertIn("the spool cannot be read or written: disk I/O error", spool.trouble)
        self.successResultOf(receipt)
        self.assertLess(self.opened, 60)
        self.assertFalse(os.path.exists(os.path.join(self.directory, files.MARK)))
        self.disk.hook = None
        self.pass_time(61.0)
        self.assertEqual(spool.trouble, "")
        self.assertEqual(got + self.taken(spool), [f"e{n}" for n in range(600)] + [f"new{n}" for n in range(300)])

    def test_a_batch_that_shares_it(self) -> None:
        """Of what is handed over together, only that fails which touches that part."""
        spool = self.filled()
        first, receipt, last = self.put(spool, "a"), spool.outbox.forget(range(1, 600)), self.put(spool, "b")
        self.pass_time()
        self.successResultOf(first)
        self.successResultOf(last)
        self.assertNoResult(receipt)
        self.disk.hook = None
        self.pass_time(2.0)
        self.successResultOf(receipt)

    def test_nothing_can_be_written_either(self) -> None:
        """One by one ends at the first that fails for more than that part."""
        spool = self.filled()
        unreadable, flushes = self.disk.hook, 0

        def hook(operation: Operation) -> int:
            nonlocal flushes
            if operation.kind != "sync":
                return unreadable(operation) if unreadable is not None else sqlite3.SQLITE_OK
            flushes += 1
            return sqlite3.SQLITE_IOERR_FSYNC

        self.disk.hook = hook
        receipt = spool.outbox.forget(range(1, 600))
        refused = [self.put(spool, f"r{n}") for n in range(200)]
        self.pass_time()
        for each in refused:
            self.failureResultOf(each, SpoolWriteFailed)
        self.assertTrue(0 < flushes < 9, flushes)
        self.disk.hook = None
        self.pass_time(5.0)
        self.successResultOf(receipt)

    def test_nothing_can_be_read(self) -> None:
        """A disk that fails altogether is not asked again for each of a batch."""
        spool = self.filled()
        self.unreadable(0, 1 << 40)
        receipt = spool.outbox.forget([1])
        refused = [self.put(spool, f"r{n}") for n in range(200)]
        self.done(self.spool_reopens(spool))
        self.pass_time()
        for each in refused:
            self.failureResultOf(each, SpoolWriteFailed)
        self.assertLess(self.opened, 12)
        self.disk.hook = None
        self.done(self.put(spool, "after"))
        self.successResultOf(receipt)

    def test_start(self) -> None:
        """A start that meets it waits, sets nothing aside, and says what else can be done; so it is with EIO."""
        spool = self.filled()
        self.disk.hook = None
        self.done(spool.close())
        self.unreadable(0, 4096)
        self.refused(spool, "disk I/O error; where that is a part that cannot be read", "commsmgr spool repair")
        self.disk.hook = None
        for number, said in ((errno.EIO, "commsmgr spool repair"), (errno.ENOSPC, os.strerror(errno.ENOSPC))):
            broken = self.patch(files, "damage", failing(number))
            self.refused(spool, os.strerror(number), said)
            broken.restore()
        self.assertNotIn("repair", spool.trouble)
        self.assertIsNone(self.done(spool.open()).set_aside)

    def refused(self, spool: Spool, *said: str) -> None:
        """Fail to open it, for reasons that are said."""
        opened = spool.open()
        self.pass_time()
        fact = self.failureResultOf(opened, SpoolWriteFailed).value.fact
        self.assertEqual(fact, spool.trouble)
        for each in said:
            self.assertIn(each, fact)

    def spool_reopens(self, spool: Spool) -> Deferred[None]:
        """Have the writer lose its connection, as after a commit that has failed."""
        return spool._store._executor(spool._store._writer._disconnect)

    def test_a_look_that_fails(self) -> None:
        """A look for what has resurfaced that meets that part is no hot loop."""
        spool = self.filled()
        looks: list[float] = []

        def work(job: object, books: object) -> None:
            looks.append(self.clock.seconds())
            if len(looks) > 50:  # enough of it
                return
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error

        self.patch(Unfinished, "work", work)
        self.done(self.spool_reopens(spool))
        self.done(self.put(spool, "a"))
        self.pass_time(5.0)
        self.assertTrue(0 < len(looks) < 20, len(looks))


class CloseTests(OnClock):
    """A stop that has a deadline, on a disk that hangs longer."""

    def test_the_lock_is_released(self) -> None:
        """Closing goes on to its end when the disk goes on, though nobody waits; who asks again waits for that end."""
        spool = self.spool()
        self.done(spool.open())
        self.executor.hangs = True
        accepted = self.put(spool, "a")
        stopping = bounded(spool.close(), 3.0, self.clock)
        self.pass_time(4.0)
        self.failureResultOf(stopping, Overrun)
        self.failureResultOf(self.put(spool, "refused"), NotRunning)
        again = spool.close()
        other = self.spool()
        self.executor.go_on()
        self.pass_time()
        self.successResultOf(accepted)
        self.successResultOf(again)
        self.done(other.open())
        self.assertEqual(other.outbox.stats.events, 1)
        self.failureResultOf(self.opening(spool), SpoolLocked)
        self.done(other.close())

    def opening(self, spool: Spool) -> Deferred[Any]:
        opened = spool.open()
        self.pass_time()
        return opened

    def test_opened_again(self) -> None:
        """Who opens a spool that is still closing has it when that has ended."""
        spool = self.spool()
        self.done(spool.open())
        self.executor.hangs = True
        self.put(spool, "a")
        stopping = bounded(spool.close(), 3.0, self.clock)
        self.pass_time(4.0)
        self.failureResultOf(stopping, Overrun)
        opened = spool.open()
        self.pass_time()
        self.assertNoResult(opened)
        self.executor.go_on()
        self.done(opened)
        self.assertEqual([entry.id for entry in spool.outbox.reader(Lane.EVENT).take(9, 1000)], ["a"])
        self.done(spool.close())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_closed_by_who_is_told(self) -> None:
        """A close that is asked for by whoever is told of a commit ends once."""
        spool = self.spool()
        self.done(spool.open())
        closed: list[None] = []
        really = Writer.close

        def close(writer: Writer) -> None:
            closed.append(None)
            really(writer)

        self.patch(Writer, "close", close)
        self.done(self.put(spool, "a").addCallback(lambda _: spool.close()))
        self.assertEqual(len(closed), 1)


class MistakeTests(OnClock):
    """An error of our own fails what it concerns, is logged, and nobody waits for ever."""

    def setUp(self) -> None:
        super().setUp()
        self.opened = self.spool()
        self.done(self.opened.open())
        self.addCleanup(lambda: self.done(self.opened.close()))

    def one_fails(self, owner: object, name: str) -> Deferred[int]:
        """Put an event while a method fails, and another one afterwards; return what became of the first."""

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        patched = self.patch(owner, name, fail)
        first = self.put(self.opened, "first")
        self.pass_time()
        patched.restore()
        self.done(self.put(self.opened, "second"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.opened.outbox.held()[0], self.opened.outbox.stats.events)
        return first

    def test_in_the_writer(self) -> None:
        """Nobody knows whether it was committed."""
        first = self.one_fails(Writer, "run")
        self.assertIn("is not known: ZeroDivisionError()", self.failureResultOf(first, SpoolError).value.fact)
        self.assertEqual(self.opened.trouble, "")

    def test_in_taking_note(self) -> None:
        """It is committed, and not where the outbox looks."""
        self.failureResultOf(self.one_fails(self.opened.outbox, "committed"), ZeroDivisionError)

    def test_in_what_follows(self) -> None:
        """That is for others: who has asked gets the answer."""
        self.successResultOf(self.one_fails(self.opened.losses, "after_batch"))


class MemoryTests(OnClock):
    """A spool without files."""

    def test_no_file(self) -> None:
        """None is touched, whatever it is called, and trouble says where the spool is."""
        touched: list[str] = []
        self.patch(files, "write_again", touched.append)
        self.patch(Presence, "require", lambda presence: touched.append("stat"))
        settings = config.Spool(durability="memory")
        spool = Spool(settings, reactor=self.clock, wall=self.clock.seconds)
        self.done(spool.open())
        self.done(self.put(spool, "a"))
        self.done(spool._store._executor(spool._store._writer._disconnect))
        self.done(self.put(spool, "b"))
        self.assertEqual(touched, [])
        self.done(spool.close())
        trouble = Trouble("", self.clock.seconds)
        trouble.failed("no memory")
        self.assertIn("the spool in memory has failed: no memory", trouble.text)
