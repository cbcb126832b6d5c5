"""One log line for many of a kind."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.policy.log_throttle import LogThrottle


class LogThrottleTests(SynchronousTestCase):
    """Once per interval, with its reason."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.throttle = LogThrottle(self.clock.seconds, interval=10.0)

    def test_once_per_interval(self) -> None:
        """The first is let through, those within the interval are counted, and the next one brings their number."""
        self.assertEqual(self.throttle.allow("a"), 0)
        self.clock.advance(9.9)
        self.assertIsNone(self.throttle.allow("a"))
        self.assertIsNone(self.throttle.allow("a"))
        self.clock.advance(0.1)
        self.assertEqual(self.throttle.allow("a"), 2)
        self.clock.advance(10)
        self.assertEqual(self.throttle.allow("a"), 0)

    def test_reasons_apart(self) -> None:
        """Each reason has bursts of its own."""
        self.assertEqual(self.throttle.allow("a"), 0)
        self.assertEqual(self.throttle.allow("b"), 0)
        self.assertIsNone(self.throttle.allow("a"))

    def test_clock_steps_back(self) -> None:
        """A clock that steps back silences nothing."""
        self.throttle.allow("a")
        self.clock.rightNow -= 3600
        self.assertEqual(self.throttle.allow("a"), 0)

    def test_many_reasons(self) -> None:
        """Invented reasons share one burst once there are 64, and are forgotten when their interval is over."""
        self.assertEqual([self.throttle.allow(f"reason {number}") for number in range(64)], [0] * 64)
        self.assertEqual(self.throttle.allow("one more"), 0)
        self.assertIsNone(self.throttle.allow("another"))
        self.assertIsNone(self.throttle.allow("reason 5"))
        self.clock.advance(10)
        self.assertEqual(self.throttle.allow("another"), 0)
        self.assertEqual(self.throttle.allow("reason 5"), 0)
