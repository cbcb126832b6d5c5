"""TLS that does not come to an end, or to a proper one: handshakes without end, bodies that are cut short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer
from twisted.internet.task import Clock
from zope.interface import implementer

from commsmgr import config
from commsmgr.errors import ClosedByPeer, CommsError, ConnectionEnded, DeadlineExceeded, PeerViolation, TLSFailed
from commsmgr.transport import gate
from commsmgr.transport.gate import HANDSHAKE_LIMIT, CheckedConnections
from commsmgr.transport.http import HTTPClient
from commsmgr.transport.peer import PeerCheck
from commsmgr.transport.tls import ContextSource
from commsmgr.transport.websocket import WebSocketClient
from commsmgr.urls import Target
from tests.loopback import FixedResolver, ReactorWith, Recorder, Recording, real
from tests.tls_kit import HOST, TOKEN, TransportsCase
from tests.websocket_kit import TEXT, RecordingHandler, accept, frame

LIMIT = 20.0


def handshake_record(content: bytes) -> bytes:
    """Return a TLS record of type handshake (RFC 8446 section 5.1)."""
    return b"\x16\x03\x03" + len(content).to_bytes(2, "big") + content


HELLO_REQUEST = bytes(4)
"""A message that says nothing, and that a client in its handshake has to ignore (RFC 5246 section 7.4.1.1)."""


@implementer(IPullProducer)
class Flood:
    """Writes ``piece`` as fast as it is read, until it has written ``most`` bytes; then it is mute."""

    def __init__(self, transport: Any, piece: bytes, most: int) -> None:
        self.written = 0
        self._most = most
        self._transport = transport
        self._piece = piece
        transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        if self.written >= self._most:
            self._transport.unregisterProducer()
            return
        self._transport.write(self._piece)
        self.written += len(self._piece)

    def stopProducing(self) -> None:
        pass


class EndlessHandshakeTests(TransportsCase):
    """Handshakes that never come to their end, on a clock of our own: they cost the deadline, and nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.reactor = ReactorWith(clock=self.clock, resolver=FixedResolver(["127.0.0.1"]))
        self.endings: list[CommsError] = []

    def go(self, transport: str, port: int) -> Callable[[], Any]:
        """Set out; the error will be in :attr:`endings`. Return what stops the client."""
        if transport == "http":
            http = HTTPClient(self.reactor, self.dialer(), config.HTTP(timeout=LIMIT))
            sent = http.exchange("GET", Target("https", HOST, port, ""), "/", token=TOKEN)
            sent.addErrback(lambda failure: self.endings.append(failure.value))
            return http.close
        handler = RecordingHandler()
        handler.delay = 3600.0
        handler.on["ended"] = lambda _, error: self.endings.append(error)
        client = WebSocketClient(
            self.reactor,
            Target("wss", HOST, port, "/"),
            dialer=self.dialer(),
            handler=handler,
            settings=config.WebSocket(connect_timeout=LIMIT),
            subprotocols=[],
        )
        client.start()
        return client.stop

    async def lasts(self, transport: str, begin: Callable[[Recorder, Deferred[None]], None]) -> None:
        """
        Go to a peer that does ``begin`` after the ClientHello, and fires its Deferred when that is enough.

        Nothing has happened then, and when the time is out, it is over.
        """
        enough: Deferred[None] = Deferred()
        begun: list[Recorder] = []

        def script(recorder: Recorder) -> None:
            if not begun:
                begun.append(recorder)
                begin(recorder, enough)

        self.server = Recording(script)
        stop = self.go(transport, self.listen(None))
        await enough
        self.clock.advance(LIMIT - 0.1)
        self.assertEqual(self.endings, [], "it did not last")
        self.clock.advance(0.2)
        await self.gone()
        self.clock.advance(1)
        [error] = self.endings
        assert isinstance(error, DeadlineExceeded), repr(error)
        self.assertFalse(error.may_have_arrived)
        self.assertNotIn(TOKEN.encode(), self.server.received)
        self.assertNotIn(b"GET", self.server.received)
        stopped = stop()
        self.clock.pump([0.1] * 20)
        await stopped
        self.assertEqual(self.clock.getDelayedCalls(), [])

    @staticmethod
    def silence(recorder: Recorder, enough: Deferred[None]) -> None:
        """Say nothing."""
        real.callLater(0, enough.callback, None)

    @staticmethod
    def trickle(recorder: Recorder, enough: Deferred[None]) -> None:
        """Announce a record of 16 KiB and send it byte by byte; after 500 of them it is enough."""
        record = handshake_record(b"\x02\0\x3f\xfc" + bytes(16380))

        def send(at: int) -> None:
            if at == 500:
                enough.callback(None)
            elif not recorder.lost.called:
                recorder.transport.write(record[at : at + 1])
                real.callLater(0, send, at + 1)

        send(0)

    async def test_mute_http(self) -> None:
        """A peer that says nothing after the ClientHello, HTTP."""
        await self.lasts("http", self.silence)

    async def test_mute_websocket(self) -> None:
        """A peer that says nothing after the ClientHello, WebSocket."""
        await self.lasts("websocket", self.silence)

    async def test_trickle_http(self) -> None:
        """A peer that is alive and never gets anywhere, HTTP."""
        await self.lasts("http", self.trickle)

    async def test_trickle_websocket(self) -> None:
        """A peer that is alive and never gets anywhere, WebSocket."""
        await self.lasts("websocket", self.trickle)


class FloodTests(TransportsCase):
    """
    Handshake messages, ever more of them, which a client has to ignore: too many end it, before the deadline.

    They do have an end: curl, whose OpenSSL reads the socket by itself, forgets its own time as long as they come.
    """

    most = 64 * HANDSHAKE_LIMIT

    def setUp(self) -> None:
        super().setUp()
        self.floods: list[Flood] = []
        record = handshake_record(HELLO_REQUEST * 4000)

        def script(recorder: Recorder) -> None:
            if not self.floods:
                self.floods.append(Flood(recorder.transport, record, self.most))

        self.server = Recording(script)

    async def _given_up(self, transport: str) -> None:
        port = self.listen(None)
        error = await (self.by_http(port) if transport == "http" else self.by_websocket(port))
        await self.gone()
        assert isinstance(error, TLSFailed), repr(error)
        self.assertEqual(error.check, "handshake")
        self.assertIn(f"more than {HANDSHAKE_LIMIT} bytes came", str(error))
        self.assertNotIn(TOKEN.encode(), self.server.received)
        [flood] = self.floods
        # What was written and not read lay in the buffers of the kernel.
        self.assertGreater(flood.written, HANDSHAKE_LIMIT)
        self.assertLess(flood.written, 16 * HANDSHAKE_LIMIT)

    async def test_http(self) -> None:
        """HTTP gives up."""
        await self._given_up("http")

    async def test_websocket(self) -> None:
        """The WebSocket gives up."""
        await self._given_up("websocket")

    async def test_curl(self) -> None:
        """curl gives up when its time is out and nothing more comes."""
        code, said = await self.by_curl(self.listen(None), arguments=["--max-time", "0.5"])
        await self.gone()
        self.assertEqual(code, 28, said)


class AfterTheHandshakeTests(TransportsCase):
    """Messages of TLS itself that come when the handshake is complete; OpenSSL's own server sends two tickets then."""

    def _connected(self) -> tuple[PeerCheck, SSL.Connection, SSL.Connection]:
        """Return a client with its check, and a server whose tickets are under way."""
        check = PeerCheck(HOST)
        wrapped = SimpleNamespace(wrappedProtocol=SimpleNamespace(check=check))
        client = CheckedConnections(
            ContextSource(config.TLS(ca_file=self.ca_file)).current(), HOST
        ).clientConnectionForTLS(wrapped)
        server = SSL.Connection(self.authority.issue(names=[HOST]).server_context().getContext(), None)
        client.set_connect_state()
        server.set_accept_state()
        for one, other in ((client, server), (server, client), (client, server)):
            with contextlib.suppress(SSL.WantReadError):
                one.do_handshake()
            other.bio_write(one.bio_read(1 << 16))
        server.do_handshake()
        self.assertIsNone(check.refusal())
        return check, client, server

    def _take(self, client: SSL.Connection, server: SSL.Connection) -> bytes:
        client.bio_write(server.bio_read(1 << 16))
        return client.recv(100)

    def test_few(self) -> None:
        """A few of them change nothing."""
        _, client, server = self._connected()
        self.assertRaises(SSL.WantReadError, self._take, client, server)
        server.send(b"data")
        self.assertEqual(self._take(client, server), b"data")

    def test_too_many(self) -> None:
        """Too many end the connection, whatever data stands between them."""
        check, client, server = self._connected()
        self.patch(gate, "MOST_STEPS", check.steps)
        self.assertRaises(SSL.WantReadError, self._take, client, server)
        server.send(b"data")
        error = self.assertRaises(SSL.Error, self._take, client, server)
        self.assertIn("messages of TLS that are no data", str(error))

    async def test_by_http(self) -> None:
        """A request is over then, with an error that is one of ours."""
        self.patch(gate, "MOST_STEPS", 0)
        error = await self.by_http(self.listen(self.authority.issue(names=[HOST]).server_context()))
        self.assertIsInstance(error, PeerViolation)
        self.assertIn("messages of TLS that are no data", str(error))
        await self.gone()


class MuteByCurlTests(TransportsCase):
    """curl and a peer that says nothing."""

    async def test_mute(self) -> None:
        """curl gives up when its time is out."""
        self.server = Recording()
        code, said = await self.by_curl(self.listen(None), arguments=["--max-time", "0.5"])
        await self.gone()
        self.assertEqual(code, 28, said)


class OversizedHandshakeTests(TransportsCase):
    """Handshake messages that announce more than TLS has use for are refused at once."""

    async def _refused(self, transport: str) -> None:
        announced = handshake_record(b"\x02\xff\xff\xff" + bytes(16000))
        self.server = Recording(lambda recorder: recorder.transport.write(announced))
        port = self.listen(None)
        error = await (self.by_http(port) if transport == "http" else self.by_websocket(port))
        await self.gone()
        assert isinstance(error, TLSFailed), repr(error)
        self.assertEqual(error.check, "handshake")
        self.assertIn("excessive message size", str(error))

    async def test_http(self) -> None:
        """A ServerHello of 16 MiB, HTTP."""
        await self._refused("http")

    async def test_websocket(self) -> None:
        """A ServerHello of 16 MiB, WebSocket."""
        await self._refused("websocket")


TAKEN_BY_CURL = (0, 52)
"""curl takes what ends without a goodbye, but says "empty reply" when it hears of the end before it has read a byte."""


def cut(*pieces: bytes, goodbye: bool = False) -> Callable[[Recorder], None]:
    """Answer with ``pieces``, then end TCP, without the goodbye of TLS: close_notify (RFC 8446 section 6.1)."""

    def script(recorder: Recorder) -> None:
        if recorder.received.endswith(b"\r\n\r\n"):
            recorder.transport.writeSequence(list(pieces))
            (recorder.transport if goodbye else recorder.transport.transport).loseConnection()

    return script


OK = b"HTTP/1.1 200 OK\r\n"


class TruncatedTests(TransportsCase):
    """What was cut short is never taken for the whole: somebody on the way may have cut it."""

    async def _truncated(self, error: type[CommsError], *pieces: bytes, goodbye: bool = False) -> int:
        """Return curl's exit code, when our HTTP client has failed with ``error``."""
        context = self.authority.issue(names=[HOST]).server_context()
        self.server = Recording(cut(*pieces, goodbye=goodbye))
        port = self.listen(context)
        found = await self.by_http(port)
        self.assertIsInstance(found, error)
        assert isinstance(found, ConnectionEnded | PeerViolation)
        self.assertTrue(found.may_have_arrived)
        code, _ = await self.by_curl(port)
        await self.gone()
        return code

    async def test_body_until_close(self) -> None:
        """A body that lasts until the end of the connection, which came without close_notify: only curl takes it."""
        self.assertIn(await self._truncated(PeerViolation, OK, b"\r\n", b"half of"), TAKEN_BY_CURL)

    async def test_body_until_close_notify(self) -> None:
        """The same with close_notify: we want every length said, and need not tell the one from the other."""
        self.assertEqual(await self._truncated(PeerViolation, OK, b"\r\n", b"whole?", goodbye=True), 0)

    async def test_content_length(self) -> None:
        """Fewer bytes than Content-Length says, without close_notify."""
        self.assertNotEqual(await self._truncated(ConnectionEnded, OK, b"Content-Length: 10\r\n\r\n", b"half"), 0)

    async def test_content_length_with_goodbye(self) -> None:
        """Fewer bytes than Content-Length says, with close_notify."""
        code = await self._truncated(ConnectionEnded, OK, b"Content-Length: 10\r\n\r\n", b"half", goodbye=True)
        self.assertNotEqual(code, 0)

    async def test_chunked(self) -> None:
        """Chunks without the last one."""
        self.assertNotEqual(
            await self._truncated(ConnectionEnded, OK, b"Transfer-Encoding: chunked\r\n\r\n", b"4\r\nhalf\r\n"), 0
        )

    async def test_head(self) -> None:
        """Half of a head, which curl takes for a whole one."""
        self.assertIn(await self._truncated(ConnectionEnded, b"HTTP/1.1 200 OK\r\nContent-"), TAKEN_BY_CURL)

    async def test_websocket(self) -> None:
        """Half of a message: nothing of it is handed on, and the connection counts as lost, not as closed."""
        whole = frame(TEXT, b"a command that is cut short")

        def script(recorder: Recorder) -> None:
            if recorder.received.endswith(b"\r\n\r\n"):
                recorder.transport.writeSequence([accept(recorder.received), whole[:-5]])
                recorder.transport.transport.loseConnection()

        self.server = Recording(script)
        handler = RecordingHandler()
        handler.delay = 3600.0
        over: Deferred[None] = Deferred()
        handler.on["ended"] = lambda *_: over.callback(None)
        client = WebSocketClient(
            self.reactor,
            Target("wss", HOST, self.listen(self.authority.issue(names=[HOST]).server_context()), "/"),
            dialer=self.dialer(),
            handler=handler,
            settings=config.WebSocket(),
            subprotocols=[],
        )
        client.start()
        await over
        await client.stop()
        await self.gone()
        self.assertEqual(handler.messages, [])
        assert isinstance(handler.error, ClosedByPeer), repr(handler.error)
        self.assertEqual(handler.error.code, 1006)
