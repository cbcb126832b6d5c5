"""Answers to the upgrade, and compressed messages, that are meant to do harm: refused, and bounded in memory."""

from __future__ import annotations

import tracemalloc
import zlib

from twisted.internet.error import ConnectionDone

from commsmgr import config
from commsmgr.errors import PeerViolation, UpgradeRefused
from commsmgr.transport.answer_head import MAX_HEAD_BYTES
from tests.websocket_kit import TEXT, MemoryTestCase, accept, frame

LIMIT = 100_000
"""The largest message taken in these tests."""
EXTENSION = "Sec-WebSocket-Extensions: "


class UpgradeTests(MemoryTestCase):
    """The answer to the upgrade."""

    settings = config.WebSocket(connect_timeout=20.0, max_message_bytes=LIMIT, compress=True, max_message_rate=0)

    def refused(self, *answers: bytes) -> Exception:
        """Return the error with which these answers to one request end the attempt."""
        self.connect()
        for answer in answers:
            if not self.transport.aborted:
                self.feed(answer)
        self.assertTrue(self.transport.aborted)
        self.settle()
        self.assertNotIn("opened", self.handler.events)
        error = self.handler.error
        self.successResultOf(self.client.stop())
        self.assert_clean()
        return error

    def test_without_end(self) -> None:
        """Whatever has no end is given up at the same bound, in one packet or in many."""
        for first, piece in (
            (b"HTTP/1.1 101 ", b"x"),
            (b"HTTP/1.1 101 Switching\r\n", b"x"),
            (b"HTTP/1.1 101 Switching\r\n", b"X: y\r\n"),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            (b"", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"),
        ):
            pieces = MAX_HEAD_BYTES // len(piece) + 2
            for answers in ([first + piece * pieces], [first, *[piece] * pieces], [first, *[piece * 40] * pieces]):
                error = self.refused(*filter(None, answers))
                self.assertIs(type(error), PeerViolation)
                self.assertIn(str(MAX_HEAD_BYTES), str(error))

    def test_interim_answers_in_bounds(self) -> None:
        """Some interim answers are none of our business."""
        request = self.connect()
        self.feed(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" * 100 + accept(request))
        self.assertEqual(self.handler.events, ["connecting", "opened"])

    def test_two_answers(self) -> None:
        """What follows the answer are frames; another answer is none."""
        request = self.connect()
        self.feed(accept(request) + accept(request))
        self.assertEqual(self.sent()[0][1][:2], (1002).to_bytes(2, "big"))
        self.transport.lose(ConnectionDone())
        self.assertIsInstance(self.handler.error, PeerViolation)
        self.assertEqual(self.handler.messages, [])

    def test_contradictions(self) -> None:
        """A 101 that says two things is not to be believed, whichever of them is right."""
        for field in (
            "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
            "Sec-WebSocket-Protocol: commsmgr.v1\r\nSec-WebSocket-Protocol: commsmgr.v1",
            "Sec-WebSocket-Protocol: commsmgr.v1, chat",
            EXTENSION + "permessage-deflate\r\n" + EXTENSION + "permessage-deflate",
            EXTENSION + "permessage-deflate, permessage-deflate",
            EXTENSION + "permessage-deflate, x-webkit-deflate-frame",
        ):
            request = self.connect()
            self.feed(accept(request, field))
            self.assertTrue(self.transport.aborted, field)
            self.settle()
            self.assertIs(type(self.handler.error), PeerViolation, field)
            self.successResultOf(self.client.stop())

    def test_parameters(self) -> None:
        """Parameters of the compression that were not offered, or have no such value (RFC 7692 section 7.1)."""
        for parameters in (
            "server_max_window_bits=7",
            "server_max_window_bits=16",
            "server_max_window_bits=99999999999999999999",
            "server_max_window_bits=x",
            "server_max_window_bits=9; server_max_window_bits=15",
            "client_max_window_bits=7",
            "client_max_window_bits",
            "server_no_context_takeover=1",
            "server_no_context_takeover; server_no_context_takeover",
            "memory_level=9",
        ):
            request = self.connect()
            self.feed(accept(request, f"{EXTENSION}permessage-deflate; {parameters}"))
            self.assertTrue(self.transport.aborted, parameters)
            self.settle()
            self.assertIs(type(self.handler.error), PeerViolation, parameters)
            self.successResultOf(self.client.stop())
        self.assertEqual(self.handler.events.count("opened"), 0)

    def test_not_http(self) -> None:
        """What is not HTTP from the first byte on is refused at it."""
        self.assertIsInstance(self.refused(b"S"), UpgradeRefused)


class BombTests(MemoryTestCase):
    """Small on the wire, large in memory."""

    settings = config.WebSocket(max_message_bytes=LIMIT, compress=True, max_message_rate=0)

    def bomb(self, bits: int = 15) -> bytes:
        """Return ten megabytes of zeros, compressed."""
        packer = zlib.compressobj(level=9, wbits=-bits)
        return (packer.compress(bytes(10_000_000)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def test_bombs(self) -> None:
        """However a bomb is packed and cut up, no more of it is unpacked than is allowed, and the connection ends."""
        whole = self.bomb()
        for parameters, bits in (
            ("", 15),
            ("; server_no_context_takeover", 15),
            ("; client_no_context_takeover", 15),
            ("; server_no_context_takeover; server_max_window_bits=9", 9),
            ("; server_max_window_bits=9", 15),  # a lie
        ):
            data = whole if bits == 15 else self.bomb(bits)
            for size in (len(data), 100):
                pieces = [data[start : start + size] for start in range(0, len(data), size)]
                frames = frame(TEXT, pieces[0], fin=len(pieces) == 1, rsv=4)
                frames += b"".join(frame(0, piece, fin=False) for piece in pieces[1:])
                self.feed(accept(self.connect(), f"{EXTENSION}permessage-deflate{parameters}"))
                self.transport.clear()
                tracemalloc.start()
                for start in range(0, len(frames), 60_000):
                    self.feed(frames[start : start + 60_000])
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                self.assertEqual(self.handler.messages, [])
                self.assertEqual(self.sent()[0][1][:2], (1009).to_bytes(2, "big"), (parameters, size))
                self.assertLess(peak, 10 * LIMIT, (parameters, size))
                self.client.stop()
                self.transport.lose(ConnectionDone())
                self.assertIsInstance(self.handler.error, PeerViolation)

    def test_many_small_ones(self) -> None:
        """With what came before as a dictionary, each of many messages is still measured by what it unpacks to."""
        self.feed(accept(self.connect(), f"{EXTENSION}permessage-deflate"))
        packer = zlib.compressobj(wbits=-15)
        for size, taken in ((LIMIT, 1), (LIMIT, 2), (LIMIT + 1, 2)):
            data = packer.compress(b"0" * size) + packer.flush(zlib.Z_SYNC_FLUSH)
            self.feed(frame(TEXT, data[:-4], rsv=4))
            self.assertEqual(len(self.handler.messages), taken)
        self.assertEqual(self.sent()[0][1][:2], (1009).to_bytes(2, "big"))
