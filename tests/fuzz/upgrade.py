"""What a server answers to the WebSocket upgrade. ``@accept@`` in the data becomes what the request asks for."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha1

from commsmgr.errors import DeadlineExceeded, NotRunning, PeerViolation, TransportError, UpgradeRefused
from commsmgr.transport.answer_head import MAX_HEAD_BYTES
from commsmgr.transport.handshake import clean, read_head, refusal
from tests.fuzz.kit import Client, Input, nothing_wrong, promise
from tests.websocket_kit import TEXT, frame

INSTRUMENT = ("commsmgr.transport", "autobahn.websocket")

ACCEPT = b"@accept@"

TOKENS = (
    b"HTTP/1.1 101 Switching Protocols\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\n",
    b"Upgrade: websocket\r\n",
    b"Connection: Upgrade\r\n",
    b"Sec-WebSocket-Accept: @accept@\r\n",
    b"Sec-WebSocket-Protocol: commsmgr.v1\r\n",
    b"Sec-WebSocket-Extensions: permessage-deflate\r\n",
    b"server_max_window_bits=9; client_max_window_bits=15; server_no_context_takeover",
    b"Location: https://other.example/?token=x\r\n",
    b"Retry-After: 7\r\n",
    b"Retry-After: Tue, 14 Nov 2023 22:14:20 GMT\r\n",
    b"Content-Type: text/html\r\n",
    b"\r\n\r\n",
    b"\n\n",
)

ENDS = (UpgradeRefused, PeerViolation, DeadlineExceeded)


def one(data: bytes) -> None:
    """See that every answer opens the WebSocket or ends in a typed error."""
    given = Input(data)
    _head(given.rest)
    with nothing_wrong():
        client = Client(compress=bool(given.flags & 1))
        key = client.request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        digest = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        for packet in given.packets(given.rest.replace(ACCEPT, digest)):
            client.feed(packet)
        opened = bool(client.handler.connections)
        if opened:
            promise(client.request.count(b"\r\n\r\n") == 1, "another request was sent")
            promise(b"101" in given.rest and ACCEPT in given.rest, "opened without proof")
        else:
            # Time enough for the deadline of the upgrade, not for another attempt.
            client.pass_time(25.0)
            promise(len(client.handler.ended) == 1, "neither opened nor over")
            promise(isinstance(client.handler.error, ENDS), "ended in no known way", client.handler.error)
            str(client.handler.error)
        error = client.finish()
    promise(isinstance(error, (*ENDS, NotRunning, TransportError)), "ended in no known way", error)


def _head(data: bytes) -> None:
    """The parser alone."""
    try:
        head = read_head(data)
    except TransportError as error:
        promise(len(str(error)) < 1000 and str(error).isprintable(), "the error cannot be logged", str(error))
        return
    if head is None:
        promise(len(data) < MAX_HEAD_BYTES, "waits for ever for the end of the head")
        return
    promise(0 < head.end <= len(data), "more was read than came")
    cleaned = clean(head)
    again = read_head(cleaned)
    promise(again is not None and again.headers == head.headers, "the clean head says something else", head)
    promise(all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in cleaned), "the clean head is not", cleaned)
    if not head.is_interim and head.status != 101:
        error = refusal(head, 1_700_000_000.0)
        promise(str(error).isprintable(), "the error cannot be logged", str(error))


def seeds() -> Iterator[bytes]:
    """Yield answers that open, refuse, redirect, or are none."""
    good = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: @accept@\r\n"
    )
    answers = [
        good + b"\r\n",
        good + b"Sec-WebSocket-Protocol: commsmgr.v1\r\n\r\n" + frame(TEXT, b"first"),
        good + b"Sec-WebSocket-Protocol: other\r\n\r\n",
        good + b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=9\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + good + b"\r\n",
        good.replace(b"\r\n", b"\n") + b"\n",
        b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nno\n",
        b"HTTP/1.1 429 Slow\r\nRetry-After: Tue, 14 Nov 2023 22:14:20 GMT\r\n\r\n",
        b"HTTP/1.0 302 Found\r\nLocation: https://login.example/?secret=1\r\nContent-Type: text/html\r\n\r\n<html>",
        b"220 smtp.example ESMTP\r\n",
        b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\n\r\n",
    ]
    for answer in answers:
        yield b"\x00\x01" + answer
        yield b"\x01\x00" + answer
