"""The order of start and stop, within one deadline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import NotRunning, SpoolLocked
from commsmgr.service import OrderedService, Step
from commsmgr.waiters import Overrun, Waiters, bounded


class ServiceTests(SynchronousTestCase):
    """Parts that write down what becomes of them."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.log: list[str] = []
        self.shares: dict[str, float] = {}

    def step(
        self,
        name: str,
        start: Callable[[], Awaitable[None] | None] = lambda: None,
        stop: Callable[[], Awaitable[Any]] = lambda: succeed(None),
        share: float = 0.5,
    ) -> Step:
        def starting() -> Awaitable[None] | None:
            self.log.append(f"+{name}")
            return start()

        def stopping(seconds: float) -> Awaitable[Any]:
            self.log.append(f"-{name}")
            self.shares[name] = seconds
            return stop()

        return Step(name, starting, stopping, share)

    def service(self, *steps: Step, deadline: float = 10.0) -> OrderedService:
        service = OrderedService(steps, stop_deadline=deadline, clock=self.clock)
        service.startService()
        return service

    def test_order(self) -> None:
        """Each starts when the one before has, and stops when the one after has."""
        starting: Deferred[None] = Deferred()
        stopping: Deferred[None] = Deferred()
        service = self.service(self.step("a"), self.step("b", lambda: starting), self.step("c", stop=lambda: stopping))
        self.assertEqual(self.log, ["+a", "+b"])
        self.assertNoResult(service.started)
        starting.callback(None)
        self.successResultOf(service.started)
        self.assertEqual([part.name for part in service if part.running], ["a", "b", "c"])
        stopped = service.stopService()
        self.assertEqual(self.log, ["+a", "+b", "+c", "-c"])
        self.assertNoResult(stopped)
        stopping.callback(None)
        self.successResultOf(stopped)
        self.assertEqual(self.log[3:], ["-c", "-b", "-a"])
        self.assertFalse(service.running or any(part.running for part in service))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_parts_by_name(self) -> None:
        """A part is found in the service tree by its name."""
        service = self.service(self.step("spool"))
        self.assertEqual(service.getServiceNamed("spool").name, "spool")

    def test_child_of_another(self) -> None:
        """A service that somebody adds is no part: it is neither waited for nor in the way."""
        service = OrderedService([self.step("a")], stop_deadline=10.0, clock=self.clock)
        Service().setServiceParent(service)
        service.startService()
        self.successResultOf(service.started)
        self.assertEqual((self.log, len(list(service))), (["+a"], 2))
        self.successResultOf(service.stopService())
        self.assertEqual(self.log, ["+a", "-a"])

    def test_shares(self) -> None:
        """Each part gets its share of what is left of the deadline, and never nothing."""
        slow: Deferred[None] = Deferred()
        steps = [self.step("last", share=1.0), self.step("slow", stop=lambda: slow, share=0.4), self.step("first")]
        service = self.service(*steps)
        stopped = service.stopService()
        self.clock.advance(8)
        slow.callback(None)
        self.successResultOf(stopped)
        self.assertEqual(self.shares, {"first": 5.0, "slow": 4.0, "last": 2.0})

    def test_part_that_fails_to_start(self) -> None:
        """Those that had started are stopped in order, the failing one first, and those after it never start."""
        service = self.service(self.step("a"), self.step("b", lambda: fail(SpoolLocked("taken"))), self.step("c"))
        self.failureResultOf(service.started, SpoolLocked)
        self.assertEqual(self.log, ["+a", "+b", "-b", "-a"])
        self.successResultOf(service.stopService())
        self.assertEqual(len(self.log), 4)

    def test_part_that_raises(self) -> None:
        """It does not matter whether a part fails at once or later."""
        service = self.service(self.step("a"), self.step("b", lambda: 1 // 0))
        self.failureResultOf(service.started, ZeroDivisionError)
        self.assertEqual(self.log, ["+a", "+b", "-b", "-a"])

    def test_overrun(self) -> None:
        """A part that overruns the deadline is cancelled, and the others still get a moment."""
        cancelled: list[object] = []
        service = self.service(self.step("a"), self.step("hung", stop=lambda: Deferred(cancelled.append)))
        stopped = service.stopService()
        self.clock.advance(9.9)
        self.assertEqual((self.log[-1], cancelled), ("-hung", []))
        self.clock.advance(0.1)
        self.successResultOf(stopped)
        self.assertEqual((self.log[-1], len(cancelled)), ("-a", 1))
        self.assertAlmostEqual(self.shares["a"], 0.05)

    def test_overrun_that_heeds_no_cancellation(self) -> None:
        """Even a part that catches its cancellation and goes on holds nobody up."""

        async def stubborn() -> None:
            try:
                await Deferred()
            except CancelledError:
                await Deferred()

        service = self.service(self.step("a"), self.step("stubborn", stop=stubborn))
        stopped = service.stopService()
        self.clock.advance(10)
        self.successResultOf(stopped)
        self.assertEqual(self.log[-1], "-a")

    def test_part_that_fails_to_stop(self) -> None:
        """A part that fails to stop, by whatever error, is logged, and the others are stopped."""
        for error in (ValueError(), CancelledError()):
            self.log.clear()
            service = self.service(self.step("a"), self.step("b", stop=lambda error=error: fail(error)))
            self.successResultOf(service.stopService())
            self.assertEqual(self.log[-2:], ["-b", "-a"])
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)

    def test_stop_during_start(self) -> None:
        """The part that is starting is waited for, then all are stopped; those after it never start."""
        starting: Deferred[None] = Deferred()
        service = self.service(self.step("a"), self.step("b", lambda: starting), self.step("c"))
        stopped = service.stopService()
        self.clock.advance(3)
        self.assertEqual(self.log, ["+a", "+b"])
        starting.callback(None)
        self.failureResultOf(service.started, NotRunning)
        self.successResultOf(stopped)
        self.assertEqual(self.log, ["+a", "+b", "-b", "-a"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_during_a_start_that_hangs(self) -> None:
        """A start that never ends takes no more than half of the deadline; if it ends later, nothing comes of it."""
        starting: Deferred[None] = Deferred()
        service = self.service(self.step("a"), self.step("b", lambda: starting), self.step("c"))
        stopped = service.stopService()
        self.clock.advance(4.9)
        self.assertNoResult(stopped)
        self.clock.advance(0.1)
        self.successResultOf(stopped)
        starting.callback(None)
        self.failureResultOf(service.started, NotRunning)
        self.assertEqual(self.log, ["+a", "+b", "-b", "-a"])

    def test_stop_while_a_failed_start_is_undone(self) -> None:
        """A stop in the middle of the clean-up after a failed start waits for it, and stops nothing twice."""
        stopping: Deferred[None] = Deferred()
        service = self.service(self.step("a", stop=lambda: stopping), self.step("b", lambda: 1 // 0))
        stopped = service.stopService()
        stopping.callback(None)
        self.successResultOf(stopped)
        self.failureResultOf(service.started, ZeroDivisionError)
        self.assertEqual(self.log, ["+a", "+b", "-b", "-a"])


class BoundedTests(SynchronousTestCase):
    """A wait that ends."""

    def setUp(self) -> None:
        self.clock = Clock()

    def test_outcome(self) -> None:
        """What comes in time, good or bad, comes through, and leaves no timer."""
        self.assertEqual(self.successResultOf(bounded(succeed(5), 1, self.clock)), 5)
        self.failureResultOf(bounded(fail(ValueError()), 1, self.clock), ValueError)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_own_timeout_and_cancellation(self) -> None:
        """An error of what is waited for is not mistaken for the bound's."""
        self.failureResultOf(bounded(fail(CancelledError()), 1, self.clock), CancelledError)

    def test_expiry(self) -> None:
        """When the time is up the wait fails with Overrun."""
        waiting: Deferred[None] = bounded(Deferred(), 2, self.clock)
        self.clock.advance(1.9)
        self.assertNoResult(waiting)
        self.clock.advance(0.1)
        self.failureResultOf(waiting, Overrun)

    def test_late_outcome(self) -> None:
        """What comes after the time is up disturbs nobody."""
        waited: Deferred[None] = Deferred(lambda d: None)
        self.patch(waited, "cancel", lambda: None)
        waiting = bounded(waited, 2, self.clock)
        self.clock.advance(2)
        self.failureResultOf(waiting, Overrun)
        waited.errback(ValueError())
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_cancelled(self) -> None:
        """Cancelling reaches what is waited for."""
        cancelled: list[object] = []
        waiting: Deferred[None] = bounded(Deferred(cancelled.append), 2, self.clock)
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual((len(cancelled), self.clock.getDelayedCalls()), (1, []))


class WaitersTests(SynchronousTestCase):
    """Many wait for one thing."""

    def test_all_at_once(self) -> None:
        """Everybody who waits gets the value; who comes while it is given out waits for the next one."""
        waiters: Waiters[int] = Waiters()
        late: list[Deferred[int]] = []
        first, second = waiters.wait(), waiters.wait()
        first.addCallback(lambda value: late.append(waiters.wait()) or value)
        self.assertEqual(len(waiters), 2)
        waiters.fire(7)
        self.assertEqual([self.successResultOf(each) for each in (first, second)], [7, 7])
        self.assertNoResult(late[0])
        waiters.fail(ValueError())
        self.failureResultOf(late[0], ValueError)

    def test_cancelled(self) -> None:
        """Who gives up is off the list, also when another one makes it give up while both are told."""
        waiters: Waiters[int] = Waiters()
        first = waiters.wait()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(len(waiters), 0)
        for tell in (lambda: waiters.fire(1), lambda: waiters.fail(ValueError())):
            first, second = waiters.wait(), waiters.wait()
            first.addBoth(lambda _, second=second: second.cancel())
            tell()
            self.failureResultOf(second, CancelledError)
