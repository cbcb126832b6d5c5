"""What the WebSocket tests share: a handler that records, in-memory transports on a clock, and frames by hand."""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from hashlib import sha1
from typing import Any

import twisted.internet
import txaio
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from commsmgr import config
from commsmgr.errors import CommsError
from commsmgr.transport.websocket import Connection, WebSocketClient
from commsmgr.urls import parse

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes = b"") -> bytes:
    """Return a frame as a server writes it: not masked, unless asked for."""
    length = len(payload)
    if length < 126:
        header = bytes([length])
    elif length < 1 << 16:
        header = bytes([126]) + length.to_bytes(2, "big")
    else:
        header = bytes([127]) + length.to_bytes(8, "big")
    if mask:
        header = bytes([header[0] | 0x80]) + header[1:] + mask
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([(0x80 if fin else 0) | rsv << 4 | opcode]) + header + payload


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    """Return a close frame."""
    return frame(CLOSE, b"" if code is None else code.to_bytes(2, "big") + reason)


def read_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Take apart what a client wrote, which must be whole, final and masked frames, into opcodes and payloads."""
    frames = []
    while data:
        assert data[0] & 0x80, "not final"
        assert data[1] & 0x80, "not masked"
        opcode, length, at = data[0] & 0x0F, data[1] & 0x7F, 2
        if length >= 126:
            width = 2 if length == 126 else 8
            length, at = int.from_bytes(data[2 : 2 + width], "big"), 2 + width
        mask, payload = data[at : at + 4], data[at + 4 : at + 4 + length]
        assert len(payload) == length, "not whole"
        frames.append((opcode, bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))))
        data = data[at + 4 + length :]
    return frames


def accept(request: bytes, *fields: str) -> bytes:
    """Return the 101 that ``request`` asks for, with further header fields."""
    key = next(line for line in request.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key: ")).split(b": ")[1]
    digest = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {digest}",
        *fields,
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1")


class RecordingHandler:
    """
    A handler that writes down what it is told.

    ``on`` maps names of callbacks to functions that run within them, with the same arguments.
    """

    def __init__(self) -> None:
        self.headers: Callable[[], Deferred[Mapping[str, str]]] = lambda: succeed({"Authorization": "Bearer t0ken"})
        self.delay: Any = 5.0
        self.heard = 0
        self.events: list[str] = []
        self.messages: list[tuple[bytes, bool]] = []
        self.pongs: list[bytes] = []
        self.connections: list[Connection] = []
        self.ended: list[tuple[Connection | None, CommsError]] = []
        self.on: dict[str, Callable[..., object]] = {}

    def _note(self, name: str, *args: object) -> None:
        self.events.append(name)
        if name in self.on:
            self.on[name](*args)

    @property
    def error(self) -> CommsError:
        """Why the last attempt ended."""
        return self.ended[-1][1]

    def websocket_headers(self) -> Deferred[Mapping[str, str]]:
        return self.headers()

    def websocket_connecting(self) -> None:
        self._note("connecting")

    def websocket_opened(self, connection: Connection) -> None:
        self.connections.append(connection)
        self._note("opened", connection)

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        self.messages.append((payload, is_text))
        self._note("received", connection, payload)

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        self.pongs.append(payload)
        self._note("pong", connection, payload)

    def websocket_heard(self, connection: Connection) -> None:
        self.heard += 1
        if "heard" in self.on:
            self.on["heard"](connection)

    def websocket_ended(self, connection: Connection | None, error: CommsError) -> float:
        self.ended.append((connection, error))
        self._note("ended", connection, error)
        return self.delay


class MemoryTransport(StringTransport):
    """The client's side of a connection; it is gone one turn of the clock after it was told to go."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(peerAddress=IPv4Address("TCP", "192.0.2.1", 80))
        self._clock = clock
        self.protocol: Any = None
        self.aborted = False
        self.lost = False
        self.deaf = False

    def abortConnection(self) -> None:
        self.aborted = True
        if not self.deaf:
            self._clock.callLater(0, self.lose, ConnectionAborted())

    def loseConnection(self) -> None:
        self._clock.callLater(0, self.lose, ConnectionDone())

    def lose(self, reason: Exception) -> None:
        """The connection is gone."""
        if not self.lost:
            self.lost = True
            self.protocol.connectionLost(Failure(reason))

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data = self.value()
        self.clear()
        return data


class _Stubborn(Deferred[Any]):
    """The result of an endpoint that takes its time over being cancelled."""

    def cancel(self) -> None:
        self._canceller(self)  # type: ignore[misc]  # it always has one here


@implementer(IStreamClientEndpoint)
class MemoryEndpoint:
    """An endpoint that connects when the test says so."""

    def __init__(self, clock: Clock, timeout: float, stubborn: bool) -> None:
        self._stubborn = stubborn
        self.timeout = timeout
        self.factory: Any = None
        self.cancelled = False
        self.transport = MemoryTransport(clock)

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        self.factory = protocolFactory
        self.connecting: Deferred[Any] = (_Stubborn if self._stubborn else Deferred)(self._cancel)
        return self.connecting

    def _cancel(self, connecting: Deferred[Any]) -> None:
        self.cancelled = True

    def succeed(self) -> MemoryTransport:
        """The connection is made."""
        protocol = self.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 80))
        self.transport.protocol = protocol
        protocol.makeConnection(self.transport)
        self.connecting.callback(protocol)
        return self.transport

    def fail(self, error: Exception) -> None:
        """The connection is not made."""
        self.connecting.errback(Failure(error))


class MemoryDialer:
    """Gives memory endpoints, or raises."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.endpoints: list[MemoryEndpoint] = []
        self.error: Exception | None = None
        self.stubborn = False

    def endpoint(self, target: object, *, timeout: float) -> MemoryEndpoint:
        if self.error is not None:
            raise self.error
        self.endpoints.append(MemoryEndpoint(self._clock, timeout, self.stubborn))
        return self.endpoints[-1]


class _Poison:
    """Stands in for the global reactor: whoever touches it fails."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the global reactor was asked for {name}")


class MemoryTestCase(SynchronousTestCase):
    """
    One client on a clock, with a poisoned global reactor.

    :cvar url: the target.
    :cvar settings: of the client.
    """

    url = "ws://backend.example/agent?x=1"
    settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=1000)
    subprotocols: tuple[str, ...] = ("commsmgr.v1",)

    def setUp(self) -> None:
        poison = _Poison()
        self.patch(txaio.config, "loop", poison)
        for names, name in ((sys.modules, "twisted.internet.reactor"), (vars(twisted.internet), "reactor")):
            if name in names:
                self.addCleanup(names.__setitem__, name, names[name])
            else:
                self.addCleanup(names.pop, name)
            names[name] = poison
        self.clock = Clock()
        self.handler = RecordingHandler()
        self.dialer = MemoryDialer(self.clock)
        self.wall = 1_700_000_000.0
        self.client = self.make_client()

    def make_client(self, **kwargs: Any) -> WebSocketClient:
        """Return a client as the class says, but for ``kwargs``."""
        arguments = {
            "dialer": self.dialer,
            "handler": self.handler,
            "settings": self.settings,
            "subprotocols": self.subprotocols,
            "wall": lambda: self.wall,
        } | kwargs
        return WebSocketClient(self.clock, parse(self.url, ("ws", "wss")), **arguments)

    def assert_clean(self) -> None:
        """Nothing is left on the clock."""
        self.assertEqual(self.clock.getDelayedCalls(), [])

    @property
    def endpoint(self) -> MemoryEndpoint:
        """The endpoint of the last attempt."""
        return self.dialer.endpoints[-1]

    @property
    def transport(self) -> MemoryTransport:
        """The transport of the last attempt."""
        return self.endpoint.transport

    def feed(self, data: bytes) -> None:
        """The backend sends ``data``."""
        self.transport.protocol.dataReceived(data)

    def connect(self) -> bytes:
        """Start, and let the transport be made; return the upgrade request."""
        self.client.start()
        return self.endpoint.succeed().take()

    def open(self, *fields: str) -> Connection:
        """Start, and let the upgrade succeed."""
        self.feed(accept(self.connect(), *fields))
        return self.handler.connections[-1]

    def sent(self) -> list[tuple[int, bytes]]:
        """Return the frames that the client wrote since the last call."""
        return read_frames(self.transport.take())

    def settle(self) -> None:
        """Let a transport that was told to go be gone."""
        self.clock.advance(0)
