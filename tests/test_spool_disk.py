"""The spool on a real disk: files, locks, damage, a failing disk, and a process that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor, threads
from twisted.internet.defer import Deferred, fail, gatherResults
from twisted.internet.task import Clock, deferLater
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr import config
from commsmgr.errors import QueueFull, SpoolLocked, SpoolUnusable, SpoolWriteFailed
from commsmgr.spool import Accepted, Duplicate, Lane, Spool, ballast, files, schema
from commsmgr.spool import store as store_module
from commsmgr.spool.executor import InlineExecutor
from commsmgr.spool.trouble import Trouble

ROOT = Path(__file__).absolute().parent.parent
FILES = {"spool.db", "spool.db-wal", "spool.lock", "spool.ballast"}


class OnDisk(TestCase):
    """A directory for one spool, and ways to make one."""

    timeout = 60

    def setUp(self) -> None:
        self.patch(store_module, "RETRY_AFTER", 0.05)
        self.patch(ballast, "SIZE", 1 << 20)
        self.directory = Path(self.mktemp()).absolute() / "spool"
        self.database = self.directory / files.DATABASE

    def spool(self, **options: Any) -> Spool:
        """A spool in that directory, closed at the end of the test."""
        spool = Spool(config.Spool(path=str(self.directory), **options), reactor=reactor, wall=time.time)
        self.addCleanup(spool.close)
        return spool

    def event(self, spool: Spool, id: str, body: bytes = b"{}") -> Deferred[int]:
        return spool.outbox.put(lane=Lane.EVENT, kind="note", id=id, body=body)

    async def all_ids(self, spool: Spool, *, rewind: bool = True) -> list[str]:
        """Everything the event lane hands out, in order, from the oldest on or from where it stands."""
        reader, got = spool.outbox.reader(Lane.EVENT), []
        if rewind:
            reader.rewind()
        while True:
            await spool.outbox.dead_letters(1)  # a turn through the writer: whatever was asked for has come
            entries = reader.take(10_000, 1 << 30)
            if not entries:
                return got
            got += [entry.id for entry in entries]

    def tamper(self, statement: str, *values: Any) -> None:
        """Change the closed database behind the spool's back."""
        db = sqlite3.connect(self.database)
        with db:
            db.execute(statement, values)
        db.close()

    def break_writes(self, spool: Spool, pages: int = 1) -> None:
        """Make every growth of the database fail as on a full disk."""
        books = spool._store._writer._books
        assert books is not None
        books.db.execute(f"PRAGMA max_page_count = {pages}")

    async def in_writer(self, spool: Spool, work: Any) -> Any:
        return await spool._store._executor(work)


class LifeTests(OnDisk):
    """Opening, closing, and what is there afterwards."""

    async def test_survives_reopening(self) -> None:
        """All that was accepted is there after close and open, in order, and numbers go on."""
        spool = self.spool()
        await spool.open()
        self.assertEqual(await spool.open(), await spool.open())
        seqs = await gatherResults([self.event(spool, f"e{n}") for n in range(2000)])
        self.assertEqual(seqs, sorted(seqs))
        await spool.outbox.forget(seqs[:5])
        await spool.close()
        await spool.close()
        opened = await spool.open()
        self.assertIsNone(opened.set_aside)
        self.assertEqual(spool.outbox.stats.events, 1995)
        self.assertEqual(await self.all_ids(spool), [f"e{n}" for n in range(5, 2000)])
        self.assertGreater(await self.event(spool, "next"), seqs[-1])

    async def test_modes(self) -> None:
        """Nobody else may read the spool, whatever the umask."""
        self.addCleanup(os.umask, os.umask(0))
        spool = self.spool()
        await spool.open()
        await self.event(spool, "a")
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in self.directory.iterdir()}
        self.assertEqual(modes, dict.fromkeys(FILES, 0o600))
        self.assertEqual(stat.S_IMODE(self.directory.stat().st_mode), 0o700)

    async def test_settings_of_the_connection(self) -> None:
        """The settings on which durability depends are in force."""
        for durability, synchronous in (("full", 2), ("normal", 1)):
            spool = self.spool(durability=durability)
            await spool.open()
            books = spool._store._writer._books
            assert books is not None
            got = await self.in_writer(
                spool,
                lambda books=books: [
                    books.db.execute(f"PRAGMA {name}").fetchone()[0]
                    for name in ("journal_mode", "synchronous", "locking_mode", "auto_vacuum", "application_id")
                ],
            )
            self.assertEqual(got, ["wal", synchronous, "exclusive", 2, schema.APPLICATION_ID])
            await spool.close()

    async def test_one_spool_at_a_time(self) -> None:
        """A second spool on the same directory is refused, in this process and in another, until the first closes."""
        first, second = self.spool(), self.spool()
        await first.open()
        await self.assertFailure(second.open(), SpoolLocked)
        script = (
            "import sys; from commsmgr.spool import files; from commsmgr.errors import SpoolLocked\n"
            "try: files.lock(sys.argv[1])\nexcept SpoolLocked: sys.exit(7)"
        )
        child = await threads.deferToThread(
            subprocess.run, [sys.executable, "-c", script, str(self.directory)], check=False, cwd=ROOT
        )
        self.assertEqual(child.returncode, 7)
        await first.close()
        await second.open()

    async def test_close_finishes_what_was_handed_over(self) -> None:
        """What was submitted before close() is accepted, without waiting for it."""
        spool = self.spool()
        await spool.open()
        waiting = [self.event(spool, f"e{n}") for n in range(3000)]
        await spool.close()
        await gatherResults(waiting)
        await spool.open()
        self.assertEqual(spool.outbox.stats.events, 3000)

    async def test_unusable_directory(self) -> None:
        """A path that cannot be a directory, or a database that is no file, says so and leaves nothing locked."""
        self.directory.parent.mkdir(parents=True)
        self.directory.write_text("a file")
        spool = self.spool()
        await self.assertFailure(spool.open(), SpoolUnusable)
        self.directory.unlink()
        self.database.mkdir(parents=True)
        await self.assertFailure(spool.open(), SpoolUnusable)
        self.database.rmdir()
        await spool.open()

    async def test_commands_across_restart(self) -> None:
        """Offered commands without a result come back as interrupted, others as waiting; finished ones do not."""
        spool = self.spool()
        await spool.open()
        keys = []
        for n in range(5):
            answer = await spool.inbox.accept(id=f"c{n}", digest="d", body=b"x")
            assert isinstance(answer, Accepted)
            keys.append(answer.command.key)
        await spool.inbox.offered([keys[2], keys[0]])
        await spool.inbox.complete(key=keys[0], command_id="c0", status="success", result_id="r", body=b"done")
        await spool.close()
        self.tamper("UPDATE command SET body = ? WHERE key = ?", b"y", keys[4])
        self.tamper("UPDATE command SET digest = CAST(x'ff' AS TEXT) WHERE key = ?", keys[3])
        opened = await spool.open()
        self.assertEqual(
            [(each.id, each.offered, each.body) for each in opened.interrupted],
            [("c2", True, b"x"), ("c3", False, b""), ("c4", False, b"")],
        )
        self.assertEqual([each.id for each in opened.waiting], ["c1"])
        self.assertEqual(spool.inbox.open_count, 4)
        duplicate = await spool.inbox.accept(id="c0", digest="d", body=b"x")
        self.assertEqual(duplicate, Duplicate(keys[0], True, "success", "r"))


class DamageTests(OnDisk):
    """Nothing that lies in the directory stops the start."""

    async def fill(self) -> None:
        spool = self.spool()
        await spool.open()
        await gatherResults([self.event(spool, f"e{n}", b"x" * 500) for n in range(200)])
        await spool.close()

    async def set_aside(self, reason: str) -> Path:
        """Open; the old database must be gone under a name that says why, and the new one must work."""
        spool = self.spool()
        opened = await spool.open()
        self.assertIsNotNone(opened.set_aside)
        assert opened.set_aside is not None
        self.assertIn(f".{reason}", opened.set_aside)
        self.assertEqual(len(self.flushLoggedErrors()), 0)
        await self.event(spool, "new")
        self.assertEqual((await self.all_ids(spool))[-1], "new")
        await spool.close()
        return Path(opened.set_aside)

    async def test_empty(self) -> None:
        """A database of no bytes beside a valid log: SQLite would delete the log."""
        await self.fill()
        self.database.write_bytes(b"")
        wal = self.directory / "spool.db-wal"
        wal.write_bytes(b"\x37\x7f\x06\x82" + bytes(4096))
        aside = await self.set_aside("empty")
        self.assertEqual(aside.stat().st_size, 0)
        self.assertEqual(Path(f"{aside}-wal").stat().st_size, 4100)

    async def test_missing_database(self) -> None:
        """A log without a database is set aside."""
        await self.fill()
        self.database.rename(self.directory / "elsewhere")
        (self.directory / "spool.db-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(4096))
        aside = await self.set_aside("missing")
        self.assertFalse(aside.exists())
        self.assertTrue(Path(f"{aside}-wal").exists())

    async def test_garbage(self) -> None:
        """Files that are no databases, short and long, are set aside unchanged."""
        for content in (b"garbage", os.urandom(8192)):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.database.write_bytes(content)
            aside = await self.set_aside("garbage")
            self.assertEqual(aside.read_bytes(), content)
            self.database.unlink()

    async def test_failing_disk_after_a_replacement(self) -> None:
        """What was set aside is told of by the start that succeeds, and only by that one."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.database.write_bytes(b"garbage")
        spool = self.spool()
        patch = self.patch(spool.inbox, "unfinished", lambda: fail(SpoolWriteFailed("the disk fails")))
        for _ in range(2):
            await self.assertFailure(spool.open(), SpoolWriteFailed)
        patch.restore()
        opened = await spool.open()
        assert opened.set_aside is not None
        self.assertIn(".garbage", opened.set_aside)
        await spool.close()
        self.assertIsNone((await spool.open()).set_aside)
        await spool.close()

    async def test_garbage_log(self) -> None:
        """A log that is none means that the database may be half of a checkpoint."""
        await self.fill()
        (self.directory / "spool.db-wal").write_bytes(bytes(5000))
        await self.set_aside("garbage-wal")

    async def test_foreign(self) -> None:
        """Another program's database is set aside byte for byte."""
        self.directory.mkdir(mode=0o700, parents=True)
        db = sqlite3.connect(self.database)
        db.execute("CREATE TABLE entry (seq)")
        db.commit()
        db.close()
        content = self.database.read_bytes()
        aside = await self.set_aside("foreign")
        self.assertEqual(aside.read_bytes(), content)

    async def test_newer(self) -> None:
        """A newer commsmgr's database is set aside unchanged: this one cannot know what it means."""
        await self.fill()
        self.tamper(f"PRAGMA user_version = {schema.VERSION + 1}")
        content = self.database.read_bytes()
        aside = await self.set_aside("newer")
        self.assertEqual(aside.read_bytes(), content)

    async def test_newer_in_the_log(self) -> None:
        """The version counts also while it stands in the log only."""
        await self.fill()
        db = sqlite3.connect(self.database)
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        copies = {each: each.read_bytes() for each in self.directory.glob("spool.db*")}
        db.close()
        for path, content in copies.items():
            path.write_bytes(content)
        (self.directory / "spool.db-shm").unlink()
        await self.set_aside("newer")

    async def test_truncated(self) -> None:
        """A database cut short is set aside."""
        await self.fill()
        os.truncate(self.database, self.database.stat().st_size // 2)
        await self.set_aside("damaged")

    async def test_torn_page(self) -> None:
        """A ruined page that opening needs has the database set aside; the disconnect leaves it as it was."""
        await self.fill()
        db = sqlite3.connect(self.database)
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'command'").fetchone()
        db.close()
        with self.database.open("r+b") as file:
            file.seek((root - 1) * 4096)
            file.write(b"\xff" * 4096)
        await self.set_aside("damaged")

    async def test_two_in_one_second(self) -> None:
        """Names of what is set aside never collide."""
        self.directory.mkdir(mode=0o700, parents=True)
        names = set()
        for _ in range(3):
            self.database.write_bytes(b"garbage")
            names.add(name := files.free_name(str(self.database), "garbage", 0.0))
            files.move(str(self.database), name)
        self.assertEqual(len(names), 3)

    async def test_damaged_rows(self) -> None:
        """Damaged rows become dead letters, whatever is wrong with them, and those behind them are served."""
        await self.fill()
        self.tamper("UPDATE entry SET body = zeroblob(500) WHERE id = 'e0'")
        self.tamper("UPDATE entry SET id = CAST(x'ff' AS TEXT) WHERE id = 'e7'")
        self.tamper("UPDATE entry SET body = 5 WHERE id = 'e9'")
        self.tamper("UPDATE entry SET accepted_at = 7 WHERE id = 'e11'")
        spool = self.spool()
        await spool.open()
        want = [f"e{n}" for n in range(200) if n not in (0, 7, 9, 11)]
        self.assertEqual(await self.all_ids(spool), want)
        self.assertEqual(spool.outbox.stats.dropped, {"damaged": 4})
        self.assertEqual([each.reason for each in await spool.outbox.dead_letters(9)], ["damaged"] * 4)
        self.assertEqual(spool.outbox.stats.events, 196)


class FailingDiskTests(OnDisk):
    """A full or failing disk refuses with a typed error, loses nothing, and recovers by itself."""

    async def test_answers(self) -> None:
        """The writer goes on answering a watchdog on a disk that refuses everything, and before and after its life."""
        spool = self.spool()
        await spool.answer()
        await spool.open()
        first = await self.event(spool, "a")
        await self.in_writer(spool, lambda: self.break_writes(spool))
        await self.assertFailure(self.event(spool, "b", b"x" * 100_000), SpoolWriteFailed)
        self.assertIn("full", spool.trouble)
        await spool.answer()
        await self.in_writer(spool, lambda: self.break_writes(spool, 1 << 30))
        await spool.outbox.forget([first])
        await spool.close()
        await spool.answer()

    async def test_full(self) -> None:
        """While the disk is full submissions fail; what was accepted stays; afterwards all goes on."""
        spool = self.spool()
        await spool.open()
        first = await self.event(spool, "a")
        await self.in_writer(spool, lambda: self.break_writes(spool))
        await self.assertFailure(self.event(spool, "b", b"x" * 100_000), SpoolWriteFailed)
        await spool.outbox.forget([first])
        await self.in_writer(spool, lambda: self.break_writes(spool, 1 << 30))
        await self.event(spool, "c")
        self.assertEqual(await self.all_ids(spool), ["c"])

    async def test_tight(self) -> None:
        """Without the ballast nothing is accepted that could wait, with the reason; but receipts and results are."""
        spool = self.spool()
        await spool.open()
        first = await self.event(spool, "a")
        keep = await spool.inbox.accept(id="c", digest="d", body=b"")
        assert isinstance(keep, Accepted)
        held = ballast.Ballast.restore
        self.patch(ballast.Ballast, "restore", lambda self: False)
        self.patch(ballast, "SIZE", 8 << 20)
        refused = await self.assertFailure(self.event(spool, "b"), SpoolWriteFailed)
        self.assertIn("is full: what could wait is refused until 16 MiB of it are free", str(refused))
        self.patch(ballast, "SIZE", 1 << 20)
        await self.assertFailure(spool.inbox.accept(id="c2", digest="d", body=b""), SpoolWriteFailed)
        own = spool.inbox.complete(key=None, command_id="its own", status="success", result_id="o", body=b"")
        await self.assertFailure(own, SpoolWriteFailed)
        await spool.outbox.forget([first])
        # Although this receipt got through.
        self.assertIn("that holds the spool is full: what could wait", spool.trouble)
        await spool.inbox.complete(key=keep.command.key, command_id="c", status="success", result_id="r", body=b"")
        self.patch(ballast.Ballast, "restore", held)
        await self.event(spool, "d")
        self.assertEqual(await self.all_ids(spool), ["r", "d"])

    async def test_tight_gives_space_back(self) -> None:
        """Freed pages go back to a full disk, so that it can recover by our own doing."""
        spool = self.spool()
        await spool.open()
        seqs = await gatherResults([self.event(spool, f"e{n}", b"x" * 50_000) for n in range(60)])
        await self.in_writer(spool, spool._store._writer.checkpoint)
        size = self.database.stat().st_size
        self.patch(ballast.Ballast, "restore", lambda self: False)
        for seq in seqs:
            await spool.outbox.forget([seq])
        await self.in_writer(spool, spool._store._writer.checkpoint)
        self.assertLess(self.database.stat().st_size, size // 2)

    async def test_checkpoints_that_fail(self) -> None:
        """On a full disk one is tried with each batch, and is not a line each time."""
        spool = self.spool()
        await spool.open()
        writer = spool._store._writer
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        books = writer._books
        assert books is not None
        for _ in range(20):
            # A statement of its own that is under way keeps a checkpoint from being made.
            await self.in_writer(spool, lambda: (books.db.execute("BEGIN IMMEDIATE"), writer.checkpoint()))
            await self.in_writer(spool, lambda: books.db.execute("ROLLBACK"))
        self.assertEqual([event.get("event") for event in events], ["spool.checkpoint-failed"])

    async def test_failed_commit(self) -> None:
        """When COMMIT fails the batch is tried again on a fresh connection, and is in once."""
        spool = self.spool()
        await spool.open()
        await self.event(spool, "a")
        await self.in_writer(spool, lambda: self.fail_commit(spool, really=False))
        await self.event(spool, "b")
        self.assertEqual(await self.all_ids(spool), ["a", "b"])

    async def test_failed_commit_that_came_back(self) -> None:
        """When COMMIT fails although the batch is in the log, it is recognised and not done twice."""
        spool = self.spool()
        await spool.open()
        await self.in_writer(spool, lambda: self.fail_commit(spool, really=True))
        await self.event(spool, "b")
        self.assertEqual(await self.all_ids(spool), ["b"])

    def fail_commit(self, spool: Spool, *, really: bool) -> None:
        books = spool._store._writer._books
        assert books is not None
        books.db = FailingCommit(books.db, really)  # type: ignore[assignment]  # behaves like one

    async def test_disk_away(self) -> None:
        """
        While nothing can be opened submissions fail, receipts and refusals wait; afterwards these are done, and what
        its submitter was refused but had reached the log is handed out.
        """
        spool = self.spool()
        await spool.open()
        first, second = await self.event(spool, "a"), await self.event(spool, "refused")
        broken = [True]
        connect = sqlite3.connect

        def failing(*args: Any, **options: Any) -> sqlite3.Connection:
            if broken[0]:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                raise error
            return connect(*args, **options)

        self.patch(sqlite3, "connect", failing)
        await self.in_writer(spool, lambda: self.fail_commit(spool, really=True))
        await self.assertFailure(self.event(spool, "b"), SpoolWriteFailed)
        self.assertEqual(spool.outbox.stats.events, 2)
        forgotten, buried = spool.outbox.forget([first]), spool.outbox.bury(second, "refused")
        await self.assertFailure(self.event(spool, "c"), SpoolWriteFailed)
        self.assertFalse(forgotten.called or buried.called)
        broken[0] = False
        await forgotten
        await buried
        self.assertEqual(spool.outbox.stats.dead_letters, 1)
        self.assertEqual(await self.all_ids(spool, rewind=False), ["b"])

    async def test_close_with_receipts_that_cannot_be_written(self) -> None:
        """A disk that stays away does not keep the spool from closing."""
        spool = self.spool()
        await spool.open()
        first = await self.event(spool, "a")
        connect = sqlite3.connect

        def failing(*args: Any, **options: Any) -> sqlite3.Connection:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

        await self.in_writer(spool, lambda: self.fail_commit(spool, really=False))
        self.patch(sqlite3, "connect", failing)
        forgotten = spool.outbox.forget([first])
        await self.assertFailure(self.event(spool, "b"), SpoolWriteFailed)
        await spool.close()
        await self.assertFailure(forgotten, SpoolWriteFailed)
        self.patch(sqlite3, "connect", connect)
        await spool.open()
        self.assertEqual(await self.all_ids(spool), ["a"])

    def test_write_again(self) -> None:
        """All of the file is written, to where it stands, and then it is flushed, and its name."""
        self.directory.mkdir(mode=0o700, parents=True)
        path = self.directory / "log"
        content = os.urandom((1 << 20) + 5000)
        path.write_bytes(content)
        done: list[tuple[str, int]] = []
        pwrite, fsync = os.pwrite, os.fsync

        def half_written(descriptor: int, data: bytes, start: int) -> int:
            written = pwrite(descriptor, data[: max(len(data) // 2, 4096)], start)
            done.append(("write", written))
            return written

        def synced(descriptor: int) -> None:
            done.append((os.readlink(f"/proc/self/fd/{descriptor}"), 0))
            fsync(descriptor)

        self.patch(os, "pwrite", half_written)
        self.patch(os, "fsync", synced)
        files.write_again(str(path))
        self.assertEqual(path.read_bytes(), content)
        self.assertEqual(sum(written for _, written in done), len(content))
        self.assertEqual([what for what, _ in done if what != "write"], [str(path), str(self.directory)])
        self.assertEqual(done[-3][0], "write")
        files.write_again(str(self.directory / "absent"))

    def test_ballast(self) -> None:
        """The ballast takes real space, is taken over from an earlier run, and is not taken from a nearly full disk."""
        self.directory.mkdir(mode=0o700, parents=True)
        held = ballast.Ballast(str(self.directory))
        self.assertTrue(held.restore())
        self.assertTrue(held.restore())
        status = (self.directory / ballast.NAME).stat()
        self.assertGreaterEqual(status.st_blocks * 512, 1 << 20)
        self.assertTrue(ballast.Ballast(str(self.directory)).restore())
        held.drop()
        self.patch(ballast, "SIZE", 1 << 60)
        self.assertFalse(ballast.Ballast(str(self.directory)).restore())
        self.assertFalse(ballast.Ballast(str(self.directory / "absent")).restore())


class DamagedWhileRunningTests(OnDisk):
    """Damage that opening does not meet is said, spares what can be read, and is no hot loop."""

    async def damaged(self) -> Spool:
        """A spool with 2000 events, of whose database 30 pages are noise."""
        spool = self.spool()
        await spool.open()
        await gatherResults([self.event(spool, f"e{n}", b"x" * 500) for n in range(2000)])
        self.assertEqual(spool.trouble, "")
        await spool.close()
        with self.database.open("r+b") as file:
            file.seek(100 * 4096)
            file.write(b"\xa5" * (30 * 4096))
        spool = self.spool()
        opened = await spool.open()
        self.assertIsNone(opened.set_aside)
        return spool

    async def test_rest_is_served(self) -> None:
        """What stands before and behind the damaged part is handed out in order, and new events are accepted."""
        spool = await self.damaged()
        got = await self.all_ids(spool, rewind=False)
        numbers = [int(each[1:]) for each in got]
        self.assertEqual(numbers, sorted(set(numbers)))
        self.assertEqual((numbers[0], numbers[-1]), (0, 1999))
        self.assertTrue(1700 < len(numbers) < 1850, len(numbers))
        self.assertIn("damaged", spool.trouble)
        self.assertIn("restart the agent", spool.trouble)
        await self.event(spool, "new")
        self.assertEqual((await self.all_ids(spool))[-1], "new")
        self.assertIn("damaged", spool.trouble)
        await spool.close()
        self.assertEqual(spool.trouble, "")

    async def test_mended_by_the_next_start(self) -> None:
        """What was found while running has the next start take over all that can be read; the one after is normal."""
        spool = await self.damaged()
        got = await self.all_ids(spool, rewind=False)
        await self.event(spool, "new")
        self.assertTrue((self.directory / files.MARK).exists())
        await spool.close()
        opened = await spool.open()
        assert opened.set_aside is not None and opened.salvaged is not None
        self.assertEqual(opened.salvaged.events + opened.salvaged.lost, 2001)
        again = await self.all_ids(spool)
        self.assertEqual([each for each in [*got, "new"] if each not in again], [])
        self.assertEqual(len(again), opened.salvaged.events)
        self.assertEqual(spool.losses.unreported, opened.salvaged.lost)
        self.assertEqual(spool.trouble, "")
        await spool.outbox.forget([1000])
        await spool.close()
        self.assertIsNone((await spool.open()).set_aside)
        self.assertFalse((self.directory / files.MARK).exists())

    async def test_receipts_in_the_damaged_part(self) -> None:
        """A receipt that cannot be written waits, ever longer, and holds up nobody else's."""
        lines: list[Any] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        spool = await self.damaged()
        await self.all_ids(spool, rewind=False)
        stuck = spool.outbox.forget([710])
        await spool.outbox.forget([1])
        await spool.outbox.forget([2])
        self.assertEqual(spool.outbox.stats.events, 1998)
        self.assertFalse(stuck.called)
        await deferLater(reactor, 0.5)
        self.assertGreaterEqual(spool._store._wait, 0.2)
        await spool.outbox.forget([3])
        self.assertLessEqual(sum(each.get("event") == "spool.write-failed" for each in lines), 2)
        await spool.close()
        await self.assertFailure(stuck, SpoolWriteFailed)

    async def test_trouble_ends(self) -> None:
        """A disk that fails is said with the time of the last success, and no longer once it works."""
        spool = self.spool()
        await spool.open()
        await self.in_writer(spool, lambda: self.break_writes(spool))
        await self.assertFailure(self.event(spool, "b", b"x" * 100_000), SpoolWriteFailed)
        self.assertRegex(spool.trouble, r"has failed: .*full.*; all was well at \d{4}-.*Z$")
        await self.in_writer(spool, lambda: self.break_writes(spool, 1 << 30))
        await self.event(spool, "c")
        self.assertEqual(spool.trouble, "")


class TroubleTests(SynchronousTestCase):
    """How often a trouble is logged."""

    def test_lines(self) -> None:
        """The pauses double up to a minute, and a success or a step of the clock begins anew."""
        clock = Clock()
        clock.advance(1000)
        trouble = Trouble("/spool", clock.seconds)
        at = []
        for second in range(200):
            if trouble.worth_a_line():
                at.append(second)
            clock.advance(1)
        self.assertEqual(at, [0, 1, 3, 7, 15, 31, 63, 123, 183])
        trouble.succeeded()
        self.assertTrue(trouble.worth_a_line())
        clock.rightNow = 5.0
        self.assertTrue(trouble.worth_a_line())

    def test_wild_clock(self) -> None:
        """A clock beyond all calendars is no reason to fail."""
        trouble = Trouble("/spool", lambda: 1e300)
        trouble.failed("disk I/O error")
        self.assertIn("1e+300 s", trouble.text)


class FailingCommit:
    """A connection whose COMMIT fails once with an I/O error, after or without doing it."""

    def __init__(self, db: sqlite3.Connection, really: bool) -> None:
        self._db, self._really = db, really

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT":
            self._db.execute("COMMIT" if self._really else "ROLLBACK")
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        return self._db.execute(statement, *values)


class KilledTests(OnDisk):
    """SIGKILL of a real process, at points around the commit and anywhere else."""

    async def child(self, point: str, count: int) -> tuple[list[str], list[str]]:
        """
        Run a child that accepts, completes, sends and forgets until it is killed.

        :return: what it was told is accepted, and what it receipted, as it wrote them to its output.
        """
        done = await threads.deferToThread(
            subprocess.run,
            [sys.executable, "-m", "tests.spool_child", str(self.directory), point, str(count)],
            stdout=subprocess.PIPE,
            check=False,
            timeout=30,
            cwd=ROOT,
        )
        self.assertEqual(done.returncode, -signal.SIGKILL)
        lines = done.stdout.decode().splitlines()
        return [each[2:] for each in lines if each.startswith("A ")], [each[2:] for each in lines if each[0] == "F"]

    async def audit(self, point: str, count: int) -> None:
        accepted, forgotten = await self.child(point, count)
        self.assertTrue(accepted)
        spool = self.spool()
        opened = await spool.open()
        self.assertIsNone(opened.set_aside)
        held = await self.all_ids(spool)
        self.assertEqual(len(held), len(set(held)))
        self.assertEqual(spool.outbox.stats.events, len(held))
        self.assertEqual([each for each in accepted if each not in {*held, *forgotten}], [])
        self.assertEqual([each for each in forgotten if each in held], [])
        numbers = [int(each[1:]) for each in held if each[0] == "e"]
        self.assertEqual(numbers, sorted(numbers))
        results = {each for each in [*held, *forgotten] if each[0] == "r"}
        for command in (*opened.interrupted, *opened.waiting):
            self.assertNotIn(f"r{command.id[1:]}", results)
        self.assertEqual(len(opened.interrupted) + len(opened.waiting), spool.inbox.open_count)

    async def test_before_the_commit(self) -> None:
        """Killed with the batch written but not committed."""
        await self.audit("before-commit", 30)

    async def test_after_the_commit(self) -> None:
        """Killed with the batch committed and nobody told."""
        await self.audit("after-commit", 30)

    async def test_within_a_job(self) -> None:
        """Killed in the midst of a transaction."""
        await self.audit("in-job", 200)

    async def test_at_a_checkpoint(self) -> None:
        """Killed just after a checkpoint."""
        await self.audit("checkpoint", 2)

    async def test_at_opening(self) -> None:
        """Killed while the schema was being made: the next start is a normal one."""
        for count in range(1, 6):
            await self.child("opening", count)
            spool = self.spool()
            await spool.open()
            await self.event(spool, "a")
            await spool.close()
            for each in self.directory.iterdir():
                each.unlink()


class InlineOnDiskTests(OnDisk):
    """A file with an executor of one's own, as a simulation has it."""

    async def test_injected_executor(self) -> None:
        """The same code works with a file in the reactor's thread."""
        settings = config.Spool(path=str(self.directory), max_events=1)
        spool = Spool(settings, reactor=reactor, wall=time.time, executor=InlineExecutor(reactor))
        self.addCleanup(spool.close)
        await spool.open()
        await self.event(spool, "a")
        await self.assertFailure(self.event(spool, "b"), QueueFull)
