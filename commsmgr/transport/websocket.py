"""
The WebSocket client: connects, and connects again, until it is stopped.

It is a factory, both Twisted's ``ReconnectingClientFactory`` and autobahn's ``WebSocketClientFactory``. Of the former
it keeps the shape and overrides the substance: when to try again is the handler's decision, the clock is the one that
is passed in, there is one timer, and stopping closes what is open. Of the latter it uses the protocol, guarded
(:mod:`~commsmgr.transport.guarded`), with all of its timers off.

::

          +-------------------- start later ----------------+
          |            start                    ended       v
        IDLE --------------------> TRYING -----------------> WAITING
          ^ ^                       ^  | ^                    |  |
          | |                  ended|  | +----- due ----------+  |
          | |                       |  | stop                    |
          | | ended                 |  v                         |
          | +---------- STOPPING <--+--+                         |
          |             start| ^stop|                            |
          |                  v |    |                            |
          |               RESTARTING+                            |
          +------------------------------ stop ------------------+

At most one attempt (:mod:`~commsmgr.transport.attempt`) exists at any time; the next one begins when the last one's
transport is gone. Some plain backends forget a machine's newer connection when its older one closes.
"""

# mypy: allow-untyped-calls
# Twisted and autobahn are typed in parts only.

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from math import isfinite
from typing import Any, Final, Protocol

from autobahn.twisted.websocket import WebSocketClientFactory
from autobahn.websocket import USES_NVX
from autobahn.websocket.compress import (
    PerMessageDeflateOffer,
    PerMessageDeflateResponse,
    PerMessageDeflateResponseAccept,
)
from twisted.internet.address import HostnameAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IConnector, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import ReconnectingClientFactory
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import CommsError, ConfigError
from commsmgr.headers import mistake
from commsmgr.policy.rate import TokenBucket
from commsmgr.transport.attempt import Attempt
from commsmgr.transport.connection import CLOSE_WITHIN, Connection, WebSocketHandler
from commsmgr.transport.connector import EndpointConnector
from commsmgr.transport.guarded import GuardedProtocol
from commsmgr.transport.handshake import UpgradeRequest, check_headers
from commsmgr.urls import Target, bracketed

__all__ = ["Connection", "EndpointSource", "WebSocketClient", "WebSocketHandler", "native_acceleration_active"]

BURST: Final = 4.0
"""Seconds of ``websocket.max_message_rate`` that may come at once."""

DELAY_AFTER_FAULT: Final = 60.0
"""Seconds before the next attempt when the handler failed to say how many."""


class EndpointSource(Protocol):
    """Knows the way to a target; implemented by :class:`commsmgr.transport.dialer.Dialer`."""

    def endpoint(self, target: Target, *, timeout: float) -> IStreamClientEndpoint:
        """Return a new endpoint; ``timeout``, in seconds, covers name, proxy, TCP and TLS."""


class _State(Enum):
    IDLE = auto()
    WAITING = auto()  # for the next attempt
    TRYING = auto()  # from the beginning of an attempt to the end of its connection
    STOPPING = auto()  # the same, but it is the last one
    RESTARTING = auto()  # the same, but the next one follows at once


class _Input(Enum):
    START = auto()  # the owner wants a connection
    START_LATER = auto()  # the same, but not at once
    STOP = auto()  # the owner wants none
    DUE = auto()  # the wait is over, or was cut short
    ENDED = auto()  # the attempt is over


_NEXT: Final = {
    (_State.IDLE, _Input.START): _State.TRYING,
    (_State.IDLE, _Input.START_LATER): _State.WAITING,
    (_State.WAITING, _Input.STOP): _State.IDLE,
    (_State.WAITING, _Input.DUE): _State.TRYING,
    (_State.TRYING, _Input.STOP): _State.STOPPING,
    (_State.TRYING, _Input.ENDED): _State.WAITING,
    (_State.STOPPING, _Input.START): _State.RESTARTING,
    (_State.STOPPING, _Input.ENDED): _State.IDLE,
    (_State.RESTARTING, _Input.STOP): _State.STOPPING,
    (_State.RESTARTING, _Input.ENDED): _State.TRYING,
}


class WebSocketClient(ReconnectingClientFactory, WebSocketClientFactory):  # type: ignore[misc]  # autobahn has no types
    """
    Keeps one WebSocket open.

    :param reactor: the clock of every timer here, and nothing else; connections are made by the dialler's endpoints.
    :param target: with scheme ``ws`` or ``wss``.
    :param subprotocols: offered in this order; a backend may select one of them, or none (RFC 6455 section 1.9).
    :param headers: added to every upgrade request; what the handler gives for the single attempt takes precedence.
    :param entropy: returns that many random bytes.
    :param wall: seconds since the epoch, for dates in Retry-After.
    :raise ConfigError: ``headers`` cannot stand in a request.
    """

    noisy = False
    _log = Logger()

    # What may be set of autobahn's options; the others stand in the protocol.
    perMessageCompressionOffers: Any = ()
    perMessageCompressionAccept: Any = staticmethod(lambda _: None)

    def __init__(
        self,
        reactor: IReactorTime,
        target: Target,
        *,
        dialer: EndpointSource,
        handler: WebSocketHandler,
        settings: config.WebSocket,
        subprotocols: Sequence[str],
        user_agent: str = "commsmgr",
        headers: Mapping[str, str] | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        wall: Callable[[], float] = time.time,
    ) -> None:
        # Nothing of autobahn's __init__: it takes the URL apart once more, for a request that is written by us, and
        # seeds the process's generator anew, which is not for it or for us to do.
        self.protocols = tuple(subprotocols)
        limit = self.maxFramePayloadSize = self.maxMessagePayloadSize = settings.max_message_bytes
        if settings.compress:
            self.perMessageCompressionOffers = [PerMessageDeflateOffer()]
            self.perMessageCompressionAccept = lambda response: (
                PerMessageDeflateResponseAccept(response, max_message_size=limit)
                if isinstance(response, PerMessageDeflateResponse)
                else None
            )
        self._headers = dict(headers or {})
        if wrong := mistake(self._headers):
            raise ConfigError(wrong, key="http.headers")
        if not any(name.lower() == "user-agent" for name in self._headers):
            self._headers = {"User-Agent": user_agent} | self._headers
        self._clock = reactor
        self._target = target
        self._host = bracketed(target.host)
        self._dialer = dialer
        self._handler = handler
        self._settings = settings
        self._entropy = entropy
        self._wall = wall
        rate = settings.max_message_rate
        self._rate = TokenBucket(rate, BURST * rate, reactor.seconds)
        self._state = _State.IDLE
        self._attempt: Attempt | None = None
        self._stopped: list[Deferred[None]] = []

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    @property
    def attempts(self) -> int:
        """Attempts since the last connection that was stable, the present one included."""
        return int(self.retries)

    def start(self, *, after: float = 0.0) -> None:
        """
        Begin to connect, at once, or once the connection that is being closed is gone. Idempotent.

        :param after: seconds to wait before the first attempt, when nothing is being closed.
        """
        if after > 0 and self._turn(_Input.START_LATER):
            self.delay = after
            self.retry()
        elif self._turn(_Input.START) and self._state is _State.TRYING:
            self._begin()

    def stop(self, *, close_within: float = CLOSE_WITHIN) -> Deferred[None]:
        """
        Connect no more, and end what is there.

        An open connection gets a closing handshake of at most ``close_within`` seconds and is dropped then; anything
        else is dropped at once.

        :return: fires when the connection is gone, even if :meth:`start` was called meanwhile. Cancelling it changes
            nothing else.
        """
        self._turn(_Input.STOP)
        if self._state is _State.IDLE:
            self._cancel_wait()
            return succeed(None)
        assert self._attempt is not None
        stopped: Deferred[None] = Deferred()
        self._stopped.append(stopped)
        self._attempt.stop(close_within)
        return stopped

    def retry_now(self) -> None:
        """Begin the next attempt at once if one is being waited for."""
        if self._turn(_Input.DUE):
            self._cancel_wait()
            self._begin()

    # -----------------------------------------------------------------------------------------------------------------
    # ReconnectingClientFactory

    def startedConnecting(self, connector: IConnector) -> None:
        self.connector = connector

    def buildProtocol(self, addr: IAddress | None) -> GuardedProtocol | None:
        if self._attempt is None:
            return None
        protocol = GuardedProtocol(self._attempt, self._entropy, self._wall, self._rate)
        protocol.factory = self
        return protocol

    def clientConnectionFailed(self, connector: IConnector, reason: Failure) -> None:
        # Of a connector that was given up on nothing counts any more.
        if connector is self.connector and self._attempt is not None:
            self._attempt.ended(reason)

    clientConnectionLost = clientConnectionFailed

    def retry(self, connector: IConnector | None = None) -> None:
        """Begin the next attempt in ``self.delay`` seconds, if there is to be one and it is not scheduled yet."""
        if self._state is _State.WAITING and self._callID is None:
            self._callID = self._clock.callLater(self.delay, self.retry_now)

    def resetDelay(self) -> None:
        """Count attempts anew; nothing else."""
        self.retries = 0

    def stopTrying(self) -> None:
        """As :meth:`stop`."""
        self.stop()

    # -----------------------------------------------------------------------------------------------------------------

    def _turn(self, event: _Input) -> bool:
        following = _NEXT.get((self._state, event))
        if following is None:
            return False
        self._state = following
        return True

    def _begin(self) -> None:
        self.retries += 1
        self._attempt = Attempt(
            self._clock,
            self._handler,
            self._settings,
            request=self._request,
            connector=self._connector,
            stable=self.resetDelay,
            over=self._over,
        )
        self._attempt.begin()

    def _cancel_wait(self) -> None:
        if self._callID is not None and self._callID.active():
            self._callID.cancel()
        self._callID = None

    def _over(self, connection: Connection | None, error: CommsError) -> None:
        self._log.debug(
            "attempt {attempt} to {host} is over: {error}",
            event="websocket.over",
            attempt=self.attempts,
            host=self._host,
            error=str(error),
        )
        self.delay = self._ask_delay(connection, error)
        stopped, self._stopped = self._stopped, []
        self._turn(_Input.ENDED)
        if self._state is _State.WAITING:
            self.retry()
        elif self._state is _State.TRYING:
            self._begin()
        for waiting in stopped:
            waiting.callback(None)

    def _ask_delay(self, connection: Connection | None, error: CommsError) -> float:
        try:
            delay = float(self._handler.websocket_ended(connection, error))
            if not (isfinite(delay) and delay >= 0.0):
                raise ValueError(f"{delay} is no number of seconds to wait")
        except Exception:
            self._log.failure("websocket_ended failed", event="websocket.fault")
            return DELAY_AFTER_FAULT
        return delay

    def _request(self, headers: Mapping[str, str]) -> UpgradeRequest:
        own = check_headers(headers)
        named = {name.lower() for name in own}
        merged = {name: value for name, value in self._headers.items() if name.lower() not in named} | own
        return UpgradeRequest(self._target.host_and_port, self._target.path, merged, self.protocols)

    def _connector(self, timeout: float) -> IConnector:
        endpoint = self._dialer.endpoint(self._target, timeout=timeout)
        where = HostnameAddress(self._target.host.encode("utf-8"), self._target.port)
        return EndpointConnector(endpoint, self, where)


def native_acceleration_active() -> bool:
    """Whether autobahn masks and validates by native code, which it does for us with all but small messages."""
    return bool(USES_NVX)
