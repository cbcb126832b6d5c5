"""What had to be given up reaches the backend: whole managers, real sockets, real spools."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from twisted.internet.defer import Deferred, gatherResults

from commsmgr import assembly, config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.backend.v1 import V1Conversation
from commsmgr.manager import Manager
from commsmgr.messages import Heartbeat, LossReceipt, LossReport, Result
from tests.test_mission import AT_ONCE, NO_WEBSOCKET, free_port
from tests.world import MACHINE, Runs, WorldTestCase, quick, until


class LossReceiptTests(WorldTestCase):
    """From the loss to the ledger."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(assembly, "HOUSEKEEPING", 0.05)
        self.directory_of_spool = self.spool()

    def told(self, backend: ReferenceBackend) -> Counter[tuple[str, str]]:
        """Return how many of each reason and kind the backend was told of, each receipt counted once."""
        total: Counter[tuple[str, str]] = Counter()
        for row in backend.ledger.loss_receipts(MACHINE):
            for loss in msgspec.json.decode(row.body, type=LossReport).losses:
                total[loss.reason, loss.kind] += loss.count
        return total

    def make(self, backend: ReferenceBackend | str, **changes: Any) -> Manager:
        changes.setdefault("delivery", AT_ONCE)
        return self.manager(quick(backend, self.directory_of_spool, **changes), handler=Runs())

    async def results(self, manager: Manager, count: int, ttl: float | None = None) -> None:
        """Have results accepted whose commands no backend knows."""
        await gatherResults([manager.send_result(Result(command_id=f"c{number}"), ttl=ttl) for number in range(count)])

    def unreported(self, manager: Manager) -> int:
        return manager.status().queue.unreported_losses

    def all_reported(self, backend: ReferenceBackend, manager: Manager) -> Deferred[None]:
        """Wait until the backend was told of everything that was lost, of which there is something."""
        return until(lambda: backend.ledger.loss_receipts(MACHINE) and not self.unreported(manager))

    def counted(self, manager: Manager, count: int) -> Deferred[None]:
        """Wait until ``count`` losses are waiting to be reported."""
        return until(lambda: self.unreported(manager) == count)

    async def expired(self, count: int) -> Manager:
        """Return a manager without any backend that had to give up ``count`` results."""
        # Without a way by HTTP: what an exchange has taken does not expire.
        manager = self.make(f"http://127.0.0.1:{free_port()}", delivery=config.Delivery())
        manager.startService()
        await manager.started()
        await self.results(manager, count, ttl=0.01)
        await self.counted(manager, count)
        return manager

    async def test_refused(self) -> None:
        """Results that the backend nacks for good are reported to it, all of them, each once, while connected."""
        backend = await self.backend()
        manager = self.make(backend)
        await manager.connect()
        backend.faults.inject("nack")
        ids = [backend.send_command(MACHINE, "echo") for _ in range(5)]
        await until(lambda: manager.status().queue.dead_letters == 5)
        await self.all_reported(backend, manager)
        self.assertEqual({("refused", "command_result"): 5}, self.told(backend))
        self.assertEqual(manager.status().queue.dropped, {"refused": 5})
        self.assertEqual({1}, {row.copies for row in backend.ledger.loss_receipts(MACHINE)})
        self.assertEqual({"websocket"}, {row.transport for row in backend.ledger.loss_receipts(MACHINE)})
        self.assertEqual([], backend.ledger.results())
        backend.faults.clear()
        again = backend.send_command(MACHINE, "echo")
        await backend.when_result(again)
        self.assertEqual([again], [result.command_id for result in backend.ledger.results()])
        self.assertNotIn(again, ids)

    async def test_expired_and_restarted(self) -> None:
        """What expired without a backend is reported after a restart and the next registration, once."""
        await (await self.expired(3)).disconnect()
        backend = await self.backend()
        manager = self.make(backend)
        await manager.connect()
        await self.all_reported(backend, manager)
        self.assertEqual({("expired", "command_result"): 3}, self.told(backend))
        copies = [row.copies for row in backend.ledger.loss_receipts(MACHINE)]
        await manager.disconnect()
        manager = self.make(backend)
        await manager.connect()
        self.assertEqual(0, self.unreported(manager))
        self.assertEqual(copies, [row.copies for row in backend.ledger.loss_receipts(MACHINE)])

    async def test_unacknowledged(self) -> None:
        """A receipt without an ack goes again over the next link and after a restart, under its id, and counts once."""
        await (await self.expired(3)).disconnect()
        backend = await self.backend()
        backend.faults.inject("no_ack")
        manager = self.make(backend)
        await manager.connect()

        def copies() -> int:
            return sum(row.copies for row in backend.ledger.loss_receipts(MACHINE))

        await until(lambda: copies() == 1)
        backend.close_websocket(MACHINE, 1012)
        await until(lambda: copies() == 2)
        await manager.disconnect()
        manager = self.make(backend)
        await manager.connect()
        await until(lambda: copies() == 3)
        self.assertEqual(3, self.unreported(manager))
        self.assertEqual(1, len(backend.ledger.loss_receipts(MACHINE)))
        backend.faults.clear()
        backend.close_websocket(MACHINE, 1012)
        await self.counted(manager, 0)
        self.assertEqual({("expired", "command_result"): 3}, self.told(backend))

    async def test_put_off(self) -> None:
        """A backend that wants the receipt later is told again by the next link at once; the stop leaves no timer."""
        seen: list[str] = []

        def put_off(conversation: V1Conversation, message: LossReceipt) -> None:
            seen.append(message.id)
            conversation._nack(message.id, "busy", "not now", 60.0)

        self.patch(V1Conversation, "_losses", put_off)
        await (await self.expired(1)).disconnect()
        backend = await self.backend()
        manager = self.make(backend)
        await manager.connect()
        for number in (1, 2):
            await until(lambda number=number: len(self.logged("losses.put-off")) == number)
            self.assertEqual(number, len(seen))
            backend.close_websocket(MACHINE, 1012)
        await until(lambda: len(self.logged("losses.put-off")) == 3)
        await manager.disconnect()
        self.assertEqual(1, len(set(seen)))

    async def test_crash_of_the_backend(self) -> None:
        """A backend that dies before or after storing a receipt has it once in the end."""
        for stored in (False, True):
            self.directory_of_spool = self.spool()
            await (await self.expired(2)).disconnect()
            backend = await self.backend()
            backend.faults.inject("crash", transport="websocket", count=1, stored=stored)
            manager = self.make(backend)
            await manager.connect()
            await self.all_reported(backend, manager)
            self.assertEqual({("expired", "command_result"): 2}, self.told(backend))
            (row, *others) = backend.ledger.loss_receipts(MACHINE)
            self.assertEqual(2 if stored else 1, max(each.copies for each in (row, *others)))
            await manager.disconnect()

    async def test_by_heartbeat(self) -> None:
        """Without WebSockets the receipt goes with the heartbeats until one of them is answered with its id."""
        backend = await self.backend()
        manager = self.make(backend, websocket=NO_WEBSOCKET)
        manager.startService()
        await manager.send_heartbeat()
        await self.results(manager, 2)
        await until(lambda: manager.status().queue.dropped == {"refused": 2})
        while self.unreported(manager):
            await manager.send_heartbeat()
        self.assertEqual({("refused", "command_result"): 2}, self.told(backend))
        self.assertEqual({("http", 1)}, {(row.transport, row.copies) for row in backend.ledger.loss_receipts(MACHINE)})
        await manager.send_heartbeat()
        self.assertEqual(msgspec.UNSET, self.beat(backend).delivery.losses)

    async def test_plain(self) -> None:
        """A plain backend confirms nothing: the receipt stays visible in each heartbeat, across restarts, unchanged."""
        backend = await self.backend(dialects=["plain"])
        seen: list[Any] = []
        for _ in range(2):
            manager = self.make(backend, websocket=NO_WEBSOCKET if not seen else quick("", "").websocket)
            manager.startService()
            await manager.send_heartbeat()
            if not seen:
                await self.results(manager, 1)
                await self.counted(manager, 1)
            # The receipt is made by a transaction of its own, so the first heartbeats may come before it.
            while self.beat(backend).delivery.losses is msgspec.UNSET:
                await manager.send_heartbeat()
            for _ in range(2):
                await manager.send_heartbeat()
                seen.append(self.beat(backend).delivery.losses)
            await manager.disconnect()
        self.assertIsInstance(seen[0], LossReport)
        self.assertEqual((seen[0].losses[0].reason, seen[0].losses[0].count), ("refused", 1))
        self.assertEqual(seen, seen[:1] * 4)
        self.assertEqual({}, self.told(backend))

    def beat(self, backend: ReferenceBackend) -> Heartbeat:
        """Return the latest heartbeat."""
        (machine,) = backend.ledger.machines()
        return msgspec.json.decode(machine.heartbeat or b"", type=Heartbeat)

    async def test_metrics(self) -> None:
        """Metrics and the status page tell what was given up, by reason, and how much of it nobody knows yet."""
        manager = self.make(
            f"http://127.0.0.1:{free_port()}",
            delivery=config.Delivery(),
            observe=config.Observe(listen=f"127.0.0.1:{(port := free_port())}"),
        )
        manager.startService()
        await manager.started()
        await self.results(manager, 4, ttl=0.01)
        await self.counted(manager, 4)
        _, page = await self.fetch(f"http://127.0.0.1:{port}/metrics")
        self.assertIn("\ncommsmgr_unreported_losses 4.0\n", page)
        self.assertIn('\ncommsmgr_dropped_total{reason="expired"} 4.0\n', page)
        _, status = await self.fetch(f"http://127.0.0.1:{port}/status")
        queue = msgspec.json.decode(status)["queue"]
        self.assertEqual((queue["unreported_losses"], queue["dropped"]), (4, {"expired": 4}))
