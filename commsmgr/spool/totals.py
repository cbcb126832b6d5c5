"""The totals, counted anew: what stands in their one row saves counting, and may be wrong where the rows are right."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from commsmgr.spool import lossbook
from commsmgr.spool.counter import Counter, is_plausible
from commsmgr.spool.faults import torn
from commsmgr.spool.records import LEAP, MAX_NUMBER, Lane, first_seq

_FIELDS: Final = Counter.__struct_fields__
_STATES: Final = first_seq(Lane.STATE)

# Of each total: how to take it from the rows. "commits" is no total, and numbers must only be beyond all others, save
# those that are none.
TOTALS: Final = {
    "events": f"SELECT count(*) FROM entry WHERE seq < {_STATES}",
    "event_bytes": f"SELECT coalesce(sum(length(body)), 0) FROM entry WHERE seq < {_STATES}",
    "states": f"SELECT count(*) FROM entry WHERE seq >= {_STATES}",
    "dead_letters": "SELECT count(*) FROM dead_letter",
    "dead_bytes": "SELECT coalesce(sum(length(body)), 0) FROM dead_letter",
    "open_commands": "SELECT count(*) FROM command WHERE finished_at IS NULL",
    "remembered_bytes": "SELECT coalesce(sum(length(body)), 0) FROM remembered",
}
NEXT: Final = {
    "next_event": f"SELECT 1 + coalesce(max(seq), 0) FROM (SELECT seq FROM entry UNION ALL SELECT seq FROM dead_letter"
    f" UNION ALL SELECT result_seq FROM command) WHERE seq BETWEEN 1 AND {MAX_NUMBER}",
    "next_state": f"SELECT 1 + coalesce(max(seq) - {_STATES}, 0) FROM (SELECT seq FROM entry UNION ALL"
    f" SELECT seq FROM dead_letter) WHERE seq BETWEEN {_STATES + 1} AND {_STATES + MAX_NUMBER}",
}


# Of those that an agent goes by, whether there is anything at all, which is found at once.
_SOME: Final = {
    name: statement.replace("count(*)", "1").replace("SELECT", "SELECT EXISTS (SELECT", 1) + ")"
    for name, statement in TOTALS.items()
    if name in ("events", "states", "open_commands")
}


def recount(db: sqlite3.Connection) -> dict[str, int]:
    """Return the totals as the rows have them; the next numbers are the least that are possible."""
    right = {name: int(db.execute(statement).fetchone()[0]) for name, statement in {**TOTALS, **NEXT}.items()}
    losses = sum(1 if loss is None else loss.count for _, loss in lossbook.read(db))
    for (body,) in db.execute("SELECT body FROM loss_receipt"):
        told = lossbook.reported(body)
        losses += 1 if told is None else sum(loss.count for loss in told)
    return right | {"losses": losses}


def found(db: sqlite3.Connection) -> dict[str, int]:
    """
    Return the totals as they stand there, which cannot all be right where they are not plausible.

    :raise sqlite3.DatabaseError: also when there are none, or none that we could have written.
    """
    rows = db.execute("SELECT * FROM counter")
    row: tuple[Any, ...] | None = rows.fetchone()
    if row is None or not all(isinstance(value, int) for value in row):
        raise torn("the totals are damaged")
    return {name: value for (name, *_), value in zip(rows.description, row, strict=True) if name in _FIELDS}


def corrected(db: sqlite3.Connection) -> Counter | None:
    """
    Return the totals as they must be, where those that stand there cannot be right; None where they can.

    :raise sqlite3.DatabaseError: not all can be read that they are taken from.
    """
    counter = found(db)
    wild = {name for name, value in counter.items() if not is_plausible(value)}
    # One that is merely too low or too high is not seen: to count all that wait would take too long for a start.
    if not wild and all(bool(counter[name]) == db.execute(some).fetchone()[0] for name, some in _SOME.items()):
        return None
    right = recount(db)
    for name in NEXT:
        # Nobody knows how many were used of which nothing is left.
        right[name] = right[name] + LEAP if name in wild else max(right[name], counter[name])
    return Counter(**({"commits": 0 if "commits" in wild else counter["commits"]} | right))
