"""Tests for the backoff and for the wait before the next WebSocket attempt."""

from __future__ import annotations

from random import Random

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config, errors
from commsmgr.policy.backoff import full_jitter
from commsmgr.policy.reconnect import delay


class Edge(Random):
    """A source of jitter that always gives the same share of the range."""

    def __init__(self, share: float) -> None:
        super().__init__(0)
        self.share = share

    def uniform(self, a: float, b: float) -> float:
        return a + self.share * (b - a)


class FullJitterTests(SynchronousTestCase):
    def bounds(self, attempt: int, **settings: float) -> tuple[float, float]:
        """Return the shortest and the longest wait."""
        arguments = {"base": 1.0, "cap": 60.0, **settings}
        low, high = (full_jitter(attempt, random=Edge(share), **arguments) for share in (0.0, 1.0))
        return low, high

    def test_doubles_up_to_the_cap(self) -> None:
        """The bound starts at the base, doubles with each attempt, and stops at the cap."""
        self.assertEqual([self.bounds(attempt)[1] for attempt in range(8)], [1, 2, 4, 8, 16, 32, 60, 60])

    def test_starts_at_nothing(self) -> None:
        """The jitter reaches down to no wait at all, whatever the attempt."""
        self.assertEqual([self.bounds(attempt)[0] for attempt in range(8)], [0] * 8)

    def test_floor_is_added(self) -> None:
        """The floor shifts the whole range and is not swallowed by the cap."""
        self.assertEqual(self.bounds(9, floor=100.0), (100.0, 160.0))

    def test_huge_attempts(self) -> None:
        """An agent that has failed for years still computes its wait."""
        for attempt in (1023, 1024, 10**6, 10**30):
            self.assertEqual(self.bounds(attempt, base=3600.0), (0.0, 60.0))

    def test_uniform(self) -> None:
        """The waits of a fleet fill the range evenly: each tenth holds about a tenth of them."""
        random = Random(7)
        tenths = [0] * 10
        for _ in range(10_000):
            tenths[int(full_jitter(20, base=1.0, cap=10.0, random=random))] += 1
        self.assertTrue(all(850 < count < 1150 for count in tenths), tenths)


class ReconnectTests(SynchronousTestCase):
    settings = config.Reconnect(base=1.0, cap=60.0, retry_after_cap=300.0)

    def bounds(self, error: errors.CommsError, attempt: int = 3) -> tuple[float, float]:
        """Return the shortest and the longest wait after ``error``."""
        low, high = (
            delay(error, attempt, settings=self.settings, refused_delay=100.0, random=Edge(share))
            for share in (0.0, 1.0)
        )
        return low, high

    usual = (0.0, 8.0)
    troubled = (5.0, 13.0)
    refused = (50.0, 150.0)

    def test_close_codes(self) -> None:
        """Each close code of the table has its pace, and so have its neighbours."""
        expected = {
            self.usual: (1000, 1001, 1005, 1006, 1007, 1009, 1010, 1012, 1014, 3000, 4399, 4500, 4408, 4425, 4429),
            self.troubled: (1011, 1013),
            self.refused: (1008, 4400, 4401, 4403, 4404, 4499),
        }
        for bounds, codes in expected.items():
            for code in codes:
                self.assertEqual(self.bounds(errors.ClosedByPeer(code=code)), bounds, code)

    def test_upgrade_statuses(self) -> None:
        """An upgrade refused for a reason that only somebody else can mend is tried slowly, others as usual."""
        expected = {
            self.usual: (0, 200, 301, 399, 408, 425, 429, 500, 502, 503, 504),
            self.refused: (400, 401, 403, 404, 407, 410, 426, 451, 499),
        }
        for bounds, statuses in expected.items():
            for status in statuses:
                self.assertEqual(self.bounds(errors.UpgradeRefused(status=status)), bounds, status)
        self.assertEqual(self.bounds(errors.HTTPStatusError(status=403)), self.refused)

    def test_refused_by_a_proxy(self) -> None:
        """A proxy's refusal is paced like a backend's, but for 401, which is not about our token: always slowly."""
        for status in (0, 302, 408, 429, 500, 502, 503, 504):
            self.assertEqual(self.bounds(errors.ProxyRefused(status=status)), self.usual, status)
        for status in (400, 401, 403, 404, 405, 407):
            for attempt in (0, 1, 7):
                self.assertEqual(self.bounds(errors.ProxyRefused(status=status), attempt), self.refused, status)
        self.assertEqual(self.bounds(errors.ProxyRefused(status=503, retry_after=100.0), 0), (100.0, 121.0))
        self.assertEqual(self.bounds(errors.ProxyRefused(status=503, retry_after=1e9)), (300.0, 368.0))

    def test_first_refused_token(self) -> None:
        """After the first 401 in a row a fresh token is tried soon; from the second one on there is no haste."""
        for error in (errors.UpgradeRefused(status=401), errors.ClosedByPeer(code=4401)):
            self.assertEqual(self.bounds(error, 0), (0.0, 1.0))
            self.assertEqual(self.bounds(error, 1), self.refused)
        self.assertEqual(self.bounds(errors.UpgradeRefused(status=403), 0), self.refused)

    def test_other_errors(self) -> None:
        """Whatever else ends a connection is followed by full jitter that grows with the attempts."""
        for error in (
            errors.ConnectFailed(),
            errors.TLSFailed(),
            errors.ConnectionEnded(),
            errors.PeerSilent(),
            errors.PeerViolation(),
            errors.TokenError(),
            errors.DeadlineExceeded(),
        ):
            self.assertEqual(self.bounds(error), self.usual)
            self.assertEqual(self.bounds(error, 99), (0.0, 60.0))

    def test_retry_after(self) -> None:
        """Retry-After is the least wait, whatever the jitter."""
        for status in (429, 503):
            self.assertEqual(self.bounds(errors.UpgradeRefused(status=status, retry_after=10.0)), (10.0, 20.0))

    def test_retry_after_spreads(self) -> None:
        """A fleet that was told the same number comes back over a time in proportion, at the first attempt too."""
        self.assertEqual(self.bounds(errors.UpgradeRefused(status=503, retry_after=100.0), 0), (100.0, 121.0))

    def test_retry_after_is_capped(self) -> None:
        """A backend cannot send its agents away for ever."""
        self.assertEqual(self.bounds(errors.UpgradeRefused(status=503, retry_after=1e9)), (300.0, 368.0))

    def test_retry_after_cannot_hurry(self) -> None:
        """A refusal with a short Retry-After stays on the slow path, one with a long one waits that long."""
        self.assertEqual(self.bounds(errors.UpgradeRefused(status=403, retry_after=0.0)), self.refused)
        self.assertEqual(self.bounds(errors.UpgradeRefused(status=403, retry_after=200.0)), (200.0, 340.0))

    def test_open_breaker(self) -> None:
        """Nothing is tried before the breaker lets a probe through."""
        self.assertEqual(self.bounds(errors.BreakerOpen(retry_in=15.0)), (15.0, 26.0))

    def test_trouble_stays_below_the_cap(self) -> None:
        """The floor for a backend in trouble never exceeds the cap that the operator set."""
        self.settings = config.Reconnect(base=10.0, cap=20.0)
        self.assertEqual(self.bounds(errors.ClosedByPeer(code=1011)), (20.0, 40.0))
