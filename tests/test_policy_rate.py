"""The token bucket: what it lets through at once, in the long run, and after pauses."""

from __future__ import annotations

import math

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.policy.rate import TokenBucket


class TokenBucketTests(SynchronousTestCase):
    """Ten a second, forty at once."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.bucket = TokenBucket(10, 40, self.clock.seconds)

    def taken(self, most: int = 1000) -> int:
        """Take one token after the other, until there is none; return how many there were."""
        return next((count for count in range(most) if not self.bucket.take()), most)

    def test_burst(self) -> None:
        """A full bucket gives what it holds, and no more at the same moment."""
        self.assertEqual(self.taken(), 40)
        self.assertEqual(self.taken(), 0)

    def test_rate(self) -> None:
        """An empty one gives what it gained since, by the clock, never more than it holds."""
        self.taken()
        for seconds, gained in ((1, 10), (0.5, 5), (3.99, 40), (1000, 40)):
            self.clock.advance(seconds)
            self.assertEqual(self.taken(), gained, seconds)

    def test_long_run(self) -> None:
        """Whoever takes all the time gets the rate."""
        self.taken()
        got = 0
        for _ in range(10_000):
            self.clock.advance(0.01)
            got += self.taken()
        self.assertLessEqual(abs(got - 1000), 2)

    def test_twice_the_burst(self) -> None:
        """After a pause without a look at the clock at most twice the burst goes through at once."""
        self.clock.advance(1000)
        self.assertEqual(self.taken(), 80)

    def test_large(self) -> None:
        """One large thing passes, and is paid for before anything else does."""
        self.assertTrue(self.bucket.take(100))
        self.assertEqual(self.taken(), 0)
        self.clock.advance(5.9)
        self.assertEqual(self.taken(), 0)
        self.clock.advance(0.15)
        self.assertEqual(self.taken(), 1)

    def test_give_back(self) -> None:
        """What is given back can be taken again, within what the bucket holds."""
        self.taken()
        self.bucket.give_back()
        self.assertEqual(self.taken(), 1)
        self.bucket.give_back(1000)
        self.assertEqual(self.taken(), 40)

    def test_clock_steps_back(self) -> None:
        """A clock that steps back gives nothing and takes nothing; from there on it counts."""
        self.clock.advance(100)
        self.taken()
        self.clock.rightNow -= 50
        self.assertEqual(self.taken(), 0)
        self.clock.advance(1)
        self.assertEqual(self.taken(), 10)

    def test_no_limit(self) -> None:
        """A rate of 0 stands for none."""
        self.bucket = TokenBucket(0, 0, self.clock.seconds)
        self.assertTrue(self.bucket.take(1e18))
        self.bucket.give_back(math.inf)
        self.assertEqual(self.taken(), 1000)
