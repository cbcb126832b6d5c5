"""What the tests of links, backends, requests and delivery share: fakes of what stands around them, on a clock."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from commsmgr import config
from commsmgr.auth.authorization import Authorization
from commsmgr.backends import Backends, Line
from commsmgr.errors import CommsError, DeadlineExceeded
from commsmgr.messages import FromBackend
from commsmgr.observe.metrics import Metrics
from commsmgr.openlink import LinkEvents, OpenLink
from commsmgr.policy.breaker import Breaker
from commsmgr.policy.tokens import TokenTable
from commsmgr.redact import Redactor
from commsmgr.requests import Requests
from commsmgr.session.conversation import Conversation, GoingAway
from commsmgr.session.wire import Decoder
from commsmgr.spool import Entry, Lane
from commsmgr.transport.http import HTTPResponse
from commsmgr.transport.websocket import Connection
from commsmgr.urls import http_target

MACHINE = "m1"
TIMESTAMP = "2026-01-01T00:00:00Z"


def differences(fake: object, real: type) -> list[str]:
    """Return how the public methods of ``fake`` that ``real`` has, or should have, differ from those."""
    wrong = []
    for name, method in inspect.getmembers(type(fake), inspect.isfunction):
        if name.startswith("_") or getattr(method, "only_for_tests", False):
            continue
        own = getattr(real, name, None)
        if own is None:
            wrong.append(f"{real.__name__} has no {name}")
            continue
        mine, theirs = (
            [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
            for function in (method, own)
        )
        if mine != theirs or inspect.iscoroutinefunction(method) != inspect.iscoroutinefunction(own):
            wrong.append(f"{name}: {mine} is not {theirs}")
    return wrong


def only_for_tests(function: Any) -> Any:
    """Mark a method of a fake that the real thing does not have."""
    function.only_for_tests = True
    return function


def due(clock: Clock) -> list[float]:
    """Return when the calls on ``clock`` are due, the next first."""
    return sorted(call.getTime() for call in clock.getDelayedCalls())


def pass_time(clock: Clock, seconds: float = 0.0) -> None:
    """Let time pass, from one call to the next, so that each finds the time at which it is due."""
    end = clock.seconds() + seconds
    while (times := due(clock)) and times[0] <= end:
        clock.advance(max(times[0] - clock.seconds(), 0.0))
    clock.advance(max(end - clock.seconds(), 0.0))


def conversation(v1: bool) -> Conversation:
    """Return a conversation whose ids and times are known."""
    decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=65536, max_depth=10)
    return Conversation(
        machine_id=MACHINE,
        hostname="host",
        agent_version="1",
        v1=v1,
        decoder=decoder,
        new_id=lambda: "id-1",
        timestamp=lambda: TIMESTAMP,
    )


def entry(seq: int, body: bytes = b'{"a":1}', *, id: str = "", kind: str = "command_result") -> Entry:
    """Return a result as the outbox hands it out."""
    return Entry(seq=seq, lane=Lane.EVENT, kind=kind, id=id or f"e{seq}", body=body, accepted_at=0.0)


class FakeConnection:
    """
    An open WebSocket that writes down what is done to it.

    :ivar wire: ``("text", message)``, ``("ping", payload)``, in order.
    :ivar is_open: what a closed one says to every attempt to send.
    """

    def __init__(self) -> None:
        self.tls = "TLSv1.3"
        self.subprotocol: str | None = None
        self.opened_at = 0.0
        self.is_open = True
        self.wire: list[tuple[str, Any]] = []
        self.closed: list[int] = []
        self.killed: list[CommsError] = []
        self.answers = 0

    def send(self, payload: bytes) -> bool:
        return self.send_many([payload])

    def send_many(self, payloads: Sequence[bytes]) -> bool:
        if self.is_open:
            self.wire += [("text", json.loads(payload)) for payload in payloads]
        return self.is_open

    def ping(self, payload: bytes) -> bool:
        if self.is_open:
            self.wire.append(("ping", payload))
        return self.is_open

    def answered(self) -> None:
        self.answers += 1

    def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed.append(code)

    def kill(self, error: CommsError) -> None:
        self.killed.append(error)

    @only_for_tests
    def take(self) -> list[tuple[str, Any]]:
        """Return what was sent since the last call."""
        taken, self.wire = self.wire, []
        return taken

    @only_for_tests
    def texts(self, kind: str) -> list[dict[str, Any]]:
        """Return the messages of one type sent so far."""
        return [message for what, message in self.wire if what == "text" and message["type"] == kind]

    @only_for_tests
    def pings(self) -> list[bytes]:
        """Return the payloads of the pings sent so far."""
        return [payload for what, payload in self.wire if what == "ping"]

    @only_for_tests
    def results(self) -> list[str]:
        """Return the ids of the results sent so far."""
        return [message["id"] for message in self.texts("command_result")]


class Recorder:
    """Writes down the events of links."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.events = LinkEvents(
            registered=lambda link: self.log.append(("registered",)),
            ended=lambda link: self.log.append(("ended",)),
            receipts=lambda link, seqs: self.log.append(("receipts", list(seqs))),
            refused=lambda link, seq, refusal: self.log.append(("refused", seq, refusal.code, refusal.retry_after)),
            command=lambda link, command: self.log.append(("command", command.id)),
            pushed=lambda push: self.log.append(("pushed", push.type)),
            settings=lambda settings: self.log.append(("settings", settings.heartbeat_interval)),
            losses_acked=lambda told: self.log.append(("losses-acked", told)),
            losses_refused=lambda refusal: self.log.append(("losses-refused", refusal.id, refusal.retry_after)),
        )

    def take(self) -> list[tuple[Any, ...]]:
        """Return what happened since the last call."""
        taken, self.log = self.log, []
        return taken


class LinkBench:
    """An open link on a fake connection, and the backend at the other end of it."""

    def __init__(
        self,
        clock: Clock,
        *,
        v1: bool,
        settings: config.WebSocket,
        metrics: Metrics,
        events: LinkEvents,
        backend: str = "one",
    ) -> None:
        self.connection = FakeConnection()
        self.going: list[GoingAway] = []
        self.ended = False
        self.on_registered: Callable[[], None] = lambda: events.registered(self.link)
        self.link = OpenLink(
            self.connection,  # type: ignore[arg-type]  # a fake; its methods are compared with the real ones
            conversation(v1),
            backend=backend,
            v1=v1,
            nonce=b"nonce!",
            settings=settings,
            clock=clock,
            metrics=metrics,
            events=events,
            on_registered=lambda: self.on_registered(),
            on_going_away=self.going.append,
        )
        self.link.start()

    def say(self, message: Mapping[str, Any] | bytes) -> None:
        """The backend sends a message."""
        self.link.heard()
        self.link.received(message if isinstance(message, bytes) else json.dumps(message).encode(), True)

    def register(self) -> None:
        """The backend answers the registration."""
        self.say({"type": "registration_ack", "id": "x", "timestamp": "", "data": {"machine_id": MACHINE}})

    def ack(self, *ids: str) -> None:
        """The backend has these messages."""
        self.say({"type": "ack", "ids": ids})

    def nack(self, id: str, **data: Any) -> None:
        """The backend does not take this message."""
        self.say({"type": "nack", "id": id, "data": {"code": "busy", "message": "no", **data}})

    def goaway(self, reconnect_after: float = 5, window: float = 10) -> None:
        """The backend announces that it leaves."""
        self.say({"type": "goaway", "data": {"reconnect_after": reconnect_after, "window": window}})

    def pong(self, payload: bytes | None = None) -> None:
        """The backend answers a ping, the last one unless said."""
        self.link.heard()
        self.link.pong(self.connection.pings()[-1] if payload is None else payload)


class Call(NamedTuple):
    """One exchange that was asked for."""

    at: float
    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    token: str
    timeout: float | None


HANG = "hang"
"""An outcome: no answer before the exchange's time is over."""


def answer(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"{}") -> HTTPResponse:
    """Return an answer."""
    return HTTPResponse(status, {"content-type": "application/json", **(headers or {})}, body, 0.01)


class FakeHTTP:
    """
    Exchanges whose outcomes the test writes down: a status, an answer, an error, a Deferred, or :data:`HANG`.

    :ivar script: the next outcomes; when it is empty, ``default`` is one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.calls: list[Call] = []
        self.script: list[Any] = []
        self.default: Any = 200
        self.cancelled = 0
        self.closed = 0

    def exchange(
        self,
        method: str,
        target: object,
        path: str,
        *,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: Mapping[str, str] = MappingProxyType({}),
        token: str = "",
        timeout: float | None = None,
    ) -> Deferred[HTTPResponse]:
        self.calls.append(Call(self._clock.seconds(), method, path, body, headers, token, timeout))
        outcome = self.script.pop(0) if self.script else self.default
        match outcome:
            case int():
                return succeed(answer(outcome))
            case HTTPResponse():
                return succeed(outcome)
            case Exception():
                return fail(outcome)
            case Deferred():
                return outcome
        assert timeout is not None
        hanging: Deferred[HTTPResponse] = Deferred(self._cancel)
        expired = DeadlineExceeded("no answer", may_have_arrived=True)
        timer = self._clock.callLater(timeout, hanging.errback, expired)
        return hanging.addBoth(lambda value: (timer.active() and timer.cancel(), value)[1])

    def _cancel(self, hanging: Deferred[HTTPResponse]) -> None:
        self.cancelled += 1

    def close(self, within: float = 1.0) -> Deferred[None]:
        self.closed += 1
        return succeed(None)


class FakeLink:
    """The WebSocket of one backend; it fails when the test says so, and its goodbye takes as long as the test wants."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log
        self.failures = 0
        self.on_failed: Callable[[], None] | None = None
        self.goodbye: Deferred[int] | None = None
        self.on_start: Callable[[], None] = lambda: None

    def start(self, *, afresh: bool = False) -> None:
        self._log.append(f"start {self.name}" + " afresh" * afresh)
        if afresh:
            self.failures = 0
        self.on_start()

    @only_for_tests
    def fail(self, times: int = 1) -> None:
        """Let attempts fail."""
        for _ in range(times):
            self.failures += 1
            assert self.on_failed is not None
            self.on_failed()

    async def stop(self, deadline: float) -> int:
        self._log.append(f"stop {self.name}")
        left = 0 if self.goodbye is None else await self.goodbye
        self._log.append(f"gone {self.name}")
        return left


class FakeToken:
    """Gives ``token``; a refused one is replaced by the next of ``newer``."""

    def __init__(self, *tokens: str) -> None:
        self.token, *self.newer = tokens or ("t0",)
        self.refusals: list[str] = []
        self.outcome: Any = None

    def get(self) -> Deferred[str]:
        if self.outcome is None:
            return succeed(self.token)
        if callable(self.outcome):
            self.outcome()
        return fail(self.outcome) if isinstance(self.outcome, Exception) else self.outcome

    def refused(self, token: str) -> None:
        self.refusals.append(token)
        if token == self.token and self.newer:
            self.token = self.newer.pop(0)


def authorized(
    token: FakeToken, clock: Clock, metrics: Metrics, random: Random, settings: config.Auth, **parameters: Any
) -> Authorization:
    """Return what links and requests ask for a token."""
    return Authorization(
        token,
        source="provider",
        table=TokenTable(refused_delay=settings.refused_delay, random=random),
        clock=clock,
        wall=parameters.pop("wall", clock.seconds),
        redactor=Redactor(),
        metrics=metrics,
        **parameters,
    )


class House:
    """Real backends, breakers and requests, on a clock, over fake links and fake HTTP."""

    def __init__(self, *names: str, clock: Clock | None = None, **sections: Any) -> None:
        if clock is None:
            clock = Clock()
            clock.advance(1000)
        self.clock = clock
        self.random = Random(7)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        self.config = config.Config(
            backends=tuple(config.Backend(url=f"http://{name}.example", name=name) for name in names or ("one",)),
            **sections,
        )
        self.log: list[str] = []
        self.links = {backend.name: FakeLink(backend.name, self.log) for backend in self.config.backends}
        self.http = {backend.name: FakeHTTP(self.clock) for backend in self.config.backends}
        self.lines = [self._line(backend) for backend in self.config.backends]
        self.breaker = self.lines[0].breaker
        self.backends = Backends(self.lines, whole=self.config, clock=self.clock, metrics=self.metrics)
        self.token = FakeToken("t0", "t1", "t2")
        self.authorization = authorized(self.token, self.clock, self.metrics, self.random, self.config.auth)
        self.requests = Requests(
            self.backends,
            self.config,
            self.authorization,
            clock=self.clock,
            wall=self.clock.seconds,
            random=self.random,
        )

    def _line(self, backend: config.Backend) -> Line:
        return Line(
            name=backend.name,
            http_target=http_target(backend),
            breaker=Breaker(self.config.breaker, self.clock.seconds, self.random),
            http=self.http[backend.name],  # type: ignore[arg-type]  # a fake; compared with the real one
            link=self.links[backend.name],  # type: ignore[arg-type]  # as above
        )

    def take(self) -> list[str]:
        """Return what was done to the links since the last call."""
        taken, self.log[:] = list(self.log), []
        return taken

    def trip(self, name: str) -> None:
        """Let attempts at this backend fail until its breaker is open."""
        breaker = next(line.breaker for line in self.lines if line.name == name)
        while breaker.state != "open":
            assert breaker.try_acquire()
            breaker.failed()

    def count(self, name: str, **labels: str) -> float:
        """Return a number that Prometheus would read, 0 when there is none."""
        return self.registry.get_sample_value(f"commsmgr_{name}", labels) or 0.0


def counterparts() -> list[tuple[object, type]]:
    """Return each fake with what it stands for."""
    from commsmgr.interfaces import TokenProvider
    from commsmgr.link import Link
    from commsmgr.transport.http import HTTPClient

    return [
        (FakeConnection(), Connection),
        (FakeHTTP(Clock()), HTTPClient),
        (FakeLink("", []), Link),
        (FakeToken(), TokenProvider),
    ]
