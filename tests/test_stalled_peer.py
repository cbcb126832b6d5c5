"""A backend that stops reading, and one that makes the agent write and does not read: its memory stays flat."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from tests.processes import ProcessTestCase, Program, pause, reactor

AGENT = Path(__file__).with_name("stalled_agent.py")
RESULT = 20_000
"""Bytes of each result."""
COMMANDS = 3200
SPOOL = 50_000_000
"""Bytes that the spool takes: less than all results have."""
GROWTH = 24 << 20
"""Bytes that the agent may grow by: the window, what is read ahead, SQLite's cache and its log, and some air."""
FLOOD = 18 << 20
"""Bytes of questions from a peer that does not read the answers."""


class Peer(WebSocketServerProtocol):
    """One connection of the agent's; what it does is the factory's ``script``."""

    factory: Peers
    closed = False

    def onConnect(self, request: Any) -> str | None:
        return "commsmgr.v1" if "commsmgr.v1" in request.protocols else None

    def onOpen(self) -> None:
        self.transport.unregisterProducer()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        message = msgspec.json.decode(payload)
        if message["type"] == "register":
            self.say(type="registration_ack", id=message["id"], data={"machine_id": message["machine_id"]})
            self.factory.script(self)
        elif message["type"] == "command_result":
            self.factory.results.append((message["id"], message["data"]["command_id"]))
            if self.factory.receipts:
                self.say(type="ack", ids=[message["id"]])
        elif message["type"] == "nack":
            self.factory.refused[message["id"]] = message["data"]

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        self.closed = True

    def onPong(self, payload: bytes) -> None:
        self.factory.pongs.append(payload)

    def say(self, **message: Any) -> None:
        """Send a message."""
        self.sendMessage(msgspec.json.encode(message))

    def stall(self) -> None:
        """Read no more."""
        self.transport.pauseProducing()

    def order(self, numbers: range) -> None:
        """Give commands."""
        self.order_again(f"c-{number}" for number in numbers)

    def order_again(self, ids: Iterable[str]) -> None:
        """Give commands by their ids."""
        for each in ids:
            self.say(type="command", id=each, data={"type": "say"})


class Peers(WebSocketServerFactory):
    """Takes the agent's connections."""

    protocol = Peer
    noisy = False

    def __init__(self, script: Callable[[Peer], None]) -> None:
        super().__init__(reactor=reactor)
        self.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0, autoPingInterval=0)
        self.script = script
        self.results: list[tuple[str, str]] = []
        self.refused: dict[str, dict[str, Any]] = {}
        self.receipts = True
        self.pongs: list[bytes] = []


@implementer(IPushProducer)
class Flood:
    """Writes one block again and again, as fast as the agent reads."""

    def __init__(self, transport: Any, block: bytes, size: int) -> None:
        self._transport, self._block, self._left = transport, block, size
        self._paused = False
        self.done: Deferred[None] = Deferred()
        transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        """There is room."""
        self._paused = False
        while self._left > 0 and not self._paused:
            self._left -= len(self._block)
            self._transport.write(self._block)
        if self._left <= 0 and not self.done.called:
            self._transport.unregisterProducer()
            self.done.callback(None)

    def pauseProducing(self) -> None:
        """There is none."""
        self._paused = True

    def stopProducing(self) -> None:
        """The connection is lost."""
        self._left = 0


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a server's frame."""
    size = bytes((len(payload),)) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
    return bytes((0x80 | opcode,)) + size + payload


def memory(agent: Program) -> int:
    """Return the bytes that a process has in memory."""
    status = Path(f"/proc/{agent.transport.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


class StalledPeer(ProcessTestCase):
    """A real agent process and a peer in this one."""

    async def start_agent(self, script: Callable[[Peer], None], **sections: Any) -> tuple[Peers, Program]:
        """Listen, and start an agent."""
        peers = Peers(script)
        port = reactor.listenTCP(0, peers, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        # Connections inherit it: what is not read stays with the agent.
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # What a flood does without any limit of its speed: what bounds memory then is what is tested here.
        sections["websocket"] = {"max_message_rate": 0} | sections.get("websocket", {})
        config = self.configuration(
            f"http://127.0.0.1:{port.getHost().port}",
            heartbeat={"interval": 0},
            observe={"listen": ""},
            **sections,
        )
        return peers, self.python(AGENT, config, str(RESULT))

    async def until(self, condition: Callable[[], object], agent: Program) -> int:
        """Wait; return the most memory that the agent had meanwhile."""
        most = 0
        while not condition():
            self.assertIsNone(agent.code, agent.text)
            most = max(most, memory(agent))
            await pause(0.02)
        return most

    async def test_stops_reading(self) -> None:
        """Results go to the spool until it is full; the silence is noticed; the next connection gets all, in order."""
        connections: list[Peer] = []
        at_first: list[int] = []

        def script(peer: Peer) -> None:
            connections.append(peer)
            # Of what it has read no receipt, a backend sends all again.
            peer.order(range(COMMANDS))
            if len(connections) == 1:
                at_first.append(memory(agent))
                peer.stall()

        peers, agent = await self.start_agent(
            script,
            spool={"durability": "normal", "max_bytes": SPOOL},
            websocket={"receipt_timeout": 3},
            commands={"max_pending": 10_000},
        )
        # Before it has become another program, the new process is as large as this one.
        await self.until(lambda: connections, agent)
        most = await self.until(lambda: "command.result-waits" in agent.text, agent)
        most = max(most, await self.until(lambda: len(connections) > 1, agent))
        self.assertLess(most - at_first[0], GROWTH)
        answered = peers.results
        await self.until(lambda: len({command for _, command in answered} | peers.refused.keys()) == COMMANDS, agent)
        ids = list(dict.fromkeys(result for result, _ in answered))
        self.assertEqual(sorted(ids), ids)
        self.assertEqual(len(ids), len({command for _, command in answered}))

    async def test_near_the_bound(self) -> None:
        """When the results without receipt near the bound, commands are refused for a time; with receipts all go."""
        connections: list[Peer] = []
        peers, agent = await self.start_agent(connections.append, spool={"max_events": 10})
        peers.receipts = False
        await self.until(lambda: connections, agent)
        (peer,) = connections

        def dealt_with() -> bool:
            return len({command for _, command in peers.results} | peers.refused.keys()) == 40

        peer.order(range(40))
        await self.until(dealt_with, agent)
        self.assertEqual(8, len(peers.results))
        for refusal in peers.refused.values():
            self.assertEqual(("busy", 5.0), (refusal["code"], refusal["retry_after"]))
        peers.receipts = True
        peer.say(type="ack", ids=[result for result, _ in peers.results])
        while peers.refused:
            again, peers.refused = peers.refused, {}
            peer.order_again(again)
            await self.until(dealt_with, agent)
        self.assertEqual(40, len(peers.results))

    async def flood(self, block: bytes, growth: int = 8 << 20) -> tuple[Peers, Program, list[Peer]]:
        """Let a peer that does not read write ``block`` again and again; the agent's memory must stay flat."""
        registered: list[Peer] = []  # the agent's connections, in order
        peers, agent = await self.start_agent(registered.append)
        await self.until(lambda: registered, agent)
        before = memory(agent)
        (peer,) = registered
        peer.stall()
        flood = Flood(peer.transport, block, FLOOD)
        most = await self.until(lambda: flood.done.called or peer.closed, agent)
        self.assertLess(most - before, growth)
        return peers, agent, registered

    async def ends(self, *messages: dict[str, Any]) -> None:
        """Let a peer that does not read send ``messages`` again and again; its link ends, and the next one is good."""
        block = b"".join(frame(1, msgspec.json.encode(each)) for each in messages)
        # What the agent has read ahead for the inbox comes on top.
        peers, agent, connections = await self.flood(block, growth=14 << 20)
        self.assertTrue(connections[0].closed)
        await self.until(lambda: len(connections) > 1, agent)
        connections[1].order(range(1))
        await self.until(lambda: "c-0" in {command for _, command in peers.results}, agent)

    def test_questions(self) -> Any:
        """A flood of questions whose answers are not read."""
        return Deferred.fromCoroutine(self.ends(*[{"type": "ping", "id": "p" * 200}] * 100))

    def test_commands(self) -> Any:
        """A flood of commands, many of them known already, whose receipts are not read."""
        commands = [{"type": "command", "id": f"{number:0200}", "data": {"type": "say"}} for number in range(10)]
        return Deferred.fromCoroutine(self.ends(*commands))

    def test_impossible_commands(self) -> Any:
        """A flood of commands that cannot be taken, whose refusals are not read."""
        return Deferred.fromCoroutine(self.ends(*[{"type": "command", "id": "i" * 200, "data": 5}] * 100))

    async def test_pings(self) -> None:
        """A flood of pings whose pongs are not read; the last one is answered all the same."""
        peers, _, (peer,) = await self.flood(frame(9, b"p" * 125) * 100)
        peer.transport.write(frame(9, b"the last one"))
        peer.transport.resumeProducing()
        while b"the last one" not in peers.pongs:
            await pause(0.02)
        self.assertLess(len(peers.pongs), 5000)
