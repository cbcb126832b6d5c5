"""What the targets share: how data becomes packets, a log in which nothing may go wrong, a client in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher

from commsmgr import config
from commsmgr.transport.websocket import WebSocketClient
from commsmgr.urls import parse
from tests.websocket_kit import MemoryDialer, MemoryTransport, RecordingHandler


class Broken(AssertionError):
    """A promise was broken."""


def promise(kept: object, sentence: str, *facts: object) -> None:
    """
    Raise unless ``kept``.

    :param facts: shown with the sentence.
    """
    if not kept:
        raise Broken(": ".join([sentence, *map(repr, facts)]))


class Input:
    """
    Data as a peer's doing: a byte that says how the rest is cut, a byte of ``flags``, and the ``rest``.

    The first byte is 0 for one packet, 1 for a packet a byte, and otherwise the seed of packets of 1 to 40 bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._cut, self.flags = (*data[:2], 0, 0)[:2]
        self.rest = data[2:]

    def packets(self, rest: bytes) -> Iterator[bytes]:
        """Cut ``rest``, which is what the data says or what was made of it."""
        random = Random(self._cut)
        at = 0
        while at < len(rest):
            size = {0: len(rest), 1: 1}.get(self._cut) or random.randint(1, 40)
            yield rest[at : at + size]
            at += size


@contextmanager
def nothing_wrong(*, unawaited: bool = False) -> Iterator[None]:
    """
    See that nothing is logged as an error meanwhile.

    :param unawaited: also look for Deferreds whose failure nobody took, which are only known when they are collected.
    """
    wrong: list[str] = []

    def observe(event: LogEvent) -> None:
        if event["log_level"] >= LogLevel.error:
            failure = event.get("log_failure")
            wrong.append(formatEvent(event) + ("" if failure is None else f": {failure.getTraceback()}"))

    globalLogPublisher.addObserver(observe)
    try:
        yield
        if unawaited:
            gc.collect()
    finally:
        globalLogPublisher.removeObserver(observe)
    promise(not wrong, "logged as an error", *wrong)


LIMIT = 1000
"""Bytes of the largest message that a :class:`Client` takes."""

URL = "ws://backend.example/agent"


class Client:
    """
    A WebSocket client that has sent its upgrade request, over a transport in memory.

    :ivar request: the request.
    """

    def __init__(self, *, compress: bool = False) -> None:
        self.clock = Clock()
        self.handler = RecordingHandler()
        self.handler.delay = 60.0
        dialer = MemoryDialer(self.clock)
        settings = config.WebSocket(connect_timeout=20.0, stable_after=30.0, max_message_bytes=LIMIT, compress=compress)
        self.client = WebSocketClient(
            self.clock,
            parse(URL, ("ws", "wss")),
            dialer=dialer,
            handler=self.handler,
            settings=settings,
            subprotocols=("commsmgr.v1",),
            entropy=Random(1).randbytes,
            wall=lambda: 1_700_000_000.0,
        )
        self.client.start()
        self.transport: MemoryTransport = dialer.endpoints[0].succeed()
        self.request = self.transport.take()

    def feed(self, data: bytes) -> None:
        """The backend sends ``data``, unless the connection is over: then nobody reads."""
        if not (self.transport.aborted or self.transport.lost):
            self.transport.protocol.dataReceived(data)

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(0)
        self.clock.advance(seconds)
        self.clock.advance(0)

    def finish(self) -> Any:
        """Stop, and see that nothing is left; return the error with which the attempt ended."""
        stopped: list[object] = []
        self.client.stop().addCallback(stopped.append)
        self.pass_time(10.0)
        promise(stopped, "the client did not stop")
        promise(self.transport.lost, "the connection is still there")
        promise(not self.clock.getDelayedCalls(), "timers are left", self.clock.getDelayedCalls())
        promise(len(self.handler.ended) == 1, "ended not once", self.handler.ended)
        promise(self.handler.events[-1] == "ended", "events after the end", self.handler.events)
        return self.handler.error
