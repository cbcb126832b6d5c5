"""
Messages, one a line: what the decoder makes of each, and what a whole link makes of them all.

Flags: 1 speaks commsmgr.v1, else plain; 2 lets the messages be binary; 4 lets results be in flight; 8 registers first.
A line that begins with ``!`` is the payload of a pong, one of only ``+`` is ten seconds of silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from twisted.internet.task import Clock

from commsmgr import config, form
from commsmgr.errors import PeerViolation
from commsmgr.messages import FromAgent, FromBackend, HeartbeatAnswer, Push
from commsmgr.observe.metrics import Metrics
from commsmgr.session import wire
from commsmgr.session.wire import Decoder, Malformed, decode_old_result, encode
from tests import strategies, test_heartbeats
from tests.fuzz.kit import Input, nothing_wrong, promise
from tests.link_kit import LinkBench, Recorder, entry, pass_time

INSTRUMENT = (
    "commsmgr.sanitise",
    "commsmgr.form",
    "commsmgr.session",
    "commsmgr.openlink",
    "commsmgr.answers",
    "commsmgr.liveness",
    "commsmgr.heartbeats",
)

TOKENS = (
    *(f'"{name}"'.encode() for name in ("type", "id", "ids", "data", "args", "options", "timeout", "retry_after")),
    *(f'"{struct.__struct_config__.tag}"'.encode() for struct in strategies.INBOUND["agent"][:8]),
    b'{"type":"',
    b'"machine_id":"m1"',
    b'"reconnect_after":1e9',
    b'"heartbeat_interval":1',
    b"\\ud800",
    b"\\u0000",
    *(fragment for fragment in strategies.FRAGMENTS if 0 < len(fragment) < 30),
)

LIMIT = 4096
DEPTH = 10
WINDOW = 4

_from_backend: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=LIMIT, max_depth=DEPTH)
_from_agent: Decoder[FromAgent] = Decoder(FromAgent, max_bytes=LIMIT, max_depth=DEPTH)


def one(data: bytes) -> None:
    """See that each message is understood or refused, and that a link outlives them all."""
    given = Input(data)
    v1, binary, results, registered = (bool(given.flags >> bit & 1) for bit in range(4))
    lines = given.rest.split(b"\n")
    with nothing_wrong():
        for line in lines:
            _decoded(_from_backend, FromBackend, line)
            _decoded(_from_agent, FromAgent, line)
            _judged_alike(line)
            decode_old_result(line)
        _answer(lines[0])
        _link(lines, v1=v1, is_text=not binary, results=results, registered=registered)


def _decoded(decoder: Decoder[msgspec.Struct], union: object, line: bytes) -> None:
    """What is refused has a reason that can be logged; what is taken means the same when it is written again."""
    try:
        message = decoder.decode(line, True)
    except Malformed as error:
        promise(error.reason and error.reason.replace("-", "").isalnum(), "no reason", error)
        promise(error.detail.isprintable() and len(error.detail) <= 300, "the detail cannot be logged", error)
        return
    promise(line.decode() is not None, "not UTF-8")
    if isinstance(message, Push):
        promise(message.payload == line, "a push is not as it came", message)
        promise(isinstance(json.loads(line), dict), "a push is no object", line)
    else:
        promise(msgspec.json.decode(encode(message), type=union) == message, "not the same when written again", message)


def _judged_alike(line: bytes) -> None:
    """What one look settles is what the checks one by one say."""
    verdicts = []
    for is_plain in (form.is_plain, lambda payload: False):
        wire.is_plain = is_plain
        try:
            verdicts.append(repr(_from_backend.decode(line, True)))
        except Malformed as error:
            verdicts.append(f"{error.reason}, {error.detail}, {error.id}")
        finally:
            wire.is_plain = form.is_plain
    promise(verdicts[0] == verdicts[1], "one look and one check after the other differ", *verdicts)


def _answer(body: bytes) -> None:
    """The answer to a heartbeat is one, or a PeerViolation."""
    fixture = test_heartbeats.HeartbeatTests("test_content")
    fixture.setUp()
    outcomes: list[Any] = []
    fixture.send().addBoth(outcomes.append)
    fixture.requests.waiting[-1].callback(test_heartbeats.answer(body))
    (outcome,) = outcomes
    understood = isinstance(outcome, HeartbeatAnswer)
    promise(understood or isinstance(outcome.value, PeerViolation), "no end of a heartbeat", outcome)
    promise(understood or not fixture.commands, "commands of an answer that was refused")


def _link(lines: list[bytes], *, v1: bool, is_text: bool, results: bool, registered: bool) -> None:
    clock, recorder = Clock(), Recorder()
    clock.advance(1000)
    bench = LinkBench(
        clock,
        v1=v1,
        settings=config.WebSocket(window_messages=WINDOW, window_bytes=1000),
        metrics=Metrics(CollectorRegistry(), seconds=clock.seconds),
        events=recorder.events,
    )
    link, connection = bench.link, bench.connection
    if registered:
        bench.register()
    if results and link.sendable:
        link.send([entry(seq) for seq in range(WINDOW)], "now")
    for line in lines:
        link.heard()
        if line == b"+":
            pass_time(clock, 10)
        elif line.startswith(b"!"):
            link.pong(line[1:])
        else:
            link.received(line, is_text)
        if connection.killed:
            break
    pass_time(clock, 0)
    in_flight = link.in_flight
    promise(link.ended() == in_flight, "another number was in flight at the end")
    promise(not clock.getDelayedCalls(), "timers are left", clock.getDelayedCalls())
    before = len(recorder.log)
    for line in lines[:3]:
        link.received(line, is_text)
    promise(len(recorder.log) == before, "events after the end", recorder.log[before:])
    settled = [seq for what, *rest in recorder.log for seq in _seqs(what, rest)]
    promise(len(settled) == len(set(settled)), "settled twice", settled)
    promise(set(settled) <= set(range(WINDOW)), "settled what was not sent", settled)
    promise(not connection.texts("ack"), "acknowledged what nobody stored")
    promise(v1 or not connection.texts("nack"), "a word that the plain dialect does not have")


def _seqs(what: str, rest: list[object]) -> list[int]:
    """Return the numbers of the results that an event settles."""
    if what == "receipts":
        return list(rest[0])  # type: ignore[call-overload]  # the recorder's
    return [rest[0]] if what == "refused" else []  # type: ignore[list-item]  # as above


def seeds() -> Iterator[bytes]:
    """Yield each type of message, and mixtures of good and bad ones, always the same."""
    found: list[bytes] = []
    for message in {*strategies.INBOUND["agent"], *strategies.INBOUND["backend"]}:
        found += strategies.examples(strategies.valid(message).map(strategies.encoded), 4)
    found += strategies.examples(strategies.hostile(*strategies.INBOUND["agent"]), 40)
    for index, payload in enumerate(sorted(payload.replace(b"\n", b" ") for payload in found)):
        yield bytes([0, index % 16]) + payload[:2000]
    acks = b'{"type":"ack","ids":["e0","e1","e0"]}\n{"type":"nack","id":"e2","data":{"retry_after":5}}'
    for flags in range(16):
        yield bytes([0, flags]) + acks
        yield bytes([0, flags]) + b'!nonce!\n+\n{"type":"registration_ack","data":{"machine_id":"m1"}}'
        yield bytes([0, flags]) + b'{"type":"goaway","data":{"window":5}}\n{"type":"settings","data":{}}\n+\n+\n+\n+\n+'
