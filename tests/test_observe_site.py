"""The status page, over real HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.http_headers import Headers

from commsmgr.errors import ConfigError
from commsmgr.observe import site
from commsmgr.observe.metrics import Metrics
from commsmgr.observe.site import Pages, StatusSite
from commsmgr.status import BackendStatus, QueueStatus, Registered, Status, Waiting


def some_status(*, running: bool = True, connected: bool = True) -> Status:
    link = Registered(1.0, "plain") if connected else Waiting("no route", 2.0, 3)
    backend = BackendStatus(name="primary", url="https://b.example", active=True, link=link, breaker="closed")
    return Status(
        running=running,
        connected=connected,
        reachable=connected,
        machine_id="m-1",
        version="1",
        backends=(backend,),
        queue=QueueStatus(),
    )


class Conversation(Protocol):
    """Sends bytes, and collects what comes until the other side closes."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.received = b""
        self.opened: Deferred[None] = Deferred()
        self.closed: Deferred[bytes] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(self.request)

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if not self.opened.called:
            self.opened.callback(None)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]  # Twisted's default is a Failure, too
        self.closed.callback(self.received)


class SiteCase(TestCase):
    timeout = 20

    def setUp(self) -> None:
        self.status: Callable[[], Status] = some_status
        self.registry = CollectorRegistry()
        Metrics(self.registry, seconds=lambda: 1.0).watch(lambda: QueueStatus(dropped={"expired": 4}))
        self.site = self.make()
        self.site.startService()
        self.addCleanup(self.site.stopService)

    def make(self, listen: str = "127.0.0.1:0") -> StatusSite:
        return StatusSite(listen, reactor=reactor, registry=self.registry, status=self.current)

    def current(self) -> Status:
        return self.status()

    async def talk(self, request: bytes) -> Conversation:
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self.site.port)
        return await connectProtocol(endpoint, Conversation(request))

    async def ask(
        self, path: str, *, method: str = "GET", host: str | None = None, more: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        host = f"127.0.0.1:{self.site.port}" if host is None else host
        request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n"
        conversation = await self.talk(request.encode())
        head, _, body = (await conversation.closed).partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(status.split()[1]), fields, body


class PageTests(SiteCase):
    """What the pages say."""

    async def test_metrics(self) -> None:
        """Prometheus gets its text format, of the registry that was given."""
        code, fields, body = await self.ask("/metrics?x=1")
        self.assertEqual(code, 200)
        self.assertEqual(fields["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        self.assertIn(b'commsmgr_dropped_total{reason="expired"} 4.0\n', body)

    async def test_health(self) -> None:
        """Alive and ready are told by the status code, and the body says why."""
        code, _, body = await self.ask("/readyz")
        self.assertEqual((code, body.partition(b" since")[0]), (200, b"connected to primary (plain, without TLS)"))
        self.assertEqual((await self.ask("/healthz"))[0], 200)

        self.status = lambda: some_status(connected=False)
        code, fields, body = await self.ask("/readyz")
        self.assertEqual((code, fields["content-type"]), (503, "text/plain; charset=utf-8"))
        self.assertIn(b"not connected: primary failed after 3 attempts: no route", body)
        self.assertEqual((await self.ask("/healthz"))[0], 200)

        self.status = lambda: some_status(running=False)
        self.assertEqual((await self.ask("/healthz"))[0], 503)

    async def test_status(self) -> None:
        """The whole status comes as JSON, each link tagged with its state."""
        code, fields, body = await self.ask("/status")
        self.assertEqual((code, fields["content-type"]), (200, "application/json"))
        shown = json.loads(body)
        self.assertEqual(shown["machine_id"], "m-1")
        self.assertEqual(shown["backends"][0]["link"]["type"], "Registered")

    async def test_index(self) -> None:
        """The root names the others."""
        code, fields, body = await self.ask("/")
        self.assertEqual((code, fields["content-type"]), (200, "text/html; charset=utf-8"))
        for path in (b"/metrics", b"/healthz", b"/readyz", b"/status"):
            self.assertIn(path, body)

    async def test_headers(self) -> None:
        """No answer may be stored or sniffed, and none tells the server's version."""
        for path in ("/", "/metrics", "/status", "/nowhere"):
            _, fields, body = await self.ask(path)
            self.assertEqual(fields["cache-control"], "no-store")
            self.assertEqual(fields["x-content-type-options"], "nosniff")
            self.assertEqual(fields["content-length"], str(len(body)))
            self.assertNotIn("server", fields)

    async def test_kept_from_other_pages(self) -> None:
        """A browser neither shows an answer in a frame, nor lets another page have it, nor tells where it came from."""
        for path in ("/", "/metrics", "/status", "/nowhere"):
            _, fields, _ = await self.ask(path)
            self.assertEqual(fields["x-frame-options"], "DENY")
            self.assertEqual(fields["cross-origin-resource-policy"], "same-origin")
            self.assertEqual(fields["referrer-policy"], "no-referrer")
            self.assertIn("default-src 'none'", fields["content-security-policy"])
            self.assertIn("frame-ancestors 'none'", fields["content-security-policy"])
            self.assertNotIn("access-control-allow-origin", fields)

    async def test_head(self) -> None:
        """HEAD gets the fields of GET and no body."""
        code, fields, body = await self.ask("/healthz", method="HEAD")
        self.assertEqual((code, body), (200, b""))
        self.assertGreater(int(fields["content-length"]), 0)

    async def test_not_found(self) -> None:
        """Other paths, also the server-wide one, are not found."""
        for path in ("/metrics/", "/x", "//metrics", "*"):
            self.assertEqual((await self.ask(path))[0], 404)

    async def test_methods(self) -> None:
        """Nothing can be changed: only GET and HEAD are allowed, and a body is thrown away."""
        for method in ("POST", "PUT", "OPTIONS", "TRACE", "BREW"):
            code, fields, _ = await self.ask("/status", method=method, more="Content-Length: 0\r\n")
            self.assertEqual((code, fields["allow"]), (405, "GET, HEAD"))

    async def test_body(self) -> None:
        """What somebody sends in a body is neither kept nor looked at, not even a broken form."""
        form = "Content-Type: multipart/form-data\r\nContent-Length: 3\r\n"
        endpoint = await self.talk(f"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{form}\r\na=b".encode())
        self.assertIn(b" 405 ", (await endpoint.closed).split(b"\r\n")[0])

    async def test_broken_page(self) -> None:
        """A page that fails answers 500 without details, and the log has the cause."""

        def broken() -> Status:
            raise RuntimeError("inner detail")

        self.status = broken
        code, _, body = await self.ask("/status")
        self.assertEqual(code, 500)
        self.assertNotIn(b"inner detail", body)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)


class HostTests(SiteCase):
    """Against web pages that make their own name resolve to 127.0.0.1."""

    async def test_loopback_names(self) -> None:
        """The names of loopback are served."""
        for host in ("localhost", "LocalHost.:9000", "127.0.0.1", "127.9.9.9:80", "[::1]:80"):
            self.assertEqual((await self.ask("/healthz", host=host))[0], 200, host)

    async def test_other_names(self) -> None:
        """Any other name is not, and learns nothing."""
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1", "", "[::2]"):
            code, _, body = await self.ask("/status", host=host)
            self.assertEqual(code, 421, host)
            self.assertNotIn(b"m-1", body)

    async def test_two_hosts(self) -> None:
        """Two Host fields are refused (RFC 9112 section 3.2)."""
        self.assertEqual((await self.ask("/status", more="Host: localhost\r\n"))[0], 400)

    async def test_no_host(self) -> None:
        """HTTP/1.0 has no Host and no browser speaks it; HTTP/1.1 must have one."""
        old = await self.talk(b"GET /healthz HTTP/1.0\r\n\r\n")
        self.assertIn(b" 200 ", (await old.closed).split(b"\r\n")[0])
        new = await self.talk(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
        self.assertIn(b" 400 ", (await new.closed).split(b"\r\n")[0])


class OtherPagesTests(SiteCase):
    """Against web pages that ask for the page's very address."""

    async def test_refused(self) -> None:
        """What another page asks for is refused, whatever the path and the way, and learns nothing."""
        for more in (
            "Origin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: cors\r\n",  # fetch()
            "Origin: null\r\n",  # the same from a sandboxed frame
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image\r\n",
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: script\r\n",
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe\r\n",
            "Sec-Fetch-Site: same-site\r\n",  # from another port of this machine
            f"Origin: https://127.0.0.1:{self.site.port}\r\n",
            f"Origin: http://127.0.0.1:{self.site.port + 1}\r\n",
            f"Origin: http://localhost:{self.site.port}\r\n",
            f"Origin: http://127.0.0.1:{self.site.port}\r\nOrigin: http://evil.example\r\n",
            "Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n",
        ):
            for path in ("/", "/status", "/metrics", "/readyz", "/healthz", "/nowhere"):
                code, _, body = await self.ask(path, more=more)
                self.assertEqual(code, 403, (path, more))
                self.assertNotIn(b"m-1", body)

    async def test_let_in(self) -> None:
        """Typed addresses, links of the page's own, Prometheus and curl are served."""
        for more in (
            "",
            "User-Agent: Prometheus/3.5.0\r\nAccept: text/plain;version=0.0.4\r\nAccept-Encoding: gzip\r\n",
            "Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-User: ?1\r\n",
            "Sec-Fetch-Site: same-origin\r\nReferer: http://localhost/\r\n",
            f"Origin: http://127.0.0.1:{self.site.port}\r\nSec-Fetch-Site: same-origin\r\n",
        ):
            self.assertEqual((await self.ask("/status", more=more))[0], 200, more)


class LifeTests(SiteCase):
    """Starting and stopping."""

    async def test_restart(self) -> None:
        """It can be stopped and started again, and tells its port only while it runs."""
        self.assertGreater(self.site.port, 0)
        await self.site.stopService()
        self.assertEqual(self.site.port, 0)
        await self.site.stopService()
        self.site.startService()
        self.assertEqual((await self.ask("/healthz"))[0], 200)

    async def test_stop_ends_connections(self) -> None:
        """Stopping waits for no client: an idle one and one in the middle of a request are cut off."""
        idle = await self.talk(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await idle.opened
        slow = await self.talk(b"GET /healthz HTTP/1.1\r\n")
        await self.site.stopService()
        self.assertIn(b" 200 ", await idle.closed)
        self.assertEqual(await slow.closed, b"")

    async def test_too_many_connections(self) -> None:
        """More connections than the bound are closed at once, and there is room again when some end."""
        self.patch(site, "_MOST_CONNECTIONS", 1)
        first = await self.talk(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await first.opened
        second = await self.talk(b"")
        self.assertEqual(await second.closed, b"")
        first.transport.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await first.closed
        self.assertEqual((await self.ask("/healthz"))[0], 200)

    async def test_port_taken(self) -> None:
        """A port that is taken is a mistake in the configuration, named with its key and what to do."""
        other = self.make(f"127.0.0.1:{self.site.port}")
        error = self.assertRaises(ConfigError, other.startService)
        self.assertEqual(error.key, "observe.listen")
        self.assertIn("choose another port", str(error))
        self.assertFalse(other.running)
        await other.stopService()

    async def test_localhost(self) -> None:
        """``localhost`` is 127.0.0.1."""
        other = self.make("localhost:0")
        other.startService()
        self.addCleanup(other.stopService)
        socket.create_connection(("127.0.0.1", other.port), timeout=5).close()


class PagesTests(SynchronousTestCase):
    """Decisions that need no socket."""

    def test_published(self) -> None:
        """Who came in over another address than loopback may use any name: the operator published the page."""
        pages = Pages(CollectorRegistry(), some_status)
        for local, code in (
            ("192.0.2.7", 200),
            ("2001:db8::7", 200),
            ("::ffff:192.0.2.7", 200),
            ("127.0.0.1", 421),
            ("::1", 421),
            ("::ffff:127.0.0.1", 421),
        ):
            headers = Headers({b"host": [b"agent.example:9464"]})
            self.assertEqual(pages.answer(b"GET", b"/healthz", headers, local, b"HTTP/1.1").code, code, local)

    def test_published_to_other_pages(self) -> None:
        """A page that is published is no more for other pages than one that is not."""
        pages = Pages(CollectorRegistry(), some_status)
        for origin, code in ((b"http://agent.example:9464", 200), (b"http://evil.example", 403), (b"null", 403)):
            headers = Headers({b"host": [b"agent.example:9464"], b"origin": [origin]})
            self.assertEqual(pages.answer(b"GET", b"/status", headers, "192.0.2.7", b"HTTP/1.1").code, code, origin)

    def test_wrong_listen(self) -> None:
        """A wrong address is refused before anything starts."""
        for listen in ("9464", "127.0.0.1:x", "name.example:9464", "127.0.0.1:99999"):
            error = self.assertRaises(
                ConfigError, StatusSite, listen, reactor=reactor, registry=CollectorRegistry(), status=some_status
            )
            self.assertEqual(error.key, "observe.listen")
