"""
What is said of a certificate, and the pin of its key.

A certificate is what its maker wanted it to be, up to 100 KB of it, and a hostile peer's is read too before it is
refused. So all texts that come out of one are made printable, on one line, and short.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from cryptography.x509 import Certificate
from msgspec import Struct
from OpenSSL.crypto import FILETYPE_ASN1, X509, dump_publickey

from commsmgr.redact import single_line

NAME_LIMIT: Final = 200
"""Characters that are shown of a subject or an issuer."""

_ALTERNATIVE_LIMIT: Final = 64
_ALTERNATIVES: Final = 8


class CertificateFacts(Struct, frozen=True):
    """
    What an operator needs to find a certificate.

    :ivar subject: as an RFC 4514 string, like ``issuer``, of at most about :data:`NAME_LIMIT` characters.
    :ivar not_before: in seconds since the epoch, like ``not_after``.
    """

    subject: str
    issuer: str
    not_before: float
    not_after: float


def facts(certificate: Certificate) -> CertificateFacts:
    """Return who ``certificate`` is and how long."""
    return CertificateFacts(
        subject=single_line(certificate.subject.rfc4514_string(), NAME_LIMIT),
        issuer=single_line(certificate.issuer.rfc4514_string(), NAME_LIMIT),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def describe(certificate: Certificate) -> str:
    """Return the same as :func:`facts` as part of a sentence."""
    found = facts(certificate)
    return (
        f"certificate {found.subject or 'without a subject'}, issued by {found.issuer}, "
        f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ} "
        f"to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}"
    )


def listed(names: Iterable[str]) -> str:
    """Return the first of the names that a certificate is for, and how many others there are."""
    shown = [single_line(name, _ALTERNATIVE_LIMIT) for name in names]
    more = len(shown) - _ALTERNATIVES
    return ", ".join(shown[:_ALTERNATIVES]) + (f" and {more} more" if more > 0 else "")


def pin(x509: X509) -> str:
    """
    Return the pin of a certificate's key as ``tls.pins`` has it.

    It is the SHA-256 of the SubjectPublicKeyInfo (RFC 7469 section 2.4), spelled as curl's ``--pinnedpubkey`` does, and
    stays the same when a certificate is renewed for the same key.
    """
    # OpenSSL writes the key, as its command line does when a pin is made: it keeps the kind of an RSA-PSS key, too.
    return "sha256//" + b64encode(sha256(dump_publickey(FILETYPE_ASN1, x509.get_pubkey())).digest()).decode()
