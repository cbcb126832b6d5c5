"""
The one gate for what the embedding agent gives: data that JSON can say and every reader understands, texts that fit.

The bounds are those of :mod:`commsmgr.sanitise`, by which the other side would judge it.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct

from commsmgr.errors import InvalidMessage
from commsmgr.messages import LARGEST, SMALLEST

_encode = msgspec.json.Encoder().encode

OUTGOING_DEPTH = 100
OUTGOING_VALUES = 1_000_000
"""Bounds of what the embedding agent may give; a larger inventory would hold up the reactor while it is looked at."""


def encode_data(data: object) -> bytes:
    """
    Encode what the embedding agent gave, at once, so that it may change it afterwards.

    Text that is no Unicode (lone surrogates, as Python makes them of undecodable names) is said with U+FFFD in their
    place: one strange file name must not keep an inventory from being sent.

    :raise InvalidMessage: it has something that JSON cannot say, or is too deep or too much; it says what and where.
    """
    try:
        if isinstance(data, Struct):
            data = msgspec.to_builtins(data)
        _check_outgoing(data, "", 0, [OUTGOING_VALUES])
        try:
            return _encode(data)
        except UnicodeEncodeError:
            return _encode(_all_unicode(data))
    except (TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise InvalidMessage(f"not JSON: {type(error).__name__}: {error}") from error


def _check_outgoing(value: object, path: str, level: int, left: list[int]) -> None:
    left[0] -= 1
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        if not SMALLEST <= value <= LARGEST:
            raise _unsayable(path, "an integer of more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _unsayable(path, str(value))
    elif not isinstance(value, dict | list | tuple):
        raise _unsayable(path, f"a value of type {type(value).__name__}")
    elif level >= OUTGOING_DEPTH:
        raise InvalidMessage(f"not JSON for a backend: more than {OUTGOING_DEPTH} levels, or a circle")
    elif len(value) > left[0]:
        raise InvalidMessage(f"not JSON for a backend: more than {OUTGOING_VALUES} values")
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise _unsayable(path, f"a key of type {type(key).__name__}")
            _check_outgoing(part, key, level + 1, left)
    else:
        for part in value:
            _check_outgoing(part, path, level + 1, left)


def _unsayable(path: str, what: str) -> InvalidMessage:
    where = f" at or below {path[:60]!a}" if path else ""
    return InvalidMessage(f"not JSON: {what}{where}")


def _all_unicode(value: Any) -> Any:
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, dict):
        found = {unicode(key): _all_unicode(part) for key, part in value.items()}
        if len(found) < len(value):
            raise InvalidMessage("not JSON: two keys that are no Unicode would become one")
        return found
    return [_all_unicode(part) for part in value] if isinstance(value, list | tuple) else value


def unicode(text: str) -> str:
    """Return ``text`` with U+FFFD in place of lone surrogates."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def shorten(text: str, bound: int) -> tuple[str, int]:
    """
    Return ``text`` in at most ``bound`` bytes of UTF-8, and how many bytes were left out.

    What is left out is the middle: the beginning says what was done, the end how it went. A note in its place says how
    much there was.

    :param text: Unicode, without lone surrogates.
    :param bound: where it leaves no room for the note, all is left out.
    """
    if len(text) * 4 <= bound:
        return text, 0
    whole = text.encode()
    size = len(whole)
    if size <= bound:
        return text, 0
    room = bound - len(_LEFT_OUT.format(size, size).encode())
    if room < 0:
        return "", size
    head = whole[: room // 2].decode("utf-8", "ignore")
    # A continuation byte at the start is no beginning of a character.
    tail = whole[size - room // 2 :].lstrip(_CONTINUATION).decode()
    left_out = size - len(head.encode()) - len(tail.encode())
    return head + _LEFT_OUT.format(left_out, size) + tail, left_out


_LEFT_OUT = "\n… [truncated: {} of {} bytes left out] …\n"
_CONTINUATION = bytes(range(0x80, 0xC0))
