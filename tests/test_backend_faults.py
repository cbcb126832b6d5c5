"""The reference backend misbehaves as told, over both transports, and behaves again."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseNeverReceived

from commsmgr.backend import Fault, Faults
from commsmgr.backend.entrance import Entrance, EntranceFactory
from tests.backend_kit import BackendTestCase
from tests.loopback import ReactorWith

BEAT = {"machine_id": "m-1", "acked_commands": []}


class FaultsTests(SynchronousTestCase):
    """The bookkeeping of faults, on a clock of the test's own."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.faults = Faults(self.clock)
        self.seen: list[str] = []
        self.faults.started = lambda fault: self.seen.append(f"+{fault.kind}")
        self.faults.ended = lambda fault: self.seen.append(f"-{fault.kind}")

    def test_count(self) -> None:
        """A fault ends with its last strike, and strikes only the transport it concerns."""
        self.faults.inject("status", count=2, transport="http")
        self.assertIsNone(self.faults.strike("status", "websocket"))
        self.assertIsNone(self.faults.strike("html", "http"))
        self.assertEqual([2], [active.left for active in self.faults.active])
        self.assertIsNotNone(self.faults.strike("status", "http"))
        self.assertIsNotNone(self.faults.strike("status", "http"))
        self.assertIsNone(self.faults.strike("status", "http"))
        self.assertEqual(["+status", "-status"], self.seen)

    def test_seconds(self) -> None:
        """A fault ends when its time is over, and says how much is left."""
        self.faults.inject("hang", seconds=5)
        self.clock.advance(2)
        self.assertEqual([3.0], [active.seconds_left for active in self.faults.active])
        self.clock.advance(3)
        self.assertEqual((), self.faults.active)

    def test_replaced_and_cleared(self) -> None:
        """A new fault of a kind takes the place of the old one; clearing leaves no timer."""
        self.faults.inject("slow", seconds=5)
        self.faults.inject("slow", delay=9)
        self.faults.inject("hang", seconds=5)
        self.faults.clear("slow")
        self.assertEqual(["hang"], [active.fault.kind for active in self.faults.active])
        self.faults.clear()
        self.assertEqual(["+slow", "-slow", "+slow", "+hang", "-slow", "-hang"], self.seen)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_immediate(self) -> None:
        """Dropping or closing what is open now is over at once; with `after` it waits for so many messages."""
        self.faults.inject("drop")
        self.assertEqual(((), ["+drop"]), (self.faults.active, self.seen))
        self.faults.inject("close", after=2)
        self.assertIsNone(self.faults.strike("close", "websocket", 1))
        self.assertIsNotNone(self.faults.strike("close", "websocket", 2))

    def test_validated(self) -> None:
        """A fault that does not exist, or with wrong settings, is refused."""
        for kind, settings in (("melt", {}), ("status", {"status": 200}), ("slow", {"hue": 1}), ("hang", {"count": 0})):
            with self.assertRaises(ValueError):
                self.faults.inject(kind, **settings)


class EntranceTests(SynchronousTestCase):
    """Details of the entrance that a real connection does not show reliably."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.faults = Faults(self.clock)
        nobody: Any = None
        self.factory = EntranceFactory(
            self.clock,
            nobody,
            nobody,
            self.faults,
            is_control=lambda path: False,
            refuse_upgrade=lambda path, headers: (404, {}, b""),
        )
        self.factory.doStart = self.factory.doStop = lambda: None

    def entrance(self) -> tuple[Entrance, StringTransport]:
        entrance, transport = self.factory.buildProtocol(None), StringTransport()
        entrance.makeConnection(transport)
        return entrance, transport

    def test_silent_connection(self) -> None:
        """A connection on which no head comes is cut after a while."""
        _, transport = self.entrance()
        self.clock.advance(29)
        self.assertFalse(transport.disconnected)
        self.clock.advance(2)
        self.assertTrue(transport.disconnected)

    def test_held_loss(self) -> None:
        """What is written and closed during a blackhole arrives after it, in order, and then the connection ends."""
        entrance, transport = self.entrance()
        entrance.hold(Fault(kind="blackhole"))
        self.assertEqual("paused", transport.producerState)
        entrance.resumeProducing()
        self.assertEqual("paused", transport.producerState)
        entrance.write(b"a")
        entrance.writeSequence([b"b", b"c"])
        entrance.loseConnection()
        self.assertEqual((b"", False), (transport.value(), transport.disconnecting))
        entrance.release()
        self.assertEqual((b"abc", True), (transport.value(), transport.disconnecting))

    def test_inner_pause(self) -> None:
        """A pause that the protocol asked for outlasts the blackhole."""
        entrance, transport = self.entrance()
        entrance.hold(Fault(kind="blackhole", direction="out"))
        self.assertEqual("producing", transport.producerState)
        entrance.pauseProducing()
        entrance.release()
        self.assertEqual("paused", transport.producerState)

    def test_held_too_much(self) -> None:
        """What a blackhole holds back is bounded."""
        entrance, transport = self.entrance()
        entrance.hold(Fault(kind="blackhole"))
        for _ in range(65):
            entrance.write(b"x" * (1 << 20))
        self.assertTrue(transport.disconnected)

    def test_slow_upgrade(self) -> None:
        """Bytes that come while an upgrade waits are kept, and a lost connection leaves no timer."""
        self.faults.inject("slow", delay=3)
        entrance, transport = self.entrance()
        entrance.dataReceived(b"GET /x HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        entrance.dataReceived(b"more")
        self.assertEqual(b"", transport.value())
        self.clock.advance(3)
        self.assertTrue(transport.value().startswith(b"HTTP/1.1 404 Not Found\r\n"))
        other, _ = self.entrance()
        other.dataReceived(b"GET /x HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        other.connectionLost(None)
        self.assertEqual([], self.clock.getDelayedCalls())


class HTTPFaultTests(BackendTestCase):
    async def test_status(self) -> None:
        """Told statuses, with and without Retry-After, so many times."""
        backend = await self.start()
        backend.faults.inject("status", status=429, retry_after=7, count=1)
        answer = await self.post("/heartbeat", BEAT)
        self.assertEqual((429, "7"), (answer.status, answer.headers["retry-after"]))
        backend.faults.inject("status", status=500, count=1)
        self.assertEqual(500, (await self.post("/heartbeat", BEAT)).status)
        self.assertEqual(200, (await self.post("/heartbeat", BEAT)).status)

    async def test_html(self) -> None:
        """A captive portal's page with 200."""
        backend = await self.start()
        backend.faults.inject("html")
        answer = await self.post("/heartbeat", BEAT)
        self.assertEqual((200, "text/html"), (answer.status, answer.headers["content-type"]))
        self.assertEqual([], backend.ledger.machines())

    async def test_malformed(self) -> None:
        """Answers that are not what an agent expects."""
        backend = await self.start()
        for form in ("garbage", "binary", "unknown", "deep", "utf8", "bits"):
            backend.faults.inject("malformed", form=form)
            answer = await self.post("/heartbeat", BEAT)
            self.assertEqual(200, answer.status)
            self.assertNotIn(b'"status":"ok"', answer.body)

    async def test_refuse_and_drop(self) -> None:
        """New connections are closed at once; a fault with `after` lets the first request through."""
        backend = await self.start()
        backend.faults.inject("refuse", count=1)
        await self.assertFailure(Deferred.fromCoroutine(self.post("/heartbeat", BEAT)), ResponseNeverReceived)
        backend.faults.inject("drop", after=1, count=1)
        await self.assertFailure(Deferred.fromCoroutine(self.post("/heartbeat", BEAT)), ResponseNeverReceived)
        self.assertEqual(200, (await self.post("/heartbeat", BEAT)).status)

    async def test_crash(self) -> None:
        """The connection is cut before, or after, the message was stored."""
        backend = await self.start()
        backend.faults.inject("crash", count=1)
        await self.assertFailure(Deferred.fromCoroutine(self.post("/heartbeat", BEAT)), ResponseNeverReceived)
        self.assertEqual([], backend.ledger.machines())
        backend.faults.inject("crash", count=1, stored=True)
        await self.assertFailure(Deferred.fromCoroutine(self.post("/heartbeat", BEAT)), ResponseNeverReceived)
        self.assertEqual(["m-1"], [row.machine_id for row in backend.ledger.machines()])

    async def test_hang(self) -> None:
        """A request that hangs is not answered, and dropping ends it."""
        backend = await self.start()
        backend.faults.inject("hang", count=1)
        waiting = Deferred.fromCoroutine(self.post("/heartbeat", BEAT))
        while backend.faults.active:  # else the second request may be the one that it strikes
            await self.pause(0)
        self.assertEqual(200, (await self.post("/heartbeat", BEAT)).status)
        self.assertNoResult(waiting)
        backend.faults.inject("drop", transport="http")
        await self.assertFailure(waiting, ResponseNeverReceived)

    async def test_slow(self) -> None:
        """An answer comes late, when its delay is over and not before; others are not held up."""
        clock = Clock()
        backend = await self.start(on=ReactorWith(clock=clock))
        backend.faults.inject("slow", delay=5, count=1)
        handled = backend.when("heartbeat")
        waiting = Deferred.fromCoroutine(self.post("/heartbeat", BEAT))
        await handled
        await self.pause(0)  # told in the midst of the handling; the answer's timer comes after it
        clock.advance(4.9)
        self.assertEqual(200, (await self.post("/heartbeat", BEAT)).status)
        self.assertNoResult(waiting)
        clock.advance(0.1)
        self.assertEqual(200, (await waiting).status)

    async def test_slow_and_lost(self) -> None:
        """A connection that is lost while an answer waits leaves nothing behind."""
        backend = await self.start()
        backend.faults.inject("slow", delay=60)
        handled = backend.when("heartbeat")
        waiting = Deferred.fromCoroutine(self.post("/heartbeat", BEAT))
        await handled
        backend.crash()
        await self.assertFailure(waiting, ResponseNeverReceived)

    async def test_blackhole(self) -> None:
        """Requests pass when the blackhole ends."""
        backend = await self.start()
        backend.faults.inject("blackhole", seconds=0.1)
        self.assertEqual(200, (await self.post("/heartbeat", BEAT)).status)
        self.assertEqual((), backend.faults.active)


class WebSocketFaultTests(BackendTestCase):
    async def refused(self, kind: Any, **settings: Any) -> tuple[str, dict[str, str]]:
        """Return how an upgrade is refused under a fault."""
        self.backend.faults.inject(kind, count=1, **settings)
        agent = await self.connect()
        assert agent.refusal is not None
        return agent.refusal

    async def test_upgrade(self) -> None:
        """Upgrades are refused with told statuses, HTML, or a closed connection; then they work."""
        await self.start()
        line, headers = await self.refused("status", status=503, retry_after=9)
        self.assertEqual(("HTTP/1.1 503 Service Unavailable", "9"), (line, headers["retry-after"]))
        self.assertIn(" 418 ", (await self.refused("status", status=418))[0])
        self.assertIn(" 200 ", (await self.refused("html"))[0])
        self.assertEqual(("", {}), await self.refused("refuse"))
        self.assertIsNone((await self.connect()).refusal)

    async def test_hanging_upgrade(self) -> None:
        """An upgrade is not answered; the connection can be dropped."""
        backend = await self.start()
        backend.faults.inject("hang", count=1)
        waiting = Deferred.fromCoroutine(self.connect())
        await self.register()
        self.assertNoResult(waiting)
        backend.faults.inject("drop")
        self.assertIsNotNone((await waiting).refusal)

    async def test_drop_and_close(self) -> None:
        """Open WebSockets are cut or closed at once, or after so many messages."""
        backend = await self.start()
        agent = await self.register()
        backend.faults.inject("drop")
        self.assertEqual(1006, (await agent.closed)[0])
        agent = await self.register()
        backend.faults.inject("close", code=1012)
        self.assertEqual(1012, (await agent.closed)[0])
        agent = await self.register()
        backend.faults.inject("drop", after=3, count=1)
        await agent.round_trip()
        agent.say(type="ping")
        self.assertEqual(1006, (await agent.closed)[0])
        agent = await self.connect()
        backend.faults.inject("close", after=1, code=4000, count=1)
        agent.say(type="ping")
        self.assertEqual(4000, (await agent.closed)[0])

    async def test_silent(self) -> None:
        """A registration is not answered, in either dialect."""
        backend = await self.start()
        for protocols in (("commsmgr.v1",), ()):
            backend.faults.inject("silent", count=1)
            agent = await self.connect(protocols)
            agent.say(type="register", machine_id="m-1", id="1", timestamp="", data={})
            await agent.round_trip()
            self.assertEqual([], agent.inbox)

    async def test_no_ack_and_nack(self) -> None:
        """A result is stored and not acknowledged; or nacked and not stored."""
        backend = await self.start()
        agent = await self.register()
        given = backend.send_command("m-1", "ping")
        backend.faults.inject("nack", count=1, retry_after=2)
        agent.result(given)
        self.assertEqual(2, (await agent.get("nack"))["data"]["retry_after"])
        self.assertEqual([], backend.ledger.results())
        backend.faults.inject("no_ack", count=1)
        agent.result(given)
        await backend.when_result(given)
        await agent.round_trip()
        self.assertEqual([], [message for message in agent.inbox if message["type"] == "ack"])
        agent.result(given)
        self.assertEqual([f"r-{given}"], (await agent.get("ack"))["ids"])
        self.assertEqual([], [message for message in agent.inbox if message["type"] == "ack"])

    async def test_crash(self) -> None:
        """The connection is cut with the result stored or not, never acknowledged, in either dialect."""
        backend = await self.start()
        for machine_id, protocols in (("m-1", ("commsmgr.v1",)), ("m-2", ())):
            for stored in (False, True):
                agent = await self.register(machine_id, protocols)
                given = backend.send_command(machine_id, "ping")
                backend.faults.inject("crash", count=1, stored=stored)
                agent.result(given)
                self.assertEqual(1006, (await agent.closed)[0])
                self.assertEqual(stored, bool(backend.ledger.results(given)))
                self.assertEqual([], [message for message in agent.inbox if message["type"] == "ack"])

    async def test_malformed(self) -> None:
        """Everything an agent should survive, to open WebSockets and after registrations."""
        backend = await self.start()
        agent = await self.register()
        agent.raw.clear()
        for form in ("garbage", "unknown", "deep", "binary"):
            backend.faults.inject("malformed", form=form, count=1)
        await agent.round_trip()
        self.assertEqual(5, len(agent.raw))
        backend.faults.inject("malformed", form="unknown", count=2)
        await self.register("m-2")
        await agent.get("flux_capacitor")
        await self.agents[-1].get("flux_capacitor")

    async def test_malformed_frames(self) -> None:
        """Text that is not UTF-8, reserved bits, a frame of 16 MiB: as seen by a strict client."""
        backend = await self.start()
        for form, code in (("utf8", 1007), ("bits", 1002)):
            agent = await self.register()
            backend.faults.inject("malformed", form=form, count=1)
            gone = backend.when("disconnected")
            self.assertIn(str(code), (await gone).note)
            await agent.closed
        agent = await self.register()
        backend.faults.inject("malformed", form="oversized", count=1)
        self.assertGreater(len(msgspec.json.encode(await agent.get("notice"))), 16 << 20)

    async def test_slow(self) -> None:
        """Messages come late, in order, also those that were sent after the fault was over."""
        backend = await self.start()
        backend.faults.inject("slow", delay=0.05, count=2, transport="websocket")
        agent = await self.connect()
        agent.say(type="register", machine_id="m-1", id="1", timestamp="", data={})
        agent.say(type="ping", id="2")
        agent.say(type="ping", id="3")
        await agent.get("pong")
        await agent.get("pong")
        self.assertEqual(
            ["registration_ack", "2", "3"],
            [m["id"] if m["type"] == "pong" else m["type"] for m in map(msgspec.json.decode, agent.raw)],
        )
        backend.faults.inject("slow", delay=60)
        agent.say(type="ping", id="4")
        await self.pause(0.02)
        agent.transport.abortConnection()
        await agent.closed

    async def test_blackhole(self) -> None:
        """Nothing passes in the direction that is dead, and everything after it ends."""
        backend = await self.start()
        agent = await self.register()
        backend.faults.inject("blackhole", direction="out")
        handled = backend.when("heartbeat")
        waiting = Deferred.fromCoroutine(self.post("/heartbeat", BEAT))
        await handled
        agent.say(type="ping", id="1")
        await self.pause(0.05)
        self.assertEqual([], agent.inbox)
        self.assertNoResult(waiting)
        backend.faults.clear()
        await agent.get("pong")
        self.assertEqual(200, (await waiting).status)
        backend.faults.inject("blackhole", direction="in", transport="websocket")
        messages: list[str] = []
        backend.subscribe(lambda event: messages.append(event.kind))
        agent.say(type="other", id="1")
        backend.send_command("m-1", "ping")
        await agent.get("command")
        self.assertNotIn("message", messages)
        message = backend.when("message")
        backend.faults.clear()
        await message
