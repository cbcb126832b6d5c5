"""Many waiters for one thing."""

from __future__ import annotations

import contextlib

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.waiters import Overrun, Waiters, bounded


class WaitersTests(SynchronousTestCase):
    """Firing, failing, cancelling, and all of it from within a callback."""

    def setUp(self) -> None:
        self.waiters: Waiters[int] = Waiters()

    def test_everybody_gets_the_value(self) -> None:
        """Each waiter has the value, and nobody waits any more."""
        waiting = [self.waiters.wait() for _ in range(3)]
        self.assertEqual(len(self.waiters), 3)
        self.waiters.fire(7)
        self.assertEqual([self.successResultOf(each) for each in waiting], [7, 7, 7])
        self.assertEqual(len(self.waiters), 0)

    def test_what_a_waiter_makes_of_the_value_is_its_own(self) -> None:
        """A callback that returns something else, or raises, changes nothing for the next waiter."""
        first, second, third = (self.waiters.wait() for _ in range(3))
        first.addCallback(lambda value: value + 1)
        second.addCallback(lambda value: value / 0)
        self.waiters.fire(7)
        self.assertEqual((self.successResultOf(first), self.successResultOf(third)), (8, 7))
        self.failureResultOf(second, ZeroDivisionError)

    def test_nobody_waits(self) -> None:
        """Without a waiter nothing happens, and the value is not kept for later."""
        self.waiters.fire(1)
        self.waiters.fail(ValueError())
        late = self.waiters.wait()
        self.assertNoResult(late)
        self.waiters.fire(2)
        self.assertEqual(self.successResultOf(late), 2)

    def test_failure(self) -> None:
        """Each waiter fails with the error."""
        waiting = [self.waiters.wait() for _ in range(2)]
        self.waiters.fail(ValueError("no"))
        for each in waiting:
            self.assertEqual(self.failureResultOf(each, ValueError).getErrorMessage(), "no")
        self.assertEqual(len(self.waiters), 0)

    def test_cancelled(self) -> None:
        """A cancelled waiter leaves the list and no other waiter hears of it."""
        first, second = self.waiters.wait(), self.waiters.wait()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(len(self.waiters), 1)
        self.waiters.fire(7)
        self.assertEqual(self.successResultOf(second), 7)

    def test_cancelled_while_firing(self) -> None:
        """A waiter that an earlier one's callback cancels has been cancelled, whether it was to fire or to fail."""
        for finish in (lambda: self.waiters.fire(7), lambda: self.waiters.fail(ValueError())):
            first, second, third = (self.waiters.wait() for _ in range(3))
            first.addBoth(lambda _, second=second: second.cancel())
            third.addErrback(lambda failure: failure.trap(ValueError) and None)
            finish()
            self.failureResultOf(second, CancelledError)
            self.successResultOf(first)
            self.successResultOf(third)
            self.assertEqual(len(self.waiters), 0)

    def test_waiting_again_while_firing(self) -> None:
        """Who begins to wait in a callback waits for the next time."""
        again: list[Deferred[int]] = []
        self.waiters.wait().addCallback(lambda _: again.append(self.waiters.wait()))
        self.waiters.fire(1)
        self.assertNoResult(again[0])
        self.waiters.fire(2)
        self.assertEqual(self.successResultOf(again[0]), 2)


class BoundedTests(SynchronousTestCase):
    """A wait with an end."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def test_in_time(self) -> None:
        """What ends in time ends as it does, by a value or an error, a time-out of its own included."""
        for outcome in (7, Failure(ValueError()), Failure(defer.TimeoutError())):
            waited: Deferred[int] = Deferred()
            waiting = bounded(waited, 5, self.clock)
            self.clock.advance(4)
            self.assertNoResult(waiting)
            waited.callback(outcome)
            if isinstance(outcome, Failure):
                self.assertIs(self.failureResultOf(waiting), outcome)
            else:
                self.assertEqual(self.successResultOf(waiting), outcome)

    def test_over(self) -> None:
        """After the time what was waited for is cancelled, and the wait fails."""
        cancelled: list[object] = []
        waiting = bounded(Deferred(cancelled.append), 5, self.clock)
        self.clock.advance(5)
        self.assertEqual(len(cancelled), 1)
        self.failureResultOf(waiting, Overrun)

    def test_heedless(self) -> None:
        """What does not heed the cancellation is not waited for, and what becomes of it is nobody's any more."""

        async def stubborn(inner: Deferred[None], last: Deferred[int]) -> int:
            with contextlib.suppress(CancelledError):
                await inner
            return await last

        for outcome in (7, Failure(ValueError())):
            last: Deferred[int] = Deferred()
            waiting = bounded(Deferred.fromCoroutine(stubborn(Deferred(), last)), 5, self.clock)
            self.clock.advance(5)
            self.failureResultOf(waiting, Overrun)
            last.callback(outcome)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_what_becomes_of_the_cancellation(self) -> None:
        """Work that answers the cancellation with a result or an error of its own has that."""
        waiting = bounded(Deferred(lambda waited: waited.callback(7)), 5, self.clock)
        self.clock.advance(5)
        self.assertEqual(self.successResultOf(waiting), 7)
        failing = bounded(Deferred(lambda waited: waited.errback(ValueError())), 5, self.clock)
        self.clock.advance(5)
        self.failureResultOf(failing, ValueError)

    def test_cancelled(self) -> None:
        """Cancelling the wait cancels what is waited for, and is no overrun."""
        waited: Deferred[int] = Deferred()
        waiting = bounded(waited, 5, self.clock)
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertTrue(waited.called)
