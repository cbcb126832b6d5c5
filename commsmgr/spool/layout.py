"""
Are the tables those that our migrations make?

SQLite takes their definitions from the file, where a flipped bit may make a column of another name, a primary key
that is none, or a table that is missing. No statement of ours fits then, and what SQLite says of that does not sound of
damage.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache
from typing import Any, TypeAlias

from commsmgr.spool.faults import lenient, torn

Layout: TypeAlias = dict[str, list[tuple[Any, ...]]]
"""Of each table: its columns, with their types, bounds, defaults and places in the primary key."""

_COLUMNS = (
    'SELECT m.name, p.name, p.type, p."notnull", p.dflt_value, p.pk FROM sqlite_master m'
    " LEFT JOIN pragma_table_info(m.name) p WHERE m.type = 'table' ORDER BY m.name, p.cid"
)


def of(db: sqlite3.Connection) -> Layout:
    """Return the layout that ``db`` has."""
    found: Layout = {}
    with lenient(db):
        for name, *column in db.execute(_COLUMNS):
            found.setdefault(name, []).append(tuple(column))
    return found


@cache
def made_by(scripts: tuple[str, ...]) -> Layout:
    """Return the layout that ``scripts`` make of an empty database."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(scripts))
        return {name: columns for name, columns in of(db).items() if not name.startswith("sqlite_")}


def require(db: sqlite3.Connection, scripts: tuple[str, ...], done: int) -> None:
    """
    See that the tables of ``db`` are those that the first ``done`` of ``scripts`` make; others do not matter.

    :raise sqlite3.DatabaseError: they are not; or the file is damaged, of which SQLite cannot speak where its sentence
        would quote bytes that are no text.
    """
    try:
        found = of(db)
    except UnicodeDecodeError:
        raise torn("the definitions of the tables are damaged") from None
    right = made_by(scripts[:done])
    for name in made_by(scripts):
        if found.get(name) != right.get(name):
            raise torn(f"the table {name} is " + ("not as it should be" if name in found else "missing"))
