"""The reference backend's WebSocket, in both dialects, with an agent on the loopback."""

from __future__ import annotations

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol

from commsmgr.backend import MachineNotConnected
from tests.backend_kit import V1, BackendTestCase


class Raw(Protocol):
    """Collects bytes until the connection ends."""

    def __init__(self) -> None:
        self.received = b""
        self.first: Deferred[bytes] = Deferred()
        self.wanted = b""
        self.gone: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self.wanted in self.received and not self.first.called:
            self.first.callback(self.received)

    def connectionLost(self, reason: object = None) -> None:
        self.gone.callback(self.received)


class UpgradeTests(BackendTestCase):
    async def test_dialect(self) -> None:
        """commsmgr.v1 is selected when it is offered, and only then; a backend may speak only one dialect."""
        await self.start()
        self.assertEqual(V1, (await self.connect((V1,))).websocket_protocol_in_use)
        self.assertIsNone((await self.connect(())).websocket_protocol_in_use)
        await self.start(dialects=("plain",))
        self.assertIsNone((await self.connect((V1,))).websocket_protocol_in_use)
        await self.start(dialects=(V1,))
        agent = await self.connect(())
        self.assertIn("400", agent.refusal[0])

    async def test_path(self) -> None:
        """Only the path that was given takes WebSockets."""
        await self.start(websocket_path="/agents")
        self.assertIsNone((await self.connect()).refusal)
        self.assertIn("404", (await self.connect(path="/ws")).refusal[0])

    async def test_token(self) -> None:
        """commsmgr.v1 checks the token on the upgrade, plain does not unless told to."""
        await self.start(token="s3cret")
        refused = await self.connect()
        self.assertIn("401", refused.refusal[0])
        self.assertIsNone((await self.connect(token="s3cret")).refusal)
        self.assertIsNone((await self.connect(())).refusal)
        await self.start(token="s3cret", check_token_on_upgrade=True)
        self.assertIn("401", (await self.connect(())).refusal[0])
        await self.start(token="s3cret", check_token_on_upgrade=False)
        self.assertIsNone((await self.connect()).refusal)

    async def test_same_packet(self) -> None:
        """A frame that comes in the packet of the upgrade is not lost."""
        backend = await self.start()
        raw = await TCP4ClientEndpoint(reactor, "127.0.0.1", backend.port).connect(Factory.forProtocol(Raw))
        raw.wanted = b"registration_ack"
        payload = b'{"type":"register","machine_id":"m-9","id":"1","timestamp":"","data":{}}'
        head = (
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{backend.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        frame = bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload
        raw.transport.write(head[:40])
        await self.pause(0.05)
        raw.transport.write(head[40:] + frame)
        self.assertIn(b"m-9", await raw.first)
        raw.transport.abortConnection()
        await raw.gone

    async def test_head_too_large(self) -> None:
        """A head without end is not read for ever."""
        backend = await self.start()
        raw = await TCP4ClientEndpoint(reactor, "127.0.0.1", backend.port).connect(Factory.forProtocol(Raw))
        raw.transport.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000)
        await raw.gone


class PlainTests(BackendTestCase):
    async def test_conversation(self) -> None:
        """Registration, a command, its result: nothing is acknowledged, and the result is known."""
        backend = await self.start()
        agent = await self.connect(())
        agent.say(type="register", machine_id="m-1", id="reg", timestamp="", data={})
        ack = await agent.get("registration_ack")
        self.assertEqual("reg", ack["id"])
        self.assertEqual({"message", "machine_id"}, set(ack["data"]))
        self.assertEqual("plain", backend.connected("m-1"))
        given = backend.send_command("m-1", "echo", "x", ["a", "b"], timeout=5, options={"o": 1})
        command = await agent.get("command")
        self.assertEqual(given, command["id"])
        self.assertEqual(
            {"type": "echo", "command": "x", "args": ["a", "b"], "timeout": 5, "options": {"o": 1}}, command["data"]
        )
        agent.result(given, execution_time=7, output="one")
        await agent.round_trip()
        self.assertEqual(
            ("one", 7), ((await backend.when_result(given)).output, (await backend.when_result(given)).execution_time)
        )
        agent.result(given, output="two")
        await agent.round_trip()
        self.assertEqual("two", (await backend.when_result(given)).output)
        self.assertEqual([], agent.inbox)

    async def test_first_message_registers(self) -> None:
        """The first message with a machine_id is swallowed as the registration, whatever its type."""
        backend = await self.start()
        agent = await self.connect(())
        agent.say(type="status", machine_id="m-1")
        await agent.get("registration_ack")
        self.assertEqual("plain", backend.connected("m-1"))

    async def test_old_result(self) -> None:
        """A result without a type, and one of a command nobody knows."""
        backend = await self.start()
        agent = await self.register(protocols=())
        given = backend.send_command("m-1", "ping")
        agent.say(id=given, output="", error="it broke")
        refused = backend.when("refused")
        agent.say(id="unknown", output="x")
        self.assertIn("not known here", (await refused).note)
        self.assertEqual(
            ("error", "it broke"), ((await backend.when_result(given)).status, (await backend.when_result(given)).error)
        )

    async def test_nonsense(self) -> None:
        """What is not understood closes nothing."""
        backend = await self.start()
        agent = await self.register(protocols=())
        notes: list[str] = []
        backend.subscribe(lambda event: notes.append(f"{event.kind} {event.note}"))
        agent.sendMessage(b"nonsense")
        agent.sendMessage(b"\x00\xff", isBinary=True)
        agent.say(type="command_result", id="1", data={"status": "success"})
        agent.say(type="other", id="2")
        await agent.round_trip()
        self.assertEqual(["refused", "refused", "refused", "message"], [note.split()[0] for note in notes])

    async def test_not_connected(self) -> None:
        """A command for a machine that is not connected is dropped, with an error that is a LookupError too."""
        backend = await self.start()
        with self.assertRaises(LookupError):
            backend.send_command("nobody", "ping")
        agent = await self.register(protocols=())
        gone = backend.when("disconnected")
        agent.sendClose()
        await gone
        with self.assertRaisesRegex(MachineNotConnected, "plain and is not connected"):
            backend.send_command("m-1", "ping")

    async def test_overlap(self) -> None:
        """The newer of two sockets gets the commands, also after the older is closed."""
        backend = await self.start()
        older = await self.register(protocols=())
        newer = await self.register(protocols=())
        gone = backend.when("disconnected")
        older.sendClose()
        await gone
        backend.send_command("m-1", "ping")
        await newer.get("command")

    async def test_quirks(self) -> None:
        """With quirks: closing the older socket deregisters the newer, ids collide, a large frame comes first."""
        backend = await self.start(quirks=True)
        older = await self.register(protocols=())
        self.assertGreater(len(older.raw[0]), 100_000)
        ids = {backend.send_command("m-1", "ping"), backend.send_command("m-1", "ping")}
        self.assertEqual({f"cmd_{int(self.now * 1000)}"}, ids)
        await self.register(protocols=())
        gone = backend.when("disconnected")
        older.sendClose()
        await gone
        with self.assertRaises(MachineNotConnected):
            backend.send_command("m-1", "ping")


class V1Tests(BackendTestCase):
    async def test_conversation(self) -> None:
        """A command is acknowledged by the agent, its result by the backend once it is stored."""
        backend = await self.start(dedupe_window=3600)
        agent = await self.connect()
        agent.say(type="register", machine_id="m-1", id="reg", timestamp="", data={})
        ack = await agent.get("registration_ack")
        self.assertEqual(("reg", 3600), (ack["id"], ack["data"]["dedupe_window"]))
        given = backend.send_command("m-1", "ping")
        await agent.get("command")
        self.assertEqual("pending", backend.ledger.command(given).state)
        agent.say(type="ack", ids=[given])
        await agent.round_trip()
        self.assertEqual("taken", backend.ledger.command(given).state)
        agent.result(given)
        self.assertEqual({"type": "ack", "ids": [f"r-{given}"]}, await agent.get("ack"))
        self.assertEqual(f"r-{given}", (await backend.when_result(given)).id)

    async def test_batched_acks(self) -> None:
        """Results that come together are acknowledged together."""
        backend = await self.start()
        agent = await self.register()
        ids = [backend.send_command("m-1", "ping") for _ in range(50)]
        acks: list[str] = []
        for given in ids:
            agent.result(given)
        messages = 0
        while len(acks) < 50:
            acks += (await agent.get("ack"))["ids"]
            messages += 1
        self.assertEqual([f"r-{given}" for given in ids], acks)
        self.assertLess(messages, 10)

    async def test_duplicates(self) -> None:
        """A result that is known is acknowledged again and nothing else happens, over HTTP too."""
        backend = await self.start()
        agent = await self.register()
        given = backend.send_command("m-1", "ping")
        for _ in range(2):
            agent.result(given)
            await agent.get("ack")
        body = {"id": f"r-{given}", "command_id": given, "status": "success"}
        self.assertEqual("duplicate", (await self.post("/commands/result", body)).json["message"])
        self.assertEqual([3], [row.copies for row in backend.ledger.results()])

    async def test_resume(self) -> None:
        """After a registration whatever is not acknowledged comes again, in the old order, with the old ids."""
        backend = await self.start()
        agent = await self.register()
        ids = [backend.send_command("m-1", "ping") for _ in range(3)]
        agent.say(type="ack", ids=[ids[1]])
        await agent.round_trip()
        gone = backend.when("disconnected")
        agent.transport.abortConnection()
        await gone
        ids.append(backend.send_command("m-1", "late"))
        again = await self.register()
        self.assertEqual([ids[0], ids[2], ids[3]], [(await again.get("command"))["id"] for _ in range(3)])
        await again.round_trip()
        self.assertEqual([], again.inbox)

    async def test_nack(self) -> None:
        """A command nacked for good is forgotten; one nacked with retry_after comes again after it."""
        backend = await self.start()
        agent = await self.register()
        bad, later = backend.send_command("m-1", "bad"), backend.send_command("m-1", "later")
        agent.say(type="nack", id=bad, data={"code": "no", "message": "never"})
        agent.say(type="nack", id=later, data={"code": "busy", "retry_after": 0.05})
        await agent.get("command")
        await agent.get("command")
        self.assertEqual(later, (await agent.get("command"))["id"])
        self.assertEqual("refused", backend.ledger.command(bad).state)
        agent.say(type="nack", id=later, data={"retry_after": 0.05})
        agent.say(type="ack", ids=[later])
        await self.pause(0.1)
        await agent.round_trip()
        self.assertEqual([], agent.inbox)
        agent.say(type="nack", id=later, data={"retry_after": 60})
        await agent.round_trip()

    async def test_refused_results(self) -> None:
        """A result of an unknown command, and one that is malformed, is nacked for good."""
        await self.start()
        agent = await self.register()
        agent.result("unknown")
        self.assertEqual("unknown_command", (await agent.get("nack"))["data"]["code"])
        agent.say(type="command_result", id="r-2", timestamp="", data={"id": "r-2"})
        nack = await agent.get("nack")
        self.assertEqual(("r-2", "bad-fields", None), (nack["id"], nack["data"]["code"], nack["data"]["retry_after"]))
        agent.say(type="command_result", id="r-3", data=1)
        self.assertEqual("r-3", (await agent.get("nack"))["id"])

    async def test_nonsense(self) -> None:
        """What is not understood, comes too early or twice closes nothing."""
        backend = await self.start()
        agent = await self.connect()
        notes: list[str] = []
        backend.subscribe(lambda event: notes.append(f"{event.kind} {event.note}"))
        agent.say(type="ping", id="early")
        agent.say(type="register", machine_id="m-1", id="1", timestamp="", data={})
        agent.say(type="register", machine_id="m-1", id="1", timestamp="", data={})
        agent.sendMessage(b"nonsense")
        agent.sendMessage(b"\x00", isBinary=True)
        agent.say(type="novelty", id="2")
        agent.say(type="pong", id="2")
        await agent.round_trip()
        self.assertEqual(
            ["refused", "registered", "refused", "refused", "refused", "message"], [note.split()[0] for note in notes]
        )

    async def test_second_agent(self) -> None:
        """When a machine registers on another WebSocket the older one is closed with 4409."""
        backend = await self.start()
        older = await self.register()
        newer = await self.register()
        self.assertEqual(4409, (await older.closed)[0])
        backend.send_command("m-1", "ping")
        await newer.get("command")

    async def test_pushes(self) -> None:
        """Goaway and settings go to commsmgr.v1 agents only, other messages to all, or to one machine."""
        backend = await self.start()
        agent, plain = await self.register("m-1"), await self.register("m-2", ())
        self.assertEqual(1, backend.goaway(2, 30))
        self.assertEqual({"reconnect_after": 2, "window": 30}, (await agent.get("goaway"))["data"])
        self.assertEqual(1, backend.push_settings(heartbeat_interval=5))
        self.assertEqual(5, (await agent.get("settings"))["data"]["heartbeat_interval"])
        self.assertEqual(0, backend.goaway(machine_id="m-2"))
        self.assertEqual(2, backend.push({"type": "config_update"}))
        await plain.get("config_update")
        self.assertEqual(1, backend.push(b'{"type":"x"}', "m-2"))
        await plain.get("x")

    async def test_too_large(self) -> None:
        """A message over the limit is answered with close code 1009."""
        backend = await self.start(max_message_bytes=1000)
        agent = await self.register()
        agent.sendMessage(b" " * 1001)
        self.assertEqual(1009, (await agent.closed)[0])
        self.assertEqual("", backend.connected("m-1"))

    async def test_internal_error(self) -> None:
        """When handling a message fails it is logged and the WebSocket closed with 1011."""
        backend = await self.start()
        agent = await self.register()
        self.patch(backend.ledger, "settle", lambda *arguments: 1 / 0)
        agent.say(type="ack", ids=["1"])
        self.assertEqual(1011, (await agent.closed)[0])
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    async def test_close_websocket(self) -> None:
        """A machine's WebSocket can be closed with any code; the others stay."""
        backend = await self.start()
        agent, other = await self.register("m-1"), await self.register("m-2")
        backend.close_websocket("m-1", 1012)
        self.assertEqual(1012, (await agent.closed)[0])
        await other.round_trip()
