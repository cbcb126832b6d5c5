"""
The head of the answer to a request that opens something: the WebSocket upgrade, or a proxy's CONNECT.

Whoever answers may be no HTTP server at all, so any version counts, line ends may be of either kind, and what is not
printable becomes a question mark. The answers of ordinary exchanges are Twisted's to read, after the strict check of
:mod:`~commsmgr.transport.http_head`. Pure functions over bytes.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

MAX_HEAD_BYTES: Final = 16 << 10
"""Bytes of a head."""

SWITCHING_PROTOCOLS: Final = 101

SHOWN: Final = 120
"""Characters of an answer that an error may repeat."""

_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_STATUS_LINE: Final = re.compile(rb"HTTP/\d+(?:\.\d+)? (\d{3})(?: (.*))?")
_UNPRINTABLE: Final = re.compile(rb"[^\t -~]")


class NotHTTP(ValueError):
    """This is no answer; ``start`` is how it begins."""

    def __init__(self, start: bytes) -> None:
        self.start = start


class TooLarge(ValueError):
    """The head exceeds :data:`MAX_HEAD_BYTES`."""


class Head(Struct, frozen=True):
    """
    Status line and header fields.

    :ivar reason: a short, printable part of it.
    :ivar lines: those after the status line, in printable ASCII.
    :ivar end: where in the data the head ends.
    """

    status: int
    reason: str
    lines: list[bytes]
    end: int

    @property
    def is_interim(self) -> bool:
        """Whether another answer follows this one (RFC 9110 section 15.2)."""
        return 100 <= self.status < 200 and self.status != SWITCHING_PROTOCOLS

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The header fields as they came, with lower-case names; a line without a colon is none."""
        parts = [line.decode("ascii").partition(":") for line in self.lines]
        return [(name.strip().lower(), value.strip()) for name, colon, value in parts if colon]

    @property
    def headers(self) -> dict[str, str]:
        """The header fields by lower-case name; of a repeated one the first counts."""
        return dict(reversed(self.fields))


def read(data: bytes, begin: int = 0) -> Head | None:
    """
    Return the head that begins at ``begin``, or None while it is incomplete.

    :raise NotHTTP: it is none.
    :raise TooLarge: it does not end within the first :data:`MAX_HEAD_BYTES` of ``data``.
    """
    if not data.startswith(b"HTTP/"[: len(data) - begin], begin):
        raise NotHTTP(data[begin : begin + SHOWN])
    end = _END_OF_HEAD.search(data, begin, MAX_HEAD_BYTES)
    if end is None:
        if len(data) >= MAX_HEAD_BYTES:
            raise TooLarge
        return None
    status_line, *lines = (line.removesuffix(b"\r") for line in data[begin : end.start()].split(b"\n"))
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        raise NotHTTP(status_line)
    return Head(int(match[1]), show(match[2] or b""), [_UNPRINTABLE.sub(b"?", line) for line in lines], end.end())


def show(data: bytes) -> str:
    """Return a short, printable beginning of ``data``."""
    return _UNPRINTABLE.sub(b"?", data[:SHOWN]).decode("ascii").strip()
