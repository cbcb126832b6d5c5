"""
What a server sends over an open WebSocket, byte by byte.

Flags: 1 negotiates compression; 2 lets us close first; 4 lets us send and ping whenever a message comes; 8 lets the
server hang up at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

from twisted.internet.error import ConnectionDone

from commsmgr.errors import ClosedByPeer, CommsError, ConnectionEnded, NotRunning, PeerViolation
from tests.fuzz import rfc6455
from tests.fuzz.kit import LIMIT, Client, Input, nothing_wrong, promise
from tests.websocket_kit import BINARY, CLOSE, PING, PONG, TEXT, accept, close_frame, frame, read_frames

INSTRUMENT = ("commsmgr.transport", "autobahn.websocket")

TOKENS = (
    b"\x81\x00",
    b"\x01\x01a",
    b"\x00\x00",
    b"\x80\x01b",
    b"\x82\x7e\x00\x7e",
    b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00",
    b"\x82\x7f\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\x88\x00",
    b"\x88\x02\x03\xe8",
    b"\x88\x02\x03\xed",
    b"\x89\x00",
    b"\x8a\x00",
    b"\xc1\x07\xf2\x48\xcd\xc9\xc9\x07\x00",
    b"\x81\x82\x00\x00\x00\x00ab",
    b"\xed\xa0\x80",
    b"\xf4\x8f\xbf\xbf",
    b"\xe2\x82\xac",
)

DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"
ENDS = (ClosedByPeer, PeerViolation, ConnectionEnded, NotRunning)


def one(data: bytes) -> None:
    """See that the client outlives what the server sends, says what RFC 6455 says, and ends in one known way."""
    given = Input(data)
    compress, we_close, talk, hang_up = (bool(given.flags >> bit & 1) for bit in range(4))
    with nothing_wrong():
        client = Client(compress=compress)
        handler = client.handler
        if talk:
            handler.on["received"] = lambda connection, payload: (
                connection.send(b'{"type":"pong"}'),
                connection.ping(b"probe"),
            )
        client.feed(accept(client.request, *[DEFLATE] * compress))
        promise(handler.connections, "the upgrade did not succeed")
        if we_close:
            handler.connections[0].close(4000, "enough")
        for packet in given.packets(given.rest):
            client.feed(packet)
        written = client.transport.value()
        if hang_up:
            client.transport.lose(ConnectionDone())
        error = client.finish()
    frames = read_frames(written)
    closes = [payload for opcode, payload in frames if opcode == CLOSE]
    promise(len(closes) <= 1, "more than one close frame was sent", closes)
    promise(not closes or frames[-1][0] == CLOSE, "something was sent after the close frame", frames)
    for payload, is_text in handler.messages:
        promise(len(payload) <= LIMIT, "a message was larger than allowed", len(payload))
        if is_text:
            payload.decode()
    promise(isinstance(error, ENDS), "ended in no known way", error)
    if not compress and not we_close:
        _agrees(rfc6455.judge(given.rest, LIMIT), client, frames, error)


def _agrees(verdict: rfc6455.Verdict, client: Client, frames: list[tuple[int, bytes]], error: CommsError) -> None:
    """The client did what the RFC says."""
    delivered = client.handler.messages
    promise(delivered == verdict.messages, "other messages than were sent", delivered, verdict)
    pongs = [payload for opcode, payload in frames if opcode == PONG]
    promise(pongs == verdict.pings, "other pongs than pings", pongs, verdict)
    code = next((int.from_bytes(payload[:2], "big") for opcode, payload in frames if opcode == CLOSE), 0)
    if verdict.end == rfc6455.PEER_CLOSED:
        promise(isinstance(error, ClosedByPeer) and error.code == verdict.code, "no end by the peer", error, verdict)
        promise(code == (0 if verdict.code == 1005 else verdict.code), "the close frame was answered wrongly", code)
    elif verdict.end == rfc6455.OPEN:
        # A mistake that shows before its frame is complete may be noticed at once.
        early = isinstance(error, PeerViolation) and code in (1002, 1007, 1009)
        quiet = code == 0 and isinstance(error, NotRunning | ClosedByPeer)
        promise(early or quiet, "ended without a reason", error, verdict)
    else:
        promise(isinstance(error, PeerViolation), "a violation went unnoticed", error, verdict)
        promise(code == verdict.end, "failed with another code", code, verdict)


def seeds() -> Iterator[bytes]:
    """Yield conversations of every kind of frame."""
    talks = [
        frame(TEXT, b'{"type":"ping","id":"p"}'),
        frame(TEXT, "grüße €".encode(), fin=False) + frame(PING, b"?") + frame(0, b" und", fin=False) + frame(0, b"."),
        frame(BINARY, bytes(200)) + frame(PING, b"a" * 125) + frame(PONG, b"probe"),
        frame(TEXT, b"a" * 126) + frame(TEXT) + close_frame(1000, b"bye"),
        close_frame() + frame(TEXT, b"late"),
        frame(TEXT, b"x" * 1001),
        frame(3),
        frame(TEXT, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80"),
        frame(TEXT, b"masked", mask=b"abcd"),
    ]
    for talk in talks:
        for header in (b"\x00\x00", b"\x01\x04", b"\x07\x08", b"\x00\x02"):
            yield header + talk
    hello = bytes.fromhex("f248cdc9c90700")
    yield b"\x00\x01" + frame(TEXT, hello, rsv=4) + frame(TEXT, hello[:3], fin=False, rsv=4) + frame(0, hello[3:])
