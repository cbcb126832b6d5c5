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
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from commsmgr import process
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
        ["token-env", None, None, "environment variable with the bearer token that agents must show"],
        ["token-file", None, None, "file with the bearer token that agents must show"],
        ["path", "p", ":memory:", "SQLite file for what it received"],
        ["tls-certificate", None, None, "PEM file with the TLS certificate and its chain"],
        ["tls-key", None, None, "PEM file with the private key of the certificate"],
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["quirks", "q", "behave as the worse plain backends do"],
        ["plain", None, "speak only the plain dialect"],
    ]

    def opt_version(self) -> None:
        """Show the version and exit."""
        from commsmgr._version import __version__

        print(f"commsmgr {__version__}")
        raise SystemExit(0)

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


class Program(Service):
    """Runs the backend, and ends the process with exit code 1 when that cannot start."""

    log = Logger()

    def __init__(self, backend: ReferenceBackend, reactor: Any) -> None:
        self.backend = backend
        self._reactor = reactor

    def startService(self) -> None:
        """Start the backend."""
        super().startService()
        process.stop_once(self._reactor)
        self.backend.startService().addErrback(self._failed)

    def stopService(self) -> Deferred[None]:
        """Stop the backend."""
        super().stopService()
        return self.backend.stopService()

    def _failed(self, failure: Failure) -> None:
        self.log.critical(
            "the backend could not start: {error}", event="backend.start-failed", error=failure.getErrorMessage()
        )
        process.fail(self._reactor)


def makeService(options: Options) -> Program:
    """
    Return the backend that ``options`` describe.

    :raise SystemExit: an option is wrong. What twistd makes of a UsageError from here is a traceback.
    """
    from twisted.internet import reactor

    try:
        backend = ReferenceBackend(
            reactor,
            listen=options["listen"],
            token=options["token"],
            path=options["path"],
            certificate=options["tls-certificate"] or "",
            key=options["tls-key"] or "",
            dialects=("plain",) if options["plain"] else ("commsmgr.v1", "plain"),
            quirks=bool(options["quirks"]),
            wall=time.time,
            random=SystemRandom(),
        )
    except ConfigError as error:
        raise SystemExit(f"twistd commsmgr-backend: {error.key}: {error.mistake}") from None
    return Program(backend, reactor)
