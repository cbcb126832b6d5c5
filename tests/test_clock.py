"""The clock that nobody sets: its order of calls, what it leaves behind, and who gets it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.error import AlreadyCalled, AlreadyCancelled, ConnectionDone
from twisted.internet.interfaces import IReactorFDSet, IReactorPluggableNameResolver, IReactorTCP, IReactorTime
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from commsmgr import config
from commsmgr.clock import SteadyReactor, boottime, steady
from tests.world import WorldTestCase, quick

reactor: Any = installed


def clocks() -> list[Any]:
    """Return what of the clock is among the reactor's readers."""
    return [reader for reader in reactor.getReaders() if reader.logPrefix() == "clock"]


class HandWound:
    """Stands in for an alarm: rings when it is told to."""

    def __init__(
        self, reactor: Any, seconds: Callable[[], float], ring: Callable[[], None], over: Callable[[], None]
    ) -> None:
        self.ring = ring
        self.over = over
        self.at: float | None = None
        self.history: list[float | None] = []

    def set(self, at: float) -> None:
        self.at = at
        self.history.append(at)

    def close(self) -> None:
        self.at = None
        self.history.append(None)


class Calls(SynchronousTestCase):
    """What is called, when, and in which order."""

    def setUp(self) -> None:
        self.now = 100.0
        self.alarm: Any = None
        self.called: list[Any] = []
        self.clock = SteadyReactor(MemoryReactorClock(), lambda: self.now, self.wind)

    def wind(self, *parameters: Any) -> Any:
        self.alarm = HandWound(*parameters)
        return self.alarm

    def ring_at(self, now: float) -> list[Any]:
        """Let it be ``now``, and ring; return what was called."""
        self.now = now
        self.called.clear()
        self.alarm.ring()
        return list(self.called)

    def later(self, delay: float, name: Any) -> Any:
        return self.clock.callLater(delay, self.called.append, name)

    def test_order(self) -> None:
        """What is due is called by time, and among equals in the order of asking; the alarm is set for the next."""
        for delay, name in ((3, "d"), (1, "a"), (2, "b"), (2, "c")):
            self.later(delay, name)
        self.assertEqual(101, self.alarm.at)
        self.assertEqual(["a"], self.ring_at(101))
        self.assertEqual(102, self.alarm.at)
        self.assertEqual([], self.ring_at(101.5))
        self.assertEqual(["b", "c", "d"], self.ring_at(500))
        self.assertEqual((None, []), (self.alarm.at, self.clock.getDelayedCalls()))

    def test_a_leap(self) -> None:
        """After an hour of sleep what repeats itself is called once, not as often as it would have been."""

        def beat() -> None:
            self.called.append("beat")
            self.clock.callLater(30, beat)

        beat()
        self.assertEqual(["beat"], self.ring_at(3700))
        self.assertEqual(3730, self.alarm.at)

    def test_later_turn(self) -> None:
        """What a call asks for comes in a later turn, even if it is due: the reactor is to see to its sockets, too."""

        def again() -> None:
            self.called.append("again")
            self.clock.callLater(0, again)

        self.clock.callLater(0, again)
        for _ in range(3):
            self.assertEqual(["again"], self.ring_at(100))
            self.assertEqual(100, self.alarm.at)

    def test_cancel(self) -> None:
        """A cancelled call is not made; the alarm that was set for it rings once; the last one to go leaves nothing."""
        first, second = self.later(1, "first"), self.later(2, "second")
        second.cancel()
        self.assertEqual([101], self.alarm.history)
        third = self.later(3, "third")
        first.cancel()
        self.assertEqual([third], self.clock.getDelayedCalls())
        self.assertEqual([101], self.alarm.history)
        self.assertEqual([], self.ring_at(101))
        self.assertEqual([101, 103], self.alarm.history)
        self.assertRaises(AlreadyCancelled, first.cancel)
        third.cancel()
        self.assertIsNone(self.alarm.at)
        self.assertEqual([], self.ring_at(200))

    def test_cancel_in_the_same_turn(self) -> None:
        """A call may cancel another one that is due with it; one that was made cannot be cancelled any more."""
        self.clock.callLater(1, lambda: second.cancel())
        second = self.later(2, "second")
        third = self.later(3, "third")
        self.assertEqual(["third"], self.ring_at(110))
        self.assertRaises(AlreadyCalled, third.cancel)
        self.assertIsNone(self.alarm.at)

    def test_reset_and_delay(self) -> None:
        """A call can be had earlier and later, before it is due and in the very turn in which it is."""
        earlier, later = self.later(50, "earlier"), self.later(1, "later")
        earlier.reset(5)
        later.reset(20)
        self.assertEqual([], self.ring_at(101))
        self.assertEqual(105, self.alarm.at)
        self.assertEqual(["earlier"], self.ring_at(105))
        later.delay(-5)
        self.assertEqual((115, 115), (self.alarm.at, later.getTime()))
        self.clock.callLater(1, lambda: later.reset(10))
        self.assertEqual([], self.ring_at(116))
        self.assertEqual(126, self.alarm.at)
        self.assertEqual(["later"], self.ring_at(126))
        self.assertEqual([], self.ring_at(1000))

    def test_forward_and_back(self) -> None:
        """One that was had earlier and later again, so that it stands twice for one time, is not called too early."""
        call = self.later(5, "once")
        call.reset(3)
        call.delay(2)
        self.clock.callLater(3, call.delay, 2)
        self.assertEqual([], self.ring_at(103))
        self.assertEqual([], self.ring_at(105))
        self.assertEqual(["once"], self.ring_at(107))

    def test_what_a_call_raises(self) -> None:
        """It is logged and keeps nobody else from being called, whatever it is."""

        def fail(error: BaseException) -> None:
            raise error

        self.clock.callLater(1, fail, ValueError("planted"))
        self.clock.callLater(1, fail, SystemExit(1))
        self.later(1, "after")
        self.assertEqual(["after"], self.ring_at(101))
        self.assertEqual(2, len(self.flushLoggedErrors(ValueError, SystemExit)))
        self.assertIsNone(self.alarm.at)

    def test_what_was_cancelled_is_not_kept(self) -> None:
        """Deadlines that are far off and cancelled soon, one after the other, need no memory."""
        self.later(1, "first")
        for _ in range(10_000):
            self.later(3600, "deadline").cancel()
        self.assertLess(len(self.clock._heap), 200)
        self.assertEqual(["first"], self.ring_at(101))

    def test_keywords_and_mistakes(self) -> None:
        """Arguments are passed on; the past is refused."""
        self.clock.callLater(0, lambda *args, **keywords: self.called.append((args, keywords)), 1, two=2)
        self.assertEqual([((1,), {"two": 2})], self.ring_at(100))
        self.assertRaises(AssertionError, self.clock.callLater, -1, lambda: None)


class WhoGetsIt(SynchronousTestCase):
    """Which reactors are wrapped, and what of them remains."""

    def test_one_for_a_reactor(self) -> None:
        """All on one reactor share one clock, whoever asks; a wrapped one is not wrapped again."""
        wrapped = steady(reactor)
        self.assertIsInstance(wrapped, SteadyReactor)
        self.assertIs(wrapped, steady(reactor))
        self.assertIs(wrapped, steady(wrapped))

    def test_clocks_of_tests(self) -> None:
        """What is no reactor of Twisted's keeps its own time."""
        for fake in (Clock(), MemoryReactorClock()):
            self.assertIs(fake, steady(fake))

    def test_all_else_is_the_reactors(self) -> None:
        """It provides what the reactor provides, with the reactor's own methods."""
        wrapped = steady(reactor)
        for interface in (IReactorTime, IReactorTCP, IReactorFDSet, IReactorPluggableNameResolver):
            verifyObject(interface, wrapped)
        self.assertEqual(reactor.connectTCP, wrapped.connectTCP)
        self.assertEqual(reactor.callFromThread, wrapped.callFromThread)
        self.assertIs(reactor.nameResolver, wrapped.nameResolver)
        self.assertNotEqual(reactor.callLater, wrapped.callLater)
        self.assertRaises(AttributeError, lambda: wrapped.no_such_thing)


class OnARealReactor(TestCase):
    """With descriptors."""

    timeout = 10

    def setUp(self) -> None:
        self.clock = steady(reactor)
        # In a later turn: a test may end in one of its calls.
        self.addCleanup(lambda: deferLater(reactor, 0, lambda: self.assertEqual((0, 0), self.open())))

    def open(self) -> tuple[int, int]:
        """Count what of it the reactor reads, and what is open in this process."""
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the directory itself
                links.append(os.readlink(path))
        return len(clocks()), sum(link.endswith(("[timerfd]", "[eventfd]")) for link in links)

    async def test_order_and_time(self) -> None:
        """Calls come in order and not before their time, those for the next turn too; then nothing is left."""
        called: list[tuple[float, float]] = []
        done: Deferred[None] = Deferred()
        began = boottime()
        for delay in (0.03, 0.0, 0.01, 0.02, 0.0):
            self.clock.callLater(delay, lambda delay: called.append((delay, boottime() - began)), delay)
        self.clock.callLater(0.04, done.callback, None)
        await done
        self.assertEqual([0.0, 0.0, 0.01, 0.02, 0.03], [delay for delay, _ in called])
        for delay, came in called:
            self.assertGreaterEqual(came, delay)

    async def test_given_up(self) -> None:
        """What the reactor gives up with all its readers is not called, and does not stand before what comes later."""
        given_up = [self.clock.callLater(delay, self.fail) for delay in (0, 1000)]
        for reader in clocks():
            reactor.removeReader(reader)
            reader.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(([], []), (self.clock.getDelayedCalls(), clocks()))
        await deferLater(self.clock, 0)
        for call in given_up:
            call.cancel()
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_many_turns(self) -> None:
        """One call after the other for the very next turn; beside them the reactor goes on."""
        turns = 0
        beside: Deferred[None] = Deferred()
        reactor.callLater(0, beside.callback, None)
        while turns < 200 or not beside.called:
            await deferLater(self.clock, 0)
            turns += 1
        self.assertLess(turns, 10_000)

    async def test_wakes_for_nothing_else(self) -> None:
        """The reactor is woken for calls that are due, and for no others."""
        rings = 0

        def count() -> None:
            nonlocal rings
            rings += 1
            run()

        run = self.clock._run
        self.patch(self.clock._alarm, "_ring", count)
        self.patch(self.clock._alarm._bell, "_ring", count)
        for number in range(1, 20):
            self.clock.callLater(number / 1000, lambda: None).cancel()
        await deferLater(self.clock, 0.05)
        self.assertEqual(1, rings)

    def test_cancelled(self) -> None:
        """With its last call the clock is gone from the reactor, without waiting for anything."""
        calls = [self.clock.callLater(delay, self.fail) for delay in (1000, 1, 0)]
        self.assertEqual((2, 2), self.open())
        self.assertIn("fail", repr(reactor.getReaders()), "who finds it left behind should see whose it is")
        for call in calls:
            call.cancel()
        self.assertEqual((0, 0), self.open())

    async def test_the_reactors_clock_is_set(self) -> None:
        """When the reactor's clock goes back by two hours its own calls stand still, and ours come."""
        stands = reactor.callLater(0.01, lambda: None)
        seconds = reactor.seconds
        self.patch(reactor, "seconds", lambda: seconds() - 7200)
        await deferLater(self.clock, 0.05)
        self.assertTrue(stands.active())
        stands.cancel()

    async def test_no_descriptor_left(self) -> None:
        """Without a descriptor it says what is wrong and keeps nothing; as soon as there is one it works."""

        def refuse(*_: object) -> int:
            raise OSError(24, "planted")

        eventfd = os.eventfd
        for delay in (0, 0.01):
            self.patch(os, "eventfd", refuse)
            self.assertRaises(OSError, self.clock.callLater, delay, lambda: None)
            self.assertEqual([], self.clock.getDelayedCalls())
            self.assertEqual((0, 0), self.open())
            self.patch(os, "eventfd", eventfd)
            await deferLater(self.clock, 0.02)
            await deferLater(reactor, 0)  # that was within one of its calls, before it closes what it no longer needs

    def test_the_reactor_ends(self) -> None:
        """When the reactor ends, and takes leave of its descriptors, they are closed."""
        self.clock.callLater(1000, lambda: None)
        for reader in (self.clock._alarm._timer, self.clock._alarm._bell):
            reader.connectionLost(Failure(ConnectionError()))
        self.assertEqual((0, 0), self.open())
        for call in self.clock.getDelayedCalls():
            call.cancel()


class Managers(WorldTestCase):
    """The managers' use of it."""

    async def test_a_fleet(self) -> None:
        """Twenty managers in one process have one clock between them; after the last one's end it is gone."""
        backend = await self.backend()
        managers = [
            self.manager(
                msgspec.structs.replace(
                    quick(backend, ""), machine_id=f"m-{number}", spool=config.Spool(durability="memory")
                )
            )
            for number in range(20)
        ]
        for manager in managers:
            manager.startService()
        for manager in managers:
            await manager.when_connected()

        self.assertIn(len(clocks()), (1, 2))
        for manager in managers:
            await manager.disconnect()
        await deferLater(reactor, 0)
        self.assertEqual([], clocks())
        self.assertEqual([], steady(reactor).getDelayedCalls())
