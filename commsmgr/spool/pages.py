"""
Rows read from the pages of a database file itself, where SQLite finds no way to them.

A ruined inner page hides all the rows below it, although they are whole: SQLite walks from the root. Here every page is
looked at. What keeps stale rows out is the pointer map, which an auto-vacuum database has: it says of each page whether
it is in a tree or free. Whether a row is whole, and of which table, is for the caller to judge.

The layout is that of https://www.sqlite.org/fileformat2.html: a leaf of a table begins with 13; its cells hold the
payload's length, the row's number and the payload, whose rest is in a chain of overflow pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from struct import error as StructError
from struct import unpack
from typing import Final, TypeAlias

Value: TypeAlias = int | float | str | bytes | None

_LEAF: Final = 13
_ROOT, _INNER_OR_LEAF, _UNMAPPED = 1, 5, 0
_INTEGERS: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_ENTRY: Final = 5


class Pages:
    """
    The pages of one database file, which nobody writes.

    :param descriptor: the file's; it stays the caller's.
    :param size: bytes of a page.
    :param trust_unmapped: whether pages that the pointer map says nothing of count as in use: the map itself is lost.
    """

    def __init__(self, descriptor: int, size: int, *, trust_unmapped: bool) -> None:
        self._descriptor = descriptor
        self._size = size
        self._count = os.fstat(descriptor).st_size // size
        self._used = {_ROOT, _INNER_OR_LEAF, *((_UNMAPPED,) if trust_unmapped else ())}

    def rows(self, columns: int, wanted: Callable[[int], bool]) -> Iterator[tuple[Value, ...]]:
        """
        Yield the rows of ``columns`` values whose number is ``wanted``, as the pages come.

        The first value is the row's number, as it is in a table with an INTEGER PRIMARY KEY in its first column.
        """
        kinds = b""
        group = self._size // _ENTRY + 1
        for number in range(2, self._count + 1):
            place = (number - 2) % group
            page = self._page(number)
            if place == 0:
                kinds = page[::_ENTRY]
            elif page[:1] == bytes((_LEAF,)) and kinds[place - 1 : place] and kinds[place - 1] in self._used:
                yield from self._leaf(page, columns, wanted)

    def _page(self, number: int) -> bytes:
        if not 0 < number <= self._count:
            return b""
        try:
            return os.pread(self._descriptor, self._size, (number - 1) * self._size)
        except OSError:  # the disk cannot read it either
            return b""

    def _leaf(self, page: bytes, columns: int, wanted: Callable[[int], bool]) -> Iterator[tuple[Value, ...]]:
        (cells,) = unpack(">H", page[3:5])
        for index in range(min(cells, self._size // 2)):
            try:
                (start,) = unpack(">H", page[8 + 2 * index : 10 + 2 * index])
                length, position = _varint(page, start)
                number, position = _varint(page, position)
                if number >= 1 << 63 or not wanted(number) or length > self._count * self._size:
                    continue
                values = _record(self._payload(page, position, length))
            except (ValueError, IndexError, StructError):  # this cell is no cell
                continue
            if len(values) == columns:
                yield (number, *values[1:])

    def _payload(self, page: bytes, position: int, length: int) -> bytes:
        if length <= self._size - 35:
            return page[position : position + length]
        least = (self._size - 12) * 32 // 255 - 23
        local = least + (length - least) % (self._size - 4)
        if local > self._size - 35:
            local = least
        parts = [page[position : position + local]]
        (number,) = unpack(">I", page[position + local : position + local + 4])
        left = length - local
        while left > 0:
            page = self._page(number)
            if not page:
                raise ValueError("the chain of pages ends too early")
            parts.append(page[4 : 4 + left])
            left -= self._size - 4
            (number,) = unpack(">I", page[:4])
        return b"".join(parts)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(position, position + 8):
        value = value << 7 | data[index] & 0x7F
        if data[index] < 0x80:
            return value, index + 1
    return value << 8 | data[position + 8], position + 9


def _record(payload: bytes) -> list[Value]:
    """Return the values of a record; raises ValueError or IndexError when it is none."""
    end, position = _varint(payload, 0)
    types = []
    while position < end:
        kind, position = _varint(payload, position)
        types.append(kind)
    values = []
    for kind in types:
        value, position = _value(payload, position, kind)
        values.append(value)
    return values


def _value(payload: bytes, position: int, kind: int) -> tuple[Value, int]:
    if kind == 0:
        return None, position
    if kind in (8, 9):
        return kind - 8, position
    size = (kind - 12) // 2 if kind >= 12 else 8 if kind == 7 else _INTEGERS.get(kind, -1)
    data = payload[position : position + size]
    if size < 0 or len(data) != size:
        raise ValueError("a value is cut short")
    value: Value = data
    if kind == 7:
        (value,) = unpack(">d", data)
    elif kind < 12:
        value = int.from_bytes(data, "big", signed=True)
    elif kind % 2:
        value = data.decode()  # a UnicodeDecodeError is a ValueError
    return value, position + size
