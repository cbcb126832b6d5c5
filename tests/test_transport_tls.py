"""
TLS: whom the dialler speaks to, whom not, and in which words it says so.

Every listener here is real, and every refusal is checked for what the listener got to read: nothing.
"""

from __future__ import annotations

import os
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr.config import TLS
from commsmgr.errors import ConfigError, ConnectFailed, DeadlineExceeded, TLSFailed
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.gate import CheckedConnections, Gate
from commsmgr.transport.peer import PeerCheck, TLSFacts
from commsmgr.transport.tls import ContextSource
from commsmgr.urls import Target
from tests.certificates import DAY, NOW, Authority, Issued, self_signed
from tests.loopback import FixedResolver, ReactorWith, Recorder, Recording, listen

REQUEST = b"a request with a token"


class Client(Protocol):
    """Speaks at once, as HTTP and WebSocket clients do."""

    wanted = 1

    def __init__(self) -> None:
        self.received: Deferred[bytes] = Deferred()
        self.lost: Deferred[BaseException] = Deferred()
        self.all = b""

    def connectionMade(self) -> None:
        self.transport.write(REQUEST)

    def dataReceived(self, data: bytes) -> None:
        self.all += data
        if not self.received.called and len(self.all) >= self.wanted:
            self.received.callback(data)

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(reason.value)


def client_factory() -> Any:
    factory = Factory.forProtocol(Client)
    factory.noisy = False
    return factory


def echo(recorder: Recorder) -> None:
    recorder.transport.write(b"echo")


class TLSCase(TestCase):
    """A dialler that trusts :attr:`authority`, and listeners with other ideas."""

    timeout = 20
    authority = Authority("Test CA")

    def setUp(self) -> None:
        self.ca_file = self.authority.save_pem(os.path.join(self.mktemp(), "ca.pem"))
        self.server = Recording(echo)
        self.facts: list[tuple[Target, TLSFacts]] = []

    def dialer(self, **settings: Any) -> Dialer:
        settings.setdefault("ca_file", self.ca_file)
        return Dialer(
            ReactorWith(resolver=FixedResolver(["127.0.0.1"])),
            TLS(**settings),
            observe_tls=lambda target, facts: self.facts.append((target, facts)),
        )

    def target(self, context: Any, host: str = "backend.example", interface: str = "127.0.0.1") -> Target:
        return Target("https", host, listen(self, self.server, tls=context, interface=interface), "/")

    async def accepted(self, context: Any, host: str = "backend.example", **settings: Any) -> Client:
        interface = "::1" if ":" in host else "127.0.0.1"
        endpoint = self.dialer(**settings).endpoint(self.target(context, host, interface), timeout=10)
        client: Any = await endpoint.connect(client_factory())
        self.assertEqual(await client.received, b"echo")
        client.transport.abortConnection()
        await client.lost
        self.assertEqual(self.server.received, REQUEST)
        return client

    async def refused(self, context: Any, *words: str, host: str = "backend.example", **settings: Any) -> TLSFailed:
        endpoint = self.dialer(**settings).endpoint(self.target(context, host), timeout=10)
        error = await self.assertFailure(endpoint.connect(client_factory()), TLSFailed)
        for recorder in self.server.connections:
            await recorder.lost
        self.assertEqual(self.server.received, b"", "something was sent to a peer that was refused")
        self.assertEqual(self.facts, [])
        for word in words:
            self.assertIn(word, str(error))
        self.assertFalse(error.may_have_arrived)
        return error


class IdentityTests(TLSCase):
    """Whose certificate it is, and whether it holds."""

    async def test_good(self) -> None:
        """A certificate of a trusted issuer, valid now and for this name, is accepted, and its facts are told."""
        issued = self.authority.issue("backend", names=["backend.example"])
        await self.accepted(issued.server_context())
        [(target, facts)] = self.facts
        self.assertEqual(target.host, "backend.example")
        self.assertEqual((facts.version, facts.subject, facts.issuer), ("TLSv1.3", "CN=backend", "CN=Test CA"))
        self.assertTrue(facts.cipher)
        self.assertEqual(facts.not_after, int((NOW + DAY).timestamp()))

    async def test_wildcard(self) -> None:
        """A wildcard stands for one label (RFC 6125 section 6.4.3)."""
        await self.accepted(self.authority.issue(names=["*.backend.example"]).server_context(), "a.backend.example")

    async def test_trailing_dot(self) -> None:
        """An absolute name is the same name."""
        await self.accepted(self.authority.issue(names=["backend.example"]).server_context(), "backend.example.")

    async def test_ip_address(self) -> None:
        """An address literal is found among the addresses of the certificate, IPv4 and IPv6."""
        context = self.authority.issue(ips=["127.0.0.1", "::1"]).server_context()
        await self.accepted(context, "127.0.0.1")
        self.server = Recording(echo)
        await self.accepted(context, "::1")

    async def test_name_that_looks_like_the_address(self) -> None:
        """An address among the names vouches for nothing (RFC 6125 section 1.7.2)."""
        await self.refused(self.authority.issue(names=["127.0.0.1"]).server_context(), host="127.0.0.1")

    async def test_other_address(self) -> None:
        """A certificate for another address is refused, and the message names that address."""
        await self.refused(
            self.authority.issue(ips=["127.0.0.9"]).server_context(), "it is for 127.0.0.9 only", host="127.0.0.1"
        )

    async def test_expired(self) -> None:
        """The message says that it has expired, whose it is, and when it was valid."""
        issued = self.authority.issue("old", names=["backend.example"], not_before=NOW - 9 * DAY, not_after=NOW - DAY)
        until = f"{NOW - DAY:%Y-%m-%d}"
        await self.refused(issued.server_context(), "backend.example", "has expired", "CN=old", "CN=Test CA", until)

    async def test_not_yet_valid(self) -> None:
        """A certificate of tomorrow is refused."""
        issued = self.authority.issue(names=["backend.example"], not_before=NOW + DAY, not_after=NOW + 2 * DAY)
        await self.refused(issued.server_context(), "not valid yet", "this machine's clock")

    async def test_self_signed(self) -> None:
        """Nobody vouches for it."""
        await self.refused(self_signed(names=["backend.example"]).server_context(), "self-signed", "CN=self")

    async def test_unknown_issuer(self) -> None:
        """Another authority's certificate is refused, and so is one that bears our authority's name."""
        for name in ("Elsewhere", "Test CA"):
            self.server = Recording(echo)
            issued = Authority(name).issue(names=["backend.example"])
            await self.refused(issued.server_context(), "the certificate of backend.example was refused", f"CN={name}")

    async def test_system_issuers_only(self) -> None:
        """Without a CA file our test authority is unknown."""
        issued = self.authority.issue(names=["backend.example"])
        await self.refused(issued.server_context(), "issuer", ca_file="")

    async def test_system_issuers_besides_ours(self) -> None:
        """A CA file adds to the system's issuers, unless it is to be the only one."""
        before = os.environ.get("SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = self.ca_file
        if before is not None:
            self.addCleanup(os.environ.__setitem__, "SSL_CERT_FILE", before)
        self.addCleanup(os.environ.pop, "SSL_CERT_FILE")
        other = Authority("Other").save_pem(os.path.join(self.mktemp(), "other.pem"))
        context = self.authority.issue(names=["backend.example"]).server_context()
        await self.accepted(context, ca_file=other)
        self.server, self.facts = Recording(echo), []
        await self.refused(context, "issuer", ca_file=other, ca_exclusive=True)

    async def test_wrong_name(self) -> None:
        """The message says which names it would have been good for."""
        issued = self.authority.issue(names=["other.example", "third.example"])
        await self.refused(issued.server_context(), "it is for other.example, third.example only")

    async def test_no_subject_alternative_name(self) -> None:
        """The common name does not count; a certificate without names is refused, for whatever host."""
        issued = self.authority.issue("backend.example")
        await self.refused(issued.server_context(), "no subjectAltName")

    async def test_bad_wildcards(self) -> None:
        """Wildcards that no rule allows are refused, with an exception of the checker or without."""
        for name in ("*", "*.example", "b*.example", "*.*.example", "backend.*"):
            self.server = Recording(echo)
            await self.refused(self.authority.issue(names=[name]).server_context(), "was refused")

    async def test_wildcard_of_one_label_only(self) -> None:
        """A wildcard does not reach two labels down."""
        issued = self.authority.issue(names=["*.backend.example"])
        await self.refused(issued.server_context(), host="a.b.backend.example")

    async def test_client_certificate_as_a_server(self) -> None:
        """A certificate issued for clients proves no server."""
        issued = self.authority.issue(names=["backend.example"], client=True)
        await self.refused(issued.server_context(), "not issued for servers")

    async def test_intermediate(self) -> None:
        """A chain over an intermediate issuer is followed."""
        middle = Authority("Middle", parent=self.authority)
        await self.accepted(middle.issue(names=["backend.example"]).server_context())

    async def test_intermediate_trusted_alone(self) -> None:
        """The operator may trust an intermediate issuer without its root."""
        middle = Authority("Middle", parent=Authority("Unknown root"))
        path = middle.save_pem(os.path.join(self.mktemp(), "middle.pem"))
        issued = middle.issue(names=["backend.example"])
        await self.accepted(issued.server_context(), ca_file=path, ca_exclusive=True)

    async def test_missing_intermediate(self) -> None:
        """A server that forgets to send its chain is refused."""
        middle = Authority("Middle", parent=self.authority)
        issued = middle.issue(names=["backend.example"])
        await self.refused(Issued(issued.certificate, issued.key).server_context(), "issuer")

    async def test_issuer_that_is_none(self) -> None:
        """A certificate issued by something that is no authority is refused."""
        middle = Authority("Middle", parent=self.authority, is_ca=False)
        await self.refused(middle.issue(names=["backend.example"]).server_context(), "number 1 of its chain")

    async def test_name_constraints(self) -> None:
        """An issuer that may not vouch for this name is refused, although that is found after the name was checked."""
        middle = Authority("Middle", parent=self.authority, permitted=["allowed.example"])
        await self.refused(middle.issue(names=["backend.example"]).server_context(), "names are outside")

    async def test_observer_that_raises(self) -> None:
        """An observer's exception is logged and changes nothing."""
        issued = self.authority.issue(names=["backend.example"])
        dialer = Dialer(
            ReactorWith(resolver=FixedResolver(["127.0.0.1"])), TLS(ca_file=self.ca_file), observe_tls=lambda *_: 1 / 0
        )
        target = self.target(issued.server_context())
        client: Any = await dialer.endpoint(target, timeout=10).connect(client_factory())
        self.assertEqual(await client.received, b"echo")
        client.transport.abortConnection()
        await client.lost
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    async def test_further_data(self) -> None:
        """All that comes after the first packet reaches the protocol too, in order."""
        self.server = Recording(lambda recorder: recorder.transport.write(b"echo" * 50_000))
        target = self.target(self.authority.issue(names=["backend.example"]).server_context())
        client: Any = await self.dialer().endpoint(target, timeout=10).connect(client_factory())
        client.wanted = 200_000
        await client.received
        client.transport.abortConnection()
        await client.lost
        self.assertEqual(client.all, b"echo" * 50_000)


class VersionTests(TLSCase):
    """Which protocol is spoken."""

    def setUp(self) -> None:
        super().setUp()
        self.issued = self.authority.issue(names=["backend.example"])

    async def test_tls_1_2(self) -> None:
        """TLS 1.2 is spoken with forward secrecy."""
        await self.accepted(self.issued.server_context(maximum=SSL.TLS1_2_VERSION))
        self.assertEqual(self.facts[0][1].version, "TLSv1.2")
        self.assertIn("ECDHE", self.facts[0][1].cipher)

    async def test_tls_1_1(self) -> None:
        """A server that knows nothing newer than TLS 1.1 is refused, and the message says so."""
        context = self.issued.server_context(
            minimum=SSL.TLS1_VERSION, maximum=SSL.TLS1_1_VERSION, ciphers=b"ALL:@SECLEVEL=0"
        )
        await self.refused(context, "older than tls.minimum_version")

    async def test_minimum_raised(self) -> None:
        """tls.minimum_version = 1.3 refuses a server of TLS 1.2."""
        context = self.issued.server_context(maximum=SSL.TLS1_2_VERSION)
        await self.refused(context, "older than tls.minimum_version", minimum_version="1.3")

    async def test_no_common_cipher(self) -> None:
        """A server that has only ciphers without authenticated encryption is refused."""
        context = self.issued.server_context(
            maximum=SSL.TLS1_2_VERSION, ciphers=b"ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA"
        )
        await self.refused(context, "no common ground")

    async def test_not_tls(self) -> None:
        """A port that speaks plain HTTP is recognised."""
        server = Recording(lambda recorder: recorder.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        target = Target("https", "backend.example", listen(self, server), "/")
        error = await self.assertFailure(
            self.dialer().endpoint(target, timeout=10).connect(client_factory()), TLSFailed
        )
        self.assertIn("does not speak TLS", str(error))
        self.assertNotIn(REQUEST, server.received)

    async def test_hung_up(self) -> None:
        """A peer that hangs up in the handshake is refused in plain words."""
        server = Recording(lambda recorder: recorder.transport.loseConnection())
        target = Target("https", "backend.example", listen(self, server), "/")
        error = await self.assertFailure(
            self.dialer().endpoint(target, timeout=10).connect(client_factory()), TLSFailed
        )
        self.assertIn("closed by the other side", str(error))


class ClientCertificateTests(TLSCase):
    """The agent's own certificate, where a backend wants one."""

    async def _test_given(self, maximum: int) -> None:
        own = self.authority.issue("agent", client=True).save(self.mktemp())
        issued = self.authority.issue(names=["backend.example"])
        await self.accepted(
            issued.server_context(client_authority=self.authority, maximum=maximum),
            certificate=own.cert_pem,
            key=own.key_pem,
        )

    async def test_given_tls_1_2(self) -> None:
        """It is shown over TLS 1.2."""
        await self._test_given(SSL.TLS1_2_VERSION)

    async def test_given_tls_1_3(self) -> None:
        """It is shown over TLS 1.3."""
        await self._test_given(SSL.TLS1_3_VERSION)

    async def test_given_with_its_chain(self) -> None:
        """The issuers in the certificate's file are sent along."""
        middle = Authority("Middle", parent=self.authority)
        own = middle.issue("agent", client=True).save(self.mktemp())
        issued = self.authority.issue(names=["backend.example"])
        await self.accepted(
            issued.server_context(client_authority=self.authority), certificate=own.cert_pem, key=own.key_pem
        )

    async def test_missing_tls_1_2(self) -> None:
        """Over TLS 1.2 the handshake breaks, and the message says what the backend wanted."""
        issued = self.authority.issue(names=["backend.example"])
        context = issued.server_context(client_authority=self.authority, maximum=SSL.TLS1_2_VERSION)
        await self.refused(context, "wants a certificate from the agent")

    async def test_missing_tls_1_3(self) -> None:
        """Over TLS 1.3 the refusal comes after the handshake; the protocol is told TLSFailed, not a lost connection."""
        issued = self.authority.issue(names=["backend.example"])
        target = self.target(issued.server_context(client_authority=self.authority))
        client: Any = await self.dialer().endpoint(target, timeout=10).connect(client_factory())
        reason = await client.lost
        self.assertIsInstance(reason, TLSFailed)
        self.assertIn("wants a certificate from the agent", str(reason))
        self.assertIn("certificate required", str(reason))
        self.assertEqual(self.server.received, b"")

    async def test_of_an_issuer_unknown_there(self) -> None:
        """A certificate that the backend does not trust is named as the reason."""
        own = Authority("Elsewhere").issue("agent", client=True).save(self.mktemp())
        issued = self.authority.issue(names=["backend.example"])
        target = self.target(issued.server_context(client_authority=self.authority))
        dialer = self.dialer(certificate=own.cert_pem, key=own.key_pem)
        client: Any = await dialer.endpoint(target, timeout=10).connect(client_factory())
        reason = await client.lost
        self.assertIsInstance(reason, TLSFailed)
        self.assertIn("refused what [tls] offers", str(reason))

    async def test_not_shown_to_an_impostor(self) -> None:
        """Over TLS 1.2, a backend with a wrong name never sees the agent's certificate."""
        own = self.authority.issue("agent", client=True).save(self.mktemp())
        issued = self.authority.issue(names=["other.example"])
        seen: list[Any] = []
        context: Any = issued.server_context(client_authority=self.authority, maximum=SSL.TLS1_2_VERSION)
        context.getContext().set_verify(
            SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *arguments: bool(seen.append(arguments)) or True
        )
        await self.refused(context, "other.example only", certificate=own.cert_pem, key=own.key_pem)
        self.assertEqual(seen, [])


class InterruptionTests(TLSCase):
    """Deadline and cancellation in the handshake, on a clock of our own."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.mute = Recording()
        self.endpoint = Dialer(ReactorWith(clock=self.clock), TLS(ca_file=self.ca_file)).endpoint(
            Target("https", "127.0.0.1", listen(self, self.mute), "/"), timeout=20
        )

    async def test_mute_handshake(self) -> None:
        """A peer that accepts and then says nothing costs the deadline, and the connection is dropped."""
        accepted = self.mute.next_connection()
        connecting = self.endpoint.connect(client_factory())
        recorder = await accepted
        self.clock.advance(19.9)
        self.assertNoResult(connecting)
        self.clock.advance(0.2)
        error = self.failureResultOf(connecting, DeadlineExceeded).value
        self.assertIn("still in the TLS handshake", str(error))
        self.assertFalse(error.may_have_arrived)
        await recorder.lost
        self.assertNotIn(REQUEST, recorder.received)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    async def test_cancelled(self) -> None:
        """Cancelling in the handshake drops the connection."""
        accepted = self.mute.next_connection()
        connecting = self.endpoint.connect(client_factory())
        recorder = await accepted
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        await recorder.lost
        self.assertEqual(self.clock.getDelayedCalls(), [])


class GateTests(TLSCase):
    """What the gate does when something above or below it is wrong."""

    async def _fails(self, build: Any) -> ConnectFailed:
        factory = client_factory()
        factory.buildProtocol = build
        target = self.target(self.authority.issue(names=["backend.example"]).server_context())
        error = await self.assertFailure(self.dialer().endpoint(target, timeout=10).connect(factory), ConnectFailed)
        await self.server.connections[0].lost
        return error

    async def test_factory_that_raises(self) -> None:
        """A factory's exception closes the connection and is told."""

        def build(_: Any) -> None:
            raise KeyError("broken factory")

        self.assertIn("broken factory", str(await self._fails(build)))

    async def test_factory_that_declines(self) -> None:
        """A factory that builds nothing closes the connection."""
        self.assertIn("built no protocol", str(await self._fails(lambda _: None)))

    async def test_factory_is_told_of_its_life(self) -> None:
        """The factory's doStart and doStop are called in pairs."""
        calls: list[str] = []
        factory = client_factory()
        factory.doStart, factory.doStop = lambda: calls.append("start"), lambda: calls.append("stop")
        target = self.target(self.authority.issue(names=["backend.example"]).server_context())
        client: Any = await self.dialer().endpoint(target, timeout=10).connect(factory)
        client.transport.abortConnection()
        await client.lost
        await self.server.connections[0].lost
        self.assertEqual(calls, ["start", "stop"])

    async def test_context_without_the_check(self) -> None:
        """A connection that forgot its own check trusts nobody: the context itself refuses."""

        class Forgetful(CheckedConnections):
            def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
                return SSL.Connection(self._context, None)

        self.patch(__import__("commsmgr.transport.layers", fromlist=["x"]), "CheckedConnections", Forgetful)
        await self.refused(self.authority.issue(names=["backend.example"]).server_context(), "verify failed")

    def test_handshake_without_a_check(self) -> None:
        """A handshake that came to its end without any check opens nothing."""
        aborted: list[bool] = []

        class Transport:
            def abortConnection(self) -> None:
                aborted.append(True)

        gate = Gate(
            client_factory(),
            None,  # type: ignore[arg-type]
            PeerCheck("backend.example"),
            lambda facts: None,
            lambda error: None,
        )
        gate.transport = Transport()
        gate.handshakeCompleted()
        error = self.failureResultOf(gate.opened, TLSFailed).value
        self.assertIn("without a check", str(error))
        self.assertEqual(aborted, [True])
        gate.connectionLost(Failure(ConnectionDone()))


class PeerCheckTests(SynchronousTestCase):
    """The check by itself."""

    def test_exception_refuses(self) -> None:
        """Whatever goes wrong in looking at a certificate refuses it."""
        check = PeerCheck("backend.example")
        self.assertFalse(check.certificate(None, object(), 0, 0, 1))  # type: ignore[arg-type]
        self.assertIn("cannot be checked", str(check.refusal()))

    def test_failure_after_the_name_was_verified(self) -> None:
        """A failure that comes after depth 0 counts."""
        authority = Authority("Test CA")
        issued = authority.issue(names=["backend.example"])
        shown = type("X509", (), {"to_cryptography": lambda self: issued.certificate})()
        check = PeerCheck("backend.example")
        self.assertTrue(check.certificate(None, shown, 0, 0, 1))  # type: ignore[arg-type]
        self.assertIsNone(check.refusal())
        self.assertFalse(check.certificate(None, shown, 9999, 0, 0))  # type: ignore[arg-type]
        self.assertIn("OpenSSL says error 9999", str(check.refusal()))

    def test_unknown_words(self) -> None:
        """An error without known words is quoted."""
        check = PeerCheck("backend.example")
        self.assertIn("strange", str(check.broken(SSL.Error([("", "", "strange")]))))
        self.assertIn("Error", str(check.broken(SSL.Error())))
        self.assertIn("odd", str(check.broken(ValueError("odd"))))


class FileTests(SynchronousTestCase):
    """The files behind a context."""

    def setUp(self) -> None:
        self.directory = self.mktemp()
        self.authority = Authority("Test CA")
        self.ca_file = self.authority.save_pem(os.path.join(self.directory, "ca.pem"))
        self.own = self.authority.issue("agent", client=True).save(self.directory)

    def _wrong(self, *words: str, **settings: Any) -> None:
        error = self.assertRaises(ConfigError, Dialer(reactor, TLS(**settings)).check)
        for word in words:
            self.assertIn(word, str(error))

    def _write(self, name: str, content: bytes) -> str:
        path = os.path.join(self.directory, name)
        with open(path, "wb") as file:
            file.write(content)
        return path

    def test_nothing_set(self) -> None:
        """The defaults need no file."""
        Dialer(reactor, TLS()).check()

    def test_all_good(self) -> None:
        """Files that fit together are accepted."""
        Dialer(reactor, TLS(ca_file=self.ca_file, certificate=self.own.cert_pem, key=self.own.key_pem)).check()

    def test_missing_files(self) -> None:
        """A file that is not there is named, with its key in the configuration."""
        gone = os.path.join(self.directory, "gone.pem")
        self._wrong("tls.ca_file", gone, "No such file", ca_file=gone)
        self._wrong("tls.certificate", gone, "No such file", certificate=gone, key=self.own.key_pem)
        self._wrong("tls.key", gone, "No such file", certificate=self.own.cert_pem, key=gone)

    def test_not_pem(self) -> None:
        """A file with something else in it is named."""
        odd = self._write("odd.pem", b"secret stuff")
        self._wrong("tls.ca_file", odd, "no certificate", ca_file=odd)
        self._wrong("tls.certificate", odd, "no certificate", certificate=odd, key=self.own.key_pem)
        self._wrong("tls.key", odd, "not a private key", certificate=self.own.cert_pem, key=odd)

    def test_key_is_not_quoted(self) -> None:
        """What is in the key's file never stands in the error."""
        odd = self._write("odd.pem", b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0c2VjcmV0\n-----END PRIVATE KEY-----\n")
        error = self.assertRaises(ConfigError, Dialer(reactor, TLS(certificate=self.own.cert_pem, key=odd)).check)
        self.assertNotIn("c2VjcmV0", str(error))
        self.assertNotIn("secret", str(error))

    def test_half_a_pair(self) -> None:
        """A certificate needs a key and the other way round."""
        self._wrong("tls.key", "certificate is set, but key is not", certificate=self.own.cert_pem)
        self._wrong("tls.certificate", "key is set, but certificate is not", key=self.own.key_pem)

    def test_foreign_key(self) -> None:
        """A key of another certificate is recognised."""
        other = self.authority.issue("other").save(os.path.join(self.directory, "other"))
        self._wrong("does not belong to", other.key_pem, certificate=self.own.cert_pem, key=other.key_pem)

    def test_encrypted_key(self) -> None:
        """A key with a passphrase cannot be used, and the message says why."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self._write(
            "encrypted.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
        )
        self._wrong("tls.key", path, "encrypted", certificate=self.own.cert_pem, key=path)

    def test_certificate_too_weak_for_openssl(self) -> None:
        """What OpenSSL itself refuses is told with its words."""
        key = rsa.generate_private_key(65537, 1024)
        weak = Issued(_certificate_for(key, self.authority), key).save(os.path.join(self.directory, "weak"))
        self._wrong("tls.certificate", "OpenSSL refuses", certificate=weak.cert_pem, key=weak.key_pem)

    def test_key_that_cannot_sign(self) -> None:
        """A key of a kind that TLS cannot use is refused here, not in the first handshake."""
        key = x25519.X25519PrivateKey.generate()
        certificate = self._write("x.pem", Issued(_certificate_for(key, self.authority), None).cert_pem)  # type: ignore
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._wrong("OpenSSL refuses", certificate=certificate, key=self._write("xk.pem", private))

    def test_exclusive_without_a_file(self) -> None:
        """Trusting only nobody is a mistake."""
        self._wrong("tls.ca_exclusive", "ca_file", ca_exclusive=True)

    def test_unchanged_files_are_not_read_again(self) -> None:
        """The same context serves until a file changes."""
        source = ContextSource(TLS(ca_file=self.ca_file))
        self.assertIs(source.current(), source.current())

    def test_changed_file(self) -> None:
        """A renewed file makes a new context, and the log says so."""
        source = ContextSource(TLS(ca_file=self.ca_file))
        before = source.current()
        Authority("New CA").save_pem(self.ca_file)
        with capturedLogs() as events:
            after = source.current()
        self.assertIsNot(before, after)
        self.assertEqual([event["event"] for event in events], ["tls.files.loaded"])
        self.assertIs(source.current(), after)

    def test_changed_for_the_worse(self) -> None:
        """Half of a new pair changes nothing, is logged once, and the whole pair is taken when it is there."""
        source = ContextSource(TLS(certificate=self.own.cert_pem, key=self.own.key_pem))
        before = source.current()
        renewed = self.authority.issue("agent", client=True)
        self._write("cert.pem", renewed.cert_pem)
        with capturedLogs() as events:
            self.assertIs(source.current(), before)
            self.assertIs(source.current(), before)
        self.assertEqual([event["event"] for event in events], ["tls.files.refused"])
        self.assertIn("does not belong", events[0]["error"])
        self._write("key.pem", renewed.key_pem)
        self.assertIsNot(source.current(), before)

    def test_file_that_vanished(self) -> None:
        """A file that is gone changes nothing either."""
        source = ContextSource(TLS(ca_file=self.ca_file))
        before = source.current()
        os.unlink(self.ca_file)
        with capturedLogs() as events:
            self.assertIs(source.current(), before)
        self.assertIn("No such file", events[0]["error"])


def _certificate_for(key: Any, authority: Authority) -> Any:
    from cryptography.hazmat.primitives import hashes

    from tests.certificates import _builder

    builder = _builder("odd", authority.certificate.subject, key, NOW - DAY, NOW + DAY)
    return builder.sign(authority.key, hashes.SHA256())
