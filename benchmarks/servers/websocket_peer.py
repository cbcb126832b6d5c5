"""
A WebSocket server fast enough never to bound a client: picows, with frames prepared before they are asked for.

Every connection begins with a message, which is answered as a registration is. What becomes of the others, says the
URL:

- ``/sink``: they are counted; one that asks for the ``count`` is told.
- ``/ack``: each is acknowledged by its id.
- ``/flood?COUNT&TYPE``: the first makes the server send ``COUNT`` messages of 256 bytes, ``command`` or another type.
"""

from __future__ import annotations

import asyncio
from functools import cache

import msgspec
from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

REGISTERED = b'{"type":"registration_ack","id":"1","timestamp":"2026-01-01T00:00:00Z","data":{"message":"hello"}}'
SIZE = 256


class Peer(WSListener):  # type: ignore[misc]  # Cython
    """One connection; registers, and counts."""

    count = -1

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take a frame; pings were answered already."""
        if frame.msg_type == WSMsgType.CLOSE:
            # Some contenders wait for the answer, for ten seconds.
            transport.send_close()
            transport.disconnect()
        if frame.msg_type != WSMsgType.TEXT:
            return
        self.count += 1
        if self.count == 0:
            transport.send(WSMsgType.TEXT, REGISTERED)
        self.taken(transport, frame)

    def taken(self, transport: WSTransport, frame: WSFrame) -> None:
        """Do what the URL says."""


class Sink(Peer):
    """Takes everything."""

    def taken(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.payload_size < 40 and frame.get_payload_as_bytes() == b'{"type":"count"}':
            transport.send(WSMsgType.TEXT, b'{"type":"count","id":"%d"}' % (self.count - 1))


class Acks(Peer):
    """Acknowledges."""

    def taken(self, transport: WSTransport, frame: WSFrame) -> None:
        if self.count:
            own = frame.get_payload_as_bytes().partition(b'"id":"')[2].partition(b'"')[0]
            transport.send(WSMsgType.TEXT, b'{"type":"ack","ids":["%b"]}' % own)


class Flood(Peer):
    """Sends, and listens no more."""

    def __init__(self, count: int, kind: str) -> None:
        self.frames = flood(count, kind)

    def taken(self, transport: WSTransport, frame: WSFrame) -> None:
        if self.count == 0:
            transport.underlying_transport.write(self.frames)


@cache
def flood(count: int, kind: str) -> bytes:
    """Return that many frames, each with an id of its own."""
    made = []
    for number in range(count):
        message = {
            "type": kind,
            "id": f"c-{number:08}",
            "timestamp": "2026-01-01T00:00:00Z",
            "data": {"type": "shell", "command": "uptime", "args": ["-p"], "timeout": 30, "options": {"user": "agent"}},
        }
        filling = SIZE - len(msgspec.json.encode(message)) - len(',"note":""')
        message["data"]["options"]["note"] = "n" * filling  # type: ignore[index]
        payload = msgspec.json.encode(message)
        made.append(b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload)
    return b"".join(made)


def listener(request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
    """Return what answers a request."""
    path, _, query = request.path.decode().partition("?")
    made: Peer
    if path == "/flood":
        count, kind = query.split("&")
        made = Flood(int(count), kind)
    else:
        made = {"/sink": Sink, "/ack": Acks}[path]()
    offered = request.headers.get("Sec-WebSocket-Protocol")
    chosen = {"Sec-WebSocket-Protocol": offered.split(",")[0].strip()} if offered else None
    return WSUpgradeResponseWithListener(WSUpgradeResponse.create_101_response(chosen), made)


async def main() -> None:
    """Listen, say where, and serve until killed."""
    server = await ws_create_server(listener, "127.0.0.1", 0)
    print(f'{{"port": {server.sockets[0].getsockname()[1]}}}', flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
