"""
Many agents in one process: each connects, registers with a backend, is idle, and answers a command.

commsmgr is whole managers by the public API. The others are connections of bare libraries with as much on them as that
takes: no spool, no session, no reconnecting, no limits, no metrics.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from itertools import cycle
from typing import Any
from urllib.request import urlopen

import msgspec

from benchmarks.sample import Sample, Watch, resident

AT_ONCE = 100
"""How many are on their way at the same time: all at once would measure the queue of the listening socket."""

LONGEST = 60.0
"""Seconds for the results of the commands."""

SUBPROTOCOL = "commsmgr.v1"


class Fleet:
    """
    Takes the sample of a fleet.

    :param addresses: the backend's, as host and port; agents are spread over them.
    """

    def __init__(self, count: int, addresses: Sequence[str]) -> None:
        self.count = count
        self.addresses = addresses
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most < count + 100:
            raise RuntimeError(f"the process may open {most} files, too few for {count} connections")

    async def run(
        self,
        register: Callable[[int, str], Awaitable[object]],
        each: Callable[[Callable[[], Coroutine[Any, Any, None]]], Awaitable[object]],
        pause: Callable[[], Awaitable[object]],
    ) -> Sample:
        """
        Register all, measure, and see by a command that all of them are what they should be.

        :param register: registers the agent of a number at an address.
        :param each: runs a coroutine function :data:`AT_ONCE` times side by side.
        :param pause: waits a little.
        """
        # The first one loads what is loaded when it is needed.
        await register(self.count, self.addresses[0])
        numbers, places = iter(range(self.count)), cycle(self.addresses)

        async def registering() -> None:
            for number in numbers:
                await register(number, next(places))

        # Agents are many objects that live as long as the process, and need not be looked through again and again. Who
        # runs thousands of anything in Python sets this first; here it is set for all contenders.
        gc.set_threshold(20_000, 50, 100)
        gc.collect()
        before, watch = resident(), Watch()
        watch.start()
        await each(registering)
        sample = watch.stop(self.count)
        gc.collect()
        memory = resident() - before
        earlier, began = self._ask("results"), time.process_time()
        sent = self._ask("commands")
        ends = time.monotonic() + LONGEST
        while (answered := self._ask("results") - earlier) < sent:
            if time.monotonic() > ends:
                raise RuntimeError(f"of {sent} commands {answered} have a result after {LONGEST:g} s")
            await pause()
        if sent < (self.count + 1) // 10:
            raise RuntimeError(f"{sent} agents were there to take a command")
        return msgspec.structs.replace(
            sample,
            extra={
                "bytes_each": memory / self.count,
                "registered_per_CPU_second": self.count / sample.cpu,
                "us_CPU_per_command": (time.process_time() - began) / sent * 1e6,
            },
        )

    def _ask(self, what: str) -> int:
        with urlopen(f"http://{self.addresses[0]}/{what}", timeout=30) as answer:
            return int(answer.read())


def commsmgr(count: int, addresses: Sequence[str]) -> Sample:
    """Run managers with spools in memory. As in a simulator no heartbeats and inventories are sent by themselves."""
    from twisted.internet import reactor

    from commsmgr import Command, Manager, Result, config

    managers = []

    def handle(command: Command) -> Result:
        return command.success("done")

    def register(number: int, address: str) -> Awaitable[object]:
        settings = config.Config(
            backends=(config.Backend(url=f"http://{address}", websocket_url=f"ws://{address}/ws"),),
            machine_id=f"machine-{number}",
            auth=config.Auth(token="token-of-the-fleet"),
            spool=config.Spool(durability="memory"),
            heartbeat=config.Heartbeat(interval=0),
            inventory=config.Inventory(interval=0),
        )
        managers.append(manager := Manager(settings, reactor=reactor, handler=handle))
        return manager.connect()

    return _run_twisted(Fleet(count, addresses), register)


def autobahn(count: int, addresses: Sequence[str]) -> Sample:
    """Run connections of autobahn, one factory for each address."""
    from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
    from twisted.internet import reactor
    from twisted.internet.defer import Deferred
    from twisted.internet.endpoints import TCP4ClientEndpoint

    connections = []

    class Agent(WebSocketClientProtocol):
        def onOpen(self) -> None:
            self.sendMessage(_registration(self.number))

        def onMessage(self, payload: bytes, isBinary: bool) -> None:
            if (answer := _answer(payload)) is not None:
                self.sendMessage(answer)
            elif not self.registered.called:
                self.registered.callback(None)

    def made(address: str) -> Any:
        factory = WebSocketClientFactory(f"ws://{address}/ws", protocols=[SUBPROTOCOL], reactor=reactor)
        factory.protocol, factory.noisy = Agent, False
        host, port = address.split(":")
        return TCP4ClientEndpoint(reactor, host, int(port)), factory

    made_once = {address: made(address) for address in addresses}

    async def register(number: int, address: str) -> None:
        endpoint, factory = made_once[address]
        connections.append(agent := await endpoint.connect(factory))
        agent.number, agent.registered = number, Deferred()
        await agent.registered

    return _run_twisted(Fleet(count, addresses), register)


def aiohttp(count: int, addresses: Sequence[str]) -> Sample:
    """Run WebSockets of one aiohttp session, with a task that reads for each."""
    from aiohttp import ClientSession, ClientWebSocketResponse, TCPConnector

    readers = []

    async def read(socket: ClientWebSocketResponse) -> None:
        async for message in socket:
            if (answer := _answer(message.data)) is not None:
                await socket.send_str(answer.decode())

    async def main() -> Sample:
        async with ClientSession(connector=TCPConnector(limit=0)) as session:

            async def register(number: int, address: str) -> None:
                socket = await session.ws_connect(f"ws://{address}/ws", protocols=[SUBPROTOCOL])
                await socket.send_str(_registration(number).decode())
                await socket.receive_str()
                readers.append(asyncio.ensure_future(read(socket)))

            def each(function: Callable[[], Coroutine[Any, Any, None]]) -> Awaitable[object]:
                return asyncio.gather(*(function() for _ in range(AT_ONCE)))

            sample = await Fleet(count, addresses).run(register, each, lambda: asyncio.sleep(0.02))
            for reader in readers:
                reader.cancel()
            return sample

    return asyncio.run(main())


def _run_twisted(fleet: Fleet, register: Callable[[int, str], Awaitable[object]]) -> Sample:
    """Run a fleet on the global reactor, and leave it as it is: the end of thousands of them is not measured."""
    from twisted.internet import reactor
    from twisted.internet.defer import Deferred, gatherResults
    from twisted.internet.task import deferLater
    from twisted.logger import (
        FilteringLogObserver,
        LogLevel,
        LogLevelFilterPredicate,
        globalLogBeginner,
        textFileLogObserver,
    )

    outcome: list[Any] = []
    # Until somebody begins to log, Twisted keeps what is logged.
    warnings = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.warn)])
    globalLogBeginner.beginLoggingTo([warnings], redirectStandardIO=False)

    def each(function: Callable[[], Coroutine[Any, Any, None]]) -> Awaitable[object]:
        return gatherResults([Deferred.fromCoroutine(function()) for _ in range(AT_ONCE)])

    def over(result: Any) -> None:
        outcome.append(result)
        reactor.crash()
        # What looks names up.
        reactor.getThreadPool().stop()

    def begin() -> None:
        Deferred.fromCoroutine(fleet.run(register, each, lambda: deferLater(reactor, 0.02))).addBoth(over)

    reactor.callWhenRunning(begin)
    reactor.run()
    if not isinstance(outcome[0], Sample):
        outcome[0].raiseException()
    return outcome[0]


def _registration(number: int) -> bytes:
    return msgspec.json.encode(
        {
            "type": "register",
            "machine_id": f"machine-{number}",
            "id": f"registration-{number}",
            "timestamp": "2026-01-01T00:00:00Z",
            "data": {"hostname": "host", "agent_version": "1"},
        }
    )


def _answer(payload: bytes | str) -> bytes | None:
    """Return what to answer: to a command its result, to all else nothing."""
    message = msgspec.json.decode(payload)
    if message["type"] != "command":
        return None
    return msgspec.json.encode(
        {
            "type": "command_result",
            "id": "result-of-" + message["id"],
            "timestamp": "2026-01-01T00:00:00Z",
            "data": {"command_id": message["id"], "status": "success", "output": "done", "exit_code": 0},
        }
    )
