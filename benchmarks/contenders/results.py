"""
Results that are sent until the other side has said that it has them, a number of them at a time.

Each contender sends results of the same size. A new one is sent as soon as there are fewer than ``window`` of them
without a receipt. None but commsmgr keeps them on disk at the client.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from benchmarks.contenders.growing import Grow, grown
from benchmarks.sample import Sample, Watch

OUTPUT = "/srv: 12 files, 0 errors"
"""With what stands around it, a result's body then has 230 bytes."""

LARGEST = 10_000_000
"""Bytes of the largest output."""

_encode = msgspec.json.Encoder().encode
_ids = (f"0190163d-8694-739b-aea5-{number:012x}" for number in count())


def body(output: str = OUTPUT) -> dict[str, Any]:
    """Return a result as an agent without commsmgr would write it, with the id that makes it known."""
    return {
        "id": next(_ids),
        "command_id": "nightly-backup",
        "status": "success",
        "output": output,
        "error": "",
        "exit_code": 0,
        "execution_time": 12,
        "execution_time_ms": 12,
        "timestamp": "2026-01-01T00:00:00.000Z",
    }


class Loop:
    """
    Sends, and learns of receipts.

    :param send: sends one.
    :param done: called when all have their receipts.
    """

    def __init__(self, window: int, send: Any, done: Any) -> None:
        self._window, self._send, self._done = window, send, done
        self.watch = Watch()

    def start(self, operations: int) -> None:
        """Begin to send so many."""
        self._unsent = self._left = operations
        self._outstanding = 0
        self.watch.start()
        self._fill()

    def receipts(self, number: int = 1) -> None:
        """As many have been receipted."""
        self._left -= number
        self._outstanding -= number
        if self._left > 0:
            self._fill()
        elif self._left == 0:
            self._done()

    def _fill(self) -> None:
        more = min(self._window - self._outstanding, self._unsent)
        self._outstanding += more
        self._unsent -= more
        for _ in range(more):
            self._send()


class Awaited(Loop):
    """
    The same where Twisted's reactor runs.

    :param send: sends one with the output that it is given.
    :param idle: returns what is waited for at the end, on top.
    """

    def __init__(self, window: int, send: Any, idle: Any = None) -> None:
        super().__init__(window, lambda: send(self._output), lambda: self.finished.callback(None))
        self._idle = idle

    async def run(self, operations: int, size: int, window: int, warm: int = 0, traced: bool = False) -> Sample:
        """
        Send so many, and wait for their receipts.

        :param size: that of an output.
        :param warm: results before those that count.
        :param traced: whether to count, instead of the time, the bytes of memory beyond an output, by its size.
        """
        from twisted.internet.defer import Deferred

        self._output, self._window = (OUTPUT * (size // len(OUTPUT) + 1))[:size], window
        for number in (warm, operations) if warm else (operations,):
            self.finished: Deferred[None] = Deferred()
            if traced and number == operations:
                tracemalloc.start()
            self.start(number)
            await self.finished
            if self._idle is not None:
                await self._idle()
        sample = self.watch.stop(operations, copies=tracemalloc.get_traced_memory()[1] / size)
        tracemalloc.stop()
        return sample


def commsmgr(
    operations: int,
    window: int,
    durability: str,
    port: int,
    size: int = len(OUTPUT),
    warm: int = 0,
    backends: int = 1,
    grow: Grow | None = None,
) -> Sample:
    """
    Send by a whole manager, until every result is receipted and out of the spool.

    The results belong to no command that was received, as those of an agent's own schedule: what is measured is the way
    out, as with the others.

    :param size: bytes of an output.
    :param warm: results before those that count.
    :param backends: how many are configured; the first of them is the one that works.
    :param grow: see :func:`.growing.grown`.
    """
    from twisted.internet.task import deferLater

    from benchmarks.on_reactor import on_reactor
    from commsmgr import Config, Manager, Result
    from commsmgr.config import Backend, Delivery, Heartbeat, Inventory, Spool

    given = {"operations": operations, "window": window, "size": size, "warm": warm}
    others = (Backend(url=f"http://127.0.0.1:{number}/", name=f"spare-{number}") for number in range(1, backends))

    async def run(reactor: Any) -> Sample:
        config = Config(
            backends=(Backend(url=f"http://127.0.0.1:{port}"), *others),
            machine_id="bench",
            # The server takes nothing over HTTP.
            heartbeat=Heartbeat(interval=0),
            inventory=Inventory(interval=0),
            spool=Spool(path="spool", durability=durability),  # type: ignore[arg-type]
            delivery=Delivery(max_output_bytes=LARGEST),
        )
        manager = Manager(config, reactor=reactor)
        await manager.connect()

        def send(output: str) -> None:
            result = Result(command_id="nightly-backup", output=output, execution_time=0.012)
            manager.send_result(result).addErrback(failed)

        def failed(failure: Any) -> None:
            if not loop.finished.called:
                loop.finished.errback(failure)

        # A receipt has no public sign of its own, for an agent has nothing to do with it; status() tells how many
        # results are held, but is no event. So this listens where the manager hears of receipts.
        delivery = manager._run.delivery  # type: ignore[union-attr]
        receipts = delivery.receipts

        def receipted(link: Any, seqs: Sequence[int]) -> None:
            receipts(link, seqs)
            loop.receipts(len(seqs))

        delivery.receipts = receipted  # type: ignore[method-assign]

        async def idle() -> None:
            while manager.status().queue.events:
                await deferLater(reactor, 0.002)

        loop = Awaited(window, send, idle)
        sample = await grown(loop.run, given, grow)
        await manager.disconnect()
        return sample

    return on_reactor(run)


def autobahn(operations: int, window: int, port: int, size: int, warm: int = 0, grow: Grow | None = None) -> Sample:
    """Send by autobahn alone, in the same envelope; nothing is kept, checked or redacted."""
    from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
    from twisted.internet.defer import Deferred
    from twisted.internet.endpoints import TCP4ClientEndpoint

    from benchmarks.on_reactor import on_reactor

    given = {"operations": operations, "window": window, "size": size, "warm": warm}

    async def run(reactor: Any) -> Sample:
        class Client(WebSocketClientProtocol):  # type: ignore[misc]  # autobahn has no types
            def onOpen(self) -> None:
                opened.callback(None)

            def onMessage(self, payload: bytes, isBinary: bool) -> None:
                loop.receipts(len(msgspec.json.decode(payload)["ids"]))

        def send(output: str) -> None:
            data = body(output)
            envelope = {"type": "command_result", "id": data["id"], "timestamp": data["timestamp"], "data": data}
            client.sendMessage(_encode(envelope))

        opened: Deferred[None] = Deferred()
        factory = WebSocketClientFactory(f"ws://127.0.0.1:{port}", protocols=["commsmgr.v1"], reactor=reactor)
        factory.protocol = Client
        client = await TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(factory)
        await opened
        loop = Awaited(window, send)
        return await grown(loop.run, given, grow)

    return on_reactor(run)


def paho(operations: int, window: int, port: int) -> Sample:
    """Publish with QoS 1, from the callback that tells of the acknowledgement: the thread that reads also sends."""
    from paho.mqtt import client as mqtt

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.max_inflight_messages_set(window)

    def send() -> None:
        client.publish("results", _encode(body()), qos=1)

    loop = Loop(window, send, client.disconnect)
    client.on_connect = lambda *_: loop.start(operations)
    client.on_publish = lambda *_: loop.receipts()
    client.connect("127.0.0.1", port)
    client.loop_forever()
    return loop.watch.stop(operations)


def nats(operations: int, window: int, port: int) -> Sample:
    """Publish to a stream that is kept in files, by as many tasks as may be without an acknowledgement."""
    import nats as nats_py

    async def run() -> Sample:
        client = await nats_py.connect(f"nats://127.0.0.1:{port}")
        stream = client.jetstream()
        await stream.add_stream(name="RESULTS", subjects=["results"], max_msgs=100_000)
        unsent = operations

        async def sender() -> None:
            nonlocal unsent
            while unsent:
                unsent -= 1
                await stream.publish("results", _encode(body()))

        watch = Watch()
        watch.start()
        await asyncio.gather(*(sender() for _ in range(window)))
        sample = watch.stop(operations)
        await client.close()
        return sample

    return asyncio.run(run())


def nats_async(operations: int, window: int, port: int) -> Sample:
    """The same by ``publish_async``: one task, which is held up where more were without an acknowledgement."""
    import nats as nats_py

    async def run() -> Sample:
        client = await nats_py.connect(f"nats://127.0.0.1:{port}")
        stream = client.jetstream(publish_async_max_pending=window)
        await stream.add_stream(name="RESULTS", subjects=["results"], max_msgs=100_000)
        watch = Watch()
        watch.start()
        futures = [await stream.publish_async("results", _encode(body())) for _ in range(operations)]
        await stream.publish_async_completed()
        for future in futures:
            future.result()
        sample = watch.stop(operations)
        await client.close()
        return sample

    return asyncio.run(run())


def socketio(operations: int, window: int, port: int) -> Sample:
    """Emit events with a callback, over a WebSocket."""
    import socketio as python_socketio

    async def run() -> Sample:
        client = python_socketio.AsyncClient(reconnection=False)
        await client.connect(f"http://127.0.0.1:{port}", transports=["websocket"])
        room = asyncio.Semaphore(window)
        finished = asyncio.Event()
        left = operations

        def acknowledged(taken: bool) -> None:
            nonlocal left
            left -= taken
            room.release()
            if not left:
                finished.set()

        watch = Watch()
        watch.start()
        for _ in range(operations):
            await room.acquire()
            await client.emit("result", body(), callback=acknowledged)
        await finished.wait()
        sample = watch.stop(operations)
        await client.disconnect()
        return sample

    return asyncio.run(run())
