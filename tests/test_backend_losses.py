"""The reference backend's side of loss receipts: stored once, acknowledged every time, shown."""

from __future__ import annotations

from typing import Any

import msgspec

from commsmgr.messages import LossReport
from tests.backend_kit import BackendTestCase

ROW = {
    "reason": "expired",
    "kind": "command_result",
    "count": 3,
    "first_at": "2026-01-01T00:00:00Z",
    "last_at": "2026-01-01T00:00:09Z",
}
BEAT = {"machine_id": "m-1", "acked_commands": [], "delivery": {"losses": {"id": "l-1", "losses": [ROW]}}}


class LossReceiptTests(BackendTestCase):
    def stored(self) -> list[tuple[str, str, int]]:
        return [(row.id, row.transport, row.copies) for row in self.backend.ledger.loss_receipts("m-1")]

    async def test_websocket(self) -> None:
        """A receipt is stored and acknowledged; the same one again is acknowledged, and nothing else happens."""
        backend = await self.start()
        agent = await self.register()
        told = backend.when("losses")
        for _ in range(2):
            agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [ROW]})
            self.assertEqual({"type": "ack", "ids": ["l-1"]}, await agent.get("ack"))
            self.assertTrue(told.called, "told before it is acknowledged, and not with whatever is stored next")
        event = await told
        self.assertEqual(("m-1", "l-1", "3 command_result expired"), (event.machine_id, event.id, event.note))
        self.assertEqual([ROW], event.detail["losses"])
        self.assertEqual([("l-1", "websocket", 2)], self.stored())
        (row,) = backend.ledger.loss_receipts("m-1")
        self.assertEqual([ROW], msgspec.to_builtins(msgspec.json.decode(row.body, type=LossReport).losses))
        self.assertEqual(1, sum(event.kind == "losses" for event in backend.event_log.recent))

    async def test_malformed(self) -> None:
        """A receipt that cannot be understood is refused for good."""
        await self.start()
        agent = await self.register()
        agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [{**ROW, "count": 0}]})
        nack = await agent.get("nack")
        self.assertEqual(("l-1", None), (nack["id"], nack["data"]["retry_after"]))
        self.assertEqual([], self.stored())

    async def test_before_the_registration(self) -> None:
        """A stranger's receipt is not taken."""
        backend = await self.start()
        agent = await self.connect()
        refused = backend.when("refused")
        agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [ROW]})
        await refused
        self.assertEqual([], self.stored())

    async def test_faults(self) -> None:
        """A crash before storing leaves nothing, one after storing leaves it, and without acks nothing is said."""
        backend = await self.start()
        for stored in (False, True):
            agent = await self.register()
            backend.faults.inject("crash", count=1, stored=stored)
            agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [ROW]})
            await agent.closed
            self.assertEqual([("l-1", "websocket", 1)] if stored else [], self.stored())
        agent = await self.register()
        backend.faults.inject("no_ack")
        agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [ROW]})
        await agent.round_trip()
        self.assertEqual(([], [("l-1", "websocket", 2)]), (agent.inbox, self.stored()))

    async def test_heartbeat(self) -> None:
        """A receipt in a heartbeat is stored, and its id is in the answer, each time; without one there is no field."""
        backend = await self.start()
        told = backend.when("losses")
        for _ in range(2):
            self.assertEqual("l-1", (await self.post("/heartbeat", BEAT)).json["acked_losses"])
        self.assertEqual("http", (await told).transport)
        self.assertEqual([("l-1", "http", 2)], self.stored())
        answer = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": [], "delivery": {}})
        self.assertEqual({"status", "timestamp", "message", "inventory_checksum"}, set(answer.json))

    async def test_both_ways(self) -> None:
        """The id is the receipt's: what came over the WebSocket is known when it comes in a heartbeat."""
        await self.start()
        agent = await self.register()
        agent.say(type="loss_receipt", id="l-1", timestamp="", data={"losses": [ROW]})
        await agent.get("ack")
        await self.post("/heartbeat", BEAT)
        self.assertEqual([("l-1", "websocket", 2)], self.stored())

    async def test_malformed_heartbeat(self) -> None:
        """What is no receipt is not confirmed, and does not spoil the heartbeat."""
        backend = await self.start()
        for delivery in (7, {"losses": 5}, {"losses": {"id": "", "losses": []}}, {"losses": {"id": "l-1"}}):
            refused = backend.when("refused")
            answer = await self.post("/heartbeat", {**BEAT, "delivery": delivery})
            self.assertEqual((200, False), (answer.status, "acked_losses" in answer.json))
            await refused
        self.assertEqual([], self.stored())

    async def test_plain(self) -> None:
        """A plain backend, and any backend for a plain agent, keeps a heartbeat as it came and confirms nothing."""
        plain_agent = {name: value for name, value in BEAT.items() if name != "acked_commands"}
        for dialects, beat in ((("plain",), BEAT), (("plain", "commsmgr.v1"), plain_agent)):
            backend = await self.start(dialects=dialects)
            answer = await self.post("/heartbeat", beat)
            self.assertEqual({"status", "timestamp", "message"}, set(answer.json))
            self.assertEqual([], self.stored())
            (machine,) = backend.ledger.machines()
            self.assertIn(b'"l-1"', machine.heartbeat or b"")

    async def test_state(self) -> None:
        """The API shows the latest receipts of each agent, the latest first."""
        await self.start()
        agent = await self.register()
        for number in range(25):
            agent.say(type="loss_receipt", id=f"l-{number}", timestamp="", data={"losses": [ROW]})
            await agent.get("ack")
        (shown,) = (await self.call("GET", "/api/state")).json["agents"]
        receipts: list[dict[str, Any]] = shown["loss_receipts"]
        self.assertEqual([f"l-{number}" for number in range(24, 4, -1)], [each["report"]["id"] for each in receipts])
        self.assertEqual((self.now, "websocket", [ROW]), (
            receipts[0]["at"], receipts[0]["transport"], receipts[0]["report"]["losses"],
        ))  # fmt: skip
