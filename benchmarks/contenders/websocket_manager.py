"""
commsmgr over WebSocket, all of it: managers with their results and commands kept in a spool in memory, and redaction.

What is below it, by itself: :mod:`.websocket_commsmgr`.
"""

from __future__ import annotations

import logging
from typing import Any

from twisted.internet.defer import Deferred

from benchmarks.contenders.websocket_payload import WARMING, counted
from benchmarks.sample import Sample, Watch
from commsmgr import config
from commsmgr.config import Backend, Config
from commsmgr.manager import Manager
from commsmgr.messages import Result


def _manager(port: int, path: str, dialect: str, bound: int, **parts: Any) -> tuple[Any, Manager]:
    from twisted.internet import reactor

    logging.disable()
    settings = Config(
        backends=(Backend(url=f"http://127.0.0.1:{port}", websocket_url=f"ws://127.0.0.1:{port}{path}"),),
        spool=config.Spool(durability="memory", max_events=2 * bound),
        websocket=config.WebSocket(max_message_rate=0, dialect=dialect),
        commands=config.Commands(max_rate=0, max_pending=bound),
        heartbeat=config.Heartbeat(interval=0),
        inventory=config.Inventory(interval=0),
    )
    return reactor, Manager(settings, reactor=reactor, **parts)


def sends(port: int, operations: int) -> Sample:
    """Report results, kept in memory, until each has its receipt by barrier."""
    reactor, manager = _manager(port, "/sink", "plain", operations + WARMING)
    watch, samples = Watch(), []
    output = "o" * 60
    left = operations + WARMING

    def some(_: object = None) -> None:
        nonlocal left
        if left == operations:
            watch.start()
        for _ in range(100):
            manager.send_result(Result(command_id=f"c-{left:08}", output=output)).addErrback(failed)
            left -= 1
        reactor.callLater(0, some if left else drained)

    def drained() -> None:
        if manager.status().queue.events:
            reactor.callLater(0, drained)
            return
        samples.append(watch.stop(operations))
        reactor.stop()

    def failed(failure: Any) -> None:
        samples.append(failure)
        reactor.stop()

    manager.connect().addCallbacks(some, failed)
    reactor.run()
    return _sample(samples)


def takes_pushes(port: int, operations: int) -> Sample:
    """Take messages that are the agent's own, which it is handed at once."""
    samples: list[Any] = []

    def finished(sample: Sample) -> None:
        samples.append(sample)
        reactor.stop()

    path = f"/flood?{operations + WARMING}&config_update"
    reactor, manager = _manager(port, path, "auto", 1000, on_push=counted(operations, finished))
    manager.connect()
    reactor.run()
    return _sample(samples)


def takes_commands(port: int, operations: int) -> Sample:
    """Take commands through the inbox, in memory, acknowledge them, and read them from the channel."""
    samples: list[Any] = []
    reactor, manager = _manager(port, f"/flood?{operations + WARMING}&command", "auto", operations + WARMING)

    def finished(outcome: object) -> None:
        samples.append(outcome)
        reactor.stop()

    async def read() -> None:
        arrived = counted(operations, finished)
        await manager.started()
        async for _ in manager.commands():
            arrived()

    manager.connect()
    Deferred.fromCoroutine(read()).addErrback(finished)
    reactor.run()
    return _sample(samples)


def _sample(samples: list[Any]) -> Sample:
    if not isinstance(samples[0], Sample):
        samples[0].raiseException()
    return samples[0]
