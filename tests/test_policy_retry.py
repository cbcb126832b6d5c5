"""Tests for what is done after an HTTP exchange."""

from __future__ import annotations

from email.utils import formatdate

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import errors
from commsmgr.policy.retry import (
    Done,
    Permanent,
    Refused,
    RetryAfter,
    counts_against_backend,
    judge,
    parse_retry_after,
)


class JudgeTests(SynchronousTestCase):
    def test_every_status(self) -> None:
        """Each status from 100 to 599 has the verdict of the table, and no number is without one."""
        retried = {408, 425, 429, *range(500, 600)} - {501, 505}
        for status in range(100, 600):
            verdict = judge(status)
            if 200 <= status < 300:
                self.assertEqual(verdict, Done())
            elif status == 401:
                self.assertEqual(verdict, Refused())
            elif status in retried:
                self.assertEqual(verdict, RetryAfter(0.0), status)
            else:
                self.assertIsInstance(verdict, Permanent, status)
                self.assertIn(str(status), verdict.reason)

    def test_no_status(self) -> None:
        """A number outside 100 to 599 counts as a server error, as RFC 9110 section 15 asks."""
        for status in (0, 99, 600, 999):
            self.assertEqual(judge(status), RetryAfter(0.0))

    def test_redirects_say_what_to_do(self) -> None:
        """A redirect is a matter of the configuration, and the reason says of which setting; no other does."""
        for status in (199, 300, 301, 302, 303, 307, 308, 399, 400):
            verdict = judge(status)
            assert isinstance(verdict, Permanent)
            self.assertEqual("url" in verdict.reason, 300 <= status < 400, status)

    def test_retry_after_is_the_floor(self) -> None:
        """What the backend asked for is the floor of the next wait, for every status that is tried again."""
        for status in (408, 429, 500, 503):
            self.assertEqual(judge(status, retry_after=7.0), RetryAfter(7.0))

    def test_retry_after_of_permanent_answers(self) -> None:
        """A Retry-After does not turn an answer for good into a loop."""
        self.assertEqual(judge(413, retry_after=7.0), Permanent("HTTP 413"))
        self.assertEqual(judge(501, retry_after=7.0), Permanent("HTTP 501"))
        self.assertEqual(judge(200, retry_after=7.0), Done())
        self.assertEqual(judge(401, retry_after=7.0), Refused())

    def test_errors(self) -> None:
        """An error is tried again if it says that this can help; otherwise its fact is the reason."""
        for error in (errors.ConnectFailed(), errors.TLSFailed(), errors.PeerSilent(), errors.DeadlineExceeded()):
            self.assertEqual(judge(error), RetryAfter(0.0))
        self.assertEqual(judge(errors.ConnectFailed(), retry_after=3.0), RetryAfter(3.0))
        self.assertEqual(judge(errors.InvalidMessage("too deep")), Permanent("too deep"))

    def test_errors_with_a_status(self) -> None:
        """An error that bears an HTTP status is judged by it, with the Retry-After that it bears."""
        self.assertEqual(judge(errors.HTTPStatusError(status=404)), Permanent("HTTP 404"))
        self.assertEqual(judge(errors.HTTPStatusError(status=401)), Refused())
        self.assertEqual(judge(errors.HTTPStatusError(status=503, retry_after=9.0)), RetryAfter(9.0))
        self.assertEqual(judge(errors.HTTPStatusError(status=503), retry_after=4.0), RetryAfter(4.0))

    def test_proxies(self) -> None:
        """What a proxy refuses is never about the token, and never done; what may pass is tried again in its time."""
        for status in (200, 204, 301, 400, 401, 403, 404, 405, 407, 501, 505):
            self.assertEqual(judge(errors.ProxyRefused("said no", status=status)), Permanent("said no"), status)
        for status in (0, 408, 425, 429, 500, 502, 503, 504):
            self.assertEqual(judge(errors.ProxyRefused(status=status)), RetryAfter(0.0), status)
            self.assertEqual(judge(errors.ProxyRefused(status=status, retry_after=7.0)), RetryAfter(7.0), status)
        self.assertEqual(judge(errors.ProxyRefused(status=503, retry_after=1e9), retry_after=60.0), RetryAfter(60.0))
        self.assertTrue(counts_against_backend(errors.ProxyRefused(status=407)))

    def test_an_upgrade_is_never_done(self) -> None:
        """A refused upgrade is no success, even when a captive portal answered it with 200."""
        self.assertEqual(judge(errors.UpgradeRefused(status=200)), RetryAfter(0.0))

    def test_open_breaker(self) -> None:
        """What was not tried is tried when the breaker lets something through."""
        self.assertEqual(judge(errors.BreakerOpen(retry_in=5.0)), RetryAfter(5.0))


class CountsAgainstBackendTests(SynchronousTestCase):
    def test_statuses(self) -> None:
        """Any answer from 100 to 499 shows a backend that works; 5xx and nonsense do not."""
        for status in range(600):
            self.assertEqual(counts_against_backend(status), status < 100 or status >= 500, status)
            self.assertEqual(
                counts_against_backend(errors.HTTPStatusError(status=status)), counts_against_backend(status)
            )

    def test_upgrades(self) -> None:
        """A refused upgrade counts by its status; an answer that was no HTTP counts."""
        self.assertTrue(counts_against_backend(errors.UpgradeRefused(status=502)))
        self.assertTrue(counts_against_backend(errors.UpgradeRefused()))
        for status in (200, 301, 401, 404, 429):
            self.assertFalse(counts_against_backend(errors.UpgradeRefused(status=status)))

    def test_transport(self) -> None:
        """What breaks on the way, or takes too long, counts."""
        for error in (
            errors.ConnectFailed(),
            errors.TLSFailed(),
            errors.PeerSilent(),
            errors.ConnectionEnded(),
            errors.PeerViolation(),
            errors.DeadlineExceeded(),
        ):
            self.assertTrue(counts_against_backend(error), error)

    def test_close_codes(self) -> None:
        """A goodbye, and a rebuke of the caller, do not count; an accident does."""
        for code in (1006, 1011, 1013, 1014, 1015):
            self.assertTrue(counts_against_backend(errors.ClosedByPeer(code=code)), code)
        for code in (1000, 1001, 1002, 1005, 1007, 1008, 1009, 1012, 4401):
            self.assertFalse(counts_against_backend(errors.ClosedByPeer(code=code)), code)

    def test_our_own(self) -> None:
        """What went wrong on this side of the network says nothing about the backend."""
        for error in (
            errors.BreakerOpen(),
            errors.TokenError(),
            errors.QueueFull(),
            errors.InvalidMessage(),
            errors.NotRunning(),
        ):
            self.assertFalse(counts_against_backend(error), error)


class RetryAfterTests(SynchronousTestCase):
    now = 784111717.0  # a minute before the example date of RFC 9110

    def parse(self, value: str, cap: float = 300.0) -> float | None:
        return parse_retry_after(value, self.now, cap)

    def test_seconds(self) -> None:
        """Digits are seconds, up to the cap; blanks around them do not matter."""
        for value, seconds in (("0", 0), ("120", 120), (" 7 ", 7), ("300", 300), ("301", 300), ("9" * 9999, 300)):
            self.assertEqual(self.parse(value), seconds)

    def test_dates(self) -> None:
        """A date in any of the three forms of RFC 9110 section 5.6.7 is the time until then."""
        for value in (
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            formatdate(self.now + 60, usegmt=True),
        ):
            self.assertEqual(self.parse(value), 60.0, value)

    def test_far_dates(self) -> None:
        """A date long ahead is capped."""
        self.assertEqual(self.parse("Fri, 31 Dec 9999 23:59:59 GMT"), 300.0)

    def test_past(self) -> None:
        """What is over is no wait."""
        for value in ("-5", "Sun, 06 Nov 1994 08:48:36 GMT", "Thu, 01 Jan 1970 00:00:00 GMT"):
            self.assertEqual(self.parse(value), 0.0)

    def test_garbage(self) -> None:
        """What is neither is no Retry-After at all, and never an exception."""
        for value in (
            "", " ", "soon", "1.5", "1e9", "60s", "٣", "--1", "+5", "inf", "nan", "0x10", "1 2", "Sun", "06 Nov",
            "Mon, 00 Foo 1994 99:99:99 GMT", "Sun, 06 Nov 99999 08:49:37 GMT", "(" * 9999, "\x00", "Sun, 06 Nov 1994",
            "Sun, 06 Nov 1994 08:49:37 +99999999999999999999", f"Sun, {'9' * 9999} Nov 1994 08:49:37 GMT",
        ):  # fmt: skip
            self.assertIsNone(self.parse(value), value[:40])
