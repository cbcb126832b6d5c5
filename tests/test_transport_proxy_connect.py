"""What is said to a proxy, and what its answer means."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.transport.answer_head import MAX_HEAD_BYTES, Head
from commsmgr.transport.proxy_connect import authority, basic, is_success, read_answer, refusal, request, schemes


def read(data: bytes) -> Head:
    """Return the answer in ``data``, which is complete."""
    answer = read_answer(data)
    assert answer is not None, data
    return answer


class Requests(SynchronousTestCase):
    """To the proxy."""

    def test_authority(self) -> None:
        """Always with a port (RFC 9110 section 7.1), an IPv6 literal in brackets, a name without its last dot."""
        for host, expected in (
            ("backend.example", "backend.example:443"),
            ("backend.example.", "backend.example:443"),
            ("192.0.2.1", "192.0.2.1:443"),
            ("fd00::1", "[fd00::1]:443"),
        ):
            self.assertEqual(authority(host, 443), expected)

    def test_request(self) -> None:
        """Host and port twice, who we are, and credentials if there are any; nothing else."""
        head = b"CONNECT b.example:443 HTTP/1.1\r\nHost: b.example:443\r\nUser-Agent: commsmgr/1\r\n"
        self.assertEqual(request("b.example:443", "commsmgr/1", ""), head + b"\r\n")
        # RFC 7617 section 2.1 has this very example: test, 123 and a pound sign, in UTF-8.
        self.assertEqual(
            request("b.example:443", "commsmgr/1", basic("test", "123\u00a3")),
            head + b"Proxy-Authorization: Basic dGVzdDoxMjPCow==\r\n\r\n",
        )


class Answers(SynchronousTestCase):
    """From the proxy, or from what stands in its place."""

    def test_success(self) -> None:
        """Every 2xx is one, in HTTP/1.0 too, with line ends of either kind, and its end is known to the byte."""
        for data in (
            b"HTTP/1.1 200 Connection established\r\n\r\n",
            b"HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n",
            b"HTTP/1.1 204\n\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        ):
            answer = read(data + b"more")
            self.assertTrue(is_success(answer), data)
            self.assertEqual(answer.end, len(data))

    def test_piecemeal(self) -> None:
        """An answer is incomplete until its very last byte is there."""
        data = b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Basic\r\n\r\n"
        for end in range(len(data)):
            self.assertIsNone(read_answer(data[:end]), data[:end])
        self.assertEqual(read(data).status, 407)

    def test_interim(self) -> None:
        """Interim answers are skipped, but 101 is none here; they count towards the limit, and have one."""
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n"
        answer = read(b"HTTP/1.1 100 Continue\r\n\r\n" + interim + b"HTTP/1.1 200 OK\r\n\r\n")
        self.assertTrue(is_success(answer))
        self.assertIsNone(read_answer(interim))
        self.assertEqual(read(b"HTTP/1.1 101 Switching\r\n\r\n").status, 101)
        large = interim.replace(b"</>", b"<" + b"x" * 1000 + b">")
        error = self.assertRaises(ValueError, read_answer, large * (MAX_HEAD_BYTES // len(large) + 1))
        self.assertIn("more than 16384 bytes", str(error))
        self.assertIsNone(read_answer(interim * 20))
        error = self.assertRaises(ValueError, read_answer, interim * 21)
        self.assertIn("more than 20 interim answers", str(error))

    def test_first_of_repeated(self) -> None:
        """Of a repeated field the first counts, and a line without a colon is none."""
        error = refusal(
            "A",
            read(b"HTTP/1.1 503 No\r\nRetry-After\r\nRetry-After: 1\r\nRetry-After: 2\r\n\r\n"),
            credentials=False,
            now=0,
        )
        self.assertEqual(error.retry_after, 1.0)

    def test_bare_carriage_returns(self) -> None:
        """One that ends no line is part of it, in the last line of a head as in any other."""
        for head in (b"HTTP/1.1 200\r\r\n\r\n", b"HTTP/1.1 200\r\r\nA: b\r\n\r\n"):
            self.assertRaises(ValueError, read_answer, head)
        self.assertEqual(read(b"HTTP/1.1 200 OK\r\nA: b\r\r\n\r\n").headers, {"a": "b?"})

    def test_no_http(self) -> None:
        """What is not HTTP is known by its first bytes, and shown in one printable line."""
        for data in (
            b"\x15\x03\x01\x00\x02",
            b"<html>",
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/x\r\n\r\n",
        ):
            error = self.assertRaises(ValueError, read_answer, data)
            self.assertIn("what is not HTTP", str(error))
            self.assertTrue(str(error).isprintable(), data)
        self.assertIsNone(read_answer(b"HT"))

    def test_too_large(self) -> None:
        """A head has a limit, and so has what is shown of it."""
        endless = b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES
        self.assertIn("more than 16384 bytes", str(self.assertRaises(ValueError, read_answer, endless)))
        long = read(b"HTTP/1.1 502 " + b"no\x1b[31m" * 1000 + b"\r\n\r\n")
        self.assertLessEqual(len(long.reason), 120)
        self.assertTrue(long.reason.isprintable())

    def test_schemes(self) -> None:
        """Schemes are named once each, whether they stand in one field or in several, whatever their parameters are."""
        for fields, expected in (
            ((b'Basic realm="a, Negotiate b"',), ("basic",)),
            ((b'Digest realm="r", nonce="n", qop="auth", Basic realm="x"',), ("digest", "basic")),
            ((b"Negotiate", b"NTLM", b'Basic realm="r"', b"basic"), ("negotiate", "ntlm", "basic")),
            ((b"Negotiate YWJj==, NTLM",), ("negotiate", "ntlm")),
            ((b"",), ()),
            ((), ()),
        ):
            head = (
                b"HTTP/1.1 407 No\r\n" + b"".join(b"Proxy-Authenticate: %s\r\n" % field for field in fields) + b"\r\n"
            )
            self.assertEqual(schemes(read(head)), expected, fields)
        many = b"".join(b"Proxy-Authenticate: Scheme%d\r\n" % number for number in range(100))
        self.assertEqual(len(schemes(read(b"HTTP/1.1 407 No\r\n" + many + b"\r\n"))), 8)


class Refusals(SynchronousTestCase):
    """What an operator reads."""

    def test_words(self) -> None:
        """Each status says what it means, and what it means depends on what was asked for."""
        for head, credentials, words in (
            (b"407 No\r\nProxy-Authenticate: Basic", False, "407 No: it wants a user and a password"),
            (b"407 No\r\nProxy-Authenticate: Basic", True, "407 No: the user or the password is wrong"),
            (b"401 Unauthorized", True, "401 Unauthorized: the user or the password is wrong"),
            (b"407 No\r\nProxy-Authenticate: NTLM", True, "knows its clients by ntlm, of which none is supported"),
            (b"403 Forbidden", True, "does not allow this host or port (by default squid"),
            (b"503 Service Unavailable", False, "it cannot reach the backend"),
            (b"500 Unable to connect", False, "it cannot reach the backend"),
            (b"302 Found\r\nLocation: http://portal/", False, "a network's login page?"),
            (b"404 Not Found\r\nContent-Type: text/html", False, "a network's login page?"),
            (b"404", False, "was answered with 404"),
        ):
            error = refusal("ASKED", read(b"HTTP/1.1 " + head + b"\r\n\r\n"), credentials=credentials, now=0)
            self.assertIn(words, error.fact)
            self.assertTrue(error.fact.startswith("ASKED was answered with "))
            self.assertIn("not the backend's", str(error))
            self.assertFalse(error.may_have_arrived)
            self.assertEqual(error.status, int(head[:3]))

    def test_retry_after(self) -> None:
        """Retry-After is understood in seconds and as a date; nonsense is none."""
        for value, expected in (
            (b"120", 120.0),
            (b"Thu, 01 Jan 1970 00:02:00 GMT", 110.0),
            (b"soon", None),
        ):
            answer = read(b"HTTP/1.1 503 No\r\nRetry-After: %s\r\n\r\n" % value)
            self.assertEqual(refusal("A", answer, credentials=False, now=10.0).retry_after, expected)
        self.assertIsNone(refusal("A", read(b"HTTP/1.1 503 No\r\n\r\n"), credentials=False, now=0).retry_after)
