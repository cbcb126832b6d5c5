"""
What treq and twisted.web are given to send a request with: its URL, no cookies, and the request itself.

treq parses each URL anew and makes two cookie jars for each request; twisted.web parses the URL twice more, copies the
header fields, and guards the body against a producer that miscounts. Here the URL is put together from parts that were
checked (:mod:`commsmgr.urls`, :meth:`commsmgr.transport.call.Call.check`), cookies are neither kept nor sent, and the
body is of bytes, which know their number.
"""

# mypy: allow-untyped-calls
# Large parts of Twisted have no types.

from __future__ import annotations

from http.cookiejar import Cookie
from typing import Any, Final

from hyperlink import EncodedURL
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import Deferred, succeed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IClientRequest
from zope.interface import implementer

from commsmgr.transport.body import CHUNK, BytesProducer


class WireURL(EncodedURL):
    """
    A URL that is sent as it is given: nothing of it is parsed, or encoded again.

    :param text: the whole of it, encoded already.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def to_uri(self) -> WireURL:
        """Return this very URL: it is encoded."""
        return self

    def to_text(self, with_password: bool = False) -> str:
        """Return the URL."""
        return self._text


class _NoCookies(IndexableCookieJar):
    """Keeps no cookie, and so sends none: what a backend needs to know of an agent is in the token."""

    def add_cookie_header(self, request: Any) -> None:
        """Add nothing."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Take nothing."""

    def set_cookie(self, cookie: Cookie) -> None:
        """Keep nothing."""


NO_COOKIES: Final[IndexableCookieJar] = _NoCookies()
"""The jar of every exchange. It stays empty, so they share nothing by it."""


@implementer(IClientRequest)
class WireRequest:
    """
    A request as ``HTTP11ClientProtocol`` takes it.

    :param uri: path and query, as the request line has them.
    :param headers: all fields but Content-Length.
    :param producer: of the body, None for no body.
    """

    persistent = True
    absoluteURI = None

    def __init__(self, method: bytes, uri: bytes, headers: Headers, producer: BytesProducer | None) -> None:
        self.method = method
        self.uri = uri
        self.headers = headers
        self._producer = producer

    def writeTo(self, transport: Any) -> Deferred[None]:
        """Write to ``transport``; fires when all of it has been handed over."""
        producer = self._producer
        lines = [self.method + b" " + self.uri + b" HTTP/1.1"]
        lines += [name + b": " + value for name, values in self.headers.getAllRawHeaders() for value in values]
        if producer is not None:
            lines.append(b"Content-Length: %d" % producer.length)
        elif self.method in (b"PUT", b"POST"):
            # RFC 9110 section 8.6: where a body would have a meaning, its absence is said.
            lines.append(b"Content-Length: 0")
        transport.write(b"\r\n".join(lines) + b"\r\n\r\n")
        if producer is None:
            return succeed(None)
        if producer.length <= CHUNK:
            # It is written at once: nothing that the transport could hold up.
            return producer.startProducing(transport)
        transport.registerProducer(producer, True)

        def over(outcome: Any) -> Any:
            transport.unregisterProducer()
            return outcome

        return producer.startProducing(transport).addBoth(over)

    def stopWriting(self) -> None:
        """Write no more: the connection is gone."""
        if self._producer is not None:
            self._producer.stopProducing()
