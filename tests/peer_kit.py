"""What tests of whole agents against a bad peer share: the peer, floods, and how much an agent's process takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from itertools import repeat
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
        elif message["type"] == "ack":
            self.factory.acked.update(message["ids"])
        elif message["type"] == "nack":
            self.factory.refused[message["id"]] = message["data"]

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        self.closed = True
        self.factory.codes.append(self.remoteCloseCode)

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
        self.acked: set[str] = set()
        self.refused: dict[str, dict[str, Any]] = {}
        self.receipts = True
        self.pongs: list[bytes] = []
        self.codes: list[int | None] = []


@implementer(IPushProducer)
class Flood:
    """
    Writes as fast as the agent reads.

    :param blocks: what to write; a single one again and again.
    :param size: bytes after which it has an end.
    """

    def __init__(self, transport: Any, blocks: bytes | Iterable[bytes], size: int) -> None:
        self._transport, self._left = transport, size
        self._blocks = repeat(blocks) if isinstance(blocks, bytes) else iter(blocks)
        self._paused = False
        self.done: Deferred[None] = Deferred()
        transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        """There is room."""
        self._paused = False
        while self._left > 0 and not self._paused:
            block = next(self._blocks, b"")
            self._left = self._left - len(block) if block else 0
            self._transport.write(block)
        if self._left <= 0 and not self.done.called:
            self._transport.unregisterProducer()
            self.done.callback(None)

    def pauseProducing(self) -> None:
        """There is none."""
        self._paused = True

    def stopProducing(self) -> None:
        """The connection is lost."""
        self._left = 0


def frame(opcode: int, payload: bytes = b"") -> bytes:
    """Return a server's frame."""
    size = bytes((len(payload),)) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
    return bytes((0x80 | opcode,)) + size + payload


def memory(agent: Program) -> int:
    """Return the bytes that a process has in memory."""
    status = Path(f"/proc/{agent.transport.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def processor_time(agent: Program) -> float:
    """Return the seconds that a process has kept a processor busy (proc(5): utime and stime)."""
    fields = Path(f"/proc/{agent.transport.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class PeerTestCase(ProcessTestCase):
    """A real agent process and a peer in this one."""

    async def start_agent(
        self,
        script: Callable[[Peer], None],
        *,
        http: str = "",
        result: int = RESULT,
        log: str = "warn",
        **sections: Any,
    ) -> tuple[Peers, Program]:
        """
        Listen, and start an agent.

        :param http: URL of the backend's HTTP side, which this peer has not.
        :param result: bytes of each result.
        :param log: the least of the lines that it writes.
        """
        peers = Peers(script)
        port = reactor.listenTCP(0, peers, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        # Connections inherit it: what is not read stays with the agent.
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"http://127.0.0.1:{port.getHost().port}"
        sections = {"heartbeat": {"interval": 0}, "observe": {"listen": ""}} | sections
        if http:
            websocket_url = url.replace("http", "ws", 1) + "/ws"
            sections["[backends]"] = {"url": http, "websocket_url": websocket_url, "name": "main"}
        return peers, self.python(AGENT, self.configuration(url, **sections), str(result), log)

    async def until(self, condition: Callable[[], object], agent: Program) -> int:
        """Wait; return the most memory that the agent had meanwhile."""
        most = 0
        while not condition():
            self.assertIsNone(agent.code, agent.text)
            most = max(most, memory(agent))
            await pause(0.02)
        return most
