"""The WebSocket client on a virtual clock and in-memory transports: every phase, every policy, no global reactor."""

from __future__ import annotations

import random
import zlib

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError

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

    def test_smoke(self) -> None:
        connection = self.open()
        self.assertTrue(connection.send(b"hello"))
        self.assertEqual(self.sent(), [(TEXT, b"hello")])
        self.feed(frame(TEXT, b"hi"))
        self.assertEqual(self.handler.messages, [(b"hi", True)])
        self.feed(close_frame(1012, b"bye"))
        self.assertEqual(self.sent(), [(CLOSE, b"\x03\xf4bye")])
        self.transport.lose(ConnectionDone())
        self.assertEqual(self.handler.error.code, 1012)
        self.clock.advance(5)
        self.assertEqual(len(self.dialer.endpoints), 2)
        self.successResultOf(self.client.stop())
        self.assert_clean()
