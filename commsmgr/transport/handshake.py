"""
The HTTP part of a WebSocket connection: what may stand in the request, and what the answer means (RFC 6455 section 4).

An :class:`UpgradeRequest` writes itself; the rest are functions over the head of an answer
(:class:`~commsmgr.transport.answer_head.Head`), or what is to become one. No I/O, and no clock. Whatever a backend, a
proxy or a captive portal says is such a head or a typed error; nothing else is raised, and no more of it than a short
sentence gets into an error.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha1
from typing import Final

from msgspec import Struct

from commsmgr.errors import PeerViolation, TokenError, TransportError, UpgradeRefused
from commsmgr.headers import mistake
from commsmgr.policy.retry import parse_retry_after
from commsmgr.transport.answer_head import MAX_HEAD_BYTES, SHOWN, Head, NotHTTP, TooLarge, read, show

KEY_BYTES: Final = 16
"""Random bytes of which a request's key is made."""

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class UpgradeRequest(Struct, frozen=True):
    """
    A request for the upgrade, but for what is new with each connection.

    :ivar host: with the port.
    :ivar path: with the query, if there is one.
    :ivar headers: all of them may stand in a request.
    :ivar protocols: the subprotocols that are offered.
    """

    host: str
    path: str
    headers: Mapping[str, str]
    protocols: Collection[str]

    def encoded(self, key: bytes, extensions: Iterable[str]) -> bytes:
        """
        Return it as it is sent.

        :param key: :data:`KEY_BYTES` random bytes, in base64.
        :param extensions: that are offered.
        """
        lines = [
            f"GET {self.path} HTTP/1.1",
            f"Host: {self.host}",
            "Upgrade: WebSocket",
            "Connection: Upgrade",
            # Some proxies take the upgrade out of a request without these.
            "Pragma: no-cache",
            "Cache-Control: no-cache",
            *[f"{name}: {value}" for name, value in self.headers.items()],
            f"Sec-WebSocket-Key: {key.decode()}",
        ]
        if self.protocols:
            lines.append(f"Sec-WebSocket-Protocol: {','.join(self.protocols)}")
        if offered := ",".join(extensions):
            lines.append(f"Sec-WebSocket-Extensions: {offered}")
        lines += ("Sec-WebSocket-Version: 13", "", "")
        return "\r\n".join(lines).encode("utf-8")


def read_head(data: bytes) -> Head | None:
    """
    Return the head at the start of ``data``, or None while it is incomplete.

    :raise UpgradeRefused: with status 0: this is not HTTP.
    :raise PeerViolation: the head is larger than :data:`~commsmgr.transport.answer_head.MAX_HEAD_BYTES`.
    """
    try:
        return read(data)
    except NotHTTP as error:
        raise UpgradeRefused(f"the answer to the WebSocket upgrade is not HTTP: {show(error.start)!r}") from None
    except TooLarge:
        raise PeerViolation(f"the head of the answer to the WebSocket upgrade exceeds {MAX_HEAD_BYTES} bytes") from None


def clean(head: Head) -> bytes:
    """Return the head anew, with CRLF line ends and printable ASCII only, for parsers that trust their input."""
    return b"\r\n".join([b"HTTP/1.1 %03d" % head.status, *head.lines, b"", b""])


def is_plainly_accepted(head: Head, key: bytes, protocols: Collection[str]) -> bool:
    """
    Whether an answer with status 101 accepts the upgrade and leaves nothing to be weighed: no extension, nothing twice.

    Where it does not, autobahn has to judge; it accepts and refuses as it would without this look.

    :param key: of the request.
    :param protocols: that were offered.
    """
    fields = head.fields
    headers = dict(fields)
    return (
        len(headers) == len(fields)
        and headers.get("upgrade", "").lower() == "websocket"
        and headers.get("connection", "").lower() == "upgrade"
        and headers.get("sec-websocket-accept", "").encode("ascii") == b64encode(sha1(key + _GUID).digest())
        and "sec-websocket-extensions" not in headers
        and headers.get("sec-websocket-protocol", "") in ("", *protocols)
    )


def refusal(head: Head, now: float) -> TransportError:
    """
    Return the error for an answer that is not 101.

    :param now: the time, in seconds since the epoch, for a Retry-After that is a date. No cap is applied to it.
    """
    headers = head.headers
    fact = f"the WebSocket upgrade was answered with {head.status}"
    if head.reason:
        fact += f" {head.reason}"
    # Where to, but not the query: it may bear a credential.
    if 300 <= head.status < 400 and (location := headers.get("location", "").partition("?")[0]):
        fact += f"; redirected to {location[:SHOWN]}, which is not followed"
    elif headers.get("content-type", "").lower().startswith("text/html"):
        fact += "; it is an HTML page: another service, or a network's login page?"
    retry_after = headers.get("retry-after")
    return UpgradeRefused(
        fact,
        status=head.status,
        retry_after=None if retry_after is None else parse_retry_after(retry_after, now, math.inf),
    )


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """
    Return a copy of what the handler gave, all of which may stand in an upgrade request.

    A line break in a value (a token read from a file …) would begin a header field or a request of its own.

    :raise TokenError: one may not; it says which, and never the value.
    """
    # Authorization is the one reserved field that is the handler's to set; its value has to be as clean as any other.
    if wrong := mistake(headers, own={"authorization"}):
        raise TokenError(f"the headers of the upgrade request: {wrong}")
    return dict(headers)
