"""When results turn to HTTP."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.policy.fallback import Fallback


class FallbackTests(SynchronousTestCase):
    """With ten seconds to wait for a link, from second 100 on."""

    def setUp(self) -> None:
        self.fallback = Fallback(10, 100)

    def link(self, since: float, until: float, delivers: bool = False) -> None:
        self.fallback.link_up(since)
        if delivers:
            self.fallback.delivered()
        self.fallback.link_down(until)

    def test_start(self) -> None:
        """The wait begins at the start, and is over after its time."""
        self.assertEqual([self.fallback.wait(now) for now in (100, 103, 110, 150)], [10, 7, 0, -40])

    def test_a_way_that_is_lost(self) -> None:
        """After a link that has delivered something, however short, the wait begins anew."""
        self.link(104, 105, delivers=True)
        self.assertEqual(self.fallback.wait(105), 10)

    def test_a_long_link(self) -> None:
        """So it does after one with nothing to deliver that has lasted as long as one would wait."""
        self.link(104, 114)
        self.assertEqual(self.fallback.wait(114), 10)

    def test_no_way(self) -> None:
        """Links that come and go and deliver nothing change nothing; what an earlier one delivered is not theirs."""
        self.link(101, 102, delivers=True)
        for second in (103, 106, 109, 112):
            self.link(second, second + 1)
        self.assertEqual(self.fallback.wait(113), -1)

    def test_at_once(self) -> None:
        """Without WebSockets there is nothing to wait for."""
        self.assertEqual(Fallback(0, 100).wait(100), 0)
