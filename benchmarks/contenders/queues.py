"""Queues on disk that one could take instead of commsmgr's spool, and SQLite by itself."""

from __future__ import annotations

import sqlite3

from benchmarks.sample import Sample, Watch

WARM_UP = 10


def sqlite(operations: int, size: int, batch: int) -> Sample:
    """Insert into one table of SQLite in WAL mode, flushed at each commit, ``batch`` rows to a transaction."""
    body, watch, seq = b"r" * size, Watch(), 0
    db = sqlite3.connect("queue.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE entry (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    for count in range(operations // batch + WARM_UP):
        if count == WARM_UP:
            watch.start()
        rows = [(seq + number, body) for number in range(1, batch + 1)]
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO entry VALUES (?, ?)", rows)
        db.execute("COMMIT")
        seq += batch
    sample = watch.stop(operations // batch * batch)
    (held,) = db.execute("SELECT count(*) FROM entry").fetchone()
    _require(held, seq)
    db.close()
    return sample


def persist_queue(operations: int, size: int, batch: int) -> Sample:
    """Put into persist-queue's SQLite queue, one by one, each with its commit."""
    from persistqueue import SQLiteQueue

    assert batch == 1
    body, watch = b"r" * size, Watch()
    queue = SQLiteQueue("queue", auto_commit=True)
    for count in range(operations + WARM_UP):
        if count == WARM_UP:
            watch.start()
        queue.put(body)
    sample = watch.stop(operations)
    _require(queue._count(), operations + WARM_UP)
    return sample


def diskcache(operations: int, size: int, batch: int, synchronous: int) -> Sample:
    """
    Push to diskcache's queue, ``batch`` to a transaction.

    :param synchronous: as of SQLite: 1, diskcache's default, flushes nothing at a commit; 2 does.
    """
    from diskcache import Cache

    body, watch = b"r" * size, Watch()
    with Cache("cache", sqlite_synchronous=synchronous, eviction_policy="none", size_limit=1 << 40) as cache:
        for count in range(operations // batch + WARM_UP):
            if count == WARM_UP:
                watch.start()
            if batch == 1:
                cache.push(body)
                continue
            with cache.transact():
                for _ in range(batch):
                    cache.push(body)
        sample = watch.stop(operations // batch * batch)
        _require(len(cache), (operations // batch + WARM_UP) * batch)
    return sample


def _require(held: int, wanted: int) -> None:
    if held != wanted:
        raise RuntimeError(f"{held} entries are held, not {wanted}")
