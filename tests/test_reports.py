"""Heartbeats and inventories: what is in them, what comes of the answers."""

from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import ConnectFailed, InvalidMessage, NotRunning, PeerViolation
from commsmgr.messages import Inventory, JSONObject, LossReport, SystemHealth
from commsmgr.observe.metrics import Metrics
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor
from commsmgr.reports import LONG, Heartbeats, Identity, Inventories
from commsmgr.session.conversation import CommandArrived
from commsmgr.spool import Entry, Lane
from commsmgr.status import QueueStatus
from tests.command_kit import CommandWorld

WHOLE = config.Config(
    backends=(config.Backend(url="http://localhost"),),
    inventory=config.Inventory(resend_after=100.0),
    delivery=config.Delivery(max_body_bytes=4096),
)
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
    """A machine whose inventory a test sets."""

    def __init__(self) -> None:
        self.data: Any = {"system": {"hostname": "h"}}

    def inventory(self) -> JSONObject:
        data: JSONObject = self.data
        return data

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


class InventoryTests(SynchronousTestCase):
    """The state."""

    def setUp(self) -> None:
        self.world = CommandWorld()
        self.machine = Machine()
        self.now = 1000.0
        self.number = 0
        self.inventories = self.make()
        self.reader = self.world.spool.outbox.reader(Lane.STATE)

    def make(self, **changes: Any) -> Inventories:
        parameters: dict[str, Any] = {
            "identity": IDENTITY,
            "machine": self.machine,
            "outbox": self.world.spool.outbox,
            "whole": WHOLE,
            "redactor": Redactor([r"\d{4}-\d{4}"]),
            "in_thread": maybeDeferred,
            "wall": lambda: self.now,
            "timestamp": lambda: f"t{self.now:g}",
            "new_id": self.new_id,
            "metrics": self.world.metrics,
        }
        return Inventories(**(parameters | changes))

    def new_id(self) -> str:
        self.number += 1
        return f"i{self.number}"

    def send(self, data: Any = None, **options: Any) -> Any:
        return self.world.get(Deferred.fromCoroutine(self.inventories.send(data, **options)))

    def take(self) -> list[Entry]:
        return list(self.reader.take(10, 1 << 20))

    def deliver(self, body: bytes = b'{"status":"ok"}') -> Entry:
        (entry,) = self.take()
        self.inventories.delivered(entry, answer(body))
        self.world.get(self.world.spool.outbox.forget([entry.seq]))
        return entry

    def counted(self, outcome: str) -> float:
        return self.world.counted("inventory", outcome, "out")

    def test_content(self) -> None:
        """An inventory is a state with the machine's data; the checksum is of the bytes of ``data`` in the body."""
        self.machine.data = {"b": [1, 2.5, "é"], "a": {"x": None}}
        self.assertEqual(self.send(), "i1")
        (entry,) = self.take()
        self.assertEqual((entry.lane, entry.kind, entry.id, entry.key), (Lane.STATE, "inventory", "i1", "inventory"))
        body = msgspec.json.decode(entry.body)
        self.assertEqual(
            {name: body[name] for name in ("machine_id", "timestamp", "type", "data")},
            {"machine_id": "machine-1", "timestamp": "t1000", "type": "inventory", "data": self.machine.data},
        )
        raw = entry.body.partition(b'"data":')[2]
        data = bytes(msgspec.json.decode(entry.body, type=dict[str, msgspec.Raw])["data"])
        self.assertTrue(raw.startswith(data))
        self.assertEqual(body["checksum"], sha256(data).hexdigest())

    def test_unchanged(self) -> None:
        """What the backend has is not sent again until its time is over, volatile numbers apart."""
        self.machine.data = {"hardware": {"disk": {"size": 9, "used": 1}}}
        self.send()
        self.deliver()
        self.assertEqual(self.inventories.last_accepted, "t1000")
        self.machine.data = {"hardware": {"disk": {"size": 9, "used": 2}}}
        self.now += 99
        self.assertIsNone(self.send())
        self.assertEqual((self.take(), self.counted("unchanged")), ([], 1))
        self.now += 1
        self.assertEqual(self.send(), "i2")

    def test_changed(self) -> None:
        """News is sent at once, and then counts as what the backend has."""
        self.send({"a": 1})
        self.deliver()
        self.assertEqual(self.send({"a": 2}), "i2")
        self.deliver()
        self.assertIsNone(self.send({"a": 2}))
        self.assertEqual(self.send({"a": 1}), "i3")

    def test_order_of_keys(self) -> None:
        """The order of keys is no news."""
        self.send({"a": 1, "b": 2})
        self.deliver()
        self.assertIsNone(self.send({"b": 2, "a": 1}))

    def test_force(self) -> None:
        """The caller may insist."""
        self.send({"a": 1})
        self.deliver()
        self.assertEqual(self.send({"a": 1}, force=True), "i2")

    def test_not_delivered(self) -> None:
        """Until it is delivered nothing is known of the backend; a newer one replaces one that waits."""
        self.send({"a": 1})
        self.assertEqual(self.send({"a": 1}), "i2")
        self.assertEqual([entry.id for entry in self.take()], ["i2"])
        self.assertEqual(self.world.spool.outbox.stats.states, 1)

    def test_replaced_in_flight(self) -> None:
        """The receipt of an older one says nothing of the newer one's content."""
        self.send({"a": 1})
        (older,) = self.take()
        self.send({"a": 2})
        self.inventories.delivered(older, answer())
        self.assertEqual(self.send({"a": 2}), "i3")

    def test_clock_stepping_back(self) -> None:
        """After a step back of the clock the age is not known: it is sent."""
        self.send({"a": 1})
        self.deliver()
        self.now -= 1
        self.assertEqual(self.send({"a": 1}), "i2")

    def test_delivered_after_a_restart(self) -> None:
        """One that an earlier run accepted is delivered; its content is not known any more, so it is sent once more."""
        self.send({"a": 1})
        self.inventories = self.make()
        self.deliver()
        self.assertEqual((self.inventories.last_accepted, self.send({"a": 1})), ("t1000", "i2"))

    def test_checksum_differs(self) -> None:
        """A backend that stored something else gets it again, and the log says so."""
        self.send({"a": 1})
        self.deliver(b'{"status":"ok","checksum_received":"beef"}')
        self.assertEqual(self.counted("checksum-differs"), 1)
        self.assertEqual(self.send({"a": 1}), "i2")

    def test_checksum_agrees(self) -> None:
        """The checksum that was sent is as good as none."""
        self.send({"a": 1})
        (entry,) = self.take()
        checksum = msgspec.json.decode(entry.body)["checksum"]
        self.inventories.delivered(entry, answer(msgspec.json.encode({"checksum_received": checksum})))
        self.assertIsNone(self.send({"a": 1}))
        self.assertEqual(self.counted("checksum-differs"), 0)

    def test_another_is_held(self) -> None:
        """A backend that has another than it took last gets an inventory again, and the log says so once."""
        for number, other in enumerate(("beef", ""), 1):
            self.send({"a": 1})
            self.deliver()
            accepted = self.inventories.accepted_checksum
            self.inventories.held(accepted, expected=accepted)
            self.assertIsNone(self.send({"a": 1}))
            for _ in range(2):
                self.inventories.held(other, expected=accepted)
            self.assertEqual((self.counted("checksum-differs"), self.inventories.accepted_checksum), (number, ""))
        self.assertEqual(self.send({"a": 1}), "i3")

    def test_another_may_be_held(self) -> None:
        """Nothing follows from what a backend had before it took one, while one is on its way, or in a new run."""
        self.inventories.held("beef", expected="")
        self.send({"a": 1})
        self.deliver()
        before = self.inventories.accepted_checksum
        self.send({"a": 2})
        self.inventories.held("beef", expected=before)
        self.deliver()
        self.inventories.held("beef", expected=before)
        self.assertIsNone(self.send({"a": 2}))
        self.assertEqual(self.counted("checksum-differs"), 0)

    def test_answers_that_say_nothing(self) -> None:
        """A 2xx is a receipt even when its body cannot be read; that is counted."""
        for number, (body, reason) in enumerate(
            (
                (b"", "not-json"),
                (b"OK", "not-json"),
                (b'{"checksum_received":5}', "bad-fields"),
                (b'{"checksum_received":"\\u001b[2J"}', "bad-fields"),
                (b'{"status":"\xff"}', "not-utf8"),
                (b'{"checksum_received":"a","checksum_received":""}', "duplicate-key"),
            ),
            1,
        ):
            before = self.invalid(reason)
            self.send({"a": number})
            self.deliver(body)
            self.assertIsNone(self.send({"a": number}))
            self.assertEqual(self.invalid(reason), before + 1)

    def invalid(self, reason: str) -> float:
        return self.world.registry.get_sample_value("commsmgr_invalid_messages_total", {"reason": reason}) or 0.0

    def test_invalid(self) -> None:
        """What is no JSON object is refused with a typed error, from the caller and from the machine."""
        deep: Any = {}
        for _ in range(100_000):
            deep = {"a": deep}
        circle: dict[str, Any] = {}
        circle["a"] = [circle]
        for data, said in (
            ([], "not list"),
            ("text", "not str"),
            (5, "not int"),
            ({"a": object()}, "type object at or below 'a'"),
            ({"a": {"b": b"bytes"}}, "type bytes at or below 'b'"),
            ({"a": {1, 2}}, "type set"),
            ({"a": [float("nan")]}, "nan at or below 'a'"),
            ({"a": float("-inf")}, "-inf"),
            ({"a": 1 << 64}, "64 bits"),
            ({1: 2}, "key of type int"),
            ({None: 2}, "key of type NoneType"),
            (dict.fromkeys(["a\udc80", "a\udc81"]), "two keys"),
            (deep, "levels"),
            (circle, "circle"),
            ({"a": [None] * (1 << 20)}, "values"),
        ):
            error = self.assertRaises(InvalidMessage, self.send, data)
            self.assertIn(said, str(error))
        self.machine.data = ["no object"]
        self.assertRaises(InvalidMessage, self.send)
        self.assertEqual((self.take(), self.number), ([], 0))
        self.assertEqual(self.send({"a": 1}), "i1", "one that was refused stands in nobody's way")

    def test_names_that_are_no_unicode(self) -> None:
        """One strange file name keeps no inventory from being sent."""
        self.send({"a\udc80": ["b\udcff", {"c": ("\U0001f600", (1 << 64) - 1)}]})
        data = msgspec.json.decode(self.take()[0].body)["data"]
        self.assertEqual(data, {"a\ufffd": ["b\ufffd", {"c": ["\U0001f600", (1 << 64) - 1]}]})

    def test_secrets(self) -> None:
        """Secrets are gone before anything is stored; the checksum is that of what is sent."""
        data = {"users": [{"name": "me", "dbPassword": "hunter2"}], "note": "card 1234-5678"}
        self.send(data)
        body = msgspec.json.decode(self.take()[0].body, type=Inventory)
        self.assertEqual(
            msgspec.json.decode(body.data), {"users": [{"name": "me", "dbPassword": MARK}], "note": f"card {MARK}"}
        )
        self.assertEqual(body.checksum, sha256(bytes(body.data)).hexdigest())

    def test_in_order(self) -> None:
        """One that takes long is not overtaken, and what the caller does to it meanwhile has no effect."""
        working: list[Any] = []

        def in_thread(function: Any) -> Deferred[Any]:
            working.append((function, Deferred()))
            return working[-1][1]

        self.inventories = self.make(whole=config.Config(backends=WHOLE.backends), in_thread=in_thread)
        data = {"a": "x" * LONG}
        first = Deferred.fromCoroutine(self.inventories.send(data))
        second = Deferred.fromCoroutine(self.inventories.send({"a": "second"}))
        data["a"] = "changed"
        self.world.run()
        self.assertNoResult(second)
        ((function, waiting),) = working
        waiting.callback(function())
        self.assertEqual((self.world.get(first), self.world.get(second)), ("i1", "i2"))
        (entry,) = self.take()
        self.assertEqual((entry.id, msgspec.json.decode(entry.body)["data"]), ("i2", {"a": "second"}))

    def test_too_large(self) -> None:
        """The limit is that of the whole body."""
        error = self.assertRaises(InvalidMessage, self.send, {"a": "x" * 4096})
        self.assertIn("4096", str(error))
        self.send({"a": "x" * 3000})

    def test_spool_closed(self) -> None:
        """What could not be kept is told, and is not taken for sent."""
        self.world.get(self.world.spool.close())
        self.assertRaises(NotRunning, self.send, {"a": 1})

    def test_cancelled(self) -> None:
        """Who stops waiting for the machine sends nothing."""
        machine: Deferred[JSONObject] = Deferred()
        self.inventories = self.make(in_thread=lambda function: machine)
        waiting = Deferred.fromCoroutine(self.inventories.send())
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.world.run()
        self.assertEqual(self.take(), [])
