"""A backend that stops reading, and one that makes the agent write and does not read: its memory stays flat."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.defer import Deferred

from tests.peer_kit import Flood, Peer, Peers, PeerTestCase, frame, memory
from tests.processes import Program, pause

COMMANDS = 3200
SPOOL = 50_000_000
"""Bytes that the spool takes: less than all results have."""
GROWTH = 24 << 20
"""Bytes that the agent may grow by: the window, what is read ahead, SQLite's cache and its log, and some air."""
FLOOD = 18 << 20
"""Bytes of questions from a peer that does not read the answers."""


class StalledPeer(PeerTestCase):
    """A peer that does not read."""

    async def test_stops_reading(self) -> None:
        """Results go to the spool until it is full; the silence is noticed; the next connection gets all, in order."""
        connections: list[Peer] = []
        at_first: list[int] = []
        reading: list[Peer] = []

        def script(peer: Peer) -> None:
            connections.append(peer)
            # Of what it has read no receipt, a backend sends all again.
            peer.order(range(COMMANDS))
            if len(connections) == 1:
                at_first.append(memory(agent))
            # The silence may be noticed before a slow machine has filled the spool; then the next one is silent too.
            if "command.result-waits" in agent.text:
                reading.append(peer)
            else:
                peer.stall()

        peers, agent = await self.start_agent(
            script,
            spool={"durability": "normal", "max_bytes": SPOOL},
            websocket={"receipt_timeout": 3, "max_message_rate": 0},
            commands={"max_pending": 10_000},
        )
        # Before it has become another program, the new process is as large as this one.
        await self.until(lambda: connections, agent)
        most = await self.until(lambda: "command.result-waits" in agent.text, agent)
        most = max(most, await self.until(lambda: reading, agent))
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
        # What bounds memory without any limit of the flood's speed is what is tested here.
        peers, agent = await self.start_agent(registered.append, websocket={"max_message_rate": 0})
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
