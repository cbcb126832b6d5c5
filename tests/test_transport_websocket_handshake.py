"""What the answer to an upgrade request means, byte by byte."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import PeerViolation, TokenError, UpgradeRefused
from commsmgr.transport.answer_head import MAX_HEAD_BYTES
from commsmgr.transport.handshake import check_headers, clean, read_head, refusal


class ReadHeadTests(SynchronousTestCase):
    """read_head()."""

    def test_every_prefix(self) -> None:
        """An answer that is still coming is awaited, whatever part of it is there."""
        data = b"HTTP/1.1 403 Forbidden\r\nA: b\r\n\r\n"
        for end in range(len(data)):
            self.assertIsNone(read_head(data[:end]), data[:end])
        head = read_head(data + b"body")
        assert head is not None
        self.assertEqual((head.status, head.reason, head.headers), (403, "Forbidden", {"a": "b"}))
        self.assertEqual(head.end, len(data))

    def test_status_lines(self) -> None:
        """Any version of HTTP counts, and the reason may be missing."""
        lines = ((b"HTTP/1.0 404 X", 404), (b"HTTP/1.1 401", 401), (b"HTTP/2 502 ", 502), (b"HTTP/1.1 999 x", 999))
        for line, status in lines:
            head = read_head(line + b"\r\n\r\n")
            assert head is not None
            self.assertEqual(head.status, status)

    def test_not_http(self) -> None:
        """What is not HTTP is refused with status 0 and no more of it than a short, printable beginning."""
        for data in (b"X", b"HTTQ", b"<html>" + b"y" * 5000, b"\0\1", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 20\r\n\r\n"):
            error = self.assertRaises(UpgradeRefused, read_head, data)
            self.assertEqual(error.status, 0)
            self.assertLess(len(str(error)), 300)
            self.assertTrue(str(error).isprintable())

    def test_limit(self) -> None:
        """A head may be as large as the limit, and no larger, however it comes."""
        start, end = b"HTTP/1.1 200 OK\r\nX: ", b"\r\n\r\n"
        largest = start + b"a" * (MAX_HEAD_BYTES - len(start) - len(end)) + end
        self.assertIsNotNone(read_head(largest))
        self.assertIsNotNone(read_head(largest + b"x" * 100_000))
        self.assertRaises(PeerViolation, read_head, largest[:-4] + b"a" + end)
        self.assertRaises(PeerViolation, read_head, largest[:-4] + b"aaaa")

    def test_clean(self) -> None:
        """The head for autobahn has CRLF line ends and printable ASCII, one line for each that came."""
        head = read_head(b"HTTP/1.0 101 S\xc3\xa9\nA: \xff\x85\x0b\x1cx\nA: 2\nnonsense\n\nrest")
        assert head is not None
        self.assertEqual(clean(head), b"HTTP/1.1 101\r\nA: ????x\r\nA: 2\r\nnonsense\r\n\r\n")
        self.assertEqual(head.headers, {"a": "????x"})

    def test_interim(self) -> None:
        """Every 1xx but 101 is followed by another answer."""
        for status, expected in ((100, True), (103, True), (199, True), (101, False), (200, False)):
            head = read_head(b"HTTP/1.1 %d x\r\n\r\n" % status)
            assert head is not None
            self.assertIs(head.is_interim, expected)


class RefusalTests(SynchronousTestCase):
    """refusal()."""

    def refuse(self, data: bytes) -> UpgradeRefused:
        head = read_head(data + b"\r\n\r\n")
        assert head is not None
        error = refusal(head, now=1_700_000_000.0)
        assert isinstance(error, UpgradeRefused)
        return error

    def test_retry_after(self) -> None:
        """Seconds or a date, never negative; nonsense is as good as nothing."""
        for value, expected in (
            (b"0", 0.0),
            (b"120", 120.0),
            (b"Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
            (b"Tue, 14 Nov 2000 22:13:50 GMT", 0.0),
            (b"soon", None),
            (b"", None),
            (b"\xff", None),
        ):
            self.assertEqual(self.refuse(b"HTTP/1.1 503 Busy\r\nRetry-After: " + value).retry_after, expected, value)
        self.assertIsNone(self.refuse(b"HTTP/1.1 503 Busy").retry_after)

    def test_sentences(self) -> None:
        """The error says what an operator needs, without the query of a redirect."""
        self.assertIn("503 Busy", str(self.refuse(b"HTTP/1.1 503 Busy")))
        redirect = str(self.refuse(b"HTTP/1.1 302 Found\r\nLocation: https://a.example/b?token=c"))
        self.assertIn("https://a.example/b,", redirect)
        self.assertNotIn("token", redirect)
        self.assertNotIn("redirected", str(self.refuse(b"HTTP/1.1 302 Found")))
        self.assertIn("login page", str(self.refuse(b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8")))


class CheckHeadersTests(SynchronousTestCase):
    """check_headers()."""

    def test_good(self) -> None:
        """What may stand in a request comes back as a copy."""
        given = {"Authorization": "Bearer a.b-c~d=", "X-1": "", "x_y": "a\tb"}
        copy = check_headers(given)
        self.assertEqual(copy, given)
        self.assertIsNot(copy, given)

    def test_bad(self) -> None:
        """What may not is refused, and no value is repeated."""
        for name, value in (
            ("A", "secret\r\nB: c"),
            ("Authorization", "Bearer secret\n"),
            ("A", "secret\n"),
            ("A", "secret\0"),
            ("A", "secret é"),
            ("", "secret"),
            ("A B", "secret"),
            ("A:", "secret"),
            ("A\r\n", "secret"),
            ("Host", "secret"),
            ("Sec-WebSocket-Key", "secret"),
            ("Transfer-Encoding", "secret"),
        ):
            error = self.assertRaises(TokenError, check_headers, {name: value})
            self.assertNotIn("secret", str(error))
