"""
A backend for many agents at once: commsmgr.v1 as far as a fleet needs it, on picows.

It acknowledges registrations and results. ``GET /commands`` sends a command to each tenth agent that is registered,
and ``GET /results`` says how many results have come in all. It listens on several addresses of loopback, as each has
its own room for the ports of clients.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from itertools import count

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

ADDRESSES = tuple(f"127.0.0.{last}" for last in range(1, 5))
SUBPROTOCOL = "commsmgr.v1"


class Message(msgspec.Struct):
    """What matters of an agent's messages."""

    type: str
    id: str = ""
    machine_id: str = ""


_decode = msgspec.json.Decoder(Message).decode
_numbers = count(1)


class Backend:
    """
    Who is registered, and what has come.

    :ivar agents: by the transport's identity.
    """

    def __init__(self) -> None:
        self.agents: dict[WSTransport, str] = {}
        self.results = 0

    def command(self) -> int:
        """Send each tenth agent a command; return how many those are."""
        chosen = list(self.agents)[::10]
        for transport in chosen:
            transport.send(
                WSMsgType.TEXT,
                b'{"type":"command","id":"command-%d","timestamp":"2026-01-01T00:00:00Z",'
                b'"data":{"type":"echo","command":"echo","args":["hello"],"timeout":10}}' % next(_numbers),
            )
        return len(chosen)

    def upgrade(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """Answer a request: the two that are not upgrades, and those that are."""
        path = request.path.decode()
        if path == "/commands":
            return _said(self.command())
        if path == "/results":
            return _said(self.results)
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        chosen = {"Sec-WebSocket-Protocol": SUBPROTOCOL} if SUBPROTOCOL in offered else None
        return WSUpgradeResponseWithListener(WSUpgradeResponse.create_101_response(chosen), Agent(self))


class Agent(WSListener):
    """One connection."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take a message."""
        if frame.msg_type is not WSMsgType.TEXT:
            if frame.msg_type is WSMsgType.CLOSE:
                transport.send_close(1000)
                transport.disconnect()
            return
        message = _decode(frame.get_payload_as_bytes())
        if message.type == "register":
            self._backend.agents[transport] = message.machine_id
            transport.send(
                WSMsgType.TEXT,
                b'{"type":"registration_ack","id":"%s","timestamp":"2026-01-01T00:00:00Z","data":{"machine_id":"%s"}}'
                % (message.id.encode(), message.machine_id.encode()),
            )
        elif message.type == "command_result":
            self._backend.results += 1
            transport.send(WSMsgType.TEXT, b'{"type":"ack","ids":["%s"]}' % message.id.encode())

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Forget an agent."""
        self._backend.agents.pop(transport, None)


def _said(number: int) -> WSUpgradeResponseWithListener:
    return WSUpgradeResponseWithListener(WSUpgradeResponse.create_ok_response(b"%d" % number), None)


async def main() -> None:
    """Listen, say where, and go on until killed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    backend = Backend()
    urls = []
    for address in ADDRESSES:
        server = await ws_create_server(backend.upgrade, address, 0, backlog=4096, read_buffer_init_size=1024)
        urls.append(f"{address}:{server.sockets[0].getsockname()[1]}")
    print(json.dumps({"addresses": urls}))
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
