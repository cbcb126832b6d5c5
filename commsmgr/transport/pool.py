"""
Persistent HTTP connections, each behind a guard that bounds what Twisted does not: the head of an answer, and the time
that closing takes; and that sees to it that each answer belongs to the request after which it came.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Hashable
from socket import MSG_PEEK
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IAddress, IDelayedCall, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import connectionDone
from twisted.internet.task import deferLater
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web._newclient import HTTP11ClientProtocol
from twisted.web.client import HTTPConnectionPool, _HTTP11ClientFactory

from commsmgr.errors import PeerViolation
from commsmgr.transport.http_head import END_OF_HEAD, HEAD_LIMIT, INTERIM_LIMIT, malformed, status_of

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
    What Twisted's HTTP client takes for its transport. The head of an answer goes on when it is complete and checked.

    :ivar refusal: what the peer did that made us drop the connection, None as long as it behaves.
    :ivar lost: fires when the connection is gone.
    """

    factory: Any
    transport: Any

    def __init__(self, factory: Any, wrapped: Any) -> None:
        super().__init__(factory, wrapped)
        self.refusal: PeerViolation | None = None
        self.lost: Deferred[None] = Deferred()
        self._used = False
        self._head: bytearray | None = None
        self._skipped = 0
        self._interim = 0
        self._closing: IDelayedCall | None = None
        self._shall_pause = self._is_paused = False

    def is_stale(self) -> bool:
        """
        Whether the peer hung up after the last answer, or said something that cannot be meant for the next request.

        Twisted drops a connection on which something comes while it is unused, but not before the reactor has read it.
        """
        if not self._used:
            return False
        transport = self.transport
        while (beneath := getattr(transport, "transport", None)) is not None:
            transport = beneath
        peek = getattr(transport.getHandle(), "recv", None) if hasattr(transport, "getHandle") else None
        if peek is None:
            # Not a socket; what has no buffer of its own has told us everything.
            return False
        try:
            peek(1, MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def answer_awaited(self) -> None:
        """A request goes out: what comes next is the head of an answer."""
        self._used = True
        self._head = bytearray()
        self._skipped = 0
        self._interim = 0

    def dataReceived(self, data: bytes) -> None:
        """Hand on what came; of a head nothing until all of it is there, and nothing of interim answers."""
        if self._shall_pause and not self._is_paused:
            self._is_paused = True
            self.transport.pauseProducing()
        if self._head is None:
            super().dataReceived(data)
            return
        # The end may have begun in what came before.
        searched = max(len(self._head) - 2, 0)
        self._head += data
        try:
            head = self._answer(self._head, searched)
        except PeerViolation as refusal:
            self.refusal = self.refusal or refusal
            self.abortConnection()
        else:
            if head is not None:
                self._head = None
                super().dataReceived(head)

    def _answer(self, received: bytearray, searched: int) -> bytes | None:
        """Return what came from the answer's status line on, None while its head is not complete."""
        start = 0
        if not received.startswith(b"HTTP/1."[: len(received)]):
            raise malformed(f"it begins with {bytes(received[:40])!r}")
        while (end := END_OF_HEAD.search(received, searched)) is not None and self._skipped + end.end() <= HEAD_LIMIT:
            if status_of(bytes(received[start : end.end()])) >= 200:
                return bytes(received[start:])
            self._interim += 1
            if self._interim > INTERIM_LIMIT:
                raise malformed(f"more than {INTERIM_LIMIT} interim answers came before the answer")
            start = searched = end.end()
        if self._skipped + (len(received) if end is None else end.end()) > HEAD_LIMIT:
            raise malformed(f"more than {HEAD_LIMIT} bytes")
        self._skipped += start
        del received[:start]
        return None

    def pauseProducing(self) -> None:
        """
        Pause when the next piece comes, if it still matters by then.

        Twisted pauses after each head until somebody takes the body, which here is at once: that would be four system
        calls for nothing. It keeps what comes meanwhile, so that is one piece at most.
        """
        self._shall_pause = True

    def resumeProducing(self) -> None:
        """Go on."""
        self._shall_pause = False
        if self._is_paused:
            self._is_paused = False
            self.transport.resumeProducing()

    def loseConnection(self) -> None:
        """Close; abort after :data:`GRACE` seconds."""
        if self._closing is None and not self.lost.called:
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


class _Client(HTTP11ClientProtocol):
    """Twisted's client, which would ignore what comes in one packet with the end of an answer, and go on."""

    def _finishResponse(self, rest: bytes) -> None:
        if rest and self._currentRequest is not None:
            # The answer counts; a connection on which more follows than was asked for is not used again.
            self._currentRequest.persistent = False
        super()._finishResponse(rest)


class _ClientFactory(_HTTP11ClientFactory):
    noisy = False

    def buildProtocol(self, addr: IAddress | None) -> _Client:
        return _Client(self._quiescentCallback)


class _Guarding(WrappingFactory):
    protocol = Connection
    noisy = False

    def __init__(self, factory: Any, clock: Any, register: dict[Connection, None]) -> None:
        super().__init__(factory)
        self.clock = clock
        self._register = register

    def registerProtocol(self, p: Connection) -> None:
        """A connection is made."""
        self._register[p] = None

    def unregisterProtocol(self, p: Connection) -> None:
        """A connection is gone."""
        self._register.pop(p, None)


class Pool(HTTPConnectionPool):
    """
    The connections of one HTTP client.

    :param reactor: IReactorTime.
    :param connections: how many unused ones are kept for each backend.
    """

    _factory = _ClientFactory
    retryAutomatically = False  # it would send a request twice without anybody knowing

    def __init__(self, reactor: Any, connections: int) -> None:
        super().__init__(reactor, persistent=True)
        self.maxPersistentPerHost = connections
        self.cachedConnectionTimeout = IDLE
        self._clock = reactor
        self._open: dict[Connection, None] = {}  # in order, which a set has not

    def getConnection(self, key: Hashable, endpoint: Any) -> Deferred[Any]:
        """Lend a connection to the :class:`Borrower` ``endpoint``: one that lies unused, or a new one made by it."""

        def lend(protocol: Any) -> Any:
            connection: Connection = protocol.transport
            if connection.is_stale():
                connection.abortConnection()
                return self.getConnection(key, endpoint)
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
