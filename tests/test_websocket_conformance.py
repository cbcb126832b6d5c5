"""
RFC 6455 as seen from the link: what a server's frames come to, after autobahn and what stands around it.

The sections are those of the Autobahn test suite. Each case is what the server sends and what has to come of it: the
messages that reach the handler, the pongs, and the end. Each is played in one packet, and again byte by byte; and all
of that also with autobahn alone, without the short way of plain frames (:mod:`commsmgr.transport.frames`): the verdicts
are the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.monkey import MonkeyPatcher

from commsmgr import config
from commsmgr.errors import ClosedByPeer, NotRunning, PeerViolation
from commsmgr.transport import guarded
from commsmgr.transport.connection import CLOSE_WITHIN, Connection
from commsmgr.transport.frames import unfragmented_texts
from tests.fuzz import rfc6455
from tests.websocket_kit import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    MemoryDialer,
    MemoryTestCase,
    RecordingHandler,
    close_frame,
    frame,
)

LIMIT = 100_000
MORE = 0
OPEN = 0


@dataclass(frozen=True)
class Case:
    """
    What the server sends, and what has to come of it.

    :ivar messages: those that reach the handler, each with whether it is text.
    :ivar pongs: the payloads that we answer.
    :ivar fails: the code with which we fail the connection; 0 when we do not.
    :ivar closed: the code of the server's close frame as the handler hears of it; 0 when there is none.
    """

    name: str
    sent: bytes
    messages: tuple[tuple[bytes, bool], ...] = ()
    pongs: tuple[bytes, ...] = ()
    fails: int = 0
    closed: int = 0


def text(payload: str | bytes, *cuts: int) -> bytes:
    """Return a text message, fragmented at ``cuts``."""
    return message(TEXT, payload.encode() if isinstance(payload, str) else payload, *cuts)


def message(opcode: int, payload: bytes, *cuts: int) -> bytes:
    """Return a message, fragmented at ``cuts``."""
    ends = [*cuts, len(payload)]
    starts = [0, *cuts]
    return b"".join(
        frame(opcode if index == 0 else MORE, payload[start:end], fin=index == len(cuts))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def header(opcode: int, length: bytes, *, fin: bool = True) -> bytes:
    """Return the beginning of a frame with its length written as it is given."""
    return bytes([(0x80 if fin else 0) | opcode]) + length


class ConformanceTestCase(MemoryTestCase):
    """Plays cases, each on a connection of its own, and looks at everything that came of it."""

    settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=LIMIT, max_message_rate=0)
    extension = ""

    def setUp(self) -> None:
        super().setUp()
        self.logged: list[LogEvent] = []
        globalLogPublisher.addObserver(self.logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.logged.append)

    def fresh(self) -> None:
        """Make a new client, with nothing left of the last one."""
        self.clock = Clock()
        self.handler = RecordingHandler()
        self.handler.delay = 60.0
        self.dialer = MemoryDialer(self.clock)
        self.client = self.make_client()
        self.open(*[self.extension] * bool(self.extension))

    def play(self, cases: Iterable[Case], *, sizes: tuple[int, ...] = (0, 1)) -> None:
        """
        Play each case, on both ways.

        :param sizes: of the packets in which it comes, one after the other; 0 for one packet.
        """
        played = 0
        for case in cases:
            for size, short_way in product(sizes, (True, False)):
                with self.way(short_way):
                    self.fresh()
                    self.feed_in(case.sent, size or len(case.sent) or 1)
                    self.judge(case, f"{case.name}, in packets of {size or 'any size'}, short way: {short_way}")
                played += 1
        self.assertGreater(played, 0)

    @contextmanager
    def way(self, short: bool) -> Iterator[None]:
        """Let plain frames take their short way, or leave them to autobahn like all others."""
        patcher = MonkeyPatcher()
        if not short:
            patcher.addPatch(guarded, "unfragmented_texts", lambda data, limit: ([], 0))
        patcher.patch()
        try:
            yield
        finally:
            patcher.restore()

    def feed_in(self, sent: bytes, size: int) -> None:
        """The server sends, until we hang up."""
        for at in range(0, len(sent), size):
            if self.transport.aborted or self.transport.lost:
                break
            self.feed(sent[at : at + size])

    def judge(self, case: Case, name: str) -> None:
        """See that everything that should have come of a case has, and nothing else."""
        self.assertEqual(self.handler.messages, list(case.messages), f"{name}: messages")
        frames = self.sent()
        self.assertEqual(tuple(data for opcode, data in frames if opcode == PONG), case.pongs, f"{name}: pongs")
        closes = [int.from_bytes(data[:2], "big") if data else 1005 for opcode, data in frames if opcode == CLOSE]
        expected = [case.fails or case.closed] if case.fails or case.closed else []
        self.assertEqual(closes, expected, f"{name}: close frames")
        self.assertEqual([opcode for opcode, _ in frames if opcode not in (PONG, CLOSE)], [], f"{name}: frames")
        self.ends(case, name)

    def ends(self, case: Case, name: str) -> None:
        """See that the handler hears of one end, of the right kind, and that nothing is left or logged."""
        if not (case.fails or case.closed):
            self.assertEqual(self.handler.ended, [], f"{name}: still open")
            stopped = self.client.stop()
            self.feed(close_frame(1000))
            self.transport.lose(ConnectionDone())
            self.settle()
            self.successResultOf(stopped)
            self.assertIsInstance(self.handler.error, NotRunning, name)
        else:
            # The server has to hang up; this one does not.
            self.clock.advance(CLOSE_WITHIN)
            self.settle()
            self.successResultOf(self.client.stop())
            kind = PeerViolation if case.fails else ClosedByPeer
            self.assertIsInstance(self.handler.error, kind, f"{name}: {self.handler.error}")
            if case.closed:
                assert isinstance(self.handler.error, ClosedByPeer)
                self.assertEqual(self.handler.error.code, case.closed, name)
        self.assertEqual(len(self.handler.ended), 1, f"{name}: ends")
        self.assertEqual(self.handler.events.count("ended"), 1, name)
        self.assertEqual(self.handler.events[-1], "ended", f"{name}: events after the end")
        self.assert_clean()
        wrong = [formatEvent(event) for event in self.logged if event["log_level"] >= LogLevel.error]
        self.assertEqual(wrong, [], f"{name}: logged")


def whole(opcode: int, payload: bytes) -> Case:
    """Return the case of one message in one frame."""
    return Case(f"{len(payload)} bytes with opcode {opcode}", frame(opcode, payload), ((payload, opcode == TEXT),))


class FramingTests(ConformanceTestCase):
    """1: messages in one frame."""

    def test_sizes(self) -> None:
        """1.1, 1.2: text and binary messages of each way to write a length arrive as they are."""
        self.play(whole(kind, b"*" * size) for kind in (TEXT, BINARY) for size in (0, 1, 125, 126, 127, 128))

    def test_large(self) -> None:
        """1.1.6 and on: so do large ones, in one packet and in small ones."""
        cases = [
            whole(kind, b"\xfe" * size if kind == BINARY else b"*" * size)
            for kind in (TEXT, BINARY)
            for size in (65535, 65536)
        ]
        self.play(cases, sizes=(0, 997))

    def test_many(self) -> None:
        """Many messages in one packet arrive in order."""
        payloads = [str(number).encode() for number in range(100)]
        sent = b"".join(frame(TEXT, payload) for payload in payloads)
        self.play([Case("many", sent, tuple((payload, True) for payload in payloads))])

    def test_masked(self) -> None:
        """Section 5.1: a server must not mask, and we say so."""
        for opcode in (TEXT, BINARY, CLOSE, PING, PONG):
            self.play([Case(f"masked {opcode}", frame(opcode, b"", mask=b"\1\2\3\4"), fails=1002)])

    def test_lengths(self) -> None:
        """Section 5.2: a length is written as short as it can be, and has 63 bits."""
        lengths = {
            "0 in two bytes": b"\x7e" + (0).to_bytes(2, "big"),
            "125 in two bytes": b"\x7e" + (125).to_bytes(2, "big") + b"*" * 125,
            "125 in eight bytes": b"\x7f" + (125).to_bytes(8, "big") + b"*" * 125,
            "65535 in eight bytes": b"\x7f" + (65535).to_bytes(8, "big"),
            "2 to the 63": b"\x7f" + (1 << 63).to_bytes(8, "big"),
            "2 to the 64 less one": b"\x7f" + b"\xff" * 8,
        }
        for opcode in (TEXT, BINARY):
            self.play(Case(name, header(opcode, length), fails=1002) for name, length in lengths.items())


class PingTests(ConformanceTestCase):
    """2: pings and pongs."""

    def test_sizes(self) -> None:
        """2.1 to 2.4: a ping of up to 125 bytes is answered with the same bytes, whatever they are."""
        payloads = [b"", b"Hello", bytes.fromhex("00fffefdfcfb00ff"), b"\xfe" * 125]
        self.play(Case(f"{len(each)} bytes", frame(PING, each), pongs=(each,)) for each in payloads)

    def test_too_long(self) -> None:
        """2.5: one of 126 bytes fails the connection, and so does such a pong."""
        self.play(Case("too long", frame(opcode, b"\xfe" * 126), fails=1002) for opcode in (PING, PONG))

    def test_unsolicited_pongs(self) -> None:
        """2.7 to 2.9: a pong that nobody asked for changes nothing, and a ping after it is answered."""
        sent = frame(PONG, b"unasked") + frame(PONG) + frame(PING, b"asked") + frame(TEXT, b"then")
        self.play([Case("pongs", sent, ((b"then", True),), (b"asked",))])
        self.assertEqual(self.handler.pongs, [b"unasked", b""])

    def test_many(self) -> None:
        """2.10, 2.11: ten pings are ten pongs, in order."""
        payloads = tuple(f"payload-{number}".encode() for number in range(10))
        self.play([Case("ten", b"".join(frame(PING, payload) for payload in payloads), pongs=payloads)])


class ReservedBitsTests(ConformanceTestCase):
    """3: reserved bits without an extension that gives them a meaning."""

    def test_every_combination(self) -> None:
        """3.1 to 3.7: any of the three fails the connection, in every kind of frame, after what came before it."""
        for rsv in range(1, 8):
            for opcode in (TEXT, BINARY, CLOSE, PING, PONG):
                sent = frame(TEXT, b"before") + frame(opcode, b"", rsv=rsv) + frame(TEXT, b"after")
                self.play([Case(f"RSV {rsv} with {opcode}", sent, ((b"before", True),), fails=1002)])

    def test_within_a_message(self) -> None:
        """So does any in a continuation."""
        for rsv in range(1, 8):
            sent = frame(TEXT, b"a", fin=False) + frame(MORE, b"b", rsv=rsv)
            self.play([Case(f"RSV {rsv}", sent, fails=1002)])


class OpcodeTests(ConformanceTestCase):
    """4: opcodes that mean nothing."""

    def test_reserved(self) -> None:
        """4.1, 4.2: each of them fails the connection, with a payload and without, after what came before."""
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
            for payload in (b"", b"reserved"):
                sent = frame(TEXT, b"before") + frame(opcode, payload) + frame(PING, b"after")
                self.play([Case(f"opcode {opcode}", sent, ((b"before", True),), fails=1002)])

    def test_within_a_message(self) -> None:
        """So does one between fragments."""
        for opcode in (3, 7, 11, 15):
            sent = frame(TEXT, b"a", fin=False) + frame(opcode) + frame(MORE, b"b")
            self.play([Case(f"opcode {opcode}", sent, fails=1002)])


class FragmentationTests(ConformanceTestCase):
    """5: messages in several frames."""

    def test_control_frames(self) -> None:
        """5.1, 5.2: a control frame is never fragmented."""
        for opcode in (PING, PONG, CLOSE):
            sent = frame(opcode, fin=False) + frame(MORE)
            self.play([Case(f"fragmented {opcode}", sent, fails=1002)])

    def test_fragments(self) -> None:
        """5.3 to 5.8: fragments become one message, with and without pings between them."""
        payload = b"fragment1fragment2fragment3"
        for kind in (TEXT, BINARY):
            arrives = ((payload, kind == TEXT),)
            one, two, three = (
                frame(kind, payload[:9], fin=False),
                frame(MORE, payload[9:18], fin=False),
                frame(MORE, payload[18:]),
            )
            ping = frame(PING, b"ping")
            self.play(
                [
                    Case("three", one + two + three, arrives),
                    Case("a ping between", one + ping + two + three, arrives, (b"ping",)),
                    Case("pings everywhere", ping + one + ping + two + ping + three + ping, arrives, (b"ping",) * 4),
                    Case("a pong between", one + frame(PONG, b"x") + two + three, arrives),
                    Case("a fragment a byte", message(kind, payload, *range(1, len(payload))), arrives),
                ]
            )

    def test_empty_fragments(self) -> None:
        """6.1: empty fragments, first, last, between, and nothing but them."""
        empty = frame(MORE, fin=False)
        self.play(
            [
                Case("all", frame(TEXT, fin=False) + empty + frame(MORE), ((b"", True),)),
                Case("around", frame(TEXT, fin=False) + frame(MORE, b"x", fin=False) + frame(MORE), ((b"x", True),)),
                Case("many", frame(BINARY, b"x", fin=False) + empty * 500 + frame(MORE, b"y"), ((b"xy", False),)),
            ]
        )

    def test_order(self) -> None:
        """5.9 to 5.20: a continuation of nothing, and a message that begins within another, fail the connection."""
        first, last = frame(TEXT, b"a", fin=False), frame(MORE, b"b")
        self.play(
            [
                Case("last of nothing", last, fails=1002),
                Case("more of nothing", frame(MORE, b"a", fin=False) + frame(TEXT, b"b"), fails=1002),
                Case("continued after the end", first + last + last, ((b"ab", True),), fails=1002),
                Case("text within text", first + frame(TEXT, b"c") + last, fails=1002),
                Case("binary within text", first + frame(BINARY, b"c", fin=False) + last, fails=1002),
                Case("text within binary", frame(BINARY, b"a", fin=False) + first, fails=1002),
            ]
        )


BAD_UTF8 = {
    "a byte that is none": b"\xff",
    "a continuation alone": b"\x80",
    "many continuations": b"\x80\xbf" * 5,
    "a lead without more": b"\xc3 ",
    "three of which one is missing": b"\xe2\x82 ",
    "four of which one is missing": b"\xf0\x9f\x98 ",
    "overlong of two": b"\xc0\xaf",
    "overlong NUL": b"\xc0\x80",
    "overlong of three": b"\xe0\x80\xaf",
    "overlong of four": b"\xf0\x80\x80\xaf",
    "largest overlong": b"\xf0\x8f\xbf\xbf",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "first surrogate": b"\xed\xa0\x80",
    "last surrogate": b"\xed\xbf\xbf",
    "a pair of surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "Greek with a surrogate": b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
}

GOOD_UTF8 = {
    "Greek": "κόσμε",
    "noncharacters": "\ufffe\uffff\U0001fffe\U0001ffff\U0010ffff\ufdd0",
    "next to the surrogates": "\ud7ff\ue000",
    "the first of each length": "\0\x80\u0800\U00010000",
    "the last of each length": "\x7f\u07ff\uffff\U0010ffff",
    "a replacement character": "\ufffd",
    "everyday": "Hello-µ@ßöäüàá-UTF-8!! 😀",
}


class UTF8Tests(ConformanceTestCase):
    """6: text."""

    def test_valid(self) -> None:
        """6.2, 6.5 and on: text arrives, whole and cut between any two bytes, whatever it is that is cut."""
        for name, good in GOOD_UTF8.items():
            payload = good.encode()
            ways = [text(payload), text(payload, *range(1, len(payload)))]
            ways += [text(payload, cut) for cut in range(1, len(payload))]
            self.play(Case(name, sent, ((payload, True),)) for sent in ways)

    def test_invalid(self) -> None:
        """6.3 and on: what is no UTF-8 fails the connection with 1007, whole and in fragments, and reaches nobody."""
        for name, bad in BAD_UTF8.items():
            payload = b"good" + bad
            ways = [text(payload), text(payload, *range(1, len(payload))), text(payload, 4) + text("after")]
            self.play(Case(name, sent, fails=1007) for sent in ways)

    def test_binary(self) -> None:
        """The same bytes in a binary message are nobody's business."""
        self.play(Case(name, message(BINARY, bad, 1), ((bad, False),)) for name, bad in BAD_UTF8.items())

    def test_unterminated(self) -> None:
        """6.1, 6.12: what is cut off at the end of a message is not UTF-8 either."""
        for character in ("é", "€", "😀"):
            for size in range(1, len(character.encode())):
                cut = character.encode()[:size]
                self.play([Case(f"{size} of {character}", text(cut), fails=1007)])
                self.play([Case(f"{size} of {character}", frame(TEXT, cut, fin=False) + frame(MORE), fails=1007)])

    def test_fails_fast(self) -> None:
        """6.4: what cannot become UTF-8 any more fails the connection before the message, or the frame, is whole."""
        start = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xf4\x90"
        self.play(
            [
                Case("in a fragment", frame(TEXT, start, fin=False), fails=1007),
                Case("in a frame", frame(TEXT, start + b"\x80" * 100)[: 2 + len(start)], fails=1007),
            ]
        )


REFUSED_CODES = (0, 1, 999, 1004, 1005, 1006, 1014, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
TAKEN_CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 3000, 3999, 4000, 4999)


class CloseTests(ConformanceTestCase):
    """7: the end."""

    def test_answered(self) -> None:
        """7.1, 7.3: a close frame is answered with its code, and nothing that comes after it counts."""
        after = frame(TEXT, b"after") + frame(PING, b"after") + close_frame(1001) + frame(3)
        self.play(
            [
                Case("nothing but", close_frame(1000), closed=1000),
                Case("with a reason", close_frame(1000, b"Hello World!"), closed=1000),
                Case("the longest reason", close_frame(1000, b"*" * 123), closed=1000),
                Case("after a message", text("before") + close_frame(1000), ((b"before", True),), closed=1000),
                Case("before others", close_frame(1000) + after, closed=1000),
                Case("twice", close_frame(1000) * 2, closed=1000),
                Case("within a message", frame(TEXT, b"a", fin=False) + close_frame(1000) + frame(MORE), closed=1000),
                Case("after a ping", frame(PING, b"?") + close_frame(1001), pongs=(b"?",), closed=1001),
            ]
        )

    def test_without_a_code(self) -> None:
        """7.3.1: one without a code is answered by one without a code, and the handler hears 1005."""
        self.play([Case("empty", close_frame(), closed=1005)])

    def test_malformed(self) -> None:
        """7.3.2, 7.3.6, 7.5.1: one byte, a reason that is too long, or not UTF-8, are violations."""
        self.play([Case("one byte", frame(CLOSE, b"\x03"), fails=1002)])
        self.play([Case("too long", close_frame(1000, b"*" * 124), fails=1002)])
        self.play(Case(name, close_frame(1000, bad), fails=1007) for name, bad in BAD_UTF8.items())

    def test_codes(self) -> None:
        """7.7, 7.9, 7.13: codes that may be sent are answered, and those that may not are violations."""
        self.play(Case(f"{code}", close_frame(code), closed=code) for code in TAKEN_CODES)
        self.play(Case(f"{code}", close_frame(code), fails=1002) for code in REFUSED_CODES)

    def test_after_a_violation(self) -> None:
        """Once we have failed the connection, the server's close frame is no other end."""
        self.play([Case("both", frame(3) + close_frame(1000), fails=1002)])

    def test_after_ours(self) -> None:
        """Once we have closed, messages still arrive until the server's close frame, which is not answered again."""
        for code in (1000, 4000):
            self.fresh()
            self.handler.connections[0].close(code, "enough")
            self.assertEqual([opcode for opcode, _ in self.sent()], [CLOSE])
            self.feed(frame(TEXT, b"late") + close_frame(code) + frame(TEXT, b"too late"))
            self.assertEqual(self.handler.messages, [(b"late", True)])
            self.assertEqual(self.sent(), [])
            self.transport.lose(ConnectionDone())
            self.settle()
            self.assertEqual(len(self.handler.ended), 1)
            self.successResultOf(self.client.stop())
            self.assert_clean()


class LimitTests(ConformanceTestCase):
    """9: sizes."""

    settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=1000)

    def test_at_the_limit(self) -> None:
        """A message of exactly the size allowed arrives, whole and in fragments."""
        payload = b"*" * 1000
        ways = [text(payload), text(payload, 500), text(payload, *range(1, 1000))]
        self.play((Case("at the limit", sent, ((payload, True),)) for sent in ways), sizes=(0, 7))

    def test_over_it(self) -> None:
        """One byte more is refused with 1009, as soon as its size is known."""
        over = b"*" * 1001
        self.play(
            [
                Case("in a frame", text(over), fails=1009),
                Case("by its header", text(over)[:4], fails=1009),
                Case("binary", message(BINARY, over), fails=1009),
                Case("in fragments", text(over, 500), fails=1009),
                Case("in many", text(over, *range(1, 1001)), fails=1009),
                Case("a huge frame", header(BINARY, b"\x7f" + (1 << 40).to_bytes(8, "big")), fails=1009),
                Case("after a good one", text("ok") + text(over), ((b"ok", True),), fails=1009),
            ],
            sizes=(0, 1),
        )


class FragmentSizeTests(ConformanceTestCase):
    """10: messages that a server cuts up by itself."""

    def test_sizes(self) -> None:
        """10.1: a message of 65536 bytes arrives, in whatever pieces."""
        payload = bytes(number % 128 for number in range(65536))
        for size in (1300, 4096, 32768):
            cuts = range(size, len(payload), size)
            self.play([Case(f"in pieces of {size}", text(payload, *cuts), ((payload, True),))], sizes=(0, 1460))


class Deflater:
    """A server's end of permessage-deflate (RFC 7692)."""

    def __init__(self) -> None:
        self._packer = zlib.compressobj(wbits=-15)

    def __call__(self, payload: bytes) -> bytes:
        """Return the payload of a compressed message."""
        return (self._packer.compress(payload) + self._packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


class CompressionTests(ConformanceTestCase):
    """12, 13: compression."""

    settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=LIMIT, compress=True)
    extension = "Sec-WebSocket-Extensions: permessage-deflate"

    def test_messages(self) -> None:
        """12.1: messages of all sizes arrive, one after the other, each leaning on those before it."""
        payloads = [b"*" * size for size in (0, 1, 16, 64, 256, 1024, 8192, 65536)] + ["grüße €".encode()]
        for kind in (TEXT, BINARY):
            deflated = Deflater()
            sent = b"".join(frame(kind, deflated(payload), rsv=4) for payload in payloads)
            self.play([Case("deflated", sent, tuple((payload, kind == TEXT) for payload in payloads))])

    def test_fragments(self) -> None:
        """Only the first frame of a message bears the bit (RFC 7692 section 6.1), and pings may stand between."""
        packed = Deflater()(b"fragments " * 100)
        first, rest = frame(TEXT, packed[:5], fin=False, rsv=4), frame(MORE, packed[5:])
        sent = first + frame(PING, b"?") + rest
        self.play([Case("fragments", sent, ((b"fragments " * 100, True),), (b"?",))])

    def test_not_compressed(self) -> None:
        """A message without the bit is taken as it is."""
        self.play([whole(TEXT, b"plain"), whole(BINARY, b"\xff")])
        deflated = Deflater()
        packed = [frame(TEXT, deflated(b"packed"), rsv=4) for _ in range(3)]
        sent = b"".join(each + frame(TEXT, b"plain") + frame(PING, b"?") for each in packed)
        self.play([Case("in turns", sent, ((b"packed", True), (b"plain", True)) * 3, (b"?",) * 3)])

    def test_reserved_bits(self) -> None:
        """RSV1 has a meaning now, at the beginning of a message and nowhere else; RSV2 and RSV3 still have none."""
        packed = Deflater()(b"x")
        self.play(Case(f"RSV {rsv}", frame(TEXT, packed, rsv=rsv), fails=1002) for rsv in (1, 2, 3, 5, 6, 7))
        self.play(Case(f"control {kind}", frame(kind, rsv=4), fails=1002) for kind in (PING, PONG, CLOSE))
        first = frame(TEXT, packed, fin=False, rsv=4)
        self.play([Case("continuation", first + frame(MORE, b"", rsv=4), fails=1002)])

    def test_no_deflate(self) -> None:
        """What cannot be unpacked fails the connection, and reaches nobody."""
        self.unpacked_fails(frame(TEXT, b"\xff" * 50, rsv=4))

    def test_text(self) -> None:
        """6 again: what comes out of it has to be UTF-8 too."""
        self.play([Case("bad", frame(TEXT, Deflater()(b"good\xed\xa0\x80"), rsv=4), fails=1007)])

    def test_over_the_limit(self) -> None:
        """9 again: it is what comes out that is limited."""
        bomb = Deflater()(bytes(LIMIT * 100))
        self.assertLess(len(bomb), LIMIT)
        self.unpacked_fails(frame(BINARY, bomb, rsv=4))

    def unpacked_fails(self, sent: bytes) -> None:
        """See that a message ends the connection, with whatever code, and reaches nobody."""
        self.fresh()
        self.feed(sent)
        self.assertEqual(self.handler.messages, [])
        self.clock.advance(CLOSE_WITHIN)
        self.settle()
        (ended,) = self.handler.ended
        self.assertIsInstance(ended[1], PeerViolation)
        self.successResultOf(self.client.stop())
        self.assert_clean()
        errors = [event for event in self.logged if event["log_level"] >= LogLevel.error]
        self.assertEqual([formatEvent(event) for event in errors], [])


STREAMS = {
    "plain ones": text("a") + text("") + text("ü€😀") + text("*" * 126),
    "a length of two bytes": text("*" * 130) + text("b") + text("*" * 126),
    "pings between messages": text("a") + frame(PING, b"?") + text("b") + frame(PONG, b"x") + text("c"),
    "pings between fragments": text("a")
    + frame(TEXT, b"b", fin=False)
    + frame(PING, b"?")
    + frame(MORE, b"c")
    + text("d"),
    "plain within a message": text("a") + frame(TEXT, b"b", fin=False) + text("c") + frame(MORE, b"d"),
    "binary between": text("a") + message(BINARY, b"\xff\x81\x01") + text("b"),
    "what looks like a frame": text("a") + message(BINARY, text("b") * 3) + frame(PING, text("c")) + text("d"),
    "fragments alone": text("abc", 1, 2) + text("€", 1, 2) + text("d"),
    "a continuation of nothing": text("a") + frame(MORE, b"b") + text("c"),
    "bad in the middle": text("a") + text(b"ok\xed\xa0\x80") + text("b"),
    "bad at the end": text("a") + text(b"ok\xe2\x82") + text("b"),
    "good cut up": frame(TEXT, "€".encode()[:2], fin=False) + frame(MORE, "€".encode()[2:]) + text("b"),
    "masked": text("a") + frame(TEXT, b"b", mask=b"\1\2\3\4") + text("c"),
    "masked of two bytes": text("a") + frame(TEXT, b"b" * 126, mask=b"\1\2\3\4") + text("c"),
    "reserved bits": text("a") + frame(TEXT, b"b", rsv=4) + text("c"),
    "a reserved opcode": text("a") + frame(3, b"b") + text("c"),
    "longer than needed": text("a") + header(TEXT, b"\x7e\0\x7d") + b"*" * 125 + text("c"),
    "eight bytes": text("a") + header(TEXT, b"\x7f" + (125).to_bytes(8, "big")) + b"*" * 125 + text("c"),
    "too large": text("a") + text("*" * 131) + text("c"),
    "as large as allowed": text("a") + text("*" * 130) + text("c"),
    "too large in fragments": text("a") + text("*" * 131, 100) + text("c"),
    "a close frame": text("a") + close_frame(1000, b"bye") + text("late"),
    "a close frame without a code": text("a") + close_frame() + text("late"),
    "a bad close frame": text("a") + frame(CLOSE, b"\3") + text("late"),
    "a close frame within a message": frame(TEXT, b"a", fin=False) + close_frame(4000) + frame(MORE) + text("b"),
}


class ShortWayTests(ConformanceTestCase):
    """Plain frames take a short way, and nothing but the time tells."""

    settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=130, max_message_rate=0)

    def outcome(self, packets: Iterable[bytes], *, short: bool) -> tuple[object, ...]:
        """Return all that comes of these packets."""
        with self.way(short):
            self.fresh()
            for packet in packets:
                self.feed_in(packet, len(packet) or 1)
            closing = self.sent()
            self.clock.advance(CLOSE_WITHIN)
            self.settle()
            self.transport.lose(ConnectionDone())
            self.settle()
            self.successResultOf(self.client.stop())
        self.assert_clean()
        handler = self.handler
        error = handler.error
        return handler.messages, handler.pongs, handler.events, handler.heard, closing, type(error), str(error)

    def test_cut_at_every_byte(self) -> None:
        """Whatever is sent, in two packets that meet at whatever byte: both ways do the same, and what the RFC says."""
        for name, sent in STREAMS.items():
            messages = rfc6455.judge(sent, 130).messages
            for cut in range(len(sent) + 1):
                packets = [sent[:cut], sent[cut:]]
                with_it, without = (self.outcome(packets, short=short) for short in (True, False))
                self.assertEqual(with_it, without, f"{name}, cut at {cut}")
                self.assertEqual(with_it[0], messages, f"{name}, cut at {cut}")

    def test_many_in_a_packet(self) -> None:
        """Long streams of all of them, in packets of all sizes, go the same way."""
        random = Random(5)
        going_on = [sent for sent in STREAMS.values() if rfc6455.judge(sent, 130).end == rfc6455.OPEN]
        for _ in range(40):
            sent = b"".join(random.choices(going_on, k=30)) + random.choice(list(STREAMS.values()))
            size = random.choice([1, 2, 7, 100, 1000, len(sent)])
            packets = [sent[at : at + size] for at in range(0, len(sent), size)]
            with_it, without = (self.outcome(packets, short=short) for short in (True, False))
            self.assertEqual(with_it, without)
            self.assertEqual(with_it[0], rfc6455.judge(sent, 130).messages)

    def test_taken(self) -> None:
        """What is plain is taken without autobahn; a test that compared autobahn with itself would show nothing."""
        sent = STREAMS["plain ones"]
        payloads, taken = unfragmented_texts(sent + frame(PING) + sent, 130)
        self.assertEqual((len(payloads), taken), (4, len(sent)))
        left = (frame(PING), frame(BINARY, b"a"), frame(TEXT, b"a", fin=False), frame(TEXT, b"\xff"))
        for first in left:
            self.assertEqual(unfragmented_texts(first + sent, 130), ([], 0), first)
        self.assertEqual(unfragmented_texts(b"\x81", 130), ([], 0))
        self.assertEqual(unfragmented_texts(b"", 130), ([], 0))

    def test_ended_in_between(self) -> None:
        """A handler that drops the connection, closes it or fails hears of no more of the packet than with autobahn."""

        def drops(connection: Connection, payload: bytes) -> None:
            if payload == b"2":
                connection.kill(NotRunning("enough"))

        def closes(connection: Connection, payload: bytes) -> None:
            if payload == b"2":
                connection.close(4000, "enough")

        sent = b"".join(text(str(number)) for number in range(5)) + frame(PING, b"?") + text("late")
        for act, came in ((drops, 3), (closes, 6)):
            seen = []
            for short in (True, False):
                with self.way(short):
                    self.fresh()
                    self.handler.on["received"] = act
                    self.feed(sent)
                    seen.append((self.handler.messages, self.sent()))
                    self.settle()
                    self.transport.lose(ConnectionDone())
                    self.settle()
                    self.successResultOf(self.client.stop())
            self.assertEqual(seen[0], seen[1])
            self.assertEqual(len(seen[0][0]), came)

    def test_sent_too_much(self) -> None:
        """The rate counts plain frames like others: both ways hear of as many, and stop at the same one."""
        for rate, size in ((1.0, 1), (1.0, 150), (3.0, 1), (3.0, 4096)):
            self.settings = config.WebSocket(max_message_rate=rate)
            sent = b"".join(text(str(number) * size) for number in range(50))
            with_it, without = (self.outcome([sent[:9], sent[9:]], short=short) for short in (True, False))
            self.assertEqual(with_it, without)
            messages = with_it[0]
            assert isinstance(messages, list)
            self.assertLess(0, len(messages))
            self.assertLess(len(messages), 50)


class ModelTests(ConformanceTestCase):
    """The second opinion that fuzzing asks (:mod:`tests.fuzz.rfc6455`) is of the same opinion as these tables."""

    def test_model(self) -> None:
        """The model judges the cases as this module does; a mistake in the one is not in the other."""
        cases: list[tuple[bytes, Any]] = [
            (text("a") + frame(PING, b"?"), ([(b"a", True)], [b"?"], OPEN)),
            (text("ab", 1), ([(b"ab", True)], [], OPEN)),
            (frame(MORE), ([], [], 1002)),
            (frame(PING, b"*" * 126), ([], [], 1002)),
            (text("ok") + frame(TEXT, b"x", rsv=4), ([(b"ok", True)], [], 1002)),
            (header(TEXT, b"\x7e" + (125).to_bytes(2, "big")), ([], [], 1002)),
            (text(b"*" * 1001), ([], [], 1009)),
            (close_frame(), ([], [], rfc6455.PEER_CLOSED)),
            *((text(bad), ([], [], 1007)) for bad in BAD_UTF8.values()),
            *((text(good), ([(good.encode(), True)], [], OPEN)) for good in GOOD_UTF8.values()),
            *((close_frame(code), ([], [], rfc6455.PEER_CLOSED)) for code in TAKEN_CODES),
            *((close_frame(code), ([], [], 1002)) for code in REFUSED_CODES),
        ]
        for sent, expected in cases:
            verdict = rfc6455.judge(sent, 1000)
            self.assertEqual((verdict.messages, verdict.pings, verdict.end), expected, sent)
