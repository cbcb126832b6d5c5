"""
The way to a backend: name, addresses, TCP, a proxy, TLS, identity.

HTTP and WebSocket connections are opened here and nowhere else, so both refuse the same peers, in the same words, and
both obey the same choice of proxies. Names are resolved by the reactor's resolver, addresses tried side by side (RFC
8305), all of it under one deadline: a name server or a peer that says nothing costs ``timeout`` seconds and no more.

::

    TCP ----------------------------------------------> [TLS with the backend]
    TCP to the proxy -> [TLS with the proxy] -> CONNECT -> [TLS with the backend]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import Logger
from zope.interface import implementer

from commsmgr.config import TLS
from commsmgr.errors import ConfigError, ConnectFailed, DeadlineExceeded, TLSFailed, TransportError
from commsmgr.proxies import Proxy
from commsmgr.transport.deadline import within
from commsmgr.transport.gate import CheckedConnections, GateFactory
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.proxy import ProxiedEndpoint
from commsmgr.transport.tls import ContextSource
from commsmgr.transport.tunnel import authority
from commsmgr.urls import Target

__all__ = ["Dialer", "TLSFacts"]


SOONER: Final = 0.05
"""
Seconds by which an attempt ends before its time is over. Whoever waits has a deadline for the same moment, and could
only say that there is no connection: what was being waited for, and at whose door, is known here.
"""


class Dialer:
    """
    Opens every connection to a backend.

    :param reactor: IReactorTCP, IReactorTime and IReactorPluggableNameResolver.
    :param tls: how far a backend, and a proxy to which TLS is spoken, must prove who it is.
    :param observe_tls: told of each completed and accepted handshake with a backend; what it raises is logged and
        changes nothing.
    :param proxy: says through which proxy a target is reached; None for none.
    :param user_agent: how the agent calls itself to a proxy.
    :param wall: seconds since the epoch, for dates that a proxy sends.
    :param secret: told of a proxy's password before it is sent.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        tls: TLS,
        *,
        observe_tls: Callable[[Target, TLSFacts], None] | None = None,
        proxy: Callable[[Target], Proxy | None] = lambda target: None,
        user_agent: str = "commsmgr",
        wall: Callable[[], float] = time.time,
        secret: Callable[[str], None] = lambda secret: None,
    ) -> None:
        self._reactor = reactor
        self._contexts = ContextSource(tls)
        # The agent's certificate says to backends who it is. A proxy need not know.
        self._proxy_contexts = ContextSource(msgspec.structs.replace(tls, certificate="", key=""))
        self._observe_tls = observe_tls
        self._proxy = proxy
        self._user_agent = user_agent
        self._wall = wall
        self._secret = secret

    def check(self) -> None:
        """
        Read the TLS files now.

        :raise ConfigError: it names the file and what is wrong with it.
        """
        self._contexts.load()

    def prepare(self, targets: Mapping[Target, str]) -> None:
        """
        Log which backend is reached through which proxy, and read the TLS files if any connection needs them.

        :param targets: the backends' names.
        :raise ConfigError: a file cannot be used, or what the environment says of proxies cannot.
        """
        needed = False
        for target, name in targets.items():
            proxy = self._proxy(target)
            if proxy is not None:
                self.log.info(
                    "{backend}: {scheme} goes through the proxy {proxy} ({origin})",
                    event="proxy.chosen",
                    backend=name,
                    scheme=target.scheme,
                    proxy=proxy.url,
                    origin=proxy.origin,
                )
            needed = needed or target.secure or (proxy is not None and proxy.target.secure)
        # Without TLS anywhere there is nothing to load, and a fleet in one process is spared 13 ms each.
        if needed:
            self.check()

    def endpoint(self, target: Target, *, timeout: float) -> IStreamClientEndpoint:
        """
        Return a new endpoint for one attempt to reach ``target``.

        Its ``connect`` fails with :class:`~commsmgr.errors.ConnectFailed`, :class:`~commsmgr.errors.TLSFailed` or
        :class:`~commsmgr.errors.DeadlineExceeded`, in each case before any byte of the protocol was sent. Cancelling
        drops whatever had been opened and gives :class:`~twisted.internet.defer.CancelledError`.

        :param timeout: seconds for name, connection, TLS and identity together.
        """
        return _Endpoint(self._reactor, target, timeout, self._way)

    def _way(self, target: Target, doing: Callable[[str], None]) -> IStreamClientEndpoint:
        """Return the layers between the reactor and the protocol, without the deadline."""
        proxy = self._proxy(target)
        if proxy is None:
            way: IStreamClientEndpoint = _TCP(self._reactor, target.host, target.port, target.authority)
        else:
            way = ProxiedEndpoint(
                self._way_to(proxy, target, doing),
                proxy,
                authority(target.host, target.port),
                user_agent=self._user_agent,
                wall=self._wall,
                secret=self._secret,
                doing=doing,
            )
        if not target.secure:
            return way
        return _TLS(
            self._reactor,
            self._contexts,
            target.host,
            way,
            observe=lambda facts: self._observe(target, facts),
            starting=lambda: doing("in the TLS handshake" + (f" through the proxy {proxy.url}" if proxy else "")),
            wrong=lambda fact: f"{fact}; it was spoken to through the proxy {proxy.url}" if proxy else fact,
        )

    def _way_to(self, proxy: Proxy, target: Target, doing: Callable[[str], None]) -> IStreamClientEndpoint:
        name = f"the proxy {proxy.url}"
        named = f"{name} on the way to {target.authority}"
        doing(f"resolving the name of {name} or connecting to it")
        way = _TCP(self._reactor, proxy.target.host, proxy.target.port, named)
        if not proxy.target.secure:
            return way
        return _TLS(
            self._reactor,
            self._proxy_contexts,
            proxy.target.host,
            way,
            observe=lambda facts: self._log(proxy.url, facts),
            starting=lambda: doing(f"in the TLS handshake with {name}"),
            wrong=lambda fact: f"TLS with {named}: {fact}",
        )

    def _observe(self, target: Target, facts: TLSFacts) -> None:
        self._log(target.authority, facts)
        if self._observe_tls is not None:
            with self.log.failuresHandled("observer of TLS facts failed", event="tls.observer.failed"):
                self._observe_tls(target, facts)

    def _log(self, authority: str, facts: TLSFacts) -> None:
        self.log.debug(
            "{authority}: {version} {cipher}, certificate {subject}",
            event="tls.established",
            authority=authority,
            version=facts.version,
            cipher=facts.cipher,
            subject=facts.subject,
        )


@implementer(IStreamClientEndpoint)
class _Endpoint:
    """One attempt: all layers, under the deadline."""

    def __init__(
        self,
        reactor: Any,
        target: Target,
        timeout: float,
        way: Callable[[Target, Callable[[str], None]], IStreamClientEndpoint],
    ) -> None:
        self._reactor = reactor
        self._target = target
        self._timeout = timeout
        self._doing = "resolving its name or connecting"
        self._way = way

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; see :meth:`Dialer.endpoint`."""
        seconds = self._timeout - min(SOONER, self._timeout / 2)
        return within(self._reactor, seconds, self._connect(protocolFactory), self._expired)

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._target.authority} not reached within {self._timeout:g} s: still {self._doing}")

    def _does(self, what: str) -> None:
        self._doing = what

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            return await self._way(self._target, self._does).connect(factory)
        except TransportError:
            raise
        except ConfigError as error:
            raise TLSFailed(str(error)) from error
        except Exception as error:
            raise ConnectFailed(f"cannot connect to {self._target.authority}: {_words(error)}") from error


@implementer(IStreamClientEndpoint)
class _TCP:
    """To a host's port; ``name`` is what errors call it."""

    def __init__(self, reactor: Any, host: str, port: int, name: str) -> None:
        # Without a timeout of its own, which would be kept by the reactor's clock, and that can be set: it would be
        # over too early, or never. Ours covers it.
        unlimited: Any = None
        self._endpoint = HostnameEndpoint(reactor, host, port, timeout=unlimited)
        self._host = host
        self._name = name

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            protocol = await self._endpoint.connect(factory)
        except DNSLookupError:
            unknown = f"the name {self._host} has no address, or the name server did not answer"
            raise ConnectFailed(f"cannot connect to {self._name}: {unknown}") from None
        except ConnectError as error:
            raise ConnectFailed(f"cannot connect to {self._name}: {_words(error)}") from error
        _send_at_once(protocol)
        return protocol


@implementer(IStreamClientEndpoint)
class _TLS:
    """
    Over another endpoint, with whoever must prove to be ``host``.

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
        observe: Callable[[TLSFacts], None],
        starting: Callable[[], None],
        wrong: Callable[[str], str],
    ) -> None:
        self._reactor = reactor
        self._contexts = contexts
        # The trailing dot of an absolute name is for the resolver; certificates and SNI (RFC 6066) have none.
        self._host = host.rstrip(".")
        self._inner = inner
        self._observe = observe
        self._starting = starting
        self._wrong = wrong

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        checked = CheckedConnections(self._contexts.current(), self._host)
        gate: Any = await wrapClientTLS(checked, self._inner, clock=self._reactor).connect(
            GateFactory(factory, self._host, self._observe)
        )
        self._starting()
        opened: Deferred[IProtocol] = gate.opened
        try:
            return await opened
        except TLSFailed as error:
            raise TLSFailed(self._wrong(error.fact)) from error


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
