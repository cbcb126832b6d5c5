"""A peer that sends more than the agent is to take: what counts, when it is too much, and what happens then."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import ClosedByPeer, PeerSilent, PeerViolation, RateExceeded
from commsmgr.policy.reconnect import delay
from commsmgr.transport.attempt import LAST_WORDS
from commsmgr.transport.connection import CLOSE_WITHIN, Connection
from commsmgr.transport.guarded import UNIT
from commsmgr.transport.websocket import BURST
from tests.websocket_kit import BINARY, CLOSE, PING, PONG, TEXT, MemoryTestCase, accept, close_frame, frame

CONTINUATION = 0
RATE = 100
MOST = int(BURST * RATE)
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"


class RateTests(MemoryTestCase):
    """On memory transports, a hundred frames a second."""

    settings = config.WebSocket(
        connect_timeout=20.0, stable_after=1e3, max_message_bytes=1 << 20, max_message_rate=RATE, compress=True
    )

    def setUp(self) -> None:
        super().setUp()
        self.handler.delay = 3600.0

    def spend(self, left: int = 0) -> None:
        """Use up what may come at once, but for ``left`` frames; each of these packets begins one."""
        # Those of the upgrade, too.
        while self.client._rate._tokens > left:
            self.feed(frame(PONG))

    def assert_ended(self) -> None:
        """It ends for its rate: nothing more is read, and after a moment a close frame with 1008 goes out."""
        self.assertEqual(self.transport.producerState, "paused")
        self.clock.advance(LAST_WORDS)
        self.assertIn((CLOSE, b"\x03\xf0too many messages"), self.sent())
        self.assertEqual(self.transport.producerState, "paused")
        self.assertEqual(self.handler.ended, [])
        self.clock.advance(CLOSE_WITHIN)
        self.settle()
        self.assertIsInstance(self.handler.error, RateExceeded)
        self.assertIn("websocket.max_message_rate", str(self.handler.error))

    def test_each_kind_of_frame(self) -> None:
        """Messages, pings, pongs and fragments count, empty ones too, all in one packet or each in one of its own."""
        fragments = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * (2 * MOST)
        for flood in (frame(TEXT, b"x"), frame(BINARY), frame(PING), frame(PONG, b"stray"), fragments):
            for step in (None, 2 if flood is fragments else len(flood)):
                self.client = self.make_client()
                self.handler.ended.clear()
                self.handler.messages.clear()
                self.open()
                whole = flood if flood is fragments else flood * (2 * MOST)
                for start in range(0, len(whole), step or len(whole)):
                    self.feed(whole[start : start + (step or len(whole))])
                self.assertLessEqual(len(self.handler.messages), MOST)
                self.assert_ended()

    def test_packets(self) -> None:
        """A frame that trickles in, byte by byte, costs what it costs to take each of them."""
        self.open()
        for byte in frame(TEXT, b"x" * 2 * MOST):
            self.feed(bytes([byte]))
        self.assert_ended()

    def test_packets_of_an_answer(self) -> None:
        """So does an answer to the upgrade; there is no close frame for that yet."""
        for byte in accept(self.connect(), "X: " + "y" * 2 * MOST):
            self.feed(bytes([byte]))
        self.settle()
        self.assertIsInstance(self.handler.error, RateExceeded)

    def test_large_messages(self) -> None:
        """A message counts by its size too, whatever it took on the wire."""
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(b"0" * (1 << 20)) + packer.flush(zlib.Z_SYNC_FLUSH)
        for flood in (frame(TEXT, b"0" * (1 << 20)), frame(TEXT, packed[:-4], rsv=4)):
            self.client = self.make_client()
            self.handler.ended.clear()
            self.handler.messages.clear()
            self.open(DEFLATE)
            units = (1 << 20) // UNIT
            for _ in range(2 * MOST // units + 1):
                self.feed(flood)
            # What is left pays for one, however large; the next one finds nothing.
            self.assertEqual(len(self.handler.messages), 1 + MOST // units)
            self.assertEqual(max(map(len, (payload for payload, _ in self.handler.messages))), 1 << 20)
            self.assert_ended()

    def test_within_the_rate(self) -> None:
        """At the rate, for ten minutes, nothing happens."""
        self.open()
        for _ in range(600):
            self.feed(frame(TEXT, b"x") * RATE)
            self.clock.advance(1.001)
        self.assertEqual(len(self.handler.messages), 600 * RATE)
        self.assertEqual(self.handler.ended, [])

    def test_answers(self) -> None:
        """What answers something of ours costs nothing."""
        connection = self.open()
        self.handler.on["received"] = lambda *_: connection.answered()
        self.feed(frame(TEXT, b"ack") * (10 * MOST))
        self.assertEqual(len(self.handler.messages), 10 * MOST)
        self.assertEqual(self.handler.ended, [])

    def test_no_limit(self) -> None:
        """With 0 as much as wants to may come."""
        self.client = self.make_client(settings=config.WebSocket(max_message_rate=0))
        self.open()
        self.feed(frame(TEXT, b"x") * (10 * MOST))
        self.assertEqual(len(self.handler.messages), 10 * MOST)

    def test_one_bucket_for_all_connections(self) -> None:
        """Whoever hangs up in time and takes the next connection gets nothing anew."""
        self.open()
        self.spend(left=10)
        self.feed(close_frame(1000))
        self.transport.lose(Exception())
        self.assertIsInstance(self.handler.error, ClosedByPeer)
        self.handler.ended.clear()
        self.client.retry_now()
        self.feed(accept(self.endpoint.succeed().take()))
        self.feed(frame(PONG) * 20)
        self.assert_ended()

    def test_last_words(self) -> None:
        """What came in time can still be answered, before the close frame."""
        connection = self.open()
        self.feed(frame(TEXT, b"x") * (2 * MOST))
        self.clock.advance(LAST_WORDS / 2)
        self.assertTrue(connection.send(b"ack"))
        self.clock.advance(LAST_WORDS / 2)
        self.assertEqual(self.sent()[-2:], [(TEXT, b"ack"), (CLOSE, b"\x03\xf0too many messages")])
        self.assertFalse(connection.send(b"ack"))

    def test_other_ends_meanwhile(self) -> None:
        """Whatever else ends it then, it ended for its rate, and is kept away for that."""
        ends: dict[str, Callable[[Connection], object]] = {
            "hangs up": lambda _: self.transport.lose(Exception()),
            "says goodbye, one frame too late": lambda _: None,
            "does not read": lambda connection: connection.kill(PeerSilent("x")),
        }
        for name, end in ends.items():
            self.client = self.make_client()
            self.handler.ended.clear()
            connection = self.open()
            self.spend()
            self.feed(frame(CLOSE))
            end(connection)
            self.clock.advance(LAST_WORDS)
            self.clock.advance(CLOSE_WITHIN)
            self.settle()
            self.assertIsInstance(self.handler.error, RateExceeded, name)

    def test_while_closing(self) -> None:
        """A flood instead of the answer to our close frame drops the connection, and does not change the reason."""
        self.open()
        self.feed(frame(3))
        self.assertFalse(self.transport.aborted)
        self.feed(frame(PONG) * (2 * MOST))
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertIsInstance(self.handler.error, PeerViolation)
        self.assertNotIsInstance(self.handler.error, RateExceeded)

    def test_nothing_is_heard_afterwards(self) -> None:
        """What comes after the limit is not looked at, even if it were wrong."""
        self.open()
        self.spend()
        self.feed(frame(TEXT) + frame(TEXT, b"y") + b"\xff\xff")
        self.feed(b"\xff\xff" + close_frame(1000))
        self.assertEqual(self.handler.messages, [])
        self.assert_ended()

    def test_memory_of_fragments(self) -> None:
        """A message in the smallest pieces, of frames and of packets, takes no more memory than in one piece."""
        self.client = self.make_client(settings=config.WebSocket(max_message_rate=0))
        self.open()
        pieces = {
            "empty frames": frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 20_000,
            "frames of two bytes": frame(CONTINUATION, b"xx", fin=False) * 20_000,
        }
        for name, block in pieces.items():
            tracemalloc.start()
            for start in range(0, len(block), 6_000):
                self.feed(block[start : start + 6_000])
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertLess(held, 100_000, name)
        self.feed(frame(CONTINUATION))
        self.assertEqual(self.handler.messages, [(b"xx" * 20_000, True)])
        long = frame(TEXT, bytes(1 << 20))
        self.feed(long[:10])
        tracemalloc.start()
        for start in range(10, 40_000, 2):
            self.feed(long[start : start + 2])
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(held, 100_000)


class ReconnectTests(SynchronousTestCase):
    """After such an end."""

    def test_slow_path(self) -> None:
        """The next attempt waits as if the backend had refused us, however few failed before."""
        random = Random(1)
        for attempt in (0, 1, 5):
            waits = [
                delay(RateExceeded(), attempt, settings=config.Reconnect(), refused_delay=60.0, random=random)
                for _ in range(100)
            ]
            self.assertTrue(all(30 <= wait <= 90 for wait in waits), waits)
            self.assertGreater(max(waits) - min(waits), 30)
