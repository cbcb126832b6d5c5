"""
The way to a backend: name, addresses, TCP, TLS, identity.

HTTP and WebSocket connections are opened here and nowhere else, so both refuse the same peers, in the same words. Names
are resolved by the reactor's resolver, addresses tried side by side (RFC 8305), all of it under one deadline: a name
server or a peer that says nothing costs ``timeout`` seconds and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr.config import TLS
from commsmgr.errors import ConfigError, ConnectFailed, DeadlineExceeded, TLSFailed, TransportError
from commsmgr.instants import shown
from commsmgr.policy.burst import Burst
from commsmgr.transport.deadline import within
from commsmgr.transport.gate import CheckedConnections, GateFactory
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.tls import ContextSource
from commsmgr.urls import Target

__all__ = ["Dialer", "TLSFacts"]


class Dialer:
    """
    Opens every connection to a backend.

    :param reactor: IReactorTCP, IReactorTime and IReactorPluggableNameResolver.
    :param tls: how far a backend must prove who it is.
    :param observe_tls: told of each completed and accepted handshake; what it raises is logged and changes nothing.
    """

    log = Logger()

    def __init__(
        self, reactor: Any, tls: TLS, *, observe_tls: Callable[[Target, TLSFacts], None] | None = None
    ) -> None:
        self._reactor = reactor
        self._contexts = ContextSource(tls)
        self._pins = frozenset(tls.pins)
        self._observe_tls = observe_tls
        self._burst = Burst(reactor.seconds)

    def check(self) -> None:
        """
        Read the TLS files now, and log what is likely to be regretted.

        :raise ConfigError: it names the file and what is wrong with it.
        """
        self._contexts.load()
        for detail in self._contexts.warnings():
            self.log.warn("{detail}", event="tls.warning", detail=detail)

    def endpoint(self, target: Target, *, timeout: float) -> IStreamClientEndpoint:
        """
        Return a new endpoint for one attempt to reach ``target``.

        Its ``connect`` fails with :class:`~commsmgr.errors.ConnectFailed`, :class:`~commsmgr.errors.TLSFailed` or
        :class:`~commsmgr.errors.DeadlineExceeded`, in each case before any byte of the protocol was sent. Cancelling
        drops whatever had been opened and gives :class:`~twisted.internet.defer.CancelledError`.

        :param timeout: seconds for name, connection, TLS and identity together.
        """
        return _Endpoint(self._reactor, self._contexts, self._pins, target, timeout, self._observe, self._refused)

    def _observe(self, target: Target, facts: TLSFacts) -> None:
        self.log.debug(
            "{authority}: {version} {cipher}, certificate {subject}",
            event="tls.established",
            authority=target.authority,
            version=facts.version,
            cipher=facts.cipher,
            subject=facts.subject,
        )
        if self._observe_tls is not None:
            with self.log.failuresHandled("observer of TLS facts failed", event="tls.observer.failed"):
                self._observe_tls(target, facts)

    def _refused(self, target: Target, error: TLSFailed) -> None:
        held_back = self._burst.allow(f"{error.host} {error.check}")
        if held_back is not None:
            self.log.warn(
                "{authority}: TLS is refused ({check}): {error} ({suppressed} more like it before)",
                event="tls.refused",
                authority=target.authority,
                check=error.check,
                host=error.host,
                subject=error.subject,
                issuer=error.issuer,
                not_before=None if error.not_before is None else shown(error.not_before),
                not_after=None if error.not_after is None else shown(error.not_after),
                error=str(error),
                suppressed=held_back,
            )


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(
        self,
        reactor: Any,
        contexts: ContextSource,
        pins: frozenset[str],
        target: Target,
        timeout: float,
        observe: Callable[[Target, TLSFacts], None],
        refused: Callable[[Target, TLSFailed], None],
    ) -> None:
        self._reactor = reactor
        self._contexts = contexts
        self._pins = pins
        self._target = target
        self._timeout = timeout
        self._observe = observe
        self._refused = refused
        self._doing = "resolving its name or connecting"

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; see :meth:`Dialer.endpoint`."""
        connecting = within(self._reactor, self._timeout, self._connect(protocolFactory), self._expired)
        return connecting.addErrback(self._failed)

    def _failed(self, failure: Failure) -> Failure:
        if isinstance(failure.value, TLSFailed):
            self._refused(self._target, failure.value)
        return failure

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._target.authority} not reached within {self._timeout:g} s: still {self._doing}")

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        target = self._target
        try:
            # Without a timeout of its own, which would be kept by the reactor's clock, and that can be set: it would be
            # over too early, or never. Ours covers it.
            unlimited: Any = None
            tcp = HostnameEndpoint(self._reactor, target.host, target.port, timeout=unlimited)
            if not target.secure:
                protocol = await tcp.connect(factory)
                _send_at_once(protocol)
                return protocol
            # The trailing dot of an absolute name is for the resolver; certificates and SNI (RFC 6066) have none.
            host = target.host.rstrip(".")
            secured = wrapClientTLS(CheckedConnections(self._contexts.current(), host), tcp, clock=self._reactor)
            gates = GateFactory(
                factory,
                host,
                lambda facts: self._observe(target, facts),
                pins=self._pins,
                refused=lambda error: self._refused(target, error),
            )
            gate: Any = await secured.connect(gates)
            self._doing = "in the TLS handshake"
            _send_at_once(gate)
            opened: Deferred[IProtocol] = gate.opened
            return await opened
        except TransportError:
            raise
        except ConfigError as error:
            raise TLSFailed(str(error), check="files", host=target.host) from error
        except DNSLookupError:
            raise ConnectFailed(f"the name {target.host} has no address, or the name server did not answer") from None
        except Exception as error:
            raise ConnectFailed(f"cannot connect to {target.authority}: {_words(error)}") from error


def _send_at_once(protocol: Any) -> None:
    """
    Turn Nagle's algorithm off (RFC 1122 section 4.2.3.4).

    An ack and then a result are two small writes: with it, the second waits for the peer's delayed acknowledgement of
    the first, 40 ms on Linux.
    """
    set_no_delay = getattr(protocol.transport, "setTcpNoDelay", None)
    if set_no_delay is not None:
        set_no_delay(True)


def _words(error: Exception) -> str:
    # A ConnectError's text begins with a sentence for its class; the system's own words say more.
    said = error.args[0] if isinstance(error, ConnectError) and error.args else None
    return said if isinstance(said, str) and said else str(error) or type(error).__name__
