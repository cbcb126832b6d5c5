"""
An agent's WebSocket on the server's side: autobahn does the frames, a conversation does the rest.

None of autobahn's timers is used (they run on the global reactor): the one wait there is, for the answer to a close
frame, is on the reactor that was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.types import ConnectionRequest
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from commsmgr.backend.events import EventLog
from commsmgr.backend.faults import Fault, Faults, malformed
from commsmgr.backend.plain import PlainConversation
from commsmgr.backend.switchboard import DIALECT_PLAIN, DIALECT_V1, Switchboard
from commsmgr.backend.v1 import V1Conversation

CLOSE_TIMEOUT = 3.0
"""Seconds that the agent has to answer a close frame before the connection is cut."""


if TYPE_CHECKING:
    from commsmgr.backend.entrance import Entrance


class AgentSocket(WebSocketServerProtocol):
    """One agent's WebSocket."""

    # Not "log": autobahn would write every frame and header there at debug level, the bearer token included.
    _log = Logger()
    factory: AgentSocketFactory
    transport: Entrance  # type: ignore[assignment]  # nothing else ever carries it

    def __init__(self) -> None:
        super().__init__()
        self.conversation: PlainConversation | V1Conversation | None = None
        self._late: deque[tuple[float, bytes]] = deque()
        self._release: IDelayedCall | None = None
        self._close_timer: IDelayedCall | None = None

    # -- called by autobahn -----------------------------------------------------------------------------------------

    def onConnect(self, request: ConnectionRequest) -> str | None:
        offered = DIALECT_V1 in request.protocols and DIALECT_V1 in self.factory.dialects
        return DIALECT_V1 if offered else None

    def onOpen(self) -> None:
        factory = self.factory
        factory.open[self] = None
        if self.websocket_protocol_in_use == DIALECT_V1:
            self.conversation = V1Conversation(
                factory.switchboard,
                factory.events,
                factory.faults,
                factory.reactor,
                dedupe_window=factory.dedupe_window,
                max_bytes=factory.max_message_bytes,
                send=self.say,
                close=self.leave,
                abort=self.cut,
            )
        else:
            self.conversation = PlainConversation(
                factory.switchboard, factory.events, factory.faults, send=self.say, abort=self.cut
            )
        if factory.quirks:
            self.say(b'{"type":"welcome","data":{"banner":"' + b"w" * 200_000 + b'"}}')

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        conversation = self.conversation
        if conversation is None:
            return
        self.transport.messages += 1
        faults = self.factory.faults
        if faults.strike("drop", "websocket", self.transport.messages):
            self.cut()
            return
        if fault := faults.strike("close", "websocket", self.transport.messages):
            self.leave(fault.code, "the backend was told to close")
            return
        registered = bool(conversation.machine_id)
        try:
            conversation.received(payload, not isBinary)
        except Exception:
            # An exception that escapes from here ends in autobahn's dataReceived, half way through a buffer.
            self._log.failure("a WebSocket message was not handled", event="backend.message-failed")
            self.leave(1011, "internal error")
        if conversation.machine_id and not registered and (fault := faults.strike("malformed", "websocket")):
            self.malform(fault)

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        self.factory.open.pop(self, None)
        for timer in (self._release, self._close_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._converse_no_more(f"closed with {code}" if wasClean else "lost")

    # -- called by the rest of the backend --------------------------------------------------------------------------

    @property
    def machine_id(self) -> str:
        """Who is at the other end; empty before the registration."""
        return self.conversation.machine_id if self.conversation is not None else ""

    def say(self, payload: bytes) -> None:
        """Send a text message, late when the backend is slow. Nothing happens when the WebSocket is not open."""
        fault = self.factory.faults.strike("slow", "websocket")
        if fault is None and not self._late:
            self._say_now(payload)
            return
        now = self.factory.reactor.seconds()
        due = now + (fault.delay if fault is not None else 0)
        self._late.append((due, payload))
        if self._release is None:
            self._release = self.factory.reactor.callLater(due - now, self._send_late)

    def malform(self, fault: Fault) -> None:
        """Send what no agent expects."""
        payload, binary = malformed(fault.form)
        if self.state != self.STATE_OPEN:
            return
        if fault.form == "bits":
            self.sendFrame(opcode=1, payload=payload, rsv=7)
        else:
            self.sendMessage(payload, isBinary=binary)

    def leave(self, code: int, reason: str = "") -> None:
        """Close with a code, any at all; the connection is cut when the agent does not answer in time."""
        if self.state == self.STATE_OPEN:
            self.sendCloseFrame(code, reason.encode()[:123])
            self._close_timer = self.factory.reactor.callLater(CLOSE_TIMEOUT, self.cut)

    def cut(self) -> None:
        """Cut the connection without a word, and without a look at what has come already: the dead do not read on."""
        self._converse_no_more("lost")
        self.transport.abortConnection()

    def _converse_no_more(self, note: str) -> None:
        if self.conversation is not None:
            conversation, self.conversation = self.conversation, None
            conversation.ended(note)

    def _say_now(self, payload: bytes) -> None:
        if self.state == self.STATE_OPEN:
            self.sendMessage(payload)

    def _send_late(self) -> None:
        self._release = None
        now = self.factory.reactor.seconds()
        while self._late and self._late[0][0] <= now:
            self._say_now(self._late.popleft()[1])
        if self._late:
            self._release = self.factory.reactor.callLater(self._late[0][0] - now, self._send_late)


class AgentSocketFactory(WebSocketServerFactory):
    """
    Makes :class:`AgentSocket` and knows those that are open.

    :param max_message_bytes: larger messages are refused with close code 1009.
    :param dialects: which of the two dialects are spoken.
    """

    protocol = AgentSocket  # type: ignore[assignment]  # the base class is untyped here
    noisy = False

    def __init__(
        self,
        reactor: IReactorTime,
        switchboard: Switchboard,
        events: EventLog,
        faults: Faults,
        *,
        dialects: Sequence[str] = (DIALECT_V1, DIALECT_PLAIN),
        max_message_bytes: int,
        dedupe_window: float,
        quirks: bool = False,
    ) -> None:
        super().__init__(reactor=reactor, server="commsmgr-backend")
        self.setProtocolOptions(
            openHandshakeTimeout=0,
            closeHandshakeTimeout=0,
            autoPingInterval=0,
            autoPingTimeout=0,
            failByDrop=False,
            maxFramePayloadSize=max_message_bytes,
            maxMessagePayloadSize=max_message_bytes,
            tcpNoDelay=True,
        )
        self.reactor: IReactorTime
        self.switchboard = switchboard
        self.events = events
        self.faults = faults
        self.dialects = dialects
        self.max_message_bytes = max_message_bytes
        self.dedupe_window = dedupe_window
        self.quirks = quirks
        self.open: dict[AgentSocket, None] = {}  # in order, which a set has not

    def misbehave(self, fault: Fault) -> None:
        """Let a fault that begins act on what is open now."""
        if not fault.concerns("websocket"):
            return
        for socket in list(self.open):
            if fault.kind == "close" and fault.immediate:
                socket.leave(fault.code, "the backend was told to close")
            elif fault.kind == "malformed" and self.faults.strike("malformed", "websocket"):
                socket.malform(fault)

    def push(
        self, message: Any, machine_id: str | None = None, *, dialects: Sequence[str] = (DIALECT_V1, DIALECT_PLAIN)
    ) -> int:
        """Send ``message`` to the registered agents that speak one of ``dialects``, or to one; return to how many."""
        payload = message if isinstance(message, bytes) else msgspec.json.encode(message)
        sockets = [
            socket
            for socket in self.open
            if socket.conversation is not None
            and socket.machine_id
            and machine_id in (None, socket.machine_id)
            and socket.conversation.dialect in dialects
        ]
        for socket in sockets:
            socket.say(payload)
        return len(sockets)
