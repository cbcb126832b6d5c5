"""
Who is at the other end of a TLS connection: the check of one backend's certificate.

Theory of operation: OpenSSL shows each certificate of the verified chain to :meth:`PeerCheck.certificate`, from the
issuer down to the backend's own (depth 0). Name and pins are compared there, inside the handshake, not after it: with
TLS 1.2 the agent's own certificate would already have been shown to whoever answered. **Any** exception refuses. Some
checks of OpenSSL (name constraints) come after depth 0, so the verdict is read only when the handshake is complete, and
it is "the name was verified and nothing failed". A connection that never came to the check is refused likewise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import msgspec
from cryptography.x509 import Certificate, DNSName, ExtensionNotFound, IPAddress, SubjectAlternativeName
from msgspec import Struct
from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity.exceptions import CertificateError, VerificationError
from service_identity.hazmat import DNS_ID, DNSPattern, IPAddress_ID, IPAddressPattern, verify_service_identity

from commsmgr.errors import TLSFailed
from commsmgr.redact import single_line
from commsmgr.transport.certificate import describe, facts, listed, pin
from commsmgr.transport.tls_reasons import CERTIFICATE_ALERTS, CERTIFICATE_REASONS, broken_handshake


class TLSFacts(Struct, frozen=True):
    """
    What was agreed with a backend.

    :ivar version: such as ``TLSv1.3``.
    :ivar subject: of the backend's certificate, as an RFC 4514 string, like ``issuer``.
    :ivar not_after: when that certificate expires, in seconds since the epoch.
    """

    version: str
    cipher: str
    subject: str
    issuer: str
    not_after: float


def _patterns(hosts: Iterable[str], addresses: Iterable[Any]) -> Iterator[DNSPattern | IPAddressPattern]:
    """Yield what can be compared: a malformed name, such as ``*`` or an address as a name, vouches for nothing."""
    for host in hosts:
        # service_identity takes blanks away. OpenSSL does not, so such a name would slip through name constraints.
        if host == host.strip():
            with suppress(CertificateError):
                yield DNSPattern.from_bytes(host.encode("ascii"))
    yield from map(IPAddressPattern, addresses)


def _service_id(host: str) -> DNS_ID | IPAddress_ID:
    try:
        return IPAddress_ID(ip=ip_address(host))
    except ValueError:
        return DNS_ID(host)


class PeerCheck:
    """
    What one handshake brought to light.

    :param host: the name or address that the certificate must vouch for, a name without a trailing dot.
    :param pins: the key of one certificate of the verified chain must be among them; with none, any key will do.
    :ivar steps: how many OpenSSL made in all messages that are no data, those after the handshake included.
    """

    def __init__(self, host: str, pins: Collection[str] = ()) -> None:
        self.steps = 0
        self._host = host
        self._pins = pins
        self._keys: dict[int, str] = {}
        self._leaf: Certificate | None = None
        self._verified = False
        self._failure: TLSFailed | None = None
        self._alert = 0
        self._asked_for_certificate = False

    def certificate(self, _: SSL.Connection, x509: X509, error: int, depth: int, ok: int) -> bool:
        """OpenSSL looked at a certificate of the chain and calls it good, or gives an error number."""
        certificate: Certificate | None = None
        try:
            certificate = x509.to_cryptography()
            if not ok:
                check, sentence = CERTIFICATE_REASONS.get(error, ("certificate", f"OpenSSL says error {error}"))
                raise _Refused(check, sentence if depth == 0 else f"{sentence} (number {depth} of its chain)")
            if self._pins:
                self._keys[depth] = pin(x509)
            if depth == 0:
                self._leaf = certificate
                self._identity(certificate)
                self._pinned()
                self._verified = True
            return True
        except Exception as problem:
            self._failure = self._failure or self._refused(problem, certificate)
            return False

    def _refused(self, problem: Exception, certificate: Certificate | None) -> TLSFailed:
        if isinstance(problem, _Refused):
            check, sentence = problem.args
        else:
            check, sentence = "certificate", f"it cannot be checked: {single_line(repr(problem), 200)}"
        sentence = f"the certificate of {self._host} was refused: {sentence}"
        try:
            assert certificate is not None
            known = msgspec.structs.asdict(facts(certificate))
            sentence = f"{sentence}: {describe(certificate)}"
        except Exception:
            # It cannot even be said whose it is.
            known = {}
        return TLSFailed(sentence, check=check, host=self._host, **known)

    def _identity(self, certificate: Certificate) -> None:
        try:
            names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
        except ExtensionNotFound:
            raise _Refused("no-name", "it has no subjectAltName") from None
        hosts = names.get_values_for_type(DNSName)
        addresses = names.get_values_for_type(IPAddress)
        try:
            verify_service_identity([*_patterns(hosts, addresses)], [_service_id(self._host)], [])
        except (VerificationError, CertificateError):
            shown = listed([*hosts, *map(str, addresses)])
            raise _Refused("name", f"it is for {shown} only" if shown else "it is for no host at all") from None

    def _pinned(self) -> None:
        # Certificates that were sent along and have no part in the verified chain do not come here: anybody can send
        # the certificate of a pinned issuer.
        if self._pins and not set(self._keys.values()) & set(self._pins):
            raise _Refused("pin", f"no key of its chain is among tls.pins, its own is {self._keys[0]}")

    def handshake_event(self, connection: SSL.Connection, where: int, code: int) -> None:
        """OpenSSL made a step in the handshake or in a message after it, or read or wrote an alert."""
        self.steps += 1
        if where & SSL.SSL_CB_READ_ALERT == SSL.SSL_CB_READ_ALERT:
            self._alert = code & 0xFF
        elif b"certificate request" in connection.get_state_string():
            self._asked_for_certificate = True

    def refusal(self) -> TLSFailed | None:
        """Return why the peer of a completed handshake may not be spoken to; None when it may."""
        if self._failure is None and not self._verified:
            return TLSFailed(
                f"the handshake with {self._host} ended without a check of its certificate", host=self._host
            )
        return self._failure

    def facts(self, connection: SSL.Connection) -> TLSFacts:
        """Return what was agreed; only after a completed handshake whose :meth:`refusal` is None."""
        assert self._leaf is not None
        leaf = facts(self._leaf)
        return TLSFacts(
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            subject=leaf.subject,
            issuer=leaf.issuer,
            not_after=leaf.not_after,
        )

    def broken(self, error: BaseException | None) -> TLSFailed:
        """Return why a handshake ended before it was complete: the refusal, or ``error`` in an operator's words."""
        if self._failure is not None:
            return self._failure
        check, words = self._words(error)
        return TLSFailed(f"TLS handshake with {self._host} failed: {words}", check=check, host=self._host)

    def refused_us(self) -> TLSFailed | None:
        """
        Return that the backend refused the agent's certificate; None when it did not.

        With TLS 1.3 it says so only after the handshake (RFC 8446 section 4.4.2.4), and before it read any request.
        """
        if self._asked_for_certificate and self._alert in CERTIFICATE_ALERTS:
            return TLSFailed(
                f"{self._host} wants a certificate from the agent and refused what [tls] offers: "
                f"{CERTIFICATE_ALERTS[self._alert]}",
                check="client-certificate",
                host=self._host,
            )
        return None

    def _words(self, error: BaseException | None) -> tuple[str, str]:
        check, words = broken_handshake(error)
        if self._asked_for_certificate and check in ("closed", "ciphers", "handshake"):
            return "client-certificate", f"{words}; the backend wants a certificate from the agent"
        return check, words


class _Refused(Exception):
    """``args``: which check, and a sentence."""
