"""
What the tests of the reference backend share: a backend on the loopback, HTTP calls, a WebSocket agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from treq.client import HTTPClient
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent

from commsmgr.backend import ReferenceBackend

V1 = "commsmgr.v1"


class Answer(msgspec.Struct):
    """An HTTP answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class FakeAgent(WebSocketClientProtocol):
    """A WebSocket agent that collects what it gets. It answers nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: Deferred[FakeAgent] = Deferred()
        self.closed: Deferred[tuple[int | None, str | None]] = Deferred()
        self.inbox: list[Any] = []
        self.raw: list[bytes] = []
        self._wanted: list[tuple[Callable[[Any], bool], Deferred[Any]]] = []
        self.refusal: tuple[str, dict[str, str]] | None = None

    def onOpen(self) -> None:
        self.opened.callback(self)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.raw.append(payload)
        try:
            message = msgspec.json.decode(payload)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            message = payload
        self.inbox.append(message)
        for wanted in list(self._wanted):
            if wanted[0](message):
                self._wanted.remove(wanted)
                self.inbox.remove(message)
                wanted[1].callback(message)
                break

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        if not self.opened.called:
            self.refusal = (getattr(self, "http_status_line", ""), getattr(self, "http_headers", {}))
            self.opened.callback(self)
        self.closed.callback((code, reason))

    def say(self, **message: Any) -> None:
        """Send a message."""
        self.sendMessage(msgspec.json.encode(message))

    def get(self, kind: str) -> Deferred[Any]:
        """Wait for the next message of type ``kind``, which may have come already."""
        for message in self.inbox:
            if isinstance(message, dict) and message.get("type") == kind:
                self.inbox.remove(message)
                waiting: Deferred[Any] = Deferred()
                waiting.callback(message)
                return waiting
        waiting = Deferred()
        self._wanted.append((lambda message: isinstance(message, dict) and message.get("type") == kind, waiting))
        return waiting

    def result(self, command_id: str, id: str = "", **fields: Any) -> None:
        """Send a result."""
        data = {"id": id or f"r-{command_id}", "command_id": command_id, "status": "success", **fields}
        self.say(type="command_result", id=data["id"], timestamp="", data=data)

    async def round_trip(self) -> None:
        """Return when the backend has handled everything sent so far."""
        self.say(type="ping", id="round-trip")
        await self.get("pong")


class BackendTestCase(TestCase):
    """A test with a backend; every agent and the backend are gone at the end."""

    timeout = 10

    def setUp(self) -> None:
        self.now = time.time()
        self.agents: list[FakeAgent] = []
        self.http = HTTPClient(Agent(reactor))

    async def start(self, on: Any = reactor, **settings: Any) -> ReferenceBackend:
        """Start a backend on the reactor ``on`` and remember it as ``self.backend``."""
        self.backend = ReferenceBackend(on, wall=lambda: self.now, random=Random(1), **settings)
        await self.backend.startService()
        self.addCleanup(self.backend.stopService)
        return self.backend

    async def connect(
        self, protocols: tuple[str, ...] = (V1,), token: str = "", tls: Any = None, path: str = ""
    ) -> FakeAgent:
        """Open a WebSocket; when it is refused the agent's ``refusal`` says how."""
        url = (self.backend.websocket_url.rpartition("/")[0] + path) if path else self.backend.websocket_url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        factory = WebSocketClientFactory(url, protocols=list(protocols), headers=headers, reactor=reactor)
        factory.protocol = FakeAgent
        factory.noisy = False
        factory.setProtocolOptions(
            openHandshakeTimeout=0, closeHandshakeTimeout=0, serverConnectionDropTimeout=0, failByDrop=False
        )
        endpoint: Any = TCP4ClientEndpoint(reactor, "127.0.0.1", self.backend.port)
        if tls is not None:
            endpoint = wrapClientTLS(tls, endpoint)
        agent = await endpoint.connect(factory)
        self.agents.append(agent)
        self.addCleanup(self._end, agent)
        return await agent.opened

    async def register(self, machine_id: str = "m-1", protocols: tuple[str, ...] = (V1,), **settings: Any) -> FakeAgent:
        """Open a WebSocket and register."""
        agent = await self.connect(protocols, **settings)
        agent.say(type="register", machine_id=machine_id, id="reg-1", timestamp="", data={})
        await agent.get("registration_ack")
        return agent

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        """POST ``body`` (bytes, or anything that can be JSON); underscores in header names stand for hyphens."""
        return await self.call("POST", path, body, **headers)

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Do an HTTP request."""
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.http.request(method, self.backend.url + path, data=data, headers=names, timeout=8)
        content = await response.content()
        found = {name.decode().lower(): values[0].decode() for name, values in response.headers.getAllRawHeaders()}
        return Answer(response.code, found, content)

    def pause(self, seconds: float) -> Deferred[None]:
        """Let time pass; only to show that something does not happen."""
        return deferLater(reactor, seconds, lambda: None)

    def _end(self, agent: FakeAgent) -> Deferred[Any] | None:
        if agent.closed.called or agent.transport is None:
            return None
        agent.transport.abortConnection()
        return agent.closed
