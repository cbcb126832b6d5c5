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
from functools import cached_property
from typing import Any, Final

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr import config
from commsmgr.errors import ConfigError, ConnectFailed, DeadlineExceeded, TLSFailed, TransportError
from commsmgr.instants import shown
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.proxies import Proxy
from commsmgr.transport.deadline import within
from commsmgr.transport.layers import TCP, TLS, words
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.proxy import ProxiedEndpoint
from commsmgr.transport.proxy_connect import authority
from commsmgr.transport.tls import ContextSource
from commsmgr.urls import Target

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
    :param proxy: says through which proxy a target is reached; None for none. Asked once for each target, whatever
        becomes of the process's environment meanwhile.
    :param user_agent: how the agent calls itself to a proxy.
    :param wall: seconds since the epoch, for dates that a proxy sends.
    :param secret: told of a proxy's password before it is sent.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        tls: config.TLS,
        *,
        observe_tls: Callable[[Target, TLSFacts], None] | None = None,
        proxy: Callable[[Target], Proxy | None] = lambda target: None,
        user_agent: str = "commsmgr",
        wall: Callable[[], float] = time.time,
        secret: Callable[[str], None] = lambda secret: None,
    ) -> None:
        self._reactor = reactor
        self._tls = tls
        # Like the agent's certificate, pins are for backends.
        self._pins = frozenset(tls.pins)
        self._observe_tls = observe_tls
        self._choose_proxy = proxy
        self._proxies: dict[Target, Proxy | None] = {}
        self._user_agent = user_agent
        self._wall = wall
        self._secret = secret
        self._throttle = LogThrottle(reactor.seconds)

    @cached_property
    def _contexts(self) -> ContextSource:
        return ContextSource(self._tls)

    @cached_property
    def _proxy_contexts(self) -> ContextSource:
        # The agent's certificate says to backends who it is. A proxy need not know.
        return ContextSource(msgspec.structs.replace(self._tls, certificate="", key=""))

    def _proxy(self, target: Target) -> Proxy | None:
        if target not in self._proxies:
            self._proxies[target] = self._choose_proxy(target)
        return self._proxies[target]

    def check(self) -> None:
        """
        Read the TLS files now.

        :raise ConfigError: it names the file and what is wrong with it.
        """
        self._contexts.load()
        for detail in self._contexts.warnings():
            self.log.warn("{detail}", event="tls.warning", detail=detail)

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
        return _Endpoint(self._reactor, target, timeout, self._way, self._refused)

    def _way(self, target: Target, doing: Callable[[str], None]) -> IStreamClientEndpoint:
        """Return the layers between the reactor and the protocol, without the deadline."""
        proxy = self._proxy(target)
        if proxy is None:
            way: IStreamClientEndpoint = TCP(self._reactor, target.host, target.port, target.authority)
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
        return TLS(
            self._reactor,
            self._contexts,
            target.host,
            way,
            pins=self._pins,
            observe=lambda facts: self._observe(target, facts),
            refused=lambda error: self._refused(target, error),
            starting=lambda: doing("in the TLS handshake" + (f" through the proxy {proxy.url}" if proxy else "")),
            wrong=lambda fact: f"{fact}; it was spoken to through the proxy {proxy.url}" if proxy else fact,
        )

    def _way_to(self, proxy: Proxy, target: Target, doing: Callable[[str], None]) -> IStreamClientEndpoint:
        name = f"the proxy {proxy.url}"
        named = f"{name} on the way to {target.authority}"
        doing(f"resolving the name of {name} or connecting to it")
        way = TCP(self._reactor, proxy.target.host, proxy.target.port, named)
        if not proxy.target.secure:
            return way
        return TLS(
            self._reactor,
            self._proxy_contexts,
            proxy.target.host,
            way,
            observe=lambda facts: self._log(proxy.url, facts),
            refused=lambda error: self._refused(target, error),
            starting=lambda: doing(f"in the TLS handshake with {name}"),
            wrong=lambda fact: f"TLS with {named}: {fact}",
        )

    def _observe(self, target: Target, facts: TLSFacts) -> None:
        self._log(target.authority, facts)
        if self._observe_tls is not None:
            with self.log.failuresHandled("observer of TLS facts failed", event="tls.observer.failed"):
                self._observe_tls(target, facts)

    def _refused(self, target: Target, error: TLSFailed) -> None:
        held_back = self._throttle.allow(f"{error.host} {error.check}")
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
        refused: Callable[[Target, TLSFailed], None],
    ) -> None:
        self._reactor = reactor
        self._target = target
        self._timeout = timeout
        self._doing = "resolving its name or connecting"
        self._way = way
        self._refused = refused

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; see :meth:`Dialer.endpoint`."""
        seconds = self._timeout - min(SOONER, self._timeout / 2)
        connecting = within(self._reactor, seconds, self._connect(protocolFactory), self._expired)
        return connecting.addErrback(self._failed)

    def _failed(self, failure: Failure) -> Failure:
        if isinstance(failure.value, TLSFailed):
            self._refused(self._target, failure.value)
        return failure

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
            raise TLSFailed(str(error), check="files", host=self._target.host) from error
        except Exception as error:
            raise ConnectFailed(f"cannot connect to {self._target.authority}: {words(error)}") from error
