"""
The words between us and a proxy: a CONNECT request, and what the proxy's answer means (RFC 9110 section 9.3.6).

Pure functions over bytes. Whatever a proxy, or what stands in its place, answers becomes a
:class:`~commsmgr.transport.answer_head.Head` or a ValueError, and no more of it than a sentence gets into an error.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from typing import Final

from commsmgr.errors import ProxyRefused
from commsmgr.policy.retry import parse_retry_after
from commsmgr.transport.answer_head import MAX_HEAD_BYTES, Head, NotHTTP, TooLarge, read, show
from commsmgr.transport.http_head import INTERIM_LIMIT
from commsmgr.urls import bracketed

_MOST_SCHEMES: Final = 8
_QUOTED: Final = re.compile(r'"[^"]*"')
# A scheme stands alone, or before a blank; parameters have an equals sign (RFC 9110 section 11.6.1).
_SCHEME: Final = re.compile(r"(?:^|,)\s*([A-Za-z][A-Za-z0-9-]{0,30})(?=\s+[^\s=]|\s*(?:,|$))")


def authority(host: str, port: int) -> str:
    """Return what to ask a proxy for: always with a port, an IPv6 literal in brackets, no dot at a name's end."""
    return f"{bracketed(host.rstrip('.'))}:{port}"


def basic(username: str, password: str) -> str:
    """Return credentials as Basic authentication has them (RFC 7617), in UTF-8."""
    return "Basic " + b64encode(f"{username}:{password}".encode()).decode("ascii")


def request(wanted: str, user_agent: str, credentials: str) -> bytes:
    """
    Return the request for a tunnel.

    :param wanted: see :func:`authority`.
    :param credentials: see :func:`basic`; empty for none.
    """
    fields = [f"CONNECT {wanted} HTTP/1.1", f"Host: {wanted}", f"User-Agent: {user_agent}"]
    if credentials:
        fields.append(f"Proxy-Authorization: {credentials}")
    return "\r\n".join([*fields, "", ""]).encode("ascii")


def read_answer(data: bytes) -> Head | None:
    """
    Return the answer at the start of ``data``, or None while it is incomplete; interim answers are skipped.

    :raise ValueError: this is not HTTP, or has more than :data:`~commsmgr.transport.http_head.INTERIM_LIMIT` interim
        answers, or is with them larger than :data:`~commsmgr.transport.answer_head.MAX_HEAD_BYTES`; it says what it is.
    """
    try:
        head, interim = read(data), 0
        while head is not None and head.is_interim:
            if (interim := interim + 1) > INTERIM_LIMIT:
                raise ValueError(f"more than {INTERIM_LIMIT} interim answers")
            head = read(data, head.end)
    except NotHTTP as error:
        line, _, _ = error.start.partition(b"\n")
        raise ValueError(f"what is not HTTP: {show(line)!r}") from None
    except TooLarge:
        raise ValueError(f"a head of more than {MAX_HEAD_BYTES} bytes") from None
    return head


def is_success(answer: Head) -> bool:
    """Whether there is a tunnel from here on."""
    return 200 <= answer.status < 300


def refusal(asked: str, answer: Head, *, credentials: bool, now: float) -> ProxyRefused:
    """
    Return the error for an answer that opens no tunnel.

    :param asked: what was answered, with the names of backend and proxy.
    :param credentials: whether the request bore any.
    :param now: seconds since the epoch, for a Retry-After that is a date. No cap is applied to it.
    """
    headers = answer.headers
    html = "html" in headers.get("content-type", "").lower()
    retry_after = headers.get("retry-after")
    said = f"{answer.status} {answer.reason}".strip()
    return ProxyRefused(
        f"{asked} was answered with {said}{_meaning(answer.status, schemes(answer), html, credentials)}",
        status=answer.status,
        retry_after=None if retry_after is None else parse_retry_after(retry_after, now, math.inf),
    )


def _meaning(status: int, known: tuple[str, ...], html: bool, credentials: bool) -> str:
    match status:
        case 407 | 401 if known and "basic" not in known:
            return f": it knows its clients by {', '.join(known)}, of which none is supported, but Basic only"
        case 407 | 401 if credentials:
            return ": the user or the password is wrong"
        case 407 | 401:
            return ": it wants a user and a password"
        case 403 | 405:
            return ": it does not allow this host or port (by default squid has no CONNECT but to port 443)"
        case 500 | 502 | 503 | 504:
            return ": it cannot reach the backend"
        case _ if 300 <= status < 400 or html:
            return ": is it a network's login page?"
    return ""


def schemes(answer: Head) -> tuple[str, ...]:
    """Return the schemes of Proxy-Authenticate, in lower case."""
    values = [_QUOTED.sub('""', value) for name, value in answer.fields if name == "proxy-authenticate"]
    names = [name.lower() for value in values for name in _SCHEME.findall(value)]
    return tuple(dict.fromkeys(names))[:_MOST_SCHEMES]
