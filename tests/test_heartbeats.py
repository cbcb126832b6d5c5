"""Heartbeats: what is in them, what comes of the answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import ConnectFailed, InvalidMessage, PeerViolation
from commsmgr.heartbeats import Heartbeats
from commsmgr.machine import Identity
from commsmgr.messages import LossReport, SystemHealth
from commsmgr.observe.metrics import Metrics
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor
from commsmgr.session.conversation import CommandArrived
from commsmgr.status import QueueStatus

WHOLE = config.Config(backends=(config.Backend(url="http://localhost"),))
IDENTITY = Identity("machine-1", "host", "1.2")


def answer(body: bytes = b'{"status":"ok"}', status: int = 200) -> Any:
    """Return a response as far as anybody here looks at it."""
    return SimpleNamespace(status=status, body=body, elapsed=0.01, headers={})


class Requests:
    """Sends nothing, and lets the test answer."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
        self.waiting: list[Deferred[Any]] = []

    def send(self, method: str, path: str, *, body: bytes, check: Any, **others: Any) -> Deferred[Any]:
        self.sent.append((method, path, msgspec.json.decode(body), others))
        self.waiting.append(Deferred())
        return self.waiting[-1].addCallback(lambda response: check(response) and response)


class Machine:
    """A machine that is well."""

    def health(self) -> SystemHealth:
        return SystemHealth(cpu_usage_percent=12.5, status="healthy")


class HeartbeatTests(SynchronousTestCase):
    """The pulse."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(50)
        self.requests = Requests()
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        self.commands: list[CommandArrived] = []
        self.acked_losses: list[str] = []
        self.queue = QueueStatus(
            events=2, event_bytes=30, oldest_event_at=1000.0, outage_budget=77.0, unreported_losses=9
        )
        self.losses: Any = SimpleNamespace(outstanding=None, acked=self.acked_losses.append)
        self.held: list[tuple[str, str]] = []
        self.inventories: Any = SimpleNamespace(
            last_accepted="earlier",
            accepted_checksum="c1",
            held=lambda checksum, expected: self.held.append((checksum, expected)),
        )
        self.beats = self.make(WHOLE)

    def make(self, whole: config.Config) -> Heartbeats:
        requests: Any = self.requests
        return Heartbeats(
            identity=IDENTITY,
            machine=Machine(),
            whole=whole,
            redact=Redactor(),
            requests=requests,
            in_thread=maybeDeferred,
            seconds=self.clock.seconds,
            wall=lambda: 1012.5,
            timestamp=lambda: "now",
            new_id=lambda: "id-1",
            queue=lambda: self.queue,
            activity=lambda: (3, 4),
            inventories=self.inventories,
            on_command=lambda source, command: self.commands.append(command),
            losses=self.losses,
            metrics=self.metrics,
        )

    def send(self, *args: Any, **kwargs: Any) -> Deferred[Any]:
        return Deferred.fromCoroutine(self.beats.send(*args, **kwargs))

    def send_answered(self, body: bytes) -> Deferred[Any]:
        waiting = self.send()
        self.requests.waiting[-1].callback(answer(body))
        return waiting

    def answered(self, body: bytes = b'{"status":"ok"}') -> Any:
        return self.successResultOf(self.send_answered(body))

    def invalid(self, reason: str) -> float:
        return self.registry.get_sample_value("commsmgr_invalid_messages_total", {"reason": reason}) or 0.0

    def counted(self, outcome: str) -> float:
        labels = {"kind": "heartbeat", "direction": "out", "outcome": outcome}
        return self.registry.get_sample_value("commsmgr_messages_total", labels) or 0.0

    def acked(self) -> list[str]:
        ids: list[str] = self.requests.sent[-1][2]["acked_commands"]
        return ids

    def test_content(self) -> None:
        """A heartbeat says who, when, how, and how delivery stands."""
        self.clock.advance(9.7)
        waiting = self.send("busy", deadline=4.0)
        method, path, body, others = self.requests.sent[0]
        self.assertEqual((method, path, others), ("POST", "/heartbeat", {"idempotency_key": "id-1", "deadline": 4.0}))
        self.assertEqual(
            body,
            {
                "machine_id": "machine-1", "hostname": "host", "timestamp": "now", "status": "busy",
                "agent_version": "1.2", "uptime_seconds": 9, "last_inventory": "earlier",
                "system_health": {
                    "cpu_usage_percent": 12.5, "memory_usage_percent": 0.0, "disk_usage_percent": 0.0,
                    "status": "healthy",
                },
                "pending_commands": 3, "active_tasks": 4,
                "delivery": {
                    "queued_events": 2, "queued_bytes": 30, "oldest_event_seconds": 12.5,
                    "outage_budget_seconds": 77.0, "unreported_losses": 9,
                },
                "acked_commands": [],
            },
        )  # fmt: skip
        self.requests.waiting[0].callback(answer(b'{"status":"ok","message":"hi"}'))
        self.assertEqual(self.successResultOf(waiting).message, "hi")
        self.assertEqual((self.counted("acked"), self.counted("failed")), (1, 0))

    def test_age_of_the_oldest(self) -> None:
        """Nothing held is no age, and a clock that stepped back gives no negative one."""
        for at in (None, 2000.0):
            self.queue = QueueStatus(oldest_event_at=at)
            self.answered()
            self.assertEqual(self.requests.sent[-1][2]["delivery"]["oldest_event_seconds"], 0.0)

    def test_confirmed_once(self) -> None:
        """A command in the inbox is confirmed by the next heartbeat, and not by the one after it."""
        self.beats.acknowledge("a")
        self.beats.acknowledge("b")
        self.answered()
        self.assertEqual(self.acked(), ["a", "b"])
        self.answered()
        self.assertEqual(self.acked(), [])

    def test_confirmed_again_after_a_failure(self) -> None:
        """A heartbeat that failed or was cancelled may not have arrived: its confirmations go again, in order."""
        for end in (lambda d: d.errback(ConnectFailed()), lambda d: d.cancel()):
            self.beats.acknowledge("a")
            waiting = self.send()
            self.beats.acknowledge("b")
            end(self.requests.waiting[-1])
            self.failureResultOf(waiting, ConnectFailed, CancelledError)
            self.answered()
            self.assertEqual(self.acked(), ["a", "b"])
        self.assertEqual(self.counted("failed"), 2)

    def test_status_that_is_no_text(self) -> None:
        """What JSON cannot say is refused with a typed error, and loses no confirmation."""
        self.beats.acknowledge("a")
        self.failureResultOf(self.send(object()), InvalidMessage)
        self.answered()
        self.assertEqual(self.acked(), ["a"])

    def test_commands(self) -> None:
        """Commands in the answer arrive, each on its own: a malformed one does not take the others with it."""
        self.answered(
            b'{"status":"ok","commands":[{"type":"command","id":"c1","data":{"type":"run","args":["x"]}},'
            b'{"type":"command","id":7,"data":{}},17,{"type":"other"},{"type":"command","id":"c2","data":{}}]}'
        )
        self.assertEqual([(c.id, c.digest, c.data.type) for c in self.commands], [("c1", "", "run"), ("c2", "", "")])
        self.assertEqual(self.invalid("bad-fields"), 3)

    def test_commands_with_two_meanings(self) -> None:
        """A command that a proxy could read in another way is not taken; the next one is, and the log counts."""
        lines: list[Any] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        twice = b'{"type":"command","id":"c1","data":{"command":"uptime","command":"reboot"}}'
        self.answered(b'{"commands":[%b,%b,{"type":"command","id":"c2","data":{}}]}' % (twice, twice))
        self.assertEqual(([c.id for c in self.commands], self.invalid("duplicate-key")), (["c2"], 2))
        self.assertEqual(
            [line["event"] for line in lines if line.get("event", "").endswith("-command")],
            ["heartbeat.invalid-command"],
        )
        self.failureResultOf(self.send_answered(b'{"acked_losses":"a","acked_losses":"b"}'), PeerViolation)
        self.assertEqual((self.invalid("duplicate-key"), self.acked_losses), (3, [""]))

    def test_unknown_fields(self) -> None:
        """A field of a newer backend is ignored, or refused with its answer or its command, as the operator wants."""
        body = b'{"new":1,"commands":[{"type":"command","id":"c1","data":{"new":[{}]}}]}'
        self.answered(body)
        self.assertEqual([c.id for c in self.commands], ["c1"])
        self.beats = self.make(msgspec.structs.replace(WHOLE, messages=config.Messages(unknown_fields="refuse")))
        self.failureResultOf(self.send_answered(body), PeerViolation)
        self.answered(body.replace(b'"new":1,', b""))
        self.assertEqual((len(self.commands), self.invalid("unknown-field")), (1, 2))

    def test_status_without_secrets(self) -> None:
        """What looks like a secret is not sent, nor what is no Unicode."""
        self.send("password=hunter2 \udc80")
        self.assertEqual(self.requests.sent[0][2]["status"], f"password={MARK} \ufffd")

    def test_losses(self) -> None:
        """An outstanding loss receipt is in each heartbeat; an answer that confirms it is passed on, with its id."""
        row = {"reason": "expired", "kind": "command_result", "count": 2, "first_at": "then", "last_at": "now"}
        self.losses.outstanding = msgspec.convert({"id": "l1", "losses": [row]}, LossReport)
        self.answered()
        self.answered(b'{"acked_losses":"l1"}')
        for sent in self.requests.sent:
            self.assertEqual(sent[2]["delivery"]["losses"], {"id": "l1", "losses": [row]})
        self.assertEqual(self.acked_losses, ["", "l1"])
        self.losses.outstanding = None
        self.answered()
        self.assertNotIn("losses", self.requests.sent[-1][2]["delivery"])

    def test_inventory(self) -> None:
        """Which inventory a backend has is passed on if it says so, with what it had when the heartbeat was sent."""
        waiting = self.send()
        self.inventories.accepted_checksum = "c2"
        self.requests.waiting[-1].callback(answer(b'{"inventory_checksum":"c1"}'))
        self.successResultOf(waiting)
        self.answered(b'{"inventory_checksum":""}')
        self.answered(b'{"inventory_checksum":null}')
        self.answered()
        self.assertEqual(self.held, [("c1", "c1"), ("", "c2")])

    def test_not_a_backend(self) -> None:
        """An answer that is no JSON of a backend is a failure, whatever its status says."""
        for body in (b"<html>hello</html>", b"", b"[]", b'{"status":1}', b'{"status":"\xff"}', b'{"commands":{}}'):
            self.beats.acknowledge("a")
            waiting = self.send()
            self.requests.waiting[-1].callback(answer(body))
            self.failureResultOf(waiting, PeerViolation)
            self.answered()
            self.assertEqual(self.acked(), ["a"])

    def test_refuse(self) -> None:
        """Not to confirm is to refuse: no result need be sent."""
        self.assertTrue(self.beats.refuse("c", "busy", "why", 5.0))
        self.answered()
        self.assertEqual(self.acked(), [])
