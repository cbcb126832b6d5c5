"""
A commsmgr.v1 backend that is as fast as Python allows, so that it is the agent that is measured.

It registers whoever comes, decodes each result, remembers its id, and acknowledges once for all that came in one read.
It keeps nothing on disk: what it costs to be a backend is not the subject.
"""

from __future__ import annotations

import asyncio
import json

import msgspec
import picows

from commsmgr.messages import Ack, FromAgent, Register, RegistrationAck, RegistrationAckData, ResultEnvelope

_decode = msgspec.json.Decoder(FromAgent).decode
_encode = msgspec.json.Encoder().encode


class Session(picows.WSListener):  # type: ignore[misc]  # picows has no types
    """One agent's connection."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()
        self._received: list[str] = []

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Take one message."""
        if frame.msg_type == picows.WSMsgType.TEXT:
            self._take(transport, _decode(frame.get_payload_as_memoryview()))
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send_close(picows.WSCloseCode.OK)
            transport.disconnect()

    def _take(self, transport: picows.WSTransport, message: object) -> None:
        match message:
            case ResultEnvelope():
                if not self._received:
                    # After all frames of this read.
                    asyncio.get_running_loop().call_soon(self._acknowledge, transport)
                self._seen.add(message.id)
                self._received.append(message.id)
            case Register():
                data = RegistrationAckData(machine_id=message.machine_id)
                transport.send(picows.WSMsgType.TEXT, _encode(RegistrationAck(id=message.id, data=data)))

    def _acknowledge(self, transport: picows.WSTransport) -> None:
        received, self._received = self._received, []
        transport.send(picows.WSMsgType.TEXT, _encode(Ack(ids=received)))


def _upgrade(request: picows.WSUpgradeRequest) -> picows.WSUpgradeResponseWithListener:
    answer = picows.WSUpgradeResponse.create_101_response({"Sec-WebSocket-Protocol": "commsmgr.v1"})
    return picows.WSUpgradeResponseWithListener(answer, Session())


async def main() -> None:
    """Serve until the process is ended."""
    server = await picows.ws_create_server(_upgrade, "127.0.0.1", 0, enable_auto_pong=True)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
