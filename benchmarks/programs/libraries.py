"""
``twistd -y``: an application that does nothing, but has imported the libraries that commsmgr is built upon.

Whoever writes such an agent from the bare libraries imports these, by the public modules that have what is needed: the
WebSocket, HTTP both ways, TLS and the check of the peer, messages, storage and metrics.
"""

import sqlite3

import hyperlink
import msgspec
import prometheus_client
import service_identity
import treq
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from cryptography import x509
from OpenSSL import SSL, crypto
from twisted.application.service import Application
from twisted.internet import endpoints, ssl, threads
from twisted.web import client, resource, server

application = Application("libraries")
