"""The gate for JSON: what has one meaning passes, the rest is refused by its name, however it is written."""

from __future__ import annotations

import contextlib
import json
import time
from functools import cache
from itertools import product
from typing import Any, get_args

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import InvalidMessage
from commsmgr.form import Form, is_plain
from commsmgr.messages import CommandEnvelope, FromBackend, HeartbeatAnswer, Nack, Ping, Push, RegistrationAck
from commsmgr.outgoing import encode_data
from commsmgr.sanitise import READ_AGAIN, REASONS, Malformed, scan
from commsmgr.session import wire
from commsmgr.session.wire import BodyDecoder, Decoder
from tests.strategies import payloads

bounded = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FIELDS = {
    "type": ["command", "nack", "ping", "registration_ack", "settings", "zz"],
    "id": ["a", "b", "", "id", '":'],
    "data": [{}, None],
    "timestamp": ["", "t"],
    "command": ["", "x", "command", 'say "args": "x"', "\\", '\\"command', "é"],
    "args": [[], ["args"], ["", "options"]],
    "timeout": [0, 0.0, 30],
    "options": [{}, {"args": "x"}, {"command": 1, "o": [{"p": 1}]}, {"n": 1 << 64}, {"timestamp": 1, "command": 1}],
    "message": ["", "m"],
    "retry_after": [None, 0, 1],
    "machine_id": ["", "m\x1b"],
    "new": [1, {"args": []}, {"timestamp": 1, "command": 1}, {"id": 1}],
}


@st.composite
def written(draw: st.DrawFn, keys: tuple[str, ...] = tuple(FIELDS), level: int = 0) -> str:
    """Return JSON as some backend may write it: any order, blanks and escapes, keys twice, fields that are unknown."""
    pairs = []
    for key in draw(st.lists(st.sampled_from(keys), max_size=7)):
        if key == "data" and level == 0:
            value = draw(written(level=1))
        else:
            value = json.dumps(draw(st.sampled_from(FIELDS[key])), ensure_ascii=draw(st.booleans()))
            value = value.replace('\\"', draw(st.sampled_from(['\\"', "\\u0022"])))
        name = draw(st.sampled_from([key, key, key, f"\\u{ord(key[0]):04x}{key[1:]}", f'\\"{key}']))
        pairs.append(f'"{name}"{draw(st.sampled_from(["", "", " "]))}:{draw(st.sampled_from(["", " "]))}{value}')
    return "{" + draw(st.sampled_from([",", ", "])).join(pairs) + "}"


class Part(msgspec.Struct, omit_defaults=True):
    """A part with a name that stands in the whole too."""

    note: str = ""


class Whole(msgspec.Struct, omit_defaults=True):
    """A message such as we have none."""

    part: Part
    note: str = ""


def has_two(payload: bytes) -> bool:
    """Say whether an object in ``payload`` has a key twice, in the plainest way."""
    twice = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len(pairs) != len(dict(pairs))
        return dict(pairs)

    json.loads(payload, object_pairs_hook=look)
    return twice


def unknown(value: Any, struct: Any) -> bool:
    known = set(struct.__struct_fields__) | ({"type"} if struct.__struct_config__.tag else set())
    if not set(value) <= known:
        return True
    data = {"command": "CommandData", "nack": "NackData", "registration_ack": "RegistrationAckData"}
    part = data.get(str(struct.__struct_config__.tag))
    return part is not None and unknown(value.get("data", {}), getattr(__import__("commsmgr").messages, part))


@cache
def any_decoder(max_bytes: int, max_depth: int, refuse: bool) -> Decoder[FromBackend]:
    """Return a decoder with these bounds; to make one takes longer than what it is asked here."""
    return Decoder(FromBackend, max_bytes=max_bytes, max_depth=max_depth, refuse_unknown=refuse)


class DuplicateTests(SynchronousTestCase):
    """A key twice."""

    def setUp(self) -> None:
        self.decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=1 << 20, max_depth=32)

    def refused(self, payload: bytes) -> Malformed:
        error = self.assertRaises(Malformed, self.decoder.decode, payload, True)
        assert isinstance(error, Malformed)
        return error

    def test_wherever(self) -> None:
        """It is found in the envelope, in its data, in free data at any depth, in ignored fields and in pushes."""
        for text in (
            '{"type":"command","id":"c","data":{"command":"uptime","command":"reboot"}}',
            '{"type":"command","id":"c","data":{"command":"uptime","comm\\u0061nd":"reboot"}}',
            '{"type":"command","id":"c","data":{"command":"uptime","command" :"reboot"}}',
            '{"type":"command","id":"c","data":{"command":"x\\u0022\\u0022y","command":"z"}}',
            '{"type":"command","id":"c","data":{"timeout":1,"command":"x\\u0022\\u0022y","timeout":2}}',
            '{"type":"command","id":"c","data":{"options":{"a":{"b":1,"c":2,"b":3}}}}',
            '{"type":"command","id":"c","data":{"args":[],"args":[]}}',
            '{"type":"command","id":"c","data":{"timeout":1},"data":{"timeout":1}}',
            '{"type":"command","id":"c","data":{},"new":{"a":1,"a":1}}',
            '{"type":"command","id":"c","data":{"timestamp":"","timestamp":""}}',
            '{"type":"zz","id":"c","data":[{"a":1,"a":2}]}',
            '{"type":"zz","type":"command","id":"c","data":{}}',
            # Keys with defaults, elsewhere and without their quotes, make up for what is there twice.
            '{"type":"command","id":"c","data":{"options":{"timestamp":1,"command":1,"dry_run":true},"options":{}}}',
            '{"type":"command","id":"c","data":{"timeout":1,"timeout":9},"new":{"timestamp":1,"command":1}}',
        ):
            error = self.refused(text.encode())
            self.assertEqual((error.reason, error.id), ("duplicate-key", "c"), text)

    def test_same_name_in_two_places(self) -> None:
        """A name that may stand in two objects is no excuse for standing in one of them twice."""
        decoder = BodyDecoder(Whole, max_bytes=100, max_depth=3)
        self.assertEqual(decoder.decode(b'{"part":{"note":""},"note":""}'), Whole(part=Part()))
        for payload in (b'{"part":{"note":"","note":""}}', b'{"part":{},"note":"","note":""}'):
            self.assertEqual(self.assertRaises(Malformed, decoder.decode, payload).reason, "duplicate-key")

    def test_no_id(self) -> None:
        """Where it is the id that is there twice, or is none, nobody can be told."""
        for payload in (
            b'{"type":"command","id":"a","id":"b","data":{}}',
            b'{"type":"command","data":{"type":"","type":""},"id":7}',
            b'{"type":"ack","ids":["a"],"ids":["b"],"id":"c"}',
        ):
            error = self.refused(payload)
            self.assertEqual((error.reason, error.id), ("duplicate-key", None))

    def test_long_ones(self) -> None:
        """Of what is too long to be read key by key the reason is told all the same, and the id where there is one."""
        long = '"a":[' + "1," * READ_AGAIN + "1]"
        for text, reason, own in (
            ('{"type":"zz","id":"z",%s,"b":{"c":1,"c":2}}', "duplicate-key", "z"),
            ('{"type":"zz","id":"z",%s,"b":{"c":"\\u0022\\u0022","\\u0063":2}}', "duplicate-key", "z"),
            ('{"type":"zz","id":"z",%s,"id":"y"}', "duplicate-key", None),
            ('{"type":"zz","id":"z","x\\u0022\\u0022\\u0022\\u0022":1,%s,"id":"y"}', "duplicate-key", None),
            ('{"type":"zz",%s,"b":{"c":1,"c":2}}', "duplicate-key", None),
            ('{"type":"zz","id":"z",%s,"b":18446744073709551616}', "number-range", "z"),
            ('{"type":"zz","id":"z",%s,"b":1e999}', "number-range", "z"),
        ):
            error = self.refused((text % long).encode())
            self.assertEqual((error.reason, error.id), (reason, own), text)
        for text in (
            '{"type":"zz",%s,"b":"\\u0022"}',
            '{"type":"zz",%s,"b":"\\\\u0022"}',
            '{"type":"zz",%s,"b":"\\\\\\u0022"}',
        ):
            self.assertIsInstance(self.decoder.decode((text % long).encode(), True), Push)

    def test_no_duplicates(self) -> None:
        """Equal keys of different objects, keys as values, and texts that look like keys are no duplicates."""
        for data in (
            {"type": "type", "command": "command", "args": ["args", "args", '"args":'], "timeout": 0, "options": {}},
            {"command": '"command":"x","command":"y"', "options": {"command": "command", "options": {"options": 1}}},
            {"command": "\\", "args": ['\\"', "\\\\"], "options": {"id": {"id": {"id": 1}}}},
        ):
            for ascii_only, separators in product((True, False), ((",", ":"), (", ", ": "), (" ,", " : "))):
                message = {"type": "command", "id": "c", "data": data, "timestamp": "", "new": {"type": 1}}
                payload = json.dumps(message, ensure_ascii=ascii_only, separators=separators).encode()
                decoded = self.decoder.decode(payload, True)
                assert isinstance(decoded, CommandEnvelope)
                self.assertEqual(decoded.data.options, data.get("options"))

    def test_unknown_among_defaults(self) -> None:
        """A field that is not declared is found beside keys that are, wherever those stand."""
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4096, max_depth=8, refuse_unknown=True)
        for text in (
            '{"type":"ping","new":{"id":1}}',
            '{"type":"ping","new":{"id":""}}',
            '{"type":"command","id":"c","data":{"timestamp":""}}',
        ):
            error = self.assertRaises(Malformed, decoder.decode, text.encode(), True)
            self.assertEqual(error.reason, "unknown-field", text)

    @bounded
    @given(written(), st.booleans())
    def test_as_the_plainest_way(self, text: str, refuse: bool) -> None:
        """What passes has no key twice, and no unknown one where those are refused; what is refused for it has."""
        payload = text.encode()
        decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=4096, max_depth=8, refuse_unknown=refuse)
        try:
            message = decoder.decode(payload, True)
        except Malformed as error:
            self.assertIn(error.reason, REASONS)
            if error.reason == "duplicate-key":
                self.assertTrue(has_two(payload), text)
            if error.reason == "unknown-field":
                self.assertTrue(refuse)
            if error.id is not None:
                self.assertTrue(error.id.isprintable() and error.id)
            return
        self.assertFalse(has_two(payload), text)
        if refuse and not isinstance(message, Push):
            self.assertFalse(unknown(json.loads(payload), type(message)), text)

    def judged(self, decoder: Decoder[FromBackend], payload: bytes) -> object:
        """Return what a payload is, or all that is said against it."""
        try:
            return decoder.decode(payload, True)
        except Malformed as error:
            return error.reason, error.detail, error.id

    def same_verdict(self, payload: bytes, refuse: bool, max_depth: int = 8, max_bytes: int = 4096) -> None:
        """See that a payload is judged alike by one look, where that is enough, and check by check."""
        decoder = any_decoder(max_bytes, max_depth, refuse)
        at_once = self.judged(decoder, payload)
        is_plain, wire.is_plain = wire.is_plain, lambda payload: False
        try:
            one_by_one = self.judged(decoder, payload)
        finally:
            wire.is_plain = is_plain
        self.assertEqual(at_once, one_by_one, payload)

    @bounded
    @given(written() | payloads(*get_args(FromBackend)).map(lambda payload: payload.decode("latin-1")), st.booleans())
    def test_at_once(self, text: str, refuse: bool) -> None:
        """The one look that settles most messages never says anything else than the checks that it spares."""
        self.same_verdict(text.encode("latin-1" if text.isascii() else "utf-8"), refuse)

    def test_at_once_planted(self) -> None:
        """Nor does it where a message has just one fault."""
        for text in (
            '{"type":"command","id":"c","data":{"options":{"a":"b"}}}',
            '{"type":"command","id":"c","data":{"options":{"a":{"a":{"a":{}}}}}}',
            '{"type":"command","id":"c","data":{"options":{"n":18446744073709551616}}}',
            '{"type":"command","id":"c","data":{"options":{"n":-9223372036854775809}}}',
            '{"type":"command","id":"c","data":{"options":{"n":18446744073709551615,"m":-9223372036854775808}}}',
            '{"type":"command","id":"c","data":{"options":{"a":[[[[]]]]}}}',
            '{"type":"command","id":"c","data":{"options":{"a":1.5,"b":true,"c":null}}}',
            '{"type":"command","id":"c","data":{"options":{"n":1e999}}}',
            '{"type":"command","id":"c","data":{"options":{"a":"b","a":"c"}}}',
            '{"type":"command","id":"c","data":{"options":{"a":"b"},"options":{"a":"b"}}}',
            '{"type":"command","id":"c","data":{"timeout":1e5,"timeout":1}}',
            '{"type":"command","id":"c\x7f","data":{}}',
            '{"type":"command","id":"c","data":{"type":"\x7f"}}',
            '{"type":"command","id":"c","data":{"type":"\\u0007"}}',
            '{"type":"command","id":"c","data":{"type":"\t"}}',
            '{"type":"command","id":"c","data":{},"new":1}',
            '{"type":"command","id":"c","data":{},"new":[[[[[[[[[]]]]]]]]]}',
            '{"type":"command","type":"command","id":"c","data":{}}',
            '{"type":"ping","id":"a"} ',
            '{"type":"ping","id":"a"}x',
            '{"type":"ping","id":"a","id":"b"}',
            '{"type":"ack","ids":["a","b"]}',
            '{"type":"ack","ids":["a","\x7f"]}',
            '{"type":"ack","ids":["a"],"ids":["b"]}',
            '{"type":"nack","id":"a","data":{"code":"x","message":"y"}}',
            '{"type":"zz","id":"a","data":{"b":1,"b":2}}',
            '{"type":"command","id":"c","data":' + "[" * 2000,
            '{"type":"command","id":"c","data":{},"new":' + "[" * 2000,
            '{"type":"command","id":"c","data":{},"new":' + "[" * 2000 + "]" * 2000 + "}",
        ):
            for refuse, depth, size in product((False, True), (1, 2, 3, 4, 8), (70, 4096)):
                self.same_verdict(text.encode(), refuse, depth, size)

    def test_at_once_at_all(self) -> None:
        """What most commands look like is settled so."""
        payload = b'{"id":"c","type":"command","data":{"options":{"a":"b","n":1},"args":["x"],"timeout":30}}'
        message = self.decoder.decode(payload, True)
        assert isinstance(message, CommandEnvelope)
        form = Form(CommandEnvelope)
        self.assertTrue(is_plain(payload))
        self.assertTrue(form.is_all_of(payload, message, 3))
        self.assertFalse(form.is_all_of(payload, message, 2))
        self.assertFalse(is_plain(b'{"id":"' + b"x" * 5000 + b'"}'))

    def test_linear(self) -> None:
        """Megabytes of keys, numbers and lists take a moment; anything quadratic would take hours."""
        for body in (
            ",".join(f'"k{number}":{number}' for number in range(200_000)),
            '"a":[' + ",".join(["9" * 20] * 100_000) + "]",
            '"a":' + "9" * 2_000_000,
            '"a":[' + ",".join(["1.5"] * 500_000) + "]",
            '"a":"' + '\\"' * 1_000_000 + '"',
        ):
            payload = f'{{"type":"zz",{body}}}'.encode()
            began = time.process_time()
            outcome(Decoder(FromBackend, max_bytes=8 << 20, max_depth=9), payload)
            self.assertLess(time.process_time() - began, 10, body[:30])


def outcome(decoder: Decoder[Any], payload: bytes) -> object:
    try:
        return decoder.decode(payload, True)
    except Malformed as error:
        return error


class FieldTests(SynchronousTestCase):
    """Characters, numbers and unknown fields."""

    def reason(self, payload: bytes, struct: Any = FromBackend, **options: Any) -> str:
        """Return why ``payload`` is refused; empty if it is not."""
        try:
            if struct is FromBackend:
                Decoder(FromBackend, max_bytes=4096, max_depth=9, **options).decode(payload, True)
            else:
                BodyDecoder(struct, max_bytes=4096, max_depth=9, **options).decode(payload)
        except Malformed as error:
            self.assertTrue(str(error).isprintable())
            return error.reason
        return ""

    def test_characters(self) -> None:
        """Ids and names bear nothing that is not printable; free text may."""
        for character in ("\n", "\r", "\x00", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\ufeff"):
            for message, struct in (
                ({"type": "command", "id": "c", "data": {"type": character}}, FromBackend),
                ({"type": "command", "id": character, "data": {}}, FromBackend),
                ({"type": "ack", "ids": ["a", character]}, FromBackend),
                ({"type": "ping", "id": character}, FromBackend),
                ({"type": "nack", "id": "a", "data": {"code": character}}, FromBackend),
                ({"type": "registration_ack", "data": {"machine_id": character}}, FromBackend),
                ({"inventory_checksum": character}, HeartbeatAnswer),
            ):
                self.assertEqual(self.reason(msgspec.json.encode(message), struct), "bad-fields", message)
            self.assertEqual(self.reason(msgspec.json.encode({"type": f"t{character}"})), "no-type")
            for data in ({"command": character, "args": [character], "options": {character: character}},):
                self.assertEqual(self.reason(msgspec.json.encode({"type": "command", "id": "c", "data": data})), "")
        self.assertEqual(self.reason('{"type":"command","id":"c","data":{"type":"日本"}}'.encode()), "")
        self.assertEqual(self.reason('{"type":"command","id":"é","data":{}}'.encode()), "bad-fields")

    def test_surrogates(self) -> None:
        """Half a surrogate pair is no JSON, wherever it stands: no text of ours ever holds one."""
        for half in (b"\\ud800", b"\\udc00", b"\\ud800\\ud800"):
            for payload in (
                b'{"type":"command","id":"c","data":{"command":"%b xxxxxxx"}}',
                b'{"type":"command","id":"c","data":{"options":{"%b xxxxxxx":1}}}',
                b'{"type":"command","id":"c","data":{},"new":"%b xxxxxxx"}',
                b'{"type":"zz","new":"%b xxxxxxx"}',
            ):
                self.assertEqual(self.reason(payload % half), "not-json", payload)

    def test_numbers(self) -> None:
        """Integers beyond 64 bits and numbers beyond a float are refused everywhere, NaN and Infinity as no JSON."""
        for place in (
            b'{"type":"command","id":"c","data":{"options":{"n":%b}}}',
            b'{"type":"command","id":"c","data":{"options":{"n":[{"m":%b}]}}}',
            b'{"type":"zz","n":%b}',
        ):
            for good in (b"18446744073709551615", b"-9223372036854775808", b"1e308", b"1e-999", b"-0"):
                self.assertEqual(self.reason(place % good), "", good)
            for bad in (b"18446744073709551616", b"-9223372036854775809", b"9" * 4000, b"1e999", b"-1e999"):
                self.assertEqual(self.reason(place % bad), "number-range", bad)
            for bad in (b"NaN", b"Infinity", b"-Infinity", b"01", b"1.", b"0x1"):
                self.assertEqual(self.reason(place % bad), "not-json", bad)

    def test_exact(self) -> None:
        """An integer of free data arrives to the last digit."""
        text = b'{"type":"command","id":"c","data":{"options":{"n":9007199254740993}}}'
        read = BodyDecoder(CommandEnvelope, max_bytes=4096, max_depth=9).decode(text)
        self.assertEqual(read.data.options, {"n": 9007199254740993})

    def test_unknown_fields(self) -> None:
        """They are kept or refused by setting, at any depth; free data and pushes are never concerned."""
        for text in (
            b'{"type":"command","id":"c","data":{},"new":1}',
            b'{"type":"command","id":"c","data":{"new":"x"}}',
            b'{"type":"ping","new":{}}',
            b'{"type":"nack","id":"a","data":{"new":null}}',
            rb'{"type":"command","id":"c","data":{"x\"timestamp":1,"y\"args":1}}',
        ):
            self.assertEqual(self.reason(text), "")
            self.assertEqual(self.reason(text, refuse_unknown=True), "unknown-field")
        for text in (
            b'{"type":"command","id":"c","data":{"options":{"new":1},"timeout":0,"args":[]},"timestamp":""}',
            b'{"type":"zz","new":1}',
            b'{"type":"nack","id":"a","data":{"code":"x","message":"","retry_after":null}}',
        ):
            self.assertEqual(self.reason(text, refuse_unknown=True), "", text)

    def test_counts(self) -> None:
        """Lists and texts have their bounds."""
        for payload in (
            {"type": "command", "id": "c", "data": {"args": [""] * 10_001}},
            {"type": "command", "id": "c", "data": {"type": "x" * 4097}},
        ):
            decoder: Decoder[FromBackend] = Decoder(FromBackend, max_bytes=1 << 20, max_depth=9)
            error = self.assertRaises(Malformed, decoder.decode, msgspec.json.encode(payload), True)
            self.assertEqual(error.reason, "bad-fields")

    def test_as_quick_as_it_is_decoded(self) -> None:
        """What is made of the smallest parts, twice or not, costs a few times what a decoder takes for it."""
        for body in ("1," * 200_000 + "1", '{"":1},' * 60_000 + "1", '{"":1},' * 60_000 + '{"a":1,"a":2}'):
            payload = f'{{"type":"zz","id":"z","a":[{body}]}}'.encode()
            taken = []
            for step in (scan, msgspec.json.decode):
                times = []
                for _ in range(3):
                    began = time.process_time()
                    with contextlib.suppress(Malformed):
                        step(payload)
                    times.append(time.process_time() - began)
                taken.append(min(times))
            self.assertLess(taken[0], 6 * taken[1], body[:10])

    def test_stack_nearly_used_up(self) -> None:
        """The second reading survives nesting that the settings allow and the stack does not."""
        error = self.assertRaises(Malformed, scan, b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}")
        self.assertEqual(error.reason, "too-deep")

    def test_quick(self) -> None:
        """Messages as backends write them are settled by the quick look, or it would be of no use."""
        for text in (
            '{"type":"command","id":"c","data":{"type":"run","command":"say \\"x\\"","options":{"a":{"b":[1]}}}}',
            '{"id": "c", "type": "command", "data": {"command": "", "args": [], "timeout": 0, "options": {}}}',
            '{"type":"registration_ack","id":"","timestamp":"t","data":{"message":"","machine_id":""}}',
            '{"type":"ping","id":"p"}',
        ):
            payload = text.encode()
            decoder: Any = Decoder(FromBackend, max_bytes=4096, max_depth=9)
            message = decoder.decode(payload, True)
            self.assertTrue(Form(type(message)).accounts_for(payload, message), text)

    def test_every_type(self) -> None:
        """Each type has a form; one with defaults that its encoding shows is read again rather than trusted."""
        self.assertEqual(len(get_args(FromBackend)), 8)
        for struct, sample in ((Nack, Nack(id="a")), (Ping, Ping()), (RegistrationAck, RegistrationAck())):
            payload = msgspec.json.encode(sample)
            self.assertEqual(Form(struct).accounts_for(payload, sample), struct is not Nack)


def without_surrogates(value: object) -> object:
    """Return ``value`` with U+FFFD for what is no Unicode; two surrogates that are a pair are a character."""
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_surrogates(part) for part in value]
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


class OutgoingTests(SynchronousTestCase):
    """What the embedding agent gives."""

    @bounded
    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()) | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()) | st.integers(), inner),
        )
    )
    def test_anything(self, value: object) -> None:
        """Whatever it is, it becomes JSON that means the same, or a typed error."""
        try:
            encoded = encode_data(value)
        except InvalidMessage as error:
            self.assertTrue(str(error).isprintable())
        else:
            self.assertEqual(json.loads(encoded), without_surrogates(value))
            self.assertFalse(has_two(encoded) if encoded[:1] == b"{" else False)

    def test_large(self) -> None:
        """Ten megabytes of text are no matter of seconds."""
        began = time.process_time()
        encode_data({"a": "x" * (10 << 20), "b": [str(number) for number in range(100_000)]})
        self.assertLess(time.process_time() - began, 5)
