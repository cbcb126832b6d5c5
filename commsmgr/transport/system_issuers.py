"""
Where the system keeps the issuers that it trusts.

OpenSSL and pyOpenSSL look into these places and say nothing when they find none: then nobody is trusted, and every
certificate looks as if its issuer were unknown. And they never look again when a file has changed.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from typing import Final

# Where pyOpenSSL looks when the OpenSSL in use was not built for this system, as that of cryptography's wheels.
_WELL_KNOWN: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/certs",
)


def trust_stores(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the files and directories that may hold the system's issuers, whether they exist or not."""
    file, directories = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if file is None and directories is None:
        built_in = ssl.get_default_verify_paths()
        return tuple(dict.fromkeys((built_in.openssl_cafile, built_in.openssl_capath, *_WELL_KNOWN)))
    return tuple(path for path in (file, *(directories or "").split(os.pathsep)) if path)


def holds_anything(path: str) -> bool:
    """Say whether a file or directory can be read and is not empty."""
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                return any(entries)
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
