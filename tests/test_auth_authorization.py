"""Tokens as both transports get them, on a virtual clock: refusals, fallbacks, restarts, and how little is asked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.auth import authorization
from commsmgr.auth.accepted_tokens import AcceptedTokens
from commsmgr.auth.authorization import HTTP, WEBSOCKET, Authorization
from commsmgr.auth.providers import FileToken, StaticToken
from commsmgr.auth.renewal import Renewal
from commsmgr.bearer import Token, as_token
from commsmgr.errors import HTTPStatusError, TokenError
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.tokens import FREE, Route, TokenTable
from commsmgr.redact import Redactor
from commsmgr.status import TokenStatus
from tests.link_kit import FakeToken, House, pass_time
from tests.test_link import Bench
from tests.websocket_kit import MemoryTestCase

ONE, TWO = Route("one", HTTP), Route("one", WEBSOCKET)
OLD, NEW = "s3cr3t-old-token", "s3cr3t-new-token"


class AuthorizationTests(SynchronousTestCase):
    """One authorization, with a provider of the test's."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.registry = CollectorRegistry()
        self.redactor = Redactor()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        self.metrics.configured(["one", "two"])
        self.path = Path(self.mktemp()).absolute()
        self.provider = FakeToken(OLD)
        self.authorization = self.build()
        self.lines: list[tuple[str, str]] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: LogEvent) -> None:
        if str(event.get("event")).startswith("token."):
            self.assertNotIn("s3cr3t", formatEvent(event))
            self.lines.append((event["event"], formatEvent(event)))

    def logged(self) -> list[str]:
        """Return the names of the lines since the last call."""
        names = [name for name, _ in self.lines]
        self.lines.clear()
        return names

    def build(self, provider: Any = None) -> Authorization:
        return Authorization(
            provider or self.provider,
            source="token_file",
            table=TokenTable(refused_delay=60.0, random=Random(2)),
            clock=self.clock,
            wall=self.clock.seconds,
            redactor=self.redactor,
            metrics=self.metrics,
            file=AcceptedTokens(str(self.path), maybeDeferred, {"one": "https://one.example"}),
        )

    def get(self, route: Route = ONE) -> Token:
        return self.successResultOf(Deferred.fromCoroutine(self.authorization.get(route)))

    def error(self, route: Route = ONE) -> str:
        return str(self.failureResultOf(Deferred.fromCoroutine(self.authorization.get(route)), TokenError).value)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"commsmgr_token_{name}", labels)

    def refuse_the_new_one(self) -> None:
        """Come to where the old token was accepted and the new one refused."""
        self.authorization.accepted(ONE, self.get())
        self.provider.token = NEW
        self.authorization.refused(ONE, self.get())

    def test_known_to_the_redactor(self) -> None:
        """Each token is kept out of the log from its first use on, those of an earlier run too."""
        self.get()
        self.assertNotIn(OLD, self.redactor(f"it is {OLD}"))
        self.authorization.accepted(ONE, Token(NEW))
        self.redactor = Redactor()
        self.authorization = self.build()
        self.authorization.start()
        self.assertNotIn(NEW, self.redactor(f"it is {NEW}"))

    def test_looked_at_once(self) -> None:
        """A token is taken apart when it comes, not for each request; the next one is, too."""
        looked_at: list[object] = []

        def look(given: object) -> Token:
            looked_at.append(given)
            return as_token(given)

        self.patch(authorization, "as_token", look)
        for token in (OLD, NEW, OLD):
            self.provider.token = token
            self.assertEqual([token, token], [self.get().value, self.get(TWO).value])
        self.assertEqual([OLD, NEW, OLD], looked_at)

    def test_expiry(self) -> None:
        """The metric and the status know when the newest token ends, by the provider's word; a new one is told of."""
        self.provider.outcome = succeed(Token(OLD, 5000.0))
        self.get()
        self.assertEqual(
            (5000.0, 5000.0), (self.metric("expiry_timestamp_seconds"), self.authorization.status.expires_at)
        )
        self.assertEqual([], self.logged())
        self.provider.outcome = succeed(Token(NEW, 6000.0))
        self.get()
        self.assertEqual(6000.0, self.metric("expiry_timestamp_seconds"))
        self.assertIn("1970-01-01T01:40:00Z", self.lines[0][1])
        self.assertEqual(["token.renewed"], self.logged())
        self.provider.outcome = None
        self.get()
        self.assertEqual((None, None), (self.metric("expiry_timestamp_seconds"), self.authorization.status.expires_at))

    def test_the_earlier_one(self) -> None:
        """A new token that is refused does not displace the one that works; log, status and metrics say so."""
        self.refuse_the_new_one()
        self.assertEqual([NEW], self.provider.refusals)
        self.assertEqual(["token.renewed", "token.refused"], self.logged())
        for _ in range(3):
            self.assertEqual(OLD, self.get().value)
            self.authorization.accepted(ONE, Token(OLD))
        self.assertEqual(["token.earlier"], self.logged())
        status = TokenStatus("token_file", None, ("one over http",), ("one over http",))
        self.assertEqual(status, self.authorization.status)
        self.assertEqual((1, 1), (self.metric("refused", backend="one"), self.metric("earlier", backend="one")))
        self.assertEqual((0, 0), (self.metric("refused", backend="two"), self.metric("earlier", backend="two")))
        self.clock.advance(91)
        self.assertEqual(NEW, self.get().value)
        self.authorization.accepted(ONE, Token(NEW))
        self.assertEqual(TokenStatus("token_file"), self.authorization.status)
        self.assertEqual((0, 0), (self.metric("refused", backend="one"), self.metric("earlier", backend="one")))

    def test_over_a_restart(self) -> None:
        """The accepted token is there again after a restart, also when the provider has none at all then."""
        self.refuse_the_new_one()
        for outcome in (None, TokenError("vault is sealed")):
            self.authorization = self.build()
            self.authorization.start()
            self.provider.outcome = outcome
            if outcome is None:
                self.assertEqual(NEW, self.get().value)
                self.authorization.refused(ONE, Token(NEW))
            self.assertEqual(OLD, self.get().value)
        self.assertIn("vault is sealed", self.lines[-1][1])
        self.assertIn(OLD, self.path.read_text())

    def test_forgotten_when_refused(self) -> None:
        """A kept token that is refused is removed from the file, and the file with the last one."""
        self.authorization.accepted(TWO, Token(NEW))
        self.authorization.accepted(ONE, self.get())
        self.assertIn(OLD, self.path.read_text())
        self.authorization.refused(ONE, Token(OLD))
        self.assertNotIn(OLD, self.path.read_text())
        self.assertIn(NEW, self.path.read_text())
        self.authorization.refused(TWO, Token(NEW))
        self.assertFalse(self.path.exists())

    def test_nothing_to_show(self) -> None:
        """Where nothing may be shown the error says when, or why there is none."""
        self.authorization.refused(ONE, self.get())
        self.assertIn("refused this token, or several before it; it is shown again in ", self.error())
        self.assertEqual(OLD, self.get(TWO).value)
        self.provider.outcome = TokenError("vault is sealed")
        self.assertIn("vault is sealed", self.error())
        self.provider.outcome = succeed("")
        self.authorization.refused(ONE, self.get())
        self.provider.outcome = succeed("")
        self.assertIn("wants a token", self.error())

    def test_a_provider_with_a_defect(self) -> None:
        """Whatever a provider of the agent's gives or raises, it is a TokenError that shows no secret."""

        def defect() -> None:
            raise ZeroDivisionError("s3cr3t")

        for outcome in (
            ZeroDivisionError("s3cr3t"),
            defect,
            succeed(None),
            succeed(b"s3cr3t"),
            succeed(Token("x", "y")),
        ):  # type: ignore[arg-type]  # wrong on purpose
            self.provider.outcome = outcome
            self.assertNotIn("s3cr3t", self.error())
        self.assertEqual(2, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_cancel(self) -> None:
        """Cancelling cancels what the provider returned."""
        self.provider.outcome = pending = Deferred()
        waiting = Deferred.fromCoroutine(self.authorization.get(ONE))
        waiting.cancel()
        self.assertTrue(pending.called)
        self.failureResultOf(waiting, CancelledError)

    def test_look_and_stop(self) -> None:
        """A renewal is driven and stopped here; a provider of another kind is left alone."""
        pending: Deferred[Token] = Deferred()
        fetched: list[Any] = [Token(OLD, 1100.0), pending]
        renewal = Renewal(
            lambda: maybeDeferred(fetched.pop, 0),
            keep=True,
            timeout=5.0,
            clock=self.clock,
            wall=self.clock.seconds,
            random=Random(1),
        )
        self.authorization = self.build(renewal)
        self.get()
        self.clock.advance(95)
        self.authorization.look()
        self.assertEqual([], fetched)
        self.successResultOf(Deferred.fromCoroutine(self.authorization.stop(1.0)))
        self.assertTrue(pending.called)
        self.authorization = self.build()
        self.authorization.look()
        self.successResultOf(Deferred.fromCoroutine(self.authorization.stop(1.0)))
        self.assertEqual([], self.clock.getDelayedCalls())


class HourTests(MemoryTestCase):
    """A backend that answers 401 to everything for an hour, while somebody sends every other second."""

    HOUR = 3600
    # Each transport shows a token at most every 30 s (half of refused_delay), on average every 60 s.
    MOST = 2 * (HOUR // 30 + FREE)

    def story(self, provider: Callable[[Clock], Any]) -> tuple[int, int]:
        """Return how many requests and upgrades the backend saw."""
        house = House(clock=self.clock, auth=config.Auth(refused_delay=60.0))
        authorization = house.authorization
        authorization._provider = provider(self.clock)
        http = house.http["one"]
        http.default = 401
        bench = Bench(self, authorization=authorization, auth=config.Auth(refused_delay=60.0))
        bench.link.start()
        upgrades = 0
        shown_at: list[float] = []
        end = self.clock.seconds() + self.HOUR
        while self.clock.seconds() < end:
            if bench.attempts > upgrades:
                upgrades = bench.attempts
                shown_at.append(self.clock.seconds())
                bench.refuse("401 No")
            house.requests.send("POST", "/heartbeat").addErrback(
                lambda failure: failure.trap(TokenError, HTTPStatusError)
            )
            self.clock.advance(2)
        self.successResultOf(bench.stop())
        pass_time(self.clock, 1)
        self.assertEqual([], self.clock.getDelayedCalls())
        waits = {round(after - before) for before, after in pairwise(shown_at[FREE:])}
        self.assertGreater(len(waits), 10, "with jitter")
        self.assertGreaterEqual(min(waits), 30)

        return len(http.calls), upgrades

    def test_static(self) -> None:
        """A token that cannot change."""
        http, upgrades = self.story(lambda clock: StaticToken("wrong"))
        self.assertTrue(self.HOUR / 91 <= http <= self.HOUR / 40, http)
        self.assertTrue(self.HOUR / 120 <= upgrades <= self.HOUR / 40, upgrades)
        self.assertLessEqual(http + upgrades, self.MOST)

    def test_file(self) -> None:
        """A file that stays as it is: it is read again after each refusal, and the token shown no more often."""
        path = Path(self.mktemp())
        path.write_text("wrong")
        http, upgrades = self.story(lambda clock: FileToken(path))
        self.assertLessEqual(http + upgrades, self.MOST)

    def test_file_that_changes_for_the_worse(self) -> None:
        """A file that gets another wrong token every ten minutes costs one request more for each, on each transport."""
        path = Path(self.mktemp())
        path.write_text("wrong-0")

        class Rotated(FileToken):
            def get(self) -> Deferred[str]:
                path.write_text(f"wrong-{int(clock.seconds()) // 600}")
                return super().get()

        clock = self.clock
        http, upgrades = self.story(lambda _: Rotated(path))
        self.assertLessEqual(http + upgrades, self.MOST + 2 * 7)

    def commanded(self, answer: Callable[[int], str], life: float | None = None) -> tuple[int, int]:
        """Return how many requests, and how many runs of a command that there are when it gives these tokens."""
        runs: list[float] = []

        def run() -> Deferred[Token]:
            runs.append(self.clock.seconds())
            return succeed(Token(answer(len(runs)), None if life is None else self.clock.seconds() + life))

        def renewal(clock: Clock) -> Renewal:
            return Renewal(run, keep=True, timeout=5.0, clock=clock, wall=clock.seconds, random=Random(4))

        requests = sum(self.story(renewal))
        return requests, len(runs)

    def test_command(self) -> None:
        """A command that gives the same token again is run once for each refusal at most."""
        requests, runs = self.commanded(lambda _: "wrong")
        self.assertLessEqual(requests, self.MOST)
        self.assertLessEqual(runs, requests + 1)

    def test_command_that_renews(self) -> None:
        """The same for one whose tokens are short-lived, besides what their renewal takes."""
        requests, runs = self.commanded(lambda _: "wrong", life=100.0)
        self.assertLessEqual(requests, self.MOST)
        self.assertLessEqual(runs, requests + 1 + self.HOUR / 70)

    def test_command_that_makes_a_new_one_each_time(self) -> None:
        """Another wrong token for every refusal does not make it a loop."""
        requests, runs = self.commanded(lambda run: f"wrong-{run}")
        self.assertLessEqual(requests, self.MOST)
        self.assertLessEqual(runs, requests + 1)

    def test_callable_that_makes_a_new_one_each_time(self) -> None:
        """The same where nothing is kept: each use is another token."""
        given = count()

        class Provider(FakeToken):
            def get(self) -> Deferred[str]:
                return succeed(f"wrong-{next(given)}")

        http, upgrades = self.story(lambda clock: Provider())
        self.assertLessEqual(http + upgrades, self.MOST)
