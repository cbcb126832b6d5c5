"""
What a peer may send, for hypothesis: made from the message types themselves, so that a new type needs nothing here.

Three degrees of goodness, each a strategy:

- :func:`valid`: what the type allows, bounds included, without anything that a careful receiver might object to;
- :func:`broken`: the same with one value that its type does not allow, so that it must be refused;
- :func:`hostile`: bytes that mean harm: JSON that is deep, doubled, huge, cut off or no JSON at all, in a good message.

:func:`payloads` mixes them. Strategies give JSON values (``dict`` …) or bytes, never structs: a peer has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, TypeVar, get_args

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import inspect as shape

from commsmgr import messages

Values: TypeAlias = st.SearchStrategy[Any]
Payloads: TypeAlias = st.SearchStrategy[bytes]
T = TypeVar("T")

RAW: dict[tuple[type, str], type] = {
    (messages.HeartbeatAnswer, "commands"): messages.CommandEnvelope,
    (messages.ResultEnvelope, "data"): messages.ResultBody,
}
"""What stands in the fields that are kept as raw JSON; in any other such field anything may stand."""

INBOUND: dict[str, tuple[type, ...]] = {
    "agent": (*get_args(messages.FromBackend), messages.HeartbeatAnswer, messages.InventoryAnswer),
    "backend": (*get_args(messages.FromAgent), messages.Heartbeat, messages.Inventory, messages.ResultBody),
}
"""Every type of message that either side takes, over WebSocket and HTTP."""

LONGEST = 5000
"""Characters of the longest text that is made, so that a message with one still fits where 64 KiB are allowed."""

# What str.isprintable() says yes to: no control characters, no surrogates, nothing that is not assigned, one blank.
_LETTERS = st.just(" ") | st.characters(exclude_categories=("C", "Z"))
_ASCII = st.characters(min_codepoint=0x20, max_codepoint=0x7E)

# JSON has no larger whole numbers that every receiver keeps (RFC 8259 section 6).
_INTEROPERABLE = 2**53 - 1


def repeatable(examples: int) -> settings:
    """Return settings with which the same examples are tried each time, however slow the machine is."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def anything(leaves: int = 6) -> Values:
    """Return a strategy for any good JSON value."""
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-_INTEROPERABLE, _INTEROPERABLE)
        | st.floats(allow_nan=False, allow_infinity=False, width=32)
        | st.text(_LETTERS, max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(_LETTERS, max_size=4), inner, max_size=3),
        max_leaves=leaves,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a type allows


@cache
def valid(message: type) -> Values:
    """Return a strategy for what the struct ``message`` looks like on the wire."""
    return _valid(shape.type_info(message))


def _valid(info: shape.Type) -> Values:
    match info:
        case shape.Metadata(type=shape.StrType() as text) if _is_ascii(info):
            return st.text(_ASCII, min_size=text.min_length or 0, max_size=text.max_length or LONGEST)
        case shape.Metadata():
            return _valid(info.type)
        case shape.StructType():
            return _struct(info)
        case shape.AnyType() | shape.RawType():
            return anything()
        case shape.NoneType():
            return st.none()
        case shape.BoolType():
            return st.booleans()
        case shape.StrType():
            return _text(info)
        case shape.IntType() | shape.FloatType():
            return _number(info)
        case shape.LiteralType():
            return st.sampled_from(info.values)
        case shape.UnionType():
            return st.one_of(*map(_valid, info.types))
        case shape.ListType():
            return st.lists(_valid(info.item_type), min_size=info.min_length or 0, max_size=_few(info))
        case shape.DictType():
            keys, values = _valid(info.key_type), _valid(info.value_type)
            return st.dictionaries(keys, values, min_size=info.min_length or 0, max_size=_few(info))
    raise NotImplementedError(f"no strategy for {info}: add a case")


def _is_ascii(info: shape.Metadata) -> bool:
    """Whether a text says beside its type, not in a pattern, that it is ASCII, as ids may."""
    return getattr((info.extra or {}).get("charset"), "name", "") == "ID"


def _few(info: shape.ListType | shape.DictType) -> int:
    return max(info.min_length or 0, min(4, 4 if info.max_length is None else info.max_length))


def _text(info: shape.StrType) -> Values:
    if info.pattern is not None:
        return st.from_regex(info.pattern, fullmatch=True).filter(lambda text: "\n" not in text)
    shortest = info.min_length or 0
    longest = LONGEST if info.max_length is None else info.max_length
    ordinary = st.text(_LETTERS, min_size=shortest, max_size=min(longest, shortest + 12))
    if longest > LONGEST:
        return ordinary
    return ordinary | st.just(longest).map("é".__mul__)


def _number(info: shape.IntType | shape.FloatType) -> Values:
    low = -_INTEROPERABLE if info.ge is None else info.ge
    high = _INTEROPERABLE if info.le is None else info.le
    if info.gt is not None or info.lt is not None or info.multiple_of is not None:
        raise NotImplementedError(f"no strategy for {info}: add a case")
    if isinstance(info, shape.IntType):
        return st.integers(int(low), int(high))
    return st.floats(low, high) | st.integers(int(low), int(high)) | st.sampled_from([low, high])


def _struct(info: shape.StructType) -> Values:
    required: dict[str, Values] = {}
    optional: dict[str, Values] = {}
    for field in info.fields:
        (required if field.required else optional)[field.encode_name] = _valid(_as_said(info, field))
    if info.tag_field is not None:
        required[info.tag_field] = st.just(info.tag)
    return st.fixed_dictionaries(required, optional=optional)


def _as_said(info: shape.StructType, field: shape.Field) -> shape.Type:
    """Return the type of a field, for one that is kept raw what stands in it."""
    within = RAW.get((info.cls, field.name))
    if within is None:
        return field.type
    known = shape.type_info(within)
    return msgspec.structs.replace(field.type, item_type=known) if isinstance(field.type, shape.ListType) else known


# ---------------------------------------------------------------------------------------------------------------------
# What a type does not allow


@cache
def broken(message: type) -> Values:
    """Return a strategy for what would be a ``message``, were it not for one value, or one that is missing."""
    info = shape.type_info(message)
    assert isinstance(info, shape.StructType)
    return _broken_struct(info)


def _broken_struct(info: shape.StructType) -> Values:
    ways: list[Values] = []
    whole = _struct(info)
    for field in info.fields:
        name = field.encode_name
        wrong = _wrong(field.type)
        if wrong is not None:
            ways.append(st.builds(lambda message, value, name=name: {**message, name: value}, whole, wrong))
        if field.required:
            ways.append(whole.map(lambda message, name=name: {k: v for k, v in message.items() if k != name}))
    return st.one_of(*ways)


def _wrong(info: shape.Type) -> Values | None:
    """Return a strategy for what is of no use as ``info``; None when there is nothing that is not."""
    match info:
        case shape.Metadata():
            return _wrong(info.type)
        case shape.AnyType() | shape.RawType():
            return None
        case shape.StructType():
            whole = st.sampled_from([None, 1, "x", [], True])
            return whole | _broken_struct(info) if any(_breakable(field) for field in info.fields) else whole
        case shape.StrType():
            return _wrong_text(info)
        case shape.IntType() | shape.FloatType():
            return _wrong_number(info)
        case shape.LiteralType():
            return st.sampled_from([None, 1, {}, [], "no such word"])
        case shape.NoneType() | shape.BoolType():
            return st.sampled_from([1, "x", [], {}])
        case shape.ListType():
            others = st.sampled_from([None, 1, "x", {}])
            items = _wrong(info.item_type)
            return others if items is None else others | st.lists(items, min_size=1, max_size=2)
        case shape.DictType():
            return st.sampled_from([None, 1, "x", []])
        case shape.UnionType():
            return _wrong_union(info)
    raise NotImplementedError(f"no strategy for {info}: add a case")


def _breakable(field: shape.Field) -> bool:
    return field.required or _wrong(field.type) is not None


def _wrong_text(info: shape.StrType) -> Values:
    others: list[Any] = [None, 1, 1.5, True, [], {}]
    if info.pattern is not None:
        others += ["", "a\n", "é", "a" * 201]
    if info.min_length:
        others.append("")
    if info.max_length is not None and info.max_length < LONGEST:
        others.append("a" * (info.max_length + 1))
    return st.sampled_from(others)


def _wrong_number(info: shape.IntType | shape.FloatType) -> Values:
    others: list[Any] = [None, True, "1", "x", [], {}]
    if isinstance(info, shape.IntType):
        others.append(1.5)
    if info.ge is not None:
        others += [info.ge - 1, -1e300 if isinstance(info, shape.FloatType) else -(2**63)]
    if info.le is not None:
        others += [info.le + 1, 1e300 if isinstance(info, shape.FloatType) else 2**63]
    return st.sampled_from(others)


def _wrong_union(info: shape.UnionType) -> Values | None:
    members = [each for each in info.types if not isinstance(each, shape.NoneType)]
    nullable = any(isinstance(each, shape.NoneType) for each in info.types)
    wrong = _wrong(members[0]) if len(members) == 1 else st.just([[]])
    return wrong.filter(lambda value: value is not None) if wrong is not None and nullable else wrong


# ---------------------------------------------------------------------------------------------------------------------
# What means harm

FRAGMENTS: tuple[bytes, ...] = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"1" * 400,
    b"18446744073709551616",
    b"-9223372036854775809",
    b"0.1e-400",
    b"01",
    b"1.",
    b"+1",
    b"0x1",
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\u0000"',
    b'"\\u001b]0;title\\u0007"',
    b'"\\u202e\\u2028"',
    b'"\\x41"',
    b'"\x00"',
    b'"\n"',
    b'"\xed\xa0\x80"',
    b'"\xff"',
    b'"\xc0\xaf"',
    b'"\xf4\x90\x80\x80"',
    b'"unterminated',
    b'"' + b"\\" * 999 + b'"',
    b"[" * 50 + b"]" * 50,
    b'{"a":' * 50 + b"1" + b"}" * 50,
    b"[" * 5000,
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"__proto__":{},"constructor":{}}',
    b'{"a":1,"a":2}',
    b'"' + b"a" * 70_000 + b'"',
    b"tru",
    b"nulls",
    b"/* */1",
    b"'a'",
    b"",
)
"""What may stand where a value should."""

# By number: hypothesis prints what a strategy is made of.
_fragments = st.integers(0, len(FRAGMENTS) - 1).map(FRAGMENTS.__getitem__)

_HERE = "@here@"


def _planted(message: dict[str, Any], fragment: bytes, at: int) -> bytes:
    """Return ``message`` as JSON with ``fragment`` in the place of one of its values, or of one more."""
    names = [*message, "extra"]
    text = json.dumps({**message, names[at % len(names)]: _HERE}, ensure_ascii=False)
    return text.encode().replace(json.dumps(_HERE).encode(), fragment, 1)


_MANGLERS: tuple[Callable[[bytes], bytes], ...] = (
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text + b"\x00",
    lambda text: text + text,
    lambda text: text[:-1],
    lambda text: text[: len(text) // 2],
    lambda text: b"[" + text + b"]",
    lambda text: text.replace(b":", b"=", 1),
    lambda text: text.replace(b"{", b'{"type":"ping","id":"other",', 1),
    lambda text: text.replace(b"{", b'{"id":"other",', 1),
    lambda text: text.replace(b"}", b',"type":"ack"}', 1),
    lambda text: text.decode("utf-8", "replace").encode("utf-16"),
    lambda text: text.decode("utf-8", "replace").encode("latin-1", "replace"),
    lambda text: b" " * 1000 + text + b"\r\n" * 10,
)


def hostile(*types: type) -> Payloads:
    """Return a strategy for payloads that mean harm, most of them messages of ``types`` but for one thing."""
    sound = st.one_of(*map(valid, types))
    text = sound.map(encoded)
    planted = st.builds(_planted, sound, _fragments, st.integers(0, 9))
    mangled = st.builds(lambda payload, mangle: mangle(payload), text, st.sampled_from(_MANGLERS))
    return planted | mangled | _fragments | st.binary(max_size=64)


def unknown() -> Payloads:
    """Return a strategy for messages of types that nobody knows, and that are handed on as they came."""
    kind = st.text(st.characters(codec="ascii", categories=("Ll",)), min_size=1, max_size=12)
    return st.builds(lambda kind, rest: encoded({"type": f"x-{kind}", "data": rest}), kind, anything())


def encoded(message: Any) -> bytes:
    """Return a JSON value as a peer would send it."""
    return json.dumps(message, ensure_ascii=False).encode()


def payloads(*types: type) -> Payloads:
    """Return a strategy for what a peer that should send ``types`` may send: good, broken, unknown and hostile."""
    good = st.one_of(*map(valid, types)).map(encoded)
    bad = st.one_of(*map(broken, types)).map(encoded)
    return good | good | bad | unknown() | hostile(*types)


def examples(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """Return some of what a strategy makes, always the same."""
    found: list[T] = []

    @settings(repeatable(count), phases=[Phase.generate])
    @given(strategy)
    def note(value: T) -> None:
        found.append(value)

    note()
    return found
