"""
One port for HTTP and WebSocket: the head of a connection's first request decides who gets the connection.

Every connection begins as an :class:`Entrance` that collects bytes until the first request's head is complete. An
upgrade to WebSocket goes to an autobahn protocol, together with whatever came in the same packet; anything else goes
to twisted.web. The entrance stays in between as the transport of the one it chose, and so can hold back what passes
(``blackhole``) or never pass anything at all (``hang``). Requests for the console and its API are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    ITCPTransport,
    ITransport,
)
from twisted.internet.protocol import Protocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import directlyProvides

from commsmgr.backend.faults import Fault, Faults, Transport

_HEAD_LIMIT = 16384
_HEAD_TIMEOUT = 30.0
_HELD_LIMIT = 64 << 20

Headers = dict[str, str]
Refusal = tuple[int, Headers, bytes]
"""Status, headers and body of a refused upgrade."""

_REASONS = {
    200: "OK",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    429: "Too Many Requests",
    503: "Service Unavailable",
}


class Entrance(ProtocolWrapper):
    """
    One connection.

    :ivar kind: what it turned out to be; empty before that.
    :ivar messages: how many requests or WebSocket messages have come.
    """

    factory: EntranceFactory
    transport: ITransport

    def __init__(self, factory: EntranceFactory) -> None:
        super().__init__(factory, Protocol())
        self.kind: Literal["", "control", "http", "websocket"] = ""
        self.messages = 0
        self._received: Callable[[bytes], None] = self._sniff
        self._head = b""
        self._timer: IDelayedCall | None = None
        self._hold: Fault | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._losing = False

    # -- the connection below ---------------------------------------------------------------------------------------

    def makeConnection(self, transport: Any) -> None:
        super().makeConnection(transport)
        # An ack and then a command are two small writes: with Nagle's algorithm the second would wait 40 ms.
        if hasattr(transport, "setTcpNoDelay"):
            transport.setTcpNoDelay(True)
        self._timer = self.factory.reactor.callLater(_HEAD_TIMEOUT, self.abortConnection)

    def dataReceived(self, data: bytes) -> None:
        self._received(data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]  # the base class has no default
        self._decided()
        super().connectionLost(reason)

    # -- the transport for whoever has the connection ---------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self._holds("out"):
            self.transport.write(data)
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _HELD_LIMIT:
            self.abortConnection()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        if self._holds("out"):
            self._losing = True
        else:
            super().loseConnection()

    def abortConnection(self) -> None:
        self.transport.abortConnection()  # type: ignore[attr-defined]  # TCP and TLS transports have it

    def pauseProducing(self) -> None:
        self._paused = True
        self._regulate()

    def resumeProducing(self) -> None:
        self._paused = False
        self._regulate()

    # -- faults -----------------------------------------------------------------------------------------------------

    def hang(self) -> None:
        """Go on reading and never say another word: the agent's own deadline has to end this."""
        self._received = self._ignore

    def hold(self, fault: Fault) -> None:
        """Let nothing pass in the fault's direction until :meth:`release`."""
        self._hold = fault
        self._regulate()

    def release(self) -> None:
        """Let everything pass again, what was held back first."""
        self._hold = None
        held, self._held, self._held_bytes = self._held, [], 0
        if held:
            self.transport.write(b"".join(held))
        if self._losing:
            super().loseConnection()
        self._regulate()

    def _holds(self, direction: str) -> bool:
        return self._hold is not None and self._hold.direction in (direction, "both")

    def _regulate(self) -> None:
        transport: Any = self.transport
        if self._paused or self._holds("in"):
            transport.pauseProducing()
        elif not transport.disconnecting:
            transport.resumeProducing()

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _ignore(self, data: bytes) -> None:
        """Swallow what comes."""

    def _deliver(self, data: bytes) -> None:
        super().dataReceived(data)

    def _decided(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def _sniff(self, data: bytes) -> None:
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0 and len(self._head) <= _HEAD_LIMIT:
            return
        self._decided()
        path, headers = _parse(self._head[: end if end >= 0 else _HEAD_LIMIT])
        upgrade = "websocket" in headers.get("upgrade", "").lower()
        self.kind = "control" if self.factory.is_control(path) and not upgrade else "websocket" if upgrade else "http"
        if self.kind == "control":
            self._hand_over(self.factory.site)
            return
        faults = self.factory.faults
        if faults.strike("refuse", self.kind):
            self.abortConnection()
            return
        if fault := faults.peek("blackhole", self.kind):
            self.hold(fault)
        if self.kind == "http":
            self._hand_over(self.factory.site)
        else:
            self._upgrade(path, headers)

    def _upgrade(self, path: str, headers: Headers) -> None:
        if self.factory.faults.strike("hang", "websocket"):
            self.hang()
            return
        refusal = self.factory.refuse_upgrade(path, headers)
        slow = self.factory.faults.strike("slow", "websocket")
        if slow is None:
            self._answer_upgrade(refusal)
        else:
            self._received = self._collect
            self._timer = self.factory.reactor.callLater(slow.delay, self._answer_upgrade, refusal)

    def _collect(self, data: bytes) -> None:
        self._head += data

    def _answer_upgrade(self, refusal: Refusal | None) -> None:
        if refusal is None:
            # autobahn would take anything that provides ISSLTransport for Twisted's own TLS protocol.
            directlyProvides(self, ITCPTransport)
            self._hand_over(self.factory.websocket)
            return
        status, headers, body = refusal
        lines = [
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Refused')}",
            "Connection: close",
            f"Content-Length: {len(body)}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._received = self._ignore
        self.write("\r\n".join((*lines, "", "")).encode("latin-1") + body)
        self.loseConnection()

    def _hand_over(self, factory: IProtocolFactory) -> None:
        inner: IProtocol | None = factory.buildProtocol(self.getPeer())
        assert inner is not None
        head, self._head = self._head, b""
        self._received = self._deliver
        self.wrappedProtocol = inner
        inner.makeConnection(cast(ITransport, self))
        self._deliver(head)


class EntranceFactory(WrappingFactory[Entrance]):
    """
    Makes an :class:`Entrance` for each connection.

    :param site: gets HTTP connections.
    :param websocket: gets WebSocket connections.
    :param is_control: says of a path whether it belongs to the console or its API.
    :param refuse_upgrade: says of an upgrade's path and headers (names in lower case) how it is refused, or None.
    """

    noisy = False

    def __init__(
        self,
        reactor: IReactorTime,
        site: IProtocolFactory,
        websocket: IProtocolFactory,
        faults: Faults,
        *,
        is_control: Callable[[str], bool],
        refuse_upgrade: Callable[[str, Headers], Refusal | None],
    ) -> None:
        super().__init__(site)
        self.reactor = reactor
        self.site = site
        self.websocket = websocket
        self.faults = faults
        self.is_control = is_control
        self.refuse_upgrade = refuse_upgrade
        self._empty: Deferred[None] | None = None

    def buildProtocol(self, addr: IAddress | None) -> Entrance:
        return Entrance(self)

    def misbehave(self, fault: Fault) -> None:
        """Let a fault that begins act on what is open now."""
        for entrance in self._agents(fault.transport):
            if fault.kind == "drop" and fault.immediate:
                entrance.abortConnection()
            elif fault.kind == "blackhole":
                entrance.hold(fault)

    def behave(self, fault: Fault) -> None:
        """Undo what a fault that ends has done to what is open now."""
        if fault.kind == "blackhole":
            for entrance in self._agents(fault.transport):
                entrance.release()

    def abort_all(self) -> None:
        """Cut every connection."""
        for entrance in list(self.protocols):
            entrance.abortConnection()

    def when_empty(self) -> Deferred[None]:
        """Wait until there is no connection any more."""
        if not self.protocols:
            return succeed(None)
        self._empty = empty = Deferred[None]()
        return empty

    def unregisterProtocol(self, p: Entrance) -> None:
        super().unregisterProtocol(p)
        if not self.protocols and self._empty is not None:
            empty, self._empty = self._empty, None
            empty.callback(None)

    def _agents(self, transport: Literal["both"] | Transport) -> list[Entrance]:
        """Return the agents' connections that use ``transport``."""
        kinds = ("http", "websocket") if transport == "both" else (transport,)
        return [entrance for entrance in self.protocols if entrance.kind in kinds]


def _parse(head: bytes) -> tuple[str, Headers]:
    """Take a request's head apart, leniently: whoever gets the connection judges it again."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    headers: Headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    return (words[1] if len(words) > 1 else "").partition("?")[0], headers
