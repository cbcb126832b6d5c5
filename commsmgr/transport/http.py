"""
The HTTP side of a backend: exchanges, one deadline over each, and how many there may be at once.

Whether a status is a success, and whether to try again, is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from commsmgr import config
from commsmgr.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    PeerViolation,
    TLSFailed,
    TokenError,
    UsageError,
)
from commsmgr.headers import mistake, token_mistake
from commsmgr.transport.body import gzipped
from commsmgr.transport.call import Call, HTTPResponse
from commsmgr.transport.deadline import within
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.pool import GRACE, Pool
from commsmgr.urls import Target

__all__ = ["Exchange", "HTTPClient", "HTTPResponse"]

_COMPRESS_ABOVE: Final = 1024
_EXCHANGES_PER_CONNECTION: Final = 4

# Reserved for the settings, but a caller knows best what its body is and which request it repeats.
_CALLERS_FIELDS: Final = frozenset({"content-type", "idempotency-key"})

_OUTCOMES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ConnectFailed, "connect_failed"),
    (TLSFailed, "tls_failed"),
    (DeadlineExceeded, "deadline"),
    (ConnectionEnded, "ended"),
    (PeerViolation, "violation"),
    (CancelledError, "cancelled"),
)


class Exchange(Struct, frozen=True):
    """
    What an exchange cost, for metrics.

    :ivar route: the path it was asked for, without a query.
    :ivar outcome: ``2xx`` (``1xx`` to ``9xx``), ``connect_failed``, ``tls_failed``, ``deadline``, ``ended``,
        ``violation``, ``cancelled``, or ``error`` for a request that could not be made.
    :ivar seconds: from the call to its end, the wait for a free place included.
    :ivar bytes_out: of the body as handed to the network, compressed if it was; ``bytes_in`` of the answer's body.
    """

    method: str
    route: str
    outcome: str
    seconds: float
    bytes_out: int
    bytes_in: int


class HTTPClient:
    """
    Exchanges with one backend.

    At most ``4 * settings.connections`` are under way at once, further ones wait for a place; ``settings.connections``
    connections are kept for the next ones.

    :param reactor: what the :class:`~commsmgr.transport.dialer.Dialer` needs.
    :param on_exchange: told of each exchange that is over; what it raises is logged and changes nothing.
    :raise ConfigError: ``settings.headers`` has a field that cannot be sent.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        dialer: Dialer,
        settings: config.HTTP,
        *,
        on_exchange: Callable[[Exchange], None] | None = None,
        user_agent: str = "commsmgr",
    ) -> None:
        if wrong := mistake(settings.headers):
            raise ConfigError(wrong, key="http.headers")
        self._reactor = reactor
        self._dialer = dialer
        self._settings = settings
        self._on_exchange = on_exchange
        self._user_agent = user_agent
        self._pool = Pool(reactor, settings.connections)
        self._places = DeferredSemaphore(settings.connections * _EXCHANGES_PER_CONNECTION)
        self._running: dict[Deferred[HTTPResponse], None] = {}  # in order, which a set has not

    def exchange(
        self,
        method: str,
        target: Target,
        path: str,
        *,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: Mapping[str, str] = MappingProxyType({}),
        token: str = "",
        timeout: float | None = None,
    ) -> Deferred[HTTPResponse]:
        """
        Send one request, once, and return its answer, whatever the status.

        :param path: begins with a slash, percent-encoded, perhaps with a query; it is put below ``target``.
        :param content_type: of the body, unless ``headers`` say it.
        :param headers: further fields, before those of the settings.
        :param token: sent as ``Authorization: Bearer`` (RFC 6750); empty for none.
        :param timeout: seconds for everything: the wait for a place, name, connection, TLS, headers and body. None for
            ``settings.timeout``.

        The Deferred fails with

        - :class:`~commsmgr.errors.ConnectFailed`, :class:`~commsmgr.errors.TLSFailed`: nothing was sent;
        - :class:`~commsmgr.errors.DeadlineExceeded`: its ``may_have_arrived`` says whether something was sent;
        - :class:`~commsmgr.errors.ConnectionEnded`: the connection ended before the answer was complete;
        - :class:`~commsmgr.errors.PeerViolation`: the answer is malformed, too large, encoded or of unknown length;
        - :class:`~commsmgr.errors.UsageError`, :class:`~commsmgr.errors.TokenError`: it cannot be a request;
        - :class:`~twisted.internet.defer.CancelledError`: it was cancelled, by the caller or by :meth:`close`. The
          connection is dropped at once; the request may have arrived if it had been sent.
        """
        seconds = self._settings.timeout if timeout is None else timeout
        began = self._reactor.seconds()
        call = Call(self._reactor, self._pool, self._dialer, method, target, path, began + seconds)
        result = within(
            self._reactor,
            seconds,
            self._exchange(call, body, content_type, headers, token),
            lambda: call.expired(seconds),
        )
        self._running[result] = None

        def ended(value: HTTPResponse | Failure) -> HTTPResponse | Failure:
            self._running.pop(result, None)
            self._report(call, value, self._reactor.seconds() - began)
            return value

        return result.addBoth(ended)

    def close(self, within: float = GRACE) -> Deferred[None]:
        """
        Cancel what is under way and close all connections. The client can be used again afterwards.

        Fires when nothing of it is left on the reactor, after ``within`` seconds at the latest.
        """
        for exchange in list(self._running):
            exchange.cancel()
        return Deferred.fromCoroutine(self._pool.close(min(within, GRACE)))

    async def _exchange(
        self, call: Call, body: bytes, content_type: str, headers: Mapping[str, str], token: str
    ) -> HTTPResponse:
        if wrong := mistake(headers, own=_CALLERS_FIELDS):
            raise UsageError(wrong)
        if token and (wrong := token_mistake(token)):
            raise TokenError(f"the token {wrong}")
        call.check()
        await self._places.acquire()
        try:
            fields = self._fields(call.host, headers, token)
            if body and not fields.hasHeader("Content-Type"):
                fields.setRawHeaders("Content-Type", [content_type])
            if self._settings.compress and len(body) > _COMPRESS_ABOVE:
                body = await gzipped(self._reactor, body)
                fields.setRawHeaders("Content-Encoding", ["gzip"])
            return await call.run(fields, body, self._settings.max_response_bytes)
        finally:
            self._places.release()

    def _fields(self, host: str, headers: Mapping[str, str], token: str) -> Headers:
        fields = Headers({"Host": [host], "User-Agent": [self._user_agent], "Accept": ["application/json"]})
        for name, value in (*self._settings.headers.items(), *headers.items()):
            fields.setRawHeaders(name, [value])
        if token:
            fields.setRawHeaders("Authorization", [f"Bearer {token}"])
        return fields

    def _report(self, call: Call, value: HTTPResponse | Failure, seconds: float) -> None:
        if self._on_exchange is None:
            return
        if isinstance(value, Failure):
            outcome = next((name for kind, name in _OUTCOMES if isinstance(value.value, kind)), "error")
        else:
            outcome = f"{value.status // 100}xx"
        try:
            self._on_exchange(Exchange(call.method, call.route, outcome, seconds, call.bytes_out, call.bytes_in))
        except Exception:
            self.log.failure("observer of HTTP exchanges failed", event="http.observer.failed")
