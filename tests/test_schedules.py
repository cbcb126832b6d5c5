"""Schedules: at intervals, never twice at once, whatever the clock does."""

from __future__ import annotations

from random import Random

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import ConnectFailed
from commsmgr.schedules import Periodic


class PeriodicTests(SynchronousTestCase):
    """One schedule on a virtual clock."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(5000)
        self.starts: list[float] = []
        self.answer: list[Deferred[None]] = []

    def act(self) -> Deferred[None]:
        self.starts.append(self.clock.seconds() - 5000)
        return self.answer.pop(0) if self.answer else succeed(None)

    def periodic(self, interval: float = 10.0, jitter: float = 0.0, seed: int = 1) -> Periodic:
        schedule = Periodic("beat", self.act, interval=interval, jitter=jitter, clock=self.clock, random=Random(seed))
        schedule.start()
        return schedule

    def stop(self, schedule: Periodic) -> None:
        self.successResultOf(Deferred.fromCoroutine(schedule.stop(1.0)))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def advance(self, seconds: int) -> None:
        self.clock.pump([1] * seconds)

    def test_at_intervals(self) -> None:
        """Without jitter it acts at once, and then counts from start to start."""
        schedule = self.periodic()
        self.advance(25)
        self.assertEqual(self.starts, [1, 11, 21])
        self.stop(schedule)
        self.advance(25)
        self.assertEqual(len(self.starts), 3)

    def test_jitter(self) -> None:
        """The first start is spread over the jitter."""
        waits = []
        for seed in range(20):
            schedule = self.periodic(jitter=8.0, seed=seed)
            (call,) = self.clock.getDelayedCalls()
            waits.append(call.getTime() - 5000)
            self.stop(schedule)
        self.assertTrue(all(0 <= wait <= 8 for wait in waits))
        self.assertTrue(min(waits) < 2 and max(waits) > 6, waits)

    def test_never(self) -> None:
        """An interval of 0 is none at all; stopping that is nothing."""
        schedule = self.periodic(interval=0.0, jitter=3.0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.stop(schedule)

    def test_never_twice_at_once(self) -> None:
        """While one is under way none begins; what was missed is left out, and the next comes at once."""
        slow: Deferred[None] = Deferred()
        self.answer = [slow]
        schedule = self.periodic()
        self.advance(35)
        self.assertEqual(self.starts, [1])
        slow.callback(None)
        self.advance(12)
        self.assertEqual(self.starts, [1, 36, 46])
        self.stop(schedule)

    def test_short_action_shortens_the_wait(self) -> None:
        """The interval is from start to start, not from end to start."""
        slow: Deferred[None] = Deferred()
        self.answer = [slow]
        schedule = self.periodic()
        self.advance(4)
        slow.callback(None)
        self.advance(8)
        self.assertEqual(self.starts, [1, 11])
        self.stop(schedule)

    def test_leap(self) -> None:
        """After a sleeping machine or a leap of the clock there is one late start, not all those missed."""
        schedule = self.periodic()
        self.advance(1)
        self.clock.advance(100_000)
        self.assertEqual(len(self.starts), 2)
        self.advance(11)
        self.assertEqual(len(self.starts), 3)
        self.stop(schedule)

    def test_clock_stepping_back(self) -> None:
        """After a step back during an action the next wait is one interval, not the length of the step."""
        slow: Deferred[None] = Deferred()
        self.answer = [slow]
        schedule = self.periodic()
        self.advance(1)
        self.clock.rightNow -= 3600
        slow.callback(None)
        (call,) = self.clock.getDelayedCalls()
        self.assertEqual(call.getTime() - self.clock.seconds(), 10)
        self.stop(schedule)

    def test_set_interval(self) -> None:
        """Another interval counts from the last start, at once; None brings the configured one back."""
        schedule = self.periodic()
        self.advance(1)
        schedule.set_interval(3.0)
        self.advance(3)
        self.assertEqual(self.starts, [1, 4])
        self.advance(1)
        schedule.set_interval(None)
        self.advance(8)
        self.assertEqual(self.starts, [1, 4])
        self.advance(1)
        self.assertEqual(self.starts, [1, 4, 14])
        self.stop(schedule)

    def test_set_interval_that_has_passed(self) -> None:
        """A shorter interval that is over already means now."""
        schedule = self.periodic()
        self.advance(6)
        schedule.set_interval(2.0)
        self.clock.advance(0)
        self.assertEqual(self.starts, [1, 6])
        self.stop(schedule)

    def test_same_interval(self) -> None:
        """The interval that is in use changes nothing, not even the jitter of the first start."""
        schedule = self.periodic(jitter=8.0)
        before = self.clock.getDelayedCalls()
        schedule.set_interval(10.0)
        schedule.set_interval(None)
        self.assertEqual(self.clock.getDelayedCalls(), before)
        self.stop(schedule)

    def test_set_interval_before_the_first(self) -> None:
        """Whatever a backend sets, the first start comes at its own moment; from then on the interval holds."""
        for interval in (2.0, 500.0, 0.0):
            self.starts.clear()
            schedule = self.periodic(jitter=8.0)
            (first,) = self.clock.getDelayedCalls()
            schedule.set_interval(interval)
            self.assertEqual(self.clock.getDelayedCalls(), [first])
            began = first.getTime() - 5000
            self.clock.advance(first.getTime() - self.clock.seconds())
            self.clock.advance(2.0)
            self.assertEqual(self.starts, [began, began + 2.0] if interval == 2.0 else [began])
            self.stop(schedule)

    def test_set_interval_where_there_was_none(self) -> None:
        """A backend may order what the configuration does not: it begins an interval from now, and may end again."""
        schedule = self.periodic(interval=0.0, jitter=8.0)
        self.advance(5)
        schedule.set_interval(3.0)
        self.advance(6)
        self.assertEqual(self.starts, [8, 11])
        schedule.set_interval(None)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.stop(schedule)

    def test_started_again(self) -> None:
        """After another start the first one comes at its own moment again."""
        schedule = self.periodic(jitter=8.0)
        self.advance(9)
        self.stop(schedule)
        schedule.start()
        (first,) = self.clock.getDelayedCalls()
        schedule.set_interval(100.0)
        self.assertEqual(self.clock.getDelayedCalls(), [first])
        self.stop(schedule)

    def test_set_interval_while_acting(self) -> None:
        """Set while one is under way, it holds from the end of that one on."""
        slow: Deferred[None] = Deferred()
        self.answer = [slow]
        schedule = self.periodic()
        self.advance(1)
        schedule.set_interval(4.0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        slow.callback(None)
        self.advance(4)
        self.assertEqual(self.starts, [1, 5])
        self.stop(schedule)

    def test_set_interval_while_stopped(self) -> None:
        """A schedule that was stopped is not woken by an interval."""
        schedule = self.periodic()
        self.stop(schedule)
        schedule.set_interval(1.0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_errors(self) -> None:
        """An error of communication is a line in the log, a defect is logged as such; both go on."""
        self.answer = [fail(ConnectFailed("no route")), fail(ZeroDivisionError())]
        schedule = self.periodic()
        self.advance(22)
        self.assertEqual(self.starts, [1, 11, 21])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.flushLoggedErrors(), [])
        self.stop(schedule)

    def test_stop_while_acting(self) -> None:
        """Stopping cancels what is under way, and nothing comes after it."""
        cancelled: list[object] = []
        self.answer = [Deferred(cancelled.append)]
        schedule = self.periodic()
        self.advance(1)
        self.stop(schedule)
        self.assertEqual(len(cancelled), 1)
        self.assertEqual(self.flushLoggedErrors(), [])
