"""An endpoint that looks like a connector: each connect() ends in exactly one call of the factory."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import HostnameAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectBindError, ConnectionDone, NotConnectingError, UserError
from twisted.internet.interfaces import IConnector
from twisted.internet.protocol import ClientFactory, Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from commsmgr.transport.connector import EndpointConnector
from tests.websocket_kit import MemoryEndpoint


class RecordingFactory(ClientFactory):
    """Writes down what it is told."""

    noisy = False

    def __init__(self) -> None:
        self.events: list[str] = []
        self.protocols: list[Any] = []
        self.refuses = False
        self.on_started: Any = lambda connector: None
        self.on_over: Any = lambda connector: None

    def buildProtocol(self, addr: object) -> Any:
        if self.refuses:
            return None
        self.protocols.append(RecordingProtocol())
        return self.protocols[-1]

    def startedConnecting(self, connector: Any) -> None:
        self.events.append("started")
        self.on_started(connector)

    def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
        self.events.append(f"failed {reason.type.__name__}")
        self.on_over(connector)

    def clientConnectionLost(self, connector: Any, reason: Failure) -> None:
        self.events.append(f"lost {reason.type.__name__}")
        self.on_over(connector)


class RecordingProtocol(Protocol):
    """Collects its data; ``fault`` makes its end raise."""

    fault = False

    def __init__(self) -> None:
        self.data = b""
        self.lost: list[type] = []

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]  # never left out here
        self.lost.append(reason.type)
        if self.fault:
            raise ZeroDivisionError


class ConnectorTests(SynchronousTestCase):
    """EndpointConnector."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.endpoint = MemoryEndpoint(self.clock, 1.0, False)
        self.factory = RecordingFactory()
        self.where = HostnameAddress(b"backend.example", 80)
        self.connector = EndpointConnector(self.endpoint, self.factory, self.where)

    def test_interface(self) -> None:
        """It is what Twisted calls a connector."""
        verifyObject(IConnector, self.connector)
        self.assertIs(self.connector.getDestination(), self.where)

    def test_life(self) -> None:
        """A connection is started, made, used, and lost; and then there may be another one."""
        for _ in range(2):
            self.connector.connect()
            self.assertRaises(RuntimeError, self.connector.connect)
            transport = self.endpoint.succeed()
            self.assertRaises(NotConnectingError, self.connector.stopConnecting)
            protocol = self.factory.protocols[-1]
            self.assertIs(protocol.transport, transport)
            transport.protocol.dataReceived(b"x")
            self.assertEqual(protocol.data, b"x")
            self.assertEqual(self.factory.numPorts, 1)
            self.connector.disconnect()
            self.clock.advance(0)
            self.assertEqual(protocol.lost, [ConnectionDone])
            self.assertEqual(self.factory.numPorts, 0)
            self.endpoint = self.connector._endpoint = MemoryEndpoint(self.clock, 1.0, False)
        self.assertEqual(self.factory.events, ["started", "lost ConnectionDone"] * 2)
        self.connector.disconnect()
        self.assertRaises(NotConnectingError, self.connector.stopConnecting)

    def test_failed(self) -> None:
        """An endpoint that fails is a failed connection."""
        self.connector.connect()
        self.endpoint.fail(ConnectBindError())
        self.assertEqual(self.factory.events, ["started", "failed ConnectBindError"])
        self.assertEqual(self.factory.numPorts, 0)

    def test_raises(self) -> None:
        """So is one that raises."""
        self.patch(self.endpoint, "connect", lambda factory: 1 // 0)
        self.connector.connect()
        self.assertEqual(self.factory.events, ["started", "failed ZeroDivisionError"])

    def test_stop(self) -> None:
        """An attempt that is given up fails; the endpoint is cancelled, and too late a success finds nobody."""
        for stop in (self.connector.stopConnecting, self.connector.disconnect):
            self.factory.events = []
            self.connector.connect()
            stop()
            self.assertTrue(self.endpoint.cancelled)
            self.assertIsNone(self.endpoint.factory.buildProtocol(None))
            self.assertEqual(self.factory.events, ["started", "failed CancelledError"])

    def test_stop_at_start(self) -> None:
        """A factory that changes its mind in startedConnecting stops it before the endpoint is asked."""
        self.factory.on_started = lambda connector: connector.stopConnecting()
        self.connector.connect()
        self.assertEqual(self.factory.events, ["started", f"failed {UserError.__name__}"])
        self.assertIsNone(self.endpoint.factory)

    def test_no_protocol(self) -> None:
        """A factory that builds nothing gets nothing."""
        self.factory.refuses = True
        self.connector.connect()
        self.assertIsNone(self.endpoint.factory.buildProtocol(None))

    def test_one_protocol(self) -> None:
        """An endpoint that connects twice, as two addresses of a name may, gets one protocol."""
        self.connector.connect()
        self.endpoint.succeed()
        self.assertIsNone(self.endpoint.factory.buildProtocol(None))

    def test_failure_after_success(self) -> None:
        """When the endpoint fails after the protocol was made, the connection is closed, and lost, once."""
        self.connector.connect()
        self.endpoint.connecting, outer = Deferred(), self.endpoint.connecting
        transport = self.endpoint.succeed()
        outer.errback(Failure(ConnectBindError()))
        self.clock.advance(0)
        self.assertTrue(transport.lost)
        self.assertEqual(self.factory.events, ["started", "lost ConnectionDone"])

    def test_late_failure(self) -> None:
        """When it fails after the connection was lost, that is nobody's concern."""
        self.connector.connect()
        self.endpoint.connecting, outer = Deferred(), self.endpoint.connecting
        self.endpoint.succeed().lose(ConnectionDone())
        outer.errback(Failure(ConnectBindError()))
        self.assertEqual(self.factory.events, ["started", "lost ConnectionDone"])

    def test_protocol_fault(self) -> None:
        """A protocol that raises at its end does not keep the factory from hearing of it."""
        self.patch(RecordingProtocol, "fault", True)
        self.connector.connect()
        self.assertRaises(ZeroDivisionError, self.endpoint.succeed().lose, ConnectionDone())
        self.assertEqual(self.factory.events, ["started", "lost ConnectionDone"])

    def test_again_within(self) -> None:
        """A factory may connect again within the call that says that the connection is over, as with Twisted's own."""

        def again(connector: Any) -> None:
            self.factory.on_over = lambda connector: None
            connector.connect()

        self.factory.on_over = again
        self.connector.connect()
        self.endpoint.fail(ConnectBindError())
        self.assertEqual(self.factory.events, ["started", "failed ConnectBindError", "started"])
        self.assertEqual(self.factory.numPorts, 1)
        self.endpoint.fail(ConnectBindError())
        self.assertEqual(self.factory.numPorts, 0)
