"""A backend that answers what no backend should: each answer is refused, soon, and its connection is not used again."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.config import HTTP, TLS
from commsmgr.errors import DeadlineExceeded, PeerViolation
from commsmgr.transport.body import PIECES
from commsmgr.transport.http_head import FIELD_LIMIT, LINE_LIMIT, status_of
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.loopback import Recorder, Recording, listen
from tests.test_transport_http import OK, HTTPCase, answering

reactor: Any = _reactor

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
BOMB = gzip.compress(bytes(10 << 20))

REFUSED = {
    "NUL in a value": HEAD + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "CR in a value": HEAD + b"X: a\rContent-Length: 9\r\nContent-Length: 0\r\n\r\n",
    "CR in the status line": b"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
    "blank before the colon": HEAD + b"Content-Length : 0\r\n\r\n",
    "no name": HEAD + b": x\r\nContent-Length: 0\r\n\r\n",
    "begins with a folded line": HEAD + b" x: y\r\nContent-Length: 0\r\n\r\n",
    "status with an underscore": b"HTTP/1.1 2_00 OK\r\nContent-Length: 0\r\n\r\n",
    "status with a sign": b"HTTP/1.1 +200 OK\r\nContent-Length: 0\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "status 000": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n",
    "another version": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two lengths in one": HEAD + b"Content-Length: 1, 2\r\n\r\nab",
    "the same length twice": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "length with a sign": HEAD + b"Content-Length: +2\r\n\r\nab",
    "length in hexadecimal": HEAD + b"Content-Length: 0x2\r\n\r\nab",
    "length without end": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "huge length": HEAD + b"Content-Length: 999999999999999999\r\n\r\n",
    "transfer coding gzip": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + BOMB,
    "transfer coding gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "transfer coding chunked, then gzip": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded transfer coding": HEAD + b"Transfer-Encoding: chunked\r\n , gzip\r\n\r\n0\r\n\r\n",
    "chunks from HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk of negative size": CHUNKED + b"-1\r\n\r\n",
    "chunk without its end": CHUNKED + b"2\r\nabcd\r\n0\r\n\r\n",
    "encoded": HEAD + b"Content-Encoding: Identity, gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB,
    "encoded twice": HEAD
    + b"Content-Encoding: identity\r\nContent-Encoding: GZIP\r\nContent-Length: %d\r\n\r\n" % len(BOMB)
    + BOMB,
    "encoded, of unknown length": HEAD + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(bytes(10 << 20)),
    "encoded, in chunks": HEAD
    + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BOMB)
    + BOMB
    + b"\r\n0\r\n\r\n",
    "many fields": HEAD + b"a:\r\n" * (FIELD_LIMIT + 1) + b"\r\n",
    "long line": HEAD + b"X: " + b"y" * LINE_LIMIT + b"\r\n\r\n",
    "an interim answer that is wrong": b"HTTP/1.1 103 Early\r\nX: \0\r\n\r\n" + OK,
}

ENDLESS = {
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "field": (HEAD, b"X"),
    "fields": (HEAD, b"X: y\r\n"),
    "smallest fields": (HEAD, b"X:\r\n"),
    "folded field": (HEAD + b"X: y\r\n", b" z\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim head": (b"HTTP/1.1 103 Early\r\n", b"Link: x\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "chunk of a size without end": (CHUNKED + b"f" * 200 + b"\r\n", b"x"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "chunk extensions": (CHUNKED, b"1;x=" + b"y" * 1000 + b"\r\nz\r\n"),
    "smallest chunks": (CHUNKED, b"1\r\nz\r\n"),
    "trailer": (CHUNKED + b"0\r\n", b"X"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "body": (HEAD + b"Content-Length: 9999999\r\n\r\n", b"x"),
    "chunks": (CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "body without length": (HEAD + b"\r\n", b"x"),
}

MOST = 1 << 20
"""The most bytes of a body in these tests."""


def endless(first: bytes, piece: bytes, sent: list[int], block: int = 8192) -> Callable[[Recorder], None]:
    """Say ``first``, and then ``piece`` for ever, as fast as it is read; count the bytes in ``sent``."""

    def script(recorder: Recorder) -> None:
        if sent:
            return
        sent.append(len(first))
        data = piece * max(block // len(piece), 1)

        def go_on() -> None:
            if not recorder.lost.called:
                # No more than a little ahead of what the sockets take.
                if len(recorder.transport.dataBuffer) + len(recorder.transport._tempDataBuffer) < 64:
                    recorder.transport.write(data)
                    sent[0] += len(data)
                reactor.callLater(0, go_on)

        recorder.transport.setTcpNoDelay(True)
        recorder.transport.write(first)
        go_on()

    return script


class HeadTests(SynchronousTestCase):
    """The head alone."""

    def test_good(self) -> None:
        """Heads as servers write them, sloppy ones among them."""
        for head, status in (
            (b"HTTP/1.1 200 OK\r\n\r\n", 200),
            (b"HTTP/1.1 204\r\n\r\n", 204),
            (b"HTTP/1.0 404 Nicht da \xfc\n\n", 404),
            (b"HTTP/1.1 200 \r\nA:\r\nb:c\r\nX-Y:  z  \r\nContent-Length: 12 \r\n\r\n", 200),
            (b"HTTP/1.1 599 x\r\nTransfer-Encoding: Chunked\r\n\r\n", 599),
            (b"HTTP/1.1 200 OK\r\nX: folded\r\n\tvalue\r\nY: z\r\n\r\n", 200),
            (b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * FIELD_LIMIT + b"\r\n", 200),
        ):
            self.assertEqual(status_of(head), status)

    def test_sentence(self) -> None:
        """An error says what is wrong, and quotes no more than a little, made printable."""
        error = self.assertRaises(PeerViolation, status_of, HEAD + b"\x1b[31m\xff" + b"x" * 5000 + b"\r\n\r\n")
        self.assertIn(r"\x1b[31m\xff", str(error))
        self.assertTrue(str(error).isprintable())
        self.assertLess(len(str(error)), 300)


class AnswerTests(HTTPCase):
    """Answers that are refused, each on a connection of its own that ends with it."""

    async def refused(self, script: Callable[[Recorder], None], limit: int = MOST) -> PeerViolation:
        target, client = self.serve_by(script), self.client(HTTP(max_response_bytes=limit))
        error: PeerViolation = await self.fails(PeerViolation, target, client, body=b"{}")
        self.assertTrue(error.may_have_arrived)
        (connection,) = self.server.connections
        await connection.lost
        return error

    async def test_refused(self) -> None:
        """All of these."""
        for name, answer in REFUSED.items():
            try:
                error = await self.refused(answering(answer))
            except BaseException as wrong:
                raise AssertionError(name) from wrong
            self.assertLess(len(str(error)), 400, name)
            self.assertTrue(str(error).isprintable(), name)

    async def test_endless(self) -> None:
        """Whatever has no end is given up at a bound, before much of it was read."""
        for name, (first, piece) in ENDLESS.items():
            sent: list[int] = []
            try:
                await self.refused(endless(first, piece, sent))
            except BaseException as wrong:
                raise AssertionError(f"{name}, {sent} bytes sent") from wrong
            # Each of the most pieces with the longest extension, and what the sockets hold.
            self.assertLess(sent[0], PIECES * 1024 + (8 << 20), name)

    async def test_small_pieces(self) -> None:
        """A body whose every packet is a byte ends at a bound of packets; one that is merely cut up does not."""
        pieces = 0

        def script(recorder: Recorder) -> None:
            def go_on() -> None:
                nonlocal pieces
                if not recorder.lost.called:
                    recorder.transport.write(b"1\r\nx\r\n" * 100)
                    pieces += 100
                    reactor.callLater(0, go_on)

            recorder.transport.write(CHUNKED)
            go_on()

        error = await self.refused(script)
        self.assertIn("small pieces", str(error))
        self.assertLess(pieces, 2 * PIECES + 50_000)
        cut = CHUNKED + b"1\r\nx\r\n" * PIECES + b"0\r\n\r\n"
        answer = await self.client().exchange("GET", self.serve(cut), "/")
        self.assertEqual(answer.body, b"x" * PIECES)

    async def test_head_byte_by_byte(self) -> None:
        """A head that trickles is read in time linear in its length, and understood."""
        answer = b"HTTP/1.1 103 Early\r\n\r\n" + HEAD + b"X: y\r\n" * 20 + b"Content-Length: 2\r\n\r\nok"

        def script(recorder: Recorder) -> None:
            at = 0

            def go_on() -> None:
                nonlocal at
                if at < len(answer) and not recorder.lost.called:
                    recorder.transport.write(answer[at : at + 1])
                    at += 1
                    reactor.callLater(0, go_on)

            recorder.transport.setTcpNoDelay(True)
            go_on()

        target, client = self.serve_by(script), self.client()
        self.assertEqual((await client.exchange("GET", target, "/")).body, b"ok")

    async def test_trickle(self) -> None:
        """A head and a body that come in drops end with the deadline, whatever was promised."""
        for first in (b"HTTP/1.1 200 ", HEAD + b"Content-Length: 500\r\n\r\n", CHUNKED + b"1f4\r\n"):

            def script(recorder: Recorder, first: bytes = first) -> None:
                def go_on() -> None:
                    if not recorder.lost.called:
                        recorder.transport.write(b"x")
                        reactor.callLater(0.02, go_on)

                recorder.transport.write(first)
                go_on()

            await self.fails(DeadlineExceeded, self.serve_by(script), timeout=0.2)
            await self.server.connections[0].lost
            await deferLater(reactor, 0.03)

    async def test_memory(self) -> None:
        """The memory that an answer takes is bounded by the bytes that are allowed, however it is cut up."""
        for name in ("smallest fields", "smallest chunks", "chunks", "interim answers", "trailers"):
            first, piece = ENDLESS[name]
            tracemalloc.start()
            await self.refused(endless(first, piece, [], block=60_000), limit=100_000)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertLess(peak, 3 << 20, name)

    async def test_statuses_make_no_labels(self) -> None:
        """A backend that thinks statuses up gets no label for each of them."""
        outcomes = set()
        for status in (100, 199, 200, 299, 300, 599, 600, 777, 999, 1000, 123456, 10**30):
            client = self.client()
            target = self.serve(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)
            # An interim answer is followed by nothing here.
            exchange = client.exchange("GET", target, "/", timeout=0.05 if status < 200 else 5)
            exchange.addErrback(lambda failure: failure.trap(DeadlineExceeded, PeerViolation))
            await exchange
            outcomes |= {each.outcome for each in self.exchanges}
        self.assertEqual(outcomes, {"2xx", "3xx", "5xx", "6xx", "7xx", "9xx", "violation", "deadline"})


def flush(recorder: Recorder) -> None:
    """Let the kernel have at once what was written."""
    transport = recorder.transport
    if hasattr(transport, "_aggregator"):
        # Twisted's TLS collects small writes for a turn.
        transport._aggregator.flush()
    while hasattr(transport, "transport"):
        transport = transport.transport
    transport.doWrite()


class AloneTests(HTTPCase):
    """An answer that came before its request is not taken for it."""

    def serve_kept(self, first: bytes, tls: Any = None) -> Target:
        """Answer the first request of each connection with ``first``, every further one with OK."""

        def script(recorder: Recorder) -> None:
            requests = recorder.received.count(b"\r\n\r\n")
            recorder.transport.write(first if requests == 1 else OK)

        self.server = Recording(script)
        return Target("https" if tls else "http", "127.0.0.1", listen(self, self.server, tls=tls), "/")

    async def test_in_the_same_packet(self) -> None:
        """What follows an answer at once is not the answer to what comes next, whole or in part."""
        first = HEAD + b"Content-Length: 5\r\n\r\nfirst"
        chunked = CHUNKED + b"5\r\nfirst\r\n0\r\n\r\n"
        for answer in (first, chunked):
            for more in (EVIL, EVIL[:20], b"\r\n", b"x"):
                target, client = self.serve_kept(answer + more), self.client()
                self.assertEqual((await client.exchange("GET", target, "/")).body, b"first")
                await self.server.connections[0].lost
                self.assertEqual((await client.exchange("GET", target, "/")).body, b"first")
                self.assertEqual(len(self.server.connections), 2)

    async def test_bodies_where_there_are_none(self) -> None:
        """The body of an answer that has none by definition is not the next answer (RFC 9112 section 6.3)."""
        for method, answer in (
            ("HEAD", EVIL),
            ("HEAD", HEAD + b"Content-Length: %d\r\n\r\n" % len(EVIL) + EVIL),
            ("GET", b"HTTP/1.1 204 No Content\r\n\r\n" + EVIL),
            ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n" + EVIL),
            ("GET", HEAD + b"Content-Length: 0\r\n\r\n" + EVIL),
        ):
            target, client = self.serve_kept(answer), self.client()
            self.assertEqual((await client.exchange(method, target, "/")).body, b"")
            await self.server.connections[0].lost
            self.assertEqual((await client.exchange("HEAD", target, "/")).body, b"")
            self.assertEqual(len(self.server.connections), 2)

    async def unread(self, tls: Any, client: Any, act: Callable[[Recorder], None]) -> None:
        """Let the backend ``act`` between two requests, so late that the reactor has not seen it."""
        target = self.serve_kept(OK, tls)
        await client.exchange("GET", target, "/")
        for _ in range(5):
            # TLS has things of its own to say after the first answer.
            await deferLater(reactor, 0.01)
        act(self.server.connections[0])
        self.assertEqual((await client.exchange("GET", target, "/")).body, b"ok")
        await self.server.connections[0].lost
        self.assertEqual(len(self.server.connections), 2)

    async def test_waiting_in_the_socket(self) -> None:
        """A connection on which something waits unread is not used for another request; neither is one that ended."""

        def speak(recorder: Recorder) -> None:
            recorder.transport.write(EVIL)
            flush(recorder)

        def hang_up(recorder: Recorder) -> None:
            recorder.transport.getHandle().shutdown(1)

        for act in (speak, hang_up):
            await self.unread(None, self.client(), act)
        authority = Authority("Test CA")
        tls = TLS(ca_file=authority.save_pem(os.path.join(self.mktemp(), "ca.pem")))
        context = authority.issue(ips=["127.0.0.1"]).server_context()
        await self.unread(context, self.client(tls=tls), speak)

    async def test_nothing_waits(self) -> None:
        """Over TLS, too, a connection on which nothing waits is used again."""
        authority = Authority("Test CA")
        tls = TLS(ca_file=authority.save_pem(os.path.join(self.mktemp(), "ca.pem")))
        target = self.serve_kept(OK, authority.issue(ips=["127.0.0.1"]).server_context())
        client = self.client(tls=tls)
        for _ in range(5):
            await client.exchange("GET", target, "/")
            await deferLater(reactor, 0.01)
        self.assertEqual(len(self.server.connections), 1)
