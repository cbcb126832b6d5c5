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

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

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
    RateExceeded,
    TLSFailed,
    TokenError,
)
from commsmgr.transport.connection import CLOSE_WITHIN, Connection, WebSocketHandler
from commsmgr.transport.guarded import FLOODED, GuardedProtocol
from commsmgr.transport.handshake import UpgradeRequest

LAST_WORDS: Final = 2.0
"""Seconds in which what a peer sent before it sent too much may still be acknowledged."""

DROP_WITHIN: Final = 5.0
"""Seconds after which an aborted transport or a cancelled endpoint counts as gone, though it does not say so."""


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
    Phase.CONNECTING: "connecting (name, TCP, TLS, and the proxy if there is one)",
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
        request: Callable[[Mapping[str, str]], UpgradeRequest],
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
        self._request: UpgradeRequest | None = None
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
        """End it now, with this error whatever else was about to end it, save that the peer sends too much."""
        if self.phase is not Phase.DROPPING and not isinstance(self._error, RateExceeded):
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

    def connected(self, protocol: GuardedProtocol) -> UpgradeRequest:
        """The transport is there; return the request to send."""
        assert self._request is not None
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
        try:
            # As _tell() does it, but that takes as long as the call itself, and nothing is told as often.
            self._handler.websocket_received(self._connection, payload, is_text)  # type: ignore[arg-type]  # it is open
        except Exception as error:
            self._failed("websocket_received", error)

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

    def flooded(self, error: CommsError) -> None:
        """
        The peer sends too much: say so, but not before what came in time could be answered.

        A backend sends again whatever was not acknowledged. If nothing ever were, because all of it came at once and
        was not on disk yet, each connection would end like the one before.
        """
        if self.phase is Phase.OPEN:
            self._error = self._error or error
            self._arm(LAST_WORDS)

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
            else:
                assert self._connector is not None
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
            self._timer.reset(delay)
        else:
            self._timer = self._clock.callLater(delay, self._expired)

    def _time_left(self) -> float:
        assert self._timer is not None
        return max(self._timer.getTime() - self._clock.seconds(), 0.0)

    def _expired(self) -> None:
        match self.phase:
            case Phase.OPEN if self._error is not None:
                code, reason = FLOODED
                self.close(self._error, code=code, reason=reason)
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
            self._failed(getattr(tell, "__name__", "a callback"), error)

    def _failed(self, name: str, error: Exception) -> None:
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
