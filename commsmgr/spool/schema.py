"""
The layout of the spool's database, as numbered migrations.

To change it, append a script to :data:`MIGRATIONS`; never edit one that was released.

``entry.seq`` has the lane in its highest bits, so that the primary key alone gives order within each lane: at a million
rows every further index costs 15 to 30 per cent. The other indexes are partial and cost nothing for plain events.
Totals stand in one row of ``counter``, written once per transaction.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from commsmgr.spool import layout

APPLICATION_ID: Final = 0x636F6D6D
"""Bytes 68 to 71 of the file: "comm"."""

MIGRATIONS: Final = (
    """
    CREATE TABLE entry (
        seq INTEGER PRIMARY KEY,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        key TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        expires_at REAL,
        crc INTEGER NOT NULL,
        body BLOB NOT NULL
    );
    CREATE UNIQUE INDEX entry_key ON entry (key) WHERE key <> '';
    CREATE INDEX entry_expiry ON entry (expires_at) WHERE expires_at IS NOT NULL;

    CREATE TABLE dead_letter (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        seq INTEGER NOT NULL,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        key TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        died_at REAL NOT NULL,
        reason TEXT NOT NULL,
        body BLOB NOT NULL
    );

    CREATE TABLE loss (
        reason TEXT NOT NULL,
        kind TEXT NOT NULL,
        n INTEGER NOT NULL,
        first_at REAL NOT NULL,
        last_at REAL NOT NULL,
        PRIMARY KEY (reason, kind)
    ) WITHOUT ROWID;

    CREATE TABLE command (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        digest TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        offered INTEGER NOT NULL DEFAULT 0,
        finished_at REAL,
        status TEXT NOT NULL DEFAULT '',
        result_id TEXT NOT NULL DEFAULT '',
        result_seq INTEGER,
        crc INTEGER NOT NULL,
        body BLOB NOT NULL
    );
    CREATE UNIQUE INDEX command_identity ON command (id, digest);
    CREATE INDEX command_open ON command (key) WHERE finished_at IS NULL;
    CREATE INDEX command_finished ON command (finished_at) WHERE finished_at IS NOT NULL;

    CREATE TABLE remembered (
        key INTEGER PRIMARY KEY,
        crc INTEGER NOT NULL,
        body BLOB NOT NULL
    );

    CREATE TABLE counter (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        commits INTEGER NOT NULL DEFAULT 0,
        next_event INTEGER NOT NULL DEFAULT 1,
        next_state INTEGER NOT NULL DEFAULT 1,
        events INTEGER NOT NULL DEFAULT 0,
        event_bytes INTEGER NOT NULL DEFAULT 0,
        states INTEGER NOT NULL DEFAULT 0,
        dead_letters INTEGER NOT NULL DEFAULT 0,
        dead_bytes INTEGER NOT NULL DEFAULT 0,
        open_commands INTEGER NOT NULL DEFAULT 0,
        remembered_bytes INTEGER NOT NULL DEFAULT 0
    );
    INSERT INTO counter (one) VALUES (1);
    """,
    """
    CREATE TABLE loss_receipt (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        id TEXT NOT NULL,
        body BLOB NOT NULL
    );
    ALTER TABLE counter ADD COLUMN losses INTEGER NOT NULL DEFAULT 0;
    UPDATE counter SET losses = (SELECT coalesce(sum(n), 0) FROM loss);
    """,
)

VERSION: Final = len(MIGRATIONS)


class NewerVersion(Exception):
    """The database was written by a newer commsmgr."""


def look(db: sqlite3.Connection) -> int:
    """
    Return the version of a freshly connected ``db``, whose layout is right. Nothing is written.

    :raise NewerVersion: it is greater than ours.
    :raise sqlite3.Error: the file is damaged, or the disk is failing, or another process has the database.
    """
    # First of all: what follows may read an existing file, which in another mode would need shared memory beside it.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise NewerVersion(version)
    layout.require(db, MIGRATIONS, version)
    return int(version)


def prepare(db: sqlite3.Connection, *, synchronous: str, in_memory: bool) -> None:
    """
    Make a freshly connected ``db`` ready: settings in the one order that works, then the migrations that it lacks.

    ``page_size`` and ``auto_vacuum`` only count before the first write. The application id is written before the switch
    to write-ahead logging, so that it is in the file itself from the first page on, where :mod:`.files` looks for it.

    Nothing is written to a database that is as it should be: each attempt to open it on a failing disk would make the
    log longer, and put a frame behind what was not flushed, which after a power cut looks like damage.

    :param synchronous: ``FULL`` or ``NORMAL``.
    :raise NewerVersion: nothing was changed.
    :raise sqlite3.Error: the file is damaged, or the disk is full or failing.
    """
    version = look(db)
    if version == 0:
        db.execute(f"PRAGMA page_size = {512 if in_memory else 4096}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA secure_delete = OFF")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute(f"PRAGMA cache_size = {-64 if in_memory else -4096}")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
    try:
        # So that the application id, the version and the schema are in the file itself before anything is accepted.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.OperationalError:
        if version < VERSION:
            raise
        # They are. That there is no room to fold a long log in must not keep receipts from being taken.
