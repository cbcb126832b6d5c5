"""
autobahn's WebSocket protocol without what nobody here uses: a log of its own, and options for each connection.

Both are there for everybody who uses autobahn, and are most of what a connection takes, in memory and to open.
"""

# mypy: allow-untyped-calls
# autobahn has no types.

from __future__ import annotations

from typing import Any, Final

from autobahn.twisted.websocket import WebSocketClientProtocol
from autobahn.websocket.protocol import WebSocketProtocol


class _Silence:
    """
    Takes the place of autobahn's loggers.

    What matters of their lines is said by us, with typed errors, and at level debug they hold the bearer token.
    """

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    trace = debug = info = warn = error = critical = failure = _nothing


class _NoDetails:
    """Takes the place of what autobahn gathers about each transport, for its log and for nobody here."""

    is_secure = False

    def marshal(self) -> None:
        pass


_NO_DETAILS: Final[Any] = _NoDetails()


class BareProtocol(WebSocketClientProtocol):
    """One WebSocket connection, silent, and with all of autobahn's timers off."""

    # autobahn copies its options from the factory into each connection. Here most are the same for all, and stand once.
    CONFIG_ATTRS = [  # noqa: RUF012  # the type is autobahn's
        "maxFramePayloadSize",
        "maxMessagePayloadSize",
        "perMessageCompressionAccept",
        "perMessageCompressionOffers",
    ]
    version = WebSocketProtocol.DEFAULT_SPEC_VERSION
    logOctets = logFrames = trackTimings = False
    utf8validateIncoming = applyMask = maskClientFrames = True
    acceptMaskedServerFrames = False
    failByDrop = False
    echoCloseCodeReason = True
    tcpNoDelay = True
    autoFragmentSize = 0
    openHandshakeTimeout = closeHandshakeTimeout = serverConnectionDropTimeout = 0
    autoPingInterval = autoPingTimeout = 0
    autoPingSize = 12
    autoPingRestartOnAnyTraffic = True

    log = _Silence()

    def _connectionMade(self) -> None:
        self._transport_details = _NO_DETAILS
        super()._connectionMade()
