"""
One attempt at a WebSocket connection, from the request's headers to the end of the transport.

Theory of operation
-------------------
::

    PREPARING -> CONNECTING -> UPGRADING -> OPEN -> CLOSING -> DROPPING -> OVER
     headers      name, TCP,    the HTTP              close     aborted,
     asked for    TLS           answer                frames    not yet gone

An attempt only moves to the right, and may skip phases. What each may follow is in ``_FROM``: an event that the present
phase does not allow is late or a repetition, and is ignored. That is how the handler hears of the end exactly once,
however many causes there were, and of the first of them.

One timer serves all phases: what it means when it fires is the phase's affair (``_expired``). So no phase lasts for
ever, except OPEN, whose timer says that the connection has been stable. The connection is over when its transport says
so, not when we have had enough of it: whoever waits for that can be sure that two connections never overlap.
"""

# mypy: allow-untyped-calls
# Twisted and autobahn are typed in parts only.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Final, Protocol

from autobahn.websocket.types import ConnectingRequest
from OpenSSL import SSL
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IConnector, IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.config import WebSocket
from commsmgr.errors import (
    ClosedByPeer,
    CommsError,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    NotRunning,
    TLSFailed,
    TokenError,
)
from commsmgr.transport.guarded import MAX_CONTROL_BYTES, GuardedProtocol

CLOSE_WITHIN: Final = 2.0
"""Seconds that the closing handshake may take, unless somebody is in more of a hurry."""

DROP_WITHIN: Final = 5.0
"""Seconds after which an aborted transport or a cancelled endpoint counts as gone, though it does not say so."""


class WebSocketHandler(Protocol):
    """
    Owns the conversation; implemented by the link.

    Every call comes on the reactor's thread. An exception in any of them is logged, ends the connection, and goes no
    further.
    """

    def websocket_headers(self) -> Deferred[Mapping[str, str]]:
        """
        Return header fields for the next request, such as a fresh Authorization.

        A failure ends the attempt like a failed connection. Cancelled when the attempt ends first: its time counts
        towards ``connect_timeout``.
        """

    def websocket_connecting(self) -> None:
        """An attempt begins."""

    def websocket_opened(self, connection: Connection) -> None:
        """The upgrade succeeded: messages may be sent from now on."""

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        """A whole message came; text is valid UTF-8. Also after our own :meth:`Connection.close`, until the peer's."""

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        """A pong came, asked for or not."""

    def websocket_heard(self, connection: Connection) -> None:
        """Some bytes came. Called for each packet, before what is in it: keep it cheap."""

    def websocket_ended(self, connection: Connection | None, error: CommsError) -> float:
        """
        The attempt is over; called exactly once for each :meth:`websocket_connecting`.

        :param connection: None when it never was open.
        :param error: why; :class:`~commsmgr.errors.NotRunning` when it was stopped.
        :return: seconds to wait before the next attempt.
        """


class Connection:
    """
    An open WebSocket, as its owner holds it.

    :ivar subprotocol: the one that the backend selected, or None.
    :ivar opened_at: when, by the reactor's clock.
    :ivar tls: the TLS version, such as ``TLSv1.3``; empty without TLS.
    """

    def __init__(self, attempt: Attempt, protocol: GuardedProtocol, opened_at: float) -> None:
        self._attempt = attempt
        self._protocol = protocol
        self.subprotocol: str | None = protocol.websocket_protocol_in_use
        self.opened_at = opened_at
        self.tls = protocol.tls_version

    def send(self, payload: bytes) -> bool:
        """
        Send one text message.

        :param payload: valid UTF-8.
        :return: False, and nothing was sent, when the WebSocket is not open any more.
        """
        return self._protocol.send_texts((payload,))

    def send_many(self, payloads: Sequence[bytes]) -> bool:
        """Send one text message each, in one write; as :meth:`send`."""
        return self._protocol.send_texts(payloads)

    def ping(self, payload: bytes) -> bool:
        """
        Send a ping frame; as :meth:`send`.

        :raise ValueError: more than 125 bytes (RFC 6455 section 5.5).
        """
        if len(payload) > MAX_CONTROL_BYTES:
            raise ValueError(f"a ping bears at most {MAX_CONTROL_BYTES} bytes, not {len(payload)}")
        return self._protocol.send_ping(payload)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """
        Begin the closing handshake (RFC 6455 section 7.1.2); after :data:`CLOSE_WITHIN` the connection is dropped.

        Nothing happens when it is not open any more.

        :raise ValueError: a code that must not be sent (RFC 6455 section 7.4).
        """
        if not (1000 <= code <= 1013 and code not in (1004, 1005, 1006)) and not 3000 <= code <= 4999:
            raise ValueError(f"{code} is not a close code that may be sent")
        self._attempt.close(ConnectionEnded("closed by us", may_have_arrived=True), code=code, reason=reason)

    def kill(self, error: CommsError) -> None:
        """Drop the connection now, with whatever is in its buffers; the owner hears of its end with ``error``."""
        self._attempt.kill(error)


class Phase(Enum):
    """How far an attempt has come."""

    PREPARING = auto()
    CONNECTING = auto()
    UPGRADING = auto()
    OPEN = auto()
    CLOSING = auto()
    DROPPING = auto()
    OVER = auto()


_FROM: Final = {
    Phase.CONNECTING: (Phase.PREPARING,),
    Phase.UPGRADING: (Phase.CONNECTING,),
    Phase.OPEN: (Phase.UPGRADING,),
    Phase.CLOSING: (Phase.OPEN,),
    Phase.DROPPING: (Phase.CONNECTING, Phase.UPGRADING, Phase.OPEN, Phase.CLOSING),
    Phase.OVER: (Phase.PREPARING, Phase.CONNECTING, Phase.UPGRADING, Phase.OPEN, Phase.CLOSING, Phase.DROPPING),
}

_DOING: Final = {
    Phase.PREPARING: "waiting for the request's headers (the token)",
    Phase.CONNECTING: "connecting (name, TCP, TLS)",
    Phase.UPGRADING: "waiting for the answer to the WebSocket upgrade",
}


class Attempt:
    """
    One attempt.

    :param request: turns the handler's headers into the upgrade request.
    :param connector: makes a connector, given the seconds left; a CommsError that it raises ends the attempt.
    :param stable: called when the connection has been open for ``settings.stable_after``.
    :param over: called once, at the end.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        handler: WebSocketHandler,
        settings: WebSocket,
        *,
        request: Callable[[Mapping[str, str]], ConnectingRequest],
        connector: Callable[[float], IConnector],
        stable: Callable[[], None],
        over: Callable[[Connection | None, CommsError], None],
    ) -> None:
        self.phase = Phase.PREPARING
        self._clock = clock
        self._handler = handler
        self._settings = settings
        self._make_request = request
        self._make_connector = connector
        self._stable = stable
        self._tell_over = over
        self._timer: IDelayedCall | None = None
        self._error: CommsError | None = None
        self._pending: Deferred[Mapping[str, str]] | None = None
        self._request = ConnectingRequest()
        self._connector: IConnector | None = None
        self._protocol: GuardedProtocol | None = None
        self._connection: Connection | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    def begin(self) -> None:
        """Set out."""
        self._arm(self._settings.connect_timeout)
        self._tell(self._handler.websocket_connecting)
        # The handler may have changed its mind within that call.
        if self.phase is Phase.PREPARING:
            self._pending = maybeDeferred(self._handler.websocket_headers)
            self._pending.addCallbacks(self._prepared, self._unprepared)

    def stop(self, within: float) -> None:
        """End it: an open connection by a closing handshake of at most ``within`` seconds, anything else at once."""
        error = NotRunning("stopped")
        if self.phase in (Phase.OPEN, Phase.CLOSING):
            self.close(error, within=within)
        else:
            self.drop(error)

    def close(self, error: CommsError, *, code: int = 1000, reason: str = "", within: float = CLOSE_WITHIN) -> None:
        """Begin the closing handshake, or see that the one under way takes no more than ``within`` seconds from now."""
        if self._enter(Phase.CLOSING):
            self._error = error
            self._arm(within)
            self._live().send_close(code, reason)
        elif self.phase is Phase.CLOSING and within < self._time_left():
            self._arm(within)

    def kill(self, error: CommsError) -> None:
        """End it now, with this error whatever else was about to end it."""
        if self.phase is not Phase.DROPPING:
            self._error = error
        self._drop()

    # -----------------------------------------------------------------------------------------------------------------
    # What the handler's headers, the connector, and the protocol report

    def _prepared(self, headers: Mapping[str, str]) -> None:
        if self.phase is not Phase.PREPARING:
            return
        try:
            self._request = self._make_request(headers)
            self._connector = self._make_connector(self._time_left())
        except CommsError as error:
            self.drop(error)
        except Exception as error:
            self._log.failure("no way to connect could be made", event="websocket.fault")
            self.drop(ConnectFailed(f"no way to connect could be made: {type(error).__name__}"))
        else:
            self._enter(Phase.CONNECTING)
            self._connector.connect()

    def _unprepared(self, reason: Failure) -> None:
        if self.phase is not Phase.PREPARING:
            return
        error = reason.value
        if not isinstance(error, CommsError):
            self._log.failure("the headers of the upgrade request failed", failure=reason, event="websocket.fault")
            error = TokenError(f"the headers of the upgrade request could not be had: {type(error).__name__}")
        self.drop(error)

    def connected(self, protocol: GuardedProtocol) -> ConnectingRequest:
        """The transport is there; return the request to send."""
        if self._enter(Phase.UPGRADING):
            self._protocol = protocol
        else:
            protocol.drop()
        return self._request

    def opened(self) -> None:
        """The upgrade succeeded."""
        if self._enter(Phase.OPEN):
            self._arm(self._settings.stable_after)
            self._connection = Connection(self, self._live(), self._clock.seconds())
            self._tell(self._handler.websocket_opened, self._connection)

    def heard(self) -> None:
        """Bytes came."""
        if self._connection is not None:
            self._tell(self._handler.websocket_heard, self._connection)

    def received(self, payload: bytes, is_text: bool) -> None:
        """A message came."""
        self._tell(self._handler.websocket_received, self._connection, payload, is_text)

    def pong(self, payload: bytes) -> None:
        """A pong came."""
        self._tell(self._handler.websocket_pong, self._connection, payload)

    def peer_closed(self, code: int, reason: str) -> None:
        """The backend's close frame came, and autobahn answered it; now the backend has to end the connection."""
        if self._enter(Phase.CLOSING):
            because = f": {reason}" if reason else ""
            self._error = ClosedByPeer(f"closed by the backend with {code}{because}", code=code)
            self._arm(CLOSE_WITHIN)

    def violated(self, error: CommsError) -> None:
        """A close frame of ours is on its way, because of what the backend sent."""
        if self._enter(Phase.CLOSING):
            self._error = error
            self._arm(CLOSE_WITHIN)

    def drop(self, error: CommsError) -> None:
        """End it now, with this error unless another one came first."""
        self._error = self._error or error
        self._drop()

    def ended(self, reason: Failure) -> None:
        """The connector says that the connection failed, or was lost."""
        self._error = self._error or _typed(reason, self.phase)
        self._finish()

    # -----------------------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> bool:
        if self.phase not in _FROM[phase]:
            return False
        self.phase = phase
        return True

    def _live(self) -> GuardedProtocol:
        assert self._protocol is not None
        return self._protocol

    def _drop(self) -> None:
        if self.phase is Phase.PREPARING:
            self._finish()
        elif self._enter(Phase.DROPPING):
            self._arm(DROP_WITHIN)
            if self._protocol is not None:
                self._protocol.drop()
            elif self._connector is not None:
                self._connector.disconnect()

    def _finish(self) -> None:
        if self._enter(Phase.OVER):
            if self._timer is not None and self._timer.active():
                self._timer.cancel()
            if self._pending is not None:
                self._pending.cancel()
            assert self._error is not None
            self._tell_over(self._connection, self._error)

    def _arm(self, delay: float) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = self._clock.callLater(delay, self._expired)

    def _time_left(self) -> float:
        assert self._timer is not None
        return max(self._timer.getTime() - self._clock.seconds(), 0.0)

    def _expired(self) -> None:
        match self.phase:
            case Phase.OPEN:
                self._stable()
            case Phase.CLOSING:
                self._drop()
            case Phase.DROPPING:
                self._log.warn(
                    "the transport does not say that it is gone; it is left to itself", event="websocket.abandoned"
                )
                self._finish()
            case _:
                self.drop(
                    DeadlineExceeded(
                        f"no WebSocket within {self._settings.connect_timeout:g} s: still {_DOING[self.phase]}"
                    )
                )

    def _tell(self, tell: Callable[..., object], *args: object) -> None:
        try:
            tell(*args)
        except Exception as error:
            name = getattr(tell, "__name__", "a callback")
            self._log.failure("{name} failed; the connection is dropped", name=name, event="websocket.fault")
            self.kill(ConnectionEnded(f"{name} failed: {type(error).__name__}", may_have_arrived=True))


def _typed(reason: Failure, phase: Phase) -> CommsError:
    """Return the error for a connection that ended by itself; a dialler's own errors are typed already."""
    error = reason.value
    if isinstance(error, CommsError):
        return error
    text = f"{type(error).__name__}: {error}".strip(": ")
    if phase is Phase.OPEN:
        return ClosedByPeer(f"the connection ended without a close frame ({text})", code=1006)
    if isinstance(error, SSL.Error):
        return TLSFailed(f"TLS failed ({text})")
    if phase is Phase.UPGRADING:
        return ConnectFailed(f"the connection ended before the WebSocket upgrade was answered ({text})")
    return ConnectFailed(text)
