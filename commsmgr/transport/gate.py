"""
Between TLS and the protocol above it: the protocol is built only when the peer has been checked.

Twisted connects a protocol before the handshake, and what it writes is kept and sent afterwards, whoever answered. The
gate takes its place: no byte of a request exists before the check passed, so everything that fails here is safe to try
again. Afterwards it only hands on what arrives.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Callable, Collection
from ipaddress import ip_address
from typing import Any, Final

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import (
    IAddress,
    IHandshakeListener,
    IOpenSSLClientConnectionCreator,
    IProtocol,
    IProtocolFactory,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr.errors import TLSFailed
from commsmgr.transport.peer import PeerCheck, TLSFacts

HANDSHAKE_LIMIT: Final = 1 << 20
"""Bytes that a peer may send before its handshake is complete. OpenSSL takes about 100 KiB of certificates."""

MOST_STEPS: Final = 4000
"""
Steps of OpenSSL for messages that are no data, over the whole life of a connection. Each takes four or so: a session
ticket, a change of keys, a request to renegotiate. An honest peer sends a few of them in a day.
"""


@implementer(IHandshakeListener)
class Gate(Protocol):
    """
    Waits for the handshake in place of the protocol that ``factory`` will build.

    :ivar check: of the peer of this very connection.
    :ivar opened: fires with that protocol, connected; fails with
        :class:`~commsmgr.errors.TLSFailed`, or with what the factory raised. Cancelling drops the connection.
    """

    transport: Any  # a TLSMemoryBIOProtocol, which has no types

    def __init__(
        self,
        factory: IProtocolFactory,
        address: IAddress,
        check: PeerCheck,
        observe: Callable[[TLSFacts], None],
        refused: Callable[[TLSFailed], None],
    ) -> None:
        self.check = check
        self._factory = factory
        self._address = address
        self._observe = observe
        self._refused = refused
        self._protocol: IProtocol | None = None
        self._heard = False
        self.opened: Deferred[IProtocol] = Deferred(lambda _: self.transport.abortConnection())

    def handshakeCompleted(self) -> None:
        """The handshake is complete: let the protocol in, or nobody."""
        try:
            refusal = self.check.refusal()
            if refusal is not None:
                raise refusal
            self._observe(self.check.facts(self.transport.getHandle()))
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
            refused = None if self._heard else self.check.refused_us()
            if refused is not None:
                self._refused(refused)
                reason = Failure(refused)
            self._protocol.connectionLost(reason)
        elif not self.opened.called:
            self.opened.errback(self.check.broken(reason.value))


class GateFactory(Factory):
    """
    Builds the gates of one attempt.

    :param factory: of the protocol behind the gate.
    :param host: whom the peer must prove to be.
    :param observe: told what was agreed, before that protocol is built.
    :param pins: see :class:`~commsmgr.transport.peer.PeerCheck`.
    :param refused: told when the peer refuses us, which it can do when that protocol is connected already.
    """

    noisy = False

    def __init__(
        self,
        factory: IProtocolFactory,
        host: str,
        observe: Callable[[TLSFacts], None],
        *,
        pins: Collection[str] = (),
        refused: Callable[[TLSFailed], None] = lambda error: None,
    ) -> None:
        self._factory = factory
        self._host = host
        self._observe = observe
        self._pins = pins
        self._refused = refused

    def doStart(self) -> None:
        """An attempt begins."""
        self._factory.doStart()

    def doStop(self) -> None:
        """The attempt and its connection are over."""
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> Gate:  # type: ignore[override]  # ours always has an address
        """A TCP connection is there."""
        return Gate(self._factory, addr, PeerCheck(self._host, self._pins), self._observe, self._refused)


class _Bounded(SSL.Connection):
    """
    Gives up a peer that has ever more to say in its handshake, or that is no data after it.

    Such messages are to be ignored, however many, or to be answered: they take time that no limit for messages counts,
    and memory, if the peer does not read.
    """

    _left = HANDSHAKE_LIMIT
    check: PeerCheck

    def bio_write(self, buf: Any) -> int:
        self._left -= len(buf)
        return super().bio_write(buf)

    def do_handshake(self) -> None:
        if self._left < 0:
            raise SSL.Error([("", "", f"more than {HANDSHAKE_LIMIT} bytes came, and the handshake is not complete")])
        super().do_handshake()

    def recv(self, bufsiz: int, flags: int | None = None) -> bytes:
        if self.check.steps > MOST_STEPS:
            raise SSL.Error([("", "", f"more than {MOST_STEPS} steps for messages of TLS that are no data")])
        return super().recv(bufsiz, flags)


@implementer(IOpenSSLClientConnectionCreator)
class CheckedConnections:
    """
    Makes the OpenSSL connections beneath gates: they trust nobody whom the gate's check does not.

    :param context: see :mod:`commsmgr.transport.tls`.
    :param host: a name without a trailing dot, or an IP address literal.
    """

    def __init__(self, context: SSL.Context, host: str) -> None:
        self._context = context
        self._host = host

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """Return the connection for ``tlsProtocol``, which wraps a :class:`Gate`."""
        check: PeerCheck = tlsProtocol.wrappedProtocol.check
        connection = _Bounded(self._context, None)
        connection.check = check
        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, check.certificate)
        connection.set_info_callback(check.handshake_event)
        try:
            ip_address(self._host)
        except ValueError:
            # RFC 6066 section 3: names only.
            connection.set_tlsext_host_name(self._host.encode("ascii"))
        return connection
