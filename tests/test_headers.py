"""Tests for what may stand in a header field and in a bearer token."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.headers import MAX_TOKEN, RESERVED, mistake, mistakes, token_mistake

SECRET = "s3cr3t"


class Fields(SynchronousTestCase):
    """mistakes() and mistake()."""

    def wrong(self, name: str, value: str, own: frozenset[str] = frozenset()) -> str:
        """Return what is wrong with one field; both functions must agree, and repeat no value."""
        found = list(mistakes({name: value}, own=own))
        sentence = mistake({name: value}, own=own)
        self.assertEqual(sentence, f"header field {name!r}: {found[0][1]}" if found else "")
        self.assertNotIn(SECRET, sentence)
        return sentence

    def test_good(self) -> None:
        """Every character of a token may stand in a name, visible ASCII with inner blanks in a value."""
        for name, value in (
            ("X-A", ""),
            ("X-A", "a \t b"),
            ("x_y", "!~"),
            ("!#$%&'*+-.^_`|~09azAZ", "a"),
            ("User-Agent", "agent/1.0 (site 7)"),
            ("X-Authorization", "a"),
        ):
            self.assertEqual(self.wrong(name, value), "")
        self.assertEqual(mistake({}), "")

    def test_names(self) -> None:
        """Whatever is no token cannot be a name: it would end the name, or the line."""
        for name in ("", " ", "A B", "A:", "A\r\nB", "A\n", "\tA", "A\0", "Ä", "A(", "A/B", 'A"', "A\u2028"):
            self.assertIn("not a valid name", self.wrong(name, SECRET), repr(name))

    def test_values(self) -> None:
        """Line breaks, control characters, blanks at the ends and other scripts are refused."""
        for value in ("\r\nB: c", "\n", "\r", "\0", " ", "\t", "é", "\x7f", "\x85", "\u2028"):
            for text in (SECRET + value, value + SECRET):
                self.assertIn("printable ASCII", self.wrong("X-A", text), repr(text))
        for value in ("\r\nB: c", "\n", "\0", "é", "\x7f"):
            self.assertIn("printable ASCII", self.wrong("X-A", SECRET + value + SECRET), repr(value))

    def test_reserved(self) -> None:
        """What commsmgr sets itself is refused in whatever case, and all that begins like the WebSocket handshake."""
        for name in ("HOST", "Content-length", "Transfer-Encoding", "cookie", "Idempotency-Key", "Proxy-Authorization"):
            self.assertIn("set by commsmgr itself", self.wrong(name, SECRET))
        for name in ("Sec-WebSocket-Key", "sec-websocket-protocol", "SEC-WEBSOCKET-anything"):
            self.assertIn("set by commsmgr itself", self.wrong(name, SECRET))
        self.assertIn("belongs in [auth]", self.wrong("authorization", SECRET))
        self.assertNotIn("[auth]", self.wrong("Host", SECRET))
        self.assertEqual({name.lower() for name in RESERVED}, set(RESERVED))

    def test_own(self) -> None:
        """A caller may be allowed what is its own to set; the value must be as clean, and nothing else is allowed."""
        own = frozenset({"authorization"})
        self.assertEqual(self.wrong("Authorization", "Bearer a", own), "")
        self.assertIn("printable ASCII", self.wrong("Authorization", f"Bearer {SECRET}\n", own))
        self.assertIn("set by commsmgr itself", self.wrong("Host", SECRET, own))

    def test_twice(self) -> None:
        """A name that differs in case only is the same name."""
        self.assertEqual(
            [name for name, _ in mistakes({"X-A": "1", "x-a": "2", "X-B": "3", "X-a": "4"})], ["x-a", "X-a"]
        )

    def test_all_and_first(self) -> None:
        """All mistakes are found, in the order of the fields; the sentence is about the first."""
        headers = {"X-A": "1", "Host": SECRET, "X B": SECRET}
        self.assertEqual([name for name, _ in mistakes(headers)], ["Host", "X B"])
        self.assertTrue(mistake(headers).startswith("header field 'Host': "))


class Tokens(SynchronousTestCase):
    """token_mistake()."""

    def test_good(self) -> None:
        """Visible ASCII up to the bound: b64token, and the tokens that are not."""
        for token in ("a", "abc==", "a.b-c~d_e+f/g", "a:b;c,d", "!~", "x" * MAX_TOKEN):
            self.assertEqual(token_mistake(token), "")

    def test_bad(self) -> None:
        """What could end the field or the value is refused with the reason, and not quoted."""
        for token, reason in (
            ("", "empty"),
            ("x" * (MAX_TOKEN + 1), "longer than 16384"),
            (f"{SECRET}\r\nX: y", "control characters"),
            (f"{SECRET}\n", "control characters"),
            (f"{SECRET}\x00", "control characters"),
            (f"{SECRET}\x7f", "control characters"),
            (f"{SECRET} b", "blanks"),
            (f" {SECRET}", "blanks"),
            (f"{SECRET}é", "outside ASCII"),
            (f"{SECRET}\x85", "outside ASCII"),
            (f"{SECRET}\u2028", "outside ASCII"),
        ):
            self.assertIn(reason, token_mistake(token), repr(token))
            self.assertNotIn(SECRET, token_mistake(token))
