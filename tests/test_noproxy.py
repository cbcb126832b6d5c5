"""Which hosts no proxy is asked for, held against curl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from twisted.internet import reactor
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr.config import Proxy
from commsmgr.noproxy import bypasses, mistake
from commsmgr.proxies import choose
from commsmgr.urls import Target
from tests.loopback import Recorder, Recording, listen
from tests.proxy_kit import program

# For each value of NO_PROXY: the hosts that are then reached directly. All others of HOSTS go through the proxy.
HOSTS = (
    "example.com", "www.example.com", "notexample.com", "API.EXAMPLE.com", "example.com.", "example.org",
    "a.b.example.org", "10.1.2.3", "192.0.2.7", "192.0.3.7", "fd00::1", "2001:db8::1",
)  # fmt: skip
EXAMPLE_COM = ("example.com", "www.example.com", "API.EXAMPLE.com", "example.com.")
EXAMPLE_ORG = ("example.org", "a.b.example.org")
TABLE: Mapping[str, Iterable[str]] = {
    "": (),
    "*": HOSTS,
    "example.com": EXAMPLE_COM,
    ".example.com": EXAMPLE_COM,
    "EXAMPLE.COM": EXAMPLE_COM,
    "example.com.": EXAMPLE_COM,
    "ample.com": (),
    "com": (*EXAMPLE_COM, "notexample.com"),
    "www.example.com": ("www.example.com",),
    "example.org,example.com": (*EXAMPLE_COM, *EXAMPLE_ORG),
    "example.org, example.com": (*EXAMPLE_COM, *EXAMPLE_ORG),
    "example.org example.com": (*EXAMPLE_COM, *EXAMPLE_ORG),
    ",,example.org,": EXAMPLE_ORG,
    "10.0.0.0/8": ("10.1.2.3",),
    "10.9.9.9/8": ("10.1.2.3",),
    "10.1.2.3": ("10.1.2.3",),
    "2.3": (),
    ".2.3": (),
    "192.0.2.0/24": ("192.0.2.7",),
    "192.0.2.0/23": ("192.0.2.7", "192.0.3.7"),
    "10.0.0.0/99": (),
    "fd00::1": ("fd00::1",),
    "10.1.2.4,10.1.2.3": ("10.1.2.3",),
    "128.0.0.0/1": ("192.0.2.7", "192.0.3.7"),
}


class Table(SynchronousTestCase):
    """By the rules."""

    def test_table(self) -> None:
        """Each value of NO_PROXY lets these hosts be reached directly, and no others."""
        settings = Proxy(no_proxy=())
        for value, direct in TABLE.items():
            environ = {"http_proxy": "http://proxy.example:3128", "no_proxy": value}
            found = [host for host in HOSTS if choose(settings, environ, Target("http", host, 80, "/")) is None]
            self.assertEqual(found, [host for host in HOSTS if host in direct], value)

    def test_beyond_curl(self) -> None:
        """Ports, brackets, stars in a list, and networks of IPv6, which only newer curls take for such, count."""
        for entry, host, port, matches in (
            ("example.com:8443", "www.example.com", 8443, True),
            ("example.com:8443", "www.example.com", 443, False),
            ("*:8443", "example.com", 8443, True),
            ("10.0.0.0/8:443", "10.1.1.1", 443, True),
            ("10.0.0.0/8:443", "10.1.1.1", 444, False),
            ("0.0.0.0/0", "10.1.2.3", 443, True),
            ("0.0.0.0/0", "fd00::1", 443, False),
            ("fd00::/8", "fd00::1", 443, True),
            ("fd00::/8", "fe00::1", 443, False),
            ("FD00:0:0::1", "fd00::1", 443, True),
            ("[fd00::1]", "fd00::1", 443, True),
            ("[fd00::1]:443", "fd00::1", 443, True),
            ("[fd00::1]:444", "fd00::1", 443, False),
            ("[fd00::1]", "fd00::2", 443, False),
            ("*.example.com", "www.example.com", 443, True),
            ("*.example.com", "notexample.com", 443, False),
            (".", "example.com", 443, False),
            ("", "example.com", 443, False),
        ):
            self.assertIs(bypasses((entry,), host, port), matches, (entry, host, port))
        self.assertTrue(bypasses(("example.org", "*"), "example.com", 443))

    def test_mistakes(self) -> None:
        """An entry of the settings that could never match is a mistake; each of the forms is none."""
        for entry in ("*", "a.example", ".a.example", "*.a.example", "a_b", "10.0.0.0/8", "::1", "[::1]:443", "a:80"):
            self.assertEqual(mistake(entry), "", entry)
        for entry in ("", " ", "10.0.0.0/99", "http://a.example", "a b", "a,b", "a*", "[a", "."):
            self.assertIn("expected a host name", mistake(entry), entry)


class AgainstCurl(TestCase):
    """The table is what curl does."""

    timeout = 60

    async def test_table(self) -> None:
        """curl, run with each value of NO_PROXY, goes to its proxy for the very hosts that the table has not."""

        def refuse(recorder: Recorder) -> None:
            recorder.transport.write(b"HTTP/1.1 502 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            recorder.transport.loseConnection()

        server: Any = Recording(refuse)
        proxy = f"http://127.0.0.1:{listen(self, server)}"
        # Wherever it wants to go, that is a closed port of this machine, by whose number it can be told. So no name
        # server is asked, and nothing leaves the machine.
        command = ["-q", "--silent"]
        for number, host in enumerate(HOSTS, start=1):
            name = f"[{host}]" if ":" in host else host
            command += ["--connect-to", f"{name}:80:127.0.0.1:{number}", f"http://{name}/"]
        for value, direct in TABLE.items():
            server.connections.clear()
            _, error, _ = await getProcessOutputAndValue(
                program("curl"), command, env={"http_proxy": proxy, "no_proxy": value}, reactor=reactor
            )
            self.assertEqual(error, b"")
            asked = [each.received.partition(b" HTTP/1.1")[0] for each in server.connections]
            wanted = [
                b"CONNECT 127.0.0.1:%d" % number for number, host in enumerate(HOSTS, start=1) if host not in direct
            ]
            self.assertEqual(asked, wanted, value)
