"""
The one gate for JSON that peers sent: what is refused, by which rule, under which name.

Theory of operation. What came from a peer passes three times, unless one look settles it (:meth:`.Form.is_all_of`), and
each pass is linear in the payload:

1. :func:`check_frame` looks at the bytes alone: size, UTF-8, depth.
2. The decoder of a type (msgspec) parses, and holds types, ranges, lengths and counts against what the type declares.
3. A :class:`~commsmgr.form.Form`, made from the same declarations, looks at what was understood. When that does not
   settle it, :func:`scan` reads the payload again.

Decoders differ in which of two equal keys they believe (RFC 8259 section 4), so that a proxy or an auditor could read
another command than the agent; such a message has no meaning. So has a number that a reader cannot hold.

What leaves passes :mod:`commsmgr.outgoing`.
"""

from __future__ import annotations

import json
import math
from itertools import accumulate
from typing import Final

import msgspec

from commsmgr.errors import PeerViolation
from commsmgr.messages import LARGEST, SMALLEST

REASONS: Final = {
    "binary": "a binary message; messages are text",
    "oversized": "more bytes than ``websocket.max_message_bytes``",
    "not-utf8": "bytes that are no UTF-8",
    "too-deep": "objects and lists nested deeper than ``websocket.max_depth``",
    "not-json": "no JSON (:rfc:`8259`): ``NaN``, ``Infinity``, half a surrogate pair, raw control characters",
    "not-object": "JSON, but no object",
    "no-type": "no ``type`` of 1 to 200 printable characters",
    "bad-fields": "a field with another type, range, length, count or other characters than declared below",
    "duplicate-key": "an object, at whatever depth, that has one key twice, however it is spelled",
    "number-range": "a number, at whatever depth, that is no integer of 64 bits and no finite float of 64 bits",
    "unknown-field": "a field that is not declared below, if ``messages.unknown_fields`` is ``refuse``",
}
"""Every reason of a :class:`Malformed`, and what it means, in reStructuredText; the documentation shows them."""

_DETAIL_LENGTH = 200


class Malformed(PeerViolation):
    """
    The peer sent a message that cannot be understood.

    :param reason: one of :data:`REASONS`; stable, for metrics and for the ``code`` of a nack.
    :param detail: what is wrong; of it only the beginning is kept, and only what is printable.
    :param id: the message's own id, if it has one that could be read, so that its sender can be told.
    """

    advice = "the peer's software and this one disagree; the connection goes on without this message"

    def __init__(self, reason: str, detail: str, *, id: str | None = None) -> None:
        # Errors of decoders quote the peer.
        detail = "".join(filter(str.isprintable, detail[:_DETAIL_LENGTH]))
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.id = id


# ---------------------------------------------------------------------------------------------------------------------
# 1. Bytes

# Brackets as signed steps of one: +1 for each that opens, -1 (255 as a byte) for each that closes.
_STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"{[}]"))


def check_frame(payload: bytes, max_bytes: int, max_depth: int) -> None:
    """
    Check what can be told without parsing.

    :raise Malformed: ``oversized``, ``not-utf8`` or ``too-deep``.
    """
    if len(payload) > max_bytes:
        raise Malformed("oversized", f"{len(payload)} bytes, at most {max_bytes} are taken")
    try:
        # The JSON decoder does not look at the bytes of strings that it skips.
        payload.decode()
    except UnicodeDecodeError as error:
        raise Malformed("not-utf8", f"{error.reason} at byte {error.start}") from None
    # As many brackets as levels are allowed cannot nest deeper than allowed, which settles the plain case.
    if payload.count(b"{") + payload.count(b"[") > max_depth and depth(payload) > max_depth:
        raise Malformed("too-deep", f"more than {max_depth} levels")


def depth(payload: bytes) -> int:
    """
    Return how deep the brackets outside strings nest, in time linear in the payload.

    Of a run of backslashes the pairs are cut out first, so that a quote is escaped if and only if a backslash still
    stands before it; with escaped quotes gone, every second piece between quotes is outside strings. An unterminated
    string swallows the rest, which the JSON decoder will refuse.
    """
    plain = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    steps = outside.translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Read again

READ_AGAIN: Final = 1024
"""Bytes up to which an object that can be read in two ways is read key by key, to say which key it is."""


class _Scan:
    """What :func:`scan` finds; the objects themselves are dropped as they are read."""

    def __init__(self) -> None:
        self.reason = ""
        self.detail = ""
        self.outermost: list[tuple[str, object]] = []

    def found(self, reason: str, detail: str) -> None:
        if not self.reason:
            self.reason, self.detail = reason, detail

    def pairs(self, pairs: list[tuple[str, object]]) -> object:
        if len(pairs) > 1 and len({key for key, _ in pairs}) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.found("duplicate-key", f"two values for {key[:100]!r}")
                    break
                seen.add(key)
        self.outermost = pairs  # the outermost object is finished last
        return None

    def integer(self, digits: str) -> None:
        if len(digits) > 20 or not SMALLEST <= int(digits) <= LARGEST:
            self.found("number-range", f"an integer of {len(digits)} characters")

    def float(self, text: str) -> None:
        if math.isinf(float(text)):
            self.found("number-range", "a number beyond the largest float")


def scan(payload: bytes) -> None:
    """
    See whether a JSON object can be read in two ways.

    Decoded and encoded anew it has fewer quotes than before if, and only if, a key was there twice. To read it key by
    key takes many times as long, and a peer could keep us at that: only what is short is, to say which key it was.

    :raise Malformed: ``duplicate-key`` or ``number-range``, with the message's id unless that may be one of the keys
        that are there twice; ``too-deep`` when the stack is used up; ``not-json``.
    """
    try:
        value = msgspec.json.decode(payload)
        # It knows integers of 64 bits only, and looks for them faster than we could.
        msgspec.msgpack.encode(value)
        quotes = _encode(value).count(b'"')
    except RecursionError:
        raise Malformed("too-deep", "more levels than the stack has room for") from None
    except (msgspec.ValidationError, OverflowError):
        reason, detail = "number-range", "a number beyond the largest of 64 bits"
    except msgspec.DecodeError as error:
        raise Malformed("not-json", str(error)) from None
    else:
        # In pairs, so that a backslash before a u is one that escapes.
        escaped = payload.replace(b"\\\\", b"").count(b"\\u0022")
        if payload.count(b'"') + escaped == quotes:
            return
        reason, detail = "duplicate-key", "one object at least has a key twice"
    if len(payload) <= READ_AGAIN:
        _read_again(payload)
    raise Malformed(reason, f"{detail}, in {len(payload)} bytes", id=_only_id(payload))


def _read_again(payload: bytes) -> None:
    """Read it key by key, and raise what is found, as :func:`scan` does."""
    found = _Scan()
    decoder = json.JSONDecoder(
        object_pairs_hook=found.pairs, parse_int=found.integer, parse_float=found.float, strict=True
    )
    try:
        decoder.decode(payload.decode())
    except RecursionError:
        raise Malformed("too-deep", "more levels than the stack has room for") from None
    except ValueError as error:
        raise Malformed("not-json", str(error)) from None
    if found.reason:
        ids = [value for key, value in found.outermost if key == "id"]
        own = ids[0] if len(ids) == 1 and isinstance(ids[0], str) else None
        raise Malformed(found.reason, found.detail, id=own)


def _only_id(payload: bytes) -> str | None:
    """Return the id of an object none of whose own keys is there twice; None if there is none, or one is."""
    try:
        members = _members.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    quotes = sum(2 + bytes(value).count(b'"') for value in members.values())
    if any('"' in key for key in members) or quotes != payload.count(b'"'):
        return None
    try:
        return _text.decode(members.get("id", b""))
    except msgspec.DecodeError:
        return None


_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)
