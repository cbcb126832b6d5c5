"""What was given up, on its way to the backend: counted, moved into one receipt, kept until that is acknowledged."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr import config
from commsmgr.errors import NotRunning, SpoolError
from commsmgr.spool import Lane, Loss, PendingLossReport, Spool, schema
from commsmgr.spool.lossbook import MAX_ROWS, LossBook
from tests.link_kit import pass_time
from tests.test_spool_memory import World


class LossWorld(World):
    """A spool in memory whose messages can be lost; others may have timers on its clock."""

    def run(self) -> None:
        pass_time(self.clock)

    def lose(self, reason: str, count: int = 1, body: bytes = b"{}") -> None:
        for n in range(count):
            self.get(self.outbox.bury(self.get(self.event(f"{reason}-{n}", body)), reason))

    def receipt(self, new_id: str) -> PendingLossReport | None:
        receipt: PendingLossReport | None = self.get(self.spool.losses.pending_report(new_id))
        return receipt

    def forget(self, id: str) -> None:
        self.get(self.spool.losses.forget(id))


class ReceiptTests(SynchronousTestCase):
    """One receipt at a time."""

    def world(self, **options: Any) -> LossWorld:
        world = LossWorld(**options)
        world.open()
        return world

    def test_nothing_lost(self) -> None:
        """Without losses there is no receipt, and acknowledging one changes nothing."""
        world = self.world()
        self.assertIsNone(world.receipt("r1"))
        world.forget("r1")
        self.assertEqual(world.spool.losses.unreported, 0)

    def test_one_at_a_time(self) -> None:
        """The receipt stays the same, whatever is lost meanwhile, until it is forgotten; the next one has the rest."""
        world = self.world()
        world.lose("rejected: 422", 2)
        world.clock.advance(5)
        world.lose("rejected: 404")
        first = world.receipt("r1")
        self.assertEqual(first, PendingLossReport("r1", [Loss("rejected", "note", 3, 1000.0, 1005.0)]))
        world.lose("rejected")
        world.lose("expired")
        self.assertEqual((world.receipt("r2"), world.spool.losses.unreported), (first, 5))
        world.forget("another")
        self.assertEqual(world.receipt("r2"), first)
        world.forget("r1")
        self.assertEqual(world.spool.losses.unreported, 2)
        self.assertEqual(
            world.receipt("r3"),
            PendingLossReport(
                "r3", [Loss("expired", "note", 1, 1005.0, 1005.0), Loss("rejected", "note", 1, 1005.0, 1005.0)]
            ),
        )
        world.forget("r1")
        world.forget("r3")
        self.assertEqual((world.receipt("r4"), world.spool.losses.unreported), (None, 0))

    def test_expired(self) -> None:
        """What is over its time is in the receipt under its own reason, states by their kind."""
        world = self.world(max_age=100)
        world.get(world.event("short", ttl=1))
        world.get(world.state("k", "s", ttl=1))
        world.get(world.event("long"))
        world.clock.advance(200)
        world.get(world.outbox.expire())
        receipt = world.receipt("r1")
        assert receipt is not None
        self.assertEqual(
            [(loss.reason, loss.kind, loss.count) for loss in receipt.losses],
            [("expired", "inventory", 1), ("expired", "note", 1), ("over-age", "note", 1)],
        )

    def test_evicted(self) -> None:
        """A dead letter that gives way to newer ones is gone for good, which is counted by itself."""
        world = self.world(max_dead_letters=2)
        world.lose("rejected", 5)
        receipt = world.receipt("r1")
        assert receipt is not None
        self.assertEqual(
            {(loss.reason, loss.kind, loss.count) for loss in receipt.losses},
            {("rejected", "note", 5), ("evicted", "note", 3)},
        )
        self.assertEqual(world.outbox.stats.dropped, {"rejected": 5})

    def test_bounded(self) -> None:
        """However many reasons there are, the rows of a receipt are bounded, and every loss is counted."""
        world = self.world()
        for n in range(MAX_ROWS + 10):
            world.lose(f"reason{n}")
        world.lose("reason1")
        receipt = world.receipt("r1")
        assert receipt is not None
        self.assertEqual(
            (len(receipt.losses), sum(loss.count for loss in receipt.losses)), (MAX_ROWS + 1, MAX_ROWS + 11)
        )
        self.assertIn("other", world.outbox.stats.dropped)

    def test_change(self) -> None:
        """Whoever listens hears of each change after the commit, and a failing listener harms nobody."""
        world = self.world()
        seen: list[int] = []
        world.spool.losses.on_change = lambda: seen.append(world.spool.losses.unreported)
        world.lose("rejected", 2)
        world.get(world.event("kept"))
        world.receipt("r1")
        world.forget("r1")
        self.assertEqual(seen, [1, 2, 0])
        world.spool.losses.on_change = lambda: 1 // 0
        world.lose("rejected")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_closed(self) -> None:
        """Nothing can be asked of a spool that is not open."""
        world = LossWorld()
        self.failureResultOf(world.spool.losses.pending_report("r1"), NotRunning)
        self.failureResultOf(world.spool.losses.forget("r1"), NotRunning)

    def test_all_or_nothing(self) -> None:
        """A receipt that cannot be made leaves every loss where it was counted."""
        world = self.world()
        world.lose("rejected", 2)
        real = LossBook.pending_report

        def failing(book: LossBook, new_id: str, now: float) -> PendingLossReport | None:
            real(book, new_id, now)
            raise ValueError("just before the commit")

        patch = self.patch(LossBook, "pending_report", failing)
        with self.assertRaises(SpoolError):
            world.receipt("r1")
        patch.restore()
        receipt = world.receipt("r2")
        assert receipt is not None
        self.assertEqual((receipt.id, receipt.losses[0].count), ("r2", 2))


class OnDiskTests(TestCase):
    """Across restarts, versions and damage."""

    timeout = 10

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())

    async def spool(self) -> Spool:
        """Open the spool."""
        spool = Spool(config.Spool(path=str(self.directory)), reactor=reactor, wall=time.time)
        self.addCleanup(spool.close)
        await spool.open()
        return spool

    async def lose(self, spool: Spool, name: str, reason: str = "rejected") -> None:
        seq = await spool.outbox.put(lane=Lane.EVENT, kind="note", id=name, body=b"{}")
        await spool.outbox.bury(seq, reason)

    def tamper(self, statement: str, *values: Any) -> None:
        db = sqlite3.connect(self.directory / "spool.db", isolation_level=None)
        db.execute(statement, values)
        db.close()

    async def test_restarts(self) -> None:
        """A receipt outlives restarts under its id until it is forgotten, and so do losses that no receipt has."""
        spool = await self.spool()
        await self.lose(spool, "a")
        await spool.close()
        spool = await self.spool()
        self.assertEqual(spool.losses.unreported, 1)
        receipt = await spool.losses.pending_report("r1")
        assert receipt is not None
        await self.lose(spool, "b")
        await spool.close()
        spool = await self.spool()
        self.assertEqual((spool.losses.unreported, await spool.losses.pending_report("r2")), (2, receipt))
        await spool.losses.forget("r1")
        await spool.close()
        spool = await self.spool()
        self.assertEqual(spool.losses.unreported, 1)
        again = await spool.losses.pending_report("r3")
        assert again is not None
        self.assertEqual((again.id, again.losses[0].count), ("r3", 1))

    async def test_version_1(self) -> None:
        """A spool of version 1 is taken over whole, with the losses that it had counted."""
        self.directory.mkdir(mode=0o700)
        db = sqlite3.connect(self.directory / "spool.db", isolation_level=None)
        patches = [self.patch(schema, "MIGRATIONS", schema.MIGRATIONS[:1]), self.patch(schema, "VERSION", 1)]
        schema.prepare(db, synchronous="FULL", in_memory=False)
        db.execute("INSERT INTO loss VALUES ('refused', 'command_result', 3, 10.0, 20.0)")
        db.execute("INSERT INTO loss VALUES ('expired', 'command_result', 4, 5.0, 6.0)")
        db.execute("INSERT INTO dead_letter VALUES (1, 1, 'note', 'e1', '', 0.0, 0.0, 'refused', x'7b7d')")
        db.execute("UPDATE counter SET dead_letters = 1, dead_bytes = 2, next_event = 7")
        db.close()
        for patch in patches:
            patch.restore()
        spool = await self.spool()
        self.assertEqual((spool.losses.unreported, spool.outbox.stats.dead_letters), (7, 1))
        self.assertEqual(
            await spool.losses.pending_report("r1"),
            PendingLossReport(
                "r1",
                [Loss("expired", "command_result", 4, 5.0, 6.0), Loss("refused", "command_result", 3, 10.0, 20.0)],
            ),
        )
        self.assertEqual(await spool.outbox.put(lane=Lane.EVENT, kind="note", id="e7", body=b"{}"), 7)

    async def test_damaged(self) -> None:
        """A receipt that cannot be read any more says so, under its id, and then gives way to the next."""
        for statement in (
            "UPDATE loss_receipt SET body = x'ff'",
            "UPDATE loss_receipt SET body = replace(body, 'count', 'cownt')",
            "UPDATE loss_receipt SET body = '[]x'",
        ):
            spool = await self.spool()
            await self.lose(spool, "a")
            await spool.losses.pending_report("r1")
            await spool.close()
            self.tamper(statement)
            spool = await self.spool()
            receipt = await spool.losses.pending_report("r2")
            assert receipt is not None
            self.assertEqual(
                (receipt.id, [(each.reason, each.kind, each.count) for each in receipt.losses]),
                ("r1", [("damaged", "loss_receipt", 1)]),
            )
            await spool.losses.forget("r1")
            self.assertIsNone(await spool.losses.pending_report("r2"))
            await spool.close()

    async def test_damaged_id(self) -> None:
        """An id that no backend could acknowledge any more gives way to another one, for good."""
        spool = await self.spool()
        await self.lose(spool, "a")
        made = await spool.losses.pending_report("r1")
        assert made is not None
        await spool.close()
        self.tamper("UPDATE loss_receipt SET id = CAST(x'72ff' AS TEXT)")
        spool = await self.spool()
        for new_id in ("r2", "r3"):
            self.assertEqual(await spool.losses.pending_report(new_id), PendingLossReport("r2", made.losses))

    async def test_damaged_counts(self) -> None:
        """Counts that no count can be, or a reason that is no text, never stop the reporting."""
        for statement in (
            "UPDATE loss SET n = -1",
            "UPDATE loss SET n = 'many'",
            "UPDATE loss SET first_at = 9e999",
            "UPDATE loss SET reason = CAST(x'ff' AS TEXT)",
        ):
            spool = await self.spool()
            await self.lose(spool, "a")
            await spool.close()
            self.tamper(statement)
            spool = await self.spool()
            receipt = await spool.losses.pending_report("r1")
            assert receipt is not None
            self.assertEqual((receipt.id, len(receipt.losses)), ("r1", 1), statement)
            await spool.losses.forget("r1")
            self.assertIsNone(await spool.losses.pending_report("r2"), statement)
            await spool.close()
