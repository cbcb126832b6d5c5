"""URLs of backends, taken apart."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.config import Backend
from commsmgr.urls import Target, backend_name, http_target, listen_address, parse, websocket_target

HTTP = ("http", "https")


class ParseTests(SynchronousTestCase):
    """What is a URL of a backend, and what is not."""

    def test_parts(self) -> None:
        """Scheme, host, port and path are told apart; ports have defaults, what is no ASCII is encoded."""
        for url, target in {
            "http://example.org": Target("http", "example.org", 80, "/"),
            "https://example.org:8443/api/v1": Target("https", "example.org", 8443, "/api/v1"),
            "https://example.org/api/?a=b&c": Target("https", "example.org", 443, "/api/?a=b&c"),
            "HTTP://[::1]:80/": Target("http", "::1", 80, "/"),
            "http://bücher.example/é": Target("http", "xn--bcher-kva.example", 80, "/%C3%A9"),
            "http://127.0.0.1/a%2Fb": Target("http", "127.0.0.1", 80, "/a%2Fb"),
            "http://example.org//double": Target("http", "example.org", 80, "/double"),
        }.items():
            self.assertEqual(parse(url, HTTP), target, url)

    def test_mistakes(self) -> None:
        """A mistake is named, and a password in a URL is not repeated."""
        for url, words in {
            "ftp://example.org": "expected http:// or https://, found ftp",
            "example.org": "found none",
            "": "found none",
            "http://": "no host",
            "http://user:hunter2@example.org": "use [auth]",
            "http://example.org/#part": "fragment",
            "http://example.org:0": "between 1 and 65535",
            "http://example.org:65536": "between 1 and 65535",
            "http://example.org:eighty": "not a URL",
            "http://example.org/a b": "no blanks",
            "http://example.org\r\nHost: x": "no blanks",
            "http://example.org/\x7f": "no blanks",
            "http://[::1": "not a URL",
            "http://[::\udcff]/": "not UTF-8",
            "http://example.org/\ud800": "not UTF-8",
            "http://" + "a" * 70 + ".example": "not a URL",
        }.items():
            error = self.assertRaises(ValueError, parse, url, HTTP)
            self.assertIn(words, str(error), url)
            self.assertNotIn("hunter2", str(error))


class TargetTests(SynchronousTestCase):
    """What a target says of itself."""

    def test_secure(self) -> None:
        """TLS is a matter of the scheme."""
        secure = [scheme for scheme in ("http", "https", "ws", "wss") if Target(scheme, "h", 1, "/").secure]
        self.assertEqual(secure, ["https", "wss"])

    def test_loopback(self) -> None:
        """Only what is this machine by its very name is loopback."""
        for host, loopback in {
            "127.0.0.1": True, "127.9.9.9": True, "::1": True, "localhost": True, "LOCALHOST.": True,
            "::ffff:127.0.0.1": True, "::ffff:192.0.2.1": False, "::": False, "0.0.0.0": False, "fe80::1%eth0": False,
            "128.0.0.1": False, "::2": False, "localhost.example.org": False, "127.0.0.1.example.org": False,
        }.items():  # fmt: skip
            self.assertIs(Target("http", host, 80, "/").loopback, loopback, host)

    def test_authority(self) -> None:
        """The default port is left out, an IPv6 address has its brackets."""
        self.assertEqual(Target("https", "h", 443, "/").authority, "h")
        self.assertEqual(Target("https", "h", 80, "/").authority, "h:80")
        self.assertEqual(Target("ws", "::1", 80, "/").authority, "[::1]")
        self.assertEqual(Target("ws", "::1", 81, "/").authority, "[::1]:81")

    def test_join(self) -> None:
        """A path is put below the base, before its query."""
        for path, whole in {
            "/": "http://h/x", "/api": "http://h/api/x", "/api/": "http://h/api/x", "/api?k=v": "http://h/api/x?k=v",
        }.items():  # fmt: skip
            self.assertEqual(Target("http", "h", 80, path).join("/x"), whole)


class BackendTests(SynchronousTestCase):
    """From the settings of a backend."""

    def test_targets(self) -> None:
        """The WebSocket is below the base URL unless it is set."""
        backend = Backend(url="https://h/api")
        self.assertEqual(http_target(backend), Target("https", "h", 443, "/api"))
        self.assertEqual(websocket_target(backend), Target("wss", "h", 443, "/api/ws"))
        self.assertEqual(websocket_target(Backend(url="http://[::1]:8080")), Target("ws", "::1", 8080, "/ws"))
        own = Backend(url="https://h", websocket_url="ws://other:9/socket?x=1")
        self.assertEqual(websocket_target(own), Target("ws", "other", 9, "/socket?x=1"))
        self.assertRaises(ValueError, websocket_target, Backend(url="https://h", websocket_url="https://h"))

    def test_name(self) -> None:
        """A backend is called what it is called, or else host and port."""
        self.assertEqual(backend_name(Backend(url="nonsense", name="main")), "main")
        self.assertEqual(backend_name(Backend(url="https://h/api")), "h:443")
        self.assertEqual(backend_name(Backend(url="http://[::1]")), "[::1]:80")
        self.assertRaises(ValueError, backend_name, Backend(url="nonsense"))


class ListenTests(SynchronousTestCase):
    """The address of the status page."""

    def test_addresses(self) -> None:
        """Host and port, an IPv6 address in brackets."""
        for listen, pair in {
            "127.0.0.1:9464": ("127.0.0.1", 9464), "[::1]:0": ("::1", 0), "localhost:65535": ("localhost", 65535),
        }.items():  # fmt: skip
            self.assertEqual(listen_address(listen), pair)

    def test_mistakes(self) -> None:
        """Anything else is no address."""
        for listen in (
            "",
            "9464",
            ":9464",
            "host:",
            "::1:9464",
            "[host]:1",
            "host:x",
            "host:١",
            "host:-1",
            "host:065536",
            "host:1",
            "*:1",
            "1.2.3.400:1",
            "LOCALHOST.:1",
        ):
            self.assertRaises(ValueError, listen_address, listen)
        self.assertIn("65535", str(self.assertRaises(ValueError, listen_address, "host:65536")))
