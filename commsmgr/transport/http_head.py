"""
The head of an HTTP answer, checked before Twisted's parser believes it.

Twisted takes the first of several transfer codings, numbers such as ``2_00`` for a status, and NUL for a character like
any other. Where two parsers on the way disagree about where an answer ends, the rest of one becomes the beginning of
the next. So what RFC 9112 leaves no doubt about passes, and nothing else does. Pure functions over bytes.
"""

from __future__ import annotations

import re
from typing import Final

from commsmgr.errors import PeerViolation

HEAD_LIMIT: Final = 1 << 16
"""Bytes of status line and header fields of one answer, interim answers included."""

LINE_LIMIT: Final = 1 << 14
"""Bytes of one line of a head; Twisted gives up on a longer one without a word."""

FIELD_LIMIT: Final = 256
"""Header fields of one answer. A head has room for thousands of the smallest, and each is an object or two."""

INTERIM_LIMIT: Final = 20
"""Interim answers before the answer (RFC 9110 section 15.2)."""

END_OF_HEAD: Final = re.compile(rb"\n\r?\n")

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.(\d) ([1-9]\d\d)(?: [^\x00\r]*)?")  # RFC 9112 section 4
_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00\r]*)")  # RFC 9110 section 5
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")  # RFC 9112 section 5.2
_LENGTH: Final = re.compile(rb"\d{1,18}")


def malformed(why: str) -> PeerViolation:
    """Return the error for a head that is not to be believed."""
    return PeerViolation(f"the head of the answer is malformed: {why}", may_have_arrived=True)


def status_of(head: bytes) -> int:
    """
    Return the status of an answer.

    :param head: all of its head, to the empty line.
    :raise PeerViolation: it is not HTTP/1, has characters that RFC 9110 section 5.5 forbids, too many or too long
        lines, or leaves a doubt about the length of the body (RFC 9112 section 6).
    """
    if len(head) > LINE_LIMIT and max(map(len, head.split(b"\n"))) > LINE_LIMIT:
        raise malformed(f"a line of more than {LINE_LIMIT} bytes")
    first, *lines = [line.removesuffix(b"\r") for line in _FOLD.sub(b" ", head.rstrip(b"\r\n")).split(b"\n")]
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise malformed(f"it begins with {first[:40]!r}")
    if len(lines) > FIELD_LIMIT:
        raise malformed(f"more than {FIELD_LIMIT} header fields")
    framing: dict[bytes, list[bytes]] = {b"content-length": [], b"transfer-encoding": []}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise malformed(f"{line[:40]!r} is no header field")
        name = field[1].lower()
        if name in framing:
            framing[name].append(field[2].rstrip(b" \t"))
    _check_framing(framing[b"content-length"], framing[b"transfer-encoding"], old=status[1] == b"0")
    return int(status[2])


def _check_framing(lengths: list[bytes], codings: list[bytes], *, old: bool) -> None:
    if codings and lengths:
        raise malformed("both Content-Length and Transfer-Encoding")
    if codings and (old or [coding.lower() for coding in codings] != [b"chunked"]):
        raise malformed(f"Transfer-Encoding is {b', '.join(codings)[:40]!r}, where only chunked could be read")
    if lengths and (len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0])):
        raise malformed(f"Content-Length is {b', '.join(lengths)[:40]!r}")
