"""
The statements about losses: what was given up and the backend was not told yet. Runs in the writer, as the books do.

Losses are counted by reason and kind in ``loss``. To be reported they move, all at once and in one transaction, into
the single row of ``loss_receipt``, which has an id and stays until the backend has acknowledged that id. What is lost
meanwhile is counted in ``loss`` again and waits for the next report. So no loss is in two reports, and a report has
the same id and the same content however often it must be sent.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

import msgspec

from commsmgr.spool.faults import lenient
from commsmgr.spool.records import MAX_NUMBER, Loss, PendingLossReport, Reason

MAX_ROWS: Final = 32
"""Rows of ``loss``; beyond them losses count under the reason ``other``, which is one row more for each kind."""

_ALL: Final = "SELECT reason, kind, n, first_at, last_at FROM loss ORDER BY first_at, reason, kind"

_decoder: Final = msgspec.json.Decoder(list[Loss])


def read(db: sqlite3.Connection) -> list[tuple[tuple[Any, ...], Loss | None]]:
    """Return the rows of ``loss``, each with what it says, or with None when it is damaged."""
    with lenient(db):
        return [(row, _loss(row)) for row in db.execute(_ALL)]


def _loss(row: tuple[Any, ...]) -> Loss | None:
    try:
        loss = msgspec.convert(dict(zip(Loss.__struct_fields__, row, strict=True)), Loss)
    except msgspec.ValidationError:
        return None
    return loss if loss.count < MAX_NUMBER else None


def reported(body: Any) -> list[Loss] | None:
    """Return the losses in the body of a report, None when it is damaged."""
    try:
        losses = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
        return None
    return losses if sum(loss.count for loss in losses) < MAX_NUMBER else None


class LossBook:
    """The two tables, seen by one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def count(self, reason: str, kind: str, now: float, count: int = 1) -> str:
        """
        Count a loss, or several.

        :param reason: counts by what stands before its first colon, for the rest may be a peer's free text.
        :return: the reason that it was counted under.
        """
        name = reason.partition(":")[0][:64]
        known = self._db.execute("SELECT 1 FROM loss WHERE reason = ? AND kind = ?", (name, kind)).fetchone()
        if known is None and self._db.execute("SELECT count(*) FROM loss").fetchone()[0] >= MAX_ROWS:
            name = Reason.OTHER
        self._db.execute(
            "INSERT INTO loss (reason, kind, n, first_at, last_at) VALUES (?1, ?2, ?4, ?3, ?3)"
            " ON CONFLICT (reason, kind) DO UPDATE SET n = n + ?4,"
            " first_at = min(first_at, ?3), last_at = max(last_at, ?3)",
            (name, kind, now, count),
        )
        return name

    def take_back(self, reason: str, kind: str, counted_at: float) -> bool:
        """
        What was counted at ``counted_at`` is no loss after all.

        :return: whether it could be taken off the books; otherwise a report has told, or is about to tell, of it.
        """
        for name in (reason.partition(":")[0][:64], Reason.OTHER):
            taken = self._db.execute(
                "UPDATE loss SET n = n - 1 WHERE reason = ? AND kind = ? AND first_at <= ?", (name, kind, counted_at)
            )
            if taken.rowcount:
                self._db.execute("DELETE FROM loss WHERE n <= 0")
                return True
        return False

    def pending_report(self, new_id: str, now: float) -> PendingLossReport | None:
        """
        Return the report that is outstanding, or else make one of what was counted.

        :param new_id: the id of one that is made now.
        :return: None when nothing was lost.
        """
        with lenient(self._db):
            row = self._db.execute("SELECT id, body FROM loss_receipt").fetchone()
        if row is None:
            rows = read(self._db)
            if not rows:
                return None
            unknown = Loss(Reason.DAMAGED, "unknown", 1, now, now)
            row = new_id, msgspec.json.encode([loss or unknown for _, loss in rows])
            self._db.execute("INSERT INTO loss_receipt (one, id, body) VALUES (1, ?, ?)", row)
            self._db.execute("DELETE FROM loss")
        report_id, body = row
        if not (isinstance(report_id, str) and report_id.isascii() and report_id.isprintable()):
            # A flipped bit; no backend could acknowledge that.
            report_id = new_id
            self._db.execute("UPDATE loss_receipt SET id = ?", (report_id,))
        losses = reported(body)
        if losses is None:
            # What was lost is no longer known, but that something was.
            losses = [Loss(Reason.DAMAGED, "loss_receipt", 1, now, now)]
        return PendingLossReport(report_id, losses)

    def mend(self, now: float) -> int:
        """Put one loss of unknown kind in the place of each row that is damaged; return how many those are."""
        rows = read(self._db)
        right = [row for row, loss in rows if loss is not None]
        if bad := len(rows) - len(right):
            self._db.execute("DELETE FROM loss")
            self._db.executemany(
                "INSERT OR IGNORE INTO loss (reason, kind, n, first_at, last_at) VALUES (?, ?, ?, ?, ?)", right
            )
            self.count(Reason.DAMAGED, "unknown", now, bad)
        return bad

    def forget(self, id: str) -> int:
        """The backend knows of this report; another id changes nothing. Return how many losses it was not told of."""
        self._db.execute("DELETE FROM loss_receipt WHERE id = ?", (id,))
        (left,) = self._db.execute("SELECT total(n) FROM loss WHERE typeof(n) = 'integer'").fetchone()
        return int(left)
