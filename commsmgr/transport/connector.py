"""
An endpoint that looks like a connector.

Reconnecting factories want an IConnector: something that connects, and tells its factory of the start, of a failure and
of a loss. An IStreamClientEndpoint knows names, proxies and TLS, but tells nobody of a loss. :class:`EndpointConnector`
joins the two.

Theory of operation
-------------------
The truth about the connection is what its protocol has seen, not the endpoint's Deferred: that one fires only after the
protocol was made, and may fail even then. So the connector stands between transport and protocol. Before a protocol was
made, a failure of the Deferred is a *failed* connection; afterwards the end of the transport is a *lost* one, and the
Deferred counts for nothing. Each ``connect`` therefore ends in exactly one call of the factory.
"""

# mypy: allow-untyped-calls
# Twisted and autobahn are typed in parts only.

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import NotConnectingError, UserError
from twisted.internet.interfaces import (
    IAddress,
    IConnector,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.internet.protocol import ClientFactory, Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer


class _State(Enum):
    DISCONNECTED = auto()
    CONNECTING = auto()
    STOPPING = auto()  # the attempt was cancelled, and has not said yet that it is over
    CONNECTED = auto()


@implementer(IConnector)
class EndpointConnector:
    """
    Connects ``factory`` by ``endpoint``.

    :param destination: what :meth:`getDestination` returns.
    """

    def __init__(self, endpoint: IStreamClientEndpoint, factory: ClientFactory, destination: IAddress) -> None:
        self._endpoint = endpoint
        self._factory = factory
        self._destination = destination
        self._state = _State.DISCONNECTED
        self._pending: Deferred[object] | None = None
        self._transport: ITransport | None = None

    def connect(self) -> None:
        """
        Begin to connect; the factory hears how it went.

        :raise RuntimeError: a connection is there or under way.
        """
        if self._state is not _State.DISCONNECTED:
            raise RuntimeError("connect() while a connection is there or under way")
        self._state = _State.CONNECTING
        self._factory.doStart()
        self._factory.startedConnecting(self)
        # The factory may have changed its mind within that call.
        if self._state is _State.CONNECTING:
            self._pending = maybeDeferred(self._endpoint.connect, _Between(self))
            self._pending.addErrback(self._failed)

    def stopConnecting(self) -> None:
        """
        Give up the attempt under way; the factory hears of a failed connection, at once with most endpoints.

        :raise NotConnectingError: there is none.
        """
        if self._state is not _State.CONNECTING:
            raise NotConnectingError("there is no connection attempt to stop")
        self._state = _State.STOPPING
        if self._pending is None:
            self._failed(Failure(UserError()))
        else:
            self._pending.cancel()

    def disconnect(self) -> None:
        """Give up the attempt, or close the connection once what was written is sent."""
        if self._state is _State.CONNECTING:
            self.stopConnecting()
        elif self._transport is not None:
            self._transport.loseConnection()

    def getDestination(self) -> IAddress:
        """Return where to."""
        return self._destination

    def build(self, addr: IAddress | None) -> Protocol | None:
        """Return a protocol for the transport that the endpoint made, or None when nobody wants it any more."""
        if self._state is not _State.CONNECTING:
            return None
        protocol = self._factory.buildProtocol(addr)
        if protocol is None:
            return None
        return _Tap(protocol, self._made, self._lost)

    def _made(self, transport: ITransport) -> None:
        self._state = _State.CONNECTED
        self._transport = transport

    def _lost(self, reason: Failure) -> None:
        self._transport = None
        self._over(lambda: self._factory.clientConnectionLost(self, reason))

    def _failed(self, reason: Failure) -> None:
        if self._state in (_State.CONNECTING, _State.STOPPING):
            self._over(lambda: self._factory.clientConnectionFailed(self, reason))
        elif self._transport is not None:
            # The endpoint changed its mind after the protocol was made; the loss will be heard from the transport.
            self._transport.loseConnection()

    def _over(self, tell: Callable[[], None]) -> None:
        self._state = _State.DISCONNECTED
        self._pending = None
        tell()
        # As it is with Twisted's own connectors: a factory that connects again within that call goes on.
        self._factory.doStop()


@implementer(IProtocolFactory)
class _Between(Factory):
    """What the endpoint connects in place of the connector's factory."""

    noisy = False

    def __init__(self, connector: EndpointConnector) -> None:
        self._connector = connector

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        return self._connector.build(addr)


class _Tap(Protocol):
    """Passes everything between a transport and a protocol, and tells the connector of the beginning and the end."""

    def __init__(
        self, protocol: IProtocol, made: Callable[[ITransport], None], lost: Callable[[Failure], None]
    ) -> None:
        self._protocol = protocol
        self._made = made
        self._lost = lost
        # Not a method of ours: this is the way of every byte.
        self.dataReceived = protocol.dataReceived  # type: ignore[method-assign]  # the same signature

    def makeConnection(self, transport: ITransport) -> None:
        super().makeConnection(transport)
        self._made(transport)
        self._protocol.makeConnection(transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        try:
            self._protocol.connectionLost(reason)
        finally:
            self._lost(reason)
