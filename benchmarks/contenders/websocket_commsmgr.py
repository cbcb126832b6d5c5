"""
commsmgr over WebSocket, in two of three thicknesses.

``connection`` is the transport alone: supervised connection, guards, bounds. ``session`` is a link as it stands in a
manager: registered, with its conversation, validation, window, receipts, keep-alive and metrics. The third is the whole
(:mod:`.websocket_manager`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred, succeed

from benchmarks.contenders.websocket_payload import WARMING, counted, message
from benchmarks.sample import Sample, Watch, percentile
from commsmgr import config
from commsmgr.clock import steady
from commsmgr.config import Backend, Config
from commsmgr.errors import CommsError
from commsmgr.messages import Result
from commsmgr.observe.metrics import Metrics
from commsmgr.openlink import LinkEvents, OpenLink
from commsmgr.redact import Redactor
from commsmgr.results import encode_result
from commsmgr.session.conversation import Conversation
from commsmgr.session.wire import decoder
from commsmgr.spool import Entry, Lane
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.websocket import Connection, WebSocketClient
from commsmgr.urls import parse

TIMESTAMP = "2026-01-01T00:00:00Z"
V1 = "commsmgr.v1"


class _Handler:
    """Owns one connection; a failure ends the benchmark."""

    def __init__(self, v1: bool, opened: Callable[[Connection], Any]) -> None:
        self._opened = opened
        self.failed: CommsError | None = None
        from twisted.internet import reactor

        self.clock: Any = steady(reactor)
        # The limit of the rate is not what is measured here.
        self.whole = Config(
            backends=(Backend(url="http://127.0.0.1:1"),), websocket=config.WebSocket(max_message_rate=0)
        )
        self._subprotocols = [V1] if v1 else []

    def run(self, port: int, path: str) -> None:
        """Connect, and let the reactor run until the benchmark stops it."""
        self.client = WebSocketClient(
            self.clock,
            parse(f"ws://127.0.0.1:{port}{path}", ("ws", "wss")),
            dialer=Dialer(self.clock, self.whole.tls),
            handler=self,
            settings=self.whole.websocket,
            subprotocols=self._subprotocols,
        )
        self.client.start()
        self.clock.run()
        if self.failed is not None:
            raise self.failed

    def websocket_headers(self) -> Deferred[dict[str, str]]:
        """None."""
        return succeed({})

    def websocket_connecting(self) -> None:
        """An attempt begins."""

    def websocket_opened(self, connection: Connection) -> None:
        """Begin."""
        self._opened(connection)

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        """A message came."""

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        """A pong came."""

    def websocket_heard(self, connection: Connection) -> None:
        """Bytes came."""

    def websocket_ended(self, connection: Connection | None, error: CommsError) -> float:
        """It should not have."""
        if self.clock.running:
            self.failed = error
            self.clock.stop()
        return 60.0


class _Session(_Handler):
    """A link without the rest of a manager."""

    link: OpenLink

    def __init__(self, v1: bool, **events: Callable[..., object]) -> None:
        super().__init__(v1, self._begin)
        self._v1 = v1

        def nothing(*_: object) -> None:
            pass

        names = LinkEvents.__struct_fields__
        self._events = LinkEvents(**{name: events.get(name, nothing) for name in names})

    def _begin(self, connection: Connection) -> None:
        self.link = OpenLink(
            connection,
            Conversation(
                machine_id="bench",
                hostname="bench",
                agent_version="1",
                v1=self._v1,
                decoder=decoder(self.whole),
                new_id=lambda: "id-1",
                timestamp=lambda: TIMESTAMP,
            ),
            backend="bench",
            v1=self._v1,
            nonce=b"123456",
            settings=self.whole.websocket,
            clock=self.clock,
            metrics=Metrics(CollectorRegistry(), seconds=time.time),
            events=self._events,
            on_registered=lambda: self._events.registered(self.link),
            on_going_away=lambda _: None,
        )
        self.link.start()

    # As in commsmgr.link.

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        """A message came."""
        self.link.received(payload, is_text)

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        """A pong came."""
        self.link.pong(payload)

    def websocket_heard(self, connection: Connection) -> None:
        """Bytes came."""
        self.link.heard()


def connection_sends(port: int, operations: int, batch: int) -> Sample:
    """Send ``operations`` encoded messages, ``batch`` of them in a write, until the server has counted them."""
    watch, samples = Watch(), []
    payloads = [message(number) for number in range(batch)]

    def opened(connection: Connection) -> None:
        connection.send(b'{"type":"register"}')
        left = operations + WARMING

        def some() -> None:
            nonlocal left
            if left == operations:
                watch.start()
            for _ in range(100 // batch):
                if batch == 1:
                    connection.send(payloads[0])
                else:
                    connection.send_many(payloads)
            left -= 100
            if left:
                handler.clock.callLater(0, some)
            else:
                connection.send(b'{"type":"count"}')

        some()

    def received(connection: Connection, payload: bytes, is_text: bool) -> None:
        if b'"count"' in payload:
            samples.append(watch.stop(operations))
            assert f'"{operations + WARMING}"' in payload.decode(), payload
            handler.clock.stop()

    handler = _Handler(False, opened)
    handler.websocket_received = received  # type: ignore[method-assign]
    handler.run(port, "/sink")
    return samples[0]


def _entries(count: int) -> list[Entry]:
    # As results are: the envelope's 100 bytes come on top of the body's.
    body = message(0)[:-100] + b'"}'
    return [Entry(n, Lane.EVENT, "command_result", f"r-{n:08}", body, 0.0) for n in range(count)]


def _reported(count: int) -> Iterator[Entry]:
    """Make entries of results as an agent reports them: checked, secrets taken out, encoded."""
    redactor = Redactor()
    for n in range(count):
        result = Result(command_id=f"c-{n:08}", output="up 3 days, 04:05:06")
        body, _ = encode_result(
            result,
            message_id=f"r-{n:08}",
            timestamp=TIMESTAMP,
            limit=64 << 20,
            max_output=1 << 20,
            redact=redactor.document,
        )
        yield Entry(n, Lane.EVENT, "command_result", f"r-{n:08}", body, 0.0)


def session_sends(port: int, operations: int, results: bool = False) -> Sample:
    """
    Send results over a plain backend's link, until each has its receipt by barrier.

    :param results: whether they are made as they go, from what an agent says, or were encoded before.
    """
    watch, samples = Watch(), []
    total = operations + WARMING
    made = _reported(total) if results else iter(_entries(total))
    waiting: deque[Entry] = deque()
    receipted = 0

    def fill(link: OpenLink) -> None:
        count, free = link.room
        waiting.extend(islice(made, count - len(waiting)))
        taken = []
        while waiting and free >= (size := len(waiting[0].body)):
            taken.append(waiting.popleft())
            free -= size
        if taken:
            link.send(taken, TIMESTAMP)

    def receipts(link: OpenLink, seqs: Sequence[int]) -> None:
        nonlocal receipted
        if receipted < WARMING <= receipted + len(seqs):
            watch.start()
        receipted += len(seqs)
        if receipted == operations + WARMING:
            samples.append(watch.stop(operations))
            session.clock.stop()
        fill(link)

    session = _Session(False, registered=fill, receipts=receipts)
    session.run(port, "/sink")
    return samples[0]


def session_receives(port: int, operations: int, v1: bool = True) -> Sample:
    """Take commands: parsed, checked, and handed on, which is where a manager stores them."""
    samples: list[Sample] = []

    def finished(sample: Sample) -> None:
        samples.append(sample)
        session.clock.stop()

    session = _Session(v1, command=counted(operations, finished))
    session.run(port, f"/flood?{operations + WARMING}&command")
    return samples[0]


def session_round_trips(port: int, operations: int) -> Sample:
    """Send one result after the other, each when the one before it was acknowledged."""
    watch, samples = Watch(), []
    waiting = deque(_entries(operations + WARMING))
    took: list[float] = []
    sent_at = 0.0

    def send(link: OpenLink, seqs: Sequence[int] = ()) -> None:
        nonlocal sent_at
        now = time.perf_counter()
        if seqs:
            took.append(now - sent_at)
        if len(took) == WARMING:
            watch.start()
        if waiting:
            sent_at = time.perf_counter()
            link.send([waiting.popleft()], TIMESTAMP)
        else:
            samples.append(watch.stop(operations, p50=percentile(took[WARMING:], 0.5) * 1e6))
            session.clock.stop()

    session = _Session(True, registered=send, receipts=send)
    session.run(port, "/ack")
    return samples[0]
