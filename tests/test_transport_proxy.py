"""Connections through a proxy, on real loopback sockets: what is sent to whom, and every way in which it can fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from commsmgr.config import TLS
from commsmgr.errors import (
    CommsError,
    ConfigError,
    ConnectFailed,
    DeadlineExceeded,
    ProxyRefused,
    TLSFailed,
    TransportError,
)
from commsmgr.proxies import Proxy
from commsmgr.transport.answer_head import MAX_HEAD_BYTES
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.proxy import password_of
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.loopback import FixedResolver, ReactorWith, Recorder, Recording, listen
from tests.proxy_kit import TunnelProxy
from tests.test_transport_tls import REQUEST, client_factory

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def echo(recorder: Recorder) -> None:
    recorder.transport.write(b"echo")


class ProxyCase(TestCase):
    """A dialler, a backend ``backend.example``, and a proxy ``proxy.example`` before it."""

    timeout = 20
    authority = Authority("Test CA")
    backend = authority.issue("backend", names=["backend.example"], ips=["::1"])
    proxy_itself = authority.issue("proxy", names=["proxy.example"])

    def setUp(self) -> None:
        self.directory = self.mktemp()
        self.ca_file = self.authority.save_pem(os.path.join(self.directory, "ca.pem"))
        self.resolver = FixedResolver(["127.0.0.1"])
        self.facts: list[tuple[Target, TLSFacts]] = []
        self.secrets: list[str] = []

    def dialer(self, proxy: Proxy, *, on: Any = None, **tls: Any) -> Dialer:
        """Return a dialler that reaches everything through ``proxy``."""
        return Dialer(
            on or ReactorWith(resolver=self.resolver),
            TLS(**{"ca_file": self.ca_file, "ca_exclusive": True, **tls}),
            observe_tls=lambda target, facts: self.facts.append((target, facts)),
            proxy=lambda target: proxy,
            user_agent="commsmgr/test",
            wall=lambda: 0.0,
            secret=self.secrets.append,
        )

    def proxy(self, server: Any, *, tls: Any = None, **credentials: str) -> Proxy:
        """Let ``server`` be the proxy."""
        self.port = listen(self, server, tls=tls)
        scheme = "http" if tls is None else "https"
        return Proxy(Target(scheme, "proxy.example", self.port, "/"), "proxy.url", **credentials)

    def target(self, server: Recording, *, tls: Any = None, host: str = "backend.example") -> Target:
        """Let ``server`` be the backend."""
        port = listen(self, server, tls=tls, interface="::1" if ":" in host else "127.0.0.1")
        return Target("http" if tls is None else "https", host, port, "/")

    async def conversation(self, dialer: Dialer, target: Target) -> Any:
        """Connect to a backend that echoes, hear it, and leave."""
        client: Any = await dialer.endpoint(target, timeout=10).connect(client_factory())
        self.assertEqual(await client.received, b"echo")
        client.transport.loseConnection()
        await client.lost
        return client

    async def failure(self, dialer: Dialer, kind: type[CommsError], *words: str, **more: Any) -> Any:
        """Fail to connect to ``backend.example:443``; the error names it, and nothing was sent."""
        target = Target(more.get("scheme", "https"), "backend.example", 443, "/")
        connecting = dialer.endpoint(target, timeout=more.get("timeout", 10)).connect(client_factory())
        error: Any = await self.assertFailure(connecting, kind)
        for word in ("backend.example", *words):
            self.assertIn(word, str(error))
        self.assertTrue(str(error).isprintable())
        self.assertFalse(error.may_have_arrived)
        self.assertTrue(error.retryable)
        return error


class ThroughTests(ProxyCase):
    """It works, and each party hears what is meant for it."""

    async def test_tls(self) -> None:
        """The proxy is told host and port and no more; TLS is with the backend, which proves its own name."""
        server, proxy = Recording(echo), TunnelProxy()
        target = self.target(server, tls=self.backend.server_context())
        await self.conversation(self.dialer(self.proxy(proxy)), target)
        wanted = b"backend.example:%d" % target.port
        head = b"CONNECT " + wanted + b" HTTP/1.1\r\nHost: " + wanted + b"\r\nUser-Agent: commsmgr/test\r\n\r\n"
        self.assertEqual(proxy.requests, [head])
        self.assertEqual(server.received, REQUEST)
        self.assertNotIn(REQUEST, proxy.carried)
        self.assertEqual(proxy.carried[:3], b"\x16\x03\x01", "a TLS record, the client's hello")
        # The name of the backend is looked up by the proxy, not here.
        self.assertEqual(self.resolver.asked, ["proxy.example"])
        ((told, facts),) = self.facts
        self.assertEqual((told, facts.subject), (target, "CN=backend"))

    async def test_plain(self) -> None:
        """http and ws go by CONNECT as well: the proxy's field never reaches a backend, nor the request the proxy."""
        server, proxy = Recording(echo), TunnelProxy()
        await self.conversation(
            self.dialer(self.proxy(proxy, username="us", password="pass-word")), self.target(server)
        )
        self.assertIn(b"\r\nProxy-Authorization: Basic dXM6cGFzcy13b3Jk\r\n", proxy.requests[0])
        self.assertEqual(server.received, REQUEST)
        self.assertEqual(self.secrets, ["pass-word", "dXM6cGFzcy13b3Jk"])

    async def test_tls_in_tls(self) -> None:
        """With TLS to the proxy, the proxy proves its own name, and the backend its own inside."""
        server, proxy = Recording(echo), TunnelProxy()
        target = self.target(server, tls=self.backend.server_context())
        way = self.proxy(proxy, tls=self.proxy_itself.server_context(), username="us", password="pass-word")
        client = await self.conversation(self.dialer(way), target)
        self.assertEqual(len(proxy.requests), 1)
        self.assertEqual(server.received, REQUEST)
        self.assertEqual([target for target, _ in self.facts], [target])
        self.assertIsNotNone(client.transport.getPeerCertificate())

    async def test_much_data_in_both_layers(self) -> None:
        """Two layers of TLS carry a megabyte whole, with the back pressure of sockets that are full."""
        body = os.urandom(1 << 20)

        def answer(recorder: Recorder) -> None:
            if len(recorder.received) == len(REQUEST) + len(body):
                recorder.transport.write(b"echo")

        server, proxy = Recording(answer), TunnelProxy()
        target = self.target(server, tls=self.backend.server_context())
        way = self.proxy(proxy, tls=self.proxy_itself.server_context())
        client: Any = await self.dialer(way).endpoint(target, timeout=10).connect(client_factory())
        client.transport.write(body)
        self.assertEqual(await client.received, b"echo")
        self.assertEqual(server.received, REQUEST + body)
        client.transport.loseConnection()
        await client.lost

    async def test_ipv6_literal(self) -> None:
        """An IPv6 backend is asked for in brackets, and its certificate holds the address."""
        server, proxy = Recording(echo), TunnelProxy()
        target = self.target(server, tls=self.backend.server_context(), host="::1")
        await self.conversation(self.dialer(self.proxy(proxy)), target)
        self.assertIn(
            b"CONNECT [::1]:%d HTTP/1.1\r\nHost: [::1]:%d\r\n" % (target.port, target.port), proxy.requests[0]
        )

    async def test_answer_in_pieces(self) -> None:
        """The answer may come byte by byte, after interim ones."""
        answer = b"HTTP/1.1 100 Continue\r\n\r\n" + ESTABLISHED
        proxy = TunnelProxy(lambda client: client.open(*(bytes([byte]) for byte in answer)))
        server = Recording(echo)
        target = self.target(server, tls=self.backend.server_context())
        await self.conversation(self.dialer(self.proxy(proxy)), target)

    async def test_password_from_a_file(self) -> None:
        """The file is read for each connection, so that a new password needs no restart."""
        file = Path(self.directory, "password")
        server, proxy = Recording(echo), TunnelProxy()
        dialer = self.dialer(self.proxy(proxy, username="us", password_file=str(file)))
        target = self.target(server)
        for password, sent in ((b"one\n", b"dXM6b25l"), (b"two\r\n", b"dXM6dHdv")):
            file.write_bytes(password)
            await self.conversation(dialer, target)
            self.assertIn(b"Proxy-Authorization: Basic " + sent + b"\r\n", proxy.requests[-1])

    async def test_the_agents_certificate_is_for_backends(self) -> None:
        """A backend that asks for a certificate gets it through the tunnel; a proxy that asks gets none."""
        clients = Authority("Clients CA")
        mine = clients.issue("agent", client=True).save(self.directory)
        own = {"certificate": mine.cert_pem, "key": mine.key_pem}
        server = Recording(echo)
        target = self.target(server, tls=self.backend.server_context(client_authority=clients))
        await self.conversation(self.dialer(self.proxy(TunnelProxy()), **own), target)
        asks = self.proxy(TunnelProxy(), tls=self.proxy_itself.server_context(client_authority=clients))
        error = await self.assertFailure(
            self.dialer(asks, **own).endpoint(target, timeout=10).connect(client_factory()), TransportError
        )
        self.assertIn("wants a certificate", str(error))
        self.assertEqual(len(server.connections), 1)

    async def test_proxy_dies_under_a_connection(self) -> None:
        """When the proxy goes, the connection is lost, as any other."""
        server, proxy = Recording(echo), TunnelProxy()
        target = self.target(server, tls=self.backend.server_context())
        client: Any = await self.dialer(self.proxy(proxy)).endpoint(target, timeout=10).connect(client_factory())
        await client.received
        proxy.clients[0].transport.abortConnection()
        self.assertIsInstance(await client.lost, Exception)


class PreparationTests(ProxyCase):
    """At the start."""

    def test_files(self) -> None:
        """The TLS files are read when any connection needs them, be it the one to a proxy, and not otherwise."""
        plain, secure = (Proxy(Target(scheme, "p.example", 1, "/"), "proxy.url") for scheme in ("http", "https"))
        http, https = (Target(scheme, "b.example", 2, "/") for scheme in ("http", "https"))
        for proxy, target, needed in (
            (plain, http, False),
            (plain, https, True),
            (secure, http, True),
        ):
            dialer = self.dialer(proxy, ca_file="/nonexistent/ca.pem")
            if needed:
                error = self.assertRaises(ConfigError, dialer.prepare, {target: "main"})
                self.assertIn("/nonexistent/ca.pem", str(error))
            else:
                dialer.prepare({target: "main"})


class RefusedTests(ProxyCase):
    """What the proxy says, or does not, is an error with both names in it, and typed."""

    def says(self, *pieces: bytes, close: bool = False) -> TunnelProxy:
        """Return a proxy that answers so, without any tunnel."""

        def answer(client: Any) -> None:
            client.transport.write(b"".join(pieces))
            if close:
                client.transport.loseConnection()

        return TunnelProxy(answer)

    async def refused(self, *pieces: bytes, words: tuple[str, ...], **credentials: str) -> Any:
        """Be refused by a proxy that answers so; the connection to it is dropped."""
        server = self.says(*pieces)
        way = self.proxy(server, **credentials)
        error = await self.failure(self.dialer(way), ProxyRefused, f"proxy http://proxy.example:{self.port}", *words)
        await server.clients[0].lost
        return error

    async def test_credentials_wanted(self) -> None:
        """407 without credentials says that they are wanted."""
        error = await self.refused(
            b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="r"\r\n\r\n', words=("wants a user and a password",)
        )
        self.assertEqual(error.status, 407)

    async def test_credentials_wrong(self) -> None:
        """401 and 407 to credentials say that they are wrong; it is no UpgradeRefused, and not about the token."""
        for status in (401, 407):
            error = await self.refused(
                b"HTTP/1.1 %d No\r\n\r\n" % status, words=("is wrong",), username="us", password="open-sesame"
            )
            self.assertEqual(error.status, status)
            self.assertNotIn("sesame", str(error))

    async def test_retry_after(self) -> None:
        """503 bears the time that the proxy asks for, and the page behind it is not read."""
        page = b"<html>" + b"x" * 100_000
        error = await self.refused(
            b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Type: text/html\r\n\r\n" + page, words=("cannot reach",)
        )
        self.assertEqual(error.retry_after, 7.0)
        self.assertNotIn("<html>", str(error))

    async def test_no_http(self) -> None:
        """Something else than a proxy is called that."""
        for data in (b"<html>Welcome</html>\n", b"\x15\x03\x03\x00\x02\x02\x28", b"SSH-2.0-OpenSSH\r\n"):
            error = await self.refused(data, words=("is not HTTP",))
            self.assertEqual(error.status, 0)

    async def test_endless_head(self) -> None:
        """A head that does not end is given up."""
        await self.refused(b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES, words=("more than 16384 bytes",))

    async def test_more_than_an_answer(self) -> None:
        """What the proxy says behind its 2xx is never taken for the backend's word, with TLS or without."""
        for scheme in ("https", "http"):
            server = self.says(ESTABLISHED, b"HTTP/1.1 200 OK\r\n\r\n")
            error = await self.failure(self.dialer(self.proxy(server)), ProxyRefused, "it is no tunnel", scheme=scheme)
            self.assertEqual(error.status, 0)
            await server.clients[0].lost

    async def test_closed_at_once(self) -> None:
        """A proxy that closes instead of answering is ConnectFailed with its name."""

        class Closing(Recording):
            def buildProtocol(self, addr: Any) -> Recorder:
                recorder = super().buildProtocol(addr)
                reactor.callLater(0, lambda: recorder.transport and recorder.transport.loseConnection())
                return recorder

        await self.failure(
            self.dialer(self.proxy(Closing())), ConnectFailed, "the proxy http://proxy.example", "connection was closed"
        )

    async def test_closed_within_the_answer(self) -> None:
        """The same with half an answer."""
        await self.failure(
            self.dialer(self.proxy(self.says(b"HTTP/1.1 200 OK\r\n", close=True))), ConnectFailed, "was not answered"
        )

    async def test_not_there(self) -> None:
        """A closed port is the proxy's, and named so; a name without an address too."""
        listening: Any = reactor.listenTCP(0, Recording(), interface="127.0.0.1")
        port = listening.getHost().port
        await listening.stopListening()
        way = Proxy(Target("http", "proxy.example", port, "/"), "https_proxy")
        connecting = self.dialer(way).endpoint(Target("https", "backend.example", 443, "/"), timeout=10)
        error = await self.assertFailure(connecting.connect(client_factory()), ConnectFailed)
        self.assertIn(f"cannot connect to the proxy http://proxy.example:{port}", str(error))
        self.assertIn("backend.example", str(error))
        self.resolver = FixedResolver([])
        await self.failure(self.dialer(way), ConnectFailed, "the name proxy.example has no address")

    async def test_tunnel_that_is_none(self) -> None:
        """After a 200, whoever answers in the backend's place fails at TLS, and the error says through whom."""
        for reply in (b"HTTP/1.1 200 OK\r\n\r\n<html>log in</html>", b"\x15\x03\x03\x00\x02\x02\x28", b""):

            def talk(client: Any, reply: bytes = reply) -> None:
                if client.transport is not None:
                    client.transport.write(reply)
                    client.transport.loseConnection()

            def answer(client: Any, talk: Any = talk) -> None:
                client.transport.write(ESTABLISHED)
                client.outward = _Deaf(lambda: talk(client))

            server = TunnelProxy(answer)
            await self.failure(
                self.dialer(self.proxy(server)), TLSFailed, f"through the proxy http://proxy.example:{self.port}"
            )

    async def test_impostor_behind_the_proxy(self) -> None:
        """A proxy that leads to somebody else, or breaks TLS open with an issuer of its own, gets no byte."""
        for issued, word in (
            (self.proxy_itself, "it is for proxy.example only"),
            (Authority("Middle Box CA").issue(names=["backend.example"]), "issuer"),
        ):
            server = Recording(echo)
            target = self.target(server, tls=issued.server_context())
            connecting = self.dialer(self.proxy(TunnelProxy())).endpoint(target, timeout=10)
            error = await self.assertFailure(connecting.connect(client_factory()), TLSFailed)
            self.assertIn(word, str(error))
            self.assertIn("through the proxy", str(error))
            self.assertEqual((server.received, self.facts), (b"", []))

    async def test_proxy_that_is_an_impostor(self) -> None:
        """With TLS to the proxy, one that cannot prove its name is told neither credentials nor backend."""
        server = Recording()
        way = self.proxy(server, tls=self.backend.server_context(), username="us", password="pass-word")
        await self.failure(
            self.dialer(way),
            TLSFailed,
            f"TLS with the proxy https://proxy.example:{self.port} on the way to backend.example:",
        )
        self.assertEqual(server.received, b"")

    async def test_proxy_without_tls(self) -> None:
        """A proxy that was said to speak TLS and does not is told nothing in the clear."""
        server = Recording(lambda recorder: recorder.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        port = listen(self, server)
        way = Proxy(Target("https", "proxy.example", port, "/"), "proxy.url", username="us", password="pass-word")
        error = await self.assertFailure(
            self.dialer(way)
            .endpoint(Target("https", "backend.example", 443, "/"), timeout=10)
            .connect(client_factory()),
            TLSFailed,
        )
        self.assertIn("the proxy", str(error))
        self.assertNotIn(b"CONNECT", server.received)

    async def test_password_that_is_not_there(self) -> None:
        """Without its password's file nobody is connected to, and the error names the file alone."""
        server = TunnelProxy()
        missing = self.proxy(server, username="us", password_file="/nonexistent/pw")
        endpoint = self.dialer(missing).endpoint(Target("https", "backend.example", 443, "/"), timeout=10)
        error = await self.assertFailure(endpoint.connect(client_factory()), ConnectFailed)
        self.assertEqual(str(error), "proxy.password_file '/nonexistent/pw' cannot be read: No such file or directory")
        for content, words in (
            (b"se\x00cret", "control characters"),
            (b"secret\xff", "not UTF-8"),
            (b"secret" * 1000, "more than 1024"),
        ):
            file = Path(self.directory, "password")
            file.write_bytes(content)
            way = Proxy(missing.target, "proxy.url", username="us", password_file=str(file))
            error = self.assertRaises(ConnectFailed, password_of, way)
            self.assertIn(words, str(error))
            self.assertNotIn("secret", str(error))
        way = Proxy(missing.target, "proxy.url", username="us", password_file=self.directory)
        self.assertIn("no regular file", str(self.assertRaises(ConnectFailed, password_of, way)))
        self.assertEqual(server.clients, [])

    async def test_factory_without_a_protocol(self) -> None:
        """When nobody wants the connection any more, it is dropped, and that is an error."""
        server = self.says(ESTABLISHED)
        factory = client_factory()
        factory.buildProtocol = lambda addr: None
        target = Target("http", "backend.example", 80, "/")
        connecting = self.dialer(self.proxy(server)).endpoint(target, timeout=10).connect(factory)
        await self.assertFailure(connecting, ConnectFailed)
        await server.clients[0].lost


class _Deaf:
    """Stands where a tunnel's other end would; tells of the first bytes that come."""

    def __init__(self, heard: Any) -> None:
        self.transport = self
        self._heard = heard

    def write(self, data: bytes) -> None:
        self._heard()

    def loseConnection(self) -> None:
        pass


class InterruptionTests(ProxyCase):
    """One deadline over all of it, and cancelling at any time."""

    async def interrupted(self, server: Any, waiting: str, *, cancel: bool) -> None:
        """Connect, on a clock that stands, until the dialler waits for ``waiting``; then interrupt it."""
        clock = Clock()
        way = self.proxy(server)
        on = ReactorWith(clock=clock, resolver=self.resolver)
        arrived = server.arrived = Deferred()
        connecting = self.dialer(way, on=on).endpoint(Target("https", "backend.example", 443, "/"), timeout=20)
        result = connecting.connect(client_factory())
        await arrived
        if cancel:
            result.cancel()
            await self.assertFailure(result, CancelledError)
        else:
            clock.advance(20)
            error = await self.assertFailure(result, DeadlineExceeded)
            self.assertIn(f"backend.example not reached within 20 s: still {waiting}", str(error))
            self.assertIn(f"proxy {way.url}", str(error))
            self.assertFalse(error.may_have_arrived)
        self.assertEqual(clock.getDelayedCalls(), [])
        for client in server.clients:
            await client.lost

    async def test_proxy_that_says_nothing(self) -> None:
        """A proxy that never answers costs the deadline, and is named; its connection is dropped."""
        for cancel in (False, True):
            server: Any = TunnelProxy(lambda client: reactor.callLater(0, client.proxy.arrived.callback, None))
            await self.interrupted(server, "waiting for the proxy", cancel=cancel)

    async def test_backend_that_says_nothing(self) -> None:
        """The same with a tunnel behind which nobody speaks."""

        def answer(client: Any) -> None:
            client.transport.write(ESTABLISHED)
            client.outward = _Deaf(lambda: reactor.callLater(0, client.proxy.arrived.callback, None))

        for cancel in (False, True):
            await self.interrupted(TunnelProxy(answer), "in the TLS handshake through the proxy", cancel=cancel)

    async def test_proxy_that_says_nothing_in_tls(self) -> None:
        """The same with a proxy that hangs in its own handshake."""
        for cancel in (False, True):
            arrived: Deferred[None] = Deferred()

            def heard(recorder: Recorder, arrived: Deferred[None] = arrived) -> None:
                reactor.callLater(0, arrived.callback, None)

            server = Recording(heard)
            port = listen(self, server)
            clock = Clock()
            way = Proxy(Target("https", "proxy.example", port, "/"), "proxy.url")
            dialer = self.dialer(way, on=ReactorWith(clock=clock, resolver=self.resolver))
            result = dialer.endpoint(Target("https", "backend.example", 443, "/"), timeout=20).connect(client_factory())
            await arrived
            if cancel:
                result.cancel()
                await self.assertFailure(result, CancelledError)
            else:
                clock.advance(20)
                error = await self.assertFailure(result, DeadlineExceeded)
                self.assertIn(f"in the TLS handshake with the proxy https://proxy.example:{port}", str(error))
            self.assertEqual(clock.getDelayedCalls(), [])
            await server.connections[-1].lost

    async def test_proxy_that_drips(self) -> None:
        """Byte after byte, without an end, does not prolong the deadline."""

        def answer(client: Any) -> None:
            client.transport.write(b"HTTP/1.1 200 OK\r\nX: ")
            client.say([b"x"] * 20)
            reactor.callLater(0, client.proxy.arrived.callback, None)

        await self.interrupted(TunnelProxy(answer), "waiting for the proxy", cancel=False)

    def test_name_of_the_proxy_that_is_never_found(self) -> None:
        """A name server that does not answer for the proxy's name costs the deadline."""
        clock = Clock()
        way = Proxy(Target("http", "proxy.example", 3128, "/"), "https_proxy")
        dialer = self.dialer(way, on=ReactorWith(clock=clock, resolver=FixedResolver(None)))
        result = dialer.endpoint(Target("https", "backend.example", 443, "/"), timeout=20).connect(client_factory())
        clock.advance(20)
        error: Any = self.failureResultOf(result, DeadlineExceeded).value
        self.assertIn("still resolving the name of the proxy http://proxy.example:3128", str(error))
