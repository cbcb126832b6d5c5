"""Tests for the retry budget and the outage budget."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.policy.budget import OutageBudget, RetryBudget


class RetryBudgetTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.budget = RetryBudget()

    def test_allowed_above_half(self) -> None:
        """Four failures leave six tokens of ten, five leave no retry."""
        allowed = []
        for _ in range(5):
            self.budget.failed()
            allowed.append(self.budget.allows_retry())
        self.assertEqual(allowed, [True] * 4 + [False])

    def test_successes_bring_it_back(self) -> None:
        """From empty it takes more than fifty successes until retries are allowed."""
        for _ in range(100):
            self.budget.failed()
        for _ in range(49):
            self.budget.succeeded()
        self.assertFalse(self.budget.allows_retry())
        for _ in range(2):
            self.budget.succeeded()
        self.assertTrue(self.budget.allows_retry())

    def test_never_above_full(self) -> None:
        """A long good time is no credit for more retries in a bad one."""
        for _ in range(1000):
            self.budget.succeeded()
        self.test_allowed_above_half()

    def test_one_failure_in_ten_is_too_many(self) -> None:
        """At the ratio that successes pay for the budget stands still; above it, it runs out."""
        for _ in range(100):
            self.budget.failed()
            self.budget.failed()
            for _ in range(10):
                self.budget.succeeded()
        self.assertFalse(self.budget.allows_retry())

    def test_own_numbers(self) -> None:
        """Tokens and ratio can be set."""
        budget = RetryBudget(tokens=2, ratio=1)
        budget.failed()
        self.assertFalse(budget.allows_retry())
        budget.succeeded()
        self.assertTrue(budget.allows_retry())


class OutageBudgetTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_000_000)
        self.budget = OutageBudget(self.clock.seconds, window=100.0)

    def produce(self, *, seconds: int, rate: int, size: int) -> None:
        """Accept ``rate`` events of ``size`` bytes in each of so many seconds."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.budget.accepted(1, size)
            self.budget.accepted(rate - 1, (rate - 1) * size)

    def assertAbout(self, found: float | None, expected: float, tolerance: float = 0.02) -> None:
        assert found is not None
        self.assertTrue(abs(found / expected - 1) < tolerance, f"{found} is not about {expected}")

    def test_nothing_produced(self) -> None:
        """Without events there is no rate to divide by."""
        self.assertIsNone(self.budget.seconds_left(1000, 1000))
        self.clock.advance(1000)
        self.assertIsNone(self.budget.seconds_left(1000, 1000))

    def test_by_count(self) -> None:
        """When places run out before bytes they bound the budget."""
        self.produce(seconds=1000, rate=5, size=10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 200)

    def test_by_bytes(self) -> None:
        """When bytes run out before places they bound the budget."""
        self.produce(seconds=1000, rate=5, size=100)
        self.assertAbout(self.budget.seconds_left(10**9, 10_000), 20)

    def test_soon_after_the_start(self) -> None:
        """A steady rate is known long before a whole window has passed: too high a promise would be a lie."""
        self.produce(seconds=10, rate=5, size=10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 200, 0.1)

    def test_first_event(self) -> None:
        """The very first event, in the instant of the start, gives a number and no division by zero."""
        self.budget.accepted(1, 10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 1000)

    def test_follows_the_rate(self) -> None:
        """When the rate changes the estimate follows within a few windows."""
        self.produce(seconds=500, rate=1, size=10)
        self.produce(seconds=500, rate=10, size=10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 100)
        self.produce(seconds=1500, rate=1, size=10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 1000)

    def test_silence(self) -> None:
        """While it is silent the budget grows; after three windows nothing counts as being produced."""
        self.produce(seconds=500, rate=5, size=10)
        before = self.budget.seconds_left(1000, 10**9)
        self.clock.advance(100)
        after = self.budget.seconds_left(1000, 10**9)
        assert before is not None
        self.assertAbout(after, before * 2.718)
        self.clock.advance(200)
        self.assertIsNotNone(self.budget.seconds_left(1000, 10**9))
        self.clock.advance(1)
        self.assertIsNone(self.budget.seconds_left(1000, 10**9))
        self.budget.accepted(1, 10)
        self.assertIsNotNone(self.budget.seconds_left(1000, 10**9))

    def test_full(self) -> None:
        """A spool at or over its bound can buffer nothing, and never less than nothing."""
        self.produce(seconds=10, rate=1, size=10)
        self.assertEqual(self.budget.seconds_left(0, 10**9), 0.0)
        self.assertEqual(self.budget.seconds_left(1000, -5), 0.0)

    def test_empty_events(self) -> None:
        """Events without a body never fill the bytes."""
        self.produce(seconds=1000, rate=1, size=0)
        self.assertAbout(self.budget.seconds_left(1000, 0), 1000)

    def test_very_long_silence_in_between(self) -> None:
        """After years without an event the old rate is forgotten, without an overflow."""
        self.produce(seconds=500, rate=1000, size=10)
        self.clock.advance(1e9)
        self.budget.accepted(1, 10)
        self.assertAbout(self.budget.seconds_left(1000, 10**9), 100_000)
