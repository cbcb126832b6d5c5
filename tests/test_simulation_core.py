"""The virtual clock, the network and the reactors of the simulation, with plain protocols and with whole managers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import twisted.internet
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IListeningPort,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
    ITCPTransport,
)
from twisted.internet.protocol import ClientFactory, Factory, Protocol, connectionDone
from twisted.internet.threads import deferToThreadPool
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from commsmgr import config
from commsmgr.backend.faults import Fault
from commsmgr.backend.service import ReferenceBackend
from commsmgr.manager import Manager
from commsmgr.messages import Command, JSONObject, Result, SystemHealth
from tests.certificates import Authority
from tests.simulation.clock import HotLoop, VirtualClock
from tests.simulation.network import Network
from tests.simulation.reactor import ProcessReactor
from tests.simulation.wire import GIVE_UP, WINDOW

LATENCY = 0.01
ROOT = str(Path(__file__).resolve().parent.parent)


class ClockTests(SynchronousTestCase):
    """Time alone."""

    def setUp(self) -> None:
        self.clock = VirtualClock()
        self.seen: list[Any] = []

    def test_order(self) -> None:
        """Calls come by moment, and within one moment in the order in which they were scheduled."""
        verifyObject(IReactorTime, self.clock)
        for moment, name in ((2, "c"), (1, "a"), (2, "d"), (1, "b")):
            self.clock.callLater(moment, self.seen.append, name)
        self.clock.run_until(1)
        self.assertEqual(["a", "b"], self.seen)
        self.clock.run_until(5)
        self.assertEqual((["a", "b", "c", "d"], 5), (self.seen, self.clock.seconds()))

    def test_moved(self) -> None:
        """A call can be put off, brought forward and cancelled, and stands in the list of calls once."""
        later = self.clock.callLater(1, lambda: self.seen.append(("later", self.clock.seconds())))
        sooner = self.clock.callLater(9, lambda: self.seen.append(("sooner", self.clock.seconds())))
        never = self.clock.callLater(3, self.seen.append, "never")
        later.reset(5)
        sooner.reset(2)
        never.cancel()
        self.assertEqual([sooner, later], self.clock.getDelayedCalls())
        self.clock.run_until(10)
        self.assertEqual([("sooner", 2), ("later", 5)], self.seen)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_many_cancelled(self) -> None:
        """Cancelled calls do not fill the memory, and the others come all the same."""
        for number in range(1000):
            self.clock.callLater(50, self.seen.append, "never").cancel()
            if number % 100 == 0:
                self.clock.callLater(number, self.seen.append, number)
        self.assertTrue(len(self.clock._heap) < 300)
        self.clock.run_until(1000)
        self.assertEqual(list(range(0, 1000, 100)), self.seen)

    def test_failures(self) -> None:
        """What escapes from a call is kept with its moment, and the run goes on."""
        self.clock.callLater(1, lambda: 1 // 0)
        self.clock.callLater(2, self.seen.append, "on")
        self.clock.run_until(3)
        failure = self.clock.failures.pop()
        self.assertEqual((1.0, "", ZeroDivisionError), (failure.moment, failure.owner, failure.type))
        self.assertEqual((["on"], []), (self.seen, self.clock.failures))

    def test_hot_loop(self) -> None:
        """A loop that never waits ends the run with an error."""

        def again() -> None:
            self.clock.callLater(0, again)

        again()
        self.assertRaises(HotLoop, self.clock.run_until, 1, steps=1000)
        self.assertEqual(0, self.clock.seconds())

    def test_run_while(self) -> None:
        """A run ends at the very call that ends its condition, or at its limit."""
        self.clock.callLater(3, self.seen.append, "three")
        self.clock.callLater(8, self.seen.append, "eight")
        self.assertTrue(self.clock.run_while(lambda: not self.seen, 5))
        self.assertEqual(3, self.clock.seconds())
        self.assertFalse(self.clock.run_while(lambda: len(self.seen) < 2, 4))
        self.assertEqual(7, self.clock.seconds())


class Recorder(Protocol):
    """Notes what comes, and answers if told so."""

    def __init__(self, answer: Callable[[bytes], bytes] | None = None) -> None:
        self.received = b""
        self.sizes: list[int] = []
        self.lost: Failure | None = None
        self.answer = answer

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self.sizes.append(len(data))
        if self.answer is not None:
            assert self.transport is not None
            self.transport.write(self.answer(data))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = reason


@implementer(IHalfCloseableProtocol)
class HalfCloseable(Recorder):
    """Goes on when one direction has ended."""

    ended = ""

    def readConnectionLost(self) -> None:
        self.ended += "read "

    def writeConnectionLost(self) -> None:
        self.ended += "write "


class Server(Factory):
    """Keeps the protocols that it made."""

    noisy = False

    def __init__(self, make: Callable[[], Protocol] = Recorder) -> None:
        self.make = make
        self.made: list[Any] = []

    def buildProtocol(self, addr: Any) -> Protocol:
        made = self.make()
        self.made.append(made)
        return made


class Client(ClientFactory):
    """The same for one connection, with the reason why there is none."""

    noisy = False

    def __init__(self, make: Callable[[], Protocol] = Recorder) -> None:
        self.make = make
        self.protocol: Any = None
        self.reason: Failure | None = None

    def buildProtocol(self, addr: Any) -> Protocol:
        self.protocol = made = self.make()
        return made

    def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
        self.reason = reason


class NetworkTestCase(SynchronousTestCase):
    """Two hosts, one of which listens on port 80."""

    def setUp(self) -> None:
        self.clock = VirtualClock()
        self.notes: list[str] = []
        self.network = Network(self.clock, Random("network"), lambda *note: self.notes.append(" ".join(map(str, note))))
        self.path = self.network.path("client", "server")
        self.path.latency, self.path.jitter = LATENCY, 0.0
        self.near = self.process("client")
        self.far = self.process("server")
        self.server = Server()
        self.port = self.far.listenTCP(80, self.server)
        self.addCleanup(lambda: self.assertEqual([], self.clock.failures))

    def process(self, host: str) -> ProcessReactor:
        return ProcessReactor(self.clock, self.network, host, Random(host))

    def run_for(self, seconds: float) -> None:
        self.clock.run_until(self.clock.seconds() + seconds)

    def dial(self, make: Callable[[], Protocol] = Recorder, timeout: float = 30, port: int = 80) -> Client:
        client = Client(make)
        self.near.connectTCP(self.far.address, port, client, timeout)
        return client

    def connect(self, make: Callable[[], Protocol] = Recorder) -> tuple[Any, Any]:
        """Return the protocols at both ends of a new connection."""
        client = self.dial(make)
        self.run_for(1)
        return client.protocol, self.server.made[-1]

    def connect_half_closeable(self) -> tuple[Any, Any]:
        """The same with protocols that go on when one direction has ended."""
        self.server.make = HalfCloseable
        return self.connect(HalfCloseable)


def payload(size: int) -> bytes:
    """Return bytes among which a mistake in the order would show."""
    return Random(size).randbytes(size)


class ConnectionTests(NetworkTestCase):
    """What a connection does when nothing is wrong."""

    def test_interfaces(self) -> None:
        """Reactor, transport and port provide what they say."""
        client, _ = self.connect()
        for interface, thing in (
            (IReactorTime, self.near),
            (IReactorTCP, self.near),
            (IReactorPluggableNameResolver, self.near),
            (ITCPTransport, client.transport),
            (IListeningPort, self.port),
        ):
            self.assertTrue(interface.providedBy(thing))
        peer = client.transport.getPeer()
        self.assertEqual((self.far.address, 80), (peer.host, peer.port))
        self.assertEqual(self.near.address, client.transport.getHost().host)

    def test_round_trip(self) -> None:
        """A question and its answer take the path's latency twice, after a handshake of the same."""
        self.server.make = lambda: Recorder(lambda data: data.upper())
        client = self.dial()
        self.assertTrue(self.clock.run_while(lambda: client.protocol is None, 1))
        self.assertAlmostEqual(2 * LATENCY, self.clock.seconds())
        client.protocol.transport.write(b"x")
        self.assertTrue(self.clock.run_while(lambda: not client.protocol.received, 1))
        self.assertEqual(b"X", client.protocol.received)
        self.assertAlmostEqual(4 * LATENCY, self.clock.seconds())

    def test_segments(self) -> None:
        """Many writes arrive whole and in order whatever the jitter, in other pieces than they were written in."""
        client, server = self.connect()
        self.path.jitter = 1.0
        sent = [payload(size) for size in range(1, 300)]
        for data in sent:
            client.transport.write(data)
            self.run_for(0.001)
        self.run_for(5)
        self.assertEqual(b"".join(sent), server.received)
        self.assertTrue(len(server.sizes) > len(sent))

    def test_close(self) -> None:
        """Closing sends what was written, however much; then both sides hear of a clean end."""
        client, server = self.connect()
        data = payload(1 << 20)
        client.transport.write(data)
        client.transport.loseConnection()
        self.assertTrue(client.transport.disconnecting)
        self.run_for(10)
        self.assertEqual(data, server.received)
        self.assertIsInstance(server.lost.value, error.ConnectionDone)
        self.assertIsInstance(client.lost.value, error.ConnectionDone)
        self.assertEqual([], self.near.leftovers())

    def test_half_close(self) -> None:
        """Who closes the writing half can go on reading."""
        client, server = self.connect_half_closeable()
        client.transport.write(b"question")
        client.transport.loseWriteConnection()
        self.run_for(1)
        self.assertEqual((b"question", "read "), (server.received, server.ended))
        server.transport.write(b"answer")
        server.transport.loseConnection()
        self.run_for(1)
        self.assertEqual((b"answer", "write read "), (client.received, client.ended))

    def test_abort(self) -> None:
        """An aborted connection sends nothing more and resets the peer's end."""
        client, server = self.connect()
        client.transport.write(b"too late")
        client.transport.abortConnection()
        self.run_for(1)
        self.assertIsInstance(client.lost.value, error.ConnectionAborted)
        self.assertEqual((b"", error.ConnectionLost), (server.received, server.lost.type))

    def test_unread(self) -> None:
        """Closing with bytes unread resets the connection, as kernels do: an answer on its way can be lost by that."""
        client, server = self.connect()
        server.transport.pauseProducing()
        client.transport.write(b"not read")
        self.run_for(1)
        server.transport.loseConnection()
        self.run_for(1)
        self.assertIsInstance(client.lost.value, error.ConnectionLost)

    def test_written_to_closed(self) -> None:
        """Bytes for an end that is closed are answered with a reset."""
        client, server = self.connect(HalfCloseable)
        server.transport.loseConnection()
        self.run_for(1)
        self.assertIsNone(client.lost)
        client.transport.write(b"hello?")
        self.run_for(1)
        self.assertIsInstance(client.lost.value, error.ConnectionLost)

    def test_pause(self) -> None:
        """A reader that pauses fills the window, then its writer's buffer; all goes on when it resumes."""
        client, server = self.connect()
        producer = Producer(client.transport)
        server.transport.pauseProducing()
        producer.resumeProducing()
        self.run_for(300)
        self.assertEqual((b"", True), (server.received, producer.paused))
        self.assertTrue(WINDOW < producer.written < 3 * WINDOW, producer.written)
        server.transport.resumeProducing()
        self.run_for(10)
        self.assertEqual((1 << 20, payload(1 << 20)), (producer.written, server.received))

    def test_producer_is_stopped(self) -> None:
        """A producer hears of the end of its connection."""
        client, server = self.connect()
        producer = Producer(client.transport)
        server.transport.abortConnection()
        self.run_for(1)
        self.assertTrue(producer.stopped)

    def test_bandwidth(self) -> None:
        """A narrow path delays bytes by their number, and all connections share it."""
        self.path.bandwidth = 10_000
        first, _ = self.connect()
        second, server = self.connect()
        began = self.clock.seconds()
        first.transport.write(payload(50_000))
        second.transport.write(payload(50_000))
        self.assertTrue(self.clock.run_while(lambda: len(server.received) < 50_000, 60))
        self.assertAlmostEqual(10, self.clock.seconds() - began, places=1)

    def test_failing_protocol(self) -> None:
        """An exception in dataReceived is kept, and ends the connection as it does on a real reactor."""

        def fail(data: bytes) -> bytes:
            raise ValueError("no")

        self.server.make = lambda: Recorder(fail)
        client, server = self.connect()
        client.transport.write(b"x")
        self.run_for(1)
        self.assertIsInstance(server.lost.value, ValueError)
        self.assertIsNotNone(client.lost)
        escaped = self.clock.failures.pop()
        self.assertEqual(("server", ValueError), (escaped.owner, escaped.type))


class Producer:
    """Writes a megabyte as far as it is allowed to."""

    def __init__(self, transport: Any) -> None:
        self.data = payload(1 << 20)
        self.written = 0
        self.paused = self.stopped = False
        self.transport = transport
        transport.registerProducer(self, True)

    def resumeProducing(self) -> None:
        self.paused = False
        while not self.paused and self.written < len(self.data):
            piece = self.data[self.written : self.written + 10_000]
            self.written += len(piece)
            self.transport.write(piece)

    def pauseProducing(self) -> None:
        self.paused = True

    def stopProducing(self) -> None:
        self.stopped = True


class FaultTests(NetworkTestCase):
    """What a connection does when something is wrong."""

    def test_refused(self) -> None:
        """Nobody listens, or the path refuses: a connection is refused after a round trip; healed, it is made."""
        self.path.refuse()
        refused, nobody = self.dial(), self.dial(port=81)
        self.run_for(3 * LATENCY)
        self.assertEqual(error.ConnectionRefusedError, refused.reason and refused.reason.type)
        self.assertEqual(error.ConnectionRefusedError, nobody.reason and nobody.reason.type)
        self.path.heal()
        self.connect()

    def test_dead_host(self) -> None:
        """A host without power, or an address that is nobody's, answers nothing: the caller's timeout ends that."""
        self.far.kill(power=True)
        dead = self.dial(timeout=30)
        nobody = Client()
        self.near.connectTCP("192.0.2.1", 80, nobody, 30)
        self.run_for(29.9)
        self.assertEqual((None, None), (dead.reason, nobody.reason))
        self.run_for(0.2)
        self.assertEqual(error.TimeoutError, dead.reason and dead.reason.type)
        self.assertEqual(error.TimeoutError, nobody.reason and nobody.reason.type)
        self.assertEqual([], self.near.leftovers())

    def test_kernel_gives_up_connecting(self) -> None:
        """Without a timeout of the caller's, the kernel's own ends it."""
        self.path.blackhole()
        client = self.dial(timeout=1000)
        self.run_for(GIVE_UP + 1)
        self.assertEqual(error.TCPTimedOutError, client.reason and client.reason.type)

    def test_connecting_through_a_short_outage(self) -> None:
        """The handshake is tried again: a path that is back in time makes the connection late."""
        for toward in ("client", "server"):
            self.path.blackhole(toward=toward)
            client = self.dial()
            self.run_for(5)
            self.assertIsNone(client.protocol)
            self.path.heal()
            self.run_for(5)
            self.assertIsNotNone(client.protocol)

    def test_names(self) -> None:
        """Names resolve, or have no address, or are never answered for, or move."""
        reasons: list[Any] = []

        def connect(name: str) -> None:
            endpoint = HostnameEndpoint(self.near, name, 80)
            endpoint.connect(Server()).addCallbacks(lambda protocol: reasons.append("connected"), reasons.append)
            self.run_for(60)

        connect("server")
        self.assertEqual("connected", reasons.pop())
        address = self.network.names.pop("server")
        connect("server")
        self.assertIsInstance(reasons.pop().value, error.DNSLookupError)
        self.network.names["server"] = self.network.address("client")
        connect("server")
        self.assertIsInstance(reasons.pop().value, error.ConnectionRefusedError)
        self.network.names["server"] = address
        self.network.hang_names.add("server")
        connect("server")
        self.assertEqual([], reasons)

    def test_cut(self) -> None:
        """A cut resets both ends at this moment, and what is in the air vanishes; new connections are possible."""
        client, server = self.connect()
        another = self.dial()
        self.assertTrue(self.clock.run_while(lambda: another.protocol is None, 1))
        client.transport.write(b"in the air")
        self.run_for(LATENCY / 2)
        self.path.cut()
        self.assertIsInstance(another.protocol.lost.value, error.ConnectionLost)
        self.assertEqual((error.ConnectionLost, error.ConnectionLost), (client.lost.type, server.lost.type))
        self.run_for(1)
        self.assertEqual((b"", 1), (server.received, len(self.server.made)))
        self.connect()

    def test_short_blackhole(self) -> None:
        """What a short outage swallows, in the air too, comes later, once and in order; both ends hear nothing."""
        client, server = self.connect()
        sent = b""
        for moment in range(20):
            if moment == 5:
                self.path.blackhole()
            if moment == 15:
                self.path.heal()
            data = payload(100 + moment)
            sent += data
            client.transport.write(data)
            self.run_for(LATENCY / 2)
        self.assertTrue(len(server.received) < 1000)
        self.run_for(60)
        self.assertEqual(sent, server.received)
        self.assertEqual((None, None), (client.lost, server.lost))

    def test_sent_again_behind_what_is_in_the_air(self) -> None:
        """What is sent again comes before what was sent later and is still in the air."""
        client, server = self.connect()
        self.path.latency = 1.0
        client.transport.write(b"first ")
        self.run_for(0.9)
        self.path.blackhole()
        client.transport.write(b"second")
        self.run_for(0.2)
        self.path.heal()
        self.run_for(60)
        self.assertEqual(b"first second", server.received)

    def test_long_blackhole(self) -> None:
        """Who sends into a hole is told after two minutes; who only listens is not told at all."""
        client, server = self.connect()
        self.path.blackhole()
        client.transport.write(b"x")
        self.run_for(GIVE_UP - 1)
        self.assertIsNone(client.lost)
        self.run_for(2)
        self.assertIsInstance(client.lost.value, error.ConnectionLost)
        self.run_for(3600)
        self.assertIsNone(server.lost)
        self.path.heal()
        server.transport.write(b"hello?")
        self.run_for(1)
        self.assertIsInstance(server.lost.value, error.ConnectionLost)

    def test_one_way_forth(self) -> None:
        """Only what goes one way is swallowed: the other direction goes on."""
        client, server = self.connect()
        self.path.blackhole(toward="server")
        client.transport.write(b"swallowed")
        server.transport.write(b"passes")
        self.run_for(10)
        self.assertEqual((b"passes", b""), (client.received, server.received))

    def test_one_way_back(self) -> None:
        """Bytes that arrive without their acknowledgement coming back end the sender's connection all the same."""
        client, server = self.connect()
        self.path.blackhole(toward="client")
        client.transport.write(b"passes")
        self.run_for(10)
        self.assertEqual((b"passes", None), (server.received, client.lost))
        client.transport.write(b" too")
        self.run_for(GIVE_UP)
        self.assertEqual((b"passes too", error.ConnectionLost), (server.received, client.lost.type))

    def test_one_way_back_and_healed(self) -> None:
        """When the way back is there again, the connection is as good as ever."""
        client, server = self.connect()
        self.path.blackhole(toward="client")
        client.transport.write(payload(3 * WINDOW))
        self.run_for(60)
        self.assertEqual(WINDOW, len(server.received))
        self.path.heal()
        self.run_for(GIVE_UP + 60)
        self.assertEqual((payload(3 * WINDOW), None), (server.received, client.lost))

    def test_acknowledgement_stands_for_those_before(self) -> None:
        """One acknowledgement that comes back makes up for those that were swallowed."""
        client, server = self.connect()
        self.path.blackhole(toward="client")
        for _ in range(3):
            client.transport.write(payload(1000))
            self.run_for(0.1)
            self.path.heal()
        self.assertEqual((3000, WINDOW), (len(server.received), client.transport.socket.out.room))
        self.assertEqual([], self.clock.getDelayedCalls())


class ProcessTests(NetworkTestCase):
    """Life and death of a process."""

    def test_kill(self) -> None:
        """What was on the wire when its sender was killed arrives, and then a reset; what was only written does not."""
        client, server = self.connect()
        client.transport.write(b"on the wire")
        self.run_for(LATENCY / 2)
        client.transport.write(b"in the buffer")
        called: list[str] = []
        self.near.callLater(0.001, called.append, "before")
        self.near.kill()
        self.near.callLater(0.001, called.append, "after")
        self.run_for(LATENCY)
        self.assertEqual(b"on the wire", server.received)
        self.run_for(LATENCY)
        self.assertIsInstance(server.lost.value, error.ConnectionLost)
        self.assertEqual((b"on the wire", None, []), (server.received, client.lost, called))
        self.assertEqual([], self.near.leftovers())

    def test_killed_in_a_call(self) -> None:
        """The rest of a call in which the process was killed has no effect, and what it raises nobody hears."""

        def die(data: bytes) -> bytes:
            self.far.kill()
            self.far.listenTCP(81, Server())
            self.far.connectTCP(self.near.address, 80, Client())
            server.transport.write(b"x")
            server.transport.loseConnection()
            raise ValueError("nobody hears this")

        self.server.make = lambda: Recorder(die)
        client, server = self.connect()
        client.transport.write(b"x")
        self.run_for(10)
        self.assertEqual((b"", error.ConnectionLost), (client.received, client.lost.type))
        self.assertIsNone(server.lost)
        self.assertFalse([note for note in self.notes if note.startswith("connecting server")])
        nobody = self.dial(port=81)
        self.run_for(1)
        self.assertEqual(error.ConnectionRefusedError, nobody.reason and nobody.reason.type)

    def test_killed_in_an_outage(self) -> None:
        """The kernel forgets what it would have sent again for a process that is dead, and its reset may be lost."""
        client, server = self.connect()
        self.path.blackhole()
        client.transport.write(b"swallowed")
        self.run_for(LATENCY / 2)
        self.near.kill()
        self.run_for(1)
        self.path.heal()
        self.run_for(60)
        self.assertEqual((b"", None), (server.received, server.lost))
        server.transport.write(b"hello?")
        self.run_for(1)
        self.assertIsInstance(server.lost.value, error.ConnectionLost)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_reset_in_an_outage(self) -> None:
        """Who hears a reset sends nothing again."""
        client, _ = self.connect()
        self.path.blackhole(toward="server")
        client.transport.write(b"swallowed")
        self.run_for(1)
        self.far.kill()
        self.run_for(1)
        self.assertIsInstance(client.lost.value, error.ConnectionLost)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_killed_while_accepting(self) -> None:
        """A process that dies as it builds a protocol has no connection, and its peer hears of that."""

        def die() -> Protocol:
            self.far.kill()
            return Recorder()

        self.server.make = die
        client = self.dial()
        self.run_for(1)
        self.assertIsInstance(client.protocol.lost.value, error.ConnectionLost)

    def test_killed_while_reading(self) -> None:
        """The end that stands behind the bytes which killed the process is not told any more."""

        def die(data: bytes) -> bytes:
            self.far.kill()
            return b""

        client, server = self.connect_half_closeable()
        server.answer = die
        server.transport.pauseProducing()
        client.transport.write(b"x")
        client.transport.loseWriteConnection()
        self.run_for(1)
        server.transport.resumeProducing()
        self.run_for(1)
        self.assertEqual((b"x", ""), (server.received, server.ended))

    def test_killed_at_any_note(self) -> None:
        """Whoever hears the network's notes may kill a process right there: the dead hear nothing and hold nothing."""
        number = 1
        while self.killed_at_note(number):
            number += 1
        self.assertTrue(number > 20, number)

    def killed_at_note(self, number: int) -> bool:
        """Let a process that listens and connects die at a note, and look at it; return whether it came to that."""
        self.setUp()
        heard: list[str] = []
        heard_alive = -1

        class Talker(HalfCloseable):
            def __getattribute__(self, name: str) -> Any:
                if name in ("makeConnection", "dataReceived", "readConnectionLost", "connectionLost"):
                    heard.append(name)
                return super().__getattribute__(name)

        def note(*what: object) -> None:
            nonlocal heard_alive
            self.notes.append(" ".join(map(str, what)))
            if len(self.notes) == number:
                self.near.kill()
                heard_alive = len(heard)

        def echo() -> Protocol:
            return Recorder(lambda data: data)

        self.notes.clear()
        self.network.note = note
        self.server.make = echo
        own = Server(Talker)
        self.near.listenTCP(81, own)
        client = self.dial(Talker)
        self.far.connectTCP(self.near.address, 81, Client(echo))
        self.run_for(1)
        for talker in (client.protocol, *own.made):
            if talker is not None and talker.transport is not None:
                talker.transport.write(b"x")
                self.run_for(1)
                talker.transport.loseConnection()
        self.run_for(1)
        if heard_alive < 0:
            return False
        self.run_for(200)
        self.assertEqual((heard_alive, []), (len(heard), self.clock.getDelayedCalls()), self.notes)
        late = Client()
        self.far.connectTCP(self.near.address, 81, late)
        self.run_for(1)
        self.assertEqual(error.ConnectionRefusedError, late.reason and late.reason.type)
        return True

    def test_killed_server(self) -> None:
        """The port of a killed process is closed, and its successor on the same host can have it."""
        self.far.kill()
        refused = self.dial()
        self.run_for(1)
        self.assertEqual(error.ConnectionRefusedError, refused.reason and refused.reason.type)
        self.far = self.process("server")
        self.far.listenTCP(80, self.server)
        self.connect()

    def test_power_cut(self) -> None:
        """A host without power says nothing; when it is back it knows nothing of its old connections."""
        client, _ = self.connect()
        address = self.far.address
        self.far.kill(power=True)
        self.run_for(3600)
        self.assertIsNone(client.lost)
        client.transport.write(b"hello?")
        self.run_for(10)
        self.assertIsNone(client.lost)
        self.far = self.process("server")
        self.assertEqual(address, self.far.address)
        self.run_for(60)
        self.assertIsInstance(client.lost.value, error.ConnectionLost)

    def test_killed_while_connecting(self) -> None:
        """A process that dies while it connects leaves nothing, and the server's side hears of its end."""
        for moment in range(8):
            self.near = self.process("client")
            client = self.dial()
            self.run_for(moment * LATENCY / 2 + 0.001)
            self.near.kill()
            protocol = client.protocol
            self.run_for(200)
            self.assertIs(protocol, client.protocol)
            self.assertIsNone(client.reason)
        self.assertTrue(all(server.lost is not None for server in self.server.made))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_ports(self) -> None:
        """A port is had once; port 0 is any; one on the loopback interface is for the same host only."""
        self.assertRaises(error.CannotListenError, self.far.listenTCP, 80, Server())
        self.assertRaises(error.CannotListenError, self.far.listenTCP, 81, Server(), interface="192.0.2.1")
        port = self.far.listenTCP(0, Server(), interface="127.0.0.1").getHost().port
        local, remote = Client(), self.dial(port=port)
        self.far.connectTCP("127.0.0.1", port, local)
        self.run_for(1)
        self.assertIsNotNone(local.protocol)
        self.assertEqual(error.ConnectionRefusedError, remote.reason and remote.reason.type)
        stopped = self.port.stopListening()
        self.run_for(1)
        self.successResultOf(stopped)
        self.far.listenTCP(80, self.server)

    def test_connecting_given_up(self) -> None:
        """An attempt that is given up says so, and leaves nothing."""
        client = Client()
        self.near.connectTCP(self.far.address, 80, client).stopConnecting()
        self.run_for(1)
        self.assertEqual(error.UserError, client.reason and client.reason.type)
        self.assertEqual(([], []), (self.server.made, self.near.leftovers()))

    def test_threads(self) -> None:
        """A thread's work is done, and its result or failure comes a little later."""
        results: list[Any] = []
        pool: Any = self.near.getThreadPool()
        deferToThreadPool(self.near, pool, pow, 2, 10).addCallback(results.append)
        deferToThreadPool(self.near, pool, int, "x").addErrback(lambda failure: results.append(failure.type))
        self.assertEqual([], results)
        self.run_for(1)
        self.assertEqual({1024, ValueError}, set(results))

    def test_leftovers(self) -> None:
        """What a process leaves behind is told in sentences."""
        self.connect()
        self.far.callLater(7, self.connect)
        self.near.connectTCP("192.0.2.1", 80, Client(), timeout=5)
        self.near.getThreadPool().callInThread(int)
        left = "\n".join(self.near.leftovers())
        for said in ("a connection is being made", "a thread works: int", "failIfNotConnected", "a transport is open"):
            self.assertIn(said, left)
        left = "\n".join(self.far.leftovers())
        self.assertIn("a timer is due in 7 s: NetworkTestCase.connect", left)
        self.assertIn("port 80 is open: Server", left)


class Poison:
    """In place of the global reactor."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"the global reactor was asked for {name}")


class StillMachine:
    """A machine that is always the same."""

    def inventory(self) -> JSONObject:
        return {"system": {"hostname": "still"}}

    def health(self) -> SystemHealth:
        return SystemHealth(cpu_usage_percent=1.0, status="healthy")


class World:
    """
    A manager and a reference backend, each on a host of its own.

    :param seed: of all random numbers.
    :param tls: the backend's authority; its files go into ``directory``.
    :param compress: whether HTTP bodies and WebSocket messages are compressed.
    :param parameters: the backend's.
    """

    def __init__(
        self, seed: int, *, tls: Authority | None = None, directory: str = "", compress: bool = False, **parameters: Any
    ) -> None:
        self.seed = seed
        self.clock = VirtualClock()
        self.notes: list[str] = []
        self.network = Network(self.clock, self.random("network"), self.note)
        self.agent = ProcessReactor(self.clock, self.network, "agent", self.random("agent"))
        self.server = ProcessReactor(self.clock, self.network, "backend", self.random("backend"))
        trust = config.TLS()
        if tls is not None:
            paths = tls.issue(names=["backend"]).save(os.path.join(directory, "certificate"))
            parameters |= {"certificate": paths.cert_pem, "key": paths.key_pem}
            trust = config.TLS(ca_file=tls.save_pem(os.path.join(directory, "ca.pem")), ca_exclusive=True)
        self.backend = ReferenceBackend(
            self.server,
            wall=self.wall,
            random=self.random("backend's ids"),
            listen="0.0.0.0:8080",
            token="secret",
            **parameters,
        )
        self.runs: list[str] = []
        self.manager = Manager(
            config.Config(
                backends=(config.Backend(url=f"http{'s' if tls else ''}://backend:8080", insecure=not tls),),
                machine_id="machine",
                auth=config.Auth(token="secret"),
                tls=trust,
                http=config.HTTP(compress=compress),
                websocket=config.WebSocket(compress=compress),
                spool=config.Spool(durability="memory"),
            ),
            reactor=self.agent,
            handler=self.run,
            machine=StillMachine(),
            wall=self.wall,
            random=self.random("manager"),
        )

    def random(self, name: str) -> Random:
        return Random(f"{self.seed}/{name}")

    def wall(self) -> float:
        return 1_800_000_000.0 + self.clock.seconds()

    def note(self, kind: str, who: str, size: int) -> None:
        self.notes.append(f"{self.clock.seconds():.9f} {kind} {who} {size}")

    def run(self, command: Command) -> Result:
        self.runs.append(command.id)
        return command.success("ran")

    def start(self) -> None:
        self.wait_for(self.backend.startService())
        self.manager.startService()

    def stop(self) -> None:
        self.wait_for(self.manager.stopService())
        self.wait_for(self.backend.stopService())
        self.clock.run_until(self.clock.seconds() + 1)

    def wait_for(self, done: Deferred[Any]) -> None:
        outcome: list[Any] = []
        done.addBoth(outcome.append)
        assert self.clock.run_while(lambda: not outcome, 60), "it does not end"
        assert not isinstance(outcome[0], Failure), outcome[0].getTraceback()

    def command(self, within: float) -> None:
        """Give a command, and wait for its result."""
        command_id = self.backend.send_command("machine", "echo")
        assert self.clock.run_while(lambda: self.backend.result_of(command_id) is None, within), "there is no result"
        assert self.runs.count(command_id) == 1, self.runs

    def disconnected(self) -> bool:
        return not self.backend.connected("machine")


def story(seed: int) -> World:
    """Let an agent and a backend live through some of the network's faults; return their world."""
    world = World(seed)
    path = world.network.path("agent", "backend")
    path.jitter = 0.05
    world.start()
    assert world.clock.run_while(world.disconnected, 10), "never connected"
    for fault in (path.cut, path.blackhole, lambda: path.blackhole(toward="agent"), path.refuse, path.cut):
        world.command(10)
        fault()
        world.clock.run_until(world.clock.seconds() + 100)
        path.heal()
        assert world.clock.run_while(world.disconnected, 120), "not connected again"
        world.clock.run_until(world.clock.seconds() + 1)
    world.command(10)
    world.stop()
    return world


def child(seed: int) -> None:
    """Print the notes of a story in a process of its own, where the global reactor was poisoned from the start."""
    import twisted.internet.reactor as reactor  # what stands here in a process that imports only what it needs

    assert type(reactor).__name__ == "Poison"
    world = story(seed)
    print(*world.notes, world.clock.steps, *world.clock.failures, sep="\n")


class WorldTests(SynchronousTestCase):
    """Real managers, treq, autobahn, twisted.web and the reference backend, unmodified."""

    def setUp(self) -> None:
        poison: Any = Poison()
        modules = {"twisted.internet.reactor": sys.modules["twisted.internet.reactor"]}
        self.addCleanup(sys.modules.update, modules)
        sys.modules["twisted.internet.reactor"] = poison
        self.patch(twisted.internet, "reactor", poison)
        self.events: list[LogEvent] = []
        observer: Any = self.events.append
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

    def assert_clean(self, world: World) -> None:
        wrong = [formatEvent(event) for event in self.events if event["log_level"] >= LogLevel.error]
        self.assertEqual(([], []), (wrong, world.clock.failures))
        self.assertEqual(([], []), (world.agent.leftovers(), world.server.leftovers()))

    def test_websocket(self) -> None:
        """A command and its result go over a WebSocket, within a few round trips."""
        world = World(1)
        world.start()
        self.assertTrue(world.clock.run_while(world.disconnected, 1))
        world.command(0.5)
        world.stop()
        self.assert_clean(world)

    def test_http(self) -> None:
        """The same goes over HTTP where WebSockets are refused."""
        world = World(2)
        world.start()
        world.backend.faults.set(Fault(kind="status", transport="websocket", status=403))
        world.clock.run_until(60)
        self.assertTrue(world.disconnected())
        world.command(60)
        world.stop()
        self.assert_clean(world)

    def test_tls(self) -> None:
        """The same goes over TLS, with identity and trust as they are."""
        directory = self.mktemp()
        os.mkdir(directory)
        world = World(3, tls=Authority(), directory=directory)
        world.start()
        self.assertTrue(world.clock.run_while(world.disconnected, 2))
        world.command(1)
        self.assertIn("TLSv1.3", msgspec.json.encode(world.manager.status()).decode())
        world.network.path("agent", "backend").cut()
        world.clock.run_until(world.clock.seconds() + 60)
        world.command(1)
        world.stop()
        self.assert_clean(world)

    def test_plain(self) -> None:
        """The same goes with a backend that knows nothing of commsmgr.v1 and has its bad habits, compressed or not."""
        for compress in (False, True):
            world = World(9, dialects=("plain",), quirks=True, compress=compress)
            world.start()
            self.assertTrue(world.clock.run_while(world.disconnected, 2))
            world.command(1)
            world.stop()
            self.assert_clean(world)

    def test_hour(self) -> None:
        """An hour of an idle agent is over in no time, and nothing gathers."""
        world = World(4)
        world.start()
        world.clock.run_until(600)
        timers = len(world.clock.getDelayedCalls())
        world.clock.run_until(3600)
        self.assertFalse(world.disconnected())
        self.assertTrue(abs(len(world.clock.getDelayedCalls()) - timers) <= 3)
        self.assertTrue(world.clock.steps < 10_000, world.clock.steps)
        world.stop()
        self.assert_clean(world)

    def test_killed_and_restarted(self) -> None:
        """A backend that dies with its connections is found again when it is back on its host."""
        for power in (False, True):
            world = World(5)
            world.start()
            self.assertTrue(world.clock.run_while(world.disconnected, 2))
            world.server.kill(power=power)
            world.clock.run_until(world.clock.seconds() + 200)
            self.assertFalse(world.manager.status().connected)
            world.server = ProcessReactor(world.clock, world.network, "backend", world.random("again"))
            world.backend = ReferenceBackend(
                world.server, wall=world.wall, random=world.random("more ids"), listen="0.0.0.0:8080", token="secret"
            )
            world.wait_for(world.backend.startService())
            self.assertTrue(world.clock.run_while(world.disconnected, 300))
            world.command(1)
            world.stop()
            self.assert_clean(world)

    def test_story(self) -> None:
        """Faults of the network pass, commands and results go on, and at the end nothing is left."""
        self.assert_clean(story(6))

    def test_same_seed(self) -> None:
        """A seed gives the same history to the byte in every process, and another seed gives another one."""
        code = (
            "import sys\n"
            "class Poison:\n"
            "    def __getattr__(self, name):\n"
            "        raise (AttributeError if name.startswith('__') else AssertionError)(name)\n"
            "sys.modules['twisted.internet.reactor'] = Poison()\n"
            "from tests.test_simulation_core import child\n"
            "child(int(sys.argv[1]))\n"
        )
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, seed],
                env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": ROOT},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for seed, hash_seed in (("7", "1"), ("7", "2"))
        ]
        outputs = []
        for each in running:
            out, err = each.communicate(timeout=60)
            self.assertEqual((0, b""), (each.returncode, err))
            outputs.append(out)
        first, again = outputs
        self.assertTrue(first.count(b"\n") > 300)
        self.assertEqual(first, again)
        here, other = story(7), story(8)
        self.assertEqual(here.notes, first.decode().splitlines()[: len(here.notes)])
        self.assertNotEqual(here.notes, other.notes)
        moments = [float(note.split()[0]) for note in here.notes]
        self.assertTrue(all(one <= following for one, following in pairwise(moments)))
