"""HTTP requests with retries on a virtual clock: verdicts, waits, tokens, deadlines, permits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import (
    BreakerOpen,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    HTTPStatusError,
    NotRunning,
    PeerViolation,
    ProxyRefused,
    TokenError,
)
from commsmgr.requests import not_html
from commsmgr.transport.http import HTTPResponse
from tests.link_kit import HANG, House, answer, pass_time

HTML = answer(200, {"content-type": "text/HTML; charset=utf-8"}, b"<html>Please log in</html>")


class _RequestTests(SynchronousTestCase):
    """One backend, unless a test builds more."""

    def setUp(self) -> None:
        self.build(reconnect=config.Reconnect(base=1.0, cap=8.0, retry_after_cap=100.0))

    def build(self, *names: str, **sections: Any) -> None:
        self.house = House(*names, **sections)
        self.clock = self.house.clock
        self.http = next(iter(self.house.http.values()))
        self.addCleanup(lambda clock=self.clock: self.assertEqual(clock.getDelayedCalls(), []))

    def send(self, method: str = "POST", path: str = "/heartbeat", **parameters: Any) -> Deferred[HTTPResponse]:
        return self.house.requests.send(method, path, **parameters)

    def error(self, waiting: Deferred[Any], kind: type[Exception]) -> Any:
        return self.failureResultOf(waiting, kind).value

    @property
    def waits(self) -> list[float]:
        """The seconds between the attempts."""
        times = [call.at for call in self.http.calls]
        return [after - before for before, after in pairwise(times)]


class AttemptTests(_RequestTests):
    """What one attempt sends, and what becomes of each outcome."""

    def test_success(self) -> None:
        """A 2xx is the result; the exchange bears the token, the key and the fields."""
        response = self.successResultOf(
            self.send(body=b"x", headers={"X-A": "1"}, idempotency_key="k1", path="/inventory")
        )
        self.assertEqual(response.status, 200)
        (call,) = self.http.calls
        self.assertEqual((call.method, call.path, call.body, call.token), ("POST", "/inventory", b"x", "t0"))
        self.assertEqual(call.headers, {"X-A": "1", "Idempotency-Key": "k1"})
        self.assertEqual(call.timeout, self.house.config.http.timeout)
        line = self.house.lines[0]
        self.assertEqual((line.http_works, line.last_receipt), (True, self.clock.seconds()))

    def test_no_key(self) -> None:
        """Without a key there is no such field, and what the caller passed is not changed."""
        fields: dict[str, str] = {}
        self.successResultOf(self.send("GET", headers=fields))
        self.send(headers=fields, idempotency_key="k")
        self.assertEqual((self.http.calls[0].headers, fields), ({}, {}))

    def test_permanent(self) -> None:
        """What can never succeed is tried once, and says nothing against the backend."""
        for status in (302, 400, 403, 404, 413, 422):
            self.http.calls.clear()
            self.http.script = [answer(status, body=b"y" * 5000)]
            error = self.error(self.send(), HTTPStatusError)
            self.assertEqual((error.status, len(error.body), len(self.http.calls)), (status, 1024, 1))
            self.assertTrue(self.house.lines[0].http_works)
        self.assertEqual(self.house.breaker.state, "closed")

    def test_retried(self) -> None:
        """What may pass is tried http.attempts times, with the same key, body and path, at growing waits."""
        self.http.default = 503
        waiting = self.send(body=b"x", idempotency_key="k1")
        pass_time(self.clock, 60)
        self.assertEqual(self.error(waiting, HTTPStatusError).status, 503)
        self.assertEqual({call.headers["Idempotency-Key"] for call in self.http.calls}, {"k1"})
        self.assertEqual({call.body for call in self.http.calls}, {b"x"})
        self.assertEqual(len(self.http.calls), 4)
        for wait, bound in zip(self.waits, (1, 2, 4), strict=True):
            self.assertTrue(0 <= wait <= bound, wait)
        self.assertFalse(self.house.lines[0].http_works)

    def test_attempts(self) -> None:
        """The caller may ask for fewer attempts; the last error is the result."""
        self.http.script = [ConnectionEnded("one"), ConnectFailed("two")]
        waiting = self.send(attempts=2)
        pass_time(self.clock, 60)
        self.assertEqual(self.error(waiting, ConnectFailed).fact, "two")
        self.assertEqual(len(self.http.calls), 2)

    def test_recovers(self) -> None:
        """A later attempt's answer is the result."""
        self.http.script = [503, ConnectFailed("no"), 200]
        waiting = self.send()
        pass_time(self.clock, 60)
        self.assertEqual(self.successResultOf(waiting).status, 200)
        self.assertTrue(self.house.lines[0].http_works)

    def test_retry_after(self) -> None:
        """Retry-After is the least wait, within its cap; the jitter comes on top."""
        for field, least in (("20", 20), ("7200", 100)):
            self.http.calls.clear()
            self.http.script = [answer(429, {"retry-after": field})]
            waiting = self.send()
            pass_time(self.clock, 200)
            self.successResultOf(waiting)
            self.assertTrue(least <= self.waits[0] <= least + 1, self.waits)

    def test_refused_by_a_proxy(self) -> None:
        """A proxy's refusal is final at once where only somebody else can mend it, and never the token's fault."""
        for status in (401, 403, 407):
            self.http.calls.clear()
            self.http.script = [ProxyRefused("no", status=status)]
            self.assertEqual(self.error(self.send(), ProxyRefused).status, status)
            self.assertEqual(len(self.http.calls), 1)
        self.assertEqual(self.house.token.refusals, [])
        for asked, least in ((20.0, 20), (7200.0, 100)):
            self.http.calls.clear()
            self.http.script = [ProxyRefused("not now", status=503, retry_after=asked)]
            waiting = self.send()
            pass_time(self.clock, 200)
            self.successResultOf(waiting)
            self.assertTrue(least <= self.waits[0] <= least + 1, self.waits)

    def test_web_page(self) -> None:
        """With a check, a web page is no answer of the backend's whatever its status; without one it is a 2xx."""
        self.http.default = HTML
        self.assertEqual(self.successResultOf(self.send()).status, 200)
        error = self.error(self.send(check=not_html, attempts=1), PeerViolation)
        self.assertIn("web page", error.fact)
        self.assertFalse(self.house.lines[0].http_works)
        self.http.default = 200
        self.successResultOf(self.send(check=not_html))

    def test_check_of_errors(self) -> None:
        """An answer that is an error anyway is not checked: its status says more."""
        self.http.default = answer(404, {"content-type": "text/html"})
        self.error(self.send(check=not_html), HTTPStatusError)

    def test_budget(self) -> None:
        """When most of what is tried fails, nothing is tried twice any more; two successes earn one retry back."""
        self.build(breaker=config.Breaker(failures=1000))
        self.http.default = 503
        for _ in range(5):
            waiting = self.send()
            pass_time(self.clock, 600)
            self.error(waiting, HTTPStatusError)
        self.http.calls.clear()
        self.error(self.send(), HTTPStatusError)
        self.assertEqual(len(self.http.calls), 1)
        for successes, retries in ((8, 0), (6, 1)):
            self.http.default = 200
            for _ in range(successes):
                self.successResultOf(self.send())
            self.http.calls.clear()
            self.http.default = 503
            waiting = self.send()
            pass_time(self.clock, 10)
            self.error(waiting, HTTPStatusError)
            self.assertEqual(len(self.http.calls) - 1, retries, successes)

    def test_single_attempts_do_not_touch_the_budget(self) -> None:
        """Who tries once only has a pace of its own: however often it fails, others may still try again."""
        self.build(breaker=config.Breaker(failures=1000))
        self.http.default = 503
        for _ in range(100):
            self.error(self.send(attempts=1), HTTPStatusError)
        self.http.calls.clear()
        self.http.default = 200
        self.http.script = [503]
        waiting = self.send()
        pass_time(self.clock, 10)
        self.successResultOf(waiting)
        self.assertEqual(len(self.http.calls), 2)


class TokenTests(_RequestTests):
    """401, and providers that fail."""

    def test_refreshed_once(self) -> None:
        """A 401 is told to the provider and the request repeated at once with a fresh token."""
        self.http.script = [401, 200]
        self.successResultOf(self.send(idempotency_key="k"))
        self.assertEqual(self.house.token.refusals, ["t0"])
        self.assertEqual([call.token for call in self.http.calls], ["t0", "t1"])
        self.assertEqual({call.headers["Idempotency-Key"] for call in self.http.calls}, {"k"})

    def test_refused_twice(self) -> None:
        """The second 401 is the answer, even after another error between the two: no loop."""
        self.http.script = [401, 401]
        self.assertEqual(self.error(self.send(attempts=100), HTTPStatusError).status, 401)
        self.assertEqual(len(self.http.calls), 2)
        self.setUp()
        self.http.script = [401, 503, 401, 200]
        waiting = self.send(attempts=100)
        pass_time(self.clock, 60)
        self.assertEqual(self.error(waiting, HTTPStatusError).status, 401)
        self.assertEqual(len(self.http.calls), 3)

    def test_no_token(self) -> None:
        """Without a token nothing is sent, and the breaker is free again."""
        self.house.token.outcome = TokenError("no file")
        self.error(self.send(), TokenError)
        self.assertEqual(self.http.calls, [])
        self.assertTrue(self.house.breaker.try_acquire())

    def test_a_provider_with_a_defect(self) -> None:
        """Whatever else a provider fails with, or raises, is a TokenError: callers know how to live with that."""

        def defect() -> None:
            raise ZeroDivisionError("secret")

        for outcome in (ZeroDivisionError("secret"), defect):
            self.house.token.outcome = outcome
            error = self.error(self.send(), TokenError)
            self.assertIn("ZeroDivisionError", error.fact)
            self.assertNotIn("secret", str(error))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_no_hot_loop(self) -> None:
        """However often something is sent, a refused token is shown again after half of refused_delay or later."""
        self.build(auth=config.Auth(refused_delay=60))
        self.house.token.newer.clear()
        self.http.default = 401
        self.assertEqual(self.error(self.send(attempts=100), HTTPStatusError).status, 401)
        self.assertEqual(len(self.http.calls), 1)
        for _ in range(36000):
            self.send().addErrback(lambda failure: failure.trap(TokenError, HTTPStatusError))
            self.clock.advance(0.1)
        self.assertTrue(all(30 <= wait <= 91 for wait in self.waits), self.waits)
        self.assertGreater(max(self.waits) - min(self.waits), 20)
        self.assertTrue(3600 / 91 <= len(self.http.calls) <= 3600 / 40, len(self.http.calls))
        self.http.default = 200
        self.clock.advance(91)
        self.successResultOf(self.send())
        self.assertEqual(self.house.breaker.state, "closed")

    def test_another_token(self) -> None:
        """
        One that was not refused goes out at once; what one backend refused another one may take; and where a newer one
        is refused the one that was accepted before is shown.
        """
        self.build("one", "two")
        self.http.script = [401, 401]
        self.error(self.send(), HTTPStatusError)
        self.house.token.token = "t1"
        self.house.trip("two")
        self.assertIn("shown again", self.error(self.send(), TokenError).fact)
        self.assertEqual([call.token for call in self.http.calls], ["t0", "t1"])
        pass_time(self.clock, self.house.lines[1].breaker.retry_in())
        self.house.token.token = "t3"
        # That there is another one shows when it is asked for, for a backend that held back none.
        self.successResultOf(self.send())
        self.assertEqual(self.house.http["two"].calls.pop().token, "t3")
        self.successResultOf(self.send())
        self.assertEqual(self.http.calls[-1].token, "t3")
        self.house.token.token = "t2"
        self.house.trip("one")
        self.successResultOf(self.send())
        self.assertEqual(self.house.http["two"].calls[0].token, "t2")
        self.house.token.token = "t4"
        self.house.http["two"].script = [401]
        self.successResultOf(self.send())
        self.assertEqual([call.token for call in self.house.http["two"].calls], ["t2", "t4", "t2"])
        pass_time(self.clock, self.house.breaker.retry_in())
        self.successResultOf(self.send())
        self.assertEqual(self.http.calls[-1].token, "t4")

    def test_another_backend(self) -> None:
        """While one holds the token back requests go to one that does not, and where both do nothing is sent."""
        self.build("one", "two")
        two = self.house.http["two"]
        self.house.token.refused = lambda token: None  # type: ignore[method-assign]  # there is no newer one
        self.http.default = 401
        self.error(self.send(), HTTPStatusError)
        for _ in range(3):
            self.successResultOf(self.send())
        self.assertEqual((len(self.http.calls), len(two.calls)), (1, 3))
        pass_time(self.clock, 90)
        self.error(self.send(), HTTPStatusError)
        two.default = 401
        self.error(self.send(), HTTPStatusError)
        self.error(self.send(), TokenError)
        self.assertEqual((len(self.http.calls), len(two.calls)), (2, 4))

    def test_a_newer_token_first(self) -> None:
        """A refusal that a newer token mends sends nothing to another backend."""
        self.build("one", "two")
        self.house.token.refused = lambda token: setattr(self.house.token, "token", "t1")  # type: ignore[method-assign]
        self.http.script = [401]
        for _ in range(3):
            self.successResultOf(self.send())
        self.assertEqual([call.token for call in self.http.calls], ["t0", "t1", "t1", "t1"])
        self.assertEqual(self.house.http["two"].calls, [])

    def test_a_clock_that_steps_back(self) -> None:
        """A refused token is not held back for longer by a step of the clock."""
        self.http.script = [401, 401, 401]
        self.error(self.send(), HTTPStatusError)
        self.error(self.send(), HTTPStatusError)
        self.error(self.send(), TokenError)
        self.clock.rightNow -= 500
        self.successResultOf(self.send())

    def test_proven(self) -> None:
        """A backend is proven by its first 2xx, any other answer says nothing."""
        self.http.script = [404]
        self.error(self.send(), HTTPStatusError)
        self.assertFalse(self.house.requests.proven)
        self.successResultOf(self.send())
        self.assertTrue(self.house.requests.proven)


class DeadlineTests(_RequestTests):
    """One deadline over everything."""

    def test_limits_the_exchange(self) -> None:
        """The exchange gets what is left, and its own timeout at most."""
        self.send(deadline=5)
        self.send(deadline=500)
        self.assertEqual([call.timeout for call in self.http.calls], [5, 30])

    def test_hanging(self) -> None:
        """An exchange that hangs ends with the deadline, which says that the request may have arrived."""
        self.http.default = HANG
        waiting = self.send(deadline=5)
        pass_time(self.clock, 4.9)
        self.assertNoResult(waiting)
        pass_time(self.clock, 0.1)
        self.assertTrue(self.error(waiting, DeadlineExceeded).may_have_arrived)

    def test_covers_the_waits(self) -> None:
        """A wait that the deadline would cut is not waited; the error names the last one and whether it arrived."""
        self.http.script = [answer(503, {"retry-after": "20"})]
        error = self.error(self.send(deadline=10), DeadlineExceeded)
        self.assertTrue(error.may_have_arrived)
        self.assertIn("HTTP 503", error.fact)
        self.http.script = [ConnectFailed("no")] * 100
        waiting = self.send(deadline=1, attempts=100)
        pass_time(self.clock, 1)
        self.assertFalse(self.error(waiting, DeadlineExceeded).may_have_arrived)

    def test_over_before_it_began(self) -> None:
        """With no time at all nothing is sent, and nothing may have arrived."""
        self.assertFalse(self.error(self.send(deadline=0), DeadlineExceeded).may_have_arrived)
        self.assertEqual(self.http.calls, [])

    def test_over_after_a_wait(self) -> None:
        """A reactor that comes back late from the wait finds the deadline over; the probe's permit is not lost."""
        self.build(breaker=config.Breaker(failures=1, open_for=1.0))
        self.http.script = [503]
        waiting = self.send(deadline=30)
        self.clock.advance(100)
        self.assertTrue(self.error(waiting, DeadlineExceeded).may_have_arrived)
        self.assertEqual(len(self.http.calls), 1)
        self.assertTrue(self.house.breaker.try_acquire())


class CancellationTests(_RequestTests):
    """Giving up."""

    def released(self) -> list[int]:
        """Count the calls of the breaker's ``released``."""
        calls: list[int] = []
        real = self.house.breaker.released
        self.patch(self.house.breaker, "released", lambda: (calls.append(1), real())[1])
        return calls

    def test_exchange(self) -> None:
        """Cancelling aborts the exchange and gives the permit back, once."""
        released = self.released()
        self.http.default = HANG
        waiting = self.send()
        waiting.cancel()
        self.error(waiting, CancelledError)
        self.assertEqual((self.http.cancelled, released), (1, [1]))

    def test_token(self) -> None:
        """Cancelling while the token is awaited cancels that, and gives the permit back, once."""
        released = self.released()
        pending: Deferred[str] = Deferred()
        self.house.token.outcome = pending
        waiting = self.send()
        waiting.cancel()
        self.error(waiting, CancelledError)
        self.assertTrue(pending.called)
        self.assertEqual((self.http.calls, released), ([], [1]))

    def test_wait(self) -> None:
        """Cancelling between two attempts stops the waiting; there is no permit to give back."""
        released = self.released()
        self.http.default = 503
        waiting = self.send()
        waiting.cancel()
        self.error(waiting, CancelledError)
        pass_time(self.clock, 60)
        self.assertEqual((len(self.http.calls), released), (1, []))

    def test_probe(self) -> None:
        """A cancelled probe lets the next one through at once."""
        self.house.trip("one")
        pass_time(self.clock, 20)
        self.http.default = HANG
        waiting = self.send()
        self.assertEqual(self.house.breaker.state, "half_open")
        waiting.cancel()
        self.error(waiting, CancelledError)
        self.assertTrue(self.house.breaker.try_acquire())


class StopTests(_RequestTests):
    """The end of the manager."""

    def test_whoever_waits(self) -> None:
        """Whether for an answer, for the next attempt or for a token: it ends now, and says why."""
        self.http.script = [HANG, 503]
        exchange, wait = self.send(), self.send()
        pending: Deferred[str] = Deferred()
        self.house.token.outcome = pending
        token = self.send()
        self.house.requests.stop()
        for waiting in (exchange, wait, token):
            self.assertIn("stopped", self.error(waiting, NotRunning).fact)
        self.assertEqual(self.http.cancelled, 1)
        self.assertTrue(self.house.breaker.try_acquire())

    def test_who_gave_up_before(self) -> None:
        """A request that its caller cancelled, or that is over, is no matter of the stop."""
        self.http.script = [HANG]
        waiting = self.send()
        waiting.cancel()
        self.error(waiting, CancelledError)
        self.successResultOf(self.send())
        self.house.requests.stop()

    def test_an_answer_in_the_last_moment(self) -> None:
        """What came before the cancellation took effect is the result."""
        exchange: Deferred[HTTPResponse] = Deferred(lambda waiting: waiting.callback(answer(204)))
        self.http.script = [exchange]
        waiting = self.send()
        self.house.requests.stop()
        self.assertEqual(self.successResultOf(waiting).status, 204)


class BreakerTests(_RequestTests):
    """Backends that are left alone."""

    def test_next_backend(self) -> None:
        """While the first is left alone the second takes the request."""
        self.build("one", "two")
        self.house.trip("one")
        self.successResultOf(self.send())
        self.assertEqual([len(http.calls) for http in self.house.http.values()], [0, 1])

    def test_within_one_request(self) -> None:
        """A request whose first attempts open the breaker goes to the next backend with its later ones."""
        self.build("one", "two", breaker=config.Breaker(failures=2))
        self.http.default = 503
        waiting = self.send(idempotency_key="k")
        pass_time(self.clock, 60)
        self.successResultOf(waiting)
        self.assertEqual([len(http.calls) for http in self.house.http.values()], [2, 1])
        self.assertEqual(self.house.http["two"].calls[0].headers["Idempotency-Key"], "k")

    def test_all_open(self) -> None:
        """When all are left alone the next attempt waits for the next probe; nothing is sent before."""
        self.house.trip("one")
        opens = self.clock.seconds() + self.house.breaker.retry_in()
        waiting = self.send()
        pass_time(self.clock, 60)
        self.successResultOf(waiting)
        self.assertTrue(opens <= self.http.calls[0].at <= opens + 1)

    def test_all_open_last_attempt(self) -> None:
        """With a single attempt, or without the time for it, the request fails at once."""
        self.house.trip("one")
        error = self.error(self.send(attempts=1), BreakerOpen)
        self.assertEqual(error.retry_in, self.house.breaker.retry_in())
        self.assertFalse(self.error(self.send(deadline=3), DeadlineExceeded).may_have_arrived)
        self.assertEqual(self.http.calls, [])

    def test_refusals_of_the_breaker_need_no_budget(self) -> None:
        """Waiting for the breaker costs the backend nothing, and is allowed when retries are not."""
        self.build(breaker=config.Breaker(failures=1000, open_for=5.0))
        self.http.default = 503
        for _ in range(3):
            self.send().addErrback(lambda failure: None)
            pass_time(self.clock, 60)
        self.http.calls.clear()
        self.error(self.send(), HTTPStatusError)
        self.assertEqual(len(self.http.calls), 1)
        self.house.trip("one")
        self.http.default = 200
        waiting = self.send()
        pass_time(self.clock, 10)
        self.successResultOf(waiting)


OUTCOMES = st.sampled_from(
    [200, 204, 302, 400, 401, 404, 429, 500, 503, HTML, HANG, ConnectFailed("x"), PeerViolation("x"), TokenError("x")]
)


class PermitTests(SynchronousTestCase):
    """No path of a request keeps a breaker's permit."""

    @given(
        script=st.lists(OUTCOMES, max_size=8),
        deadline=st.sampled_from([None, 0.0, 3.0, 40.0]),
        cancel_at=st.sampled_from([None, 0.0, 1.0, 35.0]),
        late=st.booleans(),
        tripped=st.booleans(),
        no_token=st.booleans(),
    )
    @settings(deadline=None, max_examples=150, database=None)
    def test_permits_never_leak(
        self,
        script: list[Any],
        deadline: float | None,
        cancel_at: float | None,
        late: bool,
        tripped: bool,
        no_token: bool,
    ) -> None:
        """Whatever the outcomes, deadlines and cancellations: after the request a probe can be had in due time."""
        house = House(breaker=config.Breaker(failures=2, open_for=5.0))
        house.http["one"].script = list(script)
        if tripped:
            house.trip("one")
            pass_time(house.clock, 5.5)
        if no_token:
            house.token.outcome = TokenError("none")
        waiting = house.requests.send("POST", "/x", deadline=deadline, check=not_html)
        ended: list[object] = []
        waiting.addBoth(ended.append)
        if cancel_at is not None:
            pass_time(house.clock, cancel_at)
            waiting.cancel()
        if late:
            house.clock.pump([50.0] * 20)
        else:
            pass_time(house.clock, 1000)
        assert ended
        assert house.clock.getDelayedCalls() == []
        pass_time(house.clock, 10)
        assert house.breaker.try_acquire()
