"""The WebSocket client on a virtual clock and in-memory transports: every phase, every policy, no global reactor."""

from __future__ import annotations

import random
import zlib
from base64 import b64encode
from types import SimpleNamespace

from autobahn.twisted.websocket import WebSocketClientProtocol
from autobahn.websocket.protocol import WebSocketProtocol
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectBindError, ConnectionDone, ConnectionLost
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import (
    ClosedByPeer,
    ConfigError,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    NotRunning,
    PeerSilent,
    PeerViolation,
    TLSFailed,
    TokenError,
    UpgradeRefused,
)
from commsmgr.transport.bare import BareProtocol
from commsmgr.transport.websocket import DELAY_AFTER_FAULT, native_acceleration_active
from tests.websocket_kit import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    MemoryTestCase,
    accept,
    close_frame,
    frame,
    read_frames,
)


class OptionsTests(SynchronousTestCase):
    """autobahn's options, of which most stand once in the class."""

    def test_none_is_missing(self) -> None:
        """Each that this autobahn has is either copied from the factory or set for all."""
        copied: set[str] = set()

        class Factory:
            def __getattr__(self, name: str) -> None:
                copied.add(name)

        protocol = BareProtocol()
        protocol.factory = Factory()
        self.patch(BareProtocol, "startHandshake", lambda protocol: None)
        protocol.connectionMade()
        wanted = set(WebSocketClientProtocol.CONFIG_ATTRS)
        self.assertEqual(set(), copied - wanted)
        self.assertEqual(set(), wanted - copied - vars(BareProtocol).keys())

    def test_beginning(self) -> None:
        """Whatever autobahn gives a connection at its beginning, ours has: once for all, or when it is asked for."""
        given, bare = WebSocketClientProtocol(), BareProtocol()
        given.factory = SimpleNamespace(isServer=False, proxy=None)
        for name in WebSocketClientProtocol.CONFIG_ATTRS:
            setattr(given, name, getattr(bare, name, None))
        WebSocketProtocol._connectionMade(given)
        of_its_own = vars(given).keys() - {"factory", *WebSocketClientProtocol.CONFIG_ATTRS}
        self.assertEqual([], [name for name in of_its_own if not hasattr(BareProtocol, name)])
        for name in ("send_queue", "utf8validator"):
            self.assertIsNot(getattr(bare, name), getattr(BareProtocol(), name))


class OpeningTests(MemoryTestCase):
    """From start() to an open connection."""

    def test_request(self) -> None:
        """The upgrade request names the target, bears the handler's headers, and no Origin."""
        lines = self.connect().decode().split("\r\n")
        self.assertEqual(lines[0], "GET /agent?x=1 HTTP/1.1")
        self.assertIn("Host: backend.example:80", lines)
        self.assertIn("User-Agent: commsmgr", lines)
        self.assertIn("Authorization: Bearer t0ken", lines)
        self.assertIn("Sec-WebSocket-Protocol: commsmgr.v1", lines)
        self.assertNotIn("Origin", "".join(lines))
        self.assertNotIn("Sec-WebSocket-Extensions", "".join(lines))

    def test_open(self) -> None:
        """The owner hears of the attempt, then of the connection with what was negotiated."""
        self.clock.advance(7)
        connection = self.open("Sec-WebSocket-Protocol: commsmgr.v1")
        self.assertEqual(self.handler.events, ["connecting", "opened"])
        self.assertEqual((connection.subprotocol, connection.opened_at, connection.tls), ("commsmgr.v1", 7.0, ""))
        self.assertEqual(self.client.attempts, 1)

    def test_hosts(self) -> None:
        """An IPv6 literal stands in brackets; a port is always named; a host called "unix" is a host."""
        for url, host in (
            ("ws://[2001:db8::1]/", "[2001:db8::1]:80"),
            ("wss://backend.example/", "backend.example:443"),
            ("ws://unix/", "unix:80"),
        ):
            self.url = url
            self.client = self.make_client()
            self.assertIn(f"\r\nHost: {host}\r\n", self.connect().decode())
            self.client.stop()
            self.settle()

    def test_headers_merge(self) -> None:
        """The attempt's headers win over the settings', whatever the case of names, and there is one User-Agent."""
        self.client = self.make_client(headers={"x-site": "old", "X-Rack": "7", "user-agent": "mine"})
        self.handler.headers = lambda: succeed({"Authorization": "Bearer t0ken", "X-Site": "new"})
        request = self.connect().decode()
        self.assertEqual(request.lower().count("x-site"), 1)
        self.assertIn("X-Site: new", request)
        self.assertIn("X-Rack: 7", request)
        self.assertEqual(request.lower().count("user-agent"), 1)
        self.assertIn("user-agent: mine", request)

    def test_bad_settings_headers(self) -> None:
        """Headers from the settings that cannot stand in a request are found before anything is started."""
        error = self.assertRaises(ConfigError, self.make_client, headers={"X": "a\r\nHost: evil"})
        self.assertEqual(error.key, "http.headers")
        self.assertNotIn("evil", str(error))

    def test_bad_token(self) -> None:
        """A token with a line break never gets into a request, nor into the error."""
        self.handler.headers = lambda: succeed({"Authorization": "Bearer a\r\nHost: evil"})
        self.client.start()
        self.assertEqual(self.dialer.endpoints, [])
        self.assertIsInstance(self.handler.error, TokenError)
        self.assertNotIn("evil", str(self.handler.error))

    def test_fresh_headers(self) -> None:
        """Each attempt asks for headers of its own."""
        tokens = iter(["one", "two"])
        self.handler.headers = lambda: succeed({"Authorization": next(tokens)})
        self.assertIn(b"Authorization: one\r\n", self.connect())
        self.transport.lose(ConnectionLost())
        self.clock.advance(5)
        self.assertIn(b"Authorization: two\r\n", self.endpoint.succeed().take())

    def test_headers_fail(self) -> None:
        """No headers, no connection: the provider's own error is what the owner hears."""
        self.handler.headers = lambda: fail(TokenError("no such file"))
        self.client.start()
        self.assertEqual(self.handler.ended[0][0], None)
        self.assertEqual(self.handler.error.fact, "no such file")
        self.assertEqual(self.dialer.endpoints, [])

    def test_headers_fault(self) -> None:
        """A provider that raises something else is at fault: it is logged, and the attempt fails like any other."""
        for headers in (lambda: fail(KeyError("x")), lambda: {}["x"]):
            self.handler.headers = headers
            self.client.start()
            self.assertIsInstance(self.handler.error, TokenError)
            self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
            self.client.stop()

    def test_late_headers(self) -> None:
        """Headers that come after the attempt was given up start nothing."""
        pending: Deferred[dict[str, str]] = Deferred()
        self.handler.headers = lambda: pending
        self.client.start()
        self.successResultOf(self.client.stop())
        self.assertIsInstance(self.handler.error, NotRunning)
        pending.callback({})
        self.assertEqual(self.dialer.endpoints, [])
        self.assert_clean()

    def test_uncancellable_headers(self) -> None:
        """A provider whose Deferred swallows its cancellation and answers all the same starts nothing either."""
        pending: Deferred[dict[str, str]] = Deferred(lambda waiting: waiting.callback({}))
        self.handler.headers = lambda: pending
        self.client.start()
        self.successResultOf(self.client.stop())
        self.assertEqual(self.dialer.endpoints, [])

    def test_one_deadline(self) -> None:
        """Headers, connection and upgrade share connect_timeout; the endpoint gets what is left of it."""
        pending: Deferred[dict[str, str]] = Deferred()
        self.handler.headers = lambda: pending
        self.client.start()
        self.clock.advance(8)
        pending.callback({})
        self.assertEqual(self.endpoint.timeout, 12.0)
        self.clock.advance(8)
        transport = self.endpoint.succeed()
        self.clock.advance(3.9)
        self.assertFalse(transport.aborted)
        self.clock.advance(0.1)
        self.assertTrue(transport.aborted)
        self.settle()
        self.assertIsInstance(self.handler.error, DeadlineExceeded)
        self.assertIn("answer to the WebSocket upgrade", str(self.handler.error))

    def test_deadline_in_headers(self) -> None:
        """A provider that never answers is cancelled."""
        cancelled: list[object] = []
        self.handler.headers = lambda: Deferred(cancelled.append)
        self.client.start()
        self.clock.advance(20)
        self.assertEqual(len(cancelled), 1)
        self.assertIsInstance(self.handler.error, DeadlineExceeded)
        self.assertIn("token", str(self.handler.error))

    def test_deadline_in_connecting(self) -> None:
        """An endpoint that never connects is cancelled, and the error says in what it was stuck."""
        self.client.start()
        self.clock.advance(20)
        self.assertTrue(self.endpoint.cancelled)
        self.assertIsInstance(self.handler.error, DeadlineExceeded)
        self.assertIn("name, TCP, TLS", str(self.handler.error))

    def test_connection_failures(self) -> None:
        """Errors that the dialler has typed are passed on as they are; all others become ConnectFailed."""
        for given, expected in (
            (TLSFailed("expired"), TLSFailed),
            (ConnectFailed("refused"), ConnectFailed),
            (ConnectBindError(), ConnectFailed),
            (ValueError("odd"), ConnectFailed),
        ):
            self.client.start()
            self.endpoint.fail(given)
            self.assertIs(type(self.handler.error), expected)
            self.assertIn(str(given), str(self.handler.error))
            self.successResultOf(self.client.stop())

    def test_no_endpoint(self) -> None:
        """A dialler that cannot even make an endpoint fails the attempt; only what is unexpected is logged."""
        self.dialer.error = TLSFailed("no CA file")
        self.client.start()
        self.assertIs(self.handler.error, self.dialer.error)
        self.dialer.error = KeyError("bug")
        self.client.retry_now()
        self.assertIsInstance(self.handler.error, ConnectFailed)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_lost_in_upgrade(self) -> None:
        """A connection that ends before the answer was not open; one that TLS ended, TLS ended."""
        from OpenSSL import SSL

        self.connect()
        self.transport.lose(ConnectionDone())
        self.assertIs(type(self.handler.error), ConnectFailed)
        self.clock.advance(5)
        self.endpoint.succeed()
        self.transport.lose(SSL.Error([("SSL routines", "", "bad certificate")]))
        self.assertIs(type(self.handler.error), TLSFailed)
        self.assertEqual([connection for connection, _ in self.handler.ended], [None, None])

    def test_answer_in_pieces(self) -> None:
        """An answer may come byte by byte, after interim answers, and with the first frame right behind it."""
        request = self.connect()
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        for byte in interim + accept(request) + frame(TEXT, b"first"):
            self.feed(bytes([byte]))
        self.assertEqual(self.handler.messages, [(b"first", True)])

    def test_frame_with_answer(self) -> None:
        """A frame in the packet of the answer is delivered after the opening."""
        self.feed(accept(self.connect()) + frame(TEXT, b"first"))
        self.assertEqual(self.handler.events, ["connecting", "opened", "received"])

    def test_violation_with_answer(self) -> None:
        """A broken frame in the packet of the answer is a violation like any other."""
        self.feed(accept(self.connect()) + frame(3))
        self.assertEqual(self.sent()[0][1][:2], (1002).to_bytes(2, "big"))
        self.transport.lose(ConnectionDone())
        self.assertIsInstance(self.handler.error, PeerViolation)

    def test_dirty_answer(self) -> None:
        """Bytes that are no UTF-8, bare line feeds and HTTP/1.0 in a 101 do no harm."""
        request = self.connect()
        answer = accept(request, "X-Motto: caf\xe9").replace(b"\r\n", b"\n").replace(b"HTTP/1.1", b"HTTP/1.0")
        self.feed(answer)
        self.assertEqual(self.handler.events, ["connecting", "opened"])

    def test_wrong_101(self) -> None:
        """A 101 that does not prove that it understood, or selects what was not offered, is a violation."""
        for spoil in (
            lambda answer: answer.replace(b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: x"),
            lambda answer: answer.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
            lambda answer: answer[:-2] + b"Sec-WebSocket-Protocol: commsmgr.v9\r\n\r\n",
            lambda answer: answer[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
        ):
            self.feed(spoil(accept(self.connect())))
            self.assertTrue(self.transport.aborted)
            self.settle()
            self.assertIs(type(self.handler.error), PeerViolation)
            self.assertNotIn("opened", self.handler.events)
            self.successResultOf(self.client.stop())

    def test_refused(self) -> None:
        """A refusal carries its status and Retry-After, and the connection is dropped at once."""
        self.connect()
        self.feed(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 9999999\r\n\r\n<html>secret")
        self.assertTrue(self.transport.aborted)
        self.feed(b"more")
        self.settle()
        error = self.handler.error
        assert isinstance(error, UpgradeRefused)
        self.assertEqual((error.status, error.retry_after), (503, 7.0))
        self.assertNotIn("secret", str(error))

    def test_retry_after_date(self) -> None:
        """A Retry-After that is a date is measured against the wall clock, not the reactor's."""
        self.connect()
        self.feed(b"HTTP/1.1 429 Slow\r\nRetry-After: Tue, 14 Nov 2023 22:14:20 GMT\r\n\r\n")
        self.settle()
        self.assertEqual(self.handler.error.retry_after, 60.0)

    def test_not_http(self) -> None:
        """What is not HTTP is recognised by its first bytes, and an endless head by its size."""
        endless = b"HTTP/1.1 200 OK\r\nX: " + b"a" * 17000
        for data, expected in ((b"220 smtp", UpgradeRefused), (endless, PeerViolation)):
            self.connect()
            self.feed(data)
            self.assertTrue(self.transport.aborted)
            self.settle()
            self.assertIs(type(self.handler.error), expected)
            self.successResultOf(self.client.stop())


class OpenTests(MemoryTestCase):
    """What happens on an open connection."""

    def test_send(self) -> None:
        """Messages of every length leave as one masked text frame each, send_many in one write."""
        connection = self.open()
        writes: list[object] = []
        self.patch(self.transport, "writeSequence", lambda frames: writes.append(b"".join(frames)))
        payloads = [b"", b"a", b"b" * 125, b"c" * 126, b"d" * 1501, b"e" * 65535, b"f" * 65536]
        self.assertTrue(connection.send_many(payloads))
        self.assertEqual(len(writes), 1)
        self.assertEqual(read_frames(writes[0]), [(TEXT, payload) for payload in payloads])

    def test_masks(self) -> None:
        """Each frame has a mask of its own, from the source that was passed in; so is the key that comes first."""
        count = iter(range(1000))
        self.client = self.make_client(entropy=lambda size: bytes(next(count) for _ in range(size)))
        request = self.connect()
        self.assertIn(b"Sec-WebSocket-Key: " + b64encode(bytes(range(16))) + b"\r\n", request)
        self.feed(accept(request))
        connection = self.handler.connections[-1]
        connection.send_many([b"a", b"b"])
        connection.ping(b"p")
        data = self.transport.take()
        self.assertEqual(data[2:6] + data[9:13] + data[16:20], bytes(range(16, 28)))

    def test_larger_than_taken(self) -> None:
        """max_message_bytes limits what is taken, not what is sent."""
        connection = self.open()
        self.assertTrue(connection.send(b"x" * 5000))
        self.assertEqual(self.sent(), [(TEXT, b"x" * 5000)])

    def test_receive(self) -> None:
        """Text and binary, whole, fragmented and with a ping in between, are handed on; every packet is heard."""
        self.open()
        heard = self.handler.heard
        self.feed(frame(TEXT, "é".encode()))
        self.feed(frame(BINARY, b"\xff"))
        self.feed(frame(TEXT, b"a", fin=False) + frame(PING, b"?") + frame(0, b"b"))
        self.assertEqual(self.handler.messages, [("é".encode(), True), (b"\xff", False), (b"ab", True)])
        self.assertEqual(self.sent(), [(PONG, b"?")])
        self.assertEqual(self.handler.heard - heard, 3)

    def test_ping(self) -> None:
        """Pings go out, pongs come in, and a ping too large for a control frame is the caller's mistake."""
        connection = self.open()
        self.assertTrue(connection.ping(b"n1"))
        self.assertTrue(connection.ping(b""))
        self.assertEqual(self.sent(), [(PING, b"n1"), (PING, b"")])
        self.feed(frame(PONG, b"n1"))
        self.assertEqual(self.handler.pongs, [b"n1"])
        self.assertRaises(ValueError, connection.ping, b"x" * 126)

    def test_stable(self) -> None:
        """Attempts are counted anew only after stable_after seconds of being open."""
        self.open()
        self.transport.lose(ConnectionLost())
        self.clock.advance(5)
        self.feed(accept(self.endpoint.succeed().take()))
        self.clock.advance(29.9)
        self.assertEqual(self.client.attempts, 2)
        self.clock.advance(0.1)
        self.assertEqual(self.client.attempts, 0)
        self.transport.lose(ConnectionLost())
        self.clock.advance(5)
        self.assertEqual(self.client.attempts, 1)

    def test_lost(self) -> None:
        """An end without a close frame is 1006, and nothing can be sent from then on."""
        connection = self.open()
        self.handler.on["ended"] = lambda connection, error: self.assertFalse(connection.send(b"x"))
        self.transport.lose(ConnectionLost())
        error = self.handler.error
        assert isinstance(error, ClosedByPeer)
        self.assertEqual(error.code, 1006)
        self.assertIs(self.handler.ended[0][0], connection)
        self.assertFalse(connection.ping(b""))
        self.assertFalse(connection.send_many([b"x"]))

    def test_violations(self) -> None:
        """What RFC 6455 or a limit forbids is answered with the right close code, and is a PeerViolation."""
        for data, code in (
            (frame(TEXT, b"x", rsv=4), 1002),
            (frame(TEXT, b"x", mask=b"abcd"), 1002),
            (frame(3, b"x"), 1002),
            (frame(11), 1002),
            (frame(0, b"x"), 1002),
            (frame(PING, b"x", fin=False), 1002),
            (close_frame(1005), 1002),
            (close_frame(999), 1002),
            (frame(CLOSE, b"x"), 1002),
            (close_frame(1000, b"\xff"), 1007),
            (frame(TEXT, b"\xff"), 1007),
            (frame(TEXT, b"\xc3"), 1007),
            (frame(BINARY, b"x" * 1001), 1009),
            (frame(BINARY, b"x" * 1001)[:4], 1009),
            (frame(BINARY, b"x" * 600, fin=False) + frame(0, b"x" * 600), 1009),
        ):
            connection = self.open()
            self.feed(data)
            self.feed(frame(TEXT, b"ignored"))
            opcode, payload = self.sent()[0]
            self.assertEqual((opcode, int.from_bytes(payload[:2], "big")), (CLOSE, code), data)
            self.assertFalse(connection.send(b"x"))
            self.clock.advance(2)
            self.settle()
            self.assertTrue(self.transport.lost)
            self.assertIs(type(self.handler.error), PeerViolation)
            self.assertIn(str(code), str(self.handler.error))
            self.assertEqual(self.handler.messages, [])
            self.successResultOf(self.client.stop())
            self.assert_clean()

    def test_limit_is_inclusive(self) -> None:
        """A message of just max_message_bytes is taken."""
        self.open()
        self.feed(frame(BINARY, b"x" * 1000))
        self.assertEqual(len(self.handler.messages), 1)

    def test_autobahn_fault(self) -> None:
        """Whatever autobahn raises is logged, ends this connection, and does not reach the transport."""
        self.open()
        self.patch(self.transport.protocol._protocol, "processData", lambda: 1 // 0)
        self.feed(b"x")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertIsInstance(self.handler.error, PeerViolation)

    def test_autobahn_fault_in_drop(self) -> None:
        """Even when autobahn fails while it drops, the transport is aborted."""
        connection = self.open()
        self.patch(self.transport.protocol._protocol, "unregisterProducer", lambda: 1 // 0)
        connection.kill(PeerSilent("gone"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertIsInstance(self.handler.error, PeerSilent)

    def test_autobahn_fault_at_connection(self) -> None:
        """The same before the upgrade was sent."""
        self.client.start()
        self.patch(self.client, "protocols", None)
        self.endpoint.succeed()
        self.settle()
        self.clock.advance(20)
        self.settle()
        self.assertIsInstance(self.handler.error, DeadlineExceeded)

    def test_handler_faults(self) -> None:
        """An exception in any callback is logged and ends the connection, with an error that names the callback."""
        for name, data in (
            ("opened", b""),
            ("received", frame(TEXT, b"x")),
            ("pong", frame(PONG)),
            ("heard", b"x"),
        ):
            self.handler.on = {name: lambda *args: 1 // 0}
            self.feed(accept(self.connect()) + data)
            if data:
                self.feed(data)
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1, name)
            self.assertTrue(self.transport.aborted)
            self.settle()
            self.assertIs(type(self.handler.error), ConnectionEnded)
            self.assertIn(f"websocket_{name} failed", str(self.handler.error))
            self.successResultOf(self.client.stop())

    def test_connecting_fault(self) -> None:
        """The same before there is a connection: nothing is begun."""
        self.handler.on["connecting"] = lambda: 1 // 0
        self.client.start()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.dialer.endpoints, [])
        self.assertEqual(self.handler.events, ["connecting", "ended"])

    def test_nothing_after_kill(self) -> None:
        """After a kill nothing that arrives counts, neither what is in the buffer nor what comes later."""
        self.open()
        self.handler.on["received"] = lambda connection, payload: connection.kill(PeerSilent("enough"))
        self.feed(frame(TEXT, b"1") + frame(TEXT, b"2") + frame(PING))
        heard = self.handler.heard
        self.feed(frame(TEXT, b"3"))
        self.settle()
        self.feed(frame(TEXT, b"4"))
        self.assertEqual(self.handler.messages, [(b"1", True)])
        self.assertEqual(self.handler.heard, heard)
        self.assertEqual(self.sent(), [])
        self.assertEqual(self.handler.error.fact, "enough")

    def test_kill_in_heard_and_opened(self) -> None:
        """The owner may kill within any callback."""
        self.handler.on["opened"] = lambda connection: connection.kill(PeerSilent("no"))
        self.feed(accept(self.connect()) + frame(TEXT, b"x"))
        self.settle()
        self.assertEqual(self.handler.messages, [])
        self.clock.advance(5)
        self.handler.on = {"heard": lambda connection: connection.kill(PeerSilent("no"))}
        self.feed(accept(self.endpoint.succeed().take()))
        self.feed(frame(TEXT, b"x"))
        self.settle()
        self.assertEqual(self.handler.messages, [])
        self.assertEqual(len(self.handler.ended), 2)

    def test_kill_twice(self) -> None:
        """The first kill's error counts, and the owner hears of the end once."""
        connection = self.open()
        connection.kill(PeerSilent("first"))
        connection.kill(PeerSilent("second"))
        self.settle()
        connection.kill(PeerSilent("third"))
        self.assertEqual([error.fact for _, error in self.handler.ended], ["first"])

    def test_transport_that_stays(self) -> None:
        """A transport that does not say that it is gone is left to itself after a while, and cannot come back."""
        connection = self.open()
        self.transport.deaf = True
        stopped = self.client.stop(close_within=1)
        self.clock.advance(1)
        self.assertTrue(self.transport.aborted)
        self.assertNoResult(stopped)
        self.clock.advance(5)
        self.successResultOf(stopped)
        self.transport.lose(ConnectionDone())
        self.feed(frame(TEXT, b"x"))
        connection.kill(PeerSilent("x"))
        self.assertEqual(self.handler.events, ["connecting", "opened", "ended"])
        self.assert_clean()

    def test_global_random(self) -> None:
        """The process's random generator is as it was, after all of a conversation."""
        random.seed(7)
        state = random.getstate()
        self.client = self.make_client()
        self.open().send(b"x")
        self.feed(frame(PING) + close_frame(1000))
        self.assertEqual(random.getstate(), state)

    def test_native(self) -> None:
        """The package as installed for the tests has autobahn's native code."""
        self.assertTrue(native_acceleration_active())


class CompressionTests(MemoryTestCase):
    """permessage-deflate, on request of the settings."""

    settings = config.WebSocket(max_message_bytes=1000, compress=True)

    def open_compressed(self):
        request = self.connect()
        self.assertIn(b"Sec-WebSocket-Extensions: permessage-deflate", request)
        self.feed(accept(request, "Sec-WebSocket-Extensions: permessage-deflate"))
        return self.handler.connections[-1]

    @staticmethod
    def deflate(data: bytes) -> bytes:
        compressor = zlib.compressobj(wbits=-15)
        return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def test_both_ways(self) -> None:
        """Messages are compressed both ways; one larger than what is taken may still be sent."""
        connection = self.open_compressed()
        self.assertTrue(connection.send_many([b"a" * 5000, random.Random(1).randbytes(5000).hex().encode()]))
        data = self.transport.take()
        self.assertEqual(data[0], 0xC1)
        self.assertEqual(zlib.decompressobj(wbits=-15).decompress(read_frames(data)[0][1]), b"a" * 5000)
        self.feed(frame(TEXT, self.deflate(b"b" * 1000), rsv=4))
        self.assertEqual(self.handler.messages, [(b"b" * 1000, True)])

    def test_bomb(self) -> None:
        """The limit holds for what a message unpacks to."""
        self.open_compressed()
        self.feed(frame(BINARY, self.deflate(b"b" * 5_000_000)[:900], rsv=4))
        self.assertEqual(self.sent()[0][1][:2], (1009).to_bytes(2, "big"))
        self.assertEqual(self.handler.messages, [])

    def test_limit_after_sending(self) -> None:
        """Having sent something larger does not lift the limit."""
        self.open_compressed().send(b"a" * 5000)
        self.transport.clear()
        self.feed(frame(BINARY, b"x" * 600, fin=False) + frame(0, b"x" * 600))
        self.assertEqual(self.sent()[0][1][:2], (1009).to_bytes(2, "big"))

    def test_corrupt(self) -> None:
        """What cannot be unpacked is refused with 1007."""
        self.open_compressed()
        self.feed(frame(BINARY, b"\xff" * 20, rsv=4))
        self.assertEqual(self.sent()[0][1][:2], (1007).to_bytes(2, "big"))

    def test_refused(self) -> None:
        """A backend may decline, but not select another extension."""
        self.open().send(b"x")
        self.assertEqual(self.sent(), [(TEXT, b"x")])
        self.client.stop()
        self.transport.lose(ConnectionDone())
        self.feed(accept(self.connect(), "Sec-WebSocket-Extensions: permessage-bzip2"))
        self.settle()
        self.assertIsInstance(self.handler.error, PeerViolation)


class ClosingTests(MemoryTestCase):
    """The closing handshake, from either side."""

    def test_peer_closes(self) -> None:
        """Each close code reaches the owner; the frame is echoed; what follows it does not count."""
        for code in (1000, 1001, 1008, 1009, 1011, 1012, 1013, 4401):
            connection = self.open()
            self.feed(close_frame(code, b"why") + frame(TEXT, b"late") + frame(PING))
            self.feed(frame(TEXT, b"later"))
            self.assertEqual(self.sent(), [(CLOSE, code.to_bytes(2, "big") + b"why")])
            self.assertFalse(connection.send(b"x"))
            self.transport.lose(ConnectionDone())
            error = self.handler.error
            assert isinstance(error, ClosedByPeer)
            self.assertEqual(error.code, code)
            self.assertIn("why", str(error))
            self.assertEqual(self.handler.messages, [])
            self.successResultOf(self.client.stop())

    def test_no_status(self) -> None:
        """A close frame without a code is 1005."""
        self.open()
        self.feed(close_frame())
        self.assertEqual(self.sent(), [(CLOSE, b"")])
        self.transport.lose(ConnectionDone())
        self.assertEqual(self.handler.error.code, 1005)

    def test_peer_closes_and_stays(self) -> None:
        """A backend that closes but never drops the connection does not hold us for ever."""
        self.open()
        self.feed(close_frame(1001))
        self.clock.advance(1.9)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(0.1)
        self.settle()
        self.assertTrue(self.transport.aborted)
        self.assertEqual(self.handler.error.code, 1001)

    def test_we_close(self) -> None:
        """close() sends its code; messages and pongs still count until the backend's answer."""
        connection = self.open()
        connection.close(1001, "x" * 200)
        connection.close(4000, "again")
        self.assertEqual(self.sent(), [(CLOSE, (1001).to_bytes(2, "big") + b"x" * 123)])
        self.assertFalse(connection.send(b"x"))
        self.feed(frame(TEXT, b"ack") + frame(PONG, b"p"))
        self.feed(close_frame(1001) + frame(TEXT, b"late"))
        self.assertEqual((self.handler.messages, self.handler.pongs), ([(b"ack", True)], [b"p"]))
        self.transport.lose(ConnectionDone())
        self.assertIs(type(self.handler.error), ConnectionEnded)
        connection.close()

    def test_no_answer(self) -> None:
        """A close frame without an answer is followed by an abort."""
        self.open().close()
        self.clock.advance(2)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertIs(type(self.handler.error), ConnectionEnded)
        self.clock.advance(4)
        self.assertEqual(self.handler.events.count("ended"), 1)

    def test_kill_while_closing(self) -> None:
        """A kill during the closing handshake counts."""
        connection = self.open()
        connection.close()
        connection.kill(PeerSilent("mute"))
        self.settle()
        self.assertIsInstance(self.handler.error, PeerSilent)

    def test_violation_while_closing(self) -> None:
        """A broken frame instead of the answer to our close changes nothing about why it ended."""
        self.open().close()
        self.feed(frame(3))
        self.clock.advance(2)
        self.settle()
        self.assertIs(type(self.handler.error), ConnectionEnded)

    def test_bad_codes(self) -> None:
        """Codes that must not be sent are the caller's mistake."""
        connection = self.open()
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000):
            self.assertRaises(ValueError, connection.close, code)
        self.assertEqual(self.sent(), [])


class RetryTests(MemoryTestCase):
    """When to try again is the handler's decision."""

    def test_delay(self) -> None:
        """The next attempt begins after the delay that the handler returned, and counts."""
        self.connect()
        self.transport.lose(ConnectionLost())
        self.clock.advance(4.99)
        self.assertEqual(len(self.dialer.endpoints), 1)
        self.clock.advance(0.01)
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.assertEqual(self.client.attempts, 2)

    def test_retry_now(self) -> None:
        """The wait can be cut short; at any other time that does nothing."""
        self.client.retry_now()
        self.assertEqual(self.dialer.endpoints, [])
        self.connect()
        self.client.retry_now()
        self.transport.lose(ConnectionLost())
        self.client.retry_now()
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.clock.advance(10)
        self.client.retry_now()
        self.assertEqual(len(self.dialer.endpoints), 2)

    def test_no_hot_loop(self) -> None:
        """Even a delay of zero goes by way of the clock."""
        self.handler.delay = 0
        self.handler.headers = lambda: fail(TokenError())
        self.client.start()
        self.assertEqual(self.client.attempts, 1)
        (call,) = self.clock.getDelayedCalls()
        self.assertEqual(call.getTime(), 0.0)

    def test_bad_delays(self) -> None:
        """A handler that fails to give a sensible delay is logged, and waited for a minute."""
        for delay in (-1, float("nan"), float("inf"), None, "soon"):
            self.handler.delay = delay
            self.connect()
            self.transport.lose(ConnectionLost())
            self.assertEqual(len(self.flushLoggedErrors(ValueError, TypeError)), 1)
            (call,) = self.clock.getDelayedCalls()
            self.assertEqual(call.getTime() - self.clock.seconds(), DELAY_AFTER_FAULT)
            self.successResultOf(self.client.stop())

    def test_as_a_reconnecting_factory(self) -> None:
        """The names that users of ReconnectingClientFactory know do what they say, without its traps."""
        self.client.retry()
        self.assert_clean()
        self.connect()
        self.assertIs(self.client.connector.getDestination().port, 80)
        self.transport.lose(ConnectionLost())
        self.client.retry()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.client.resetDelay()
        self.assertEqual(self.client.attempts, 0)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.client.stopTrying()
        self.client.resetDelay()
        self.client.retry()
        self.assert_clean()
        self.assertEqual(len(self.dialer.endpoints), 1)

    def test_no_protocol_unasked(self) -> None:
        """Without an attempt there is nothing to build, and strangers' connectors are not listened to."""
        self.assertIs(self.client.buildProtocol(None), None)
        self.client.clientConnectionLost(None, None)
        self.assertEqual(self.handler.events, [])


class StopTests(MemoryTestCase):
    """stop() and start() in every phase."""

    def tearDown(self) -> None:
        """However it was stopped: each attempt ended once, and nothing is left."""
        self.assertEqual(self.handler.events.count("connecting"), self.handler.events.count("ended"))
        self.assert_clean()
        self.assertEqual(self.client.numPorts, 0)

    def test_idle(self) -> None:
        """Before the start there is nothing to stop."""
        self.successResultOf(self.client.stop())

    def test_waiting(self) -> None:
        """While waiting, the retry is called off; start() begins at once."""
        self.connect()
        self.transport.lose(ConnectionLost())
        self.successResultOf(self.client.stop())
        self.assert_clean()
        self.client.start()
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.successResultOf(self.client.stop())

    def test_connecting(self) -> None:
        """While connecting, the endpoint is cancelled."""
        self.client.start()
        self.successResultOf(self.client.stop())
        self.assertTrue(self.endpoint.cancelled)
        self.assertIsInstance(self.handler.error, NotRunning)

    def test_connecting_stubborn(self) -> None:
        """An endpoint that takes its time over cancellation is waited for, and its late success is refused."""
        self.dialer.stubborn = True
        self.client.start()
        stopped = self.client.stop()
        self.assertNoResult(stopped)
        self.assertIs(self.endpoint.factory.buildProtocol(None), None)
        self.endpoint.fail(ConnectBindError())
        self.successResultOf(stopped)
        self.assertIsInstance(self.handler.error, NotRunning)

    def test_connecting_in_between(self) -> None:
        """A transport that comes after the stop, for a protocol built before it, is dropped and counts for nothing."""
        self.client.start()
        protocol = self.endpoint.factory.buildProtocol(None)
        self.successResultOf(self.client.stop())
        self.transport.protocol = protocol
        protocol.makeConnection(self.transport)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertEqual(self.handler.events, ["connecting", "ended"])

    def test_connecting_for_ever(self) -> None:
        """One that never answers is given up on; when it answers at last, nobody listens."""
        self.dialer.stubborn = True
        self.client.start()
        stopped = self.client.stop()
        self.clock.advance(5)
        self.successResultOf(stopped)
        first = self.endpoint
        self.dialer.stubborn = False
        self.client.start()
        first.fail(ConnectBindError())
        self.assertEqual(self.handler.events, ["connecting", "ended", "connecting"])
        # It never told its factory that it was done: that is the price.
        self.client.doStop()
        self.successResultOf(self.client.stop())

    def test_upgrading(self) -> None:
        """While the answer is outstanding, the connection is dropped."""
        self.connect()
        stopped = self.client.stop()
        self.assertTrue(self.transport.aborted)
        self.assertNoResult(stopped)
        self.settle()
        self.successResultOf(stopped)
        self.assertIsInstance(self.handler.error, NotRunning)

    def test_open(self) -> None:
        """An open connection gets a closing handshake; the Deferred fires when it is gone."""
        self.open()
        stopped = self.client.stop()
        self.assertEqual(self.sent(), [(CLOSE, b"\x03\xe8")])
        self.feed(close_frame(1000))
        self.assertNoResult(stopped)
        self.transport.lose(ConnectionDone())
        self.successResultOf(stopped)
        self.assertIsInstance(self.handler.error, NotRunning)

    def test_open_half_dead(self) -> None:
        """A backend that does not answer is dropped after close_within."""
        self.open()
        stopped = self.client.stop(close_within=0.5)
        self.clock.advance(0.4)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(0.1)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.successResultOf(stopped)

    def test_closing(self) -> None:
        """A closing handshake under way is hurried, never slowed down."""
        for within, takes in ((10, 2.0), (0.5, 0.5)):
            self.open()
            self.feed(close_frame(1012))
            stopped = self.client.stop(close_within=within)
            self.clock.advance(takes - 0.01)
            self.assertFalse(self.transport.aborted)
            self.clock.advance(0.01)
            self.settle()
            self.successResultOf(stopped)
            self.assertEqual(self.handler.error.code, 1012)

    def test_dropping(self) -> None:
        """A connection that was killed is only waited for."""
        self.open().kill(PeerSilent("x"))
        stopped = self.client.stop()
        self.settle()
        self.successResultOf(stopped)
        self.assertIsInstance(self.handler.error, PeerSilent)

    def test_restart(self) -> None:
        """start() during a stop begins again once the old connection is gone; the stop's Deferred still fires."""
        self.open()
        stopped = self.client.stop()
        self.client.start()
        self.client.start()
        self.assertEqual(len(self.dialer.endpoints), 1)
        self.transport.lose(ConnectionDone())
        self.successResultOf(stopped)
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.successResultOf(self.client.stop())

    def test_restart_and_stop(self) -> None:
        """The last word counts, and everybody who waits hears."""
        self.open()
        first = self.client.stop()
        self.client.start()
        second = self.client.stop()
        self.transport.lose(ConnectionDone())
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(len(self.dialer.endpoints), 1)

    def test_stop_of_a_failing_restart(self) -> None:
        """A stop within the restarted attempt's first callback waits for that attempt, not for the one before."""
        self.open()
        self.client.stop()
        self.client.start()
        results: list[Deferred[None]] = []
        self.dialer.stubborn = True

        def later() -> Deferred[dict[str, str]]:
            self.handler.headers = lambda: succeed({})
            self.clock.callLater(0, lambda: results.append(self.client.stop()))
            return succeed({})

        self.handler.headers = later
        self.transport.lose(ConnectionDone())
        self.settle()
        self.assertNoResult(results[0])
        self.endpoint.fail(ConnectBindError())
        self.successResultOf(results[0])

    def test_start_later(self) -> None:
        """Told to wait before the first attempt it does; a stop, or a need to hurry, ends that wait."""
        self.client.start(after=7.0)
        self.client.start()
        self.assertEqual(self.dialer.endpoints, [])
        self.clock.advance(6.9)
        self.assertEqual(self.dialer.endpoints, [])
        self.clock.advance(0.1)
        self.assertEqual((len(self.dialer.endpoints), self.client.attempts), (1, 1))
        self.client.stop()
        self.clock.advance(10)
        self.client.start(after=7.0)
        self.successResultOf(self.client.stop())
        self.assert_clean()
        self.client.start(after=7.0)
        self.client.retry_now()
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.client.start(after=7.0)
        self.client.stop()
        self.clock.advance(10)
        self.assert_clean()

    def test_start_later_while_closing(self) -> None:
        """While the old connection is being closed there is no further wait."""
        self.connect()
        self.client.stop()
        self.client.start(after=7.0)
        self.clock.advance(0)
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.client.stop()
        self.clock.advance(10)

    def test_start_twice(self) -> None:
        """start() is idempotent."""
        self.client.start()
        self.client.start()
        self.assertEqual(self.handler.events, ["connecting"])
        self.client.stop()

    def test_stop_in_callbacks(self) -> None:
        """The owner may stop, and start again, within any callback."""
        for name in ("connecting", "opened", "received", "ended"):
            stopped: list[Deferred[None]] = []
            self.handler.on = {name: lambda *args, stopped=stopped: stopped.append(self.client.stop())}
            self.client.start()
            if name != "connecting":
                self.feed(accept(self.endpoint.succeed().take()) + frame(TEXT, b"x"))
                self.transport.lose(ConnectionDone())
            self.successResultOf(stopped[0])
            self.assert_clean()

    def test_restart_in_ended(self) -> None:
        """A stop and a start within websocket_ended begin the next attempt without a wait."""

        def again(*args: object) -> None:
            self.handler.on = {}
            self.client.stop()
            self.client.start()

        self.handler.on["ended"] = again
        self.connect()
        self.transport.lose(ConnectionLost())
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.client.stop()

    def test_stop_in_headers(self) -> None:
        """A stop while headers are asked for, from within that very call."""

        def headers() -> Deferred[dict[str, str]]:
            self.client.stop()
            return succeed({})

        self.handler.headers = headers
        self.client.start()
        self.assertEqual(self.dialer.endpoints, [])

    def test_cancelled_stop(self) -> None:
        """Cancelling the Deferred of a stop changes nothing about the stop."""
        self.open()
        stopped = self.client.stop()
        stopped.cancel()
        self.failureResultOf(stopped)
        self.transport.lose(ConnectionDone())
        self.assertEqual(self.client.attempts, 1)
        self.clock.advance(100)
        self.assertEqual(len(self.dialer.endpoints), 1)
