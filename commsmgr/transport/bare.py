"""
autobahn's WebSocket protocol without what nobody here uses: a log of its own, statistics, Deferreds that say how far it
is, what it knows of the transport, and options and a beginning for each connection that are the same for all.

All that is there for everybody who uses autobahn, and is most of what a connection takes, in memory and to open.
"""

# mypy: allow-untyped-calls
# autobahn has no types.

from __future__ import annotations

from collections import deque
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Final

from autobahn.twisted.websocket import WebSocketClientProtocol
from autobahn.websocket.protocol import TrafficStats, WebSocketProtocol
from autobahn.websocket.utf8validator import Utf8Validator


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


class _Nobody:
    """Takes the place of the Deferreds by which autobahn says that a connection is open, or closed."""

    def callback(self, result: object) -> None:
        """Nobody waits."""


_UNCHANGING: Final = (int, bytes, str, type(None))


class BareProtocol(WebSocketClientProtocol):
    """
    One WebSocket connection, silent, and with all of autobahn's timers off.

    A subclass writes the request, in ``startHandshake``. Autobahn's beginning of each connection is put into this class
    below; an attribute becomes the connection's own when it changes.
    """

    # autobahn copies its options from the factory into each connection, and writes down which. Here most are the same
    # for all and stand once, and connectionMade copies the others.
    CONFIG_ATTRS: list[str] = []  # noqa: RUF012  # the type is autobahn's
    version = websocket_version = WebSocketProtocol.DEFAULT_SPEC_VERSION
    logOctets = logFrames = trackTimings = False
    utf8validateIncoming = applyMask = maskClientFrames = True
    acceptMaskedServerFrames = False
    failByDrop = False
    echoCloseCodeReason = True
    # Only autobahn's connectionMade reads it. Nagle's algorithm is turned off in transport/layers, for all connections.
    tcpNoDelay = True
    autoFragmentSize = 0
    openHandshakeTimeout = closeHandshakeTimeout = serverConnectionDropTimeout = 0
    autoPingInterval = autoPingTimeout = 0
    autoPingSize = 12
    autoPingRestartOnAnyTraffic = True

    log = _Silence()
    _transport_details: Any = _NoDetails()
    is_open = is_closed = _Nobody()
    trafficStats = TrafficStats()
    # Until something is agreed, or comes.
    websocket_extensions_in_use: Any = ()
    inside_message = False
    current_frame: Any = None

    def __init__(self) -> None:
        """Nothing of autobahn's: what it would make stands above, or is made when it is needed."""

    @cached_property
    def utf8validator(self) -> Any:  # type: ignore[override]  # not before it is asked for
        """For text that comes in pieces or compressed."""
        return Utf8Validator()

    @cached_property
    def send_queue(self) -> deque[Any]:  # type: ignore[override]  # likewise
        """For frames that are written in pieces, as no frame of ours is."""
        return deque()

    def connectionMade(self) -> None:
        """Begin with the upgrade."""
        factory = self.factory
        self.maxFramePayloadSize = factory.maxFramePayloadSize
        self.maxMessagePayloadSize = factory.maxMessagePayloadSize
        self.perMessageCompressionOffers = factory.perMessageCompressionOffers
        self.perMessageCompressionAccept = factory.perMessageCompressionAccept
        self.startHandshake()

    def enter_open(self, subprotocol: str | None) -> None:
        """Do what autobahn does at the end of an upgrade without extensions."""
        self.websocket_protocol_in_use = subprotocol
        self.state = WebSocketProtocol.STATE_OPEN
        self.onOpen()
        if self.data:
            self.consumeData()


def _beginning() -> dict[str, object]:
    """Return what autobahn gives each connection at its beginning, as far as it may stand once for all of them."""
    connection: Any = BareProtocol()
    connection.factory = SimpleNamespace(isServer=False, proxy=None)
    WebSocketProtocol._connectionMade(connection)
    return {name: value for name, value in vars(connection).items() if isinstance(value, _UNCHANGING)}


for _name, _value in _beginning().items():
    setattr(BareProtocol, _name, _value)
