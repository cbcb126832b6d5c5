"""Whole managers behind the proxies that people run: squid and tinyproxy, as processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import quote

from twisted.internet.defer import Deferred, succeed
from twisted.logger import formatEvent
from twisted.protocols.portforward import ProxyClient, ProxyClientFactory, ProxyFactory, ProxyServer

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import ConnectFailed, DeadlineExceeded, ProxyRefused, TLSFailed
from commsmgr.manager import Manager
from commsmgr.redact import Redactor
from tests.certificates import Authority, Issued
from tests.loopback import Recording, listen
from tests.proxy_kit import PASSWORD, USER, RealProxy, Squid, Tinyproxy, TunnelProxy, real_proxy
from tests.world import MACHINE, TOKEN, Runs, WorldTestCase, nothing_held, quick, reactor, until


class CountingToken:
    """A token, and how often it was called refused."""

    def __init__(self) -> None:
        self.refusals = 0

    def get(self) -> Deferred[str]:
        return succeed(TOKEN)

    def refused(self, token: str) -> None:
        self.refusals += 1


class _SpyServer(ProxyServer):
    """Passes on what an agent sends to a proxy, and notes it."""

    class clientProtocolFactory(ProxyClientFactory):
        protocol = ProxyClient
        noisy = False

    def dataReceived(self, data: bytes) -> None:
        self.factory.seen.append(data)
        super().dataReceived(data)


class Spy(ProxyFactory):
    """
    Stands before a proxy.

    :ivar seen: what agents sent, packet by packet, in the order of arrival.
    """

    protocol = _SpyServer
    noisy = False

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.seen: list[bytes] = []


class BehindProxies:
    """What has to work behind each of them; ``kind`` says which."""

    timeout = 40
    kind: ClassVar[type[RealProxy]]
    wrong_password: ClassVar[int]
    unreachable: ClassVar[int]

    def setUp(self: Any) -> None:
        super().setUp()
        self.authority = Authority()
        self.ca_file = self.authority.save_pem(f"{self.directory}/ca.pem")

    async def proxy(self: Any, **options: Any) -> RealProxy:
        """Return a proxy of this kind that listens."""
        return await real_proxy(self, self.kind, **options)

    async def secure(self: Any, **parameters: Any) -> ReferenceBackend:
        """Return a backend with TLS."""
        paths = self.authority.issue(names=["localhost"], ips=["127.0.0.1"]).save(self.spool())
        return await self.backend(certificate=paths.cert_pem, key=paths.key_pem, **parameters)

    def behind(
        self: Any,
        backend: ReferenceBackend | str,
        settings: config.Proxy | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        sections: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> Manager:
        """Return a manager whose backend on this machine is reached through a proxy all the same."""
        whole = quick(
            backend,
            self.spool(),
            **{
                "tls": config.TLS(ca_file=self.ca_file, ca_exclusive=True),
                "proxy": settings or config.Proxy(no_proxy=()),
                "http": config.HTTP(attempts=1),
                **(sections or {}),
            },
        )
        return self.manager(whole, environ=environ or {}, **parameters)

    def settings(self: Any, port: int, password: str = "", *, scheme: str = "http") -> config.Proxy:
        """Return ``[proxy]`` for the proxy at ``port``; with credentials if there is a password."""
        credentials = {}
        if password:
            path = f"{self.spool()}/password"
            with open(path, "w") as file:
                file.write(f"{password}\n")
            credentials = {"username": USER, "password_file": path}
        return config.Proxy(url=f"{scheme}://localhost:{port}", no_proxy=(), **credentials)

    async def works(self: Any, manager: Manager, backend: ReferenceBackend, runs: Runs) -> None:
        """Commands, results, inventories and heartbeats, over WebSocket and HTTP."""
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        await manager.send_inventory({"behind": "a proxy"})
        ids = [backend.send_command(MACHINE, "echo") for _ in range(3)]
        await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))
        self.assert_once_and_in_order(backend, runs, ids)
        self.assertTrue(backend.ledger.inventory_of(MACHINE))

    async def test_the_main_job(self: Any) -> None:
        """https and wss both go through it, and it sees host and port, and nothing of what is said."""
        backend, proxy = await self.secure(), await self.proxy()
        spy = Spy(proxy.port)
        listening = reactor.listenTCP(0, spy, interface="127.0.0.1")
        self.addCleanup(listening.stopListening)
        port = listening.getHost().port
        manager = self.behind(backend, self.settings(port), handler=(runs := Runs()))
        await self.works(manager, backend, runs)
        await manager.disconnect()
        said = b"".join(spy.seen)
        self.assertGreaterEqual(said.count(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % backend.port), 2)
        self.assertEqual(said.count(b"CONNECT "), said.count(b"\r\n\r\n"), "nothing else is said in the clear")
        for secret in (TOKEN.encode(), b"Bearer", MACHINE.encode(), b"heartbeat", b"Proxy-Authorization"):
            self.assertNotIn(secret, said)
        told = {formatEvent(event) for event in self.logged("proxy.chosen")}
        self.assertEqual(
            told,
            {f"main: {each} goes through the proxy http://localhost:{port} (proxy.url)" for each in ("https", "wss")},
        )

    async def test_without_tls(self: Any) -> None:
        """http and ws go through it as well, by CONNECT, and no field for the proxy reaches the backend."""
        backend, proxy = await self.backend(), await self.proxy(password=True)
        manager = self.behind(backend, self.settings(proxy.port, PASSWORD), handler=(runs := Runs()))
        await self.works(manager, backend, runs)

    async def test_credentials(self: Any) -> None:
        """With the right user and password from a file everything works, and neither shows anywhere."""
        backend, proxy = await self.secure(), await self.proxy(password=True)
        manager = self.behind(backend, self.settings(proxy.port, PASSWORD), handler=(runs := Runs()))
        await self.works(manager, backend, runs)
        self.secret_nowhere(manager)

    def secret_nowhere(self: Any, manager: Manager) -> None:
        """No password is in the log, which is at debug level here, or in the status."""
        shown = "\n".join([*map(formatEvent, self.logged()), *map(repr, self.logged()), repr(manager.status())])
        for secret in (PASSWORD, "YWdlbnQ6", TOKEN):
            self.assertNotIn(secret, shown)

    async def test_environment(self: Any) -> None:
        """HTTPS_PROXY with user and password, percent-encoded, is all that is needed."""
        backend, proxy = await self.secure(), await self.proxy(password=True)
        encoded = "".join(f"%{ord(character):02X}" for character in PASSWORD)
        environ = {"HTTPS_PROXY": f"http://{quote(USER)}:{encoded}@localhost:{proxy.port}/"}
        manager = self.behind(backend, environ=environ, handler=(runs := Runs()))
        await self.works(manager, backend, runs)
        self.assertIn("(HTTPS_PROXY)", formatEvent(self.logged("proxy.chosen")[0]))
        self.secret_nowhere(manager)

    async def test_exceptions(self: Any) -> None:
        """What NO_PROXY, or the default of ``proxy.no_proxy``, names is reached directly, though the proxy is dead."""
        backend, proxy = await self.secure(), await self.proxy()
        await proxy.kill()
        url = f"http://localhost:{proxy.port}"
        for settings, environ in (
            (config.Proxy(no_proxy=()), {"https_proxy": url, "no_proxy": "10.0.0.0/8, 127.0.0.0/8"}),
            (config.Proxy(), {"https_proxy": url}),
            (config.Proxy(url=url), {}),
            (config.Proxy(no_proxy=(), environment=False), {"https_proxy": url}),
        ):
            manager = self.behind(backend, settings, environ=environ)
            await manager.connect()
            self.assertEqual("ok", (await manager.send_heartbeat()).status)
            await manager.disconnect()
        self.assertEqual([], self.logged("proxy.chosen"))
        other = self.behind(backend, environ={"https_proxy": url, "no_proxy": "10.0.0.0/8"})
        with self.assertRaises(ConnectFailed):
            other.startService()
            await other.started()
            await other.send_heartbeat()

    async def test_wrong_credentials(self: Any) -> None:
        """A wrong password is the proxy's refusal, seldom repeated; the token has nothing to do with it."""
        backend, proxy = await self.secure(), await self.proxy(password=True)
        for password, status in (("not-" + PASSWORD, self.wrong_password), ("", 407)):
            token = CountingToken()
            manager = self.behind(
                backend,
                self.settings(proxy.port, password),
                token=token,
                sections={"auth": config.Auth(refused_delay=30.0)},
            )
            manager.startService()
            await manager.started()
            with self.assertRaises(ProxyRefused) as caught:
                await manager.send_heartbeat()
            self.assertEqual(status, caught.exception.status)
            self.assertIn(f"the proxy http://localhost:{proxy.port}", str(caught.exception))
            self.assertIn("is wrong" if password else "wants a user and a password", str(caught.exception))
            await until(lambda manager=manager: manager.status().problems)
            (ended,) = self.logged("link.ended")
            self.assertEqual("proxy-refused", ended["reason"])
            self.assertGreaterEqual(ended["wait"], 15.0)
            self.assertEqual(0, token.refusals)
            self.secret_nowhere(manager)
            await manager.disconnect()
            self.events.clear()
        self.assertFalse(backend.connected(MACHINE))

    async def test_unreachable_backend(self: Any) -> None:
        """A backend that the proxy cannot reach is left for the next one, which it can."""
        backend, proxy = await self.secure(), await self.proxy()
        gone = await self.secure()
        url = gone.url
        await gone.stopService()
        backends = (config.Backend(url=url, name="gone"), config.Backend(url=backend.url, name="there"))
        manager = self.behind(
            backend,
            self.settings(proxy.port),
            sections={"backends": backends, "breaker": config.Breaker(failures=2, open_for=5.0)},
        )
        manager.startService()
        await manager.started()
        with self.assertRaises(ProxyRefused) as caught:
            await manager.send_heartbeat()
        self.assertEqual(self.unreachable, caught.exception.status)
        self.assertIn("it cannot reach the backend", str(caught.exception))
        await manager.when_connected()
        await until(lambda: backend.connected(MACHINE))
        (moved,) = self.logged("backends.moved")
        self.assertEqual(("gone", "there"), (moved["old"], moved["backend"]))

    async def test_killed_while_connected(self: Any) -> None:
        """A proxy that dies takes the connection along; when it is back so is the agent, and nothing is lost."""
        backend, proxy = await self.secure(), await self.proxy()
        manager = self.behind(backend, self.settings(proxy.port), handler=(runs := Runs()))
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        ids = [backend.send_command(MACHINE, "echo")]
        ids += [backend.send_command(MACHINE, "wait") for _ in range(2)]
        await until(lambda: runs.waiting == 2)
        await proxy.kill()
        await until(lambda: not manager.status().connected and not backend.connected(MACHINE))
        runs.release()
        ids += [backend.send_command(MACHINE, "echo") for _ in range(2)]
        await until(lambda: len(self.logged("link.ended")) > 2)
        self.assertIn("cannot connect to the proxy", formatEvent(self.logged("link.ended")[-1]))
        self.assertFalse(backend.connected(MACHINE), "there is no way around the proxy")
        await proxy.start()
        await until(lambda: len(backend.ledger.results()) == len(ids) and nothing_held(manager))
        self.assert_once_and_in_order(backend, runs, ids)

    async def test_tls_to_the_proxy(self: Any) -> None:
        """TLS to the proxy works, TLS to the backend within it; a proxy with another name is told nothing."""
        backend = await self.secure()
        for issued, trusted in (
            (self.authority.issue(names=["localhost"]), True),
            (self.authority.issue(names=["elsewhere.example"]), False),
        ):
            port = await self.with_tls(issued)
            manager = self.behind(backend, self.settings(port, PASSWORD, scheme="https"), handler=(runs := Runs()))
            if trusted:
                await self.works(manager, backend, runs)
            else:
                manager.startService()
                await manager.started()
                with self.assertRaises(TLSFailed) as caught:
                    await manager.send_heartbeat()
                self.assertIn(f"TLS with the proxy https://localhost:{port}", str(caught.exception))
                self.assertIn("it is for elsewhere.example only", str(caught.exception))
            await manager.disconnect()

    async def with_tls(self: Any, issued: Issued) -> int:
        """Return the port of a proxy that speaks TLS and wants credentials."""
        raise NotImplementedError


class BehindAnythingElse(WorldTestCase):
    """What answers as a proxy and is none of those."""

    async def test_a_proxy_that_quotes_the_credentials(self) -> None:
        """Credentials that a proxy sends back, in whatever form, are redacted before anybody reads them."""

        def answer(client: Any) -> None:
            sent = client.head.partition(b"Basic ")[2].partition(b"\r\n")[0]
            client.transport.write(b"HTTP/1.1 407 What is " + sent + b" and " + PASSWORD.encode() + b"?\r\n\r\n")

        port = listen(self, TunnelProxy(answer))
        redactor = Redactor()
        manager = self.manager(
            quick("https://127.0.0.1:1", self.spool(), proxy=config.Proxy(no_proxy=())),
            environ={"https_proxy": f"http://{USER}:{PASSWORD}@127.0.0.1:{port}"},
            redactor=redactor,
        )
        manager.startService()
        await until(lambda: manager.status().problems)
        (problem,) = manager.status().problems
        self.assertIn("407 What is [redacted] and [redacted]?", problem)
        said = redactor(formatEvent(self.logged("link.ended")[0]) or "")
        self.assertIn("407 What is [redacted] and [redacted]?", said)

    async def test_a_proxy_that_says_nothing(self) -> None:
        """A proxy that takes the connection and no more is named by both transports, with the backend."""
        port = listen(self, Recording())
        url = f"http://127.0.0.1:{port}"
        manager = self.manager(
            quick(
                "https://backend.example",
                self.spool(),
                websocket=config.WebSocket(connect_timeout=1.0),
                http=config.HTTP(timeout=1.0, attempts=1),
                proxy=config.Proxy(url=url, no_proxy=()),
            )
        )
        manager.startService()
        await manager.started()
        with self.assertRaises(DeadlineExceeded) as caught:
            await manager.send_heartbeat()
        await until(lambda: manager.status().problems)
        (problem,) = manager.status().problems
        for said in (problem, str(caught.exception)):
            # Of the time for the whole, a little had gone by before the connection was begun.
            self.assertRegex(
                said,
                rf"backend\.example not reached within [0-9.]+ s: still waiting for the proxy {url} to answer CONNECT",
            )

    async def test_a_portal(self) -> None:
        """A portal that says 200 to everything gets no byte of the agent's, and the operator is told of the proxy."""

        def answer(client: Any) -> None:
            client.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Log in</html>")

        portal = TunnelProxy(answer)
        port = listen(self, portal)
        manager = self.manager(
            quick("https://127.0.0.1:1", self.spool(), proxy=config.Proxy(no_proxy=())),
            environ={"https_proxy": f"http://127.0.0.1:{port}"},
        )
        manager.startService()
        await until(lambda: len(portal.clients) > 2 and manager.status().problems)
        (problem,) = manager.status().problems
        self.assertIn(f"the proxy http://127.0.0.1:{port} was answered with 200 and more than that", problem)
        self.assertEqual({b"CONNECT 127.0.0.1:1 HTTP/1.1"}, {head.split(b"\r\n")[0] for head in portal.requests})
        self.assertEqual(b"", portal.carried)


class BehindSquid(BehindProxies, WorldTestCase):
    """Debian's squid."""

    kind = Squid
    wrong_password = 407
    unreachable = 503

    async def with_tls(self, issued: Issued) -> int:
        """Squid speaks TLS itself."""
        return (await self.proxy(password=True, tls=issued)).port

    async def test_port_that_is_not_allowed(self) -> None:
        """By its usual rule it has CONNECT for port 443 only, and the error says where to look."""
        backend, proxy = await self.secure(), await self.proxy(allow="allow CONNECT !all")
        manager = self.behind(backend, self.settings(proxy.port))
        manager.startService()
        await manager.started()
        with self.assertRaises(ProxyRefused) as caught:
            await manager.send_heartbeat()
        self.assertEqual(403, caught.exception.status)
        self.assertIn(f"CONNECT 127.0.0.1:{backend.port} at the proxy", str(caught.exception))
        self.assertIn("does not allow this host or port", str(caught.exception))


class BehindTinyproxy(BehindProxies, WorldTestCase):
    """Debian's tinyproxy."""

    kind = Tinyproxy
    wrong_password = 401
    unreachable = 500

    async def with_tls(self, issued: Issued) -> int:
        """Tinyproxy knows no TLS; something before it does."""
        proxy = await self.proxy(password=True)
        factory = ProxyFactory("127.0.0.1", proxy.port)
        factory.noisy = False
        listening = reactor.listenSSL(0, factory, issued.server_context(), interface="127.0.0.1")
        self.addCleanup(listening.stopListening)
        return int(listening.getHost().port)
