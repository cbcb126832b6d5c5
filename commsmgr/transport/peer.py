"""
Who is at the other end of a TLS connection: the check of one backend's certificate.

Theory of operation: OpenSSL shows each certificate of the chain to :meth:`PeerCheck.certificate`, from the issuer down
to the backend's own (depth 0). The name is compared there, inside the handshake, not after it: with TLS 1.2 the agent's
own certificate would already have been shown to whoever answered. **Any** exception refuses. Some checks of OpenSSL
(name constraints) come after depth 0, so the verdict is read only when the handshake is complete, and it is "the name
was verified and nothing failed". A connection that never came to the check is refused likewise.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from cryptography.x509 import Certificate
from msgspec import Struct
from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity.cryptography import extract_patterns
from service_identity.exceptions import VerificationError
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity
from twisted.internet.error import ConnectionClosed

from commsmgr.errors import TLSFailed


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


# X509_V_ERR_* of OpenSSL's x509_vfy.h, as sentences.
_REASONS: Final = {
    2: "its issuer is not known here",
    7: "its signature is wrong",
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed and not among the trusted ones",
    19: "its chain ends at a self-signed issuer that is not trusted",
    20: "its issuer is not trusted",
    21: "its issuer is not trusted, and no chain was sent along",
    22: "its chain is too long",
    23: "it has been revoked",
    24: "it was issued by something that may not issue certificates",
    25: "its chain is longer than an issuer in it allows",
    26: "it was not issued for servers",
    47: "its names are outside of what an issuer in its chain may vouch for",
    48: "its names are among those that an issuer in its chain may not vouch for",
    66: "its key is too weak",
    67: "an issuer's key is too weak",
    68: "its signature algorithm is too weak",
    79: "it was issued by something that may not issue certificates",
}

# RFC 8446 section 6.2: alerts by which a server says that it does not like the agent's certificate, or the lack of it.
_CERTIFICATE_ALERTS: Final = {
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    48: "unknown issuer",
    49: "access denied",
    116: "certificate required",
}


def describe(certificate: Certificate) -> str:
    """Return what an operator needs to find a certificate: subject, issuer and dates."""
    return (
        f"certificate {certificate.subject.rfc4514_string() or 'without a subject'}, "
        f"issued by {certificate.issuer.rfc4514_string()}, "
        f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ} "
        f"to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}"
    )


def _service_id(host: str) -> DNS_ID | IPAddress_ID:
    try:
        return IPAddress_ID(ip=ip_address(host))
    except ValueError:
        return DNS_ID(host)


class PeerCheck:
    """
    What one handshake brought to light.

    :param host: the name or address that the certificate must vouch for, a name without a trailing dot.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._leaf: Certificate | None = None
        self._verified = False
        self._failure: TLSFailed | None = None
        self._alert = 0
        self._asked_for_certificate = False

    def certificate(self, _: SSL.Connection, x509: X509, error: int, depth: int, ok: int) -> bool:
        """OpenSSL looked at a certificate of the chain and calls it good, or gives an error number."""
        try:
            certificate = x509.to_cryptography()
            if not ok:
                where = "" if depth == 0 else f" (number {depth} of its chain)"
                raise _Refused(f"{_REASONS.get(error, f'OpenSSL says error {error}')}{where}: {describe(certificate)}")
            if depth == 0:
                self._leaf = certificate
                self._identity(certificate)
                self._verified = True
            return True
        except Exception as problem:
            reason = str(problem) if isinstance(problem, _Refused) else f"it cannot be checked: {problem!r}"
            self._failure = TLSFailed(f"the certificate of {self._host} was refused: {reason}")
            return False

    def _identity(self, certificate: Certificate) -> None:
        patterns = extract_patterns(certificate)
        if not patterns:
            raise _Refused(f"it has no subjectAltName: {describe(certificate)}")
        try:
            verify_service_identity(patterns, [_service_id(self._host)], [])
        except VerificationError:
            names = ", ".join(str(_shown(pattern)) for pattern in patterns[:10])
            raise _Refused(f"it is for {names} only: {describe(certificate)}") from None

    def handshake_event(self, connection: SSL.Connection, where: int, code: int) -> None:
        """OpenSSL made a step in the handshake, or read an alert."""
        if where & SSL.SSL_CB_READ_ALERT == SSL.SSL_CB_READ_ALERT:
            self._alert = code & 0xFF
        elif b"certificate request" in connection.get_state_string():
            self._asked_for_certificate = True

    def refusal(self) -> TLSFailed | None:
        """Return why the peer of a completed handshake may not be spoken to; None when it may."""
        if self._failure is None and not self._verified:
            return TLSFailed(f"the handshake with {self._host} ended without a check of its certificate")
        return self._failure

    def facts(self, connection: SSL.Connection) -> TLSFacts:
        """Return what was agreed; only after a completed handshake whose :meth:`refusal` is None."""
        leaf = self._leaf
        assert leaf is not None
        return TLSFacts(
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            subject=leaf.subject.rfc4514_string(),
            issuer=leaf.issuer.rfc4514_string(),
            not_after=leaf.not_valid_after_utc.timestamp(),
        )

    def broken(self, error: BaseException | None) -> TLSFailed:
        """Return why a handshake ended before it was complete: the refusal, or ``error`` in an operator's words."""
        return self._failure or TLSFailed(f"TLS handshake with {self._host} failed: {self._words(error)}")

    def refused_us(self) -> TLSFailed | None:
        """
        Return that the backend refused the agent's certificate; None when it did not.

        With TLS 1.3 it says so only after the handshake (RFC 8446 section 4.4.2.4), and before it read any request.
        """
        if self._asked_for_certificate and self._alert in _CERTIFICATE_ALERTS:
            return TLSFailed(
                f"{self._host} wants a certificate from the agent and refused what [tls] offers: "
                f"{_CERTIFICATE_ALERTS[self._alert]}"
            )
        return None

    def _words(self, error: BaseException | None) -> str:
        wanted = "; the backend wants a certificate from the agent" if self._asked_for_certificate else ""
        if isinstance(error, ConnectionClosed):
            return f"the connection was closed by the other side{wanted}"
        detail = _detail(error)
        if "alert protocol version" in detail or "unsupported protocol" in detail:
            return "the backend speaks only TLS versions older than tls.minimum_version"
        if any(sign in detail for sign in ("wrong version number", "record layer", "packet length", "http request")):
            return "what answers on that port does not speak TLS"
        if "handshake failure" in detail:
            return f"the backend found no common ground (ciphers, or a client certificate){wanted}"
        return f"{detail}{wanted}"


class _Refused(Exception):
    pass


def _detail(error: BaseException | None) -> str:
    queue = error.args[0] if isinstance(error, SSL.Error) and error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1])
    return str(error) or type(error).__name__


def _shown(pattern: object) -> object:
    value = getattr(pattern, "pattern", pattern)
    return value.decode("ascii", "backslashreplace") if isinstance(value, bytes) else value
