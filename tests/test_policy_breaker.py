"""Tests for the circuit breaker."""

from __future__ import annotations

from random import Random

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.policy.breaker import Breaker


class BreakerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.breaker = Breaker(config.Breaker(failures=3, open_for=10.0), self.clock.seconds, Random(1))
        self.changes: list[str] = []
        self.breaker.on_change = self.changes.append

    def fail_attempts(self, times: int) -> None:
        for _ in range(times):
            self.assertTrue(self.breaker.try_acquire())
            self.breaker.failed()

    def open(self) -> float:
        """Open the breaker and return how long it will stay so."""
        self.fail_attempts(3)
        self.assertEqual(self.breaker.state, "open")
        return self.breaker.retry_in()

    def half_open(self) -> None:
        """Let the probe out."""
        self.clock.advance(self.open())
        self.assertTrue(self.breaker.try_acquire())
        self.assertEqual(self.breaker.state, "half_open")

    def test_closed_lets_everything_pass(self) -> None:
        """A closed breaker grants any number of permits at once."""
        self.assertEqual([self.breaker.try_acquire() for _ in range(100)], [True] * 100)
        self.assertEqual((self.breaker.state, self.breaker.retry_in(), self.changes), ("closed", 0.0, []))

    def test_opens_at_the_limit(self) -> None:
        """The last allowed failure in a row opens it, and no earlier one does."""
        self.fail_attempts(2)
        self.assertEqual(self.breaker.state, "closed")
        self.fail_attempts(1)
        self.assertEqual((self.breaker.state, self.changes), ("open", ["open"]))
        self.assertFalse(self.breaker.try_acquire())

    def test_one_failure_may_be_the_limit(self) -> None:
        """With a limit of one the first failure opens it."""
        self.breaker = Breaker(config.Breaker(failures=1), self.clock.seconds, Random(1))
        self.fail_attempts(1)
        self.assertEqual(self.breaker.state, "open")

    def test_success_resets(self) -> None:
        """Only failures in a row count: a success in between starts the count afresh."""
        for _ in range(5):
            self.fail_attempts(2)
            self.breaker.succeeded()
        self.assertEqual((self.breaker.state, self.changes), ("closed", []))

    def test_released_is_neutral_when_closed(self) -> None:
        """An attempt that says nothing neither resets the count nor adds to it."""
        self.fail_attempts(2)
        self.breaker.released()
        self.assertEqual(self.breaker.state, "closed")
        self.fail_attempts(1)
        self.assertEqual(self.breaker.state, "open")

    def test_open_for_with_jitter(self) -> None:
        """The time open is at least the configured one, at most a fifth longer, and differs within a fleet."""
        waits = []
        for seed in range(200):
            self.breaker = Breaker(config.Breaker(failures=3, open_for=10.0), self.clock.seconds, Random(seed))
            waits.append(self.open())
        self.assertGreaterEqual(min(waits), 10.0)
        self.assertLessEqual(max(waits), 12.0)
        self.assertGreater(max(waits) - min(waits), 1.8)

    def test_probe_when_the_time_is_over(self) -> None:
        """Nothing passes a moment before, one probe passes at the time that was announced."""
        wait = self.open()
        self.clock.advance(wait - 0.001)
        self.assertFalse(self.breaker.try_acquire())
        self.assertAlmostEqual(self.breaker.retry_in(), 0.001)
        self.clock.advance(0.001)
        self.assertEqual((self.breaker.retry_in(), self.breaker.state), (0.0, "open"))
        self.assertTrue(self.breaker.try_acquire())
        self.assertEqual(self.changes, ["open", "half_open"])

    def test_one_probe_at_a_time(self) -> None:
        """While a probe is out nothing else passes, however long it takes, and who asks is not told to hurry."""
        self.half_open()
        for _ in range(3):
            self.clock.advance(1000)
            self.assertFalse(self.breaker.try_acquire())
            self.assertEqual(self.breaker.retry_in(), 10.0)

    def test_probe_succeeds(self) -> None:
        """A successful probe closes the breaker, with no failure remembered."""
        self.half_open()
        self.breaker.succeeded()
        self.assertEqual(self.changes, ["open", "half_open", "closed"])
        self.fail_attempts(2)
        self.assertEqual(self.breaker.state, "closed")

    def test_probe_fails(self) -> None:
        """A failed probe opens the breaker for a whole time again."""
        self.half_open()
        self.breaker.failed()
        self.assertEqual(self.changes, ["open", "half_open", "open"])
        self.assertGreaterEqual(self.breaker.retry_in(), 10.0)
        self.assertFalse(self.breaker.try_acquire())

    def test_probe_says_nothing(self) -> None:
        """A cancelled probe makes room for another one at once, and still for one only."""
        self.half_open()
        self.breaker.released()
        self.assertEqual(self.breaker.retry_in(), 0.0)
        self.assertEqual([self.breaker.try_acquire() for _ in range(3)], [True, False, False])

    def test_late_reports_while_open(self) -> None:
        """Attempts that began before it opened neither close it, nor keep it open for longer."""
        wait = self.open()
        self.clock.advance(5)
        for report in (self.breaker.succeeded, self.breaker.failed, self.breaker.released):
            report()
            self.assertEqual((self.breaker.state, self.breaker.retry_in()), ("open", wait - 5))
        self.assertEqual(self.changes, ["open"])

    def test_late_reports_while_half_open(self) -> None:
        """A late report taken for the probe's leaves a machine that the probe's own report finds in order."""
        self.half_open()
        self.breaker.failed()
        self.breaker.succeeded()
        self.assertEqual(self.breaker.state, "open")
        self.clock.advance(self.breaker.retry_in())
        self.assertTrue(self.breaker.try_acquire())
        self.breaker.succeeded()
        self.breaker.failed()
        self.assertEqual(self.breaker.state, "closed")
        self.assertTrue(self.breaker.try_acquire())

    def test_nobody_listens(self) -> None:
        """Without a listener the machine works the same."""
        self.breaker.on_change = None
        self.half_open()
        self.breaker.succeeded()
        self.assertEqual((self.breaker.state, self.changes), ("closed", []))

    def test_listener_sees_the_new_state(self) -> None:
        """The listener may ask the breaker: the change has already happened."""
        seen: list[bool] = []
        self.breaker.on_change = lambda state: seen.append(state == self.breaker.state)
        self.half_open()
        self.breaker.succeeded()
        self.assertEqual(seen, [True, True, True])
