"""
What the options are, read off the structs of :mod:`commsmgr.config`: the sentences in error messages, the reference in
the docs and the example file all come from here, so that none of them can say anything else than the code does.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.inspect import (
    BoolType,
    DictType,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    StrType,
    StructType,
    Type,
    VarTupleType,
    type_info,
)

from commsmgr.config import Config

_UNITS = {"s": "seconds", "bytes": "bytes", "count": ""}
_SCALES = {
    "bytes": ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")),
    "seconds": ((86400, "d"), (3600, "h"), (60, "min")),
    "": (),
}


class Option(msgspec.Struct, frozen=True):
    """
    One option.

    :ivar expected: the values it takes, in words, with unit and range.
    :ivar default: as it is written in TOML; empty when the option must be given.
    :ivar scaled: the default once more in a larger unit, where that comes out even; else empty.
    """

    name: str
    expected: str
    default: str
    scaled: str
    meaning: str


class Section(msgspec.Struct, frozen=True):
    """A table of the file. ``name`` is empty for the top level; ``many`` says that there is one table per item."""

    name: str
    meaning: str
    many: bool
    options: tuple[Option, ...]


class Field(msgspec.Struct, frozen=True):
    """
    A field of a section's struct.

    :ivar annotation: its type as msgspec converts to.
    :ivar info: that type without its annotations.
    :ivar unit: ``seconds``, ``bytes`` or empty.
    :ivar default: its value, or ``msgspec.NODEFAULT``.
    """

    name: str
    annotation: Any
    info: Type
    unit: str
    default: Any
    meaning: str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is msgspec.NODEFAULT

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        return expected(self.info, self.unit)

    @property
    def table(self) -> type[msgspec.Struct] | None:
        """The struct of the table, or of the tables in a list, that stand here; None for a plain value."""
        info = self.info.item_type if isinstance(self.info, VarTupleType) else self.info
        return info.cls if isinstance(info, StructType) else None


@functools.cache
def fields(table: type[msgspec.Struct]) -> tuple[Field, ...]:
    """Return the fields of ``table``. Kept, because reading type annotations is slow: 20 ms for the whole."""
    found = []
    for field in msgspec.structs.fields(table):
        info: Any = type_info(field.type)
        extra: dict[str, Any] = {}
        if isinstance(info, Metadata):
            info, extra = info.type, info.extra_json_schema or {}
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        unit = _UNITS[extra.get("unit", "count")]
        found.append(Field(field.name, field.type, info, unit, default, extra.get("description", "")))
    return tuple(found)


def expected(info: Type, unit: str = "") -> str:
    """Say in words which values ``info`` allows: ``a number of seconds above 0 and at most 3600``."""
    match info:
        case BoolType():
            return "true or false"
        case IntType() | FloatType():
            noun = "a number" if isinstance(info, FloatType) else "a whole number"
            return " ".join(part for part in (noun, unit and f"of {unit}", _bounds(info, unit)) if part)
        case LiteralType():
            *first, last = [toml(value) for value in info.values]
            return f"{', '.join(first)} or {last}"
        case StrType(pattern=str(pattern)):
            return f"a string matching `{pattern}`"
        case DictType():
            return "a table of strings"
        case VarTupleType(item_type=StructType()):
            return f"a list of tables, at least {info.min_length or 0}, at most {info.max_length}"
        case VarTupleType() | ListType():
            return "a list of strings"
        case _:
            return "a string"


def _bounds(info: IntType | FloatType, unit: str) -> str:
    """Say the range: ``from 1 to 100`` or ``above 0 and at most 3600 (1 h)``."""
    bounds = [
        f"{words} {bound:.15g}" + (f" ({scaled})" if (scaled := _scaled(bound, unit)) else "")
        for words, bound in (
            ("from", info.ge),
            ("above", info.gt),
            ("to" if info.gt is None else "and at most", info.le),
        )
        if bound is not None
    ]
    return " ".join(bounds)


def _scaled(value: float, unit: str) -> str:
    """Say ``value`` again in a larger unit where it comes out even (``8 MiB``, ``7 d``), else nothing."""
    return next(
        (f"{value / scale:g} {name}" for scale, name in _SCALES[unit] if value >= scale and not value % scale), ""
    )


def toml(value: Any) -> str:
    """Write ``value`` as TOML does: for the basic types JSON's notation is the same, but for a float that is whole."""
    if isinstance(value, float):
        return f"{value:g}" if value % 1 else str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def sections(config_type: type[msgspec.Struct] = Config) -> Iterator[Section]:
    """Yield the tables of ``config_type``: the top level first, then the others in the order of its fields."""
    options: list[Option] = []
    tables: list[Section] = []
    for field in fields(config_type):
        if field.table:
            (inner,) = sections(field.table)
            tables.append(Section(field.name, inner.meaning, isinstance(field.info, VarTupleType), inner.options))
            continue
        scaled = _scaled(field.default, field.unit) if isinstance(field.default, int | float) else ""
        default = "" if field.required else toml(field.default)
        options.append(Option(field.name, field.expected, default, scaled, field.meaning))
    yield Section("", " ".join((inspect.getdoc(config_type) or "").split()), False, tuple(options))
    yield from tables


def reference(config_type: type[msgspec.Struct] = Config) -> str:
    """Return the configuration reference as reStructuredText: a title and a table of options for each section."""
    lines: list[str] = []
    for section in sections(config_type):
        title = f"[[{section.name}]]" if section.many else f"[{section.name}]" if section.name else "Top level"
        label = section.name or "top"
        lines += [f".. _config-{label}:", "", title, "-" * len(title), "", rst(section.meaning), ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 20 30 20 30", ""]
        lines += _row("Option", "Value", "Default", "Meaning")
        for option in section.options:
            default = f"``{option.default}``" if option.default else "*required*"
            lines += _row(
                f"``{option.name}``",
                rst(option.expected),
                default + (f" ({option.scaled})" if option.scaled else ""),
                rst(option.meaning),
            )
        lines.append("")
    return "\n".join(lines)


def _row(first: str, *rest: str) -> list[str]:
    return [f"   * - {first}", *(f"     - {cell}" for cell in rest)]


def rst(text: str) -> str:
    """Turn our comments' single backticks into literals, and what reStructuredText would read as markup into text."""
    parts = re.split(r"``?([^`]+)``?", text)
    return "".join(
        f"``{part}``" if index % 2 else re.sub(r"([\\*|_])", r"\\\1", part) for index, part in enumerate(parts)
    )


def example(config_type: type[msgspec.Struct] = Config) -> str:
    """
    Return a complete configuration file: every option with its meaning, its allowed values and its default.

    What must be given is given; all else is commented out, so that the file shows the defaults and changes nothing.
    """
    lines = ["# Every option, with its default. Remove the # in front of an option to change it."]
    for section in sections(config_type):
        if section.name:
            lines += ["", f"[[{section.name}]]" if section.many else f"[{section.name}]"]
        lines.append(f"# {section.meaning.replace('``', '`')}")
        for option in section.options:
            lines += [
                "",
                f"# {option.meaning}",
                f"# {option.expected}{f'; the default is {option.scaled}' if option.scaled else ''}",
                f"#{option.name} = {option.default}"
                if option.default
                else f'{option.name} = "https://backend.example/api"',
            ]
    return "\n".join(lines) + "\n"
