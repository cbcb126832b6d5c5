"""One HTTP exchange: what goes out, what comes back, and every way in which it can go wrong."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from commsmgr.config import HTTP, TLS
from commsmgr.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    PeerViolation,
    TLSFailed,
    TokenError,
    UsageError,
)
from commsmgr.transport.body import BodyCollector, BytesProducer
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.http import Exchange, HTTPClient
from commsmgr.transport.http_head import HEAD_LIMIT, INTERIM_LIMIT
from commsmgr.transport.pool import GRACE, IDLE, _Guarding
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.loopback import FixedResolver, ReactorWith, Recorder, Recording, listen

reactor: Any = _reactor

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answering(*answers: bytes, close: bool = False) -> Callable[[Recorder], None]:
    """Answer the n-th request of all connections with the n-th of ``answers``, the last one again and again."""
    seen: list[bytes] = []

    def script(recorder: Recorder) -> None:
        head, blank, rest = recorder.received.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if not blank or len(rest) < length:
            return
        recorder.received = rest[length:]
        seen.append(head + blank + rest[:length])
        recorder.transport.write(answers[min(len(seen), len(answers)) - 1])
        if close:
            recorder.transport.loseConnection()

    script.seen = seen  # type: ignore[attr-defined]
    return script


class HTTPCase(TestCase):
    """A client and a listener that answers by a script."""

    timeout = 10

    def client(
        self, settings: HTTP | None = None, *, on: Any = None, tls: TLS | None = None, **more: Any
    ) -> HTTPClient:
        self.exchanges: list[Exchange] = []
        on = on or reactor
        more.setdefault("on_exchange", self.exchanges.append)
        client = HTTPClient(on, Dialer(on, tls or TLS()), settings or HTTP(), **more)
        self.addCleanup(self._closed, client, getattr(on, "clock", None))
        return client

    async def _closed(self, client: HTTPClient, clock: Clock | None) -> None:
        closing = client.close()
        while not closing.called:
            if clock is not None:
                clock.advance(0)
            await deferLater(reactor, 0)
        await closing

    def serve(self, *answers: bytes, close: bool = False) -> Target:
        return self.serve_by(answering(*answers, close=close))

    def serve_by(self, script: Callable[[Recorder], None]) -> Target:
        self.server = Recording(script)
        self.seen: list[bytes] = getattr(script, "seen", [])
        return Target("http", "127.0.0.1", listen(self, self.server), "/api")

    async def fails(self, kind: type[Exception], target: Target, client: HTTPClient | None = None, **more: Any) -> Any:
        client = client or self.client()
        return await self.assertFailure(client.exchange("POST", target, "/heartbeat", **more), kind)


class RequestTests(HTTPCase):
    """What goes out."""

    async def test_all_of_a_post(self) -> None:
        """The path is below the base URL, and each field is there once."""
        target = self.serve(OK)
        client = self.client(HTTP(headers={"X-Site": "a b"}), user_agent="commsmgr/9")
        await client.exchange(
            "POST", target, "/heartbeat?full=1", body=b"{}", headers={"Idempotency-Key": "id-1"}, token="abc.def"
        )
        head, _, body = self.seen[0].partition(b"\r\n\r\n")
        first, *fields = head.split(b"\r\n")
        self.assertEqual(first, b"POST /api/heartbeat?full=1 HTTP/1.1")
        self.assertEqual(body, b"{}")
        self.assertEqual(
            sorted(fields),
            sorted(
                [
                    b"Host: " + target.authority.encode(),
                    b"Content-Length: 2",
                    b"Content-Type: application/json",
                    b"User-Agent: commsmgr/9",
                    b"Accept: application/json",
                    b"Accept-Encoding: identity",
                    b"X-Site: a b",
                    b"Idempotency-Key: id-1",
                    b"Authorization: Bearer abc.def",
                ]
            ),
        )

    async def test_nothing_that_was_not_asked_for(self) -> None:
        """Without a body there is no type, without a token no Authorization."""
        await self.client().exchange("GET", self.serve(OK), "/x")
        self.assertNotIn(b"Content-Type", self.seen[0])
        self.assertNotIn(b"Authorization", self.seen[0])
        self.assertNotIn(b"Cookie", self.seen[0])

    async def test_call_comes_before_settings(self) -> None:
        """A field of the call replaces one of the settings, whatever the case of its name."""
        client = self.client(HTTP(headers={"x-site": "settings"}))
        await client.exchange("GET", self.serve(OK), "/", headers={"X-Site": "call"})
        self.assertIn(b"X-Site: call\r\n", self.seen[0])
        self.assertNotIn(b"settings", self.seen[0])

    async def test_host_field(self) -> None:
        """A default port is left out, an IPv6 literal is in brackets (RFC 9110 section 7.2)."""
        port = self.serve(OK).port

        class Elsewhere(Dialer):
            def endpoint(self, target: Target, *, timeout: float) -> Any:
                return TCP4ClientEndpoint(reactor, "127.0.0.1", port)

        client = HTTPClient(reactor, Elsewhere(reactor, TLS()), HTTP())
        self.addCleanup(client.close)
        for scheme, host, number, expected in (
            ("http", "backend.example", 80, b"backend.example"),
            ("https", "backend.example", 443, b"backend.example"),
            ("http", "backend.example", 443, b"backend.example:443"),
            ("http", "fe80::1", 80, b"[fe80::1]"),
            ("http", "::1", 8080, b"[::1]:8080"),
        ):
            await client.exchange("GET", Target(scheme, host, number, "/"), "/")
            self.assertIn(b"Host: " + expected + b"\r\n", self.seen[-1])

    async def test_path_as_it_is(self) -> None:
        """What the caller has encoded is not encoded, sorted, or tidied once more."""
        target = self.serve(OK)
        for path in ("/a//b/../c;d?x=1&&y=%2F&z=", "/?", "/%e4%FF", "/a?b=?/:@"):
            await self.client().exchange("GET", target, path)
            self.assertEqual(self.seen[-1].partition(b"\r\n")[0], b"GET /api" + path.encode() + b" HTTP/1.1")

    async def test_no_body(self) -> None:
        """That there is no body is said where one would mean something (RFC 9110 section 8.6)."""
        target = self.serve(OK)
        for method, said in (("POST", True), ("PUT", True), ("GET", False), ("DELETE", False)):
            await self.client().exchange(method, target, "/")
            self.assertEqual(b"\r\nContent-Length: 0\r\n" in self.seen[-1], said, method)
            self.assertNotIn(b"chunked", self.seen[-1])

    async def test_body_is_not_copied(self) -> None:
        """However large a body is, what is held beside it is what the transport takes at a time."""
        body = bytes(8 << 20)
        came = 0

        def read(recorder: Recorder) -> None:
            # The listener is in this process, too, and keeps nothing.
            nonlocal came
            came += len(recorder.received)
            recorder.received = b""
            if came > len(body):
                recorder.transport.write(OK)

        target = self.serve_by(read)
        client = self.client()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        await client.exchange("POST", target, "/inventory", body=body)
        self.assertLess(tracemalloc.get_traced_memory()[1], len(body) / 4)

    async def test_large_body(self) -> None:
        """A body of several megabytes arrives whole, although the transport pauses the writer again and again."""
        body = os.urandom(1 << 20) * 6
        await self.client().exchange("POST", self.serve(OK), "/inventory", body=body)
        self.assertEqual(self.seen[0].partition(b"\r\n\r\n")[2], body)
        self.assertEqual(self.exchanges[0].bytes_out, len(body))

    async def test_compressed(self) -> None:
        """With `compress`, bodies over 1 KiB travel as gzip, smaller ones as they are."""
        client, target = self.client(HTTP(compress=True)), self.serve(OK)
        for body in (b"a" * 1024, b"a" * 1025, b"b" * (1 << 20)):
            await client.exchange("POST", target, "/inventory", body=body)
        small, packed, large = self.seen
        self.assertNotIn(b"Content-Encoding", small)
        self.assertTrue(small.endswith(b"\r\n\r\n" + b"a" * 1024))
        for sent, body in ((packed, b"a" * 1025), (large, b"b" * (1 << 20))):
            head, _, content = sent.partition(b"\r\n\r\n")
            self.assertIn(b"Content-Encoding: gzip", head)
            self.assertEqual(gzip.decompress(content), body)
        self.assertLess(self.exchanges[2].bytes_out, 1 << 14)

    async def test_no_cookies(self) -> None:
        """A cookie that a backend sets is neither kept nor sent."""
        target = self.serve(b"HTTP/1.1 200 OK\r\nSet-Cookie: session=1; Path=/\r\nContent-Length: 0\r\n\r\n")
        client = self.client()
        for _ in range(3):
            await client.exchange("GET", target, "/")
        self.assertEqual(len(self.seen), 3)
        self.assertNotIn(b"cookie", b"".join(self.seen).lower())


class CallersFieldTests(HTTPCase):
    """Fields that the settings may not set, and the caller may."""

    async def test_content_type(self) -> None:
        """The caller's word about its body counts, once; only the settings have none in that."""
        target, client = self.serve(OK), self.client()
        await client.exchange("POST", target, "/", body=b"a,b", headers={"content-type": "text/csv"})
        self.assertEqual(self.seen[0].lower().count(b"content-type: "), 1)
        self.assertIn(b"text/csv", self.seen[0])
        error = self.assertRaises(ConfigError, self.client, HTTP(headers={"Content-Type": "text/csv"}))
        self.assertEqual(error.key, "http.headers")


class MistakeTests(HTTPCase):
    """What cannot be a request never reaches the network."""

    async def test_settings(self) -> None:
        """Fields that would inject another, or that frame the message, are refused at construction."""
        for headers in (
            {"X": "a\r\nY: b"},
            {"X": "a\n"},
            {"X": "\x00"},
            {"X": "ü"},
            {"X": " a"},
            {"X Y": "a"},
            {"": "a"},
            {"X\n": "a"},
            {"Host": "other"},
            {"Content-length": "1"},
            {"Cookie": "a=b"},
            {"Authorization": "Basic abc"},
            {"Accept-Encoding": "gzip"},
            {"Sec-WebSocket-Key": "a"},
        ):
            error = self.assertRaises(ConfigError, self.client, HTTP(headers=headers))
            self.assertEqual(error.key, "http.headers")

    async def test_value_is_not_quoted(self) -> None:
        """A value may be secret."""
        error = self.assertRaises(ConfigError, self.client, HTTP(headers={"X-Key": "hidden\n"}))
        self.assertNotIn("hidden", str(error))

    async def test_call(self) -> None:
        """A wrong field, path, method or token fails the call with a usage error."""
        target, client = self.serve(OK), self.client()
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (UsageError, {"headers": {"X": "a\r\nb"}}),
            (UsageError, {"path": "nothing"}),
            (UsageError, {"path": "/a b"}),
            (UsageError, {"path": "/ü"}),
            (UsageError, {"path": "/a#b"}),
            (UsageError, {"path": "/a\r\nX: y"}),
            (UsageError, {"method": "GET /x"}),
            (UsageError, {"method": ""}),
            (TokenError, {"token": "a\r\nb"}),
            (TokenError, {"token": "a b"}),
        ]
        for kind, arguments in wrong:
            arguments = {"method": "GET", "path": "/", "target": target, **arguments}
            error = await self.assertFailure(client.exchange(**arguments), kind)
            self.assertNotIn("a b", str(error) if kind is TokenError else "")
        self.assertEqual(self.server.connections, [])
        self.assertEqual({each.outcome for each in self.exchanges}, {"error"})


class AnswerTests(HTTPCase):
    """What comes back."""

    async def test_any_status_is_an_answer(self) -> None:
        """Errors of the backend are answers; the caller judges them."""
        client = self.client()
        for status in (200, 201, 400, 401, 404, 429, 500, 503, 599):
            target = self.serve(b"HTTP/1.1 %d Said\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno" % status)
            answer = await client.exchange("GET", target, "/")
            self.assertEqual((answer.status, answer.body, answer.headers["retry-after"]), (status, b"no", "7"))
        self.assertEqual({each.outcome for each in self.exchanges}, {"2xx", "4xx", "5xx"})

    async def test_redirect_is_not_followed(self) -> None:
        """A redirect is an answer: the token goes nowhere else."""
        elsewhere = self.serve(OK)
        seen = self.seen
        location = b"Location: http://" + elsewhere.authority.encode() + b"/\r\n"
        for status in (301, 302, 303, 307, 308):
            target = self.serve(b"HTTP/1.1 %d Moved\r\nContent-Length: 0\r\n" % status + location + b"\r\n")
            answer = await self.client().exchange("POST", target, "/", body=b"{}", token="secret")
            self.assertEqual(answer.status, status)
        self.assertEqual(seen, [])

    async def test_html(self) -> None:
        """A captive portal's page with status 200 comes as it is."""
        page = b"<html>Welcome to our hotel</html>"
        target = self.serve(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 33\r\n\r\n" + page)
        answer = await self.client().exchange("GET", target, "/")
        self.assertEqual((answer.body, answer.headers), (page, {"content-type": "text/html"}))

    async def test_repeated_fields(self) -> None:
        """Fields that come several times are joined; other characters than ASCII do no harm."""
        target = self.serve(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: \xe9\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual((await self.client().exchange("GET", target, "/")).headers, {"x-a": "1, é"})

    async def test_chunked(self) -> None:
        """Chunks are put together."""
        target = self.serve(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        self.assertEqual((await self.client().exchange("GET", target, "/")).body, b"abcde")

    async def test_no_body(self) -> None:
        """204 and the answer to HEAD have none, whatever they say of one."""
        target = self.serve(b"HTTP/1.1 204 None\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        client = self.client()
        self.assertEqual((await client.exchange("GET", target, "/")).body, b"")
        self.assertEqual((await client.exchange("HEAD", target, "/")).body, b"")

    async def test_interim_answer(self) -> None:
        """Interim answers are skipped (RFC 9110 section 15.2)."""
        target = self.serve(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK)
        self.assertEqual((await self.client().exchange("GET", target, "/")).body, b"ok")

    async def test_times_and_sizes_are_told(self) -> None:
        """The observer learns method, route without query, outcome, time and sizes."""
        target = self.serve(OK)
        answer = await self.client().exchange("POST", target, "/result?token=x", body=b"12345")
        [told] = self.exchanges
        self.assertEqual((told.method, told.route, told.outcome), ("POST", "/result", "2xx"))
        self.assertEqual((told.bytes_out, told.bytes_in), (5, 2))
        self.assertTrue(0 < answer.elapsed <= told.seconds < 20)

    async def test_observer_that_raises(self) -> None:
        """An observer's exception is logged and changes nothing."""
        client = self.client(on_exchange=lambda exchange: 1 / 0)
        self.assertEqual((await client.exchange("GET", self.serve(OK), "/")).status, 200)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    async def test_without_observer(self) -> None:
        """Nobody needs to watch."""
        self.assertEqual((await self.client(on_exchange=None).exchange("GET", self.serve(OK), "/")).status, 200)

    async def test_answer_before_the_request_is_through(self) -> None:
        """A 413 in the middle of an upload is an answer; the rest of the upload is not sent."""

        def script(recorder: Recorder) -> None:
            if len(recorder.received) > 100_000 and not recorder.transport.disconnecting:
                recorder.transport.pauseProducing()
                recorder.transport.write(b"HTTP/1.1 413 Too large\r\nContent-Length: 2\r\n\r\nno")

        target = self.serve_by(script)
        answer = await self.client().exchange("POST", target, "/inventory", body=b"x" * (64 << 20))
        self.assertEqual((answer.status, answer.body), (413, b"no"))
        self.server.connections[0].transport.resumeProducing()
        await self.server.connections[0].lost
        self.assertLess(len(self.server.received), 64 << 20)
        self.assertLess(self.exchanges[0].bytes_out, 64 << 20)

    async def test_against_twisted_web(self) -> None:
        """The whole of it against a real server."""

        class Echo(Resource):
            isLeaf = True

            def render_POST(self, request: Any) -> bytes:
                content: bytes = request.content.read()
                return content

        site = Site(Echo())
        site.noisy = False
        target = Target("http", "127.0.0.1", listen(self, site), "/")
        answer = await self.client().exchange("POST", target, "/a", body=b"{}" * 1000)
        self.assertEqual(answer.body, b"{}" * 1000)


class ViolationTests(HTTPCase):
    """Answers that no client should take."""

    async def violation(self, *answers: bytes, close: bool = False, limit: int = 1000) -> str:
        target = self.serve(*answers, close=close)
        error = await self.fails(PeerViolation, target, self.client(HTTP(max_response_bytes=limit)), body=b"{}")
        self.assertTrue(error.may_have_arrived)
        await self.server.connections[0].lost
        self.assertEqual(self.exchanges[0].outcome, "violation")
        return str(error)

    async def test_too_large_by_its_own_word(self) -> None:
        """A Content-Length beyond the limit is refused before the body is read."""
        text = await self.violation(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        self.assertIn("larger than http.max_response_bytes, 1000", text)

    async def test_too_large_without_a_word(self) -> None:
        """Chunks beyond the limit end the exchange, however many would follow."""
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        text = await self.violation(head + b"1f4\r\n" + b"x" * 500 + b"\r\n" + (b"1f5\r\n" + b"x" * 501 + b"\r\n") * 9)
        self.assertIn("larger than http.max_response_bytes", text)

    async def test_just_not_too_large(self) -> None:
        """The limit itself is allowed."""
        target = self.serve(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
        answer = await self.client(HTTP(max_response_bytes=1000)).exchange("GET", target, "/")
        self.assertEqual(len(answer.body), 1000)

    async def test_encoded(self) -> None:
        """A gzip bomb is refused unread, and so is any other encoding."""
        bomb = gzip.compress(b"0" * (10 << 20))
        for name in (b"gzip", b"deflate", b"br", b"identity, gzip", b"x"):
            head = b"HTTP/1.1 200 OK\r\nContent-Encoding: " + name + b"\r\nContent-Length: %d\r\n\r\n" % len(bomb)
            self.assertIn("identity was asked for", await self.violation(head + bomb, limit=1 << 20))

    async def test_encoding_that_is_none(self) -> None:
        """`identity` is no encoding, and an answer without a body cannot be encoded."""
        for encoding, length in ((b"identity", 2), (b"gzip", 0)):
            target = self.serve(
                b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (encoding, length)
                + b"ok"[:length]
            )
            self.assertEqual((await self.client().exchange("GET", target, "/")).status, 200)

    async def test_length_unknown(self) -> None:
        """A body that ends with the connection may be half of one."""
        text = await self.violation(b"HTTP/1.1 200 OK\r\n\r\nhalf of", close=True)
        self.assertIn("nobody knows whether it is whole", text)

    async def test_malformed(self) -> None:
        """What is not HTTP, or contradicts itself, is refused."""
        for answer in (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 abc Bad\r\n\r\n",
            b"HTTP/x 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\nmore: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ):
            self.assertIn("malformed", await self.violation(answer))

    async def test_status(self) -> None:
        """A status has three digits (RFC 9110 section 15)."""
        for number in (b"4290", b"99", b"0", b"-200", b"1000"):
            answer = b"HTTP/1.1 " + number + b" Odd\r\nContent-Length: 0\r\n\r\n"
            self.assertIn("malformed", await self.violation(answer))

    async def test_head_without_end(self) -> None:
        """A head that never ends is cut off at its limit: one long line, many lines, an interim answer's too."""
        for first, piece in (
            (b"HTTP/1.1 200 OK\r\n", b"X" * 1000),
            (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
            (b"HTTP/1.1 103 Early\r\n", b"Link: x\r\n"),
        ):
            sent = 0

            def script(recorder: Recorder, first: bytes = first, piece: bytes = piece) -> None:
                def trickle() -> None:
                    nonlocal sent
                    if not recorder.lost.called:
                        recorder.transport.write(piece * (8192 // len(piece)))
                        sent += 8192
                        reactor.callLater(0, trickle)

                recorder.transport.write(first)
                trickle()

            target = self.serve_by(script)
            error = await self.fails(PeerViolation, target)
            self.assertIn("head of the answer", str(error))
            await self.server.connections[0].lost
            await deferLater(reactor, 0)
            self.assertLess(sent, 8 * HEAD_LIMIT)

    async def test_interim_answers_without_end(self) -> None:
        """Interim answers, each of which Twisted logs, end the exchange after a few, however the bytes are cut."""
        logged: list[str] = []

        def observe(event: Any) -> None:
            if "Ignoring unexpected" in (event.get("log_format") or ""):
                logged.append("")

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        for flood in (interim * 30_000, interim, interim[5:] + interim[:5], b"byte by byte"):

            def script(recorder: Recorder, flood: bytes = flood) -> None:
                recorder.transport.setTcpNoDelay(True)
                sent = 0

                def go_on() -> None:
                    nonlocal sent
                    if not recorder.lost.called:
                        piece = interim[sent % len(interim) :][:1] if flood == b"byte by byte" else flood
                        recorder.transport.write(piece)
                        sent += 1
                        reactor.callLater(0, go_on)

                if flood.startswith(interim[5:]):
                    recorder.transport.write(interim[:5])
                go_on()

            logged.clear()
            client = self.client()
            error = await self.fails(PeerViolation, self.serve_by(script), client)
            self.assertIn("interim answers", str(error))
            self.assertLessEqual(len(logged), INTERIM_LIMIT)
            await self.server.connections[0].lost

    async def test_interim_answers_in_bounds(self) -> None:
        """As many as are allowed are skipped, for each exchange anew; what looks like one in a body is none."""
        interim = b"HTTP/1.1 102 Processing\r\n\r\n" * INTERIM_LIMIT
        body = b"HTTP/1.1 100 Continue\r\n" * 50
        answer = interim + b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        target, client = self.serve(answer, answer), self.client()
        for _ in range(2):
            self.assertEqual((await client.exchange("GET", target, "/")).body, body)
        self.assertEqual(len(self.server.connections), 1)

    async def test_violation_is_dropped_not_pooled(self) -> None:
        """After a violation the next exchange has a connection of its own."""
        target = self.serve(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", OK)
        client = self.client()
        await self.fails(PeerViolation, target, client)
        self.assertEqual((await client.exchange("GET", target, "/")).body, b"ok")
        self.assertEqual(len(self.server.connections), 2)


class ConnectionTests(HTTPCase):
    """Connections: made, kept, lost."""

    async def test_refused(self) -> None:
        """No listener: ConnectFailed, nothing was sent."""
        port = reactor.listenTCP(0, Recording(), interface="127.0.0.1")
        number = port.getHost().port
        await port.stopListening()
        error = await self.fails(ConnectFailed, Target("http", "127.0.0.1", number, "/"))
        self.assertFalse(error.may_have_arrived)
        self.assertEqual(self.exchanges[0].outcome, "connect_failed")

    async def test_dialler_with_words_of_its_own(self) -> None:
        """Whatever fails before there is a connection is ConnectFailed."""

        class Bare(Dialer):
            def endpoint(self, target: Target, *, timeout: float) -> Any:
                return TCP4ClientEndpoint(reactor, "127.0.0.1", 1)

        client = HTTPClient(reactor, Bare(reactor, TLS()), HTTP())
        self.addCleanup(client.close)
        await self.fails(ConnectFailed, Target("http", "127.0.0.1", 1, "/"), client)

    async def test_kept_alive(self) -> None:
        """One connection serves one exchange after the other."""
        target, client = self.serve(OK), self.client()
        for _ in range(5):
            await client.exchange("POST", target, "/", body=b"{}")
        self.assertEqual(len(self.server.connections), 1)

    async def test_not_kept_for_ever(self) -> None:
        """An unused connection is closed before the usual server closes it."""
        clock = Clock()
        target, client = self.serve(OK), self.client(on=ReactorWith(clock=clock))
        await client.exchange("GET", target, "/")
        clock.advance(IDLE - 0.1)
        self.assertFalse(self.server.connections[0].lost.called)
        clock.advance(0.2)
        await self.server.connections[0].lost
        await deferLater(reactor, 0.01)
        self.assertEqual(clock.getDelayedCalls(), [])

    async def test_closed_while_unused(self) -> None:
        """A connection that the server closed in the meantime is not used again."""
        target, client = self.serve(OK), self.client()
        await client.exchange("GET", target, "/")
        self.server.connections[0].transport.loseConnection()
        await self.server.connections[0].lost
        await deferLater(reactor, 0.01)
        self.assertEqual((await client.exchange("GET", target, "/")).status, 200)
        self.assertEqual(len(self.server.connections), 2)

    async def test_speaks_unasked(self) -> None:
        """A connection on which something comes unasked is closed, and not used for the next exchange."""
        target, client = self.serve(OK), self.client()
        await client.exchange("GET", target, "/")
        self.server.connections[0].transport.write(OK)
        await self.server.connections[0].lost
        self.assertEqual((await client.exchange("GET", target, "/")).status, 200)

    async def test_stale(self) -> None:
        """A kept connection that dies under the next request: it may have arrived, and it is not sent twice."""
        for method in ("GET", "POST"):
            requests: list[bytes] = []

            def script(recorder: Recorder, requests: list[bytes] = requests) -> None:
                requests.append(recorder.received)
                if len(requests) == 1:
                    recorder.transport.write(OK)
                else:
                    recorder.transport.abortConnection()

            target, client = self.serve_by(script), self.client()
            await client.exchange("GET", target, "/")
            error = await self.assertFailure(client.exchange(method, target, "/"), ConnectionEnded)
            self.assertTrue(error.may_have_arrived)
            self.assertEqual((len(requests), len(self.server.connections)), (2, 1))
            self.assertEqual(self.exchanges[1].outcome, "ended")

    async def test_ends_early(self) -> None:
        """Nothing, half a head, or half a body, and then the end: ConnectionEnded, it may have arrived."""
        for answer in (
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Le",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
        ):
            error = await self.fails(ConnectionEnded, self.serve(answer, close=True))
            self.assertTrue(error.may_have_arrived)

    async def test_ends_in_the_upload(self) -> None:
        """A connection that dies while the request is being sent: it may have arrived."""
        target = self.serve_by(lambda recorder: recorder.transport.abortConnection())
        error = await self.fails(ConnectionEnded, target, body=b"x" * (32 << 20))
        self.assertTrue(error.may_have_arrived)

    async def test_concurrency_is_bounded(self) -> None:
        """Four exchanges per kept connection at once; the fifth waits, and goes when one is done."""
        waiting: list[Recorder] = []
        target, client = self.serve_by(waiting.append), self.client(HTTP(connections=1))
        results = [client.exchange("GET", target, "/") for _ in range(6)]
        while len(waiting) < 4:
            await deferLater(reactor, 0.01)
        await deferLater(reactor, 0.05)
        self.assertEqual(len(waiting), 4)
        while len(waiting) < 6 or not all(result.called for result in results):
            for recorder in waiting:
                if recorder.received:
                    recorder.received = b""
                    recorder.transport.write(OK)
            await deferLater(reactor, 0.01)
        self.assertEqual([answer.status for answer in await gatherResults(results)], [200] * 6)


class TLSTests(HTTPCase):
    """Exchanges over TLS."""

    def setUp(self) -> None:
        self.authority = Authority("Test CA")
        self.tls = TLS(ca_file=self.authority.save_pem(os.path.join(self.mktemp(), "ca.pem")))

    def serve_tls(self, script: Callable[[Recorder], None], context: Any) -> Target:
        self.server = Recording(script)
        return Target("https", "127.0.0.1", listen(self, self.server, tls=context), "/")

    async def test_good(self) -> None:
        """Several exchanges, a large body among them, over one TLS connection."""
        script = answering(OK)
        target = self.serve_tls(script, self.authority.issue(ips=["127.0.0.1"]).server_context())
        client = self.client(tls=self.tls)
        for body in (b"{}", b"x" * (1 << 20), b""):
            self.assertEqual((await client.exchange("POST", target, "/", body=body)).body, b"ok")
        self.assertEqual(len(self.server.connections), 1)
        await client.close()

    async def test_refused(self) -> None:
        """A certificate without names: TLSFailed, and not a byte of the request was sent."""
        target = self.serve_tls(answering(OK), self.authority.issue("127.0.0.1").server_context())
        error = await self.fails(TLSFailed, target, self.client(tls=self.tls), body=b"{}", token="secret")
        self.assertFalse(error.may_have_arrived)
        await self.server.connections[0].lost
        self.assertEqual(self.server.received, b"")
        self.assertEqual(self.exchanges[0].outcome, "tls_failed")

    async def test_client_certificate_missing(self) -> None:
        """The late refusal of TLS 1.3 is TLSFailed too."""
        context = self.authority.issue(ips=["127.0.0.1"]).server_context(client_authority=self.authority)
        error = await self.fails(TLSFailed, self.serve_tls(answering(OK), context), self.client(tls=self.tls))
        self.assertIn("wants a certificate from the agent", str(error))
        self.assertEqual(self.server.received, b"")

    async def test_close_with_a_mute_peer(self) -> None:
        """A peer that does not answer TLS's goodbye holds up close() for the grace period only."""
        clock = Clock()
        script = answering(OK)
        target = self.serve_tls(script, self.authority.issue(ips=["127.0.0.1"]).server_context())
        client = self.client(on=ReactorWith(clock=clock), tls=self.tls)
        answer = client.exchange("GET", target, "/")
        while not answer.called:
            clock.advance(0)
            await deferLater(reactor, 0.01)
        self.server.connections[0].transport.pauseProducing()
        closing = client.close()
        await deferLater(reactor, 0.05)
        self.assertNoResult(closing)
        clock.advance(GRACE)
        await deferLater(reactor, 0.05)
        clock.advance(0)
        self.successResultOf(closing)
        self.assertEqual(clock.getDelayedCalls(), [])
        self.server.connections[0].transport.resumeProducing()


class InterruptionTests(HTTPCase):
    """Deadline, cancellation and close, on a clock of our own."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.on = ReactorWith(clock=self.clock)
        self.arrived: Deferred[Recorder] = Deferred()

    def _listen(self, answer: bytes = b"") -> Target:
        def script(recorder: Recorder) -> None:
            if answer:
                recorder.transport.write(answer)
            if not self.arrived.called:
                self.arrived.callback(recorder)

        return self.serve_by(script)

    async def test_no_answer(self) -> None:
        """An answer that never comes costs the deadline; the request may have arrived; the connection is dropped."""
        client, target = self.client(HTTP(timeout=30), on=self.on), self._listen()
        result = client.exchange("POST", target, "/heartbeat", body=b"{}")
        recorder = await self.arrived
        self.clock.advance(29.9)
        self.assertNoResult(result)
        self.clock.advance(0.2)
        error = self.failureResultOf(result, DeadlineExceeded).value
        self.assertTrue(error.may_have_arrived)
        self.assertIn("/heartbeat took longer than 30 s: still waiting for the answer", str(error))
        await recorder.lost
        self.assertEqual(self.exchanges[0].outcome, "deadline")
        self.assertAlmostEqual(self.exchanges[0].seconds, 30.1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    async def test_body_that_trickles(self) -> None:
        """A body that comes byte by byte does not prolong the deadline."""
        client = self.client(on=self.on)
        target = self._listen(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        result = client.exchange("GET", target, "/", timeout=10)
        recorder = await self.arrived
        for _ in range(9):
            recorder.transport.write(b"x")
            await deferLater(reactor, 0.01)
            self.clock.advance(1)
            self.assertNoResult(result)
        self.clock.advance(1.1)
        error = self.failureResultOf(result, DeadlineExceeded).value
        self.assertIn("still reading the answer", str(error))
        self.assertTrue(error.may_have_arrived)
        self.assertEqual(self.exchanges[0].bytes_in, 9)
        await recorder.lost

    async def test_upload_that_nobody_reads(self) -> None:
        """A peer that stops reading the request costs the deadline."""
        client, target = self.client(on=self.on), self._listen()
        result = client.exchange("POST", target, "/", body=b"x" * (32 << 20), timeout=10)
        recorder = await self.arrived
        recorder.transport.pauseProducing()
        self.clock.advance(10)
        self.assertTrue(self.failureResultOf(result, DeadlineExceeded).value.may_have_arrived)
        recorder.transport.resumeProducing()
        await recorder.lost

    def test_hung_resolver(self) -> None:
        """A name server that never answers costs the deadline, and nothing was sent."""
        on = ReactorWith(clock=self.clock, resolver=FixedResolver(None))
        result = self.client(on=on).exchange("GET", Target("http", "slow.example", 80, "/"), "/", timeout=5)
        self.clock.advance(5)
        error = self.failureResultOf(result, DeadlineExceeded).value
        self.assertFalse(error.may_have_arrived)
        self.assertIn("slow.example not reached within 5 s: still resolving its name", str(error))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_wait_for_a_place(self) -> None:
        """The wait for a place counts; its end leaves the place to others."""
        on = ReactorWith(clock=self.clock, resolver=FixedResolver(None))
        client, target = self.client(HTTP(connections=1), on=on), Target("http", "slow.example", 80, "/")
        running = [client.exchange("GET", target, "/", timeout=50) for _ in range(4)]
        waiting = client.exchange("GET", target, "/", timeout=5)
        self.clock.advance(5)
        error = self.failureResultOf(waiting, DeadlineExceeded).value
        self.assertFalse(error.may_have_arrived)
        self.assertIn("waiting for another exchange", str(error))
        self.clock.advance(45)
        for each in running:
            self.failureResultOf(each, DeadlineExceeded)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    async def test_cancelled(self) -> None:
        """Cancelling drops the connection at once, wherever the exchange is."""
        client = self.client(on=self.on)
        for answer, body in (
            (b"", b"{}"),
            (b"HTTP/1.1 200 OK\r\nContent-", b"{}"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"{}"),
            (b"", b"x" * (32 << 20)),
        ):
            self.arrived = Deferred()
            result = client.exchange("POST", self._listen(answer), "/", body=body)
            recorder = await self.arrived
            if answer:
                await deferLater(reactor, 0.02)
            result.cancel()
            self.failureResultOf(result, CancelledError)
            await recorder.lost
            self.assertEqual(self.exchanges[-1].outcome, "cancelled")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_cancelled_while_connecting(self) -> None:
        """Cancelling while the name is being resolved leaves nothing behind."""
        on = ReactorWith(clock=self.clock, resolver=FixedResolver(None))
        result = self.client(on=on).exchange("GET", Target("http", "slow.example", 80, "/"), "/")
        result.cancel()
        self.failureResultOf(result, CancelledError)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    async def test_close(self) -> None:
        """Closing cancels what is under way and closes what is kept; nothing is left, and the client works again."""
        client, target = self.client(), self.serve(OK)
        await client.exchange("GET", target, "/")
        mute = self._listen()
        running = client.exchange("GET", mute, "/")
        tls = client.exchange("GET", Target("https", "127.0.0.1", mute.port, "/"), "/")
        await self.arrived
        closing = client.close()
        self.failureResultOf(running, CancelledError)
        self.failureResultOf(tls, CancelledError)
        await closing
        self.assertEqual([call for call in reactor.getDelayedCalls() if "trial" not in repr(call)][1:], [])
        self.assertEqual((await client.exchange("GET", self.serve(OK), "/")).status, 200)

    async def test_close_twice(self) -> None:
        """Closing again, or an unused client, is no mistake."""
        client = self.client()
        await client.close()
        await gatherResults([client.close(), client.close()])


class PauseTests(SynchronousTestCase):
    """Twisted's client pauses its transport after each head; what reaches the transport of that."""

    def setUp(self) -> None:
        self.received: list[bytes] = []
        inner = Protocol()
        inner.dataReceived = self.received.append  # type: ignore[method-assign]
        factory = Factory()
        factory.noisy = False
        factory.buildProtocol = lambda _: inner  # type: ignore[assignment]
        self.connection: Any = _Guarding(factory, Clock(), {}).buildProtocol(IPv4Address("TCP", "127.0.0.1", 1))
        self.transport = StringTransport()
        self.connection.makeConnection(self.transport)

    def test_not_before_it_matters(self) -> None:
        """A pause that ends before anything comes is none; otherwise one piece is handed on, and no more is read."""
        self.connection.pauseProducing()
        self.assertEqual(self.transport.producerState, "producing")
        self.connection.resumeProducing()
        self.connection.dataReceived(b"a")
        self.assertEqual(self.transport.producerState, "producing")
        self.connection.pauseProducing()
        self.connection.dataReceived(b"b")
        self.assertEqual((self.transport.producerState, self.received), ("paused", [b"a", b"b"]))
        self.connection.resumeProducing()
        self.assertEqual(self.transport.producerState, "producing")


class BodyTests(SynchronousTestCase):
    """Producer and collector by themselves."""

    def test_producer_stops_when_paused(self) -> None:
        """Nothing is written while the transport has no room, and the Deferred fires at the end only."""
        producer = BytesProducer(b"x" * 200_000)
        written: list[int] = []

        class Consumer:
            def write(self, data: bytes) -> None:
                written.append(len(data))
                producer.pauseProducing()

        done = producer.startProducing(Consumer())  # type: ignore[arg-type]
        self.assertEqual(written, [65536])
        self.assertNoResult(done)
        for _ in range(3):
            producer.resumeProducing()
        self.assertEqual(sum(written), 200_000)
        self.successResultOf(done)
        self.assertTrue(producer.complete)
        producer.resumeProducing()
        self.assertEqual(sum(written), 200_000)

    def test_producer_that_is_cancelled_or_stopped(self) -> None:
        """After either it writes no more."""
        for end in ("cancel", "stop"):
            producer = BytesProducer(b"x" * 200_000)
            written: list[bytes] = []

            class Consumer:
                def write(self, data: bytes, producer: Any = producer, written: Any = written) -> None:
                    written.append(data)
                    producer.pauseProducing()

            done = producer.startProducing(Consumer())  # type: ignore[arg-type]
            if end == "cancel":
                done.cancel()
                self.failureResultOf(done, CancelledError)
            else:
                producer.stopProducing()
                self.assertNoResult(done)
            producer.resumeProducing()
            self.assertEqual(len(written), 1)

    def test_collector_after_its_limit(self) -> None:
        """What follows a refusal is dropped, the end of the connection included."""
        collector = BodyCollector(3)
        collector.dataReceived(b"abcd")
        self.failureResultOf(collector.body, PeerViolation)
        collector.dataReceived(b"efgh")
        collector.connectionLost()
        self.assertEqual(collector.received, 8)
