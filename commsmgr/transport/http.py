"""
One HTTP exchange with a backend: a request, its whole answer, one deadline over both.

treq and twisted.web do the work; this module takes away what they would do unasked (follow redirects, keep cookies,
unpack gzip without bound, repeat requests, wait for ever) and turns their errors into ours. Whether a status is a
success, and whether to try again, is decided by the caller.

Each exchange has a treq client and an agent of its own, which cost next to nothing. They share the pool of connections,
and nothing else: no cookie outlives an exchange, and the exchange knows the connection it was given. That is how it
knows whether a byte was sent, and how it can drop a connection whose answer nobody waits for any more.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from hyperlink import EncodedURL
from msgspec import Struct
from treq.client import HTTPClient as TreqClient
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IAgentEndpointFactory, IBodyProducer, IResponse
from zope.interface import implementer

from commsmgr import config
from commsmgr.errors import (
    CommsError,
    ConfigError,
    ConnectFailed,
    ConnectionEnded,
    DeadlineExceeded,
    PeerViolation,
    TLSFailed,
    TokenError,
    UsageError,
)
from commsmgr.transport.body import BodyCollector, BytesProducer, gzipped, too_large
from commsmgr.transport.deadline import within
from commsmgr.transport.endpoint import Dialer
from commsmgr.transport.headers import mistake, token_mistake
from commsmgr.transport.pool import Connection, Pool
from commsmgr.urls import Target

_COMPRESS_ABOVE: Final = 1024
_EXCHANGES_PER_CONNECTION: Final = 4

_OUTCOMES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ConnectFailed, "connect_failed"),
    (TLSFailed, "tls_failed"),
    (DeadlineExceeded, "deadline"),
    (ConnectionEnded, "ended"),
    (PeerViolation, "violation"),
    (CancelledError, "cancelled"),
)


class HTTPResponse(Struct, frozen=True):
    """
    A complete answer.

    :ivar headers: names in lower case; fields that came several times are joined with commas (RFC 9110 section 5.3).
    :ivar elapsed: seconds from the call to the last byte of the body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    elapsed: float


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

    :param reactor: what the :class:`~commsmgr.transport.endpoint.Dialer` needs.
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
        self._running: set[Deferred[HTTPResponse]] = set()

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
        call = _Call(self._reactor, self._pool, self._dialer, method, target, path, began + seconds)
        result = within(
            self._reactor,
            seconds,
            self._exchange(call, body, content_type, headers, token),
            lambda: call.expired(seconds),
        )
        self._running.add(result)

        def ended(value: HTTPResponse | Failure) -> HTTPResponse | Failure:
            self._running.discard(result)
            self._report(call, value, self._reactor.seconds() - began)
            return value

        return result.addBoth(ended)

    def close(self) -> Deferred[None]:
        """
        Cancel what is under way and close all connections. The client can be used again afterwards.

        Fires when nothing of it is left on the reactor, after a second at the latest.
        """
        for exchange in list(self._running):
            exchange.cancel()
        return Deferred.fromCoroutine(self._pool.close())

    async def _exchange(
        self, call: _Call, body: bytes, content_type: str, headers: Mapping[str, str], token: str
    ) -> HTTPResponse:
        fields = self._fields(headers, token)
        call.check()
        await self._places.acquire()
        try:
            if body:
                fields.setRawHeaders("Content-Type", [content_type])
            if self._settings.compress and len(body) > _COMPRESS_ABOVE:
                body = await gzipped(self._reactor, body)
                fields.setRawHeaders("Content-Encoding", ["gzip"])
            return await call.run(fields, body, self._settings.max_response_bytes)
        finally:
            self._places.release()

    def _fields(self, headers: Mapping[str, str], token: str) -> Headers:
        if wrong := mistake(headers):
            raise UsageError(wrong)
        if wrong := token_mistake(token):
            raise TokenError(wrong)
        fields = Headers({"User-Agent": [self._user_agent], "Accept": ["application/json"]})
        for name, value in (*self._settings.headers.items(), *headers.items()):
            fields.setRawHeaders(name, [value])
        if token:
            fields.setRawHeaders("Authorization", [f"Bearer {token}"])
        return fields

    def _report(self, call: _Call, value: HTTPResponse | Failure, seconds: float) -> None:
        if self._on_exchange is None:
            return
        if isinstance(value, Failure):
            outcome = next((name for kind, name in _OUTCOMES if isinstance(value.value, kind)), "error")
        else:
            outcome = f"{value.status // 100}xx"
        with self.log.failuresHandled("observer of HTTP exchanges failed", event="http.observer.failed"):
            self._on_exchange(Exchange(call.method, call.route, outcome, seconds, call.bytes_out, call.bytes_in))


class _WireURL(EncodedURL):
    # A Target is encoded already, and hyperlink cannot encode an IPv6 literal.
    def to_uri(self) -> _WireURL:
        return self


@implementer(IAgent, IAgentEndpointFactory, IStreamClientEndpoint)
class _Call:
    """One exchange: an agent for treq, and the endpoint of that agent."""

    def __init__(
        self, reactor: Any, pool: Pool, dialer: Dialer, method: str, target: Target, path: str, deadline: float
    ) -> None:
        self.method = method
        self.route = path.partition("?")[0]
        self._reactor = reactor
        self._pool = pool
        self._dialer = dialer
        self._target = target
        self._path = path
        self._deadline = deadline
        self._began = reactor.seconds()
        self._doing = "waiting for another exchange to end"
        self._connection: Connection | None = None
        self._producer = BytesProducer(b"")
        self._collector = BodyCollector(0)

    @property
    def bytes_out(self) -> int:
        return self._producer.written

    @property
    def bytes_in(self) -> int:
        return self._collector.received

    def check(self) -> None:
        if not (self.method.isascii() and self.method.isalpha() and self.method.isupper()):
            raise UsageError(f"{self.method!r} is not an HTTP method")
        path = self._path
        if not path.startswith("/") or "#" in path or not all("!" <= character <= "~" for character in path):
            raise UsageError(f"{path!r} is not a path: it begins with a slash, percent-encoded, without fragment")

    def expired(self, seconds: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self} took longer than {seconds:g} s: still {self._doing}",
            may_have_arrived=self._connection is not None,
        )

    def __str__(self) -> str:
        return f"{self.method} {self._target.authority}{self.route}"

    async def run(self, fields: Headers, body: bytes, limit: int) -> HTTPResponse:
        self._producer = BytesProducer(body)
        self._collector = BodyCollector(limit)
        self._doing = "connecting"
        try:
            response = await TreqClient(self).request(
                self.method,
                _WireURL.from_text(self._target.join(self._path)),
                headers=fields,
                data=self._producer if body else None,
                allow_redirects=False,
                unbuffered=True,
                reactor=self._reactor,
            )
            if response.length is not UNKNOWN_LENGTH and response.length > limit:
                raise too_large(limit)
            self._doing = "reading the answer"
            response.deliverBody(self._collector)
            content = await self._collector.body
        except Exception as error:
            self._drop()
            raise self._translated(error) from error
        if not self._producer.complete:
            # The answer came before the request was through, such as 413: nobody reads the rest of it.
            self._drop()
        return HTTPResponse(
            response.code,
            {
                name.decode("ascii").lower(): b", ".join(values).decode("latin-1")
                for name, values in response.headers.getAllRawHeaders()
                if name != b"Content-Encoding"  # there is none, but treq leaves an empty field behind
            },
            content,
            self._reactor.seconds() - self._began,
        )

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.abortConnection()

    def _translated(self, error: Exception) -> Exception:
        """Twisted wraps reasons in reasons; the first one is what happened, unless one of ours lies among them."""
        reasons = list(_reasons(error))
        ours = next((reason for reason in reasons if isinstance(reason, CommsError)), None)
        if ours is not None:
            return ours
        first = reasons[0]
        if isinstance(first, CancelledError):
            return first
        if self._connection is None:
            return ConnectFailed(f"{self}: {first!r}")
        if self._connection.refusal is not None:
            return self._connection.refusal
        if isinstance(first, ConnectionClosed):
            return ConnectionEnded(f"{self}: the connection ended while {self._doing}", may_have_arrived=True)
        return PeerViolation(f"{self}: the answer is malformed: {first!r}", may_have_arrived=True)

    # What treq calls.

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        # treq has just asked for gzip, which it would unpack without a bound.
        assert headers is not None
        headers.setRawHeaders("Accept-Encoding", ["identity"])
        agent = Agent.usingEndpointFactory(self._reactor, self, self._pool)
        answer: Deferred[IResponse] = agent.request(method, uri, headers, bodyProducer)
        return answer.addCallback(self._head_received)

    def _head_received(self, response: IResponse) -> IResponse:
        assert self._connection is not None
        self._connection.head_complete()
        encodings = b",".join(response.headers.getRawHeaders(b"Content-Encoding", ()))
        if response.length != 0 and encodings.strip().lower() not in (b"", b"identity"):
            raise PeerViolation(
                f"{self}: the answer is encoded ({encodings.decode('latin-1')}) although identity was asked for",
                may_have_arrived=True,
            )
        return response

    # What the agent calls.

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        return self

    # What the pool calls.

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        endpoint = self._dialer.endpoint(self._target, timeout=max(0.0, self._deadline - self._reactor.seconds()))
        return Deferred.fromCoroutine(self._pool.connect(endpoint, protocolFactory))

    def borrowed(self, connection: Connection) -> None:
        self._connection = connection
        self._doing = "waiting for the answer"


def _reasons(error: BaseException | None) -> list[BaseException | None]:
    wrapped = getattr(error, "reasons", None)
    if not isinstance(wrapped, list) or not wrapped:
        return [error]
    return [inner for reason in wrapped for inner in _reasons(getattr(reason, "value", reason))]
