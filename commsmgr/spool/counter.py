"""The totals of the spool: one row of the database, written once per transaction, so that nothing need be counted."""

from __future__ import annotations

import sqlite3
from typing import Final

from msgspec import Struct, structs

from commsmgr.spool.records import Lane, first_seq


class Counter(Struct):
    """The totals, as they stand in the one row of the table of that name."""

    commits: int
    next_event: int
    next_state: int
    events: int
    event_bytes: int
    states: int
    dead_letters: int
    dead_bytes: int
    open_commands: int
    remembered_bytes: int
    losses: int


_COUNTER_FIELDS: Final = Counter.__struct_fields__
_READ_COUNTER: Final = f"SELECT {', '.join(_COUNTER_FIELDS)} FROM counter"
_WRITE_COUNTER: Final = f"UPDATE counter SET {', '.join(f'{name} = ?' for name in _COUNTER_FIELDS)}"


def is_plausible(total: object) -> bool:
    """Say whether what stands for a total may be one."""
    return isinstance(total, int) and 0 <= total < first_seq(Lane.STATE)


def read_counter(db: sqlite3.Connection) -> Counter | None:
    """Return the totals, None when their row is gone or holds what cannot be one."""
    row = db.execute(_READ_COUNTER).fetchone()
    if row is None or not all(map(is_plausible, row)):
        return None
    return Counter(*row)


def write_counter(db: sqlite3.Connection, counter: Counter) -> None:
    """Have these totals stand in their row."""
    db.execute(_WRITE_COUNTER, structs.astuple(counter))
