"""Inventories: what is in them, when they are sent, what comes of the answers."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import InvalidMessage, NotRunning
from commsmgr.inventories import LONG, Inventories
from commsmgr.messages import Inventory, JSONObject
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor
from commsmgr.spool import Entry, Lane
from tests.command_kit import CommandWorld
from tests.test_heartbeats import IDENTITY, answer

WHOLE = config.Config(
    backends=(config.Backend(url="http://localhost"),),
    inventory=config.Inventory(resend_after=100.0),
    delivery=config.Delivery(max_body_bytes=4096),
)


class Machine:
    """A machine whose inventory a test sets."""

    def __init__(self) -> None:
        self.data: Any = {"system": {"hostname": "h"}}

    def inventory(self) -> JSONObject:
        data: JSONObject = self.data
        return data


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
