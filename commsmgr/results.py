"""A result as the agent says it, into the bytes that are stored and sent."""

from __future__ import annotations

import msgspec

from commsmgr.errors import InvalidMessage
from commsmgr.messages import Result, ResultBody

_LARGEST = (1 << 53) - 1
"""Larger integers are not the same to every reader of JSON (RFC 7493 section 2.2)."""


def encode_result(result: Result, *, message_id: str, timestamp: str, limit: int) -> bytes:
    """
    Encode ``result`` once, for either transport.

    Text that is no Unicode (lone surrogates, as Python makes them of undecodable output) is sent with U+FFFD in their
    place.

    :param limit: the largest body, in bytes.
    :raise InvalidMessage: a field has the wrong type or value, or the body is too large; it says which.
    """
    if not isinstance(result, Result):
        raise InvalidMessage(f"expected a Result, found {type(result).__name__}")
    fields = {
        "id": message_id,
        "command_id": result.command_id,
        "status": result.status,
        "output": result.output,
        "error": result.error,
        "exit_code": result.exit_code,
        "timestamp": timestamp,
    }
    try:
        if result.execution_time < 0:
            raise InvalidMessage(f"execution_time: expected seconds, not below 0, found {result.execution_time}")
        milliseconds = round(result.execution_time * 1000)
        body = msgspec.convert(
            fields | {"execution_time": milliseconds, "execution_time_ms": milliseconds}, type=ResultBody
        )
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise InvalidMessage(f"not a result: {error}") from error
    for name in ("exit_code", "execution_time"):
        if abs(getattr(body, name)) > _LARGEST:
            raise InvalidMessage(f"not a result: {name} is out of the range of numbers that every peer can read")
    try:
        encoded = msgspec.json.encode(body)
    except UnicodeEncodeError:
        clean = msgspec.structs.replace(body, output=_unicode(body.output), error=_unicode(body.error))
        encoded = msgspec.json.encode(clean)
    if len(encoded) > limit:
        raise InvalidMessage(f"the result has {len(encoded)} bytes, more than delivery.max_body_bytes = {limit}")
    return encoded


def _unicode(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
