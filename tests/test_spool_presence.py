"""The spool's files are removed or replaced under a running agent."""

from __future__ import annotations

import shutil
import sqlite3
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool import Spool, files
from commsmgr.spool.presence import Presence
from tests.test_spool_disk import OnDisk


class RunningTests(OnDisk):
    """A whole spool."""

    async def started(self) -> tuple[Spool, int]:
        """An open spool with an entry that waits."""
        spool = self.spool()
        await spool.open()
        return spool, await self.event(spool, "before")

    async def goes_on(self, spool: Spool, seq: int, missing: str) -> None:
        """Nothing new is taken, what is there is handed out and can be receipted for, and operators are told."""
        for _ in range(2):
            refused = await self.assertFailure(self.event(spool, "after"), SpoolWriteFailed)
        self.assertIn(f"{self.directory / missing} was removed or replaced", str(refused))
        self.assertIn(refused.fact, spool.trouble)
        self.assertEqual(await self.all_ids(spool), ["before"])
        await spool.outbox.forget([seq])
        self.assertEqual(await self.all_ids(spool), [])
        self.assertIn("was removed or replaced", spool.trouble)

    async def test_directory(self) -> None:
        """The whole directory is removed; a spool that is opened afterwards begins anew."""
        spool, seq = await self.started()
        shutil.rmtree(self.directory)
        await self.goes_on(spool, seq, files.DATABASE)
        await spool.close()
        spool = self.spool()
        await spool.open()
        await self.event(spool, "later")
        self.assertEqual((await self.all_ids(spool), spool.trouble), (["later"], ""))

    async def test_replaced(self) -> None:
        """Another database in its place is left alone."""
        spool, seq = await self.started()
        shutil.copyfile(self.database, other := self.directory / "other")
        other.rename(self.database)
        before = self.database.read_bytes()
        await self.goes_on(spool, seq, files.DATABASE)
        self.assertEqual(self.database.read_bytes(), before)

    async def test_log(self) -> None:
        """The log alone, which holds what was accepted last."""
        spool, seq = await self.started()
        # It is known from the batch on that finds it there.
        await spool.outbox.dead_letters(1)
        (self.directory / f"{files.DATABASE}-wal").unlink()
        await self.goes_on(spool, seq, f"{files.DATABASE}-wal")

    async def test_disk_fails_as_well(self) -> None:
        """What is open is not let go for an empty spool when the disk fails, too."""
        spool, seq = await self.started()
        self.database.unlink()
        books = spool._store._writer._books
        assert books is not None
        real, failures = books.write_counter, [1]

        def fails_once() -> int:
            if failures:
                failures.pop()
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                raise error
            return real()

        self.patch(books, "write_counter", fails_once)
        await spool.outbox.forget([seq])
        self.assertEqual((failures, await self.all_ids(spool)), ([], []))
        self.assertFalse(self.database.exists())

    async def test_connections_that_fail(self) -> None:
        """Between two connections the log may go and come, by attempts that fail too: nobody has removed it."""
        spool, _ = await self.started()
        await spool.outbox.dead_letters(1)
        writer = spool._store._writer
        connect, failures = writer._opening.connect, [1, 1, 1, 1]

        def fails(*, damaged: bool = False) -> Any:
            books = connect(damaged=damaged)
            if not failures:
                return books
            failures.pop()
            books.db.close()  # which folds the log in and removes it
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

        self.patch(writer._opening, "connect", fails)
        await self.in_writer(spool, writer._disconnect)
        while failures:
            await self.assertFailure(self.event(spool, "refused"), SpoolWriteFailed)
        await self.event(spool, "after")
        self.assertEqual((await self.all_ids(spool), spool.trouble), (["before", "after"], ""))


class PresenceTests(SynchronousTestCase):
    """The comparison alone."""

    def test_a_new_log(self) -> None:
        """The log may come after the database, and be another one after the connection was closed."""
        path = self.mktemp()
        presence = Presence(path)
        log = f"{path}-wal"
        for name in (path, log):
            with open(name, "w"):
                pass
            if name == path:
                presence.opened()
            self.assertEqual(presence.missing(), "")
        shutil.move(log, f"{log}.old")
        self.assertIn(log, presence.missing())
        presence.require()
        presence.closed()
        self.assertEqual(presence.missing(), "")
        with open(log, "w"):
            pass
        self.assertEqual(presence.missing(), "")
        shutil.move(path, f"{path}.old")
        self.assertIn(path, presence.missing())
        self.assertRaises(FileNotFoundError, presence.require)
