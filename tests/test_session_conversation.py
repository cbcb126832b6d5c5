"""A conversation from open to end, in both dialects."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.messages import (
    CommandData,
    FromAgent,
    FromBackend,
    LossReceipt,
    LossReceiptData,
    LossReport,
    LossRow,
    Push,
)
from commsmgr.session.conversation import (
    Acked,
    CommandArrived,
    Conversation,
    Event,
    GoingAway,
    Invalid,
    Nacked,
    Pushed,
    Registered,
    Reply,
    SettingsArrived,
    State,
)
from commsmgr.session.wire import Decoder, command_digest

bounded = settings(deadline=None, max_examples=200, database=None, suppress_health_check=[HealthCheck.too_slow])

ACK = {"type": "registration_ack", "id": "x", "timestamp": "", "data": {"message": "hello", "machine_id": "m1"}}
COMMAND = {"type": "command", "id": "cmd_1", "timestamp": "", "data": {"type": "shell", "command": "uptime"}}
GOAWAY = {"type": "goaway", "data": {"reconnect_after": 5, "window": 60}}
SETTINGS = {"type": "settings", "data": {"heartbeat_interval": 10}}


def conversation(*, v1: bool) -> Conversation:
    """Return a conversation whose ids and times are known."""
    decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4096, max_depth=6)
    return Conversation(
        machine_id="m1",
        hostname="host",
        agent_version="1.2",
        v1=v1,
        decoder=decoder,
        new_id=lambda: "id-1",
        timestamp=lambda: "2026-01-01T00:00:00Z",
    )


class _Tests(SynchronousTestCase):
    v1: bool

    def setUp(self) -> None:
        self.conversation = conversation(v1=self.v1)

    def receive(self, message: object) -> list[Event]:
        return self.conversation.receive(json.dumps(message).encode(), True)

    def reply(self, event: Event) -> Any:
        assert isinstance(event, Reply)
        return json.loads(event.payload)


class BothDialects:
    """What does not depend on the dialect."""

    def test_open(self: Any) -> None:
        """The registration names the machine at the top level, where plain backends look for it."""
        self.assertEqual(
            json.loads(self.conversation.open()),
            {
                "type": "register",
                "machine_id": "m1",
                "id": "id-1",
                "timestamp": "2026-01-01T00:00:00Z",
                "data": {"hostname": "host", "agent_version": "1.2"},
            },
        )

    def test_registration_ack(self: Any) -> None:
        """The first ack registers; a second one says nothing new, whomever it names."""
        self.assertIs(self.conversation.state, State.AWAITING_REGISTRATION)
        ack = {"type": "registration_ack", "data": {"machine_id": "m1", "dedupe_window": 60}}
        self.assertEqual(self.receive(ack), [Registered()])
        self.assertIs(self.conversation.state, State.REGISTERED)
        self.assertEqual(self.receive(ack), [])
        self.assertEqual(self.receive({"type": "registration_ack", "data": {"machine_id": "m2"}}), [])
        self.assertEqual(self.conversation.wait_elapsed(), [])

    def test_bare_registration_ack(self: Any) -> None:
        """An ack that names no machine and no window is an ack."""
        self.assertEqual(self.receive({"type": "registration_ack"}), [Registered()])

    def test_wrong_machine(self: Any) -> None:
        """An ack for another machine is reported and does not register; the right one still does."""
        [event] = self.receive({"type": "registration_ack", "data": {"machine_id": "m2" + "x" * 1000}})
        self.assertEqual(event.reason, "wrong-machine")
        self.assertTrue(event.detail.isprintable())
        self.assertLess(len(event.detail), 300)
        self.assertIs(self.conversation.state, State.AWAITING_REGISTRATION)
        self.assertEqual(self.receive(ACK), [Registered()])

    def test_command_before_registration(self: Any) -> None:
        """Some backends send commands as soon as the socket is open: they count, and do not stand for the ack."""
        [event] = self.receive(COMMAND)
        self.assertEqual((event.id, event.data), ("cmd_1", CommandData(type="shell", command="uptime")))
        self.assertIs(self.conversation.state, State.AWAITING_REGISTRATION)
        self.assertEqual(self.receive(ACK), [Registered()])

    def test_ping(self: Any) -> None:
        """A ping by message is answered with its id, in any state; a pong is nobody's business."""
        [event] = self.receive({"type": "ping", "id": "p1"})
        self.assertEqual(self.reply(event), {"type": "pong", "id": "p1"})
        self.assertEqual(self.receive({"type": "pong", "id": "p1"}), [])

    def test_unknown_type(self: Any) -> None:
        """A type that we do not know reaches the agent whole."""
        payload = b'{"type":"config_update","id":"u1","data":{"a":1}}'
        self.assertEqual(
            self.conversation.receive(payload, True), [Pushed(Push(type="config_update", id="u1", payload=payload))]
        )

    def test_invalid(self: Any) -> None:
        """What cannot be understood is reported by reason, and the conversation goes on."""
        for payload, is_text, reason in (
            (b"<html>", True, "not-json"),
            (b'{"type":"ping"}', False, "binary"),
            (b'{"type":"registration_ack","data":[]}', True, "bad-fields"),
            (b"{}", True, "no-type"),
        ):
            [event] = self.conversation.receive(payload, is_text)
            self.assertIsInstance(event, Invalid)
            self.assertEqual(event.reason, reason)
        self.assertEqual(self.receive(ACK), [Registered()])


class PlainTests(BothDialects, _Tests):
    """What backends of this family have always spoken."""

    v1 = False

    def test_wait_elapsed(self) -> None:
        """A backend that answers nothing counts as registered after the wait; an ack after that says nothing new."""
        self.assertEqual(self.conversation.wait_elapsed(), [Registered()])
        self.assertIs(self.conversation.state, State.REGISTERED)
        self.assertEqual(self.conversation.wait_elapsed(), [])
        self.assertEqual(self.receive(ACK), [])

    def test_wait_elapsed_after_wrong_machine(self) -> None:
        """A backend that spells our id its own way registers by the wait."""
        self.receive({"type": "registration_ack", "data": {"machine_id": "M1"}})
        self.assertEqual(self.conversation.wait_elapsed(), [Registered()])

    def test_command_has_a_digest(self) -> None:
        """Ids collide on plain backends, so that a command comes with what tells it from its namesake."""
        [first] = self.receive(COMMAND)
        assert isinstance(first, CommandArrived)
        self.assertEqual(
            first, CommandArrived("cmd_1", command_digest(CommandData(type="shell", command="uptime")), first.data)
        )
        [again] = self.receive({**COMMAND, "timestamp": "later"})
        [other] = self.receive({**COMMAND, "data": {"type": "shell", "command": "reboot"}})
        assert isinstance(other, CommandArrived)
        self.assertEqual(first, again)
        self.assertNotEqual(first.digest, other.digest)

    def test_types_of_v1_are_unknown(self) -> None:
        """Ack, nack, goaway and settings mean nothing here, well-formed or not: they are pushes and change nothing."""
        for message in (
            {"type": "ack", "ids": ["r1"]},
            {"type": "ack", "ids": 7},
            {"type": "nack", "id": "r1"},
            {"type": "nack"},
            GOAWAY,
            SETTINGS,
            {"type": "settings", "data": "dark mode"},
        ):
            [event] = self.receive(message)
            assert isinstance(event, Pushed)
            self.assertEqual(event.push.type, message["type"])
        self.assertIs(self.conversation.state, State.AWAITING_REGISTRATION)

    def test_malformed_is_not_answered(self) -> None:
        """A plain backend would not know a nack."""
        [event] = self.receive({"type": "command", "id": "cmd_1", "data": {"timeout": "soon"}})
        self.assertIsInstance(event, Invalid)


class V1Tests(BothDialects, _Tests):
    """What commsmgr.v1 adds."""

    v1 = True

    def test_wait_elapsed(self) -> None:
        """Silence is not consent here: the owner ends the link instead."""
        self.assertEqual(self.conversation.wait_elapsed(), [])
        self.assertIs(self.conversation.state, State.AWAITING_REGISTRATION)

    def test_command_without_digest(self) -> None:
        """The id alone decides."""
        self.assertEqual(
            self.receive(COMMAND), [CommandArrived("cmd_1", "", CommandData(type="shell", command="uptime"))]
        )

    def test_loss_receipt(self) -> None:
        """A loss receipt is a message that backends understand, under the receipt's own id."""
        row = LossRow(reason="expired", kind="command_result", count=2, first_at="then", last_at="now")
        payload = self.conversation.loss_receipt(LossReport(id="l1", losses=[row]))
        decoder: Decoder[FromAgent] = Decoder(FromAgent, max_bytes=4096, max_depth=6)
        self.assertEqual(
            decoder.decode(payload, True),
            LossReceipt(id="l1", timestamp="2026-01-01T00:00:00Z", data=LossReceiptData(losses=[row])),
        )

    def test_ack_and_nack(self) -> None:
        """Receipts and refusals come out with all that they say."""
        self.assertEqual(self.receive({"type": "ack", "ids": ["b", "a"]}), [Acked(("b", "a"))])
        self.assertEqual(self.receive({"type": "nack", "id": "r1"}), [Nacked("r1", "", "", None)])
        data = {"code": "busy", "message": "later", "retry_after": 2.5}
        self.assertEqual(self.receive({"type": "nack", "id": "r1", "data": data}), [Nacked("r1", "busy", "later", 2.5)])

    def test_settings(self) -> None:
        """Intervals come out validated; what is out of bounds comes out as invalid, and nothing of it counts."""
        self.assertEqual(self.receive(SETTINGS), [SettingsArrived(10, None)])
        [event] = self.receive({"type": "settings", "data": {"heartbeat_interval": 0.01, "inventory_interval": 60}})
        self.assertIsInstance(event, Invalid)

    def test_goaway(self) -> None:
        """The first goaway drains; commands and acks still count, another goaway or registration does not."""
        self.receive(ACK)
        self.assertEqual(self.receive(GOAWAY), [GoingAway(5, 60)])
        self.assertIs(self.conversation.state, State.DRAINING)
        self.assertEqual(self.receive(GOAWAY), [])
        self.assertEqual(self.receive(ACK), [])
        self.assertEqual(self.receive({"type": "ack", "ids": ["a"]}), [Acked(("a",))])
        self.assertEqual(len(self.receive(COMMAND)), 1)

    def test_goaway_instead_of_registration(self) -> None:
        """A backend that is leaving may say so at once: the registration that follows comes too late."""
        self.assertEqual(self.receive(GOAWAY), [GoingAway(5, 60)])
        self.assertEqual(self.receive(ACK), [])
        self.assertIs(self.conversation.state, State.DRAINING)

    def test_nack_on_one_line(self) -> None:
        """What a backend says of a refusal is logged and kept: one line, and not an endless one."""
        [event] = self.receive({"type": "nack", "id": "r1", "data": {"message": "no\n\x1b[2J" + "x" * 4000}})
        assert isinstance(event, Nacked)
        self.assertTrue(event.message.startswith("no\\n\\x1b[2Jxxx"))
        self.assertLess(len(event.message), 1100)

    def test_malformed_command_is_nacked(self) -> None:
        """A command that we can never take is refused for good, or it would come again after every registration."""
        invalid, reply = self.receive({"type": "command", "id": "cmd_1", "data": {"timeout": "soon"}})
        assert isinstance(invalid, Invalid)
        self.assertEqual(
            self.reply(reply),
            {
                "type": "nack",
                "id": "cmd_1",
                "data": {"code": "bad-fields", "message": invalid.detail, "retry_after": None},
            },
        )

    def test_malformed_answers_are_not_answered(self) -> None:
        """A nack of a nack would speak of the wrong message, and could go on for ever."""
        for message in ({"type": "nack", "id": "r1", "data": 7}, {"type": "ack", "id": "r1"}):
            [event] = self.receive(message)
            self.assertIsInstance(event, Invalid)

    def test_frames(self) -> None:
        """Acks are batched, nacks say when to come again."""
        self.assertEqual(json.loads(self.conversation.ack(iter(["a", "b"]))), {"type": "ack", "ids": ["a", "b"]})
        self.assertEqual(
            json.loads(self.conversation.nack("a", "full", "no room", 30.0)),
            {"type": "nack", "id": "a", "data": {"code": "full", "message": "no room", "retry_after": 30.0}},
        )


short = st.text(max_size=3)
scraps = st.none() | st.booleans() | st.integers() | st.floats() | short | st.lists(short, max_size=3)
types = ["registration_ack", "command", "ping", "pong", "ack", "nack", "goaway", "settings", "config_update"]
keys = ["machine_id", "dedupe_window", "command", "args", "timeout", "options", "retry_after", "window"]

messages = st.fixed_dictionaries(
    {"type": st.sampled_from(types)},
    optional={
        "id": short | scraps,
        "ids": st.lists(st.text("ab", min_size=1, max_size=2), max_size=3) | scraps,
        "data": scraps | st.dictionaries(st.sampled_from(keys), scraps | st.just("m1")),
    },
).map(lambda message: json.dumps(message).encode())


class ArbitraryTests(SynchronousTestCase):
    """Whatever a backend sends."""

    @bounded
    @given(
        v1=st.booleans(),
        payloads=st.lists(st.tuples(st.binary(max_size=20) | messages, st.booleans()), max_size=10),
    )
    def test_never_raises(self, v1: bool, payloads: list[tuple[bytes, bool]]) -> None:
        """Every message gives events and no exception; registered at most once, draining at most once and for good."""
        talk = conversation(v1=v1)
        seen: list[Event] = []
        for payload, is_text in payloads:
            events = talk.receive(payload, is_text or payload.startswith(b"{"))
            seen += events
            for event in events:
                if isinstance(event, Reply):
                    self.assertIn(json.loads(event.payload)["type"], ("pong", "nack") if v1 else ("pong",))
        kinds = [type(event) for event in seen]
        self.assertLessEqual(kinds.count(Registered), 1)
        self.assertLessEqual(kinds.count(GoingAway), 1)
        if GoingAway in kinds:
            self.assertIs(talk.state, State.DRAINING)
            self.assertNotIn(Registered, kinds[kinds.index(GoingAway) :])
        else:
            self.assertIs(talk.state, State.REGISTERED if Registered in kinds else State.AWAITING_REGISTRATION)
