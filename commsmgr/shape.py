"""
Does plain data have the shape of the types in :mod:`commsmgr.config`? Every place where it does not, as a sentence.

The data and the types are walked through side by side; msgspec alone would stop at the first mistake. What is found is
quoted, so that a mistake is easy to see, but for values that are or may hold secrets.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec.inspect import VarTupleType

from commsmgr.config import Config
from commsmgr.headers import CONTROL_CHARACTERS
from commsmgr.reference import Field, fields

Mistake: TypeAlias = tuple[str, str]
"""The path of a key, and what is wrong there."""

_SECRETS = re.compile(r"^(auth\.token(_command)?$|http\.headers|backends\[\d+\]\.(websocket_)?url$)")


def to_builtins(value: Any) -> Any:
    """Return structs as mappings, all the way down, and everything else as it is."""
    if isinstance(value, msgspec.Struct):
        # Most of what a section holds is plain already.
        return {
            key: item if isinstance(item, str | int | float) else to_builtins(item)
            for key, item in msgspec.structs.asdict(value).items()
        }
    if isinstance(value, list | tuple):
        return [to_builtins(item) for item in value]
    return value


def mismatches(raw: Any, table: type[msgspec.Struct], path: str = "") -> Iterator[Mistake]:
    """
    Yield the mistakes in ``raw``, which should have the shape of ``table``.

    :param path: the path of its key, empty for the whole.
    """
    if not isinstance(raw, Mapping):
        yield path, f"expected a table, found {_found(raw, path)}"
        return
    known = {field.name: field for field in fields(table)}
    for key, value in raw.items():
        inner = f"{path}.{key_text(key)}" if path else key_text(key)
        if key in known:
            yield from _value_mismatches(value, known[key], inner)
        else:
            yield inner, f"unknown key; {_hint(str(key), table)}"
    for name, field in known.items():
        if field.required and name not in raw:
            yield f"{path}.{name}" if path else name, f"missing; expected {field.expected}: {field.meaning}"


def _value_mismatches(raw: Any, field: Field, path: str) -> Iterator[Mistake]:
    if field.table and isinstance(field.info, VarTupleType):
        if not isinstance(raw, list):
            yield path, f"expected {field.expected} (written [[{path}]]), found {_found(raw, path)}"
        elif not (field.info.min_length or 0) <= len(raw) <= (field.info.max_length or len(raw)):
            yield path, f"expected {field.expected}, found {len(raw)}"
        else:
            for index, item in enumerate(raw):
                yield from mismatches(item, field.table, f"{path}[{index}]")
    elif field.table:
        yield from mismatches(raw, field.table, path)
    else:
        try:
            msgspec.convert(raw, field.annotation)
        except (msgspec.ValidationError, RecursionError, UnicodeEncodeError):  # the last one for half a surrogate pair
            yield path, f"expected {field.expected}, found {_found(raw, path)}"
        else:
            yield from _control_characters(raw, path)


def _hint(key: str, table: type[msgspec.Struct]) -> str:
    """Name the nearest valid key, or the table in which this one would be valid."""
    names = [field.name for field in fields(table)]
    near = difflib.get_close_matches(key.lower(), names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    for section in fields(Config):
        if section.table and key in section.table.__struct_fields__:
            return f"it belongs in [{section.name}]"
    return f"valid here: {', '.join(names)}"


def _control_characters(raw: Any, path: str) -> Iterator[Mistake]:
    """No setting needs them; in headers, logs and file names they do harm. Regular expressions may hold anything."""
    if isinstance(raw, str) and path != "auth.token" and CONTROL_CHARACTERS.search(raw):
        yield path, "control characters (such as CR, LF or NUL) are not allowed"


def may_have_control_characters(raw: Any) -> bool:
    """
    Say whether there are any in ``raw``, which has the right types: a quick look, that also finds what is allowed.

    JSON has no control characters but DEL as they are, and what stands for them begins with a backslash.
    """
    encoded = msgspec.json.encode(raw)
    return b"\\" in encoded or b"\x7f" in encoded


def key_text(key: Any) -> str:
    """Write a key as it may stand in TOML, cut short if it is very long."""
    text = str(key)
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", text) else json.dumps(text[:60])


def _found(value: Any, path: str) -> str:
    """Say what was found without telling a secret."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return (
                "a number" if _SECRETS.match(path) else f"{value:.15g}" if isinstance(value, float) else str(value)[:40]
            )
        case str():
            return "a string" if _SECRETS.match(path) else f"the string {json.dumps(value[:60])}"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "a list"
        case None:
            return "nothing"
        case _:
            return f"a {type(value).__name__}"
