"""
The TLS context that every connection to a backend starts from: versions, ciphers, trusted issuers, own certificate.

An OpenSSL context that was used refuses to change, and the files behind it are renewed while the agent runs. So the
files, those of the system's issuers too, are looked at (stat, some microseconds) before each connection, and a changed
one makes a new context. Connections that are open keep the one they were made with. A new file
that cannot be used changes nothing: the old context goes on, with one line in the log, until the file changes again. A
certificate and its key are two files and cannot be replaced at one moment; half of a new pair is such a case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import Certificate, load_pem_x509_certificates
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags
from twisted.logger import Logger

from commsmgr.config import TLS
from commsmgr.errors import ConfigError
from commsmgr.transport.system_issuers import holds_anything, trust_stores

CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""
For TLS 1.2: forward secrecy and authenticated encryption only (RFC 9325 section 4.2). TLS 1.3 has nothing else.

The level is OpenSSL's own default, said here so that no build and no file of the system lowers it: keys of at least
2048 bits (RSA) or 224 (elliptic curves), and no signature by SHA-1.
"""

_VERSIONS: Final = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}
_OPTIONS: Final = SSL.OP_NO_COMPRESSION | SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION

_Stat = tuple[int, int, int, int]


class ContextSource:
    """
    Gives the current context.

    :param settings: which files to use. Nothing is read before :meth:`load` or :meth:`current`.
    """

    log = Logger()

    def __init__(self, settings: TLS) -> None:
        self._settings = settings
        self._stores = () if settings.ca_exclusive else trust_stores(os.environ)
        self._seen: tuple[_Stat | None, ...] | None = None
        self._context: SSL.Context | None = None

    def load(self) -> None:
        """
        Read the files now.

        :raise ConfigError: it names the file and what is wrong with it; what was loaded before stays in use.
        """
        seen = self._stat()
        self._context = _build(self._settings)
        self._seen = seen

    def current(self) -> SSL.Context:
        """
        Return the context, read anew when a file has changed.

        :raise ConfigError: the files cannot be used, and never could since the start.
        """
        if self._context is None:
            self.load()
        elif (seen := self._stat()) != self._seen:
            self._seen = seen
            try:
                self._context = _build(self._settings)
            except ConfigError as error:
                self.log.warn(
                    "changed TLS files cannot be used, the old ones stay in use: {error}",
                    event="tls.files.refused",
                    error=str(error),
                )
            else:
                self.log.info("changed TLS files are in use", event="tls.files.loaded")
        assert self._context is not None
        return self._context

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each thing that may be meant as it is, and is likely to be regretted."""
        settings = self._settings
        if len(settings.pins) == 1:
            yield "tls.pins: one pin and no backup: when that key is replaced, this agent is cut off"
        if not settings.ca_file and not any(map(holds_anything, self._stores)):
            yield (
                "tls.ca_file: empty, and no issuers of the system were found, so every certificate will be refused; "
                f"looked at {', '.join(self._stores)}; install the package ca-certificates, or set it"
            )

    def _stat(self) -> tuple[_Stat | None, ...]:
        settings = self._settings
        return tuple(
            _identity(path) for path in (settings.ca_file, settings.certificate, settings.key, *self._stores) if path
        )


def _identity(path: str) -> _Stat | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The time of change too: a chmod can be what makes a file readable, and a rename can keep the time of modification.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _refuse_all(*_: object) -> bool:
    # Each connection brings its own callback. One that was made without it must fail, not trust everybody.
    return False


def _build(settings: TLS) -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(_VERSIONS[settings.minimum_version])
    context.set_cipher_list(CIPHERS)
    context.set_options(_OPTIONS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # WebSocket upgrades are HTTP/1.1 too; without this a server may choose HTTP/2 (RFC 7301).
    context.set_alpn_protos([b"http/1.1"])
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _refuse_all)
    _trust(context, settings)
    if settings.certificate or settings.key:
        _identify(context, settings)
    return context


def _trust(context: SSL.Context, settings: TLS) -> None:
    if settings.ca_exclusive and not settings.ca_file:
        raise ConfigError("needs ca_file: without it nobody would be trusted", key="tls.ca_exclusive")
    store = context.get_cert_store()
    assert store is not None
    if not settings.ca_exclusive:
        context.set_default_verify_paths()
    if settings.ca_file:
        for certificate in _certificates(settings.ca_file, key="tls.ca_file"):
            store.add_cert(X509.from_cryptography(certificate))
    # An intermediate issuer, or a backend's self-signed certificate, may be what the operator chose to trust.
    store.set_flags(X509StoreFlags.PARTIAL_CHAIN)


def _identify(context: SSL.Context, settings: TLS) -> None:
    if not settings.certificate:
        raise ConfigError("key is set, but certificate is not", key="tls.certificate")
    if not settings.key:
        raise ConfigError("certificate is set, but key is not", key="tls.key")
    own, *chain = _certificates(settings.certificate, key="tls.certificate")
    pem = _read(settings.key, key="tls.key")
    try:
        private = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"{settings.key}: is encrypted; store the key without a passphrase", key="tls.key") from None
    except Exception:
        # What the parser says may quote the file. It is a key: say no more than that it is none.
        raise ConfigError(f"{settings.key}: not a private key in PEM form", key="tls.key") from None
    if private.public_key() != own.public_key():
        raise ConfigError(f"{settings.key}: the key does not belong to {settings.certificate}", key="tls.key")
    try:
        context.use_certificate(own)
        context.use_privatekey(private)  # type: ignore[arg-type]  # kinds that TLS cannot use raise here
        for certificate in chain:
            context.add_extra_chain_cert(certificate)
    except (SSL.Error, TypeError) as error:
        raise ConfigError(
            f"{settings.certificate}: OpenSSL refuses the certificate or its key: {error}", key="tls.certificate"
        ) from None


def _certificates(path: str, *, key: str) -> list[Certificate]:
    try:
        return load_pem_x509_certificates(_read(path, key=key))
    except ValueError as error:
        raise ConfigError(f"{path}: no certificate in PEM form could be read: {error}", key=key) from None


def _read(path: str, *, key: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", key=key) from None
