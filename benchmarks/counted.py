"""
The work whose instructions :mod:`.guard` counts: all of it in one process, on a virtual clock and network.

Each piece of work does something ``n`` times, commsmgr's next to the bare library's against the same peer, so that
what both have in common, the network among it, is in both counts. Nothing depends on the machine's time or load: what a
spool's thread does is done between two turns of the virtual clock, for threads take turns as the machine likes.

Run under valgrind by ``guard``: ``python -m benchmarks.counted DIRECTORY``. Loading takes most of the time, so it is
done once; each count is a fork of this process, which valgrind counts by itself.
"""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from autobahn.twisted.websocket import (
    WebSocketClientFactory,
    WebSocketClientProtocol,
    WebSocketServerFactory,
    WebSocketServerProtocol,
)
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import Cooperator
from twisted.logger import globalLogBeginner
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.resource import Resource
from twisted.web.server import Site

from commsmgr import config
from commsmgr.manager import Manager
from commsmgr.messages import Command
from commsmgr.spool import RESULT_KIND, Lane, Spool
from commsmgr.spool.executor import InlineExecutor, ThreadExecutor
from tests.simulation.clock import VirtualClock
from tests.simulation.network import Network
from tests.simulation.reactor import ProcessReactor

FEW, MANY = 100, 300
"""How often each piece of work is done in its two counts; what is between them is the cost of the difference."""

WINDOW = 20
"""Commands under way, or events in a batch, at a time."""

PORT = 80
URL = f"http://peer.example:{PORT}"
BODY = b'{"some":"' + b"x" * 500 + b'"}'


class World:
    """A peer and a client process on one clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock(1000.0)
        network = Network(self.clock, Random(1), lambda *what: None)
        self.peer, self.client = (ProcessReactor(self.clock, network, name, Random(2)) for name in ("peer", "client"))
        network.names["peer.example"] = network.address("peer")

    def run_while(self, condition: Callable[[], bool]) -> None:
        """Let time pass; it is a mistake when an hour is not enough, or when something fails."""
        assert self.clock.run_while(condition, 3600.0), "it does not come to its end"
        assert not self.clock.failures, self.clock.failures


class Peer(WebSocketServerProtocol):
    """Registers whoever comes, gives commands, and takes results."""

    factory: Any

    def onConnect(self, request: Any) -> str:
        return "commsmgr.v1"

    def onOpen(self) -> None:
        self.transport.unregisterProducer()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        message = json.loads(payload)
        if message["type"] == "register":
            self._say(type="registration_ack", id=message["id"], data={"machine_id": message["machine_id"]})
            for _ in range(WINDOW):
                self._order()
        elif message["type"] == "command_result":
            self.factory.results += 1
            self._say(type="ack", ids=[message["id"]])
            self._order()

    def _order(self) -> None:
        if self.factory.wanted:
            self.factory.wanted -= 1
            data = {"type": "echo", "command": "x" * 150, "args": ["a", "b"], "timeout": 60}
            self._say(type="command", id=f"c-{self.factory.wanted}", timestamp="2026-01-01T00:00:00Z", data=data)

    def _say(self, **message: Any) -> None:
        self.sendMessage(json.dumps(message).encode())


def _peers(world: World, commands: int) -> Any:
    factory: Any = WebSocketServerFactory(reactor=world.peer)
    factory.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0, autoPingInterval=0)
    factory.protocol = Peer
    factory.wanted, factory.results = commands, 0
    world.peer.listenTCP(PORT, factory)
    return factory


class Bare(WebSocketClientProtocol):
    """
    The least that can answer commands: autobahn and json, nothing checked, nothing kept.

    :param registered: fires when the peer has answered the registration.
    """

    def __init__(self, registered: Deferred[None] | None = None) -> None:
        super().__init__()
        self._registered = registered

    def onOpen(self) -> None:
        self.transport.unregisterProducer()
        self.sendMessage(json.dumps({"type": "register", "id": "r", "machine_id": "m"}).encode())

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        message = json.loads(payload)
        if message["type"] == "command":
            result = {
                "id": "r-" + message["id"],
                "command_id": message["id"],
                "status": "success",
                "output": "y" * 200,
                "error": "",
                "exit_code": 0,
                "execution_time": 1,
                "timestamp": "2026-01-01T00:00:00Z",
            }
            envelope = {"type": "command_result", "id": result["id"], "timestamp": result["timestamp"], "data": result}
            self.sendMessage(json.dumps(envelope).encode())
        elif self._registered is not None:
            self._registered.callback(None)


def _bare_factory(world: World) -> Any:
    factory: Any = WebSocketClientFactory(f"ws://peer.example:{PORT}", protocols=["commsmgr.v1"], reactor=world.client)
    factory.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0, autoPingInterval=0)
    return factory


def websocket_bare(times: int) -> None:
    """Answer commands with autobahn and json alone."""
    world = World()
    peers = _peers(world, times)
    factory = _bare_factory(world)
    factory.protocol = Bare
    TCP4ClientEndpoint(world.client, world.peer.address, PORT).connect(factory)
    world.run_while(lambda: peers.results < times)


def websocket_commsmgr(times: int) -> None:
    """Answer commands with a whole manager: inbox, results, spool in memory, receipts."""
    world = World()
    peers = _peers(world, times)
    manager = _manager(world, websocket=config.WebSocket(max_message_rate=0))
    world.run_while(lambda: peers.results < times or manager.status().queue.events > 0)


def http_treq(times: int) -> None:
    """POST with treq, one request after the other."""
    world = World()
    _site(world)
    client = HTTPClient(Agent(world.client, pool=HTTPConnectionPool(world.client)))

    async def post() -> None:
        headers = {"Authorization": "Bearer token", "Content-Type": "application/json"}
        for _ in range(times):
            # What treq would make of bytes, but on this clock.
            body = FileBodyProducer(BytesIO(BODY), Cooperator(scheduler=lambda step: world.client.callLater(0, step)))
            response = await client.post(URL + "/heartbeat", body, headers=headers, reactor=world.client)
            assert await response.content() == b"{}"

    _wait(world, post())


def http_commsmgr(times: int) -> None:
    """POST with a manager, one request after the other."""
    world = World()
    _site(world)
    manager = _manager(world, websocket=config.WebSocket(enabled=False))

    async def post() -> None:
        for _ in range(times):
            response = await manager.send_http("POST", "/heartbeat", body=BODY)
            assert response.body == b"{}"

    _wait(world, post())


def registration_bare(times: int) -> None:
    """Connect with autobahn and json alone, each time with a connection of its own, and register."""
    world = World()
    _peers(world, 0)
    factory = _bare_factory(world)
    for _ in range(times):
        registered: Deferred[None] = Deferred()
        factory.protocol = lambda registered=registered: Bare(registered)
        TCP4ClientEndpoint(world.client, world.peer.address, PORT).connect(factory)
        world.run_while(lambda registered=registered: not registered.called)


def registration_commsmgr(times: int) -> None:
    """The same with a whole manager each time, its spool in memory."""
    world = World()
    _peers(world, 0)
    managers = []
    for _ in range(times):
        managers.append(_manager(world))
        connected = managers[-1].when_connected()
        world.run_while(lambda connected=connected: not connected.called)


def spool_sqlite(times: int) -> None:
    """Insert events, and delete those of the batch before in the same transaction; each is flushed to a file."""
    with TemporaryDirectory() as directory:
        db = sqlite3.connect(f"{directory}/bare.db", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE entry (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, body BLOB NOT NULL)")
        for first in range(0, times, WINDOW):
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM entry WHERE seq < ?", (first,))
            for number in range(first, first + WINDOW):
                db.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, f"{number:032x}", BODY))
            db.execute("COMMIT")
        db.close()


def spool_commsmgr(times: int) -> None:
    """Put events into a durable spool, take them, and forget them together with the next batch."""
    world = World()
    executor = InlineExecutor(world.client)
    executor.linger = ThreadExecutor.linger

    async def work(directory: str) -> None:
        settings = config.Spool(path=f"{directory}/spool")
        spool = Spool(settings, reactor=world.client, wall=lambda: 1_800_000_000.0, executor=executor)
        await spool.open()
        outbox, reader = spool.outbox, spool.outbox.reader(Lane.EVENT)
        for first in range(0, times, WINDOW):
            for number in range(first, first + WINDOW):
                durable = outbox.put(lane=Lane.EVENT, kind=RESULT_KIND, id=f"{number:032x}", body=BODY)
            await durable  # the last one's is told last
            taken = [entry.seq for entry in reader.take(WINDOW, 1 << 20)]
            assert len(taken) == WINDOW, taken
            outbox.forget(taken)
        await spool.close()

    with TemporaryDirectory() as directory:
        _wait(world, work(directory))


def _manager(world: World, **sections: Any) -> Manager:
    manager = Manager(
        config.Config(
            backends=(config.Backend(url=URL, websocket_url=URL.replace("http", "ws", 1), insecure=True),),
            machine_id="m",
            auth=config.Auth(token="token"),
            heartbeat=config.Heartbeat(interval=0),
            inventory=config.Inventory(interval=0),
            spool=config.Spool(durability="memory"),
            commands=config.Commands(max_rate=0),
            observe=config.Observe(listen=""),
            **sections,
        ),
        reactor=world.client,
        handler=_answer,
        random=Random(3),
        executor=InlineExecutor(world.client),
        wall=lambda: 1_800_000_000.0 + world.clock.seconds(),
        environ={},
    )
    manager.startService()
    return manager


def _answer(command: Command) -> Any:
    return command.success("y" * 200)


class _OK(Resource):
    isLeaf = True

    def render_POST(self, request: Any) -> bytes:
        assert request.content.read() == BODY
        return b"{}"


def _site(world: World) -> None:
    site = Site(_OK(), reactor=world.peer, timeout=None)
    # It would write the time of day into its log.
    site.startFactory = site.stopFactory = lambda: None  # type: ignore[method-assign]
    site._logDateTime = ""
    site.log = lambda request: None  # type: ignore[method-assign]
    world.peer.listenTCP(PORT, site)


def _wait(world: World, work: Any) -> None:
    done: Deferred[None] = Deferred.fromCoroutine(work)
    world.run_while(lambda: not done.called)
    failures: list[Any] = []
    done.addErrback(failures.append)
    assert not failures, failures


WORK: dict[str, Callable[[int], None]] = {
    "websocket/bare": websocket_bare,
    "websocket/commsmgr": websocket_commsmgr,
    "http/bare": http_treq,
    "http/commsmgr": http_commsmgr,
    "registration/bare": registration_bare,
    "registration/commsmgr": registration_commsmgr,
    "spool/bare": spool_sqlite,
    "spool/commsmgr": spool_commsmgr,
}


def main() -> None:
    """Fork once for each count, and leave each child's process id and what it does in a file."""
    directory = Path(sys.argv[1])
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False, discardBuffer=True)
    gc.disable()
    for name, work in WORK.items():
        for times in (FEW, MANY):
            child = os.fork()
            if child == 0:
                work(times)
                # Without whatever Python does at its end.
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if status != 0:
                sys.exit(f"{name} failed")
            (directory / f"{child}.work").write_text(f"{name} {times}")


if __name__ == "__main__":
    main()
