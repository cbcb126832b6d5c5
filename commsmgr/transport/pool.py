"""
Persistent HTTP connections, each behind a guard that bounds what Twisted does not: the head of an answer, and the time
that closing takes.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IDelayedCall, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import connectionDone
from twisted.internet.task import deferLater
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import HTTPConnectionPool

from commsmgr.errors import PeerViolation

HEAD_LIMIT: Final = 1 << 16
"""Bytes of status line and header fields of one answer, interim answers included."""

IDLE: Final = 4
"""Seconds an unused connection is kept: below the 5 s after which Node, Apache and uvicorn close theirs."""

GRACE: Final = 1.0
"""Seconds for closing in good manners. TLS waits for the peer's goodbye, TCP for it to read: for ever, if need be."""


class Borrower(Protocol):
    """The endpoint of one exchange, told which connection the exchange was given."""

    def borrowed(self, connection: Connection) -> None:
        """``connection`` is this exchange's own until the answer is complete."""


class Connection(ProtocolWrapper):
    """
    What Twisted's HTTP client takes for its transport.

    :ivar refusal: what the peer did that made us drop the connection, None as long as it behaves.
    :ivar lost: fires when the connection is gone.
    """

    factory: Any
    transport: Any

    def __init__(self, factory: Any, wrapped: Any) -> None:
        super().__init__(factory, wrapped)
        self.refusal: PeerViolation | None = None
        self.lost: Deferred[None] = Deferred()
        self._head: int | None = None
        self._closing: IDelayedCall | None = None

    def answer_awaited(self) -> None:
        """A request goes out: what comes next is the head of an answer."""
        self._head = 0

    def head_complete(self) -> None:
        """The head of the answer is complete: bytes are the body's from here on."""
        self._head = None

    def dataReceived(self, data: bytes) -> None:
        """Hand on what came; if the head is still not complete then, count it."""
        super().dataReceived(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD_LIMIT:
                self._refuse()

    def loseConnection(self) -> None:
        """Close; abort after :data:`GRACE` seconds."""
        if self._head is not None:
            # Twisted gives up on a line of more than 16 KiB without a word.
            self._refuse()
        elif self._closing is None and not self.lost.called:
            super().loseConnection()
            self._closing = self.factory.clock.callLater(GRACE, self.abortConnection)

    def abortConnection(self) -> None:
        """Drop the connection now."""
        self.disconnecting = True
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        super().connectionLost(reason)
        self.lost.callback(None)

    def _refuse(self) -> None:
        self.refusal = PeerViolation(
            f"the head of the answer is malformed, or larger than {HEAD_LIMIT} bytes", may_have_arrived=True
        )
        self.abortConnection()


class _Guarding(WrappingFactory):
    protocol = Connection
    noisy = False

    def __init__(self, factory: Any, clock: Any, register: set[Connection]) -> None:
        factory.noisy = False
        super().__init__(factory)
        self.clock = clock
        self._register = register

    def registerProtocol(self, p: Connection) -> None:
        """A connection is made."""
        self._register.add(p)

    def unregisterProtocol(self, p: Connection) -> None:
        """A connection is gone."""
        self._register.discard(p)


class Pool(HTTPConnectionPool):
    """
    The connections of one HTTP client.

    :param reactor: IReactorTime.
    :param connections: how many unused ones are kept for each backend.
    """

    retryAutomatically = False  # it would send a request twice without anybody knowing

    def __init__(self, reactor: Any, connections: int) -> None:
        super().__init__(reactor, persistent=True)
        self.maxPersistentPerHost = connections
        self.cachedConnectionTimeout = IDLE
        self._clock = reactor
        self._open: set[Connection] = set()

    def getConnection(self, key: Hashable, endpoint: Any) -> Deferred[Any]:
        """Lend a connection to the :class:`Borrower` ``endpoint``: one that lies unused, or a new one made by it."""

        def lend(protocol: Any) -> Any:
            connection: Connection = protocol.transport
            connection.answer_awaited()
            endpoint.borrowed(connection)
            return protocol

        return super().getConnection(key, endpoint).addCallback(lend)

    async def connect(self, endpoint: IStreamClientEndpoint, factory: IProtocolFactory) -> IProtocol:
        """Connect ``factory`` to ``endpoint`` with a guard between them."""
        connection: Any = await endpoint.connect(_Guarding(factory, self._clock, self._open))
        protocol: IProtocol = connection.wrappedProtocol
        return protocol

    async def close(self, within: float) -> None:
        """Close all connections, in good manners for ``within`` seconds; return when they are gone."""
        connections = list(self._open)
        self.closeCachedConnections()
        for connection in connections:
            connection.loseConnection()
        abort = self._clock.callLater(within, self._abort)
        await gatherResults([connection.lost for connection in connections])
        if abort.active():
            abort.cancel()
        # Attempts that were cancelled just now leave the reactor in its next turn.
        await deferLater(self._clock, 0)

    def _abort(self) -> None:
        for connection in list(self._open):
            connection.abortConnection()
