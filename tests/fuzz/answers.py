"""
What a server answers to HTTP requests, on a connection in memory, with time that passes only when nothing comes.

Flags: 1 lets the server hang up at the end; 2 sends a second request on the same connection, whose answer is what is
left after the first; 4 asks with a large body, so that an answer may come before all of it was sent; 8 is HEAD.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import CommsError, ConnectionEnded, DeadlineExceeded, PeerViolation
from commsmgr.transport.http import HTTPClient, HTTPResponse
from commsmgr.urls import Target
from tests.fuzz.kit import Input, nothing_wrong, promise
from tests.websocket_kit import MemoryDialer

INSTRUMENT = ("commsmgr.transport", "twisted.web._newclient", "twisted.web.client", "twisted.web.http", "treq")

TOKENS = (
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\n\r\n",
    b"HTTP/1.1 401 Unauthorized\r\n",
    b"Content-Length: 2\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"Content-Type: application/json; charset=x\r\n",
    b"Set-Cookie: a=b\r\n",
    b"Location: /other\r\n",
    b"2\r\nok\r\n",
    b"0\r\n\r\n",
    b"0;ext=1\r\nTrailer: x\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"\r\n\r\n",
    b" folded\r\n",
)

LIMIT = 500
TIMEOUT = 20.0
ENDS = (ConnectionEnded, DeadlineExceeded, PeerViolation)
TARGET = Target("http", "backend.example", 80, "/api")


def one(data: bytes) -> None:
    """See that every answer is a response or a typed error within the deadline, and that nothing is left of it."""
    given = Input(data)
    hang_up, again, upload, head = (bool(given.flags >> bit & 1) for bit in range(4))
    with nothing_wrong(unawaited=True):
        clock = Clock()
        dialer = MemoryDialer(clock)
        settings = config.HTTP(timeout=TIMEOUT, max_response_bytes=LIMIT, compress=False, connections=1)
        client = HTTPClient(clock, dialer, settings)  # type: ignore[arg-type]  # in memory
        packets = given.packets(given.rest)
        for _ in range(1 + again):
            outcomes: list[Any] = []
            asked = client.exchange(
                "HEAD" if head else "POST", TARGET, "/heartbeat", body=b"x" * 200_000 * upload, token="t0ken"
            )
            asked.addBoth(outcomes.append)
            _answered(dialer, packets, outcomes, pause=upload)
            if hang_up and dialer.endpoints:
                dialer.endpoints[-1].transport.lose(ConnectionDone())
            clock.advance(TIMEOUT)
            clock.advance(0)
            promise(len(outcomes) == 1, "no outcome within the deadline")
            _known(outcomes[0])
        closed: list[object] = []
        client.close().addCallback(closed.append)
        for _ in range(4):
            clock.advance(1.0)
        promise(closed, "the client did not close")
        promise(not clock.getDelayedCalls(), "timers are left", clock.getDelayedCalls())
        promise(all(each.transport.lost for each in dialer.endpoints), "a connection is left")
        del asked, outcomes, client, dialer


def _answered(dialer: MemoryDialer, packets: Iterator[bytes], outcomes: list[Any], *, pause: bool) -> None:
    """Make the connection if it is a new one, and let the server speak until the exchange is over."""
    endpoint = dialer.endpoints[-1]
    if endpoint.transport.protocol is None:
        endpoint.succeed()
    transport = endpoint.transport
    if pause and transport.producer is not None:
        # The kernel takes no more of the request for now.
        transport.producer.pauseProducing()
    while not (outcomes or transport.aborted or transport.lost):
        packet = next(packets, None)
        if packet is None:
            break
        transport.protocol.dataReceived(packet)


def _known(outcome: Any) -> None:
    """A response within its bounds, or an error of ours."""
    if isinstance(outcome, HTTPResponse):
        promise(100 <= outcome.status <= 999, "no status", outcome)
        promise(len(outcome.body) <= LIMIT, "more was taken than allowed", len(outcome.body))
        promise(all(name == name.lower() for name in outcome.headers), "names in upper case", outcome.headers)
        return
    promise(isinstance(outcome, Failure), "neither answer nor failure", outcome)
    promise(isinstance(outcome.value, CommsError) and isinstance(outcome.value, ENDS), "untyped", outcome)
    str(outcome.value)


def seeds() -> Iterator[bytes]:
    """Yield answers whole, chunked, endless, encoded, interim, doubled, and none."""
    ok = b"HTTP/1.1 200 OK\r\n"
    answers = [
        ok + b"Content-Length: 2\r\n\r\n{}",
        ok + b"Content-Length: 2\r\n\r\n{}" + ok + b"Content-Length: 2\r\n\r\n{}",
        ok + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        ok + b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\n{\r\n1\r\n}\r\n0\r\nA: b\r\n\r\n",
        ok + b"Connection: close\r\n\r\nno length",
        ok + b"Content-Length: 900\r\n\r\n",
        ok + b"Content-Encoding: gzip\r\nContent-Length: 22\r\n\r\n" + gzip.compress(b"{}", mtime=0),
        ok + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        ok + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://other.example/\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 Slow\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nwhatever",
        b"HTTP/1.1 200\r\nContent-Length:2\r\nX: a\r\n b\r\n\r\n{}",
        ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-x\r\n",
        b"",
    ]
    for index, answer in enumerate(answers):
        yield b"\x00\x00" + answer
        yield bytes([1 + index, (3, 2, 5, 9, 7)[index % 5]]) + answer
