"""
The status page: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz`` for supervisors, ``/status`` for people.

It shows no secret and changes nothing, so it asks for no password; who may reach it is decided by ``observe.listen``,
and anything but loopback has to be said twice, by ``observe.public``. What an open port on loopback still has to fear
is a web page in a browser on the same machine (:mod:`commsmgr.browsers`): what another page has asked for is refused,
and a request that came in over a loopback address must name one in Host. An operator who listens elsewhere has
published the page, under names that are not known here: there Host may be anything, and by DNS rebinding somebody
outside may look at it through a browser within reach. There is nothing that could be changed.

Built on ``twisted.web.http`` directly: five fixed pages need no resource tree, no sessions, no access log with its
timer, and no Server field that tells versions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from ipaddress import ip_address
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort, IReactorTime
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.web import http
from twisted.web.http_headers import Headers

from commsmgr.browsers import is_foreign, names_loopback
from commsmgr.errors import ConfigError
from commsmgr.observe.health import explain, live, ready
from commsmgr.status import Status
from commsmgr.urls import Target, is_loopback, listen_address

_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>commsmgr</title></head><body><h1>commsmgr</h1><ul>
<li><a href="/metrics">/metrics</a>: for Prometheus
<li><a href="/healthz">/healthz</a>: 200 while the manager runs
<li><a href="/readyz">/readyz</a>: 200 while a backend can be reached, or else 503 and why not
<li><a href="/status">/status</a>: everything, as JSON
</ul></body></html>
"""
_MISDIRECTED = (421, b"Misdirected Request")  # RFC 9110 section 15.5.20, not known to twisted.web
_GUARDS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
)
"""What has a browser keep an answer to itself, without guessing, frames, scripts, or telling where one came from."""

_MOST_CONNECTIONS = 64
_IDLE_SECONDS = 30


class Answer(NamedTuple):
    """An HTTP answer: status code, media type, body."""

    code: int
    media_type: str
    body: bytes


class Pages:
    """The pages, and who may see them. No I/O."""

    def __init__(self, registry: CollectorRegistry, status: Callable[[], Status]) -> None:
        self._registry = registry
        self._status = status

    def answer(self, method: bytes, path: bytes, headers: Headers, local: str, version: bytes) -> Answer:
        """
        Return the answer to one request.

        :param headers: of which Host (RFC 9112 section 3.2), Origin and Sec-Fetch-Site count.
        :param local: the address of ours that the request came to.
        """
        hosts, origins, sites = (_values(headers, name) for name in (b"host", b"origin", b"sec-fetch-site"))
        if len(hosts) != 1 and (hosts or version != b"HTTP/1.0"):
            return _said(http.BAD_REQUEST, "expected one Host")
        if hosts and is_loopback(local) and not names_loopback(hosts[0]):
            return _said(_MISDIRECTED[0], "this is a loopback address: ask for localhost, 127.0.0.1 or [::1]")
        if is_foreign(f"http://{hosts[0] if hosts else ''}", origins, sites):
            return _said(http.FORBIDDEN, "another page has asked for this; who means it types the address")
        if method not in (b"GET", b"HEAD"):
            return _said(http.NOT_ALLOWED, "only GET and HEAD")
        match path:
            case b"/":
                return Answer(http.OK, "text/html; charset=utf-8", _INDEX.encode())
            case b"/metrics":
                return Answer(http.OK, _METRICS, generate_latest(self._registry))
            case b"/healthz":
                return self._verdict(live)
            case b"/readyz":
                return self._verdict(ready)
            case b"/status":
                return Answer(http.OK, "application/json", msgspec.json.encode(self._status()))
        return _said(http.NOT_FOUND, "no such page; / lists them")

    def _verdict(self, judge: Callable[[Status], bool]) -> Answer:
        status = self._status()
        return _said(http.OK if judge(status) else http.SERVICE_UNAVAILABLE, explain(status))


def _said(code: int, text: str) -> Answer:
    return Answer(code, _TEXT, text.encode("utf-8", "backslashreplace") + b"\n")


def _values(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1") for value in headers.getRawHeaders(name, [])]


class _Request(http.Request):
    _log = Logger()

    def __init__(self, pages: Pages, *args: Any) -> None:
        super().__init__(*args)
        self._pages = pages

    def gotLength(self, length: int | None) -> None:
        # No page takes a body: whatever somebody sends is not kept.
        self.content = _Nowhere()

    def process(self) -> None:
        request: Any = self  # most methods of twisted.web's have no types
        try:
            code, media_type, body = self._pages.answer(
                self.method, self.path, self.requestHeaders, request.getHost().host, self.clientproto
            )
        except Exception:
            self._log.failure("the status page {path!r} failed", event="site.failed", path=self.path)
            code, media_type, body = _said(http.INTERNAL_SERVER_ERROR, "this page failed; the log says why")
        self.setResponseCode(code, _MISDIRECTED[1] if code == _MISDIRECTED[0] else None)
        for name, value in (("Content-Type", media_type), ("Content-Length", str(len(body))), *_GUARDS):
            request.setHeader(name, value)
        if code == http.NOT_ALLOWED:
            request.setHeader("Allow", "GET, HEAD")
        request.write(body)  # to HEAD, twisted.web sends the fields alone
        request.finish()


class _Nowhere(BytesIO):
    def write(self, data: Any) -> int:
        return len(data)


class _HTTPFactory(http.HTTPFactory):
    noisy = False

    def __init__(self, pages: Pages, reactor: IReactorTime) -> None:
        super().__init__(timeout=_IDLE_SECONDS, reactor=reactor)
        self._pages = pages

    def buildProtocol(self, addr: IAddress | None) -> Any:
        channel: Any = super().buildProtocol(addr)
        channel.requestFactory = partial(_Request, self._pages)
        return channel

    def startFactory(self) -> None:
        """No access log: its clock would wake the process every second."""

    def stopFactory(self) -> None:
        """Nothing was started."""


class _Connections(WrappingFactory[ProtocolWrapper]):
    """Bounds how many there are, and can end them all."""

    noisy = False
    _gone: Deferred[None] | None = None

    def __init__(self, factory: _HTTPFactory) -> None:
        untyped: Any = super()
        untyped.__init__(factory)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        # None: Twisted closes the connection.
        return super().buildProtocol(addr) if len(self.protocols) < _MOST_CONNECTIONS else None

    def unregisterProtocol(self, p: ProtocolWrapper) -> None:
        untyped: Any = super()
        untyped.unregisterProtocol(p)
        gone = self._gone
        if gone is not None and not self.protocols:
            self._gone = None
            gone.callback(None)

    def abort(self) -> Deferred[None]:
        """End all connections now; fires when the last one is gone."""
        if not self.protocols:
            return succeed(None)
        self._gone = gone = Deferred[None]()
        for protocol in list(self.protocols):
            protocol.abortConnection()
        return gone


class StatusSite(Service):
    """
    Serves the status page while it runs.

    :param listen: ``observe.listen``: ``host:port`` with an IP address or ``localhost``, port 0 for any free one.
    :param registry: what ``/metrics`` shows.
    :param status: gives the state of the manager; it must be quick.
    :ivar port: the TCP port, once it is started; 0 before.
    :raise ConfigError: ``listen`` is no such address; from :meth:`startService`, it cannot be listened on.
    """

    log = Logger()

    def __init__(self, listen: str, *, reactor: Any, registry: CollectorRegistry, status: Callable[[], Status]) -> None:
        try:
            host, self._wanted = listen_address(listen)
            self._interface = "127.0.0.1" if host == "localhost" else str(ip_address(host))
        except ValueError as error:
            raise ConfigError(str(error), key="observe.listen") from None
        self.port = 0
        self._listen = listen
        self._reactor = reactor
        self._connections = _Connections(_HTTPFactory(Pages(registry, status), reactor))
        self._listening: IListeningPort | None = None

    def startService(self) -> None:
        """Listen."""
        try:
            listening = self._reactor.listenTCP(self._wanted, self._connections, interface=self._interface)
        except CannotListenError as error:
            raise ConfigError(
                f"cannot listen on {self._listen}: {error.socketError}; choose another port, stop the program that has "
                "this one, or listen on an address of this machine",
                key="observe.listen",
            ) from error
        untyped: Any = super()
        untyped.startService()
        self._listening = listening
        address: Any = listening.getHost()
        self.port = address.port
        self.log.info(
            "the status page is at http://{authority}/",
            event="site.started",
            authority=Target("http", self._interface, self.port, "/").authority,
        )

    def stopService(self) -> Deferred[None]:
        """Stop listening and end all connections; fires when none is left."""
        untyped: Any = super()
        untyped.stopService()
        listening, self._listening, self.port = self._listening, None, 0
        if listening is None:
            return succeed(None)
        return maybeDeferred(listening.stopListening).addCallback(lambda _: self._connections.abort())
