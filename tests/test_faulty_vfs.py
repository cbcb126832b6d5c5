"""The test kit's disk itself: what it loses, what it keeps, and how it fails."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import mkdtemp

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.spool import files
from tests.faulty_vfs import IOERR, Crashed, Disk, FaultyVFS, Operation

ROOT = Path(__file__).absolute().parent.parent
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class FaultyVFSTests(SynchronousTestCase):
    """A database of one table with one row, durable, on a disk of its own."""

    def setUp(self) -> None:
        self.root = mkdtemp(dir=MEMORY)
        self.addCleanup(rmtree, self.root)
        self.vfs = FaultyVFS()
        self.vfs.install()
        self.connections: list[sqlite3.Connection] = []
        self.addCleanup(self.vfs.uninstall)
        self.addCleanup(self.close_all)
        self.path = os.path.join(self.root, "a.db")
        self.disk = self.make_disk(1)
        self.db = self.connect()
        self.db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, body)")
        self.db.execute("INSERT INTO t VALUES (0, 'first')")

    def tearDown(self) -> None:
        self.assertEqual(self.disk.errors, [])

    def close_all(self) -> None:
        for each in self.connections:
            each.close()

    def make_disk(self, seed: int) -> Disk:
        return self.vfs.disk(self.root, Random(seed))

    def connect(self, path: str | None = None, synchronous: str = "FULL") -> sqlite3.Connection:
        db = sqlite3.connect(path or self.path, isolation_level=None, timeout=0)
        self.connections.append(db)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        return db

    def insert(self, count: int, start: int = 1) -> None:
        for n in range(start, start + count):
            self.db.execute("INSERT INTO t VALUES (?, randomblob(3000))", (n,))

    def rows(self, db: sqlite3.Connection | None = None) -> list[int]:
        return [n for (n,) in (db or self.db).execute("SELECT n FROM t ORDER BY n")]

    def fails(self, statement: str) -> str:
        error = self.assertRaises(sqlite3.Error, self.db.execute, statement)
        return str(getattr(error, "sqlite_errorname", ""))

    def answer(self, kind: str, code: int) -> None:
        """Let every operation of that kind fail."""
        self.disk.hook = lambda operation: code if operation.kind == kind else 0

    # -- crashes

    def test_synced_survives(self) -> None:
        """What was committed with a sync is there after any power cut."""
        for seed in range(20):
            self.disk = self.make_disk(seed)
            self.db = self.connect()
            before = len(self.rows())
            self.insert(5, before)
            self.disk.crash(power_cut=True)
            self.db = self.connect()
            self.assertEqual(self.rows(), list(range(before + 5)))
            self.db.close()

    def test_unsynced_is_lost(self) -> None:
        """What was committed without a sync is lost from some point on, at different points for different seeds."""
        self.db.close()
        left = set()
        for seed in range(20):
            self.disk = self.make_disk(seed)
            self.db = self.connect(synchronous="NORMAL")
            self.db.execute("DELETE FROM t WHERE n > 0")
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.insert(20)
            self.disk.crash(power_cut=True)
            self.db = self.connect()
            rows = self.rows()
            self.assertEqual(rows, list(range(len(rows))))
            left.add(len(rows))
            self.db.close()
        self.assertGreater(len(left), 5)

    def test_killed_process_loses_nothing(self) -> None:
        """What was written survives the process, synced or not; a power cut afterwards may still take it."""
        self.db.close()
        self.db = self.connect(synchronous="NORMAL")
        self.insert(20)
        self.disk.crash(power_cut=False)
        log = Path(self.path + "-wal").read_bytes()
        self.disk.crash(power_cut=True)
        self.assertNotEqual(Path(self.path + "-wal").read_bytes(), log)
        self.db = self.connect()
        self.assertLess(len(self.rows()), 21)

    def test_written_again(self) -> None:
        """What a failed sync has dropped no later sync brings to the disk, but writing the file again does."""
        log = self.path + "-wal"
        left = set()
        for again in (False, True):
            for seed in range(10):
                self.db.close()
                self.disk = self.make_disk(seed)
                self.db = self.connect()
                self.db.execute("DELETE FROM t")
                self.answer("sync", IOERR["sync"])
                self.fails("INSERT INTO t VALUES (0, randomblob(3000))")
                self.disk.crash(power_cut=False)
                if again:
                    self.assertRaises(OSError, files.write_again, log)
                self.disk.hook = None
                if again:
                    files.write_again(log)
                self.disk.crash(power_cut=True)
                self.db = self.connect()
                left.add((again, len(self.rows())))
        self.assertEqual(left, {(False, 0), (False, 1), (True, 1)})

    def test_dead_handles(self) -> None:
        """Whatever a dead connection does, or its collection, fails and changes nothing."""
        self.insert(3)
        self.disk.crash(power_cut=False)
        dead, self.db = self.db, self.connect()
        self.insert(1, 4)
        files = {each.name: each.read_bytes() for each in Path(self.root).iterdir()}
        self.assertRaises(sqlite3.Error, dead.execute, "INSERT INTO t VALUES (9, '')")
        self.assertRaises(sqlite3.Error, dead.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
        dead.close()
        self.connections.remove(dead)
        del dead
        gc.collect()
        self.assertEqual({each.name: each.read_bytes() for each in Path(self.root).iterdir()}, files)
        self.assertEqual(self.rows(), [0, 1, 2, 3, 4])

    def test_crash_from_within(self) -> None:
        """A hook that raises Crashed stops everything before that operation, new handles included, until the crash."""
        self.disk.operations = 0

        def hook(operation: Operation) -> int:
            if self.disk.operations == 4:
                raise Crashed
            return 0

        self.disk.hook = hook
        self.assertEqual(self.fails("INSERT INTO t VALUES (1, randomblob(9000))"), "SQLITE_IOERR_WRITE")
        log = Path(self.path + "-wal").read_bytes()
        self.assertRaises(sqlite3.Error, self.connect)
        self.db.close()
        self.assertEqual(Path(self.path + "-wal").read_bytes(), log)
        self.disk.hook = None
        self.disk.crash(power_cut=False)
        self.db = self.connect()
        self.assertEqual(self.rows(), [0])

    def test_names(self) -> None:
        """A log that was deleted without a sync of its directory may come back, or not; with one it does not."""
        seen = set()
        for seed in range(20):
            self.disk = self.make_disk(seed)
            self.db = self.connect()
            self.db.close()  # deletes the log
            self.disk.crash(power_cut=True)
            seen.add(os.path.exists(self.path + "-wal"))
        self.assertEqual(seen, {True, False})
        for seed in range(20):
            self.disk = self.make_disk(seed)
            db = self.connect()
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute("PRAGMA locking_mode = NORMAL")  # an exclusive one would keep the journal
            db.execute("PRAGMA synchronous = EXTRA")  # syncs the directory after the deletion
            db.execute("INSERT INTO t (body) VALUES ('')")
            self.disk.crash(power_cut=True)
            self.assertFalse(os.path.exists(self.path + "-journal"))
            db.close()

    def test_renamed_files(self) -> None:
        """What plain code renames or deletes is durable, and nothing is written to what took its name."""
        self.insert(3)
        self.disk.crash(power_cut=False)
        os.rename(self.path, self.path + ".aside")
        os.rename(self.path + "-wal", self.path + ".aside-wal")
        self.db = self.connect()
        self.db.execute("CREATE TABLE t (n)")
        self.disk.crash(power_cut=True)
        self.db = self.connect()
        self.assertEqual(self.rows(), [])
        self.assertEqual(self.rows(self.connect(self.path + ".aside")), [0, 1, 2, 3])

    # -- errors

    def test_errors(self) -> None:
        """What the hook answers is what sqlite3 raises, and the statement did nothing."""
        for kind, name in (("write", "SQLITE_IOERR_WRITE"), ("sync", "SQLITE_IOERR_FSYNC")):
            self.answer(kind, IOERR[kind])
            self.assertEqual(self.fails("INSERT INTO t VALUES (1, '')"), name)
            self.disk.hook = None
            self.assertEqual(self.rows(), [0])
        self.answer("write", sqlite3.SQLITE_FULL)
        self.assertEqual(self.fails("INSERT INTO t VALUES (1, '')"), "SQLITE_FULL")
        self.disk.hook = None
        self.db.close()
        self.answer("open", sqlite3.SQLITE_CANTOPEN)
        self.assertRaises(sqlite3.OperationalError, self.connect)
        self.answer("read", sqlite3.SQLITE_IOERR_READ)
        self.assertRaises(sqlite3.OperationalError, self.connect)
        self.answer("delete", sqlite3.SQLITE_IOERR_DELETE)
        self.connect().close()

    def test_failed_sync(self) -> None:
        """What a failed sync left behind stays readable, and a later sync does not make it durable."""
        lost = 0
        for seed in range(10):
            self.disk = self.make_disk(seed)
            self.db = self.connect()
            self.db.execute("INSERT INTO t VALUES (1, '')")  # begins the log, which is a sync of its own
            self.answer("sync", sqlite3.SQLITE_IOERR_FSYNC)
            self.fails("INSERT INTO t VALUES (2, randomblob(9000))")
            self.disk.hook = None
            self.disk.crash(power_cut=False)
            self.db = self.connect()
            self.assertEqual(self.rows(), [0, 1, 2])
            self.db.execute("INSERT INTO t VALUES (3, '')")
            self.disk.crash(power_cut=True)
            self.db = self.connect()
            self.assertEqual(self.rows()[:2], [0, 1])
            lost += 2 not in self.rows()
            self.db.execute("DELETE FROM t WHERE n > 0")
            self.db.close()
        self.assertGreater(lost, 0)

    def test_capacity(self) -> None:
        """A disk is full with all files that are there, not only SQLite's, and has room again when one goes."""
        other = Path(self.root, "other")
        other.write_bytes(bytes(100_000))
        self.disk.capacity = sum(each.stat().st_size for each in Path(self.root).iterdir()) + 10_000
        self.assertEqual(self.fails("INSERT INTO t VALUES (1, randomblob(20000))"), "SQLITE_FULL")
        other.unlink()
        self.db.execute("INSERT INTO t VALUES (1, randomblob(20000))")
        self.assertEqual(self.rows(), [0, 1])

    def test_failing_hook(self) -> None:
        """An exception of the hook is an I/O error for SQLite, and is remembered."""

        def hook(operation: Operation) -> int:
            raise KeyError(operation.kind)

        self.disk.hook = hook
        self.assertEqual(self.fails("INSERT INTO t VALUES (1, '')"), "SQLITE_IOERR_WRITE")
        self.disk.hook = None
        self.assertEqual({type(each) for each in self.disk.errors}, {KeyError})
        self.disk.errors.clear()

    # -- the rest

    def test_elsewhere(self) -> None:
        """Files below no disk are the original's, with its locks and its shared memory, and so are temporary ones."""
        other = mkdtemp(dir=MEMORY)
        self.addCleanup(rmtree, other)
        operations = self.disk.operations
        path = os.path.join(other, "b.db")
        first, second = sqlite3.connect(path, isolation_level=None), sqlite3.connect(path, timeout=0)
        self.assertEqual(first.execute("PRAGMA journal_mode = WAL").fetchone(), ("wal",))
        first.execute("CREATE TABLE t (n)")
        first.execute("BEGIN IMMEDIATE")
        self.assertRaises(sqlite3.OperationalError, second.execute, "INSERT INTO t VALUES (1)")
        self.assertIn("b.db-shm", os.listdir(other))
        first.execute("CREATE TEMP TABLE u AS SELECT 1")
        first.close()
        second.close()
        sqlite3.connect(":memory:").close()
        self.assertEqual(self.disk.operations, operations)

    def test_uninstall(self) -> None:
        """It cannot go while a file is open; gone, the same path is an ordinary file."""
        self.assertRaises(RuntimeError, self.vfs.uninstall)
        self.db.close()
        self.vfs.uninstall()
        operations = self.disk.operations
        self.db = self.connect()
        self.insert(3)
        self.assertEqual(self.rows(), [0, 1, 2, 3])
        self.db.close()
        self.assertEqual(self.disk.operations, operations)
        self.vfs.install()

    def test_deterministic(self) -> None:
        """The same seed and the same statements leave the same bytes, SQLite's own randomness included."""

        def run(seed: int) -> dict[str, bytes]:
            for each in Path(self.root).iterdir():
                each.unlink()
            self.disk = self.make_disk(seed)
            self.db = self.connect(synchronous="NORMAL")
            self.db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, body)")
            self.insert(10)
            self.disk.crash(power_cut=True)
            return {each.name: each.read_bytes() for each in Path(self.root).iterdir()}

        self.db.close()
        first = run(7)
        self.assertEqual(run(7), first)
        self.assertNotEqual(run(8), first)

    def test_no_file_left_open(self) -> None:
        """Whatever was opened is closed after the last handle, a crash or the end of the disk."""
        self.db.close()
        self.disk.crash(power_cut=True)

        def held() -> list[str]:
            links = [os.path.join("/proc/self/fd", each) for each in os.listdir("/proc/self/fd")]
            return [os.readlink(each) for each in links if os.path.lexists(each) and self.root in os.readlink(each)]

        self.assertEqual(held(), [])
        for power_cut in (False, True):
            self.db = self.connect()
            self.insert(1, len(self.rows()))
            self.disk.crash(power_cut=power_cut)
        self.assertEqual(held(), [])
        self.db = self.connect()
        self.db.execute("DELETE FROM t")
        self.disk.close()
        self.assertEqual(held(), [])
        self.db.close()

    def test_as_a_counter_in_a_child(self) -> None:
        """A process can kill itself at an operation by its number, and leaves dead connections behind at its end."""
        script = (
            "import os, signal, sqlite3, sys; from random import Random; from tests.faulty_vfs import FaultyVFS\n"
            "vfs = FaultyVFS(); vfs.install(); disk = vfs.disk(sys.argv[1], Random(0))\n"
            "def hook(operation):\n"
            "    if disk.operations == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return 0\n"
            "disk.hook = hook\n"
            "db = sqlite3.connect(sys.argv[1] + '/a.db', isolation_level=None)\n"
            "db.execute('PRAGMA locking_mode = EXCLUSIVE')\n"
            "for n in range(1, 4): db.execute('INSERT INTO t VALUES (?, 1)', (n,)); print(n, flush=True)\n"
        )
        self.db.close()
        for point, status in (("1000", 0), ("8", -signal.SIGKILL)):
            done = subprocess.run(
                [sys.executable, "-c", script, self.root, point], check=False, cwd=ROOT, timeout=30, capture_output=True
            )
            self.assertEqual((done.returncode, done.stderr), (status, b""))
            self.db = self.connect()
            told, rows = [int(each) for each in done.stdout.split()], self.rows()[1:]
            self.assertEqual(rows[: len(told)], told)
            self.assertEqual(len(rows) < 3, status < 0)
            self.db.execute("DELETE FROM t WHERE n > 0")
            self.db.close()
