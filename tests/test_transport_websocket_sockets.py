"""The WebSocket client on loopback sockets: against autobahn's server, and against peers that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.compress import PerMessageDeflateOffer, PerMessageDeflateOfferAccept
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate, optionsForClientTLS
from twisted.trial.unittest import TestCase

from commsmgr import config
from commsmgr.errors import (
    ClosedByPeer,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    NotRunning,
    PeerSilent,
    PeerViolation,
    TLSFailed,
    UpgradeRefused,
)
from commsmgr.transport.websocket import Connection, WebSocketClient
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.websocket_kit import BINARY, CLOSE, PING, TEXT, RecordingHandler, accept, close_frame, frame, read_frames

Answer = Callable[["Peer", bytes], None]


class Peer(Protocol):
    """A server that answers the upgrade request by a function, and collects what comes after it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._request = b""
        self._waiting: list[tuple[int, Deferred[bytes]]] = []
        self.received = b""
        self.gone: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        if b"\r\n\r\n" not in self._request:
            self._request += data
            if b"\r\n\r\n" in self._request:
                self._answer(self, self._request)
            return
        self.received += data
        for size, waiting in list(self._waiting):
            if len(self.received) >= size:
                self._waiting.remove((size, waiting))
                waiting.callback(self.received)

    def connectionLost(self, reason: object = None) -> None:
        self.gone.callback(None)

    def when_received(self, size: int) -> Deferred[bytes]:
        """Return what came, once that are ``size`` bytes."""
        waiting: Deferred[bytes] = Deferred()
        self._waiting.append((size, waiting))
        return waiting


def saying(data: bytes, *, drop: bool = False) -> Answer:
    """Answer the request with ``data``, and hang up if asked to."""

    def answer(peer: Peer, request: bytes) -> None:
        peer.transport.write(data)
        if drop:
            peer.transport.loseConnection()

    return answer


def opening(data: bytes = b"", *, then: Callable[[Peer], None] = lambda peer: None) -> Answer:
    """Accept the upgrade, send ``data`` in the same packet, and do something."""

    def answer(peer: Peer, request: bytes) -> None:
        peer.transport.write(accept(request) + data)
        then(peer)

    return answer


class AwaitedHandler(RecordingHandler):
    """A handler whose events can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[str, Deferred[None]]] = []

    def when(self, name: str) -> Deferred[None]:
        """Fire at the next event of that name, a turn of the reactor later."""
        waiting: Deferred[None] = Deferred()
        self._waiting.append((name, waiting))
        return waiting

    def _note(self, name: str, *args: object) -> None:
        super()._note(name, *args)
        for pair in [pair for pair in self._waiting if pair[0] == name]:
            self._waiting.remove(pair)
            reactor.callLater(0, pair[1].callback, None)


class Loopback:
    """The dialler: every target is the port on 127.0.0.1, with TLS if a trust root was given."""

    def __init__(self) -> None:
        self.port = 0
        self.trust: Certificate | None = None

    def endpoint(self, target: Target, *, timeout: float) -> IStreamClientEndpoint:
        inner = TCP4ClientEndpoint(reactor, "127.0.0.1", self.port, timeout=timeout)
        if self.trust is None:
            return inner
        return wrapClientTLS(optionsForClientTLS("localhost", trustRoot=self.trust), inner)


class SocketTestCase(TestCase):
    """A client, and servers that end with the test."""

    timeout = 10

    def setUp(self) -> None:
        self.handler = AwaitedHandler()
        self.handler.delay = 60.0
        self.dialer = Loopback()
        self.peers: list[Peer] = []
        self.client = self.make_client()

    def make_client(self, **settings: Any) -> WebSocketClient:
        """Return a client with these settings."""
        return WebSocketClient(
            reactor,
            Target("ws", "localhost", 8080, "/ws"),
            dialer=self.dialer,
            handler=self.handler,
            settings=config.WebSocket(**{"connect_timeout": 5.0, "max_message_bytes": 200_000} | settings),
            subprotocols=["commsmgr.v1"],
        )

    def listen(self, factory: Any, authority: Authority | None = None) -> None:
        """Listen on a port, to which the dialler then leads."""
        if authority is None:
            port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        else:
            issued = authority.issue(names=["localhost"], ips=["127.0.0.1"])
            port = reactor.listenSSL(0, factory, issued.server_context(), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.dialer.port = port.getHost().port

    def serve(self, answer: Answer) -> None:
        """Listen with peers that answer so."""

        def build(addr: object) -> Peer:
            self.peers.append(Peer(answer))
            return self.peers[-1]

        factory = Factory()
        factory.noisy = False
        factory.buildProtocol = build  # type: ignore[method-assign]  # shorter than a class
        self.listen(factory)

    async def tearDown(self) -> None:  # type: ignore[override]  # trial takes what can be awaited
        await self.client.stop(close_within=0.05)
        for peer in self.peers:
            if not peer.gone.called:
                peer.transport.abortConnection()
            await peer.gone
        self.assertEqual(self.handler.events.count("connecting"), self.handler.events.count("ended"))

    async def attempt(self, answer: Answer, **settings: Any) -> Exception:
        """Return the error with which one attempt at a peer that answers so ends."""
        self.serve(answer)
        self.client = self.make_client(**settings)
        ended = self.handler.when("ended")
        self.client.start()
        await ended
        await self.client.stop()
        return self.handler.error

    async def opened(self, answer: Answer, **settings: Any) -> Connection:
        """Return the connection to a peer that answers so."""
        self.serve(answer)
        self.client = self.make_client(**settings)
        opened = self.handler.when("opened")
        self.client.start()
        await opened
        return self.handler.connections[-1]


class AutobahnTests(SocketTestCase):
    """Against autobahn's own server."""

    def serve_echo(self, authority: Authority | None = None, *, compress: bool = False) -> Deferred[tuple[Any, ...]]:
        """Echo what comes; return how the connection ended."""
        closed: Deferred[tuple[Any, ...]] = Deferred()

        class Echo(WebSocketServerProtocol):
            def onConnect(self, request: Any) -> str:
                return str(request.protocols[0])

            def onMessage(self, payload: bytes, isBinary: bool) -> None:
                self.sendMessage(payload, isBinary)

            def onClose(self, wasClean: bool, code: int, reason: str) -> None:
                closed.callback((wasClean, code, reason))

        factory = WebSocketServerFactory(protocols=["commsmgr.v1"], reactor=reactor)
        factory.noisy = False
        factory.protocol = Echo
        factory.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0)
        if compress:
            factory.setProtocolOptions(
                perMessageCompressionAccept=lambda offers: next(
                    PerMessageDeflateOfferAccept(offer) for offer in offers if isinstance(offer, PerMessageDeflateOffer)
                )
            )
        self.listen(factory, authority)
        return closed

    async def converse(self) -> Connection:
        """Open, send messages of all sizes, and get every one of them back."""
        opened = self.handler.when("opened")
        self.client.start()
        await opened
        (connection,) = self.handler.connections
        payloads = [b"", "é".encode(), b"b" * 126, b"c" * 2000, b"d" * 70_000]
        self.assertTrue(connection.send_many(payloads))
        self.assertTrue(connection.ping(b"nonce"))
        await self.handler.when("pong")
        self.assertEqual(self.handler.messages, [(payload, True) for payload in payloads])
        self.assertEqual(self.handler.pongs, [b"nonce"])
        self.assertEqual(connection.subprotocol, "commsmgr.v1")
        return connection

    async def test_conversation(self) -> None:
        """Messages, pings and the closing handshake are understood by an independent end."""
        closed = self.serve_echo()
        connection = await self.converse()
        ended = self.handler.when("ended")
        connection.close(4001, "enough")
        await ended
        self.assertEqual(await closed, (True, 4001, "enough"))
        self.assertIs(type(self.handler.error), ConnectionEnded)

    async def test_compressed(self) -> None:
        """The same with permessage-deflate."""
        closed = self.serve_echo(compress=True)
        self.client = self.make_client(compress=True)
        await self.converse()
        await self.client.stop()
        self.assertEqual((await closed)[:2], (True, 1000))
        self.assertIsInstance(self.handler.error, NotRunning)

    async def test_tls(self) -> None:
        """The same over TLS; the connection knows its version."""
        authority = Authority("Test CA")
        closed = self.serve_echo(authority)
        self.dialer.trust = Certificate.loadPEM(authority.pem)
        connection = await self.converse()
        self.assertEqual(connection.tls, "TLSv1.3")
        await self.client.stop()
        await closed

    async def test_tls_untrusted(self) -> None:
        """With an endpoint that lets a refused certificate surface as a loss, it still is TLSFailed."""
        factory = Factory.forProtocol(Protocol)
        factory.noisy = False
        self.listen(factory, Authority("Stranger"))
        self.dialer.trust = Certificate.loadPEM(Authority("Test CA").pem)
        ended = self.handler.when("ended")
        self.client.start()
        await ended
        self.assertIsInstance(self.handler.error, TLSFailed)


class RefusalTests(SocketTestCase):
    """Peers with which no WebSocket comes about."""

    async def test_statuses(self) -> None:
        """Each status is told apart; the body never is."""
        for line, fields, status, retry_after in (
            ("HTTP/1.1 401 Unauthorized", "", 401, None),
            ("HTTP/1.1 403 Forbidden", "", 403, None),
            ("HTTP/1.0 404 Not Found", "", 404, None),
            ("HTTP/1.1 429 Too Many Requests", "Retry-After: 12\r\n", 429, 12.0),
            ("HTTP/1.1 503", "Retry-After: 3\r\nRetry-After: 9\r\n", 503, 3.0),
            ("HTTP/1.1 301 Moved", "Location: https://x.example/login?secret=1\r\n", 301, None),
            ("HTTP/1.1 200 OK", "Content-Type: text/html\r\n", 200, None),
        ):
            error = await self.attempt(saying(f"{line}\r\n{fields}\r\n<html>secret".encode()))
            assert isinstance(error, UpgradeRefused), error
            self.assertEqual((error.status, error.retry_after), (status, retry_after))
            self.assertNotIn("secret", str(error))

    async def test_not_http(self) -> None:
        """Something else than HTTP is refused with status 0."""
        error = await self.attempt(saying(b"SSH-2.0-OpenSSH\r\n"))
        assert isinstance(error, UpgradeRefused)
        self.assertEqual(error.status, 0)

    async def test_endless_head(self) -> None:
        """A head without end is cut off, whatever the peer goes on sending."""
        error = await self.attempt(saying(b"HTTP/1.1 200 OK\r\n" + b"X-Pad: y\r\n" * 100_000))
        self.assertIsInstance(error, PeerViolation)

    async def test_hang(self) -> None:
        """A peer that accepts and says nothing costs connect_timeout, and no more."""
        error = await self.attempt(saying(b"HTTP/1.1 101 Sw"), connect_timeout=0.05)
        self.assertIsInstance(error, DeadlineExceeded)

    async def test_drop_at_once(self) -> None:
        """A peer that hangs up instead of answering, or in the middle of it, refuses the connection."""
        for data in (b"", b"HTTP/1.1 101 Switching Protocols\r\nUpgr"):
            self.assertIs(type(await self.attempt(saying(data, drop=True))), ConnectFailed)

    async def test_reset_in_upgrade(self) -> None:
        """The same by a reset."""
        error = await self.attempt(lambda peer, request: peer.transport.abortConnection())
        self.assertIs(type(error), ConnectFailed)

    async def test_nobody_there(self) -> None:
        """A port without a listener."""
        port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
        self.dialer.port = port.getHost().port
        await port.stopListening()
        ended = self.handler.when("ended")
        self.client.start()
        await ended
        self.assertIs(type(self.handler.error), ConnectFailed)


class MisbehaviourTests(SocketTestCase):
    """Peers that misbehave once the WebSocket is open."""

    async def test_close_codes(self) -> None:
        """The backend's close code reaches the owner, and its frame is answered."""
        for code in (1000, 1001, 1008, 1009, 1011, 1012, 1013, 4401):

            def then(peer: Peer) -> None:
                peer.when_received(8).addCallback(lambda _: peer.transport.loseConnection())

            error = await self.attempt(opening(close_frame(code), then=then))
            assert isinstance(error, ClosedByPeer)
            self.assertEqual(error.code, code)
            self.assertEqual(read_frames(self.peers[-1].received), [(CLOSE, code.to_bytes(2, "big"))])

    async def test_violations(self) -> None:
        """Broken frames are answered with their close code and end as PeerViolation."""
        for data, code in (
            (frame(TEXT, b"x", mask=b"abcd"), 1002),
            (frame(TEXT, b"x", rsv=2), 1002),
            (frame(PING, b"x", fin=False), 1002),
            (frame(TEXT, b"\xff\xfe"), 1007),
            (frame(BINARY, b"x" * 200_001), 1009),
            (frame(BINARY, b"x" * 150_000, fin=False) + frame(0, b"x" * 150_000), 1009),
        ):

            def then(peer: Peer) -> None:
                peer.when_received(8).addCallback(lambda _: peer.transport.loseConnection())

            self.assertIsInstance(await self.attempt(opening(data, then=then)), PeerViolation)
            await self.peers[-1].gone
            opcode, payload = read_frames(self.peers[-1].received)[0]
            self.assertEqual((opcode, payload[:2]), (CLOSE, code.to_bytes(2, "big")))
            self.assertEqual(self.handler.messages, [])

    async def test_drop_after_open(self) -> None:
        """Open and gone, orderly or by a reset, is 1006."""
        for end in (lambda peer: peer.transport.loseConnection(), lambda peer: peer.transport.abortConnection()):
            error = await self.attempt(opening(then=lambda peer, end=end: reactor.callLater(0, end, peer)))
            # With a reset the answer itself may be lost.
            if isinstance(error, ClosedByPeer):
                self.assertEqual(error.code, 1006)
            else:
                self.assertIsInstance(error, ConnectFailed)

    async def test_reset(self) -> None:
        """A reset of a connection in use is 1006."""
        await self.opened(opening())
        ended = self.handler.when("ended")
        self.peers[-1].transport.abortConnection()
        await ended
        assert isinstance(self.handler.error, ClosedByPeer)
        self.assertEqual(self.handler.error.code, 1006)

    async def test_no_close_reply(self) -> None:
        """A peer that ignores our close frame does not hold up the stop."""
        await self.opened(opening())
        began = reactor.seconds()
        await self.client.stop(close_within=0.05)
        self.assertLess(reactor.seconds() - began, 1.0)
        await self.peers[-1].gone
        self.assertEqual(read_frames(self.peers[-1].received)[0], (CLOSE, (1000).to_bytes(2, "big")))

    async def test_half_open(self) -> None:
        """Nor does one that no longer reads, with megabytes waiting for it."""
        connection = await self.opened(opening(then=lambda peer: peer.transport.pauseProducing()))
        connection.send(b"x" * (20 << 20))
        began = reactor.seconds()
        await self.client.stop(close_within=0.05)
        self.assertLess(reactor.seconds() - began, 1.0)
        self.peers[-1].transport.resumeProducing()
        await self.peers[-1].gone

    async def test_kill(self) -> None:
        """A kill reaches the peer as the end of the connection."""
        connection = await self.opened(opening())
        ended = self.handler.when("ended")
        connection.kill(PeerSilent("no pong"))
        await ended
        await self.peers[-1].gone
        self.assertEqual(self.handler.error.fact, "no pong")


class ReconnectTests(SocketTestCase):
    """Again and again."""

    async def test_reconnect(self) -> None:
        """A lost connection is followed by another one, and never overlaps with it."""
        self.handler.delay = 0.001
        await self.opened(opening())
        for count in (2, 3, 4):
            opened = self.handler.when("opened")
            self.peers[-1].transport.loseConnection()
            await opened
            self.assertEqual((len(self.peers), self.client.attempts), (count, count))
            self.assertEqual([peer.gone.called for peer in self.peers], [True] * (count - 1) + [False])

    async def test_races(self) -> None:
        """start and stop in every order and at every distance leave a client that does as it was told last."""
        self.serve(opening())
        self.handler.delay = 0.0
        for turns in range(12):
            self.client.start()
            for _ in range(turns):
                turn: Deferred[None] = Deferred()
                reactor.callLater(0, turn.callback, None)
                await turn
            stopped = self.client.stop(close_within=0.01)
            self.client.start()
            again = self.client.stop(close_within=0.01)
            await stopped
            await again
            self.assertEqual(self.handler.events.count("connecting"), self.handler.events.count("ended"))
        opened = self.handler.when("opened")
        self.client.start()
        await opened
