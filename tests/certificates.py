"""
Certificates for tests, made when a test runs: authorities, and what they issue, good and bad.

::

    authority = Authority("Test CA")
    issued = authority.issue(names=["localhost"], ips=["127.0.0.1"])
    paths = issued.save(self.mktemp())           # cert_pem, key_pem as files
    listener = issued.server_context()           # for reactor.listenSSL, or SSL4ServerEndpoint

Keys are P-256, made in well under a millisecond, unless another one is given. Times are UTC.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL
from twisted.internet.ssl import ContextFactory

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
SHA256 = hashes.SHA256()


@functools.cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """Return an RSA key, always the same of one size: they take long to make."""
    return rsa.generate_private_key(65537, bits)


class Paths(NamedTuple):
    """Where an :class:`Issued` was saved."""

    cert_pem: str
    key_pem: str


class Issued:
    """A certificate with its private key and the issuers to send along."""

    def __init__(
        self,
        certificate: x509.Certificate,
        key: CertificateIssuerPrivateKeyTypes,
        chain: Sequence[x509.Certificate] = (),
    ) -> None:
        self.certificate = certificate
        self.key = key
        self.chain = tuple(chain)

    @property
    def cert_pem(self) -> bytes:
        """The certificate and its chain."""
        return b"".join(_pem(each) for each in (self.certificate, *self.chain))

    @property
    def key_pem(self) -> bytes:
        """The private key, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def save(self, directory: str) -> Paths:
        """Write ``cert.pem`` and ``key.pem`` into ``directory`` (made when it is not there)."""
        os.makedirs(directory, exist_ok=True)
        paths = Paths(os.path.join(directory, "cert.pem"), os.path.join(directory, "key.pem"))
        for path, content in zip(paths, (self.cert_pem, self.key_pem), strict=True):
            with open(path, "wb") as file:
                file.write(content)
        return paths

    def server_context(
        self,
        *,
        client_authority: Authority | None = None,
        minimum: int = SSL.TLS1_2_VERSION,
        maximum: int = SSL.TLS1_3_VERSION,
        ciphers: bytes = b"",
    ) -> ContextFactory:
        """
        Return what ``reactor.listenSSL`` takes.

        :param client_authority: require a client certificate issued by it.
        :param minimum: oldest protocol version, ``SSL.TLS1_…_VERSION``; ``maximum`` is the newest.
        """
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(minimum)
        context.set_max_proto_version(maximum)
        if ciphers:
            context.set_cipher_list(ciphers)
        context.use_certificate(self.certificate)
        context.use_privatekey(self.key)
        for each in self.chain:
            context.add_extra_chain_cert(each)
        if client_authority is not None:
            store = context.get_cert_store()
            assert store is not None
            store.add_cert(_as_x509(client_authority.certificate))
            context.set_verify(
                SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda connection, cert, error, depth, ok: bool(ok)
            )
        return _Fixed(context)


class Authority(Issued):
    """
    An issuer of certificates.

    :param name: its common name.
    :param parent: who issued it; None for a root.
    :param permitted: DNS names it may vouch for (name constraints); empty for any.
    :param excluded: DNS names it may not vouch for.
    :param key: its key; None for a new one.
    """

    def __init__(
        self,
        name: str = "Test CA",
        *,
        parent: Authority | None = None,
        permitted: Sequence[str] = (),
        excluded: Sequence[str] = (),
        key: CertificateIssuerPrivateKeyTypes | None = None,
        not_before: datetime = NOW - 30 * DAY,
        not_after: datetime = NOW + 30 * DAY,
        is_ca: bool = True,
    ) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, parent.certificate.subject if parent else _name(name), key, not_before, not_after)
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if permitted or excluded:
            subtrees = ([x509.DNSName(each) for each in names] or None for names in (permitted, excluded))
            builder = builder.add_extension(x509.NameConstraints(*subtrees), critical=True)
        certificate = builder.sign(parent.key if parent else key, SHA256)
        super().__init__(certificate, key, parent.sent_along if parent else ())

    @property
    def pem(self) -> bytes:
        """The authority's certificate alone, as a CA file holds it."""
        return _pem(self.certificate)

    @property
    def sent_along(self) -> tuple[x509.Certificate, ...]:
        """What a server sends besides its own certificate: this authority and those above it, without the root."""
        is_root = self.certificate.issuer == self.certificate.subject
        return () if is_root else (self.certificate, *self.chain)

    def save_pem(self, path: str) -> str:
        """Write :attr:`pem` to the file ``path``, making its directory; return ``path``."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(self.pem)
        return path

    def issue(
        self,
        common_name: str | x509.Name = "leaf",
        *,
        names: Sequence[str] = (),
        ips: Sequence[str] = (),
        not_before: datetime = NOW - DAY,
        not_after: datetime = NOW + DAY,
        client: bool = False,
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Issued:
        """
        Issue a certificate; without ``names`` and ``ips`` it has no subjectAltName at all.

        :param common_name: or the whole name of the subject.
        :param names: DNS names, taken as they are, wrong ones such as ``*`` too.
        :param client: for clients (extended key usage) instead of servers.
        :param key: its key; None for a new one.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(common_name, self.certificate.subject, key, not_before, not_after)
        builder = _with_names(builder, names, ips)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return Issued(builder.sign(self.key, SHA256), key, self.sent_along)


def signed_with_sha1(certificate: x509.Certificate, issuer: rsa.RSAPrivateKey) -> x509.Certificate:
    """
    Return ``certificate`` as it would be if ``issuer``, who signed it, had done that with SHA-1.

    cryptography does not make such certificates any more. But the two names of the algorithm differ in one byte only.
    """
    old, new = (bytes.fromhex("06092a864886f70d0101") + last for last in (b"\x0b", b"\x05"))
    signed = certificate.tbs_certificate_bytes.replace(old, new)
    signature = issuer.sign(signed, padding.PKCS1v15(), hashes.SHA1())
    der = certificate.public_bytes(serialization.Encoding.DER)
    der = der.replace(certificate.tbs_certificate_bytes, signed).replace(old, new)
    return x509.load_der_x509_certificate(der[: -len(signature)] + signature)


def self_signed(*, names: Sequence[str] = (), ips: Sequence[str] = ()) -> Issued:
    """Return a certificate that nobody vouches for but itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _with_names(_builder("self", _name("self"), key, NOW - DAY, NOW + DAY), names, ips)
    return Issued(builder.sign(key, SHA256), key)


class _Fixed(ContextFactory):
    def __init__(self, context: SSL.Context) -> None:
        self._context = context

    def getContext(self) -> SSL.Context:
        return self._context


def _as_x509(certificate: x509.Certificate):  # type: ignore[no-untyped-def]  # OpenSSL.crypto.X509, being deprecated
    from OpenSSL.crypto import X509

    return X509.from_cryptography(certificate)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(common_name: str | x509.Name) -> x509.Name:
    if isinstance(common_name, x509.Name):
        return common_name
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    common_name: str | x509.Name,
    issuer: x509.Name,
    key: CertificateIssuerPrivateKeyTypes,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _with_names(builder: x509.CertificateBuilder, names: Sequence[str], ips: Sequence[str]) -> x509.CertificateBuilder:
    general = [*(x509.DNSName(name) for name in names), *(x509.IPAddress(ip_address(ip)) for ip in ips)]
    return builder.add_extension(x509.SubjectAlternativeName(general), critical=False) if general else builder
