"""
The reference backend as a service: both dialects, HTTP, WebSocket, console and control API on one port.

For development and tests. What it does not do: more than one process, users and rights, limits on how many agents or
commands, durable storage off the reactor's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec
from msgspec import Struct
from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.web.resource import Resource

from commsmgr.backend.api import control_api
from commsmgr.backend.console import PATHS, add_console
from commsmgr.backend.entrance import EntranceFactory
from commsmgr.backend.events import BackendEvent, EventLog, Kind, Observer
from commsmgr.backend.faults import DESCRIPTIONS, Fault, Faults
from commsmgr.backend.gate import Gate, ServerTLS
from commsmgr.backend.http import AgentCall, AgentHTTP, BoundedSite
from commsmgr.backend.ledger import Ledger
from commsmgr.backend.switchboard import DIALECT_PLAIN, DIALECT_V1, Switchboard
from commsmgr.backend.websocket import AgentSocketFactory
from commsmgr.errors import ConfigError, NotRunning
from commsmgr.ids import IdSource
from commsmgr.instants import rfc3339
from commsmgr.messages import CommandData, Goaway, GoawayData, JSONObject, ResultBody, Settings, SettingsData
from commsmgr.urls import bracketed

_STOP_GRACE = 1.0
"""Seconds that open connections have for their goodbye when the backend stops."""


class _Running(Struct):
    """What exists only between start and stop."""

    port: IListeningPort
    entrances: EntranceFactory
    sockets: AgentSocketFactory
    ledger: Ledger
    switchboard: Switchboard


class ReferenceBackend(Service):
    """
    A backend for development.

    It can be stopped and started again; with a file as ``path`` it remembers commands, results and idempotency keys.

    :param reactor: TCP and time; nothing touches the global one.
    :param listen: ``host:port``, an IPv6 address in brackets, port 0 for any.
    :param token: bearer token (RFC 6750) that agents must show; empty: none.
    :param path: SQLite file, or ``:memory:``.
    :param certificate: PEM file with the TLS certificate (and its chain), and
    :param key: PEM file with its private key; both or neither.
    :param dialects: what is spoken: ``commsmgr.v1``, ``plain``, or both.
    :param websocket_path: where WebSockets are accepted.
    :param check_token_on_upgrade: whether a WebSocket needs the token; None: if ``commsmgr.v1`` was offered and is
        spoken (plain backends check none).
    :param quirks: behave as the worse plain backends do: closing an older WebSocket of a machine deregisters its newer
        one, command ids are made of milliseconds and collide, errors are HTML, a large frame comes first.
    :param max_body_bytes: largest HTTP body, after decompression too.
    :param max_message_bytes: largest WebSocket message.
    :param dedupe_window: seconds that ids of results and idempotency keys are remembered.
    :param wall: seconds since the epoch.
    :param random: for ids.
    :ivar faults: how it misbehaves.
    :ivar event_log: what happens.
    :raise ConfigError: a parameter is wrong.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        *,
        wall: Callable[[], float],
        random: Random,
        listen: str = "127.0.0.1:0",
        token: str = "",
        path: str = ":memory:",
        certificate: str = "",
        key: str = "",
        dialects: Sequence[str] = (DIALECT_V1, DIALECT_PLAIN),
        websocket_path: str = "/ws",
        check_token_on_upgrade: bool | None = None,
        quirks: bool = False,
        max_body_bytes: int = 64 << 20,
        max_message_bytes: int = 64 << 20,
        dedupe_window: float = 86400.0,
    ) -> None:
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"expected host:port, found {listen!r}", key="listen")
        if not dialects or not set(dialects) <= {DIALECT_V1, DIALECT_PLAIN}:
            raise ConfigError(f"expected {DIALECT_V1}, {DIALECT_PLAIN} or both", key="dialects")
        if bool(certificate) != bool(key):
            raise ConfigError("a certificate needs its key, and a key its certificate", key="certificate")
        self._reactor = reactor
        self.wall = wall
        self._ids = IdSource(wall, random)
        self._host = host.strip("[]") or "127.0.0.1"
        self._port = int(port)
        self._path = path
        self._tls = (certificate, key) if certificate else None
        self._websocket_path = websocket_path
        self.quirks = quirks
        self._max_body_bytes = max_body_bytes
        self._max_message_bytes = max_message_bytes
        self._dedupe_window = dedupe_window
        self._now: _Running | None = None
        self.dialects = tuple(dialects)
        self.event_log = EventLog(wall)
        self.faults = Faults(reactor)
        self._gate = Gate(
            self.faults,
            self.event_log,
            token=token,
            dialects=self.dialects,
            websocket_path=websocket_path,
            check_token_on_upgrade=check_token_on_upgrade,
        )
        self.faults.started = self._fault_started
        self.faults.ended = self._fault_ended

    # -- start and stop ---------------------------------------------------------------------------------------------

    def startService(self) -> Deferred[None]:
        """
        Begin to listen.

        :return: fires when the port is open and :attr:`url` can be asked for.
        :raise ValueError: the file at ``path`` belongs to something else.
        """
        super().startService()
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        ledger = Ledger(self._path, self.wall, self._dedupe_window)
        switchboard = Switchboard(
            ledger, self.event_log, new_id=self._new_id, timestamp=self._timestamp, quirks=self.quirks
        )
        sockets = AgentSocketFactory(
            self._reactor,
            switchboard,
            self.event_log,
            self.faults,
            dialects=self.dialects,
            quirks=self.quirks,
            max_message_bytes=self._max_message_bytes,
            dedupe_window=self._dedupe_window,
        )
        site = BoundedSite(self._reactor, self._root(switchboard), self._max_body_bytes)
        entrances = EntranceFactory(
            self._reactor,
            site,
            sockets,
            self.faults,
            is_control=lambda path: path in PATHS or path.startswith("/api/"),
            refuse_upgrade=self._gate.refuse_upgrade,
        )
        factory: Any = entrances
        try:
            if self._tls is not None:
                certificate, key = self._tls
                factory = TLSMemoryBIOFactory(ServerTLS(key, certificate), False, entrances, clock=self._reactor)
            endpoint = TCP6ServerEndpoint if ":" in self._host else TCP4ServerEndpoint
            port = await endpoint(self._reactor, self._port, interface=self._host).listen(factory)
        except BaseException:
            ledger.close()
            raise
        self._now = _Running(port, entrances, sockets, ledger, switchboard)
        self.log.info("reference backend (for development only) at {url}", url=self.url, event="backend.started")

    def stopService(self) -> Deferred[None]:
        """Close the port, say goodbye on every WebSocket (1001), cut what is left after a second, close the file."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        now, self._now = self._now, None
        self.faults.clear()
        if now is None:
            return
        await maybeDeferred(now.port.stopListening)
        for socket in list(now.sockets.open):
            socket.leave(1001, "the backend is stopping")
        for entrance in list(now.entrances.protocols):
            if entrance.kind != "websocket":
                entrance.abortConnection()
        gone = now.entrances.when_empty()
        cut = self._reactor.callLater(_STOP_GRACE, now.entrances.abort_all)
        await gone
        if cut.active():
            cut.cancel()
        now.switchboard.stop()
        now.ledger.close()

    def crash(self) -> None:
        """
        Cut every connection at once and forget what was not stored, as if the process had been killed.

        What was durable stays. It goes on listening: for a real outage stop and start the service.
        """
        self._running.entrances.abort_all()

    # -- where it is ------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL for agents."""
        return f"http{'s' if self._tls else ''}://{self._authority}"

    @property
    def websocket_url(self) -> str:
        """URL of the WebSocket."""
        return f"ws{'s' if self._tls else ''}://{self._authority}{self._websocket_path}"

    @property
    def console_url(self) -> str:
        """URL of the console."""
        return f"{self.url}/"

    @property
    def token(self) -> str:
        """The bearer token that agents must show; empty: none. It may be set while running."""
        return self._gate.token

    @token.setter
    def token(self, token: str) -> None:
        self._gate.token = token

    @property
    def durable(self) -> bool:
        """Whether what it received survives a restart."""
        return self._path != ":memory:"

    @property
    def ledger(self) -> Ledger:
        """What it was told so far."""
        return self._running.ledger

    @property
    def port(self) -> int:
        """The port that it listens on."""
        if self._now is None and self._port == 0:
            raise NotRunning("the backend has no port yet")
        if self._now is None:
            return self._port
        address: Any = self._now.port.getHost()
        return int(address.port)

    # -- commands and results ---------------------------------------------------------------------------------------

    def send_command(
        self,
        machine_id: str,
        type: str,
        command: str = "",
        args: Sequence[str] = (),
        timeout: float = 0,
        options: JSONObject | None = None,
        id: str | None = None,
    ) -> str:
        """
        Give a command to a machine.

        :param timeout: seconds; 0 for the agent's default.
        :param id: the command's id; None: a new one.
        :return: the command's id. For a commsmgr.v1 agent it is stored by now and will be sent until acknowledged.
        :raise MachineNotConnected: the machine never spoke, or speaks plain and is not connected.
        """
        data = CommandData(type=type, command=command, args=list(args), timeout=timeout, options=options or {})
        return self._running.switchboard.send_command(machine_id, data, id)

    def when_result(self, command_id: str) -> Deferred[ResultBody]:
        """
        Wait for the result of a command, or give it at once. Cancelling stops waiting.

        It fails with :exc:`~commsmgr.errors.NotRunning` when the backend stops first.
        """
        return self._running.switchboard.when_result(command_id)

    def result_of(self, command_id: str) -> ResultBody | None:
        """Return the first result of a command, or None."""
        return self._running.switchboard.result_of(command_id)

    def connected(self, machine_id: str) -> str:
        """Return the dialect that the machine's registered WebSocket speaks, empty when it has none."""
        conversation = self._running.switchboard.conversation(machine_id)
        return conversation.dialect if conversation is not None else ""

    def goaway(self, reconnect_after: float = 0.0, window: float = 0.0, machine_id: str | None = None) -> int:
        """Ask commsmgr.v1 agents, or one of them, to leave and return (seconds); return how many were asked."""
        message = Goaway(data=GoawayData(reconnect_after=reconnect_after, window=window))
        return self._running.sockets.push(message, machine_id, dialects=(DIALECT_V1,))

    def push_settings(
        self,
        heartbeat_interval: float | None = None,
        inventory_interval: float | None = None,
        machine_id: str | None = None,
    ) -> int:
        """Set intervals (seconds) of commsmgr.v1 agents, or of one of them; return how many were told."""
        data = SettingsData(heartbeat_interval=heartbeat_interval, inventory_interval=inventory_interval)
        return self._running.sockets.push(Settings(data=data), machine_id, dialects=(DIALECT_V1,))

    def push(self, message: Any, machine_id: str | None = None) -> int:
        """
        Send any message to every registered agent, or to one of them; return to how many.

        :param message: bytes as they are, or whatever can be JSON.
        """
        return self._running.sockets.push(message, machine_id)

    def close_websocket(self, machine_id: str, code: int = 1000) -> None:
        """Close the machine's WebSockets with ``code``."""
        for socket in list(self._running.sockets.open):
            if socket.machine_id == machine_id:
                socket.leave(code)

    # -- what happens -----------------------------------------------------------------------------------------------

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer`` with each event from now on; what is returned ends that."""
        return self.event_log.subscribe(observer)

    def when(
        self, kind: Kind, predicate: Callable[[BackendEvent], bool] = lambda event: True
    ) -> Deferred[BackendEvent]:
        """Wait for the next event of ``kind`` that ``predicate`` likes. Cancelling stops waiting."""
        return self.event_log.when(kind, predicate)

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> _Running:
        if self._now is None:
            raise NotRunning("the backend is not running")
        return self._now

    @property
    def _authority(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"{bracketed(host)}:{self.port}"

    def _root(self, switchboard: Switchboard) -> Resource:
        agents = AgentHTTP(
            self._reactor,
            switchboard,
            self.event_log,
            self.faults,
            authorised=self._gate.authorised,
            dialects=self.dialects,
            max_body_bytes=self._max_body_bytes,
            quirks=self.quirks,
        )
        root, commands = Resource(), Resource()
        root.putChild(b"heartbeat", AgentCall(agents, agents.heartbeat))
        root.putChild(b"inventory", AgentCall(agents, agents.inventory))
        root.putChild(b"commands", commands)
        commands.putChild(b"result", AgentCall(agents, agents.result))
        root.putChild(b"api", control_api(self))
        add_console(root)
        return root

    def _new_id(self) -> str:
        return f"cmd_{int(self.wall() * 1000)}" if self.quirks else self._ids()

    def _timestamp(self) -> str:
        return rfc3339(self.wall())

    def _fault_started(self, fault: Fault) -> None:
        settings = msgspec.to_builtins(fault)
        self.event_log.emit("fault", note=f"{fault.kind}: {DESCRIPTIONS[fault.kind]}", detail=settings)
        if self._now is not None:
            self._now.entrances.misbehave(fault)
            self._now.sockets.misbehave(fault)

    def _fault_ended(self, fault: Fault) -> None:
        self.event_log.emit("behaving", note=f"no longer: {fault.kind}")
        if self._now is not None:
            self._now.entrances.behave(fault)
