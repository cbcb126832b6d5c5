"""autobahn by itself, on Twisted: no supervision, no checks, no metrics, nothing kept until it has arrived."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol

from benchmarks.contenders.websocket_payload import WARMING, content, counted, message
from benchmarks.sample import Sample, Watch, percentile


def _run(port: int, path: str, opened: Callable[[Any], object], received: Callable[[Any, bytes], object]) -> None:
    from twisted.internet import reactor

    failures: list[str] = []

    class Client(WebSocketClientProtocol):  # type: ignore[misc]  # autobahn has no types
        def onOpen(self) -> None:
            self.sendMessage(b'{"type":"register"}')
            opened(self)

        def onMessage(self, payload: bytes, isBinary: bool) -> None:
            received(self, payload)

        def onClose(self, wasClean: bool, code: int, reason: str) -> None:
            if reactor.running:
                failures.append(f"{code} {reason}")
                reactor.stop()

    factory = WebSocketClientFactory(f"ws://127.0.0.1:{port}{path}", reactor=reactor)
    factory.protocol = Client
    reactor.connectTCP("127.0.0.1", port, factory)
    reactor.run()
    if failures:
        raise RuntimeError(failures[0])


def sends(port: int, operations: int, encode: bool) -> Sample:
    """Send ``operations`` messages until the server has counted them."""
    from twisted.internet import reactor

    watch, samples = Watch(), []
    left = operations + WARMING
    payload, data = message(0), content(0)

    def some(client: Any) -> None:
        nonlocal left
        if left == operations:
            watch.start()
        for _ in range(100):
            client.sendMessage(json.dumps(data, separators=(",", ":")).encode() if encode else payload)
        left -= 100
        if left:
            reactor.callLater(0, some, client)
        else:
            client.sendMessage(b'{"type":"count"}')

    def received(client: Any, payload: bytes) -> None:
        if b'"count"' in payload:
            samples.append(watch.stop(operations))
            assert f'"{operations + WARMING}"' in payload.decode(), payload
            reactor.stop()

    _run(port, "/sink", some, received)
    return samples[0]


def receives(port: int, operations: int, decode: bool) -> Sample:
    """Take ``operations`` messages, perhaps decoded."""
    from twisted.internet import reactor

    samples: list[Sample] = []

    def finished(sample: Sample) -> None:
        samples.append(sample)
        reactor.stop()

    # The first is the answer to the registration.
    arrived = counted(operations, finished, WARMING + 1)

    def received(client: Any, payload: bytes) -> None:
        if decode:
            read = json.loads(payload)
            assert read["type"]
        arrived()

    _run(port, f"/flood?{operations + WARMING}&command", lambda client: None, received)
    return samples[0]


def round_trips(port: int, operations: int, as_json: bool) -> Sample:
    """Send one message after the other, each when the one before it was answered."""
    from twisted.internet import reactor

    watch, samples = Watch(), []
    took: list[float] = []
    payload, data = message(0), content(0)
    sent_at = 0.0

    def received(client: Any, answer: bytes) -> None:
        nonlocal sent_at
        if as_json:
            assert json.loads(answer)["type"]
        now = time.perf_counter()
        if sent_at:
            took.append(now - sent_at)
        if len(took) == WARMING:
            watch.start()
        if len(took) == operations + WARMING:
            samples.append(watch.stop(operations, p50=percentile(took[WARMING:], 0.5) * 1e6))
            reactor.stop()
            return
        sent_at = time.perf_counter()
        client.sendMessage(json.dumps(data).encode() if as_json else payload)

    _run(port, "/ack", lambda client: None, received)
    return samples[0]
