"""Listeners and reactors for tests of the transport, on real loopback sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
)
from twisted.internet.protocol import Protocol, ServerFactory
from zope.interface import implementer

real: Any = _reactor


@implementer(IHostnameResolver, IHostResolution)
class FixedResolver:
    """
    Resolves every name to ``addresses``, an IPv6 literal to itself; None means that it never answers.

    :ivar asked: the names it was asked for.
    """

    name = ""

    def __init__(self, addresses: Sequence[str] | None) -> None:
        self._addresses = addresses
        self.asked: list[str] = []

    def cancel(self) -> None:
        """IHostResolution."""

    def resolveHostName(self, receiver: Any, hostName: str, portNumber: int = 0, *_: Any, **__: Any) -> FixedResolver:
        """IHostnameResolver."""
        self.asked.append(hostName)
        receiver.resolutionBegan(self)
        if ":" in hostName:
            receiver.addressResolved(IPv6Address("TCP", hostName, portNumber))
            receiver.resolutionComplete()
        elif self._addresses is not None:
            for address in self._addresses:
                receiver.addressResolved(IPv4Address("TCP", address, portNumber))
            receiver.resolutionComplete()
        return self


@implementer(IReactorPluggableNameResolver, IReactorTCP, IReactorTime)
class ReactorWith:
    """The real reactor with another clock, another resolver, or both."""

    def __init__(self, *, clock: Any = None, resolver: FixedResolver | None = None) -> None:
        self.clock = clock
        time = clock or real
        self.callLater, self.seconds = time.callLater, time.seconds
        self.nameResolver = resolver or real.nameResolver

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)


class Recorder(Protocol):
    """One accepted connection: keeps what comes, and lets a script answer."""

    def __init__(self, script: Callable[[Recorder], None]) -> None:
        self.received = b""
        self.lost: Deferred[None] = Deferred()
        self._script = script

    def dataReceived(self, data: bytes) -> None:
        """Keep it and ask the script."""
        self.received += data
        self._script(self)

    def connectionLost(self, reason: Any = None) -> None:
        """It is gone."""
        self.lost.callback(None)


class Recording(ServerFactory):
    """
    Accepts connections.

    :param script: called with the connection after each piece that came.
    :ivar connections: all that were accepted, in order.
    """

    noisy = False

    def __init__(self, script: Callable[[Recorder], None] = lambda recorder: None) -> None:
        self._script = script
        self._waiting: list[Deferred[Recorder]] = []
        self.connections: list[Recorder] = []

    def buildProtocol(self, addr: Any) -> Recorder:
        """A connection came."""
        recorder = Recorder(self._script)
        self.connections.append(recorder)
        for waiting in self._waiting:
            # In the next turn: its transport is not there yet.
            real.callLater(0, waiting.callback, recorder)
        self._waiting.clear()
        return recorder

    def next_connection(self) -> Deferred[Recorder]:
        """Fire when the next connection has come."""
        waiting: Deferred[Recorder] = Deferred()
        self._waiting.append(waiting)
        return waiting

    @property
    def received(self) -> bytes:
        """What came over all connections together."""
        return b"".join(each.received for each in self.connections)

    def drop(self) -> Deferred[Any]:
        """Abort all connections that are left; fire when they are gone."""
        for each in self.connections:
            if not each.lost.called and each.transport is not None:
                each.transport.abortConnection()
        return gatherResults([each.lost for each in self.connections if each.transport is not None])


def listen(case: Any, factory: ServerFactory, *, tls: Any = None, interface: str = "127.0.0.1") -> int:
    """Listen with ``factory`` until the test ``case`` ends; return the port. ``tls`` is a context factory."""
    if tls is None:
        port = real.listenTCP(0, factory, interface=interface)
    else:
        port = real.listenSSL(0, factory, tls, interface=interface)
    if isinstance(factory, Recording):
        case.addCleanup(factory.drop)
    case.addCleanup(port.stopListening)
    return int(port.getHost().port)
