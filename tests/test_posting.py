"""One lane over HTTP: which answers judge the entry, which only the moment, and when the next attempt may come."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import ConnectFailed, PeerViolation, ProxyRefused, TokenError
from commsmgr.posting import PATHS, Posting
from commsmgr.spool import Entry
from commsmgr.transport.http import HTTPResponse
from tests.link_kit import HANG, House, answer, entry, pass_time

JUDGES = (400, 404, 409, 410, 413, 414, 415, 422)
KEEPS = (
    *(301, 302, 307, 401, 402, 403, 405, 406, 407, 408, 411, 418, 421, 423, 425, 426, 428, 429, 431, 451),
    *(500, 501, 502, 503, 504, 505, 511, 599),
)


class Lane:
    """What a lane's reader does for the one who sends."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)
        self.taken = 0
        self.asked: list[tuple[int, int]] = []

    def take(self, max_count: int, max_bytes: int) -> list[Entry]:
        self.asked.append((max_count, max_bytes))
        found = self.entries[self.taken : self.taken + 1]
        self.taken += len(found)
        return found

    def rewind(self) -> None:
        self.taken = 0


class _PostingTests(SynchronousTestCase):
    """A lane of three entries."""

    def setUp(self) -> None:
        self.build()

    def build(self, *entries: Entry, proven: bool = True, **sections: Any) -> None:
        sections.setdefault("reconnect", config.Reconnect(base=1.0, cap=8.0, retry_after_cap=100.0))
        sections.setdefault("breaker", config.Breaker(failures=1000))
        sections.setdefault("auth", config.Auth(refused_delay=60.0))
        self.house = House(**sections)
        self.clock = self.house.clock
        self.http = self.house.http["one"]
        self.lane = Lane(*(entries or (entry(1), entry(2), entry(3))))
        if proven:
            self.house.backends.receipt("one", self.clock.seconds())
        self.delivered: list[tuple[str, int]] = []
        self.buried: list[tuple[str, str]] = []
        self.posting = Posting(
            self.lane,  # type: ignore[arg-type]  # a fake
            self.house.requests,
            whole=self.house.config,
            clock=self.clock,
            random=self.house.random,
            metrics=self.house.metrics,
            delivered=lambda entry, response: self.settled(entry, self.delivered, response.status),
            given_up=lambda entry, reason: self.settled(entry, self.buried, reason),
        )

    def settled(self, entry: Entry, where: list[Any], what: Any) -> None:
        """The entry leaves the outbox."""
        where.append((entry.id, what))
        self.lane.entries.remove(entry)
        self.lane.taken = 0

    def send(self) -> Deferred[bool]:
        return Deferred.fromCoroutine(self.posting.send_next())

    def sent(self) -> bool:
        return self.successResultOf(self.send())

    def messages(self, outcome: str, kind: str = "command_result") -> float:
        return self.house.count("messages_total", kind=kind, direction="out", outcome=outcome)

    def next_wait(self) -> float:
        """Return the wait before the next attempt, after it has passed."""
        wait = self.posting.wait
        pass_time(self.clock, max(wait, 0))
        self.assertLessEqual(self.posting.wait, 0)
        return wait


class SendingTests(_PostingTests):
    """What goes out, and what a receipt is."""

    def test_receipts(self) -> None:
        """One entry at a time, in order; each 2xx is a receipt; then there is nothing, and no wait."""
        self.http.script = [200, 201, 204]
        for _ in range(3):
            self.assertTrue(self.sent())
            self.assertLessEqual(self.posting.wait, 0)
        self.assertFalse(self.sent())
        self.assertEqual(self.delivered, [("e1", 200), ("e2", 201), ("e3", 204)])
        self.assertEqual((self.buried, self.messages("acked")), ([], 3))
        self.assertEqual(set(self.lane.asked), {(1, 1)})

    def test_request(self) -> None:
        """The bytes stored are the bytes sent, with the entry's id as key, to the place of its kind, in one attempt."""
        self.build(entry(1, b'{"x": 1}'), entry(2, b"[]", kind="inventory"))
        self.http.script = [200, 503]
        self.assertTrue(self.sent())
        self.assertTrue(self.sent())
        first, second = self.http.calls
        self.assertEqual((first.method, first.path, first.body), ("POST", PATHS["command_result"], b'{"x": 1}'))
        self.assertEqual(first.headers["Idempotency-Key"], "e1")
        self.assertEqual((second.path, second.body), (PATHS["inventory"], b"[]"))
        self.assertEqual(self.messages("failed", "inventory"), 1)

    def test_unknown_kind(self) -> None:
        """What a newer version left behind is given up without a request and without a wait."""
        self.build(entry(1, kind="unheard-of"), entry(2))
        self.assertTrue(self.sent())
        self.assertEqual((self.buried, self.http.calls), ([("e1", "unknown: no way for a unheard-of")], []))
        self.assertLessEqual(self.posting.wait, 0)
        self.assertTrue(self.sent())
        self.assertEqual(self.delivered, [("e2", 200)])

    def test_cancelled(self) -> None:
        """Cancelling aborts the exchange; nothing was decided about the entry."""
        self.http.script = [HANG]
        sending = self.send()
        sending.cancel()
        self.failureResultOf(sending, CancelledError)
        self.assertEqual((self.http.cancelled, self.delivered, self.buried), (1, [], []))


class VerdictTests(_PostingTests):
    """Which answers judge the entry."""

    def test_judged(self) -> None:
        """Some 4xx say that the backend will never take this entry: it is given up, with the reason."""
        for status in JUDGES:
            self.build()
            self.http.script = [status]
            self.assertTrue(self.sent())
            self.assertEqual((self.buried, self.messages("refused")), ([("e1", f"refused: HTTP {status}")], 1))
            self.assertTrue(self.sent())
            self.assertEqual(self.delivered, [("e2", 200)])

    def test_kept(self) -> None:
        """Every other answer, and no answer, judges the way or the moment: the entry goes again, first, and later."""
        errors = (ConnectFailed("no"), PeerViolation("no"), HANG)
        for outcome in (*KEEPS, *errors):
            self.build()
            self.http.script = [outcome] * (2 if outcome == 401 else 1)
            sending = self.send()
            pass_time(self.clock, 31)
            self.assertTrue(self.successResultOf(sending))
            self.assertEqual((self.buried, self.delivered, self.messages("failed")), ([], [], 1), outcome)
            self.assertTrue(self.sent())
            self.assertEqual(self.delivered, [("e1", 200)], outcome)

    def test_no_token(self) -> None:
        """A token that cannot be had says nothing about the entry."""
        self.house.token.outcome = TokenError("no file")
        self.assertTrue(self.sent())
        self.assertEqual((self.buried, self.messages("failed"), self.lane.taken), ([], 1, 0))

    def test_web_pages(self) -> None:
        """A web page with a status that judges comes from a portal, a proxy or a wrong URL, whatever it says it is."""
        pages = (
            b"<!DOCTYPE html><html>",
            b"<!doctype HTML PUBLIC>",
            b" \r\n\t<html lang='en'>",
            b"<HTML>",
            b"<?xml version='1.0'?><!DOCTYPE html>",
            b"\xef\xbb\xbf<!DOCTYPE html>",
            b"<!-- gateway 7 --><html>",
            b"<head><title>Document Moved</title></head>",
        )
        for status in JUDGES:
            for page in pages:
                self.build()
                self.http.script = [answer(status, {"content-type": "text/plain"}, page)]
                self.assertTrue(self.sent())
                self.assertEqual((self.buried, self.lane.taken), ([], 0), page)

    def test_no_web_pages(self) -> None:
        """Whatever else the body is, the status counts."""
        for body in (b"", b'{"error":"<html>"}', b"no <html", b"\xff\xfe"):
            self.build()
            self.http.script = [answer(422, body=body)]
            self.assertTrue(self.sent())
            self.assertEqual(self.buried, [("e1", "refused: HTTP 422")], body)

    def test_a_backend_that_has_never_taken_anything(self) -> None:
        """Before the first receipt of any kind an answer may be that of a wrong URL, and judges nothing."""
        self.build(proven=False)
        self.http.default = 404
        for _ in range(20):
            self.assertTrue(self.sent())
            self.next_wait()
        self.assertEqual((self.buried, self.lane.taken), ([], 0))
        self.assertGreater(self.messages("failed"), 10)
        self.house.backends.receipt("one", 1.0)
        self.assertTrue(self.sent())
        self.assertEqual(self.buried, [("e1", "refused: HTTP 404")])

    def test_a_portal_that_says_200(self) -> None:
        """A 2xx that is a web page is no receipt."""
        self.http.script = [answer(200, {"content-type": "text/html"}, b"<html>")]
        self.assertTrue(self.sent())
        self.assertEqual((self.delivered, self.buried, self.lane.taken), ([], [], 0))


class PaceTests(_PostingTests):
    """When the next attempt may come."""

    def test_backoff(self) -> None:
        """The bound of the wait grows up to the cap, and begins anew after a receipt."""
        self.patch(self.house.random, "uniform", lambda low, high: high)
        self.http.default = 503
        waits = []
        for _ in range(6):
            self.assertTrue(self.sent())
            waits.append(self.next_wait())
        self.assertEqual(waits, [1, 2, 4, 8, 8, 8])
        self.http.script = [200, 503]
        self.assertTrue(self.sent())
        self.assertTrue(self.sent())
        self.assertEqual(self.posting.wait, 1)

    def test_refusals_slow_down_too(self) -> None:
        """A backend that refuses everything gets it slower and slower; one that takes the next one loses little."""
        self.build(*(entry(seq) for seq in range(10)))
        self.patch(self.house.random, "uniform", lambda low, high: high)
        self.http.script = [404, 404, 503, 404, 404, 200, 404]
        waits = []
        for _ in range(7):
            self.assertTrue(self.sent())
            waits.append(max(self.next_wait(), 0))
        self.assertEqual(waits, [1, 2, 4, 8, 8, 0, 1])
        self.assertEqual((len(self.buried), self.delivered), (5, [("e4", 200)]))

    def test_retry_after(self) -> None:
        """Retry-After is the least wait; the backoff comes on top."""
        self.http.script = [answer(503, {"retry-after": "50"})]
        self.assertTrue(self.sent())
        self.assertTrue(50 <= self.posting.wait <= 51)

    def test_hopeless(self) -> None:
        """Where nothing but another token, or another URL, helps, one asks slowly."""
        for status in (302, 401, 403, 407, 501):
            self.build()
            self.http.script = [status] * 2
            self.assertTrue(self.sent())
            self.assertTrue(60 <= self.posting.wait <= 61, status)

    def test_refused_by_a_proxy(self) -> None:
        """A proxy's refusal judges no entry; where only somebody can mend it the lane waits long, else as asked."""
        for status, asked, least in ((407, None, 60), (401, None, 60), (403, 90.0, 90), (503, 9.0, 9), (503, 1e9, 100)):
            self.build()
            self.http.script = [ProxyRefused("no", status=status, retry_after=asked)]
            self.assertTrue(self.sent())
            self.assertEqual((self.buried, self.lane.taken), ([], 0))
            wait = self.next_wait()
            self.assertTrue(least <= wait <= least + 1, (status, wait))

    def test_hopeless_and_retry_after(self) -> None:
        """Of both floors the higher one counts."""
        for asked, least in ((90, 90), (5, 60)):
            self.build()
            self.http.script = [answer(403, {"retry-after": str(asked)})]
            self.assertTrue(self.sent())
            self.assertTrue(least <= self.posting.wait <= least + 1)

    def test_breaker_open(self) -> None:
        """While every backend is left alone the wait is as long as that."""
        self.build(breaker=config.Breaker(failures=1, open_for=40.0))
        self.house.trip("one")
        left = self.house.breaker.retry_in()
        self.assertTrue(self.sent())
        self.assertTrue(left <= self.posting.wait <= left + 1)
        self.assertEqual(self.http.calls, [])

    def test_the_budget_is_not_touched(self) -> None:
        """However long delivery fails, others keep their retries."""
        self.http.default = 503
        for _ in range(50):
            self.assertTrue(self.sent())
        self.http.script = [503, 200]
        waiting: Deferred[HTTPResponse] = self.house.requests.send("GET", "/x")
        pass_time(self.clock, 5)
        self.assertEqual(self.successResultOf(waiting).status, 200)
