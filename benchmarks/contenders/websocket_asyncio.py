"""What else Python has for WebSockets: websockets, aiohttp, and picows, which is the floor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.contenders.websocket_payload import WARMING, counted, message
from benchmarks.sample import Sample, Watch, percentile

Send = Callable[[bytes], Awaitable[None]]
Receive = Callable[[], Awaitable[str | bytes]]


@asynccontextmanager
async def _websockets(url: str) -> AsyncIterator[tuple[Send, Receive]]:
    from websockets.asyncio.client import connect

    async with connect(url, compression=None, max_queue=None, ping_interval=None) as socket:

        async def send(payload: bytes) -> None:
            await socket.send(payload, text=True)

        yield send, socket.recv


@asynccontextmanager
async def _aiohttp(url: str) -> AsyncIterator[tuple[Send, Receive]]:
    from aiohttp import ClientSession

    async with ClientSession() as session, session.ws_connect(url) as socket:

        async def send(payload: bytes) -> None:
            await socket.send_str(payload.decode())

        yield send, socket.receive_str


LIBRARIES = {"websockets": _websockets, "aiohttp": _aiohttp}


def sends(port: int, operations: int, library: str) -> Sample:
    """Send ``operations`` encoded messages until the server has counted them."""

    async def run() -> Sample:
        watch, payload = Watch(), message(0)
        async with LIBRARIES[library](f"ws://127.0.0.1:{port}/sink") as (send, receive):
            await send(b'{"type":"register"}')
            await receive()
            for number in range(operations + WARMING):
                if number == WARMING:
                    watch.start()
                await send(payload)
            await send(b'{"type":"count"}')
            answer = await receive()
            sample = watch.stop(operations)
            assert f'"{operations + WARMING}"' in str(answer), answer
            return sample

    return asyncio.run(run())


def receives(port: int, operations: int, library: str) -> Sample:
    """Take ``operations`` messages, decoded."""

    async def run() -> Sample:
        watch = Watch()
        url = f"ws://127.0.0.1:{port}/flood?{operations + WARMING}&command"
        async with LIBRARIES[library](url) as (send, receive):
            await send(b'{"type":"register"}')
            await receive()
            for number in range(operations + WARMING):
                if number == WARMING:
                    watch.start()
                assert json.loads(await receive())["type"]
            return watch.stop(operations)

    return asyncio.run(run())


def round_trips(port: int, operations: int, library: str) -> Sample:
    """Send one message after the other, each when the one before it was answered."""

    async def run() -> Sample:
        watch, payload, took = Watch(), message(0), []
        async with LIBRARIES[library](f"ws://127.0.0.1:{port}/ack") as (send, receive):
            await send(b'{"type":"register"}')
            await receive()
            for number in range(operations + WARMING):
                if number == WARMING:
                    watch.start()
                began = time.perf_counter()
                await send(payload)
                await receive()
                took.append(time.perf_counter() - began)
            return watch.stop(operations, p50=percentile(took[WARMING:], 0.5) * 1e6)

    return asyncio.run(run())


def picows_sends(port: int, operations: int) -> Sample:
    """Send ``operations`` encoded messages by the fastest there is, until the server has counted them."""
    from picows import WSListener, WSMsgType, ws_connect

    async def run() -> Sample:
        watch, payload = Watch(), message(0)
        answers: asyncio.Queue[bytes] = asyncio.Queue()

        class Listener(WSListener):  # type: ignore[misc]  # Cython
            def on_ws_frame(self, transport: Any, frame: Any) -> None:
                answers.put_nowait(frame.get_payload_as_bytes())

        transport, _ = await ws_connect(Listener, f"ws://127.0.0.1:{port}/sink")
        transport.send(WSMsgType.TEXT, b'{"type":"register"}')
        await answers.get()
        for number in range(operations + WARMING):
            if number == WARMING:
                watch.start()
            transport.send(WSMsgType.TEXT, payload)
            if number % 100 == 0:
                await asyncio.sleep(0)
        transport.send(WSMsgType.TEXT, b'{"type":"count"}')
        answer = await answers.get()
        sample = watch.stop(operations)
        assert b'"%d"' % (operations + WARMING) in answer, answer
        return sample

    return asyncio.run(run())


def picows_receives(port: int, operations: int) -> Sample:
    """Take ``operations`` messages by the fastest there is, decoded."""
    from picows import WSListener, WSMsgType, ws_connect

    async def run() -> Sample:
        done: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        # The first is the answer to the registration.
        arrived = counted(operations, done.set_result, WARMING + 1)

        class Listener(WSListener):  # type: ignore[misc]  # Cython
            def on_ws_frame(self, transport: Any, frame: Any) -> None:
                assert json.loads(frame.get_payload_as_bytes())["type"]
                arrived()

        url = f"ws://127.0.0.1:{port}/flood?{operations + WARMING}&command"
        transport, _ = await ws_connect(Listener, url)
        transport.send(WSMsgType.TEXT, b'{"type":"register"}')
        return await done

    return asyncio.run(run())
