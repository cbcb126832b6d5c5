"""A process without a free descriptor, a thread or memory: the spool says so, loses nothing, and goes on afterwards."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr import config
from commsmgr.errors import SpoolError, SpoolWriteFailed
from commsmgr.spool import Lane, Spool, executor, resting, writer
from commsmgr.spool.books import Books
from commsmgr.spool.executor import ThreadExecutor
from commsmgr.spool.outbox_jobs import Ask
from commsmgr.spool.resting import RestingWriter
from commsmgr.spool.schema import prepare
from commsmgr.spool.transaction import Attempt, transact
from commsmgr.spool.writer import Writer
from tests.test_spool_store import OnClock


class Short(Clock):
    """
    A clock that, as the steady one, has no timer where no descriptor is free.

    :ivar least: seconds from which on a timer is refused.
    """

    least = float("inf")

    def callLater(self, when: float, what: Callable[..., object], *args: Any, **kw: Any) -> Any:
        if when >= self.least:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().callLater(when, what, *args, **kw)

    def callFromThread(self, what: Callable[..., object], *args: Any, **kw: Any) -> None:
        super().callLater(0, what, *args, **kw)


class DescriptorTests(OnClock):
    """No timer can be had."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = self.executor._reactor = Short()
        self.agent = self.spool()
        self.done(self.agent.open())
        self.addCleanup(lambda: self.done(self.agent.close()))

    def test_work_is_done(self) -> None:
        """What is to be done at once is done all the same."""
        self.clock.least = 0.0
        self.assertEqual(self.done(self.put(self.agent, "first")), 1)
        self.clock.least = float("inf")
        self.assertEqual(self.done(self.put(self.agent, "second")), 2)

    def test_in_order(self) -> None:
        """Work with a timer does not come before earlier work that has none."""
        done: list[int] = []
        self.clock.least = 0.0
        self.executor(lambda: done.append(1))
        self.clock.least = float("inf")
        self.executor(lambda: done.append(2))
        # Where a reactor calls from threads after its timers.
        self.clock.calls.reverse()
        self.pass_time()
        self.assertEqual(done, [1, 2])

    def test_receipts_do_not_wait(self) -> None:
        """A receipt that cannot wait for other work is committed by itself."""
        seq = self.done(self.put(self.agent, "first"))
        self.executor.linger, self.clock.least = 0.05, 0.01
        self.done(self.agent.outbox.forget([seq]))
        self.assertEqual(self.agent.outbox.stats.events, 0)

    def test_repeated_with_what_comes_next(self) -> None:
        """What a failing disk is asked for again goes with the next batch; whoever else waits is told at once."""
        seq = self.done(self.put(self.agent, "first"))
        self.clock.least = 0.01

        failed = Attempt([], OSError(errno.EIO, os.strerror(errno.EIO)))
        failing = self.patch(writer, "transact", lambda books, jobs: failed)
        forgetting, asking = self.agent.outbox.forget([seq]), self.agent.outbox.dead_letters(1)
        self.pass_time()
        self.failureResultOf(asking, SpoolWriteFailed)
        self.assertNoResult(forgetting)
        failing.restore()
        self.assertEqual(self.done(self.put(self.agent, "second")), 2)
        self.successResultOf(forgetting)
        self.assertEqual(self.agent.outbox.stats.events, 1)


class MemoryTests(OnClock):
    """No memory can be had."""

    def test_while_a_batch_is_made(self) -> None:
        """Its jobs fail; those after them are done."""
        agent = self.spool()
        self.done(agent.open())

        class Large(Ask):
            @property
            def size(self) -> int:
                raise MemoryError

        failed = agent._store.submit(Large(lambda books: None))
        later = self.put(agent, "later")
        self.pass_time()
        self.failureResultOf(failed, SpoolError)
        self.assertEqual(self.successResultOf(later), 1)
        self.assertEqual(len(self.flushLoggedErrors(MemoryError)), 1)
        self.done(agent.close())

    def test_at_the_beginning_of_a_transaction(self) -> None:
        """One that was begun all the same is undone, and the next one is done."""
        books = Books(database(), max_dead_letters=1, max_dead_bytes=1, max_remembered=1)

        class Begun:
            """The connection, whose BEGIN finds no memory when it has begun."""

            def __getattr__(self, name: str) -> Any:
                return getattr(db, name)

            def execute(self, statement: str, *parameters: Any) -> Any:
                done = db.execute(statement, *parameters)
                if statement.startswith("BEGIN"):
                    raise MemoryError
                return done

        db, books.db = books.db, Begun()  # type: ignore[assignment]
        self.assertIsInstance(transact(books, []).error, MemoryError)
        self.assertFalse(books.stale)
        books.db = db
        self.assertIsNone(transact(books, []).error)
        db.close()

    def test_at_the_start(self) -> None:
        """A spool in memory that cannot be opened says why, and can be opened later."""
        agent = Spool(
            config.Spool(durability="memory"), reactor=self.clock, wall=self.clock.seconds, executor=self.executor
        )

        def none() -> bytes:
            raise MemoryError

        failing = self.patch(resting, "_blank", none)
        refused = agent.open()
        self.pass_time()
        self.assertIn("out of memory", self.failureResultOf(refused, SpoolWriteFailed).value.fact)
        failing.restore()
        self.done(agent.open())
        self.done(agent.close())


class ListenerTests(OnClock):
    """Whoever listens to the spool."""

    def test_a_mistake_stays_its_own(self) -> None:
        """A listener of results that fails keeps no other from being told."""
        agent = self.spool()
        self.done(agent.open())
        told: list[int] = []
        agent.inbox.on_completed = lambda count, size: [][count]
        agent.outbox.on_change = lambda: told.append(agent.outbox.stats.events)
        self.done(agent.inbox.complete(key=None, command_id="c", status="success", result_id="r", body=b"{}"))
        self.assertEqual(told, [1])
        self.assertEqual(len(self.flushLoggedErrors(IndexError)), 1)
        self.done(agent.close())


class ReopenedTests(SynchronousTestCase):
    """A spool in memory, closed and opened again."""

    def test_trouble_ends(self) -> None:
        """Damage ends when the spool is closed, for all that was in it is gone."""
        memory = RestingWriter(config.Spool(durability="memory"), time.time)
        memory.open()
        memory._trouble.found_damage("a page is torn")
        self.assertIn("damaged", memory.run([]).trouble)
        memory.close()
        memory.open()
        outcome = memory.run([])
        memory.close()
        self.assertEqual((outcome.trouble, outcome.partly), ("", False))


class ThreadTests(TestCase):
    """With a real thread, or none."""

    def spool(self, directory: str) -> Spool:
        return Spool(config.Spool(path=directory), reactor=reactor, wall=time.time)

    async def test_no_thread(self) -> None:
        """Without a thread the start fails with the reason, and the next one works."""

        class Refused(Thread):
            def start(self) -> None:
                raise RuntimeError("can't start new thread")

        spool = self.spool(self.mktemp())
        refusing = self.patch(executor, "Thread", Refused)
        with self.assertRaisesRegex(SpoolWriteFailed, "no thread .*can't start new thread"):
            await spool.open()
        self.assertIn("no thread", spool.trouble)
        refusing.restore()
        await spool.open()
        self.assertEqual(await spool.outbox.put(lane=Lane.EVENT, kind="note", id="first", body=b"{}"), 1)
        await spool.close()

    async def test_cancelled_opening(self) -> None:
        """An opening that is cancelled while the disk hangs leaves no lock behind."""
        directory = self.mktemp()
        spool, begun, goes_on = self.spool(directory), Event(), Event()
        self.addCleanup(goes_on.set)
        really = Writer.open

        def slowly(writer: Writer) -> Any:
            begun.set()
            goes_on.wait(60)
            return really(writer)

        hanging = self.patch(Writer, "open", slowly)
        opening = spool.open()
        while not begun.is_set():
            await turn()
        opening.cancel()
        hanging.restore()
        self.assertNoResult(opening)
        goes_on.set()
        await self.assertFailure(opening, CancelledError)
        other = self.spool(directory)
        await other.open()
        await other.close()
        await spool.open()
        await spool.close()

    async def test_cancelled_twice(self) -> None:
        """An opening that is cancelled again while it is being closed leaves no thread behind."""
        spool, goes_on = self.spool(self.mktemp()), Event()
        self.addCleanup(goes_on.set)
        hanging = self.patch(Writer, "open", lambda writer: goes_on.wait(60))
        opening = spool.open()
        await turn()
        opening.cancel()
        opening.cancel()
        thread = spool._store._executor._thread
        hanging.restore()
        goes_on.set()
        await self.assertFailure(opening, CancelledError)
        while thread.is_alive():
            await turn()

    async def test_descriptors(self) -> None:
        """The thread is told of its work without a timer, too."""

        class Reactor:
            """Has no timers."""

            callFromThread = staticmethod(reactor.callFromThread)  # type: ignore[attr-defined]

            def callLater(self, *_: Any) -> None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        does: ThreadExecutor = ThreadExecutor(Reactor())  # type: ignore[arg-type]
        self.assertEqual([await does(lambda n=n: n) for n in range(3)], [0, 1, 2])
        await does.stop()


def turn() -> Deferred[None]:
    """Let the reactor turn once."""
    return deferLater(reactor, 0)  # type: ignore[arg-type]


def database() -> sqlite3.Connection:
    """Return a database in memory, ready for books."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    prepare(db, synchronous="FULL", in_memory=True)
    return db
