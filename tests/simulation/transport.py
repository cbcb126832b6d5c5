"""
Twisted's side of a simulated socket: transports, connectors and listening ports.

The buffers, producers and half closes are Twisted's own (:class:`~twisted.internet.abstract.FileDescriptor`), and so is
the way a connector goes (:class:`~twisted.internet.base.BaseConnector`). Here is only what a reactor with real
descriptors would do: call when something can be read or written, and close.
"""

# mypy: allow-untyped-calls, allow-any-generics
# Twisted is typed in parts only.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address
from twisted.internet.base import BaseConnector
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectError, ConnectionAborted
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IListeningPort,
    IProtocolFactory,
    ITCPTransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import ClientFactory, Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.simulation.network import Dial
from tests.simulation.wire import Socket

if TYPE_CHECKING:
    from tests.simulation.reactor import ProcessReactor


@implementer(ITCPTransport)
class Transport(FileDescriptor):
    """A connection, as a protocol has it."""

    reactor: Any
    protocol: Any = None

    def __init__(self, reactor: ProcessReactor) -> None:
        super().__init__(reactor)  # type: ignore[arg-type]  # it needs no descriptors: see the methods below
        self.owner = reactor
        self.socket: Socket | None = None
        self._reading = False
        self._writing = False
        self._aborting = False
        self._no_delay = False
        self._keep_alive = False

    def attach(self, socket: Socket, protocol: Any) -> None:
        """The connection is there; without a protocol it is closed again, and without a process it never is."""
        if not self.owner.alive:
            socket.out.reset()
            return
        self.socket = socket
        self.connected = 1
        self.reactor.transports[self] = None
        self.protocol = Protocol() if protocol is None else protocol
        socket.use(self)
        if protocol is None:
            self.loseConnection()
        else:
            self.startReading()
            protocol.makeConnection(self)

    # -- what a reactor does for a descriptor -----------------------------------------------------------------------

    def startReading(self) -> None:
        """Hear what comes."""
        if not self._reading and not self._aborting and self.socket is not None:
            self._reading = True
            if self.socket.pending:
                self.reactor.callLater(0, self.readable)

    def stopReading(self) -> None:
        """Leave what comes where it is."""
        self._reading = False

    def startWriting(self) -> None:
        """Write in the next turn."""
        if not self._writing and not self._aborting:
            self._writing = True
            self.reactor.callLater(0, self.writable)

    def stopWriting(self) -> None:
        """There is nothing to write."""
        self._writing = False

    def readable(self) -> None:
        """SocketUser."""
        if not self._reading or self.socket is None:
            return
        data = self.socket.read()
        if data:
            try:
                self.protocol.dataReceived(data)
            except Exception as error:
                self.connectionLost(Failure(error))
                raise
        if self._reading and self.socket is not None and self.socket.ended:
            self._reading = False
            self.readConnectionLost(Failure(CONNECTION_DONE))

    def writable(self) -> None:
        """SocketUser."""
        if not self._writing or self.socket is None:
            return
        why = self.doWrite()
        if why is not None:
            self.connectionLost(Failure(why))

    def broken(self) -> None:
        """SocketUser."""
        self.connectionLost(Failure(CONNECTION_LOST))

    def writeSomeData(self, data: bytes | memoryview) -> int | BaseException:
        """Give the kernel what it takes."""
        assert self.socket is not None
        return self.socket.out.accept(data)

    def _closeWriteConnection(self) -> None:
        assert self.socket is not None
        self.socket.out.end()
        protocol = IHalfCloseableProtocol(self.protocol, None)
        if protocol is not None and self.owner.alive:
            protocol.writeConnectionLost()

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer will send no more."""
        protocol = IHalfCloseableProtocol(self.protocol, None)
        if protocol is not None:
            protocol.readConnectionLost()
        else:
            self.connectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over."""
        if self.socket is None or not self.owner.alive:
            return
        socket, self.socket = self.socket, None
        self.reactor.transports.pop(self, None)
        super().connectionLost(reason)
        if reason.check(ConnectionAborted):
            socket.abort()
        else:
            socket.close()
        protocol, self.protocol = self.protocol, None
        if self.owner.alive:
            protocol.connectionLost(reason)

    # -- ITCPTransport ----------------------------------------------------------------------------------------------

    def abortConnection(self) -> None:
        """Reset the connection in the next turn, whatever waits to be written."""
        if self.socket is not None and not self._aborting:
            self._aborting = True
            self.stopReading()
            self.stopWriting()
            self.reactor.callLater(0, self.connectionLost, Failure(ConnectionAborted()))

    def getHost(self) -> IPv4Address:
        """Return our address."""
        return self._ends().address

    def getPeer(self) -> IPv4Address:
        """Return the peer's address."""
        return self._ends().peer.address

    def _ends(self) -> Socket:
        assert self.socket is not None, "not connected"
        return self.socket

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Remember it; there is no Nagle's algorithm here."""
        self._no_delay = bool(enabled)

    def getTcpNoDelay(self) -> bool:
        """Return what was set."""
        return self._no_delay

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """Remember it; hours pass before it would do anything."""
        self._keep_alive = bool(enabled)

    def getTcpKeepAlive(self) -> bool:
        """Return what was set."""
        return self._keep_alive

    # -- for its reactor --------------------------------------------------------------------------------------------

    def die(self, power: bool) -> None:
        """The process is dead; its protocol hears nothing, and what it still does has no effect."""
        self._reading = False
        if self.socket is not None:
            if power:
                self.socket.vanish()
            else:
                self.socket.abort()

    def __repr__(self) -> str:
        if self.socket is None:
            return "<Transport, not connected>"
        return f"<Transport to {self.socket.peer.host}:{self.socket.peer.address.port} of {self.protocol!r}>"


class ClientTransport(Transport):
    """The same for who opens the connection."""

    def __init__(self, reactor: ProcessReactor, connector: Connector) -> None:
        super().__init__(reactor)
        self._connector: Connector | None = connector
        self._dial: Dial | None = None

    def connect(self, address: str, port: int) -> None:
        """Begin."""
        if self._connector is not None:
            self._dial = self.reactor.network.dial(self.reactor.host, address, port, self)
            if not self.owner.alive:
                self._dial.cancel()

    def established(self, socket: Socket) -> None:
        """Dialling."""
        assert self._connector is not None
        self.attach(socket, self._connector.buildProtocol(socket.peer.address) if self.owner.alive else None)

    def failed(self, reason: ConnectError) -> None:
        """Dialling."""
        self.failIfNotConnected(reason)

    def failIfNotConnected(self, error: BaseException) -> None:
        """Give up, unless the connection is there already."""
        if self.connected or self.disconnected or self._connector is None:
            return
        connector, self._connector = self._connector, None
        self._cancel()
        connector.connectionFailed(Failure(error))

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over."""
        if self.socket is not None and self.owner.alive:
            super().connectionLost(reason)
            if self._connector is not None and self.owner.alive:
                self._connector.connectionLost(reason)

    def die(self, power: bool) -> None:
        """The process is dead."""
        self._cancel()
        super().die(power)

    def _cancel(self) -> None:
        self.reactor.connecting.pop(self, None)
        if self._dial is not None:
            self._dial.cancel()

    def attach(self, socket: Socket, protocol: Any) -> None:
        """The connection is there."""
        self.reactor.connecting.pop(self, None)
        super().attach(socket, protocol)


class Connector(BaseConnector):
    """Connects by name or address."""

    reactor: Any

    def __init__(self, host: str, port: int, factory: ClientFactory, timeout: float, reactor: ProcessReactor) -> None:
        super().__init__(factory, timeout, reactor)  # type: ignore[arg-type]  # all of one that it needs
        self._host = host
        self._port = port

    def _makeTransport(self) -> Any:
        transport = ClientTransport(self.reactor, self)
        self.reactor.connecting[transport] = None
        self.reactor.look_up(self._host, transport.connect, transport.failIfNotConnected, self._port)
        return transport

    def getDestination(self) -> IAddress:
        """Return where to."""
        return IPv4Address("TCP", self._host, self._port)


@implementer(IListeningPort)
class Port:
    """A port that a process listens on."""

    def __init__(self, reactor: ProcessReactor, interface: str, port: int, factory: IProtocolFactory) -> None:
        self.owner = reactor
        self.interface = interface
        self.port = port
        self.factory = factory
        self._reactor = reactor
        self._listening = False

    def startListening(self) -> None:
        """Listen."""
        network = self._reactor.network
        self.port = self.port or network.free_port(self._reactor.host)
        network.listen(self._reactor.host, self.interface, self.port, self)
        self._listening = True
        self._reactor.ports[self] = None
        if self._reactor.alive:
            self.factory.doStart()
        else:
            self.die()

    def stopListening(self) -> Deferred[None]:
        """Listen no more; fires when the factory has heard of it."""
        if not self._listening:
            return succeed(None)
        self.die()
        return deferLater(self._reactor, 0, self.factory.doStop)

    def getHost(self) -> IPv4Address:
        """Return where."""
        return IPv4Address("TCP", self.interface, self.port)

    def accept(self, socket: Socket) -> None:
        """Listener."""
        protocol = self.factory.buildProtocol(socket.peer.address)
        if protocol is None:
            socket.out.reset()
        else:
            Transport(self._reactor).attach(socket, protocol)

    def die(self) -> None:
        """The port is closed at once."""
        if self._listening:
            self._listening = False
            self._reactor.ports.pop(self, None)
            self._reactor.network.close(self._reactor.host, self.port)
