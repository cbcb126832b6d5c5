"""
What a message type declares, held against what was decoded of a payload: the last of the passes of the gate for JSON
(:mod:`commsmgr.sanitise`), and the one look that takes the place of all of them for nearly every message.

A :class:`Form` looks at characters of ids and names, and at integers in data without a schema. Then the message is
encoded anew, without defaults. Has the payload no more quotes than that, it has neither a key twice nor a field that we
do not know. This settles nearly every message; :func:`~commsmgr.sanitise.scan` reads the others again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as types

from commsmgr.messages import LARGEST, SMALLEST, Charset
from commsmgr.sanitise import Malformed, scan


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
        Say whether ``payload``, which :func:`is_plain` and of which ``message`` was decoded, certainly passes what
        :func:`~commsmgr.sanitise.check_frame` and :func:`check_understood` look for.

        Its texts are printable ASCII. If its quotes are accounted for, it has no key twice, and nothing that is not in
        ``message``: so it is no deeper than declared, if data without a schema have no further objects and lists.
        """
        if not self._exact or self._parts or self._depth > max_depth:
            return False
        for get_open in self._open:
            for value in (get_open(message) or {}).values():
                kind = type(value)
                if kind is str:
                    continue
                if kind is dict or kind is list or (kind is int and not SMALLEST <= value <= LARGEST):
                    return False
        return payload.count(b'"') == _encode(message).count(b'"')

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


@cache
def form_of(struct: type[Struct]) -> Form:
    """Return the form of a type, which is made once: to look at a type takes milliseconds."""
    return Form(struct)


_BACKSLASH = ord("\\")  # as a number it is found several times faster
_DELETE = 0x7F
_SHORT = 4096  # bytes; to look at all of a long one would delay the checks that find it wrong early
_encode = msgspec.json.Encoder().encode


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
    """Say whether ``payload`` is short, and JSON in it has texts of printable ASCII only, without quotes in them."""
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
