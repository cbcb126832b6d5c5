"""Tokens that are kept and renewed, on a virtual clock."""

from __future__ import annotations

from random import Random
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.auth.renewal import LIFE_OF_THE_DEAD, RENEW_FROM, RENEW_UNTIL, RETRY_CAP, Renewal
from commsmgr.bearer import Token
from commsmgr.errors import TokenError
from tests.link_kit import pass_time

EPOCH = 1_700_000_000.0


class RenewalTests(SynchronousTestCase):
    """One renewal, whose fetches have outcomes that the test writes down."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.fetched: list[float] = []
        self.outcome: Any = None
        self.renewal = self.build()
        self.logged: list[LogEvent] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: LogEvent) -> None:
        if event.get("event") == "token.renewal-failed":
            self.logged.append(event)

    def build(self, *, keep: bool = True, seed: int = 1) -> Renewal:
        return Renewal(self.fetch, keep=keep, timeout=30.0, clock=self.clock, wall=self.wall, random=Random(seed))

    def wall(self) -> float:
        return EPOCH + self.clock.seconds()

    def fetch(self) -> Deferred[Token]:
        self.fetched.append(self.clock.seconds())
        outcome = self.outcome or self.living(100.0)
        if isinstance(outcome, Deferred):
            return outcome
        return fail(outcome) if isinstance(outcome, Exception) else succeed(outcome)

    def living(self, seconds: float) -> Token:
        """Return a token of its own for each fetch, with so long to live."""
        return Token(f"t{len(self.fetched)}", self.wall() + seconds)

    def get(self) -> str:
        return self.successResultOf(self.renewal.get()).value

    def test_kept(self) -> None:
        """It is fetched once, however often it is asked for, until it is time for the next one."""
        self.assertEqual([self.get() for _ in range(5)], ["t1"] * 5)
        pass_time(self.clock, 100 * RENEW_FROM - 1)
        self.renewal.look()
        self.assertEqual((self.get(), len(self.fetched)), ("t1", 1))
        pass_time(self.clock, 100 * (RENEW_UNTIL - RENEW_FROM) + 2)
        self.assertEqual((self.get(), len(self.fetched)), ("t2", 2))

    def test_jitter(self) -> None:
        """Not all agents renew at the same moment, and all of them in the last part of the token's life."""
        moments = []
        for seed in range(100):
            self.setUp()
            self.renewal = self.build(seed=seed)
            self.get()
            while len(self.fetched) == 1:
                self.clock.advance(0.5)
                self.renewal.look()
            moments.append(self.fetched[1] - self.fetched[0])
        self.assertTrue(70 <= min(moments) < 72 and 88 < max(moments) <= 90.5, (min(moments), max(moments)))

    def test_without_being_used(self) -> None:
        """A look is enough to renew it; but it does not fetch what nobody has ever asked for."""
        self.renewal.look()
        self.assertEqual(self.fetched, [])
        self.get()
        for _ in range(100):
            self.clock.advance(10)
            self.renewal.look()
        self.assertTrue(1000 / 90 - 1 <= len(self.fetched) <= 1000 / 70 + 1, len(self.fetched))

    def test_the_old_one_meanwhile(self) -> None:
        """While the next one is fetched everybody gets the present one, as long as it lives."""
        self.get()
        pass_time(self.clock, 91)
        pending: Deferred[Token] = Deferred()
        self.outcome = pending
        self.assertEqual([self.get(), self.get()], ["t1", "t1"])
        self.assertEqual(len(self.fetched), 2)
        pass_time(self.clock, 10)
        waiting = self.renewal.get()
        self.assertNoResult(waiting)
        pending.callback(Token("next", self.wall() + 50))
        self.assertEqual(self.successResultOf(waiting).value, "next")
        self.assertEqual(self.get(), "next")

    def test_shared(self) -> None:
        """All who ask while there is none share one fetch; one who gives up takes nothing from the others."""
        pending: Deferred[Token] = Deferred()
        self.outcome = pending
        waiting = [self.renewal.get() for _ in range(3)]
        waiting[0].cancel()
        self.failureResultOf(waiting[0], CancelledError)
        pending.callback(Token("t", None))
        self.assertEqual([self.successResultOf(each).value for each in waiting[1:]], ["t", "t"])
        self.assertEqual(len(self.fetched), 1)

    def test_fails_near_the_end(self) -> None:
        """A provider that fails is asked again, ever more slowly; the present token goes on while it lives."""
        self.outcome = self.living(10_000.0)
        self.get()
        self.outcome = TokenError("vault is sealed")
        for _ in range(10_010):
            self.clock.advance(1)
            self.renewal.get().addErrback(lambda failure: failure.trap(TokenError))
        waits = [after - before for before, after in zip(self.fetched[1:], self.fetched[2:], strict=False)]
        self.assertTrue(7000 <= self.fetched[1] - 1000 <= 9001)
        self.assertTrue(all(1 <= wait <= RETRY_CAP + 1 for wait in waits), waits)
        self.assertTrue(all(wait >= 60 for wait in waits[7:]), waits)
        self.assertEqual(self.logged[0]["reason"], "vault is sealed")
        # Dead by now: the failure is the answer, without another fetch for each who asks.
        fetched = len(self.fetched)
        for _ in range(10):
            error = self.failureResultOf(self.renewal.get(), TokenError).value
            self.assertEqual(error.fact, "vault is sealed")
        self.assertEqual(len(self.fetched), fetched)
        self.outcome = None
        pass_time(self.clock, RETRY_CAP)
        self.assertEqual(self.get(), f"t{fetched + 1}")

    def test_other_errors(self) -> None:
        """Whatever else a fetch fails with shows its type alone."""
        self.outcome = ZeroDivisionError("secret")
        error = self.failureResultOf(self.renewal.get(), TokenError).value
        self.assertIn("ZeroDivisionError", str(error))
        self.assertNotIn("secret", str(error))

    def test_deadline(self) -> None:
        """A fetch that hangs is cancelled when its time is over, and whoever waits is told."""
        cancelled: list[object] = []
        self.outcome = Deferred(cancelled.append)
        waiting = self.renewal.get()
        pass_time(self.clock, 29.9)
        self.assertNoResult(waiting)
        pass_time(self.clock, 0.2)
        self.assertIn("within 30 s", self.failureResultOf(waiting, TokenError).value.fact)
        self.assertEqual(len(cancelled), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_refused(self) -> None:
        """After a refusal the next who asks has it fetched anew; a late refusal of an older one changes nothing."""
        self.get()
        self.renewal.refused("t1")
        self.assertEqual(self.get(), "t2")
        self.renewal.refused("t1")
        self.assertEqual((self.get(), len(self.fetched)), ("t2", 2))

    def test_refused_and_no_newer_one(self) -> None:
        """Where the provider gives the refused token again it is asked ever more slowly, however often that is."""
        self.outcome = Token("same")
        for _ in range(3600):
            self.assertEqual(self.get(), "same")
            self.renewal.refused("same")
            self.clock.advance(1)
        self.assertTrue(3600 / RETRY_CAP <= len(self.fetched) <= 3600 / (RETRY_CAP / 2) + 10, len(self.fetched))
        self.outcome = Token("newer")
        self.clock.advance(RETRY_CAP)
        self.assertEqual(self.get(), "newer")

    def test_refused_and_failing(self) -> None:
        """A refusal does not make a failing provider be asked without end either."""
        self.get()
        self.outcome = TokenError("no")
        for _ in range(600):
            self.renewal.refused("t1")
            self.failureResultOf(self.renewal.get(), TokenError)
            self.clock.advance(1)
        self.assertLess(len(self.fetched), 600 / (RETRY_CAP / 2) + 10)

    def test_unknown_end(self) -> None:
        """A token whose end nobody knows is kept until it is refused, or not at all."""
        self.outcome = Token("t")
        for keep, fetches in ((True, 1), (False, 5)):
            self.fetched.clear()
            self.renewal = self.build(keep=keep)
            for _ in range(5):
                self.assertEqual(self.get(), "t")
                self.renewal.look()
                pass_time(self.clock, 1e6)
            self.assertEqual(len(self.fetched), fetches)

    def test_used_once(self) -> None:
        """One that is not kept is fetched for each use, also after a refusal, and then kept if its end is known."""
        self.renewal = self.build(keep=False)
        self.outcome = Token("t")
        for _ in range(3):
            self.get()
            self.renewal.refused("t")
        self.assertEqual(len(self.fetched), 3)
        self.outcome = None
        self.assertEqual([self.get(), self.get()], ["t4", "t4"])

    def test_a_clock_that_is_ahead(self) -> None:
        """Tokens that all seem to have expired are used all the same, and not fetched for each use."""
        self.outcome = Token("t", self.wall() - 86400)
        for _ in range(600):
            self.assertEqual(self.get(), "t")
            self.clock.advance(1)
        self.assertLessEqual(len(self.fetched), 600 / (LIFE_OF_THE_DEAD * RENEW_FROM) + 1)

    def test_far_ends(self) -> None:
        """An end in a million years, or in a moment, is an end like others."""
        for life in (3e13, 1e-9):
            self.outcome = Token("t", self.wall() + life)
            self.renewal = self.build()
            self.assertEqual([self.get(), self.get()], ["t", "t"])

    def test_stop(self) -> None:
        """The stop cancels what is under way, tells who waits, and waits for its end, but not for ever."""
        self.successResultOf(Deferred.fromCoroutine(self.renewal.stop(1.0)))
        pending: Deferred[Token] = Deferred()
        self.outcome = pending
        waiting = self.renewal.get()
        self.successResultOf(Deferred.fromCoroutine(self.renewal.stop(1.0)))
        self.failureResultOf(waiting, TokenError)
        self.assertTrue(pending.called)

        class Stubborn:
            def __await__(self) -> Any:
                try:
                    yield from pending.__await__()
                except CancelledError:
                    yield from slow.__await__()
                return Token("late")

        for late in (True, False):
            pending, slow = Deferred(), Deferred()
            self.outcome = None
            self.renewal = Renewal(
                Stubborn, keep=True, timeout=30.0, clock=self.clock, wall=self.wall, random=Random(1)
            )
            waiting = self.renewal.get()
            stopping = Deferred.fromCoroutine(self.renewal.stop(1.0))
            self.assertNoResult(stopping)
            if late:
                pass_time(self.clock, 1.1)
                self.successResultOf(stopping)
                pass_time(self.clock, 30)
            else:
                slow.callback(None)
                self.successResultOf(stopping)
            self.failureResultOf(waiting, TokenError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
