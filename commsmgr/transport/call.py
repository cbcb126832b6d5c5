"""
One request and its whole answer.

treq and twisted.web do the work; this module takes away what they would do unasked (follow redirects, keep cookies,
unpack gzip without bound, repeat requests, wait for ever) and turns their errors into ours.

Each exchange has a treq client of its own, which costs next to nothing, and is itself the agent of that client. They
share the pool of connections, and nothing else: no cookie is kept, and the exchange knows the connection it was given.
That is how it knows whether a byte was sent, and how it can drop a connection whose answer nobody waits for any more.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from treq.client import HTTPClient as TreqClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from commsmgr.errors import CommsError, ConnectFailed, ConnectionEnded, DeadlineExceeded, PeerViolation, UsageError
from commsmgr.transport.body import BodyCollector, BytesProducer, too_large
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.http_request import NO_COOKIES, WireRequest, WireURL
from commsmgr.transport.pool import Connection, Pool
from commsmgr.urls import Target


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


@implementer(IAgent, IStreamClientEndpoint)
class Call:
    """
    One exchange: an agent for treq, and an endpoint for the pool.

    :param path: below ``target``, perhaps with a query.
    :param deadline: when it has to be over, in the reactor's seconds.
    :ivar route: the path without the query.
    """

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
        self._producer: BytesProducer | None = None
        self._collector: BodyCollector | None = None

    @property
    def host(self) -> str:
        """What stands in the request's Host field."""
        return self._target.authority

    @property
    def bytes_out(self) -> int:
        """Bytes of the body that were handed to the network."""
        return 0 if self._producer is None else self._producer.written

    @property
    def bytes_in(self) -> int:
        """Bytes of the answer's body that came."""
        return 0 if self._collector is None else self._collector.received

    def check(self) -> None:
        """Raise :class:`~commsmgr.errors.UsageError` unless method and path can stand in a request."""
        if not (self.method.isascii() and self.method.isalpha() and self.method.isupper()):
            raise UsageError(f"{self.method!r} is not an HTTP method")
        path = self._path
        if not path.startswith("/") or "#" in path or not all("!" <= character <= "~" for character in path):
            raise UsageError(f"{path!r} is not a path: it begins with a slash, percent-encoded, without fragment")

    def expired(self, seconds: float) -> DeadlineExceeded:
        """Return the error for a deadline of ``seconds`` that is over now."""
        return DeadlineExceeded(
            f"{self} took longer than {seconds:g} s: still {self._doing}",
            may_have_arrived=self._connection is not None,
        )

    def __str__(self) -> str:
        return f"{self.method} {self._target.authority}{self.route}"

    async def run(self, fields: Headers, body: bytes, limit: int) -> HTTPResponse:
        """Send, and return the answer, its body of at most ``limit`` bytes; errors as ``HTTPClient.exchange`` has."""
        self._producer = producer = BytesProducer(body) if body else None
        self._collector = collector = BodyCollector(limit)
        self._doing = "connecting"
        try:
            # The jar twice: the client has one, and treq makes another for a request that is given none.
            response = await TreqClient(self, NO_COOKIES).request(
                self.method,
                WireURL(self._target.join(self._path)),
                headers=fields,
                data=producer,
                cookies=NO_COOKIES,
                allow_redirects=False,
                unbuffered=True,
                reactor=self._reactor,
            )
            if response.length is not UNKNOWN_LENGTH and response.length > limit:
                raise too_large(limit)
            self._doing = "reading the answer"
            response.deliverBody(collector)
            content = await collector.body
        except Exception as error:
            self._drop()
            raise self._translated(error) from error
        if producer is not None and not producer.complete:
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
        assert headers is not None
        # URL and body come back as they were handed to treq, wrapped; here they are at hand as they are.
        # treq has just asked for gzip, which it would unpack without a bound.
        headers.setRawHeaders(b"Accept-Encoding", [b"identity"])
        request = WireRequest(method, self._target.below(self._path).encode("ascii"), headers, self._producer)
        target = self._target
        lent = self._pool.getConnection((target.scheme, target.host, target.port), self)
        answer: Deferred[IResponse] = lent.addCallback(lambda protocol: protocol.request(request))
        return answer.addCallback(self._head_received)

    def _head_received(self, response: IResponse) -> IResponse:
        encodings = b",".join(response.headers.getRawHeaders(b"Content-Encoding", ()))
        if response.length != 0 and encodings.strip().lower() not in (b"", b"identity"):
            raise PeerViolation(
                f"{self}: the answer is encoded ({encodings.decode('latin-1')}) although identity was asked for",
                may_have_arrived=True,
            )
        return response

    # What the pool calls.

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """IStreamClientEndpoint: the pool has no connection to lend."""
        endpoint = self._dialer.endpoint(self._target, timeout=max(0.0, self._deadline - self._reactor.seconds()))
        return Deferred.fromCoroutine(self._pool.connect(endpoint, protocolFactory))

    def borrowed(self, connection: Connection) -> None:
        """See :class:`~commsmgr.transport.pool.Borrower`."""
        self._connection = connection
        self._doing = "waiting for the answer"


def _reasons(error: BaseException | None) -> list[BaseException | None]:
    wrapped = getattr(error, "reasons", None)
    if not isinstance(wrapped, list) or not wrapped:
        return [error]
    return [inner for reason in wrapped for inner in _reasons(getattr(reason, "value", reason))]
