"""The reference backend as a service: start, stop, restart, TLS, its command line and what it remembers."""

from __future__ import annotations

import os
import sqlite3
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from treq.client import HTTPClient
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP6ClientEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.internet.task import Clock
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import Agent, BrowserLikePolicyForHTTPS

from commsmgr.backend import ReferenceBackend, ledger
from commsmgr.backend.events import BackendEvent, EventLog
from commsmgr.backend.ledger import Answer, Ledger, LossReceiptRow
from commsmgr.backend.tap import Options, makeService
from commsmgr.errors import ConfigError, NotRunning
from tests.backend_kit import BackendTestCase
from tests.test_backend_websocket import Raw


class RestartTests(BackendTestCase):
    async def test_resume(self) -> None:
        """With a file, commands that wait, results and idempotency keys survive a restart."""
        path = self.mktemp()
        backend = await self.start(path=path)
        agent = await self.register()
        done, waiting = backend.send_command("m-1", "done"), backend.send_command("m-1", "waiting")
        agent.result(done)
        await agent.get("ack")
        beat = await self.post("/heartbeat", {"machine_id": "m-1"}, Idempotency_Key="k")
        await backend.stopService()
        await backend.startService()
        agent = await self.register()
        self.assertEqual(waiting, (await agent.get("command"))["id"])
        agent.result(done)
        await agent.get("ack")
        self.assertEqual([2], [row.copies for row in backend.ledger.results()])
        self.now += 5
        again = await self.post("/heartbeat", {"machine_id": "m-1"}, Idempotency_Key="k")
        self.assertEqual(beat.body, again.body)

    async def test_stop(self) -> None:
        """Stopping closes WebSockets with 1001, ends waits, cuts the rest, and is over in bounded time."""
        backend = await self.start()
        agent = await self.register()
        waiting = backend.when_result(backend.send_command("m-1", "ping"))
        backend.faults.inject("hang", transport="http")
        hanging = Deferred.fromCoroutine(self.post("/heartbeat", {"machine_id": "m-1"}))
        while len([e for e in backend._running.entrances.protocols if e.kind == "http"]) < 1:
            await self.pause(0.01)
        await backend.stopService()
        self.assertEqual(1001, (await agent.closed)[0])
        await self.assertFailure(waiting, NotRunning)
        await self.assertFailure(hanging, Exception)
        with self.assertRaises(NotRunning):
            backend.send_command("m-1", "ping")

    async def test_stop_with_stalled_agent(self) -> None:
        """An agent that does not answer the close frame is cut."""
        backend = await self.start()
        agent = await self.register()
        agent.transport.pauseProducing()
        agent.transport.stopReading()
        await backend.stopService()
        agent.transport.resumeProducing()
        await agent.closed

    async def test_stop_twice(self) -> None:
        """Stopping what does not run does nothing, and what never ran has no port."""
        backend = ReferenceBackend(reactor, wall=lambda: 0.0, random=Random(1))
        await backend.stopService()
        with self.assertRaises(NotRunning):
            backend.url  # noqa: B018  # asking is what raises

    async def test_port_taken(self) -> None:
        """When the port is taken the start fails, and says so."""
        backend = await self.start()
        other = ReferenceBackend(reactor, wall=lambda: 0.0, random=Random(1), listen=f"127.0.0.1:{backend.port}")
        await self.assertFailure(other.startService(), CannotListenError)

    async def test_ipv6(self) -> None:
        """It listens on IPv6 as well, and its URLs have brackets."""
        backend = await self.start(listen="[::1]:0")
        self.assertEqual(f"http://[::1]:{backend.port}/", backend.console_url)
        self.assertEqual(f"ws://[::1]:{backend.port}/ws", backend.websocket_url)
        raw = await TCP6ClientEndpoint(reactor, "::1", backend.port).connect(Factory.forProtocol(Raw))
        raw.wanted = b"websocket_url"
        raw.transport.write(b"GET /api/state HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
        self.assertIn(b" 200 ", await raw.gone)


def certificate(directory: str) -> tuple[str, str, Certificate]:
    """Make a self-signed certificate for 127.0.0.1; return the files' paths and the certificate."""
    private = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "reference backend")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, SHA256())
    )
    os.makedirs(directory)
    paths = Path(directory, "certificate.pem"), Path(directory, "key.pem")
    pem = made.public_bytes(Encoding.PEM)
    paths[0].write_bytes(pem)
    paths[1].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(paths[0]), str(paths[1]), Certificate.loadPEM(pem)


class TLSTests(BackendTestCase):
    async def test_tls(self) -> None:
        """HTTP and WebSocket over TLS, on the same port; faults work there too."""
        path, key, trusted = certificate(self.mktemp())
        backend = await self.start(certificate=path, key=key)
        self.assertTrue(backend.url.startswith("https://"))
        self.assertTrue(backend.websocket_url.startswith("wss://"))
        root = trustRootFromCertificates([trusted])
        self.http = HTTPClient(Agent(reactor, BrowserLikePolicyForHTTPS(root)))
        self.assertEqual(200, (await self.post("/heartbeat", {"machine_id": "m-1"})).status)
        agent = await self.register(tls=optionsForClientTLS("127.0.0.1", root))
        backend.send_command("m-1", "ping")
        await agent.get("command")
        backend.faults.inject("drop")
        await agent.closed

    async def test_files_missing(self) -> None:
        """When the files cannot be read the start fails."""
        backend = ReferenceBackend(reactor, wall=lambda: 0.0, random=Random(1), certificate="/no/such", key="/no/such")
        await self.assertFailure(backend.startService(), Exception)


class SettingsTests(SynchronousTestCase):
    def test_refused(self) -> None:
        """Wrong parameters are refused with the name of the parameter."""
        wrong: list[dict[str, Any]] = [
            {"listen": "8080"},
            {"listen": "h:http"},
            {"listen": "h:70000"},
            {"dialects": ()},
            {"dialects": ("v2",)},
            {"certificate": "x"},
        ]
        for settings in wrong:
            with self.assertRaisesRegex(ConfigError, next(iter(settings))):
                ReferenceBackend(Clock(), wall=lambda: 0.0, random=Random(1), **settings)

    def test_any_address(self) -> None:
        """A backend that listens everywhere names the loopback in its URLs."""
        for listen, url in (
            ("0.0.0.0:8", "http://127.0.0.1:8"),
            (":8", "http://127.0.0.1:8"),
            ("[::]:8", "http://[::1]:8"),
        ):
            self.assertEqual(url, ReferenceBackend(Clock(), wall=lambda: 0.0, random=Random(1), listen=listen).url)


class TapTests(SynchronousTestCase):
    def parsed(self, *arguments: str) -> Options:
        options = Options()
        options.parseOptions(arguments)
        return options

    def test_service(self) -> None:
        """The command line becomes a backend."""
        file = Path(self.mktemp())
        file.write_text("s3cret\n")
        program = makeService(self.parsed("--listen=127.0.0.1:1234", f"--token-file={file}", "--quirks", "--plain"))
        backend = program.backend
        self.assertEqual(
            ("http://127.0.0.1:1234", "s3cret", ("plain",)), (backend.url, backend.token, backend.dialects)
        )

    def test_token_from_environment(self) -> None:
        """The token may come from an environment variable."""
        self.patch(os, "environ", {"T": "s3cret"})
        self.assertEqual("s3cret", self.parsed("--token-env=T")["token"])
        self.assertEqual("", self.parsed()["token"])

    def test_refused(self) -> None:
        """Mistakes are named before anything starts."""
        empty = Path(self.mktemp())
        empty.write_text(" \n")
        for wrong in (
            ("--token-env=NO_SUCH_VARIABLE_HERE",),
            ("--token-file=/no/such",),
            (f"--token-file={empty}",),
            ("--token-file=x", "--token-env=y"),
            ("--tls-certificate=/no/such",),
        ):
            with self.assertRaises(UsageError):
                self.parsed(*wrong)
        with self.assertRaisesRegex(SystemExit, "twistd commsmgr-backend: listen: expected host:port"):
            makeService(self.parsed("--listen=nowhere"))


class LedgerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = 1000.0
        self.path = self.mktemp()
        self.ledger = Ledger(self.path, lambda: self.now, window=100)

    def tearDown(self) -> None:
        self.ledger.close()

    def test_foreign_file(self) -> None:
        """A file that something else wrote is not touched."""
        path = self.mktemp()
        with sqlite3.connect(path) as foreign:
            foreign.execute("CREATE TABLE precious (x)")
        foreign.close()
        with self.assertRaisesRegex(ValueError, "set another path"):
            Ledger(path, lambda: 0.0)

    def test_forgets(self) -> None:
        """What is older than the window goes, save commands that wait; it happens while it runs, too."""
        for name in ("waiting", "done"):
            self.ledger.add_command(name, "m", b"", "pending")
        self.ledger.add_result("r", "done", "m", "http", b"")
        self.ledger.remember("k", Answer(b"", 200, b""))
        self.ledger.add_loss_receipt("l", "m", "http", b"{}")
        self.now += 101
        for number in range(1100):
            self.ledger.seen(f"m{number}")
        self.assertIsNone(self.ledger.command("done"))
        self.assertIsNotNone(self.ledger.command("waiting"))
        self.assertEqual(([], None), (self.ledger.results(), self.ledger.answer("k")))
        self.assertEqual([], self.ledger.loss_receipts("m"))

    def test_loss_receipts(self) -> None:
        """A receipt is kept once for each machine, as it first came, and the copies are counted."""
        self.assertTrue(self.ledger.add_loss_receipt("l", "m", "http", b"1"))
        self.assertFalse(self.ledger.add_loss_receipt("l", "m", "websocket", b"2"))
        self.assertTrue(self.ledger.add_loss_receipt("l", "other", "websocket", b"3"))
        self.assertTrue(self.ledger.add_loss_receipt("l2", "m", "websocket", b"4"))
        first = LossReceiptRow("l", "http", b"1", 1000.0, 2)
        self.assertEqual(first, self.ledger.loss_receipts("m")[1])
        self.assertEqual(["l2"], [row.id for row in self.ledger.loss_receipts("m", 1)])

    def test_version_1(self) -> None:
        """A file of version 1 is taken further, and what it knew stays known."""
        path = self.mktemp()
        with sqlite3.connect(path) as old:
            old.executescript(ledger.MIGRATIONS[0])
            old.execute("PRAGMA user_version = 1")
            old.execute("INSERT INTO results VALUES ('r', 'c', 'm', 'http', x'7b7d', 990, 1)")
        old.close()
        for _ in range(2):
            migrated = Ledger(path, lambda: self.now, window=100)
            migrated.add_loss_receipt("l", "m", "http", b"")
            self.assertEqual(["r"], [row.id for row in migrated.results()])
            migrated.close()

    def test_newer_version(self) -> None:
        """A file of a newer version is not touched."""
        path = self.mktemp()
        with sqlite3.connect(path) as newer:
            newer.execute(f"PRAGMA user_version = {len(ledger.MIGRATIONS) + 1}")
        newer.close()
        with self.assertRaisesRegex(ValueError, "set another path"):
            Ledger(path, lambda: 0.0)

    def test_rollback(self) -> None:
        """A transaction that fails leaves nothing behind and announces nothing."""
        told: list[str] = []
        with self.assertRaises(ZeroDivisionError), self.ledger.transaction():
            self.ledger.add_command("c", "m", b"", "pending")
            self.ledger.when_committed(lambda: told.append("never"))
            1 / 0  # noqa: B018  # the exception is the point
        with self.ledger.transaction():
            self.ledger.when_committed(lambda: told.append("once"))
        self.assertEqual((["once"], None), (told, self.ledger.command("c")))

    def test_nothing_known(self) -> None:
        """What was never heard of is None."""
        self.assertEqual((None, None), (self.ledger.dialect_of("m"), self.ledger.inventory_of("m")))


class EventLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events = EventLog(lambda: 5.0, keep=2)

    def test_observers(self) -> None:
        """Every observer is told until it unsubscribes; one that fails does not keep the others from it."""
        seen: list[BackendEvent] = []
        self.events.subscribe(lambda event: 1 / 0)
        unsubscribe = self.events.subscribe(seen.append)
        self.events.emit("heartbeat", machine_id="m")
        unsubscribe()
        unsubscribe()
        self.events.emit("heartbeat")
        self.events.emit("heartbeat")
        self.assertEqual([(1, 5.0, "m")], [(event.seq, event.at, event.machine_id) for event in seen])
        self.assertEqual([2, 3], [event.seq for event in self.events.recent])
        self.assertEqual(3, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_when(self) -> None:
        """Waiting is for one event of a kind that the predicate likes, and can be cancelled."""
        waiting = self.events.when("result", lambda event: event.id == "2")
        cancelled = self.events.when("result")
        cancelled.addErrback(lambda _: None)
        cancelled.cancel()
        self.events.emit("heartbeat", id="2")
        self.events.emit("result", id="1")
        self.assertNoResult(waiting)
        self.events.emit("result", id="2")
        self.events.emit("result", id="2")
        self.assertEqual("2", self.successResultOf(waiting).id)
