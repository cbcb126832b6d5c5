"""Security of a whole manager: TLS on both transports, tokens and their rotation, and that no secret gets out."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.protocols.portforward import ProxyFactory

from commsmgr import CallableToken, Token, config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import HTTPStatusError, TLSFailed, TokenError
from commsmgr.observe.logs import make_observer
from commsmgr.redact import Redactor
from tests.certificates import DAY, NOW, Authority, Issued, self_signed
from tests.loopback import Recording, listen
from tests.world import MACHINE, TOKEN, Runs, WorldTestCase, nothing_held, pause, quick, reactor, together, until


class SecurityTestCase(WorldTestCase):
    """Authorities, and backends that they vouch for."""

    def setUp(self) -> None:
        super().setUp()
        self.authority = Authority()
        self.ca_file = self.authority.save_pem(f"{self.directory}/ca.pem")

    def tls(self, **changes: Any) -> config.TLS:
        """Return a section ``[tls]`` that trusts our authority alone."""
        return config.TLS(ca_file=self.ca_file, ca_exclusive=True, **changes)


class TransportSecurity(SecurityTestCase):
    """https and wss, by one piece of code."""

    def test_the_main_job(self) -> Deferred[None]:
        """Everything works over TLS, with a private issuer, by name and by address."""

        async def story(dialect: str, host: str) -> None:
            paths = self.authority.issue(names=["localhost"], ips=["127.0.0.1"]).save(self.spool())
            backend = await self.backend(dialects=[dialect], certificate=paths.cert_pem, key=paths.key_pem)
            url = f"https://{host}:{backend.port}"
            manager = self.manager(
                quick(url, self.spool(), tls=self.tls(minimum_version="1.3")), handler=(runs := Runs())
            )
            status = await manager.connect()
            self.assertEqual("TLSv1.3", getattr(status.backends[0].link, "tls", ""))
            await until(lambda: backend.connected(MACHINE))
            self.assertEqual("ok", (await manager.send_heartbeat()).status)
            await manager.send_inventory({"over": "tls"})
            ids = [backend.send_command(MACHINE, "echo") for _ in range(3)]
            await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))
            self.assert_once_and_in_order(backend, runs, ids)
            self.assertTrue(backend.ledger.inventory_of(MACHINE))
            established = self.logged("tls.established")[-1]
            self.assertEqual((LogLevel.debug, "TLSv1.3"), (established["log_level"], established["version"]))

        return Deferred.fromCoroutine(
            together(story("commsmgr.v1", "localhost"), story("plain", "127.0.0.1"), story("plain", "localhost"))
        )

    def test_impostors(self) -> Deferred[None]:
        """A backend that cannot prove who it is gets no byte over either transport, and the operator is told why."""
        issue = self.authority.issue
        stranger = Authority("Stranger CA")
        impostors: dict[str, Issued] = {
            "name": issue(names=["elsewhere.example"]),
            "subjectAltName": issue("localhost"),
            "expired": issue(names=["localhost"], not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY),
            "not valid yet": issue(names=["localhost"], not_before=NOW + 3 * DAY, not_after=NOW + 9 * DAY),
            "issuer": stranger.issue(names=["localhost"]),
            "self-signed": self_signed(names=["localhost"]),
        }

        async def story(what: str, issued: Issued) -> None:
            server = Recording()
            port = listen(self, server, tls=issued.server_context())
            manager = self.manager(
                quick(f"https://localhost:{port}", self.spool(), tls=self.tls(), http=config.HTTP(attempts=1))
            )
            manager.startService()
            await manager.started()
            with self.assertRaises(TLSFailed) as caught:
                await manager.send_heartbeat()
            self.assertFalse(caught.exception.may_have_arrived)
            self.assertIn("nothing was sent", str(caught.exception))
            await until(lambda: manager.status().problems)
            (problem,) = manager.status().problems
            for text in (problem, str(caught.exception)):
                self.assertIn(what, text)
            await manager.disconnect()
            self.assertEqual(b"", server.received, what)

        return Deferred.fromCoroutine(together(*(story(*each) for each in impostors.items())))

    async def test_a_trusted_backend_turns_into_an_impostor(self) -> None:
        """A connection that was good says nothing for the next one: each proves itself anew."""
        backend = await self.backend()
        good = self._terminator(backend, self.authority.issue(names=["localhost"]))
        port = reactor.listenTCP(0, _Forward(good), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        url = f"https://localhost:{port.getHost().port}"
        manager = self.manager(quick(url, self.spool(), tls=self.tls()), handler=Runs())
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        port.factory.port = self._terminator(backend, Authority("Stranger CA").issue(names=["localhost"]))
        backend.faults.inject("drop")
        await until(lambda: any("issuer" in problem for problem in manager.status().problems))
        self.assertFalse(manager.status().connected)
        port.factory.port = good
        await until(lambda: manager.status().connected)

    def _terminator(self, backend: ReferenceBackend, issued: Issued, **settings: Any) -> int:
        """Listen with TLS before ``backend``; return the port."""
        factory = ProxyFactory("127.0.0.1", backend.port)
        factory.noisy = False
        port = reactor.listenSSL(0, factory, issued.server_context(**settings), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        return int(port.getHost().port)

    async def test_client_certificate(self) -> None:
        """A backend that wants to know who comes gets the agent's certificate, over both transports."""
        backend = await self.backend()
        clients = Authority("Clients CA")
        port = self._terminator(backend, self.authority.issue(names=["localhost"]), client_authority=clients)
        url = f"https://localhost:{port}"
        mine = clients.issue("agent", client=True).save(self.spool())
        manager = self.manager(quick(url, self.spool(), tls=self.tls(certificate=mine.cert_pem, key=mine.key_pem)))
        await manager.connect()
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        await manager.disconnect()

        nameless = self.manager(quick(url, self.spool(), tls=self.tls(), http=config.HTTP(attempts=1)))
        nameless.startService()
        await nameless.started()
        with self.assertRaises(TLSFailed) as caught:
            await nameless.send_heartbeat()
        self.assertIn("certificate", str(caught.exception))
        await until(lambda: any("certificate" in problem for problem in nameless.status().problems))

    async def test_certificate_replaced_while_connected(self) -> None:
        """A new client certificate is used for the next connection, without a restart."""
        backend = await self.backend()
        clients = Authority("Clients CA")
        port = self._terminator(backend, self.authority.issue(names=["localhost"]), client_authority=clients)
        directory = self.spool()
        paths = clients.issue("old", client=True, not_after=NOW + DAY).save(directory)
        manager = self.manager(
            quick(
                f"https://localhost:{port}",
                self.spool(),
                tls=self.tls(certificate=paths.cert_pem, key=paths.key_pem),
            )
        )
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        clients.issue("new", client=True).save(directory)
        registered = backend.when("registered")
        backend.faults.inject("drop")
        await registered
        self.assertTrue(self.logged("tls.files.loaded"))


class Tokens(SecurityTestCase):
    """Bearer tokens: where they come from, how they change, and what a refusal does."""

    async def test_rotation_through_a_file(self) -> None:
        """A token that is replaced in its file is used at once by both transports, without a restart."""
        backend = await self.backend(check_token_on_upgrade=True)
        path = Path(self.directory, "token")
        path.write_text(f"{TOKEN}\n")
        manager = self.manager(
            quick(backend, self.spool(), auth=config.Auth(token_file=str(path), refused_delay=1.0)),
            handler=(runs := Runs()),
        )
        await manager.connect()
        await manager.send_heartbeat()
        backend.token = "another-token-of-the-tests"
        with self.assertRaises(HTTPStatusError):
            await manager.send_heartbeat()
        backend.faults.inject("drop")
        await until(lambda: self.logged("link.ended"))
        new = path.with_suffix(".new")
        new.write_text(backend.token)
        os.replace(new, path)
        began = reactor.seconds()
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        await until(lambda: manager.status().connected and backend.connected(MACHINE))
        self.assertLess(reactor.seconds() - began, 2.0)
        ids = [backend.send_command(MACHINE, "echo")]
        await until(lambda: len(backend.ledger.results()) == 1)
        self.assert_once_and_in_order(backend, runs, ids)

    async def test_a_provider_of_the_agents_own(self) -> None:
        """An agent's token provider is asked for each attempt, and told of a refusal."""
        backend = await self.backend(check_token_on_upgrade=True)

        class Provider:
            def __init__(self) -> None:
                self.refusals: list[str] = []

            def get(self) -> Deferred[str]:
                given: Deferred[str] = Deferred()
                reactor.callLater(0, given.callback, TOKEN if self.refusals else "stale-token-of-the-tests")
                return given

            def refused(self, token: str) -> None:
                self.refusals.append(token)

        provider = Provider()
        manager = self.manager(quick(backend, self.spool(), auth=config.Auth()), token=provider)
        manager.startService()
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        self.assertIn("stale-token-of-the-tests", provider.refusals)
        await manager.when_connected()

    async def test_no_token_to_be_had(self) -> None:
        """A token file that is not there keeps the agent from connecting, says so, and is looked for again."""
        backend = await self.backend(check_token_on_upgrade=True)
        path = Path(self.directory, "token")
        path.write_text(TOKEN)
        settings = quick(backend, self.spool(), auth=config.Auth(token_file=str(path)), http=config.HTTP(attempts=1))
        manager = self.manager(settings)
        path.unlink()
        manager.startService()
        await manager.started()
        with self.assertRaises(TokenError):
            await manager.send_heartbeat()
        await until(lambda: any("token" in problem for problem in manager.status().problems))
        path.write_text(TOKEN)
        await manager.when_connected()

    def test_rotated_while_connected(self) -> Deferred[None]:
        """
        The token changes again and again while commands and results flow, and each command runs once and has one
        result: the open WebSocket stays as it is, and where it breaks the next one is opened with the new token.
        """

        async def story(dialect: str, breaks: bool) -> None:
            backend = await self.backend(check_token_on_upgrade=True, dialects=[dialect], token="token-0-of-the-tests")
            path = Path(self.spool(), "token")
            path.write_text(backend.token)
            manager = self.manager(
                quick(backend, self.spool(), auth=config.Auth(token_file=str(path), refused_delay=1.0)),
                handler=(runs := Runs()),
            )
            await manager.connect()
            await until(lambda: backend.connected(MACHINE))
            registrations: list[Any] = []
            backend.subscribe(lambda event: registrations.append(event) if event.kind == "registered" else None)
            ids: list[str] = []
            for number in range(1, 7):
                ids += [backend.send_command(MACHINE, "echo") for _ in range(20)]
                # First the backend, then the file, or the other way round: neither may lose anything.
                token = f"token-{number}-of-the-tests"
                for change in (self._set_token, self._set_file)[:: -1 if number % 2 else 1]:
                    change(backend, path, token)
                    ids.append(backend.send_command(MACHINE, "echo"))
                    if breaks and number in (2, 5):
                        backend.faults.inject("drop")
                    elif breaks and number in (3, 4):
                        # What a backend does that minds the end of the token that the connection was opened with.
                        backend.close_websocket(MACHINE, 4401)
                    await pause(0.02)
                self.assertEqual("ok", (await manager.send_heartbeat()).status)
                await until(lambda: backend.connected(MACHINE))
            await until(lambda: len(backend.ledger.results()) >= len(ids) and nothing_held(manager))
            self.assert_once_and_in_order(backend, runs, ids, dialect)
            self.assertEqual(breaks, bool(registrations), "it stays connected unless something breaks")
            self.assertEqual((), manager.status().auth.refused)

        return Deferred.fromCoroutine(
            together(story("commsmgr.v1", True), story("commsmgr.v1", False), story("plain", False))
        )

    @staticmethod
    def _set_token(backend: ReferenceBackend, path: Path, token: str) -> None:
        backend.token = token

    @staticmethod
    def _set_file(backend: ReferenceBackend, path: Path, token: str) -> None:
        new = path.with_suffix(".new")
        new.write_text(token)
        os.replace(new, path)

    def test_a_refused_new_token(self) -> Deferred[None]:
        """
        A new token that is refused does not displace the one that works, on either transport, and not over a restart;
        when the backend takes it, it is used.
        """

        async def story(dialect: str) -> None:
            backend = await self.backend(check_token_on_upgrade=True, dialects=[dialect])
            directory = self.spool()
            path, kept = Path(self.spool(), "token"), Path(directory, "accepted-token")
            path.write_text(TOKEN)
            auth = config.Auth(token_file=str(path), refused_delay=1.0, accepted_token_file=str(kept))
            settings = quick(backend, directory, auth=auth)
            manager = self.manager(settings, handler=Runs())
            await manager.connect()
            await manager.send_heartbeat()
            new = "too-new-token-of-the-tests"
            path.write_text(new)
            for _ in range(5):
                self.assertEqual("ok", (await manager.send_heartbeat()).status)
            token = manager.status().auth
            self.assertEqual(("token_file", ("main over http",)), (token.source, token.earlier))
            self.assertIn("main over http", " ".join(manager.status().problems))
            backend.faults.inject("drop")
            await backend.when("registered")
            await manager.disconnect()
            self.assertEqual(0o600, kept.stat().st_mode & 0o777)

            manager = self.manager(settings, handler=(runs := Runs()))
            await manager.connect()
            self.assertEqual("ok", (await manager.send_heartbeat()).status)
            await until(lambda: backend.connected(MACHINE))
            ids = [backend.send_command(MACHINE, "echo") for _ in range(3)]
            await until(lambda: len(backend.ledger.results()) == len(ids))
            self.assert_once_and_in_order(backend, runs, ids)
            self.assertIn(TOKEN, kept.read_text())

            backend.token = new
            began = reactor.seconds()
            while manager.status().auth.refused:
                with contextlib.suppress(HTTPStatusError, TokenError):
                    await manager.send_heartbeat()
                await pause(0.05)
            self.assertEqual("ok", (await manager.send_heartbeat()).status)
            self.assertLess(reactor.seconds() - began, 3.0)
            self.assertFalse(any("main over http" in problem for problem in manager.status().problems))
            await manager.disconnect()
            self.assertIn(new, kept.read_text())

        return Deferred.fromCoroutine(together(story("commsmgr.v1"), story("plain")))

    async def test_another_backend_of_the_same_name(self) -> None:
        """A backend that has the name of an earlier one, and refuses its token, is not shown the other one's."""
        first = await self.backend(check_token_on_upgrade=True)
        directory = self.spool()
        path, kept = Path(self.spool(), "token"), Path(directory, "accepted-token")
        path.write_text(TOKEN)
        auth = config.Auth(token_file=str(path), refused_delay=1.0, accepted_token_file=str(kept))
        manager = self.manager(quick(first, directory, auth=auth))
        await manager.connect()
        await manager.disconnect()
        self.assertIn(TOKEN, kept.read_text())
        # It would take the token that it must not see.
        second = await self.backend(check_token_on_upgrade=True)
        path.write_text("a-token-that-is-refused")
        manager = self.manager(quick(second, directory, auth=auth))
        manager.startService()
        for _ in range(2):
            with self.assertRaises((HTTPStatusError, TokenError)):
                await manager.send_heartbeat()
        self.assertFalse(second.connected(MACHINE))
        await manager.disconnect()

    async def test_from_a_command(self) -> None:
        """A command is run for the first token, when one comes near its end, and when one was refused; not else."""
        backend = await self.backend(check_token_on_upgrade=True)
        good, runs = Path(self.directory, "good"), Path(self.directory, "runs")
        good.write_text(TOKEN)
        script = f"""echo x >> {runs}; echo "{{\\"access_token\\": \\"$(cat {good})\\", \\"expires_in\\": 2}}" """
        auth = config.Auth(token_command=("/bin/sh", "-c", script), refused_delay=1.0)
        manager = self.manager(quick(backend, self.spool(), auth=auth), handler=Runs())
        await manager.connect()
        for _ in range(20):
            await manager.send_heartbeat()
        self.assertEqual(1, len(runs.read_text().split()))
        expires = manager.status().auth.expires_at
        assert expires is not None
        self.assertTrue(0.5 < expires - time.time() <= 2.0)
        backend.token = "another-token-of-the-tests"
        good.write_text(backend.token)
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        self.assertEqual(2, len(runs.read_text().split()))
        began = reactor.seconds()
        while len(runs.read_text().split()) == 2:
            await manager.send_heartbeat()
            await pause(0.02)
        self.assertTrue(1.2 < reactor.seconds() - began < 2.0, "ahead of its end, and not at once")
        self.assertEqual(1, len(self.logged("token.refused")))

    async def test_from_a_callable(self) -> None:
        """A callable that says when its token ends is not called for each use."""
        backend = await self.backend(check_token_on_upgrade=True)
        calls: list[float] = []

        async def give() -> Token:
            calls.append(time.time())
            await pause(0.01)
            return Token(TOKEN, time.time() + 3600)

        manager = self.manager(quick(backend, self.spool(), auth=config.Auth()), token=CallableToken(give))
        await manager.connect()
        for _ in range(5):
            await manager.send_heartbeat()
        self.assertEqual(1, len(calls))
        self.assertEqual("provider", manager.status().auth.source)

    async def test_from_systemd(self) -> None:
        """A credential of systemd's is the file of that name in its directory."""
        backend = await self.backend(check_token_on_upgrade=True)
        Path(self.directory, "backend-token").write_text(TOKEN)
        os.environ["CREDENTIALS_DIRECTORY"] = self.directory
        self.addCleanup(os.environ.pop, "CREDENTIALS_DIRECTORY")
        manager = self.manager(quick(backend, self.spool(), auth=config.Auth(token_credential="backend-token")))
        await manager.connect()
        self.assertEqual("ok", (await manager.send_heartbeat()).status)

    def test_a_refused_token_makes_no_hot_loop(self) -> Deferred[None]:
        """401 to everything: the only token there is shown once over each transport, and then slowly."""

        async def story(enabled: bool) -> None:
            backend = await self.backend(check_token_on_upgrade=True)
            refused: list[str] = []
            backend.subscribe(lambda event: refused.append(event.transport) if event.kind == "refused" else None)
            manager = self.manager(
                quick(
                    backend,
                    self.spool(),
                    auth=config.Auth(token="a-wrong-token-of-the-tests", refused_delay=30.0),
                    delivery=config.Delivery(http_fallback_after=0.0),
                    websocket=config.WebSocket(enabled=enabled),
                )
            )
            manager.startService()
            await manager.send_inventory({"a": 1})
            await pause(0.6)
            self.assertEqual(1, refused.count("http"), "there is no other token to show")
            self.assertEqual(1 if enabled else 0, refused.count("websocket"))
            self.assertEqual(1, manager.status().queue.states, "it waits for a better token")

        return Deferred.fromCoroutine(together(story(True), story(False)))


class Secrets(SecurityTestCase):
    """No secret gets out: not in a log line at any level, a status, a metric, an error, or the spool's files."""

    SECRET = "very-secret-token-0123456789"
    MINE = "patient=4711"

    async def test_nothing_shows_the_token(self) -> None:
        """A whole story with refusals, crashes and errors, and then every place is searched for the token."""
        redactor = Redactor((r"patient=\d+",))
        text, lines = io.StringIO(), io.StringIO()
        raw: list[str] = []

        def keep_raw(event: LogEvent) -> None:
            if str(event.get("log_namespace")).startswith("commsmgr."):
                raw.append(formatEvent(event))

        observers = [
            make_observer(text, format="text", level="debug", redactor=redactor),
            make_observer(lines, format="json", level="debug", redactor=redactor),
            keep_raw,
        ]
        for observer in observers:
            globalLogPublisher.addObserver(observer)
            self.addCleanup(globalLogPublisher.removeObserver, observer)
        backend = await self.backend(token=self.SECRET, check_token_on_upgrade=True)
        registry = CollectorRegistry()

        def careless_handler(command: Any) -> Any:
            raise RuntimeError(f"cannot use {self.SECRET} for {self.MINE}")

        manager = self.manager(
            quick(
                backend,
                self.spool(),
                auth=config.Auth(token=self.SECRET, refused_delay=1.0),
                observe=config.Observe(listen="127.0.0.1:0", log_level="debug"),
                redaction=config.Redaction(patterns=(r"patient=\d+",)),
                http=config.HTTP(attempts=2),
            ),
            registry=registry,
            redactor=redactor,
            handler=careless_handler,
        )
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        backend.faults.inject("status", status=503, count=1)
        await manager.send_heartbeat()
        errors = []
        for fault in ({"kind": "status", "status": 401}, {"kind": "status", "status": 500}, {"kind": "html"}):
            backend.faults.inject(transport="http", **fault)  # type: ignore[arg-type]  # fields of a fault
            try:
                await manager.send_heartbeat()
            except Exception as error:
                errors.append(f"{error} {error!r} {getattr(error, 'fact', '')}")
            backend.faults.clear()
        self.assertEqual(3, len(errors))
        backend.send_command(MACHINE, "fail")
        await until(lambda: self.logged("command.failed"))
        self.assertTrue(self.flushLoggedErrors(RuntimeError))
        self.expected.add("command.failed")
        backend.close_websocket(MACHINE, 1011)
        await until(lambda: self.logged("link.ended"))
        page = f"http://{self.logged('site.started')[-1]['authority']}"
        pages = [(await self.fetch(f"{page}/{name}"))[1] for name in ("status", "metrics", "healthz", "readyz")]
        shown = {
            "text log": text.getvalue(),
            "JSON log": lines.getvalue(),
            "errors": "\n".join(errors),
            "status": repr(manager.status()) + msgspec.json.encode(manager.status()).decode(),
            "pages": "\n".join(pages),
            "metrics": generate_latest(registry).decode(),
            "configuration": repr(manager),
        }
        for where, what in shown.items():
            self.assertNotIn(self.SECRET, what, where)
        for where in ("text log", "JSON log"):
            self.assertIn("the handler failed", shown[where], where)
            self.assertNotIn(self.MINE, shown[where], where)
        own = [line for line in raw if "cannot use" not in line]
        self.assertNotIn(self.SECRET, "\n".join(own), "our own lines hold no token even before redaction")

    async def test_nothing_secret_is_stored(self) -> None:
        """Secrets in outputs and inventories reach neither the spool nor the backend; the log has no command's text."""
        backend = await self.backend()
        directory = f"{self.directory}/redacted"

        def telling(command: Any) -> Any:
            return command.error(f"password={self.SECRET}", output=f"{self.MINE} card 1234-5678 " + "x" * 300_000)

        settings = quick(
            backend,
            directory,
            observe=config.Observe(log_level="debug"),
            redaction=config.Redaction(keys=("password", "kennwort"), patterns=(r"patient=\d+", r"\d{4}-\d{4}")),
        )
        manager = self.manager(settings, handler=telling)
        manager.startService()
        await manager.send_inventory({"a": [{"Kennwort": self.SECRET, "token": "kept", "note": self.MINE}]})
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        sent = backend.send_command(
            MACHINE, "tell", command="command-4242", args=["argument-4242"], options={"p": "option-4242"}
        )
        result = await backend.when_result(sent)
        self.assertEqual(result.error, "password=[redacted]")
        self.assertTrue(result.output.startswith("[redacted] card [redacted] xxx"))
        await until(lambda: manager.status().queue.states == 0)
        for path in filter(Path.is_file, Path(directory).rglob("*")):
            content = path.read_bytes()
            for secret in (self.SECRET, self.MINE, "1234-5678"):
                self.assertNotIn(secret.encode(), content, path.name)
        raw = "\n".join(f"{formatEvent(event)} {event}" for event in self.logged())
        for text in (self.SECRET, self.MINE, "-4242"):
            self.assertNotIn(text, raw)

    async def test_the_spool_is_private(self) -> None:
        """The spool's directory and files are nobody else's to read, and the token is in none of them."""
        backend = await self.backend(token=self.SECRET)
        directory = f"{self.directory}/private"
        manager = self.manager(quick(backend, directory, auth=config.Auth(token=self.SECRET)), handler=Runs())
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        await backend.when_result(backend.send_command(MACHINE, "echo"))
        await manager.disconnect()
        self.assertEqual(0o700, os.stat(directory).st_mode & 0o777)
        files = [path for path in Path(directory).rglob("*") if path.is_file()]
        self.assertTrue(files)
        for path in files:
            self.assertEqual(0, path.stat().st_mode & 0o077, path.name)
            self.assertNotIn(self.SECRET.encode(), path.read_bytes(), path.name)


class _Forward(ServerFactory):
    """Forwards connections to whatever ``port`` is at the time."""

    noisy = False

    def __init__(self, port: int) -> None:
        self.port = port

    def buildProtocol(self, addr: object) -> Protocol:
        return ProxyFactory("127.0.0.1", self.port).buildProtocol(addr)
