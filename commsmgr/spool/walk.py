"""
The rows of a torn database, in an image of it: by SQLite's way as far as there is one, and then page by page.

Each table is walked in the order of its numbers. Where SQLite finds no way on, the next number behind which there is
something is found by doubling and halving the step, and the gap is noted. Rows that are whole but hidden in a gap are
then looked for in the pages themselves (see :mod:`.pages`).
"""

from __future__ import annotations

import os
import sqlite3
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

from msgspec import Struct

from commsmgr.spool import image
from commsmgr.spool.image import UNREADABLE, Image
from commsmgr.spool.pages import Pages
from commsmgr.spool.wal import PAGE_SIZE

_TOP: Final = 1 << 62


class Table(Struct, frozen=True):
    """
    :ivar columns: the first one is the row's number.
    :ivar reals: the places of those that hold fractions, which SQLite stores as whole numbers where it can.
    """

    name: str
    columns: tuple[str, ...]
    reals: frozenset[int] = frozenset()


class Gaps:
    """Ranges of numbers, ascending, in which rows are lost: above the first of a pair, and up to the second."""

    def __init__(self) -> None:
        self._above: list[int] = []
        self._up_to: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._above)

    def add(self, above: int, up_to: int) -> None:
        self._above.append(above)
        self._up_to.append(up_to)

    def extend(self) -> None:
        """Nothing follows the last one: it has no known end, for what stands behind it may be hidden as well."""
        self._up_to[-1] = _TOP

    def __contains__(self, number: int) -> bool:
        place = bisect_left(self._above, number) - 1
        return place >= 0 and number <= self._up_to[place]


class Walk:
    """
    Reads one image. Used as a context manager.

    :ivar db: a connection that changes nothing.
    :ivar gaps: by the name of the table, where SQLite found no way; complete when its rows were read.
    """

    def __init__(self, source: Image) -> None:
        self._file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._pages = Pages(self._file, PAGE_SIZE, trust_unmapped=source.map_lost)
        self.db = image.connect(source.path)
        self.gaps: defaultdict[str, Gaps] = defaultdict(Gaps)

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.db.close()
        os.close(self._file)

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that SQLite finds, in order, and then those hidden in the gaps, in no order."""
        number = table.columns[0]
        select = f"SELECT {', '.join(table.columns)} FROM {table.name} NOT INDEXED WHERE {number} > ? ORDER BY {number}"
        gaps, last = self.gaps[table.name], 0
        while last < _TOP:
            nothing = True
            try:
                for row in self.db.execute(select, (last,)):
                    if row[0] <= last:
                        raise sqlite3.DatabaseError("the tree leads back")
                    nothing, last = False, row[0]
                    yield row
                if nothing and gaps:
                    gaps.extend()
                break
            except UNREADABLE:
                behind = _behind(self.db, select, last)
                gaps.add(last, behind)
                last = behind
        if gaps:
            for values in self._pages.rows(len(table.columns), gaps.__contains__):
                yield tuple(
                    float(value) if index in table.reals and isinstance(value, int) else value
                    for index, value in enumerate(values)
                )


def _behind(source: sqlite3.Connection, select: str, last: int) -> int:
    """Return the first number above ``last`` behind which there is something to be had, or nothing at all."""

    def readable(above: int) -> bool:
        try:
            row = source.execute(f"{select} LIMIT 1", (above,)).fetchone()
        except UNREADABLE:
            return False
        return row is None or row[0] > above

    bad, step = last, 1
    while not readable(last + step):
        bad = last + step
        step *= 2
        if bad + step >= _TOP:
            return _TOP
    good = last + step
    while good - bad > 1:
        middle = (bad + good) // 2
        if readable(middle):
            good = middle
        else:
            bad = middle
    return good
