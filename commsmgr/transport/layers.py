"""
The layers of a connection, each an endpoint: TCP to a host, and TLS over another endpoint.

Neither has a deadline; :mod:`commsmgr.transport.dialer` lays one over all of them.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr.errors import ConnectFailed, TLSFailed
from commsmgr.transport.gate import CheckedConnections, GateFactory
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.tls import ContextSource


@implementer(IStreamClientEndpoint)
class TCP:
    """
    To a host's port.

    :param name: what errors call it.
    """

    def __init__(self, reactor: Any, host: str, port: int, name: str) -> None:
        # Without a timeout of its own, which would be kept by the reactor's clock, and that can be set: it would be
        # over too early, or never. Ours covers it.
        unlimited: Any = None
        # For an address there is nothing to look up, and no race to be run.
        kind: Any = HostnameEndpoint
        if isIPAddress(host) or isIPv6Address(host):
            kind = TCP6ClientEndpoint if ":" in host else TCP4ClientEndpoint
        self._endpoint = kind(reactor, host, port, timeout=unlimited)
        self._host = host
        self._name = name

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; fails with a TransportError. Cancelling drops what was opened."""
        connecting: Deferred[IProtocol] = self._endpoint.connect(protocolFactory)
        return connecting.addCallbacks(_send_at_once, self._failed)

    def _failed(self, failure: Failure) -> Failure:
        error = failure.value
        if isinstance(error, DNSLookupError):
            unknown = f"the name {self._host} has no address, or the name server did not answer"
            raise ConnectFailed(f"cannot connect to {self._name}: {unknown}") from None
        if isinstance(error, ConnectError):
            raise ConnectFailed(f"cannot connect to {self._name}: {words(error)}") from error
        return failure


@implementer(IStreamClientEndpoint)
class TLS:
    """
    Over another endpoint, with whoever must prove to be ``host``; the protocol is connected only then.

    :param pins: of keys, one of which has to be in the chain.
    :param observe: told what was agreed.
    :param refused: told when the peer refuses us, which it can do when the protocol is connected already.
    :param starting: called when the handshake begins.
    :param wrong: says of whom, or on what way, a handshake failed.
    """

    def __init__(
        self,
        reactor: Any,
        contexts: ContextSource,
        host: str,
        inner: IStreamClientEndpoint,
        *,
        pins: Collection[str] = (),
        observe: Callable[[TLSFacts], None],
        refused: Callable[[TLSFailed], None],
        starting: Callable[[], None],
        wrong: Callable[[str], str],
    ) -> None:
        self._reactor = reactor
        self._contexts = contexts
        # The trailing dot of an absolute name is for the resolver; certificates and SNI (RFC 6066) have none.
        self._host = host.rstrip(".")
        self._inner = inner
        self._pins = pins
        self._observe = observe
        self._refused = refused
        self._starting = starting
        self._wrong = wrong

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; fails with a TransportError. Cancelling drops what was opened."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        checked = CheckedConnections(self._contexts.current(), self._host)
        gates = GateFactory(factory, self._host, self._observe, pins=self._pins, refused=self._refused)
        gate: Any = await wrapClientTLS(checked, self._inner, clock=self._reactor).connect(gates)
        self._starting()
        opened: Deferred[IProtocol] = gate.opened
        try:
            return await opened
        except TLSFailed as error:
            said = self._wrong(error.fact)
            if said == error.fact:
                raise
            raise error.saying(said) from error


def _send_at_once(protocol: Any) -> Any:
    """
    Turn Nagle's algorithm off (RFC 1122 section 4.2.3.4).

    An ack and then a result are two small writes: with it, the second waits for the peer's delayed acknowledgement of
    the first, 40 ms on Linux.
    """
    set_no_delay = getattr(protocol.transport, "setTcpNoDelay", None)
    if set_no_delay is not None:
        set_no_delay(True)
    return protocol


def words(error: Exception) -> str:
    """Return what an operator needs to know of ``error``."""
    # A ConnectError's text begins with a sentence for its class; the system's own words say more.
    said = error.args[0] if isinstance(error, ConnectError) and error.args else None
    return said if isinstance(said, str) and said else str(error) or type(error).__name__
