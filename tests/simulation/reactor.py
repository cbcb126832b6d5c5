"""
The reactor of one simulated process.

It is what Twisted, treq and autobahn need of a reactor, on the world's one clock and network, and nothing else: no
descriptors, no signals, no threads. What a thread would do is done on the spot, and its result comes a little later.

A process can die at any moment, in the middle of a call of its own too. The rest of that call still runs, for there is
no way to stop it, but nothing that it schedules, writes or opens takes place.
"""

# mypy: allow-untyped-calls, allow-any-generics
# Twisted is typed in parts only.

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from twisted.internet.abstract import isIPAddress
from twisted.internet.address import IPv4Address
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IHostnameResolver,
    IHostResolution,
    IReactorFromThreads,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
    IResolutionReceiver,
)
from twisted.internet.protocol import ClientFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.simulation.clock import Call, VirtualClock
from tests.simulation.network import ANYWHERE, Network
from tests.simulation.transport import ClientTransport, Connector, Port, Transport

_THREAD_SECONDS = 0.005
"""A thread's work takes up to this long."""


@implementer(IReactorTime, IReactorTCP, IReactorPluggableNameResolver, IReactorFromThreads)
class ProcessReactor:
    """
    The reactor.

    :param host: where the process runs; it has power from now on.
    :param random: for how long a thread's work takes.
    :ivar alive: whether the process lives.
    :ivar name: for what is said of it.
    """

    running = True

    def __init__(self, clock: VirtualClock, network: Network, host: str, random: Random) -> None:
        self.clock = clock
        self.network = network
        self.host = self.name = host
        self.alive = True
        self.address = network.address(host)
        self.transports: dict[Transport, None] = {}
        self.connecting: dict[ClientTransport, None] = {}
        self.ports: dict[Port, None] = {}
        self.nameResolver: IHostnameResolver = Resolver(self)
        self._threads = Threads(self, random)
        self._triggers: list[tuple[str, str]] = []
        network.power(host, True)

    # -- IReactorTime -----------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Return the time now."""
        return self.clock.seconds()

    def callLater(self, delay: float, callable: Callable[..., Any], *args: object, **kw: object) -> Call:
        """Schedule a call."""
        return self.clock.schedule(self, delay, callable, *args, **kw)

    def getDelayedCalls(self) -> Sequence[IDelayedCall]:
        """Return the calls of this process that are still to come."""
        return self.clock.calls_of(self)

    # -- IReactorTCP ------------------------------------------------------------------------------------------------

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Port:
        """Listen on a port, 0 for any."""
        listening = Port(self, interface or ANYWHERE, port, factory)
        if self.alive:
            listening.startListening()
        return listening

    def connectTCP(
        self, host: str, port: int, factory: ClientFactory[Any], timeout: float = 30, bindAddress: Any = None
    ) -> Connector:
        """Connect to a host."""
        connector = Connector(host, port, factory, timeout, self)
        if self.alive:
            connector.connect()
        return connector

    # -- names ------------------------------------------------------------------------------------------------------

    def installNameResolver(self, resolver: IHostnameResolver) -> IHostnameResolver:
        """Use another resolver; return the old one."""
        old, self.nameResolver = self.nameResolver, resolver
        return old

    def look_up(
        self, name: str, found: Callable[..., object], failed: Callable[[BaseException], object], *args: object
    ) -> None:
        """Call ``found`` with the address of ``name`` and ``args``, or ``failed``, or nothing if nobody answers."""
        if isIPAddress(name):
            found(name, *args)
        elif name not in self.network.hang_names:
            self.callLater(self.network.lookup, self._looked_up, name, found, failed, args)

    def _looked_up(
        self, name: str, found: Callable[..., object], failed: Callable[[BaseException], object], args: Sequence[object]
    ) -> None:
        address = self.network.names.get(name)
        if address is None:
            failed(DNSLookupError(f"no address for {name}"))
        else:
            found(address, *args)

    # -- threads, and the rest of what a reactor has ----------------------------------------------------------------

    def callFromThread(self, callable: Callable[..., Any], *args: object, **kw: object) -> None:
        """Call in the next turn."""
        self.callLater(0, callable, *args, **kw)

    def getThreadPool(self) -> Threads:
        """Return what :func:`~twisted.internet.threads.deferToThreadPool` wants."""
        return self._threads

    def callWhenRunning(self, callable: Callable[..., Any], *args: object, **kw: object) -> None:
        """Call now: it runs."""
        callable(*args, **kw)

    def addSystemEventTrigger(
        self, phase: str, eventType: str, callable: Callable[..., Any], *args: object, **kw: object
    ) -> tuple[str, str]:
        """Remember that there is one; a simulated process ends by other means."""
        trigger = (phase, eventType)
        self._triggers.append(trigger)
        return trigger

    def removeSystemEventTrigger(self, triggerID: tuple[str, str]) -> None:
        """Forget it."""
        self._triggers.remove(triggerID)

    # -- the end ----------------------------------------------------------------------------------------------------

    def kill(self, *, power: bool = False) -> None:
        """
        End the process at this moment.

        No timer of it fires any more, nobody in it hears anything. What is on the wire arrives. Peers get a reset.

        :param power: the host goes down with it: peers hear nothing until a process starts there again.
        """
        if not self.alive:
            return
        self.alive = False
        self.network.note("power cut" if power else "killed", self.name, 0)
        if power:
            self.network.power(self.host, False)
        self.clock.forget(self)
        for transport in [*self.connecting, *self.transports]:
            transport.die(power)
        for port in list(self.ports):
            port.die()
        self.connecting.clear()
        self.transports.clear()

    def leftovers(self) -> list[str]:
        """Return what is still there, each as a sentence; empty for a process that has stopped in good order."""
        now = self.seconds()
        said = [f"a timer is due in {call.getTime() - now:g} s: {_named(call)}" for call in self.getDelayedCalls()]
        said += [f"a transport is open: {transport}" for transport in self.transports]
        said += [f"a connection is being made: {transport}" for transport in self.connecting]
        said += [f"port {port.port} is open: {type(port.factory).__name__}" for port in self.ports]
        said += [f"a thread works: {work}" for work in self._threads.working]
        return said


def _named(call: Any) -> str:
    return str(getattr(call.func, "__qualname__", call.func))


class Threads:
    """A thread pool without threads."""

    def __init__(self, reactor: ProcessReactor, random: Random) -> None:
        self.working: list[str] = []
        self._reactor = reactor
        self._random = random

    def callInThread(self, func: Callable[..., Any], *args: object, **kw: object) -> None:
        """Do some work."""
        self.callInThreadWithCallback(None, func, *args, **kw)

    def callInThreadWithCallback(
        self, onResult: Callable[[bool, Any], object] | None, func: Callable[..., Any], *args: object, **kw: object
    ) -> None:
        """Do some work now, and tell of its result a little later."""
        if not self._reactor.alive:
            return
        try:
            success, result = True, func(*args, **kw)
        except Exception:
            success, result = False, Failure()
        name = str(getattr(func, "__qualname__", func))
        self.working.append(name)
        self._reactor.callLater(self._random.uniform(0, _THREAD_SECONDS), self._done, name, onResult, success, result)

    def _done(self, name: str, onResult: Callable[[bool, Any], object] | None, success: bool, result: Any) -> None:
        self.working.remove(name)
        if onResult is not None:
            onResult(success, result)


@implementer(IHostResolution)
class _Resolution:
    def __init__(self, name: str) -> None:
        self.name = name
        self.cancelled = False

    def cancel(self) -> None:
        """Tell nobody."""
        self.cancelled = True


@implementer(IHostnameResolver)
class Resolver:
    """Asks the network for names."""

    def __init__(self, reactor: ProcessReactor) -> None:
        self._reactor = reactor

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        """Begin to resolve ``hostName``; a name without an address has none, which is no error here."""
        resolution = _Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)

        def resolved(*addresses: str) -> None:
            if not resolution.cancelled:
                for address in addresses:
                    resolutionReceiver.addressResolved(IPv4Address("TCP", address, portNumber))
                resolutionReceiver.resolutionComplete()

        self._reactor.look_up(hostName, resolved, lambda error: resolved())
        return resolution
