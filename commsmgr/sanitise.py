"""
The one gate for JSON that peers sent: what is refused, by which rule, under which name.

Theory of operation. What came from a peer passes three times, and each pass is linear in the payload:

1. :func:`check_frame` looks at the bytes alone: size, UTF-8, depth.
2. The decoder of a type (msgspec) parses, and holds types, ranges, lengths and counts against what the type declares.
3. A :class:`Form`, made from the same declarations, looks at what was understood: characters of ids and names, and
   integers in data without a schema. Then the message is encoded anew, without defaults. Has the payload no more quotes
   than that, it has neither a key twice nor a field that we do not know, and this settles nearly every message.
   Otherwise :func:`scan` reads it again.

Decoders differ in which of two equal keys they believe (RFC 8259 section 4), so that a proxy or an auditor could read
another command than the agent; such a message has no meaning. So has a number that a reader cannot hold.

What leaves passes :mod:`commsmgr.outgoing`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import accumulate
from operator import attrgetter
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec import inspect as types

from commsmgr.errors import PeerViolation
from commsmgr.messages import LARGEST, SMALLEST, Charset

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
# 3. What was understood

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


class Form:
    """
    What a struct type declares, ready to be held against what was decoded.

    :param struct: a type of :mod:`commsmgr.messages`; ids and names in it are told by their :class:`Charset`.
    """

    def __init__(self, struct: type[Struct]) -> None:
        self._texts: list[tuple[str, Callable[[Any], str | None], bool]] = []
        self._lists: list[tuple[str, Callable[[Any], list[str]], bool]] = []
        self._parts: list[tuple[Callable[[Any], list[Struct]], Form]] = []
        self._open: list[Callable[[Any], dict[str, Any]]] = []
        self._inner: dict[str, Form] = {}
        # Whether an encoding has nothing that the message may not have had: defaults that are left out are in neither.
        self._exact = True
        self._defaults: list[tuple[bytes, bytes]] = []
        self._depth = _depth(types.type_info(struct))
        self._encoded = bytearray()
        names = self._look_at(struct, "")
        # What may stand in several places tells nothing.
        self._defaults = [(key, value) for key, value in self._defaults if names.count(key) == 1]

    def _look_at(self, struct: type[Struct], path: str) -> list[bytes]:
        """Take in what ``struct``, at ``path`` in the message, declares; return the keys that can stand there."""
        info = types.type_info(struct)
        assert isinstance(info, types.StructType)
        names = [_key(info.tag_field)] if info.tag_field else []
        self._known = {field.encode_name for field in info.fields} | ({info.tag_field} if info.tag_field else set())
        known = self._known
        for field in info.fields:
            names.append(_key(field.encode_name))
            if not field.required:
                self._exact = self._exact and struct.__struct_config__.omit_defaults
                if field.default in ("", None):
                    self._defaults.append((_key(field.encode_name), _encode(field.default)))
                elif field.default_factory is not msgspec.NODEFAULT:
                    self._defaults.append((_key(field.encode_name), _encode(field.default_factory())))
            # What may be absent altogether (UNSET, which is told as no default at all) has no fields to look at.
            made = field.default_factory is not msgspec.NODEFAULT
            there = field.required or isinstance(field.default, Struct) or made
            names += self._look_into(_charset(field.type), path + field.name, there)
        self._known = known
        return names

    def _look_into(self, declared: tuple[types.Type, Charset | None], path: str, required: bool) -> list[bytes]:
        info, charset = declared
        get = attrgetter(path)
        match info:
            case types.StrType() if charset is not None:
                self._texts.append((path, get, charset is Charset.ID))
            case types.StructType():
                self._inner[path] = Form(info.cls)
                if required:
                    return self._look_at(info.cls, path + ".")
                self._parts.append((lambda message: [part] if (part := get(message)) else [], self._inner[path]))
            case types.DictType():
                self._open.append(get)
            case types.ListType():
                item, charset = _charset(info.item_type)
                if isinstance(item, types.StructType):
                    self._parts.append((get, Form(item.cls)))
                elif charset is not None:
                    self._lists.append((path, get, charset is Charset.ID))
        return []

    def check(self, message: Struct) -> None:
        """
        Check what the decoder has not.

        :raise Malformed: ``bad-fields`` for an id or a name with characters that it must not have, ``number-range`` for
            integers in data without a schema.
        """
        for path, get, is_id in self._texts:
            text = get(message)
            if text and (not text.isprintable() or (is_id and not text.isascii())):
                raise _characters(path)
        for path, get_list, is_id in self._lists:
            text = "".join(get_list(message) or ())
            if not text.isprintable() or (is_id and not text.isascii()):
                raise _characters(path)
        for get_open in self._open:
            if data := get_open(message):
                try:
                    # It knows integers of 64 bits only, and looks for them faster than we could.
                    msgspec.msgpack.encode(data)
                except OverflowError:
                    raise Malformed("number-range", "an integer of more than 64 bits") from None
        for get_parts, form in self._parts:
            for part in get_parts(message) or ():
                form.check(part)

    def accounts_for(self, payload: bytes, message: Struct, *, everywhere: bool = False) -> bool:
        """
        Say whether ``payload``, of which ``message`` was decoded, certainly has no key twice, and none that is unknown.

        Each key, and each text, brings two quotes.

        :param everywhere: whether a key also counts as unknown that stands, with its default, where another does.
        """
        if not self._exact or (_BACKSLASH in payload and b"\\u0022" in payload):
            return False
        encoded = _encode(message)
        spare = payload.count(b'"') - encoded.count(b'"')
        if spare > 0 and not everywhere:
            # Some backends write what is the default anyway. Of a key that is there twice only one is counted. Without
            # its value it would not do: with any other one, in a part that was dropped, a key brings fewer quotes than
            # are taken off for it, and makes room for those of what is there twice.
            for key, value in self._defaults:
                written = key + value in payload or key + b" " + value in payload
                if written and key not in encoded and b"\\" + key not in payload:
                    spare -= 2 + value.count(b'"')
        return spare == 0

    def is_all_of(self, payload: bytes, message: Struct, max_depth: int) -> bool:
        """
        Say whether ``payload``, which :func:`is_plain` and of which ``message`` was decoded, certainly passes all of
        :func:`check_frame` and :func:`check_understood`.

        Its texts are printable ASCII. If its quotes are accounted for, it has no key twice and nothing that is not in
        ``message``, so that it is no deeper than declared; and of texts alone data without a schema are no deeper.
        """
        if not self._exact or self._depth > max_depth:
            return False
        for get_open in self._open:
            for value in (get_open(message) or {}).values():
                if type(value) is not str:
                    return False
        _encode_into(message, self._encoded)
        return payload.count(b'"') == self._encoded.count(b'"')

    def unknown(self, value: object) -> str | None:
        """Return the path to a field in ``value``, as JSON has it, that is not declared; None if there is none."""
        if not isinstance(value, dict):
            return None
        for key in value:
            if key not in self._known:
                return str(key)
        for name, form in self._inner.items():
            if "." not in name and (path := form.unknown(value.get(name))):
                return f"{name}.{path}"
        return None


_BACKSLASH = ord("\\")  # as a number it is found several times faster
_DELETE = 0x7F
_SHORT = 4096  # what is encoded to be compared stays in memory
_encode = msgspec.json.Encoder().encode
_encode_into = msgspec.json.Encoder().encode_into
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)


def _key(name: str) -> bytes:
    return b'"%b":' % name.encode()


def _depth(info: types.Type) -> float:
    """Return how deep what is declared can nest, data without a schema counting as one level."""
    match info:
        case types.StructType():
            return 1 + max((_depth(field.type) for field in info.fields), default=0)
        case types.ListType():
            return 1 + _depth(info.item_type)
        case types.DictType():
            return 1
        case types.Metadata():
            return _depth(info.type)
        case types.UnionType():
            return max(map(_depth, info.types))
        case types.RawType():
            return math.inf
    return 0


def _characters(path: str) -> Malformed:
    return Malformed("bad-fields", f"`{path}` has characters that it must not have")


def _charset(info: types.Type) -> tuple[types.Type, Charset | None]:
    """Return the type without what stands around it, and the characters that it may have."""
    if isinstance(info, types.UnionType):
        (info,) = (part for part in info.types if not isinstance(part, types.NoneType))
    if isinstance(info, types.Metadata):
        return info.type, (info.extra or {}).get("charset")
    return info, None


def is_plain(payload: bytes) -> bool:
    """Say whether ``payload`` is short, and JSON in it has texts of printable ASCII only, no quote being part of one."""
    return len(payload) <= _SHORT and payload.isascii() and _BACKSLASH not in payload and _DELETE not in payload


def check_understood(form: Form, message: Struct, payload: bytes, refuse_unknown: bool) -> None:
    """
    Check what was decoded from ``payload`` into ``message``.

    :raise Malformed: ``bad-fields``, ``duplicate-key``, ``number-range`` or ``unknown-field``.
    """
    form.check(message)
    if form.accounts_for(payload, message, everywhere=refuse_unknown):
        return
    scan(payload)
    if refuse_unknown and (path := form.unknown(msgspec.json.decode(payload))):
        raise Malformed("unknown-field", f"`{path}` is not known here")
