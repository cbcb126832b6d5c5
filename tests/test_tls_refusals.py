"""What is said of a refusal: as data, in one line of the log, and in the manual; whatever a certificate contains."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import TLS_CHECKS, TLSFailed
from commsmgr.observe.logs import make_observer
from commsmgr.redact import Redactor
from commsmgr.transport.peer import PeerCheck
from commsmgr.transport.tls import CIPHERS
from commsmgr.urls import Target
from tests.certificates import DAY, NOW, Authority, Issued
from tests.loopback import FixedResolver, ReactorWith
from tests.tls_kit import HOST, TransportsCase

MANUAL = Path(__file__).resolve().parent.parent / "docs" / "operations.rst"

FORMATS: Final[tuple[Literal["text", "json"], ...]] = ("text", "json")
FORGED = "\n2026-11-22T14:00:00.123Z info  link.registered  all is well"
ODD = f"{FORGED}\r\x1b[2J\u2028\u202e\x00\x07"


def name_of(*values: str) -> x509.Name:
    """Return a name with one attribute for each value."""
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, value) for value in values])


def checked(issued: Issued, error: int, depth: int = 0) -> TLSFailed:
    """Return the refusal of a certificate that OpenSSL gave ``error`` for; 0 for none."""
    check = PeerCheck(HOST)
    given = X509.from_cryptography(issued.certificate)
    assert not check.certificate(None, given, error, depth, int(error == 0))  # type: ignore[arg-type]
    refusal = check.refusal()
    assert refusal is not None
    return refusal


class FactsTests(SynchronousTestCase):
    """A refusal as data."""

    authority = Authority("Test CA")

    def test_of_the_certificate(self) -> None:
        """Check, host, subject, issuer and dates are there, and are those of the certificate that did not pass."""
        issued = self.authority.issue("old", names=[HOST], not_before=NOW - 9 * DAY, not_after=NOW - DAY)
        error = checked(issued, 10)
        self.assertEqual(
            (error.check, error.host, error.subject, error.issuer), ("expired", HOST, "CN=old", "CN=Test CA")
        )
        self.assertEqual(error.not_before, int((NOW - 9 * DAY).timestamp()))
        self.assertEqual(error.not_after, int((NOW - DAY).timestamp()))

    def test_first_one_counts(self) -> None:
        """The first check that fails is the one that is named."""
        check = PeerCheck(HOST)
        for error in (10, 20):
            given = X509.from_cryptography(self.authority.issue("old").certificate)
            self.assertFalse(check.certificate(None, given, error, 0, 0))  # type: ignore[arg-type]
        refusal = check.refusal()
        assert refusal is not None
        self.assertEqual(refusal.check, "expired")

    def test_unreadable(self) -> None:
        """A certificate that cannot even be read gives no facts, and a short sentence."""
        check = PeerCheck(HOST)

        class Unreadable:
            def to_cryptography(self) -> object:
                raise ValueError("\n" * 5000)

        self.assertFalse(check.certificate(None, Unreadable(), 0, 0, 1))  # type: ignore[arg-type]
        refusal = check.refusal()
        assert refusal is not None
        self.assertEqual((refusal.check, refusal.subject, refusal.not_after), ("certificate", "", None))
        self.assertLess(len(str(refusal)), 600)
        self.assertNotIn("\n", str(refusal))

    def test_every_check_is_explained(self) -> None:
        """The manual has a line for each check, and for no other."""
        table = MANUAL.read_text("utf-8").split(".. tls-checks", 1)[1].split(".. end of tls-checks", 1)[0]
        self.assertEqual(sorted(re.findall(r"^``([a-z-]+)`` ", table, re.MULTILINE)), sorted(TLS_CHECKS))


class HostileContentTests(SynchronousTestCase):
    """Certificates made to forge lines, to steer terminals, and to fill disks."""

    authority = Authority("Test CA")

    def _fit_to_print(self, error: TLSFailed) -> None:
        for text in (str(error), error.subject, error.issuer):
            self.assertTrue(text.isprintable(), repr(text))
        self.assertLess(len(str(error)), 2500)
        self.assertLess(len(error.subject), 300)
        self.assertLess(len(error.issuer), 300)

    def test_subject(self) -> None:
        """A subject with line breaks, escape sequences and changes of direction."""
        error = checked(self.authority.issue(name_of(ODD[:60], ODD[60:])), 20)
        self._fit_to_print(error)
        self.assertIn(r"\n2026-11-22", error.subject.replace("\\\\", "\\"))

    def test_endless_subject_and_issuer(self) -> None:
        """A subject and an issuer of some 30 KB each."""
        endless = name_of(*("x" * 60 for _ in range(500)))
        key = self.authority.key
        certificate = (
            x509.CertificateBuilder()
            .subject_name(endless)
            .issuer_name(endless)
            .public_key(key.public_key())  # type: ignore[arg-type]  # an EC key
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + DAY)
            .sign(key, self.authority.certificate.signature_hash_algorithm)  # type: ignore[arg-type]
        )
        error = checked(Issued(certificate, key), 20)
        self._fit_to_print(error)
        self.assertIn("more characters", error.subject)

    def test_names(self) -> None:
        """Thousands of names, long and odd ones."""
        names = [f"{'a' * 60}.{number}.\x1b[2J\n.{'b' * 60}.example" for number in range(3000)]
        error = checked(self.authority.issue(names=names), 0)
        self._fit_to_print(error)
        self.assertEqual(error.check, "name")
        self.assertIn("and 2992 more only", str(error))


class LineTests(TransportsCase):
    """A refusal in the log."""

    def refusals(self, events: Any) -> list[Any]:
        """Return the events that are refusals."""
        return [event for event in events if event.get("event") == "tls.refused"]

    async def test_one_line(self) -> None:
        """Whatever the subject holds it is one line, as text and as JSON, and JSON has the facts as fields."""
        issued = self.authority.issue(name_of(ODD[:60], ODD[60:]), names=["other.example\n"])
        with capturedLogs() as events:
            await self.by_http(self.listen(issued.server_context()))
        await self.gone()
        [refusal] = self.refusals(events)
        written = {}
        for form in FORMATS:
            stream = StringIO()
            make_observer(stream, format=form, level="debug", redactor=Redactor())(refusal)
            written[form] = stream.getvalue()
            self.assertEqual(len(written[form].splitlines()), 1)
            self.assertEqual(written[form].count("\n"), 1)
        self.assertIn("tls.refused", written["text"])
        record = json.loads(written["json"])
        self.assertEqual((record["check"], record["host"], record["issuer"]), ("name", HOST, "CN=Test CA"))
        self.assertTrue(record["subject"].isprintable())
        self.assertRegex(record["not_after"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    async def test_held_back(self) -> None:
        """Refusals of a kind within ten seconds make one line; the next one says how many were held back."""
        clock = Clock()
        self.reactor = ReactorWith(clock=clock, resolver=FixedResolver(["127.0.0.1"]))
        port = self.listen(self.authority.issue(names=["other.example"]).server_context())
        dialer = self.dialer()
        with capturedLogs() as events:
            for wait in (0, 0, 0, 10):
                clock.advance(wait)
                endpoint = dialer.endpoint(Target("https", HOST, port, ""), timeout=10)
                await self.assertFailure(endpoint.connect(Factory.forProtocol(Protocol)), TLSFailed)
        await self.gone()
        lines = [(line["check"], line["suppressed"]) for line in self.refusals(events)]
        self.assertEqual(lines, [("name", 0), ("name", 2)])


class OfferTests(SynchronousTestCase):
    """What we offer in the first place."""

    def test_forward_secrecy(self) -> None:
        """Nothing but ephemeral elliptic curves with authenticated encryption is offered, in both versions."""
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_cipher_list(CIPHERS)
        offered = SSL.Connection(context, None).get_cipher_list()
        older = [name for name in offered if not name.startswith("TLS_")]
        self.assertGreater(len(older), 3)
        for name in older:
            self.assertRegex(name, r"^ECDHE-(RSA|ECDSA)-(AES(128|256)-GCM-SHA(256|384)|CHACHA20-POLY1305)$")
        for name in set(offered) - set(older):
            self.assertRegex(name, r"^TLS_(AES_(128|256)_GCM|CHACHA20_POLY1305)_SHA(256|384)$")
