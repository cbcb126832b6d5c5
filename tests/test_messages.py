"""The schema of the wire: what is accepted, what is not, and what the agent holds in its hands."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import messages
from commsmgr.messages import CommandEnvelope, FromBackend, HeartbeatAnswer, Nack, ResultBody
from commsmgr.sanitise import Malformed
from commsmgr.session.wire import BodyDecoder
from tests.command_kit import command

DECODER = BodyDecoder(Nack, max_bytes=1000, max_depth=3)


def decode(text: str, type: Any = FromBackend) -> Any:
    return msgspec.json.decode(text, type=type)


class Wire(SynchronousTestCase):
    """What comes from a peer."""

    def test_unknown_fields(self) -> None:
        """Fields that are not known are ignored: either side may be newer."""
        envelope = decode('{"type":"command","id":"c","new":1,"data":{"type":"t","newer":[]}}')
        self.assertEqual((envelope.id, envelope.data.type, envelope.data.args), ("c", "t", []))

    def test_ids(self) -> None:
        """An id is printable ASCII of 1 to 200 characters, for it is echoed into logs and a header."""
        for good in ("a", "x" * 200, "cmd_17 ~!"):
            self.assertEqual(DECODER.decode(msgspec.json.encode({"type": "nack", "id": good})).id, good)
        for bad in ("", "x" * 201, "a\n", "\n", "a\r\nb", "é", "\x7f", "\x00", 5, None):
            error = self.assertRaises(Malformed, DECODER.decode, msgspec.json.encode({"type": "nack", "id": bad}))
            self.assertEqual(error.reason, "bad-fields")

    def test_bounds(self) -> None:
        """Numbers out of bounds and lists too long are refused."""
        for data in (
            '{"timeout":-1}', '{"timeout":2592001}', '{"args":[1]}', '{"options":[]}',
            '{"args":[' + ",".join(['""'] * 10_001) + "]}",
        ):  # fmt: skip
            self.assertRaises(msgspec.ValidationError, decode, f'{{"type":"command","id":"c","data":{data}}}')
        for kind, data in (
            ("nack", '{"retry_after":-1}'), ("goaway", '{"window":-1}'), ("settings", '{"heartbeat_interval":0.5}'),
            ("settings", '{"inventory_interval":59}'), ("registration_ack", '{"dedupe_window":-1}'),
        ):  # fmt: skip
            text = f'{{"type":"{kind}","id":"c","data":{data}}}'
            self.assertRaises(msgspec.ValidationError, decode, text)
            decode(f'{{"type":"{kind}","id":"c","data":{{}}}}')

    def test_heartbeat_answer(self) -> None:
        """Commands in an answer stay raw, so that one that is malformed spoils no other."""
        read = decode('{"status":"ok","commands":[{"type":"command","id":"c","data":{}}, 5]}', HeartbeatAnswer)
        self.assertEqual(decode(bytes(read.commands[0]).decode(), CommandEnvelope).id, "c")
        self.assertEqual(decode("{}", HeartbeatAnswer), HeartbeatAnswer())

    def test_heartbeat_answer_as_plain(self) -> None:
        """What a backend has nothing to say about is not in its answer, so that plain agents see what they know."""
        answer = HeartbeatAnswer(status="ok", message="hello")
        self.assertEqual(msgspec.json.encode(answer), b'{"status":"ok","message":"hello"}')

    def test_acked_commands_unset(self) -> None:
        """A heartbeat without confirmations to make need not have the field at all."""
        beat = messages.Heartbeat(machine_id="m", hostname="h", timestamp="t")
        self.assertNotIn(b"acked_commands", msgspec.json.encode(beat))

    def test_tags(self) -> None:
        """Each envelope has the type that the protocol gives it."""
        tags = {
            name: each.__struct_config__.tag
            for name, each in vars(messages).items()
            if isinstance(each, msgspec.StructMeta) and each.__struct_config__.tag
        }
        self.assertEqual(
            tags,
            {
                "CommandEnvelope": "command", "Register": "register", "RegistrationAck": "registration_ack",
                "ResultEnvelope": "command_result", "LossReceipt": "loss_receipt", "Ping": "ping",
                "Pong": "pong", "Ack": "ack", "Nack": "nack", "Goaway": "goaway", "Settings": "settings",
            },
        )  # fmt: skip

    def test_frozen(self) -> None:
        """No message can be changed after it was made."""
        for each in vars(messages).values():
            if isinstance(each, msgspec.StructMeta) and each is not msgspec.Struct:
                self.assertTrue(each.__struct_config__.frozen, each)


class InHand(SynchronousTestCase):
    """What a handler gets and gives."""

    def test_results(self) -> None:
        """A command makes its own results, which bear its id and its key."""
        held = command(5)
        self.assertEqual(
            [
                (each.command_id, each.key, each.status, each.output, each.error, each.exit_code)
                for each in (held.success("o", exit_code=2), held.error("e", output="o"), held.rejected("r"))
            ],
            [("c5", 5, "success", "o", "", 2), ("c5", 5, "error", "o", "e", 1), ("c5", 5, "rejected", "", "r", 1)],
        )
        self.assertEqual((held.success().exit_code, held.error("e", exit_code=9).exit_code), (0, 9))

    def test_statuses(self) -> None:
        """A result has one of five statuses."""
        for status in ("success", "error", "timeout", "rejected", "interrupted"):
            text = f'{{"id":"r","command_id":"c","status":"{status}"}}'
            self.assertEqual(decode(text, ResultBody).status, status)
        self.assertRaises(msgspec.ValidationError, decode, '{"id":"r","command_id":"c","status":"done"}', ResultBody)
