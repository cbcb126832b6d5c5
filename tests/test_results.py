"""A result, encoded once for either transport."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import InvalidMessage
from commsmgr.messages import Result, ResultBody
from commsmgr.results import encode_result


def encode(result: Any, limit: int = 4096) -> dict[str, Any]:
    body = encode_result(result, message_id="m-1", timestamp="2026-01-01T00:00:00.000Z", limit=limit)
    msgspec.json.decode(body, type=ResultBody)
    decoded: dict[str, Any] = msgspec.json.decode(body)
    return decoded


class ResultTests(SynchronousTestCase):
    """What the agent says, checked."""

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

    def test_size(self) -> None:
        """The limit is that of the whole body, to the byte."""
        result = Result(command_id="c", output="é" * 100)
        size = len(encode_result(result, message_id="m-1", timestamp="t", limit=4096))
        self.assertEqual(len(encode_result(result, message_id="m-1", timestamp="t", limit=size)), size)
        error = self.assertRaises(
            InvalidMessage, encode_result, result, message_id="m-1", timestamp="t", limit=size - 1
        )
        self.assertIn("max_body_bytes", str(error))
