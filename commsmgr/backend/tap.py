"""
``twistd commsmgr-backend``: the reference backend as a program.

For development: see :class:`~commsmgr.backend.service.ReferenceBackend` for what it does not do.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import SystemRandom
from typing import Any, ClassVar

from twisted.application.service import Service
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import ConfigError


class Options(UsageOptions):
    """The command line."""

    synopsis = "[options]"
    longdesc = (
        "A backend for development: heartbeats, inventories, commands and results over HTTP and WebSocket, with a "
        "console at / that can also make it misbehave. Not for production."
    )
    optParameters: ClassVar[list[list[Any]]] = [
        ["listen", "l", "127.0.0.1:8080", "host:port to listen on; an IPv6 address in brackets"],
        ["token-env", None, "", "environment variable with the bearer token that agents must show"],
        ["token-file", None, "", "file with the bearer token that agents must show"],
        ["path", "p", ":memory:", "SQLite file for what it received"],
        ["tls-certificate", None, "", "PEM file with the TLS certificate and its chain"],
        ["tls-key", None, "", "PEM file with the private key of the certificate"],
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["quirks", "q", "behave as the worse plain backends do"],
        ["plain", None, "speak only the plain dialect"],
    ]

    def postOptions(self) -> None:
        """
        Read the token and check what can be checked before anything starts.

        :raise UsageError: an option is wrong.
        """
        if self["token-env"] and self["token-file"]:
            raise UsageError("--token-env and --token-file exclude each other")
        token = ""
        if self["token-env"]:
            token = os.environ.get(self["token-env"], "").strip()
            if not token:
                raise UsageError(f"--token-env: the environment variable {self['token-env']} is not set")
        elif self["token-file"]:
            try:
                token = Path(self["token-file"]).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--token-file: {error}") from None
            if not token:
                raise UsageError("--token-file: the file is empty")
        self["token"] = token
        for name in ("tls-certificate", "tls-key"):
            if self[name] and not os.access(self[name], os.R_OK):
                raise UsageError(f"--{name}: cannot read {self[name]}")


def makeService(options: Options) -> Service:
    """
    Return the backend that ``options`` describe.

    :raise UsageError: an option is wrong.
    """
    from twisted.internet import reactor

    try:
        return ReferenceBackend(
            reactor,
            listen=options["listen"],
            token=options["token"],
            path=options["path"],
            certificate=options["tls-certificate"],
            key=options["tls-key"],
            dialects=("plain",) if options["plain"] else ("commsmgr.v1", "plain"),
            quirks=bool(options["quirks"]),
            wall=time.time,
            random=SystemRandom(),
        )
    except ConfigError as error:
        raise UsageError(str(error)) from None
