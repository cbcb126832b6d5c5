"""Whether the backend still lives, on a virtual clock that may leap."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import PeerSilent
from commsmgr.liveness import LEAP, Liveness
from tests.link_kit import pass_time

INTERVAL, PATIENCE, RECEIPTS = 20.0, 10.0, 60.0


class _LivenessTests(SynchronousTestCase):
    """A connection on a clock, of which the test says what comes."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.in_flight = 0
        self.takes_pings = True
        self.answers = True
        self.pings: list[float] = []
        self.dead: list[PeerSilent] = []
        self.addCleanup(self.end)
        self.build()

    def end(self) -> None:
        """Nothing is left on the clock, but for pongs that are under way."""
        self.liveness.stop()
        self.clock.advance(0.01)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def build(self, **settings: Any) -> None:
        defaults = {"ping_interval": INTERVAL, "ping_timeout": PATIENCE, "receipt_timeout": RECEIPTS}
        self.liveness = Liveness(
            config.WebSocket(**(defaults | settings)),
            self.clock,
            in_flight=lambda: self.in_flight,
            ping=self._ping,
            dead=self.dead.append,
        )
        self.liveness.start()

    def rebuild(self, **settings: Any) -> None:
        """Begin anew, with other settings."""
        self.liveness.stop()
        self.build(**settings)

    def _ping(self) -> bool:
        if self.takes_pings:
            self.pings.append(self.clock.seconds() - 1000)
            if self.answers:
                self.clock.callLater(0.01, self.liveness.ponged)
        return self.takes_pings

    def run_for(self, seconds: float) -> None:
        pass_time(self.clock, seconds)

    def send(self, count: int = 1) -> None:
        """Put something in flight."""
        if not self.in_flight:
            self.liveness.sending()
        self.in_flight += count

    def leap(self, seconds: float) -> None:
        """The clock leaps, or the machine sleeps: what is due is called at once, late."""
        self.clock.rightNow += seconds
        self.clock.advance(0)


class KeepAliveTests(_LivenessTests):
    """The first witness."""

    def test_asks_when_nothing_comes(self) -> None:
        """A ping after each interval of silence, none while bytes come; the answers keep the connection."""
        for _ in range(2):
            self.run_for(15)
            self.liveness.heard()
        self.assertEqual(self.pings, [])
        self.run_for(INTERVAL)
        self.assertEqual(self.pings, [30 + INTERVAL])
        self.run_for(3600)
        self.assertTrue(170 <= len(self.pings) <= 182, len(self.pings))
        self.assertEqual(self.dead, [])

    def test_dead(self) -> None:
        """A ping that stays unanswered, with nothing else coming, is the end; the timer ends with it."""
        self.answers = False
        self.run_for(INTERVAL + PATIENCE - 0.1)
        self.assertEqual(self.dead, [])
        self.run_for(0.2)
        self.assertIn("no longer answers: silent", str(self.dead[0]))
        self.run_for(1000)
        self.assertEqual((len(self.dead), self.pings), (1, [INTERVAL]))

    def test_bytes_without_pongs(self) -> None:
        """Bytes that come do not make up for pongs that do not: what we send gets lost."""
        self.answers = False
        for _ in range(130):
            self.run_for(1)
            self.liveness.heard()
        self.assertIn("no-pong", str(self.dead[0]))

    def test_pings_of_others_count(self) -> None:
        """A ping that was sent as a barrier is asked for no second time, and its pong counts."""
        self.answers = False
        self.run_for(15)
        self.liveness.pinged()
        self.run_for(10)
        self.assertEqual(self.pings, [])
        self.liveness.ponged()
        self.run_for(INTERVAL - 1)
        self.assertEqual((self.pings, self.dead), ([], []))

    def test_a_connection_that_takes_no_ping(self) -> None:
        """It is being closed, for a reason of its own: nobody is declared dead, no timer is left."""
        self.takes_pings = False
        self.run_for(1000)
        self.assertEqual((self.dead, self.clock.getDelayedCalls()), ([], []))

    def test_stopped_within_the_ping(self) -> None:
        """A connection that ends while it pings sets no further timer."""

        def ping() -> bool:
            self.liveness.stop()
            return True

        self.patch(self, "_ping", ping)
        self.rebuild()
        self.run_for(1000)
        self.assertEqual(self.dead, [])

    def test_stop(self) -> None:
        """After the end nothing is left, and a second stop is nothing."""
        self.liveness.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.liveness.stop()
        self.run_for(100)
        self.assertEqual((self.pings, self.dead), ([], []))


class ReceiptsTests(_LivenessTests):
    """The second witness."""

    def test_stuck(self) -> None:
        """A backend that answers pings and receipts nothing is given up after receipt_timeout, not before."""
        self.run_for(500)
        self.send(7)
        self.run_for(RECEIPTS - 0.1)
        self.assertEqual(self.dead, [])
        self.run_for(0.2)
        self.assertIn("no receipt for 7 results in flight within 60 s", str(self.dead[0]))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_to_the_moment(self) -> None:
        """A receipt_timeout shorter than the interval holds, though the next look was to come later."""
        self.rebuild(receipt_timeout=5.0)
        self.run_for(1)
        self.send()
        self.run_for(4.9)
        self.assertEqual(self.dead, [])
        self.run_for(0.2)
        self.assertEqual(len(self.dead), 1)

    def test_progress(self) -> None:
        """Each receipt begins the time anew, for all that is still in flight; more that is sent does not."""
        self.send(3)
        for _ in range(5):
            self.run_for(50)
            self.in_flight = 2
            self.liveness.progressed()
        self.run_for(50)
        self.send()
        self.run_for(9.9)
        self.assertEqual(self.dead, [])
        self.run_for(0.2)
        self.assertEqual(len(self.dead), 1)

    def test_nothing_in_flight(self) -> None:
        """With nothing in flight there is nothing to wait for, and the time begins with the next sending."""
        self.send()
        self.run_for(50)
        self.in_flight = 0
        self.liveness.progressed()
        self.run_for(500)
        self.send()
        self.run_for(RECEIPTS - 0.1)
        self.assertEqual(self.dead, [])

    def test_sending_after_the_end(self) -> None:
        """What is sent on a connection that is over begins nothing."""
        self.liveness.stop()
        self.send()
        self.run_for(1000)
        self.assertEqual(self.dead, [])

    def test_before_the_start(self) -> None:
        """What is sent before the watch begins does no harm."""
        self.liveness.stop()
        early = Liveness(
            config.WebSocket(receipt_timeout=5.0),
            self.clock,
            in_flight=lambda: 1,
            ping=self._ping,
            dead=self.dead.append,
        )
        early.sending()
        early.start()
        self.run_for(4.9)
        self.assertEqual(self.dead, [])
        early.stop()


class LeapTests(_LivenessTests):
    """Clocks that leap, and machines that sleep: neither says anything about the peer."""

    def test_sleep(self) -> None:
        """After a sleep the peer is asked and gets its whole time anew, for the pong and for the receipts."""
        self.send()
        self.run_for(10)
        self.leap(8 * 3600)
        self.assertEqual(self.dead, [])
        self.run_for(RECEIPTS - 0.1)
        self.assertEqual(self.dead, [])
        self.assertNotEqual(self.pings, [])
        self.run_for(0.2)
        self.assertIn("no receipt", str(self.dead[0]))

    def test_sleep_at_a_dead_peer(self) -> None:
        """A peer that died during the sleep is noticed within the patience for one ping."""
        self.answers = False
        self.run_for(10)
        self.leap(3600)
        self.assertEqual((len(self.pings), self.dead), (1, []))
        self.run_for(PATIENCE + 0.1)
        self.assertEqual(len(self.dead), 1)

    def test_step_back(self) -> None:
        """After a step back the bound holds again, counted from the next look."""
        self.send()
        self.run_for(30)
        # Timers hang until the clock has caught up, or until somebody who noticed wakes them.
        self.clock.rightNow -= 5000
        for call in self.clock.getDelayedCalls():
            call.reset(0)
        self.clock.advance(0)
        self.run_for(RECEIPTS - 0.1)
        self.assertEqual(self.dead, [])
        self.run_for(0.2)
        self.assertEqual(len(self.dead), 1)

    def test_a_busy_process_is_no_leap(self) -> None:
        """A look that comes a little late, because the process was busy, does not give more time."""
        self.rebuild(receipt_timeout=15.0)
        self.send()
        self.run_for(10)
        self.leap(5 + LEAP - 0.5)
        self.assertEqual(len(self.dead), 1)

    def test_a_late_look_at_the_receipts(self) -> None:
        """One that comes later than that gives the peer its time anew: a receipt may lie in the socket."""
        self.rebuild(receipt_timeout=15.0)
        self.send()
        self.run_for(10)
        self.leap(5 + LEAP + 0.5)
        self.assertEqual(self.dead, [])
