"""
The words between us and a proxy: a CONNECT request, and what the proxy's answer means (RFC 9110 section 9.3.6).

Pure functions over bytes. Whatever a proxy, or what stands in its place, answers becomes an :class:`Answer` or a
ValueError, and no more of it than a short sentence gets into an error.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from typing import Final

from msgspec import Struct

from commsmgr.errors import ProxyRefused
from commsmgr.policy.retry import parse_retry_after
from commsmgr.urls import bracketed

MAX_HEAD_BYTES: Final = 16 << 10
"""Bytes of the proxy's answer, interim answers included."""

_SHOWN: Final = 120
_MOST_SCHEMES: Final = 8
_END_OF_HEAD: Final = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE: Final = re.compile(rb"HTTP/\d+(?:\.\d+)? (\d{3})(?: (.*))?")
_UNPRINTABLE: Final = re.compile(rb"[^\t -~]")
_QUOTED: Final = re.compile(r'"[^"]*"')
# A scheme stands alone, or before a blank; parameters have an equals sign (RFC 9110 section 11.6.1).
_SCHEME: Final = re.compile(r"(?:^|,)\s*([A-Za-z][A-Za-z0-9-]{0,30})(?=\s+[^\s=]|\s*(?:,|$))")


class Answer(Struct, frozen=True):
    """
    The head of a proxy's answer.

    :ivar schemes: of Proxy-Authenticate, in lower case.
    :ivar retry_after: the field as it came, or None.
    :ivar html: whether a web page follows.
    :ivar length: bytes that it took, the interim answers before it included.
    """

    status: int
    reason: str
    schemes: tuple[str, ...]
    retry_after: str | None
    html: bool
    length: int

    @property
    def success(self) -> bool:
        """Whether there is a tunnel from here on."""
        return 200 <= self.status < 300


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


def read_answer(data: bytes) -> Answer | None:
    """
    Return the answer at the start of ``data``, or None while it is incomplete; interim answers are skipped.

    :raise ValueError: this is not HTTP, or larger than :data:`MAX_HEAD_BYTES`; it says what it is.
    """
    begin = 0
    while True:
        line, _, _ = data[begin : begin + _SHOWN].partition(b"\n")
        if not data.startswith(b"HTTP/"[: len(data) - begin], begin):
            raise ValueError(f"what is not HTTP: {_show(line)!r}")
        end = _END_OF_HEAD.search(data, begin, MAX_HEAD_BYTES)
        if end is None:
            if len(data) >= MAX_HEAD_BYTES:
                raise ValueError(f"a head of more than {MAX_HEAD_BYTES} bytes")
            return None
        status_line, *lines = (line.removesuffix(b"\r") for line in data[begin : end.start()].split(b"\n"))
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise ValueError(f"what is not HTTP: {_show(status_line)!r}")
        status = int(match[1])
        # There is nothing to switch to, so 101 is no interim answer here.
        if 100 <= status < 200 and status != 101:
            begin = end.end()
            continue
        fields = [_field(line) for line in lines]
        values = dict(reversed(fields))  # of a repeated field the first one counts
        return Answer(
            status=status,
            reason=_show(match[2] or b""),
            schemes=_schemes([value for name, value in fields if name == "proxy-authenticate"]),
            retry_after=values.get("retry-after"),
            html="html" in values.get("content-type", "").lower(),
            length=end.end(),
        )


def refusal(asked: str, answer: Answer, *, credentials: bool, now: float) -> ProxyRefused:
    """
    Return the error for an answer that opens no tunnel.

    :param asked: what was answered, with the names of backend and proxy.
    :param credentials: whether the request bore any.
    :param now: seconds since the epoch, for a Retry-After that is a date. No cap is applied to it.
    """
    said = f"{answer.status} {answer.reason}".strip()
    return ProxyRefused(
        f"{asked} was answered with {said}{_meaning(answer, credentials)}",
        status=answer.status,
        retry_after=None if answer.retry_after is None else parse_retry_after(answer.retry_after, now, math.inf),
    )


def _meaning(answer: Answer, credentials: bool) -> str:
    match answer.status:
        case 407 | 401 if answer.schemes and "basic" not in answer.schemes:
            return f": it knows its clients by {', '.join(answer.schemes)}, of which none is supported, but Basic only"
        case 407 | 401 if credentials:
            return ": the user or the password is wrong"
        case 407 | 401:
            return ": it wants a user and a password"
        case 403 | 405:
            return ": it does not allow this host or port (by default squid has no CONNECT but to port 443)"
        case 500 | 502 | 503 | 504:
            return ": it cannot reach the backend"
        case status if 300 <= status < 400 or answer.html:
            return ": is it a network's login page?"
    return ""


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = _UNPRINTABLE.sub(b"?", line).decode("ascii").partition(":")
    return name.strip().lower(), value.strip()


def _schemes(values: list[str]) -> tuple[str, ...]:
    names = [name.lower() for value in values for name in _SCHEME.findall(_QUOTED.sub('""', value))]
    return tuple(dict.fromkeys(names))[:_MOST_SCHEMES]


def _show(data: bytes) -> str:
    return _UNPRINTABLE.sub(b"?", data[:_SHOWN]).decode("ascii").strip()
