"""
``twistd libraries``: a service that does nothing, but has imported the libraries that ``twistd commsmgr`` imports.

Each by the public module that whoever writes such an agent from the bare libraries would take, and none that commsmgr
does not load at its start (``tests/test_start.py`` looks): what it loads later must not count in its favour.
"""

# ruff: noqa: F401

from __future__ import annotations

import sqlite3
from contextlib import suppress

import hyperlink
import msgspec
import prometheus_client
import service_identity
import treq
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from cryptography import x509
from OpenSSL import SSL, crypto
from twisted.application.service import MultiService, Service
from twisted.internet import endpoints, ssl, threads
from twisted.python.usage import Options as UsageOptions
from twisted.web import client

with suppress(ImportError):
    import psutil


class Options(UsageOptions):
    """No options."""


def makeService(options: Options) -> Service:
    """Return a service that does nothing."""
    return MultiService()
