"""A result, encoded once for either transport."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import InvalidMessage
from commsmgr.messages import Result, ResultBody
from commsmgr.outgoing import shorten, unicode
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor
from commsmgr.results import _Given, encode_result

encode_for = partial(encode_result, message_id="m-1", timestamp="2026-01-01T00:00:00.000Z", redact=Redactor())


def encode(result: Any, *, limit: int = 1 << 20, max_output: int = 1 << 20) -> dict[str, Any]:
    body, left_out = encode_for(result, limit=limit, max_output=max_output)
    assert len(body) <= limit
    assert (msgspec.json.decode(body, type=ResultBody).truncated_bytes or 0) == left_out
    decoded: dict[str, Any] = msgspec.json.decode(body)
    return decoded


class ResultTests(SynchronousTestCase):
    """What the agent says, checked."""

    def test_declared_alike(self) -> None:
        """What is asked of the agent's fields is what the body declares; the duration alone has another unit."""
        given, body = ({field.name: field.type for field in fields(struct)} for struct in (_Given, ResultBody))
        given.pop("execution_time")
        self.assertEqual({name: body[name] for name in given}, given)

    def test_all_fields(self) -> None:
        """The body has every field, and the duration in milliseconds under both of its names."""
        result = Result(
            command_id="c", status="error", output="o", error="e", exit_code=3, execution_time=1.2346, key=9
        )
        self.assertEqual(
            encode(result),
            {
                "id": "m-1", "command_id": "c", "status": "error", "output": "o", "error": "e", "exit_code": 3,
                "execution_time": 1235, "execution_time_ms": 1235, "timestamp": "2026-01-01T00:00:00.000Z",
            },
        )  # fmt: skip

    def test_surrogates(self) -> None:
        """Output that was no Unicode is sent with a replacement for what cannot be said; the rest is untouched."""
        body = encode(Result(command_id="c", output="a\udc80b é", error="\ud83d\ude00 \ud83d"))
        self.assertEqual((body["output"], body["error"]), ("a�b é", "\U0001f600 �"))

    def test_wrong_types(self) -> None:
        """A field of a wrong type or value is named."""
        wrong: list[tuple[str, Any]] = [
            ("command_id", 7), ("command_id", ""), ("command_id", "a\n"), ("command_id", "x" * 201),
            ("status", "done"), ("status", None), ("status", "\udc80"),
            ("output", b"bytes"), ("error", None), ("exit_code", 1.5), ("exit_code", True),
        ]  # fmt: skip
        for name, value in wrong:
            result = Result(**{"command_id": "c", name: value})
            error = self.assertRaises(InvalidMessage, encode, result)
            if value != "\udc80":
                self.assertIn(name, str(error))

    def test_wrong_numbers(self) -> None:
        """Numbers that JSON or the wire cannot say are refused, also beside output that had to be cleaned."""
        for seconds in ("1", None, -1, float("nan"), float("inf"), 1e300):
            self.assertRaises(InvalidMessage, encode, Result(command_id="c", execution_time=seconds))  # type: ignore[arg-type]  # meant
        for output in ("", "\udc80"):
            self.assertRaises(InvalidMessage, encode, Result(command_id="c", output=output, exit_code=1 << 70))

    def test_not_a_result(self) -> None:
        """Something else is refused by its type."""
        self.assertIn("dict", str(self.assertRaises(InvalidMessage, encode, {"command_id": "c"})))

    def test_secrets(self) -> None:
        """Secrets go from both texts, and from the whole of them: none is cut into halves that nothing recognises."""
        secret = f"password='{'hunter2 ' * 5000}'"
        body = encode(Result(command_id="c", output=f"a {secret} z", error=secret), max_output=256)
        self.assertEqual((body["output"], body["error"]), (f"a password={MARK} z", f"password={MARK}"))
        self.assertNotIn("truncated_bytes", body)
        redact = Redactor()
        redact.secret("0123456789" * 20)
        result = Result(command_id="c", output="x" * 80 + "0123456789" * 20 + "y" * 5000)
        encoded, _ = encode_for(result, limit=1 << 20, max_output=256, redact=redact)
        self.assertIn(b"xx" + MARK.encode(), encoded)
        self.assertNotIn(b"0123", encoded)

    def test_truncated(self) -> None:
        """Of a text that is too long both ends are kept, and a note says how much of it is missing."""
        text = "head " + "é" * 1000 + " tail"
        body = encode(Result(command_id="c", output=text, error="e" * 300), max_output=256)
        output = body["output"]
        self.assertTrue(output.startswith("head é") and output.endswith("é tail"))
        note = re.search(r"\n… \[truncated: (\d+) of 2010 bytes left out\] …\n", output)
        assert note is not None
        self.assertEqual(len(output.replace(note[0], "").encode()) + int(note[1]), 2010)
        self.assertIn("of 300 bytes left out", body["error"])
        self.assertLessEqual(len(output.encode()), 256)
        whole = encode(Result(command_id="c", output="é" * 128), max_output=256)
        self.assertEqual(whole["output"], "é" * 128)

    def test_size(self) -> None:
        """A body that would be too large is made to fit, to the byte: the command has run, and must get its result."""
        result = Result(command_id="c", output="\x00" * 400)
        size = len(encode_for(result, limit=1 << 20, max_output=1 << 20)[0])
        self.assertEqual(encode(result, limit=size)["output"], "\x00" * 400)
        self.assertIn("truncated", encode(result, limit=size - 1)["output"])
        for limit in (1024, 2000, 5000):
            body = encode(Result(command_id="c", output="\x00" * 400, error='"' * 300 + "\x1b" * 10_000), limit=limit)
            self.assertGreater(body["truncated_bytes"], 9000)

    def test_no_room_at_all(self) -> None:
        """Where not even the shortest text has room, the error names the setting."""
        error = self.assertRaises(InvalidMessage, encode, Result(command_id="c", output="x" * 999), limit=100)
        self.assertIn("max_body_bytes", str(error))

    @settings(deadline=None)
    @given(
        st.text(alphabet=st.characters(), max_size=400) | st.text("aé☃\U0001f600\n").map(lambda text: text * 50),
        st.integers(128, 1500),
    )
    def test_shorten(self, text: str, bound: int) -> None:
        """Never longer than the bound, always Unicode, both ends those of the text, and nothing missing unsaid."""
        text = unicode(text)
        short, left_out = shorten(text, bound)
        encoded = short.encode()
        self.assertLessEqual(len(encoded), bound)
        if left_out and short:
            head, note, tail = re.split(r"(\n… \[truncated: \d+ of \d+ bytes left out\] …\n)", short, maxsplit=1)
            self.assertTrue(text.startswith(head) and text.endswith(tail))
            self.assertEqual(len(text.encode()), len((head + tail).encode()) + left_out)
            self.assertIn(f" {left_out} of {len(text.encode())} ", note)
        else:
            self.assertEqual((short, left_out), ("", len(text.encode())) if left_out else (text, 0))

    @settings(deadline=None)
    @given(st.text(st.characters()), st.text(st.characters() | st.characters(categories=["Cs"])), st.integers())
    def test_anything(self, output: str, error: str, exit_code: int) -> None:
        """Whatever a handler returns becomes a body that the other side reads, or a typed error."""
        try:
            body = encode(Result(command_id="c", output=output, error=error, exit_code=exit_code))
        except InvalidMessage:
            self.assertGreaterEqual(abs(exit_code), 1 << 53)
        else:
            self.assertEqual(body["error"], Redactor()(unicode(error)))
