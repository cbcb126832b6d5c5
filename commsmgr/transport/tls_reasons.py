"""
Why a TLS handshake failed: OpenSSL's numbers and words, as checks (:data:`commsmgr.errors.TLS_CHECKS`) and sentences.
"""

from __future__ import annotations

from typing import Final

from OpenSSL import SSL
from twisted.internet.error import ConnectionClosed

from commsmgr.redact import single_line

# X509_V_ERR_* of OpenSSL's x509_vfy.h, each as the check that was not passed and as a sentence.
CERTIFICATE_REASONS: Final = {
    2: ("issuer", "its issuer is not known here"),
    7: ("signature", "its signature is wrong"),
    9: ("not-yet-valid", "it is not valid yet"),
    10: ("expired", "it has expired"),
    18: ("self-signed", "it is self-signed and not among the trusted ones"),
    19: ("issuer", "its chain ends at a self-signed issuer that is not trusted"),
    20: ("issuer", "its issuer is not trusted"),
    21: ("issuer", "its issuer is not trusted, and no chain was sent along"),
    22: ("chain", "its chain is too long"),
    23: ("revoked", "it has been revoked"),
    24: ("not-a-ca", "it was issued by something that may not issue certificates"),
    25: ("chain", "its chain is longer than an issuer in it allows"),
    26: ("purpose", "it was not issued for servers"),
    47: ("name-constraints", "its names are outside of what an issuer in its chain may vouch for"),
    48: ("name-constraints", "its names are among those that an issuer in its chain may not vouch for"),
    66: ("weak", "its key is too weak"),
    67: ("weak", "an issuer's key is too weak"),
    68: ("weak", "its signature algorithm is too weak"),
    79: ("not-a-ca", "it was issued by something that may not issue certificates"),
}

# RFC 8446 section 6.2: alerts by which a server says that it does not like the agent's certificate, or the lack of it.
CERTIFICATE_ALERTS: Final = {
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    48: "unknown issuer",
    49: "access denied",
    116: "certificate required",
}


def broken_handshake(error: BaseException | None) -> tuple[str, str]:
    """Return the check that was not passed and a sentence, for what ended a handshake before it was complete."""
    if isinstance(error, ConnectionClosed):
        return "closed", "the connection was closed by the other side"
    detail = _detail(error)
    if "alert protocol version" in detail or "unsupported protocol" in detail:
        return "version", "the backend speaks only TLS versions older than tls.minimum_version"
    if any(sign in detail for sign in ("wrong version number", "record layer", "packet length", "http request")):
        return "not-tls", "what answers on that port does not speak TLS"
    if "handshake failure" in detail:
        return "ciphers", "the backend found no common ground (ciphers, or a client certificate)"
    if "cipher returned" in detail:
        return "ciphers", f"the backend chose a cipher that was not offered ({detail})"
    return "handshake", single_line(detail, 200)


def _detail(error: BaseException | None) -> str:
    queue = error.args[0] if isinstance(error, SSL.Error) and error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1])
    return str(error) or type(error).__name__
