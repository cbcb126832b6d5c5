"""Bytes to envelopes and back: every way a peer can be wrong, and that nothing else comes out than its name."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.messages import (
    Ack,
    CommandData,
    CommandEnvelope,
    FromAgent,
    FromBackend,
    Nack,
    NackData,
    Ping,
    Push,
    RegistrationAck,
    ResultBody,
    ResultEnvelope,
)
from commsmgr.sanitise import REASONS, Malformed, depth
from commsmgr.session.wire import (
    Decoder,
    command_digest,
    decode_old_result,
    encode,
    result_frame,
)

bounded = settings(deadline=None, max_examples=200, database=None, suppress_health_check=[HealthCheck.too_slow])


TYPES = ["registration_ack", "command", "ping", "pong", "ack", "nack", "goaway", "settings", "config_update"]

KEYS = ["type", "command", "args", "timeout", "options", "machine_id", "code", "retry_after"]

awkward_text = st.text(st.sampled_from('[]{}"\\a:,é'), max_size=8)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | awkward_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)

messages_that_nearly_fit = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(TYPES) | json_values,
        "id": st.text(max_size=5) | json_values,
        "ids": st.lists(st.text(min_size=1, max_size=3), max_size=3) | json_values,
        "machine_id": st.text(max_size=5) | json_values,
        "timestamp": st.text(max_size=5) | json_values,
        "data": st.dictionaries(st.sampled_from(KEYS), json_values) | json_values,
    },
).map(lambda message: json.dumps(message).encode())


def structural_depth(value: Any) -> int:
    """Return how deep objects and arrays nest, by walking the value itself."""
    if isinstance(value, dict):
        return 1 + max(map(structural_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(structural_depth, value), default=0)
    return 0


class DecoderTests(SynchronousTestCase):
    """What a decoder makes of what an agent may receive."""

    def setUp(self) -> None:
        self.decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4096, max_depth=6)

    def refused(self, payload: bytes, is_text: bool = True, decoder: Decoder[Any] | None = None) -> Malformed:
        error = self.assertRaises(Malformed, (decoder or self.decoder).decode, payload, is_text)
        assert isinstance(error, Malformed)
        return error

    def test_known_types(self) -> None:
        """A message of a known type comes out as its struct, wherever its `type` stands and whatever else it bears."""
        payload = b'{"new":[1],"id":"c1","data":{"command":"uptime","args":["-p"],"timeout":3,"x":1},"type":"command"}'
        self.assertEqual(
            self.decoder.decode(payload, True),
            CommandEnvelope(id="c1", data=CommandData(command="uptime", args=["-p"], timeout=3)),
        )
        self.assertEqual(self.decoder.decode(b'{"type":"registration_ack"}', True), RegistrationAck())

    def test_unknown_type_is_a_push(self) -> None:
        """A type that we do not know is no mistake: it comes out whole, with its id."""
        payload = '{"id":"u1","type":"config_update","data":{"note":"grüße"}}'.encode()
        self.assertEqual(self.decoder.decode(payload, True), Push(type="config_update", id="u1", payload=payload))

    def test_push_without_usable_id(self) -> None:
        """An id that is missing or not of the form of an id leaves a push without one."""
        for rest in (b"}", b',"id":7}', b',"id":null}', b',"id":"a\\n"}'):
            payload = b'{"type":"x"' + rest
            push = self.decoder.decode(payload, True)
            self.assertEqual(push, Push(type="x", id="", payload=payload))

    def test_reasons(self) -> None:
        """Each way to be wrong has its own stable name."""
        for payload, reason in (
            (b"", "not-json"),
            (b"<html>Service unavailable</html>", "not-json"),
            (b'{"type":"ping"', "not-json"),
            (b'{"type":"ping"} {"type":"ping"}', "not-json"),
            (b'{"type":"config_update","data":}', "not-json"),
            (b'{"type":"command","id":"a","data":{"timeout":NaN}}', "not-json"),
            (b'\xef\xbb\xbf{"type":"ping"}', "not-json"),
            (b"[]", "not-object"),
            (b"17", "not-object"),
            (b'"ping"', "not-object"),
            (b"null", "not-object"),
            (b"{}", "no-type"),
            (b'{"type":null}', "no-type"),
            (b'{"type":1e999}', "no-type"),
            (b'{"type":["ping"]}', "no-type"),
            (b'{"type":""}', "no-type"),
            (b'{"type":"' + b"x" * 201 + b'"}', "no-type"),
            (b'{"type":"command"}', "bad-fields"),
            (b'{"type":"command","id":"","data":{}}', "bad-fields"),
            (b'{"type":"command","id":"a","data":{"timeout":-1}}', "bad-fields"),
            (b'{"type":"command","id":"a","data":{"timeout":1e999}}', "number-range"),
            (b'{"type":"ack","ids":"a"}', "bad-fields"),
            (b'{"type":"goaway","data":{"reconnect_after":1e300}}', "bad-fields"),
            (b"\xff", "not-utf8"),
            (b'{"type":"ping","id":"\xff"}', "not-utf8"),
            (b'{"type":"ping","\xed\xa0\x80":1}', "not-utf8"),
            (b'{"type":"config_update","data":"\xc3("}', "not-utf8"),
            (b'{"type":"ping","x":[[[[[[]]]]]]}', "too-deep"),
            (b" " * 4097, "oversized"),
        ):
            self.assertEqual(self.refused(payload).reason, reason, payload[:80])

    def test_binary(self) -> None:
        """A binary message is refused even when it holds what would be right as text."""
        self.assertEqual(self.refused(b'{"type":"ping"}', is_text=False).reason, "binary")

    def test_limits_are_inclusive(self) -> None:
        """What is exactly as large or as deep as allowed passes."""
        self.assertEqual(self.decoder.decode(b'{"type":"ping"}'.ljust(4096), True), Ping())
        self.assertEqual(self.decoder.decode(b'{"type":"ping","x":[[[[[]]]]]}', True), Ping())
        self.assertEqual(self.decoder.decode(b'{"type":"ping","x":[' + b"[[[[]]]]," * 50 + b"{}]}", True), Ping())

    def test_brackets_in_strings_do_not_count(self) -> None:
        """Text that looks like nesting is text, also behind escaped quotes and backslashes."""
        for text in ("[" * 50, '"' + "{" * 50, '\\"' + "[" * 50, "\\" * 7 + '"' + "[" * 50, "[" * 50 + "\\"):
            payload = json.dumps({"type": "ping", "id": text, "x": [text]}).encode()
            self.assertEqual(self.decoder.decode(payload, True), Ping(id=text))
            deep = json.dumps({"type": "ping", "id": text, "x": [[[[[[text]]]]]]}).encode()
            self.assertEqual(self.refused(deep).reason, "too-deep")

    def test_id_for_the_nack(self) -> None:
        """The message's own id is read wherever the damage leaves it readable, so that its sender can be told."""
        for payload in (
            b'{"type":"command","id":"c1","data":{"timeout":"soon"}}',
            b'{"type":"command","data":{"options":{"a":[[[[[1]]]]]}},"id":"c1"}',
            b'{"id":"c1"}',
        ):
            self.assertEqual(self.refused(payload).id, "c1", payload)
        for payload in (
            b'{"type":"command","data":{}}',
            b'{"type":"command","id":"c\\u00e9"}',
            b'{"type":"command","id":7,"data":{}}',
            b'{"type":"command","id":"c1","data":{}',
            b'{"type":"command","id":"c1","data":{"command":"\\ud800"}}',
            b'[{"id":"c1"}]',
            b'{"type":"command","id":"c1","data":"\xff"}',
        ):
            self.assertIsNone(self.refused(payload).id, payload)

    def test_no_id_of_answers(self) -> None:
        """The id in an answer is another message's: a nack of an answer would be taken for a nack of that message."""
        for payload in (
            b'{"type":"nack","id":"r1","data":[]}',
            b'{"type":"ack","id":"r1"}',
            b'{"type":"pong","id":"r1","x":[[[[[[]]]]]]}',
            b'{"type":"registration_ack","id":"r1","data":null}',
        ):
            self.assertIsNone(self.refused(payload).id, payload)

    def test_stack_nearly_used_up(self) -> None:
        """Nesting that the settings allow and the stack does not is the peer's mistake, no RecursionError of ours."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=1 << 30, max_depth=1 << 30)
        nested = b"[" * 500_000 + b"]" * 500_000
        for payload in (
            b'{"type":"command","id":"a","data":{"options":{"x":' + nested + b"}}}",
            b'{"type":"ping","x":' + nested + b"}",
            b'{"x":' + nested + b"}",
        ):
            error = self.refused(payload, decoder=decoder)
            self.assertEqual((error.reason, error.id), ("too-deep", None))

    def test_stack_used_up_behind_a_wrong_field(self) -> None:
        """The second look at a message that does not fit meets the same nesting, and survives it as well."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=1 << 30, max_depth=1 << 30)
        payload = b'{"type":"x","x":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
        self.assertEqual(self.refused(payload, decoder=decoder).reason, "too-deep")

    def test_hostile_payloads_take_linear_time(self) -> None:
        """Two megabytes made to hurt the scan are done with in a moment; anything quadratic would take hours."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4 << 20, max_depth=32)
        for part in (b"[", b'"', b"\\", b'\\"', b'"[\\"', b'"\\\\"[', b"{},", b'"[",'):
            self.assertIn(self.refused(b"[" * 40 + part * (1 << 18), decoder=decoder).reason, REASONS)

    def test_detail_is_fit_for_a_log(self) -> None:
        """What an error quotes of the peer is short and printable, so that nobody can forge log lines."""
        payload = json.dumps({"type": "zz\n\x1b[2J" + "y" * 190, "id": "a"}).encode()
        twice = payload[:-1] + b',"type":"ping"}'
        error = self.refused(twice)
        self.assertEqual((error.reason, error.id), ("duplicate-key", "a"))
        self.assertTrue(error.detail.isprintable())
        self.assertLessEqual(len(error.detail), 200)
        self.assertIn("duplicate-key", str(error))

    def test_other_unions(self) -> None:
        """The reference backend decodes what agents say with the same class; a narrowed one keeps the limits."""
        decoder: Decoder[FromAgent] = Decoder(FromAgent, max_bytes=100, max_depth=6)
        frame = result_frame("r1", "now", b'{"id":"r1"}')
        result = decoder.decode(frame, True)
        assert isinstance(result, ResultEnvelope)
        self.assertEqual(bytes(result.data), b'{"id":"r1"}')
        narrowed = decoder.narrowed(Ping | Ack)
        self.assertEqual(narrowed.decode(frame, True), Push(type="command_result", id="r1", payload=frame))
        self.assertEqual(self.refused(b" " * 101, decoder=narrowed).reason, "oversized")
        self.assertEqual(self.refused(b'{"type":"ack","ids":[[[[[[1]]]]]]}', decoder=narrowed).reason, "too-deep")

    @bounded
    @given(
        payload=st.binary() | messages_that_nearly_fit | json_values.map(lambda value: json.dumps(value).encode()),
        is_text=st.booleans(),
    )
    def test_nothing_but_malformed(self, payload: bytes, is_text: bool) -> None:
        """Whatever comes: a message, a push with these very bytes, or a Malformed with a known reason."""
        try:
            message = self.decoder.decode(payload, is_text)
        except Malformed as error:
            self.assertIn(error.reason, REASONS)
            self.assertTrue(error.detail.isprintable())
        else:
            if isinstance(message, Push):
                self.assertEqual(message.payload, payload)
                self.assertEqual(json.loads(payload)["type"], message.type)
            else:
                self.assertIsInstance(message, FromBackend)

    @bounded
    @given(value=json_values, ascii_only=st.booleans())
    def test_depth(self, value: object, ascii_only: bool) -> None:
        """The depth found in the bytes is the depth of the value."""
        self.assertEqual(depth(json.dumps(value, ensure_ascii=ascii_only).encode()), structural_depth(value))


class EncodeTests(SynchronousTestCase):
    """What leaves."""

    def test_round_trip(self) -> None:
        """What one side encodes the other decodes to the same."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4096, max_depth=6)
        for message in (Ack(ids=["a", "b"]), Nack(id="c", data=NackData(code="full", retry_after=2.5)), Ping(id="é")):
            self.assertEqual(decoder.decode(encode(message), True), message)

    def test_result_frame_keeps_the_bytes(self) -> None:
        """A stored body travels as it was stored: blanks, order and escapes and all."""
        body = b'{ "output":"\\u00e9\\/", "id" : "r1", "big": 1.0e2 }'
        frame = result_frame('r"1', "2026-01-01T00:00:00Z", body)
        head = b'{"type":"command_result","id":"r\\"1","timestamp":"2026-01-01T00:00:00Z","data":'
        self.assertEqual(frame, head + body + b"}")


class DigestTests(SynchronousTestCase):
    """When are two commands the same command?"""

    def test_same_content(self) -> None:
        """The order of keys, and a default that is written out, make no difference."""
        self.assertEqual(
            command_digest(CommandData(command="x", options={"a": 1, "b": {"c": 2, "d": 3}})),
            command_digest(CommandData(options={"b": {"d": 3, "c": 2}, "a": 1}, command="x", timeout=0.0, args=[])),
        )

    def test_other_content(self) -> None:
        """Any field that differs makes another command."""
        digests = {
            command_digest(data)
            for data in (
                CommandData(),
                CommandData(type="x"),
                CommandData(command="x"),
                CommandData(args=["x"]),
                CommandData(timeout=1),
                CommandData(options={"x": 1}),
                CommandData(options={"x": "1"}),
                CommandData(options={"x": [2, 1]}),
                CommandData(options={"x": [1, 2]}),
            )
        }
        self.assertEqual(len(digests), 9)

    def test_stable(self) -> None:
        """Digests are stored: one made by an earlier release must still be recognised."""
        data = CommandData(type="shell", command="uptime", args=["-p"], timeout=30, options={"cwd": "/"})
        self.assertEqual(command_digest(data), "88934db927f0d437676b89ab25033a31caee5a919f4e51404350f41585e234d3")

    def test_numbers_of_any_size(self) -> None:
        """The longest integers that the decoder takes can be digested."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=1 << 20, max_depth=6)
        payload = b'{"type":"command","id":"a","data":{"options":{"x":[-9223372036854775808,18446744073709551615]}}}'
        command = decoder.decode(payload, True)
        assert isinstance(command, CommandEnvelope)
        self.assertEqual(len(command_digest(command.data)), 64)


class OldResultTests(SynchronousTestCase):
    """Results from before there were types."""

    def test_success(self) -> None:
        """Without an error text it is a success; id is the command's."""
        self.assertEqual(
            decode_old_result(b'{"id":"cmd_1","output":"up 3 days","error":""}'),
            ResultBody(id="cmd_1", command_id="cmd_1", status="success", output="up 3 days"),
        )

    def test_error(self) -> None:
        """With an error text it is an error; a missing or null output is an empty one."""
        expected = ResultBody(id="cmd_1", command_id="cmd_1", status="error", error="no such file")
        self.assertEqual(decode_old_result(b'{"id":"cmd_1","error":"no such file"}'), expected)
        self.assertEqual(decode_old_result(b'{"id":"cmd_1","output":null,"error":"no such file"}'), expected)

    def test_something_else(self) -> None:
        """Anything else is no old result, and no exception either."""
        for payload in (b"", b"[]", b"{}", b'{"id":"a"}', b'{"output":"x"}', b'{"id":"a","output":1}'):
            self.assertIsNone(decode_old_result(payload), payload)
        self.assertIsNone(decode_old_result(b'{"id":"\xff","output":""}'))
        self.assertIsNone(decode_old_result(b'{"x":' + b"[" * 500_000))
