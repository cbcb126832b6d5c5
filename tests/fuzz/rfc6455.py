"""
What RFC 6455 says that a client does with a server's frames: a second opinion, written from the text alone.

It knows no extension. Where the RFC leaves open at which byte a client notices a mistake, the model notices it as late
as it may, with the whole frame; so what came in full before the mistake must have been delivered by any client.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

OPEN: Final = 0
"""The verdict while nothing has ended the connection."""

PEER_CLOSED: Final = 1000
"""The verdict after a close frame that is right."""


@dataclass
class Verdict:
    """
    :ivar messages: those that are complete, in order, each with whether it is text.
    :ivar pings: payloads, in order.
    :ivar end: :data:`OPEN`, :data:`PEER_CLOSED`, or the code with which the client fails the connection.
    :ivar code: of the server's close frame, 1005 when it has none.
    """

    messages: list[tuple[bytes, bool]] = field(default_factory=list)
    pings: list[bytes] = field(default_factory=list)
    end: int = OPEN
    code: int = 0


def close_code_allowed(code: int) -> bool:
    """
    Whether an endpoint may send this code (sections 7.4.1 and 7.4.2).

    Of those registered since, 1012 and 1013 are known here; 1014, which gateways may send, is not to autobahn, and it
    cannot be taught.
    """
    return (1000 <= code <= 1013 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999


def judge(data: bytes, limit: int) -> Verdict:
    """
    Return what comes of ``data``.

    :param limit: bytes of the largest message that the client takes.
    """
    verdict = Verdict()
    kind = 0
    parts: list[bytes] = []
    at = 0
    while len(data) - at >= 2:
        first, second = data[at], data[at + 1]
        final, reserved, opcode = first >> 7, first >> 4 & 7, first & 0x0F
        masked, length = second >> 7, second & 0x7F
        control = opcode >= 8
        wrong = (
            reserved
            or masked
            or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
            or (control and (not final or length > 125))
            or (opcode == CONTINUATION and not kind)
            or (opcode in (TEXT, BINARY) and kind)
            or (opcode == CLOSE and length == 1)
        )
        if wrong:
            verdict.end = 1002
            return verdict
        start = at + 2
        if length >= 126:
            width = 2 if length == 126 else 8
            if len(data) < start + width:
                return verdict
            length = int.from_bytes(data[start : start + width], "big")
            start += width
            if length < (126 if width == 2 else 1 << 16) or length >= 1 << 63:
                verdict.end = 1002
                return verdict
        if not control and length + sum(map(len, parts)) > limit:
            verdict.end = 1009
            return verdict
        if len(data) < start + length:
            # What is there of it may be wrong already; that is the client's affair.
            return verdict
        payload = data[start : start + length]
        at = start + length
        if opcode == PING:
            verdict.pings.append(payload)
        elif opcode == CLOSE:
            _judge_close(payload, verdict)
            return verdict
        elif not control:
            kind = opcode or kind
            parts.append(payload)
            whole = b"".join(parts)
            if kind == TEXT and not _may_be_text(whole, bool(final)):
                verdict.end = 1007
                return verdict
            if final:
                verdict.messages.append((whole, kind == TEXT))
                kind, parts = 0, []
    return verdict


def _judge_close(payload: bytes, verdict: Verdict) -> None:
    verdict.code = int.from_bytes(payload[:2], "big") if payload else 1005
    if payload and not close_code_allowed(verdict.code):
        verdict.end = 1002
    elif not _may_be_text(payload[2:], True):
        verdict.end = 1007
    else:
        verdict.end = PEER_CLOSED


def _may_be_text(data: bytes, final: bool) -> bool:
    """Whether ``data`` is UTF-8, or, if it is not final, the beginning of some."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        # Only a sequence that is cut off reaches to the end; one that no byte could complete ends before it.
        return not final and error.reason == "unexpected end of data"
    return True
