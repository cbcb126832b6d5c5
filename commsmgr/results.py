"""A result as the agent says it, into the bytes that are stored and sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct

from commsmgr.errors import InvalidMessage
from commsmgr.form import Form
from commsmgr.messages import Id, Integer, Result, ResultBody, ResultStatus
from commsmgr.outgoing import shorten, unicode
from commsmgr.sanitise import Malformed

_encode = msgspec.json.Encoder().encode


class _Given(Struct, frozen=True):
    """What a :class:`Result` must be to become a :class:`ResultBody`; msgspec does not check what an agent makes."""

    command_id: Id
    status: ResultStatus
    output: str
    error: str
    exit_code: Integer
    # In milliseconds it is an Integer too.
    execution_time: Annotated[float, Meta(ge=0, le=9e12)]


_FORM = Form(_Given)


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
    given = _checked(result)
    milliseconds = round(given.execution_time * 1000)
    whole_output = redact(unicode(given.output)) if given.output else ""
    whole_error = redact(unicode(given.error)) if given.error else ""
    while True:
        output, cut = shorten(whole_output, max_output)
        error, cut_too = shorten(whole_error, max_output)
        body = ResultBody(
            id=message_id,
            command_id=given.command_id,
            status=given.status,
            output=output,
            error=error,
            exit_code=given.exit_code,
            execution_time=milliseconds,
            execution_time_ms=milliseconds,
            timestamp=timestamp,
            truncated_bytes=cut + cut_too or UNSET,
        )
        encoded = _encode(body)
        if len(encoded) <= limit:
            return encoded, cut + cut_too
        if not max_output:
            raise InvalidMessage(f"the result has {len(encoded)} bytes, more than delivery.max_body_bytes = {limit}")
        max_output = min(max_output, limit) // 2


def _checked(result: Result) -> _Given:
    """Return what ``result`` says, as it is declared."""
    if not isinstance(result, Result):
        raise InvalidMessage(f"expected a Result, found {type(result).__name__}")
    try:
        given = msgspec.convert(result, type=_Given, from_attributes=True)
        if not (given.command_id.isascii() and given.command_id.isprintable()):
            _FORM.check(given)  # says what is wrong
    except Malformed as error:
        raise InvalidMessage(f"not a result: {error.detail}") from None
    except (TypeError, ValueError, OverflowError) as error:  # ValidationError is a ValueError
        raise InvalidMessage(f"not a result: {error}") from error
    return given
