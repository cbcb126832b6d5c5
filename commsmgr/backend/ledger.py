"""
What the backend was told and what it has to say, in SQLite: it survives a restart when a file is given.

Every method commits before it returns (or when the surrounding :meth:`Ledger.transaction` ends), with
``synchronous=FULL``: what was acknowledged is on the disk. All of it happens in the reactor's thread. That is simple
and good enough for development; a production backend would do neither.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

from msgspec import Struct

MIGRATIONS = (
    """
CREATE TABLE machines (
    machine_id TEXT PRIMARY KEY, dialect TEXT NOT NULL DEFAULT '', seen_at REAL NOT NULL,
    heartbeat BLOB, heartbeat_at REAL NOT NULL DEFAULT 0,
    inventory BLOB, inventory_at REAL NOT NULL DEFAULT 0, checksum TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE commands (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, machine_id TEXT NOT NULL,
    envelope BLOB NOT NULL, state TEXT NOT NULL, at REAL NOT NULL
);
CREATE INDEX commands_by_id ON commands (id);
CREATE INDEX commands_pending ON commands (machine_id, seq) WHERE state = 'pending';
CREATE TABLE results (
    id TEXT PRIMARY KEY, command_id TEXT NOT NULL, machine_id TEXT NOT NULL, transport TEXT NOT NULL,
    body BLOB NOT NULL, at REAL NOT NULL, copies INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX results_by_command ON results (command_id);
CREATE TABLE answers (
    key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL, status INTEGER NOT NULL, body BLOB NOT NULL, at REAL NOT NULL
);
""",
    """
CREATE TABLE loss_receipts (
    machine_id TEXT NOT NULL, id TEXT NOT NULL, transport TEXT NOT NULL, body BLOB NOT NULL, at REAL NOT NULL,
    copies INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (machine_id, id)
);
""",
)
"""The layout, step by step; a file of an older version is taken further."""
_VERSION = len(MIGRATIONS)
_PRUNE_EVERY = 1000

CommandState: TypeAlias = Literal["pending", "taken", "done", "refused"]
"""Kept until acknowledged; with the agent (or sent to a plain one); answered; refused by the agent for good."""


class MachineRow(Struct, frozen=True):
    """What is known of one machine; times are seconds since the epoch, 0 for never."""

    machine_id: str
    dialect: str
    seen_at: float
    heartbeat: bytes | None
    heartbeat_at: float
    inventory_at: float
    checksum: str


class CommandRow(Struct, frozen=True):
    """One command and its ``command`` envelope as sent."""

    id: str
    machine_id: str
    envelope: bytes
    state: CommandState


class ResultRow(Struct, frozen=True):
    """One result as received, by which transport it first came, and how many times altogether."""

    id: str
    command_id: str
    machine_id: str
    transport: str
    body: bytes
    copies: int


class LossReceiptRow(Struct, frozen=True):
    """One loss receipt: when and by which transport it first came, and how many times altogether."""

    id: str
    transport: str
    body: bytes
    at: float
    copies: int


class Answer(Struct, frozen=True):
    """What an idempotency key was answered with, and the digest of the request that it came with."""

    fingerprint: bytes
    status: int
    body: bytes


class Ledger:
    """
    The backend's memory.

    :param path: of the SQLite file, or ``:memory:``.
    :param wall: seconds since the epoch.
    :param window: seconds that finished commands, results, loss receipts and idempotency keys are remembered.
    :raise ValueError: the file belongs to something else or to a newer version.
    """

    def __init__(self, path: str, wall: Callable[[], float], window: float = 86400.0) -> None:
        self._wall = wall
        self._window = window
        self._depth = 0
        self._committed: list[Callable[[], None]] = []
        self._writes = 0
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version > _VERSION or (version == 0 and tables):
            self._db.close()
            raise ValueError(f"{path} was not written by this version of the reference backend: set another path")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
        self.prune()

    def close(self) -> None:
        """Close the file. Nothing else may be called after it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside at once, or nothing of it when an exception leaves the block."""
        if self._depth == 0:
            self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("ROLLBACK")
                self._committed.clear()
            raise
        self._depth -= 1
        if self._depth == 0:
            self._db.execute("COMMIT")
            self._writes += 1
            committed, self._committed = self._committed, []
            for announce in committed:
                announce()
            if self._writes % _PRUNE_EVERY == 0:
                self.prune()

    def when_committed(self, announce: Callable[[], None]) -> None:
        """Call ``announce`` once the open transaction is durable, at once when none is; never if it is rolled back."""
        if self._depth:
            self._committed.append(announce)
        else:
            announce()

    def prune(self) -> None:
        """Forget what is older than the window, save commands that still wait for their agent."""
        before = self._wall() - self._window
        with self.transaction():
            self._db.execute("DELETE FROM answers WHERE at < ?", (before,))
            self._db.execute("DELETE FROM results WHERE at < ?", (before,))
            self._db.execute("DELETE FROM loss_receipts WHERE at < ?", (before,))
            self._db.execute("DELETE FROM commands WHERE at < ? AND state IN ('done', 'refused')", (before,))

    # -- machines ---------------------------------------------------------------------------------------------------

    def seen(self, machine_id: str, dialect: str = "") -> None:
        """Note that a machine spoke, and which dialect; an empty one leaves what is known."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO machines (machine_id, dialect, seen_at) VALUES (?, ?, ?)"
                " ON CONFLICT (machine_id) DO UPDATE SET seen_at = excluded.seen_at,"
                " dialect = iif(excluded.dialect = '', dialect, excluded.dialect)",
                (machine_id, dialect, self._wall()),
            )

    def heartbeat(self, machine_id: str, body: bytes) -> None:
        """Keep the latest heartbeat of a machine that was seen."""
        with self.transaction():
            self._db.execute(
                "UPDATE machines SET heartbeat = ?, heartbeat_at = ? WHERE machine_id = ?",
                (body, self._wall(), machine_id),
            )

    def inventory(self, machine_id: str, body: bytes, checksum: str) -> None:
        """Keep the latest inventory of a machine that was seen."""
        with self.transaction():
            self._db.execute(
                "UPDATE machines SET inventory = ?, inventory_at = ?, checksum = ? WHERE machine_id = ?",
                (body, self._wall(), checksum, machine_id),
            )

    def inventory_of(self, machine_id: str) -> bytes | None:
        """Return the latest inventory as it came, or None."""
        row = self._db.execute("SELECT inventory FROM machines WHERE machine_id = ?", (machine_id,)).fetchone()
        return row[0] if row else None

    def inventory_checksum_of(self, machine_id: str) -> str:
        """Return the checksum of the latest inventory, empty if there is none."""
        row = self._db.execute("SELECT checksum FROM machines WHERE machine_id = ?", (machine_id,)).fetchone()
        return str(row[0]) if row else ""

    def machines(self) -> list[MachineRow]:
        """Return every machine ever seen, by name."""
        return [
            MachineRow(*row)
            for row in self._db.execute(
                "SELECT machine_id, dialect, seen_at, heartbeat, heartbeat_at, inventory_at, checksum FROM machines"
                " ORDER BY machine_id"
            )
        ]

    def dialect_of(self, machine_id: str) -> str | None:
        """Return the dialect a machine last spoke, empty when that is not known yet, None for a machine never seen."""
        row = self._db.execute("SELECT dialect FROM machines WHERE machine_id = ?", (machine_id,)).fetchone()
        return row[0] if row else None

    # -- commands ---------------------------------------------------------------------------------------------------

    def add_command(self, id: str, machine_id: str, envelope: bytes, state: CommandState) -> None:
        """Keep a command."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO commands (id, machine_id, envelope, state, at) VALUES (?, ?, ?, ?, ?)",
                (id, machine_id, envelope, state, self._wall()),
            )

    def pending(self, machine_id: str, limit: int = -1) -> list[CommandRow]:
        """Return the commands that the machine has not acknowledged, in the order in which they were given."""
        return [
            CommandRow(*row)
            for row in self._db.execute(
                "SELECT id, machine_id, envelope, state FROM commands WHERE machine_id = ? AND state = 'pending'"
                " ORDER BY seq LIMIT ?",
                (machine_id, limit),
            )
        ]

    def settle(self, machine_id: str, ids: Iterable[str], state: CommandState) -> list[str]:
        """Move pending commands of the machine to ``state``; return the ids of those that were pending."""
        with self.transaction():
            return [
                command_id
                for command_id in ids
                if self._db.execute(
                    "UPDATE commands SET state = ? WHERE id = ? AND machine_id = ? AND state = 'pending'",
                    (state, command_id, machine_id),
                ).rowcount
            ]

    def command(self, id: str) -> CommandRow | None:
        """Return the latest command that bears ``id``."""
        row = self._db.execute(
            "SELECT id, machine_id, envelope, state FROM commands WHERE id = ? ORDER BY seq DESC LIMIT 1", (id,)
        ).fetchone()
        return CommandRow(*row) if row else None

    # -- results ----------------------------------------------------------------------------------------------------

    def add_result(
        self, id: str, command_id: str, machine_id: str, transport: str, body: bytes, *, overwrite: bool = False
    ) -> bool:
        """
        Keep a result and mark its command done; return whether it is new.

        :param overwrite: what a plain backend does with a result that came before. Otherwise the first one stays.
        """
        with self.transaction():
            new = self._db.execute("UPDATE results SET copies = copies + 1 WHERE id = ?", (id,)).rowcount == 0
            if new:
                self._db.execute(
                    "INSERT INTO results (id, command_id, machine_id, transport, body, at) VALUES (?, ?, ?, ?, ?, ?)",
                    (id, command_id, machine_id, transport, body, self._wall()),
                )
                self._db.execute("UPDATE commands SET state = 'done' WHERE id = ?", (command_id,))
            elif overwrite:
                self._db.execute("UPDATE results SET body = ? WHERE id = ?", (body, id))
        return new

    def results(self, command_id: str | None = None) -> Sequence[ResultRow]:
        """Return the results in order of arrival, all or those of one command."""
        where, values = ("", ()) if command_id is None else ("WHERE command_id = ?", (command_id,))
        return [
            ResultRow(*row)
            for row in self._db.execute(
                f"SELECT id, command_id, machine_id, transport, body, copies FROM results {where} ORDER BY rowid",
                values,
            )
        ]

    # -- loss receipts ----------------------------------------------------------------------------------------------

    def add_loss_receipt(self, id: str, machine_id: str, transport: str, body: bytes) -> bool:
        """Keep what a machine had to give up; return whether it is new. One that came before stays as it is."""
        with self.transaction():
            known = self._db.execute(
                "UPDATE loss_receipts SET copies = copies + 1 WHERE machine_id = ? AND id = ?", (machine_id, id)
            ).rowcount
            if not known:
                self._db.execute(
                    "INSERT INTO loss_receipts (machine_id, id, transport, body, at) VALUES (?, ?, ?, ?, ?)",
                    (machine_id, id, transport, body, self._wall()),
                )
        return not known

    def loss_receipts(self, machine_id: str, limit: int = -1) -> list[LossReceiptRow]:
        """Return the machine's latest loss receipts, the latest first."""
        return [
            LossReceiptRow(*row)
            for row in self._db.execute(
                "SELECT id, transport, body, at, copies FROM loss_receipts WHERE machine_id = ?"
                " ORDER BY rowid DESC LIMIT ?",
                (machine_id, limit),
            )
        ]

    # -- idempotency keys -------------------------------------------------------------------------------------------

    def answer(self, key: str) -> Answer | None:
        """Return what the key was answered with."""
        row = self._db.execute("SELECT fingerprint, status, body FROM answers WHERE key = ?", (key,)).fetchone()
        return Answer(*row) if row else None

    def remember(self, key: str, answer: Answer) -> None:
        """Keep what the key is answered with."""
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO answers (key, fingerprint, status, body, at) VALUES (?, ?, ?, ?, ?)",
                (key, answer.fingerprint, answer.status, answer.body, self._wall()),
            )
