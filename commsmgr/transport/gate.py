"""
Between TLS and the protocol above it: the protocol is built only when the peer has been checked.

Twisted connects a protocol before the handshake, and what it writes is kept and sent afterwards, whoever answered. The
gate takes its place: no byte of a request exists before the check passed, so everything that fails here is safe to try
again. Afterwards it only hands on what arrives.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IAddress, IHandshakeListener, IProtocol, IProtocolFactory
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr.transport.peer import PeerCheck, TLSFacts


@implementer(IHandshakeListener)
class Gate(Protocol):
    """
    Waits for the handshake in place of the protocol that ``factory`` will build.

    :ivar opened: fires with that protocol, connected; fails with
        :class:`~commsmgr.errors.TLSFailed`, or with what the factory raised. Cancelling drops the connection.
    """

    transport: Any  # a TLSMemoryBIOProtocol, which has no types

    def __init__(
        self, factory: IProtocolFactory, address: IAddress, observe: Callable[[TLSFacts], None]
    ) -> None:
        self._factory = factory
        self._address = address
        self._observe = observe
        self._protocol: IProtocol | None = None
        self._heard = False
        self.opened: Deferred[IProtocol] = Deferred(lambda _: self.transport.abortConnection())

    def connectionMade(self) -> None:
        """TLS begins: take hold of the check that belongs to this very connection."""
        self._connection: SSL.Connection = self.transport.getHandle()
        self._check: PeerCheck = self._connection.get_app_data()

    def handshakeCompleted(self) -> None:
        """The handshake is complete: let the protocol in, or nobody."""
        try:
            refusal = self._check.refusal()
            if refusal is not None:
                raise refusal
            self._observe(self._check.facts(self._connection))
            protocol = self._factory.buildProtocol(self._address)
            if protocol is None:
                raise ConnectionLost("the factory built no protocol")
            protocol.makeConnection(self.transport)
        except Exception:
            self.transport.abortConnection()
            self.opened.errback()
        else:
            self._protocol = protocol
            self.opened.callback(protocol)

    def dataReceived(self, data: bytes) -> None:
        """The first bytes came through the open gate; it steps aside for those that follow."""
        assert self._protocol is not None
        self._heard = True
        self.dataReceived = self._protocol.dataReceived  # type: ignore[method-assign]  # saves a call for each packet
        self._protocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        if self._protocol is not None:
            refused = None if self._heard else self._check.refused_us()
            self._protocol.connectionLost(reason if refused is None else Failure(refused))
        elif not self.opened.called:
            self.opened.errback(self._check.broken(reason.value))


class GateFactory(Factory):
    """
    Builds the gates of one attempt.

    :param factory: of the protocol behind the gate.
    :param observe: told what was agreed, before that protocol is built.
    """

    noisy = False

    def __init__(self, factory: IProtocolFactory, observe: Callable[[TLSFacts], None]) -> None:
        self._factory = factory
        self._observe = observe

    def doStart(self) -> None:
        """An attempt begins."""
        self._factory.doStart()

    def doStop(self) -> None:
        """The attempt and its connection are over."""
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> Gate:  # type: ignore[override]  # ours always has an address
        """A TCP connection is there."""
        return Gate(self._factory, addr, self._observe)
