"""A result as the agent says it, into the bytes that are stored and sent."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from commsmgr.errors import InvalidMessage
from commsmgr.form import Form
from commsmgr.messages import Result, ResultBody
from commsmgr.outgoing import shorten, unicode
from commsmgr.sanitise import Malformed

_FORM = Form(ResultBody)


def encode_result(
    result: Result,
    *,
    message_id: str,
    timestamp: str,
    limit: int,
    max_output: int,
    redact: Callable[[str], str],
) -> tuple[bytes, int]:
    """
    Encode ``result`` once, for either transport.

    Text that is no Unicode (lone surrogates, as Python makes them of undecodable output) is sent with U+FFFD in their
    place. Secrets are taken out of the whole text; only then the middle of what is too long is left out, so that no
    half of a secret stays on either side.

    :param limit: the largest body, in bytes.
    :param max_output: the longest ``output`` and ``error``, in bytes of UTF-8. They become shorter still where the body
        would be too large otherwise, since a command that has run must get its result.
    :param redact: takes secrets out of a text.
    :return: the body, and how many bytes of texts were left out.
    :raise InvalidMessage: a field has the wrong type or value; it says which.
    """
    body = _checked(result, message_id, timestamp)
    texts = [redact(unicode(text)) if text else "" for text in (body.output, body.error)]
    while True:
        (output, cut), (error, cut_too) = (shorten(text, max_output) for text in texts)
        left_out = cut + cut_too
        encoded = msgspec.json.encode(
            msgspec.structs.replace(body, output=output, error=error, truncated_bytes=left_out or msgspec.UNSET)
        )
        if len(encoded) <= limit:
            return encoded, left_out
        if not max_output:
            raise InvalidMessage(f"the result has {len(encoded)} bytes, more than delivery.max_body_bytes = {limit}")
        max_output = min(max_output, limit) // 2


def _checked(result: Result, message_id: str, timestamp: str) -> ResultBody:
    if not isinstance(result, Result):
        raise InvalidMessage(f"expected a Result, found {type(result).__name__}")
    try:
        if result.execution_time < 0:
            raise InvalidMessage(f"execution_time: expected seconds, not below 0, found {result.execution_time}")
        milliseconds = round(result.execution_time * 1000)
        fields = {
            "id": message_id,
            "command_id": result.command_id,
            "status": result.status,
            "output": result.output,
            "error": result.error,
            "exit_code": result.exit_code,
            "execution_time": milliseconds,
            "execution_time_ms": milliseconds,
            "timestamp": timestamp,
        }
        body = msgspec.convert(fields, type=ResultBody)
        _FORM.check(body)
    except Malformed as error:
        raise InvalidMessage(f"not a result: {error.detail}") from None
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise InvalidMessage(f"not a result: {error}") from error
    return body
