"""Many waiters for one thing."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.waiters import Waiters


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
