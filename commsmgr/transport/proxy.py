"""
A connection through an HTTP proxy: CONNECT, after which it hands on bytes in both directions (RFC 9110 section 9.3.6).

The tunnel takes the place of the protocol that is to be connected, as the gate does (:mod:`commsmgr.transport.gate`):
that one is built only when the proxy has opened the way. So nothing but the CONNECT request, with host and port, is
said to the proxy, and whatever fails here is safe to try again. What is connected through the tunnel is TLS with the
backend, by the backend's name, or, for ``http://`` and ``ws://``, the conversation itself.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr.errors import ConnectFailed, ProxyRefused, TransportError
from commsmgr.proxies import MAX_PASSWORD, Proxy, credential_mistake
from commsmgr.transport.answer_head import Head
from commsmgr.transport.proxy_connect import basic, is_success, read_answer, refusal, request


def password_of(proxy: Proxy) -> str:
    """
    Return the password for ``proxy``, read from its file if it has one.

    :raise ConnectFailed: the file cannot be read, or holds no password.
    """
    if not proxy.password_file:
        return proxy.password
    try:
        if not stat.S_ISREG(os.stat(proxy.password_file).st_mode):
            # Opening a pipe would block.
            raise OSError(None, "it is no regular file")
        with open(proxy.password_file, "rb") as file:
            password = file.read(MAX_PASSWORD + 1).decode().rstrip("\r\n")
    except OSError as error:
        raise ConnectFailed(f"proxy.password_file {proxy.password_file!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConnectFailed(f"proxy.password_file {proxy.password_file!r} is not UTF-8 text") from None
    if len(password) > MAX_PASSWORD:
        raise ConnectFailed(f"proxy.password_file {proxy.password_file!r} holds more than {MAX_PASSWORD} characters")
    if wrong := credential_mistake(proxy.username, password):
        raise ConnectFailed(f"proxy.password_file {proxy.password_file!r}: {wrong}")
    return password


class Tunnel(Protocol):
    """
    Asks a proxy for a way, in place of the protocol that ``factory`` will build; afterwards it only hands on.

    :param asked: what is asked of whom, for errors.
    :param request: the request to send.
    :param refused: makes the error for an answer that opens no way.
    :ivar opened: fires with that protocol, connected; fails with :class:`~commsmgr.errors.ProxyRefused`,
        :class:`~commsmgr.errors.ConnectFailed`, or with what the factory raised. Cancelling drops the connection.
    """

    transport: Any  # TCP, or TLS to the proxy

    def __init__(
        self,
        factory: IProtocolFactory,
        address: IAddress,
        *,
        asked: str,
        request: bytes,
        refused: Callable[[Head], ProxyRefused],
    ) -> None:
        self._factory = factory
        self._address = address
        self._asked = asked
        self._request = request
        self._refused = refused
        self._head = b""
        self._protocol: IProtocol | None = None
        self.opened: Deferred[IProtocol] = Deferred(lambda _: self.transport.abortConnection())

    def connectionMade(self) -> None:
        """The proxy is there: ask."""
        self.transport.write(self._request)

    def dataReceived(self, data: bytes) -> None:
        """A part of the proxy's answer came, or, through the open tunnel, of what the backend says."""
        if self._protocol is not None:
            self._protocol.dataReceived(data)
        elif not self.opened.called:
            self._head += data
            try:
                if self._is_answered():
                    self._open()
            except Exception:
                self.transport.abortConnection()
                self.opened.errback()

    def _is_answered(self) -> bool:
        try:
            answer = read_answer(self._head)
        except ValueError as error:
            raise ProxyRefused(f"{self._asked} was answered with {error}") from None
        if answer is None:
            return False
        if not is_success(answer):
            raise self._refused(answer)
        if len(self._head) > answer.end:
            # Nobody speaks before we do. Handed on, it would be the proxy's word in the backend's mouth.
            raise ProxyRefused(f"{self._asked} was answered with {answer.status} and more than that: it is no tunnel")
        return True

    def _open(self) -> None:
        protocol = self._factory.buildProtocol(self._address)
        if protocol is None:
            raise ConnectionLost("the factory built no protocol")
        self._protocol = protocol
        protocol.makeConnection(self.transport)
        self.opened.callback(protocol)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        if self._protocol is not None:
            self._protocol.connectionLost(reason)
        elif not self.opened.called:
            closed = ConnectFailed(f"{self._asked} was not answered: the connection was closed")
            # The gate before a proxy with TLS may know better: that it wants a certificate, say.
            self.opened.errback(reason if reason.check(TransportError) else closed)


class _Tunnels(Factory):
    noisy = False

    def __init__(self, factory: IProtocolFactory, build: Callable[[IAddress], Tunnel]) -> None:
        self._factory = factory
        self._build = build

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> Tunnel:  # type: ignore[override]  # ours always has an address
        return self._build(addr)


@implementer(IStreamClientEndpoint)
class ProxiedEndpoint:
    """
    The way through one proxy to one backend.

    :param inner: the way to the proxy itself.
    :param wanted: host and port of the backend (:func:`commsmgr.transport.proxy_connect.authority`).
    :param wall: seconds since the epoch, for dates in Retry-After.
    :param secret: told of the password, in each form that it travels in, before it is sent: a proxy may quote it.
    :param doing: told what is being waited for.
    """

    def __init__(
        self,
        inner: IStreamClientEndpoint,
        proxy: Proxy,
        wanted: str,
        *,
        user_agent: str,
        wall: Callable[[], float],
        secret: Callable[[str], None],
        doing: Callable[[str], None],
    ) -> None:
        self._inner = inner
        self._proxy = proxy
        self._wanted = wanted
        self._user_agent = user_agent
        self._wall = wall
        self._secret = secret
        self._doing = doing

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; fails as :class:`Tunnel` does, and the way to the proxy."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        credentials = self._credentials()
        asked = f"CONNECT {self._wanted} at the proxy {self._proxy.url}"
        sent = request(self._wanted, self._user_agent, credentials)

        def refused(answer: Head) -> ProxyRefused:
            return refusal(asked, answer, credentials=bool(credentials), now=self._wall())

        def build(address: IAddress) -> Tunnel:
            return Tunnel(factory, address, asked=asked, request=sent, refused=refused)

        tunnel: Any = await self._inner.connect(_Tunnels(factory, build))
        self._doing(f"waiting for the proxy {self._proxy.url} to answer CONNECT")
        opened: Deferred[IProtocol] = tunnel.opened
        return await opened

    def _credentials(self) -> str:
        if not (self._proxy.username or self._proxy.password):
            return ""
        password = password_of(self._proxy)
        credentials = basic(self._proxy.username, password)
        self._secret(password)
        self._secret(credentials.removeprefix("Basic "))
        return credentials
