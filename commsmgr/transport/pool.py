"""
Persistent HTTP connections, each behind a guard that bounds what Twisted does not: the head of an answer, and the time
that closing takes.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

import re
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

INTERIM_LIMIT: Final = 20
"""Interim answers before the answer (RFC 9110 section 15.2). Twisted logs each, and a head has room for thousands."""

_STATUS_LINE: Final = re.compile(rb"^HTTP/\d\.\d (\d)", re.MULTILINE)
_STATUS_LINE_BYTES: Final = len(b"HTTP/1.1 1")

IDLE: Final = 4
"""Seconds an unused connection is kept: below the 5 s after which Node, Apache and uvicorn close theirs."""

_BAD_HEAD: Final = f"the head of the answer is malformed, or larger than {HEAD_LIMIT} bytes"

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
        self._interim = 0
        self._line = b""
        self._closing: IDelayedCall | None = None

    def answer_awaited(self) -> None:
        """A request goes out: what comes next is the head of an answer."""
        self._head = 0
        self._interim = 0
        self._line = b""

    def head_complete(self) -> None:
        """The head of the answer is complete: bytes are the body's from here on."""
        self._head = None

    def dataReceived(self, data: bytes) -> None:
        """Hand on what came; if the head is still not complete then, count it."""
        if self._head is not None and self._too_many_interim(data):
            self._refuse(f"more than {INTERIM_LIMIT} interim answers came before the answer")
            return
        super().dataReceived(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD_LIMIT:
                self._refuse(_BAD_HEAD)

    def loseConnection(self) -> None:
        """Close; abort after :data:`GRACE` seconds."""
        if self._head is not None:
            # Twisted gives up on a line of more than 16 KiB without a word.
            self._refuse(_BAD_HEAD)
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

    def _too_many_interim(self, data: bytes) -> bool:
        """Count the interim answers that begin in ``data``, before each of them makes a line in the log."""
        begun = len(self._line)
        text = self._line + data
        for status in _STATUS_LINE.finditer(text):
            if status[1] != b"1":
                # The answer itself; what follows may be its body.
                break
            if status.end() > begun:
                self._interim += 1
        # The beginning of a line that is not complete yet.
        self._line = text[text.rfind(b"\n") + 1 :][:_STATUS_LINE_BYTES]
        return self._interim > INTERIM_LIMIT

    def _refuse(self, why: str) -> None:
        if self.refusal is None:
            self.refusal = PeerViolation(why, may_have_arrived=True)
        self.abortConnection()


class _Guarding(WrappingFactory):
    protocol = Connection
    noisy = False

    def __init__(self, factory: Any, clock: Any, register: dict[Connection, None]) -> None:
        factory.noisy = False
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
