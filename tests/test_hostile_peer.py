"""
A backend that floods an agent, measured from outside: its memory stays flat, and it works on.

Each flood is as fast as the agent reads. Of the processor a share is asserted, which a busy machine only makes smaller.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, repeat
from typing import Any

import msgspec
from autobahn.websocket.compress import PerMessageDeflateOffer, PerMessageDeflateOfferAccept
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.web.resource import Resource
from twisted.web.server import Site

from tests.peer_kit import AGENT, Flood, Peer, PeerTestCase, frame, memory, processor_time
from tests.processes import Program, reactor
from tests.test_hostile_http import ENDLESS

MESSAGE = 1 << 20
"""The agent's limit of a message in these tests."""
GROWTH = 24 << 20
"""Bytes that the agent may grow by: one message and what is made of it, SQLite's cache, some air."""
SHARE = 0.5
"""Share of one processor that the agent may take meanwhile; without limits it takes all of it."""
SERIES = 150
"""Lines of /metrics at most, whatever came; each flood brings thousands of names."""


def json_frames(message: Callable[[int], Any]) -> Iterator[bytes]:
    """Yield blocks of text messages, each of them another one."""
    numbers = count()
    while True:
        yield b"".join(frame(1, msgspec.json.encode(message(next(numbers)))) for _ in range(500))


def long_frame(first: int, payload: bytes) -> bytes:
    """Return a server's frame of more than 64 KiB."""
    return bytes((first, 127)) + len(payload).to_bytes(8, "big") + payload


def bomb(size: int) -> bytes:
    """Return a compressed message of zeros (RFC 7692), about a thousandth as large."""
    packer = zlib.compressobj(wbits=-15)
    data = packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH)
    return data[:-4]


def fragments(data: bytes, size: int) -> bytes:
    """Return a compressed message in frames of a few bytes."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    opening, *others = (bytes((len(piece),)) + piece for piece in pieces)
    return b"\x41" + opening + b"".join(b"\x00" + each for each in others)


def of_every_type(number: int) -> dict[str, Any]:
    """Return a message of any type but a command, with an id, a code, or a name that never came before."""
    name = f"flood-{number}"
    return (
        {"type": "ping", "id": name},
        {"type": "ack", "ids": [name]},
        {"type": "nack", "id": name, "data": {"code": name, "message": name}},
        {"type": "settings", "data": {"heartbeat_interval": (1, 86400)[number // 5 % 2]}},
        {"type": "registration_ack", "data": {"machine_id": name}},
    )[number % 5]


BY_RATE: dict[str, Callable[[], bytes | Iterator[bytes]]] = {
    "smallest frames": lambda: (frame(9) + frame(10) + frame(1) + frame(2) + frame(1, b"{}") + frame(9, b"p")) * 500,
    "pushes": lambda: json_frames(lambda number: {"type": f"flood-{number}", "id": f"flood-{number}"}),
    "commands": lambda: json_frames(lambda number: {"type": "command", "id": f"flood-{number}", "data": {}}),
    "commands that are none": lambda: json_frames(lambda n: {"type": "command", "id": f"flood-{n}", "data": n}),
    "messages of every type": lambda: json_frames(of_every_type),
    "empty fragments": lambda: iter([b"\x01\x00", *[b"\x00\x00" * 1000] * 100_000]),
    "fragments of one byte": lambda: iter([b"\x01\x00", *[b"\x00\x01x" * 1000] * 100_000]),
    "largest messages": lambda: long_frame(0x81, b'"' + b"x" * (MESSAGE - 2) + b'"'),
    "compressed largest messages": lambda: frame(0x41, bomb(MESSAGE)),
}

TOO_LARGE: dict[str, bytes] = {
    "a message too large": long_frame(0x81, b"x" * (MESSAGE + 1)),
    "a compressed bomb": frame(0x41, bomb(50 * MESSAGE)),
    "a compressed bomb in fragments": fragments(bomb(50 * MESSAGE), 100),
}


def accept_deflate(offers: Iterable[object]) -> PerMessageDeflateOfferAccept:
    """Take the offer to compress."""
    return next(PerMessageDeflateOfferAccept(offer) for offer in offers if isinstance(offer, PerMessageDeflateOffer))


class Answers(Resource):
    """The HTTP side of a backend that takes heartbeats."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.heartbeats = 0

    def render_POST(self, request: Any) -> bytes:
        self.heartbeats += request.path == b"/heartbeat"
        request.setHeader("Content-Type", "application/json")
        return b"{}"


UPGRADES = {
    "line": (b"HTTP/1.1 101 ", b"x"),
    "field": (b"HTTP/1.1 101 Switching Protocols\r\n", b"x"),
    "fields": (b"HTTP/1.1 101 Switching Protocols\r\n", b"X: y\r\n"),
    "interim answers": (b"", b"HTTP/1.1 103 Early\r\n\r\n"),
    "no HTTP": (b"", b"x"),
}


class Endless(Protocol):
    """Answers each request with something that has no end, something else each time, until it is told to be good."""

    factory: EndlessFactory

    def connectionMade(self) -> None:
        self._received = b""

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        if b"\r\n\r\n" not in self._received:
            return
        is_upgrade = self._received.startswith(b"GET /ws")
        self._received = b""
        if self.factory.is_good:
            status = b"404 Not Found" if is_upgrade else b"200 OK"
            self.transport.write(b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\n{}" % status)
            return
        kinds, answered = (UPGRADES, self.factory.upgrades) if is_upgrade else (ENDLESS, self.factory.answers)
        name = list(kinds)[len(answered) % len(kinds)]
        answered.append(name)
        first, piece = kinds[name]
        block = piece * max(60_000 // len(piece), 1)
        Flood(self.transport, chain([first] if first else [], repeat(block)), 1 << 30)


class EndlessFactory(ServerFactory):
    """Such a backend."""

    protocol = Endless
    noisy = False

    def __init__(self) -> None:
        self.is_good = False
        self.answers: list[str] = []
        self.upgrades: list[str] = []


class HostilePeer(PeerTestCase):
    """A peer that never has enough."""

    timeout = 120

    async def series(self, agent: Program) -> set[str]:
        """Return what Prometheus would read, without the values; the agent's page answers, then, too."""
        site = (await agent.line(r"status page is at (http\S+)"))[1]
        status, text = await self.fetch(f"{site}metrics")
        self.assertEqual(status, 200)
        return {line.rpartition(" ")[0] for line in text.decode().splitlines() if not line.startswith("#")}

    async def test_floods(self) -> None:
        """One flood after the other, each from the next connection on; then the agent does what it is there for."""
        floods: dict[str, Callable[[], bytes | Iterable[bytes]]] = {
            **BY_RATE,
            **{name: lambda block=block: [block] for name, block in TOO_LARGE.items()},  # type: ignore[misc]
        }
        names = list(floods)
        connections: list[Peer] = []

        def script(peer: Peer) -> None:
            connections.append(peer)
            if len(connections) <= len(names):
                peer.flood = Flood(peer.transport, floods[names[len(connections) - 1]](), 1 << 30)  # type: ignore[attr-defined]

        answers = Answers()
        http = reactor.listenTCP(0, Site(answers), interface="127.0.0.1")
        self.addCleanup(http.stopListening)
        peers, agent = await self.start_agent(
            script,
            http=f"http://127.0.0.1:{http.getHost().port}",
            result=10,
            log="info",
            auth={"refused_delay": 1},
            heartbeat={"interval": 0.3, "jitter": 0.1},
            observe={"listen": "127.0.0.1:0"},
            spool={"durability": "normal"},
            websocket={"max_message_rate": 1000, "max_message_bytes": MESSAGE, "compress": True},
            commands={"max_rate": 100},
        )
        peers.setProtocolOptions(perMessageCompressionAccept=accept_deflate)
        await self.until(lambda: connections, agent)
        before, busy, began = memory(agent), processor_time(agent), time.monotonic()
        for number, name in enumerate(names):

            def is_over(number: int = number) -> bool:
                return len(connections) > number + 1

            most = await self.until(is_over, agent)
            self.assertLess(most - before, GROWTH, name)
        share = (processor_time(agent) - busy) / (time.monotonic() - began)
        self.assertLess(share, SHARE)
        series = await self.series(agent)
        self.assertLess(len(series), SERIES, series)
        self.assertFalse([line for line in series if "flood" in line])
        self.assertEqual(peers.codes.count(1008), len(BY_RATE))
        self.assertEqual(peers.codes.count(1009), len(TOO_LARGE))
        beats = answers.heartbeats
        last = connections[-1]
        last.order(range(3))
        await self.until(lambda: {"c-0", "c-1", "c-2"} <= {command for _, command in peers.results}, agent)
        await self.until(lambda: answers.heartbeats > beats + 1, agent)

    async def test_more_at_once_than_is_taken(self) -> None:
        """A backend that means no harm sends all it has again at each connection: each time there is less of it."""
        wanted = {f"c-{number}" for number in range(1000)}

        def script(peer: Peer) -> None:
            peer.order_again(sorted(wanted - peer.factory.acked))

        peers, agent = await self.start_agent(
            script, result=10, log="info", auth={"refused_delay": 2}, websocket={"max_message_rate": 100}
        )
        await self.until(lambda: peers.acked == wanted, agent)
        await self.until(lambda: {command for _, command in peers.results} == wanted, agent)
        self.assertIn(1008, peers.codes)

    async def test_answers_without_end(self) -> None:
        """Answers and upgrades that never end, each another way; when the backend is good again, heartbeats go on."""
        backend = EndlessFactory()
        port = reactor.listenTCP(0, backend, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        configuration = self.configuration(
            f"http://127.0.0.1:{port.getHost().port}",
            http={"max_response_bytes": MESSAGE, "timeout": 5.0},
            reconnect={"base": 0.5, "cap": 0.5},
        )
        agent = self.python(AGENT, configuration, "10", "info")
        await self.until(lambda: backend.answers and backend.upgrades, agent)
        before, busy, began = memory(agent), processor_time(agent), time.monotonic()

        def all_were_met() -> bool:
            return len(backend.answers) > len(ENDLESS) and len(backend.upgrades) > len(UPGRADES)

        most = await self.until(all_were_met, agent)
        self.assertLess(most - before, GROWTH)
        self.assertLess((processor_time(agent) - busy) / (time.monotonic() - began), SHARE)
        await self.series(agent)
        self.assertNotIn("heartbeat.answered", agent.text)
        backend.is_good = True
        await agent.line("heartbeat.answered")
