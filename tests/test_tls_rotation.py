"""Files of TLS that change while the agent runs: what is open goes on, and what is opened next uses the new ones."""

from __future__ import annotations

import os
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.ssl import ContextFactory
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import TLSFailed
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.http import HTTPClient
from commsmgr.transport.system_issuers import holds_anything, trust_stores
from commsmgr.transport.tls import ContextSource
from commsmgr.transport.websocket import WebSocketClient
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.loopback import Recorder, Recording
from tests.tls_kit import HOST, TransportsCase
from tests.websocket_kit import TEXT, RecordingHandler, accept, frame

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"


class Exchangeable(ContextFactory):
    """A server's context that can be another one for the next connection."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def getContext(self) -> SSL.Context:
        return self.context.getContext()


class Handler(RecordingHandler):
    """Hands on what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.delay = 3600.0
        self.opening: Deferred[None] = Deferred()
        self.on = {"opened": lambda _: self.opening.callback(None), "received": self._received}
        self._waiting: Deferred[bytes] | None = None

    def _received(self, _: object, payload: bytes) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(payload)

    def echo(self) -> Deferred[bytes]:
        """Send something on the connection; fire with the answer."""
        waiting = self._waiting = Deferred()
        self.connections[0].send(b"are you there?")
        return waiting


class RotationTests(TransportsCase):
    """CA file, certificate and key are replaced while a WebSocket is open and requests run."""

    def setUp(self) -> None:
        super().setUp()
        self.clients = Authority("Clients CA")
        self.own = self.clients.issue("agent-1", client=True).save(self.mktemp())
        self.held: list[Recorder] = []
        self.server = Recording(self.serve)
        self.context = Exchangeable(self.backend(self.authority))
        self.port = self.listen(self.context)
        self.one_dialer = self.dialer(certificate=self.own.cert_pem, key=self.own.key_pem, ca_exclusive=True)

    def backend(self, authority: Authority) -> Any:
        """Return a server's context: a certificate of ``authority``, and one wanted of the client."""
        return authority.issue(names=[HOST]).server_context(client_authority=self.clients)

    def serve(self, recorder: Recorder) -> None:
        """Upgrade, answer, hold ``/slow`` back, and echo on a WebSocket."""
        if recorder.received.endswith(b"\r\n\r\n"):
            if b"/slow" in recorder.received:
                self.held.append(recorder)
            else:
                recorder.transport.write(accept(recorder.received) if b"Upgrade" in recorder.received else OK)
        else:
            recorder.transport.write(frame(TEXT, b"here"))

    def shown(self) -> list[str]:
        """Return the common names of the certificates that clients have shown, one for each connection."""
        return [
            each.transport.getHandle().get_peer_certificate(as_cryptography=True).subject.rfc4514_string()
            for each in self.server.connections
        ]

    def http(self) -> HTTPClient:
        client = HTTPClient(self.reactor, self.one_dialer, config.HTTP())
        self.addCleanup(client.close)
        return client

    def request(self, client: HTTPClient, path: str) -> Deferred[Any]:
        return client.exchange("GET", Target("https", HOST, self.port, ""), path)

    async def websocket(self) -> Handler:
        handler = Handler()
        client = WebSocketClient(
            self.reactor,
            Target("wss", HOST, self.port, "/"),
            dialer=self.one_dialer,
            handler=handler,
            settings=config.WebSocket(),
            subprotocols=[],
        )
        self.addCleanup(client.stop, close_within=0.01)
        client.start()
        await handler.opening
        return handler

    async def test_while_connected(self) -> None:
        """Half a pair changes nothing, a whole pair and a new CA serve the next connection; none that is open ends."""
        handler = await self.websocket()
        waiting = self.request(self.http(), "/slow")
        await self.settled(lambda: bool(self.held))
        names = ["CN=agent-1"] * 2
        self.assertEqual(self.shown(), names)

        # The certificate is there, its key not yet.
        renewed = self.clients.issue("agent-2", client=True)
        replace(self.own.cert_pem, renewed.cert_pem)
        with capturedLogs() as events:
            self.assertEqual((await self.request(self.http(), "/")).status, 200)
            await self.websocket()
        self.assertEqual(events_of(events), ["tls.files.refused"])
        names += ["CN=agent-1"] * 2
        self.assertEqual(self.shown(), names)

        # Now the key is there too.
        replace(self.own.key_pem, renewed.key_pem)
        with capturedLogs() as events:
            self.assertEqual((await self.request(self.http(), "/")).status, 200)
            await self.websocket()
        self.assertEqual(events_of(events), ["tls.files.loaded"])
        names += ["CN=agent-2"] * 2
        self.assertEqual(self.shown(), names)

        # Backend and CA file go over to another authority.
        another = Authority("Another CA")
        self.context.context = self.backend(another)
        error = await self.assertFailure(self.request(self.http(), "/"), TLSFailed)
        self.assertEqual(error.check, "issuer")
        another.save_pem(self.ca_file)
        self.assertEqual((await self.request(self.http(), "/")).status, 200)
        await self.websocket()

        # What was opened at first has noticed nothing.
        self.assertEqual(await handler.echo(), b"here")
        self.assertEqual(handler.ended, [])
        [held] = self.held
        held.transport.write(OK)
        self.assertEqual((await waiting).body, b"OK")

    async def settled(self, condition: Any) -> None:
        """Let the reactor turn until ``condition`` holds; the test's own timeout bounds it."""
        while not condition():
            turn: Deferred[None] = Deferred()
            self.reactor.callLater(0, turn.callback, None)
            await turn


def replace(path: str, content: bytes) -> None:
    """Put a file in the place of another one, as careful programs do."""
    with open(f"{path}.new", "wb") as file:
        file.write(content)
    os.replace(f"{path}.new", path)


def events_of(events: Any) -> list[str]:
    """Return the names of the events that concern files."""
    return [event["event"] for event in events if str(event.get("event")).startswith("tls.files")]


class SystemIssuersTests(TransportsCase):
    """The system's own issuers, here those of a directory of the test."""

    def setUp(self) -> None:
        super().setUp()
        self.bundle = os.path.join(self.mktemp(), "bundle.pem")
        # In the process itself, for it is OpenSSL that looks there.
        for name, value in (("SSL_CERT_FILE", self.bundle), ("SSL_CERT_DIR", "/nonexistent")):
            before = os.environ.get(name)
            if before is None:
                self.addCleanup(os.environ.pop, name)
            else:
                self.addCleanup(os.environ.__setitem__, name, before)
            os.environ[name] = value

    async def test_read_again(self) -> None:
        """Both transports trust the system's issuers, and a changed store counts from the next connection on."""
        port = self.listen(self.authority.issue(names=[HOST]).server_context())
        dialer = self.dialer(ca_file="")
        self.patch(self, "dialer", lambda **settings: dialer)
        for reach in (self.by_http, self.by_websocket):
            Authority("Somebody").save_pem(self.bundle)
            error = await reach(port)
            assert isinstance(error, TLSFailed), repr(error)
            self.assertEqual(error.check, "issuer")
            self.authority.save_pem(self.bundle)
            self.assertIsNone(await reach(port))
        await self.gone()

    def test_none_at_all(self) -> None:
        """Where the system has no issuers and no file is set, the start warns, with the places it looked at."""
        with capturedLogs() as events:
            self.dialer(ca_file="").check()
        [event] = [event for event in events if event.get("event") == "tls.warning"]
        for part in ("every certificate will be refused", self.bundle, "/nonexistent", "ca-certificates"):
            self.assertIn(part, event["detail"])

    def test_some(self) -> None:
        """With a store, or a file of our own, there is nothing to warn of."""
        self.assertEqual(list(ContextSource(config.TLS(ca_file=self.ca_file)).warnings()), [])
        self.authority.save_pem(self.bundle)
        self.assertEqual(list(ContextSource(config.TLS()).warnings()), [])


class WhereTests(SynchronousTestCase):
    """Where the system's issuers may be."""

    def test_environment(self) -> None:
        """OpenSSL's variables win over all other places, one of them too."""
        both = {"SSL_CERT_FILE": "/a.pem", "SSL_CERT_DIR": "/b:/c"}
        self.assertEqual(trust_stores(both), ("/a.pem", "/b", "/c"))
        self.assertEqual(trust_stores({"SSL_CERT_FILE": "/a.pem"}), ("/a.pem",))
        self.assertEqual(trust_stores({"SSL_CERT_DIR": "/b"}), ("/b",))

    def test_well_known(self) -> None:
        """Without them it is where distributions have their issuers."""
        self.assertIn("/etc/ssl/certs/ca-certificates.crt", trust_stores({}))
        self.assertIn("/etc/ssl/certs", trust_stores({}))

    def test_holds_anything(self) -> None:
        """Empty files and directories hold nothing, and what is not there neither."""
        directory = self.mktemp()
        os.mkdir(directory)
        path = os.path.join(directory, "a.pem")
        self.assertFalse(holds_anything(directory))
        self.assertFalse(holds_anything(path))
        with open(path, "wb"):
            self.assertFalse(holds_anything(path))
        self.assertTrue(holds_anything(directory))
        with open(path, "wb") as file:
            file.write(b"x")
        self.assertTrue(holds_anything(path))


class WarningTests(SynchronousTestCase):
    """Settings that work and are likely to be regretted."""

    def test_one_pin(self) -> None:
        """One pin without a backup is warned of, by the dialler's check too; two are not, and none is not."""
        one, two = ("sha256//" + "A" * 43 + "=", "sha256//" + "B" * 42 + "A=")
        for pins, count in (((), 0), ((one,), 1), ((one, two), 0)):
            with capturedLogs() as events:
                Dialer(ReactorStub(), config.TLS(pins=pins, ca_file=_ca(self), ca_exclusive=True)).check()
            warnings = [event["detail"] for event in events if event.get("event") == "tls.warning"]
            self.assertEqual(len(warnings), count)
            self.assertTrue(all("no backup" in warning for warning in warnings))


class ReactorStub:
    """A dialler that only looks at files needs no more."""

    def seconds(self) -> float:
        return 0.0


def _ca(case: SynchronousTestCase) -> str:
    return Authority().save_pem(os.path.join(case.mktemp(), "ca.pem"))
