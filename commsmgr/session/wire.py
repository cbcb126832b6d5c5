"""
Between bytes and envelopes: what came is checked before anybody looks at it, what leaves is encoded in one place.

Theory of operation. A payload passes these gates, each one cheap for a well-behaved peer, and the first one that it
fails names the :class:`Malformed`:

1. ``binary``, ``oversized``: told by the frame alone, nothing is parsed.
2. ``not-utf8``: the decoder does not look at the bytes of strings that it skips, so the whole payload is checked first;
   after this gate a :class:`~commsmgr.messages.Push` is safe to decode for whoever gets it.
3. ``too-deep``: as many brackets as levels are allowed cannot nest deeper than allowed, which settles the plain case by
   counting. Only otherwise are strings cut out and the levels summed up, in time linear in the payload.
4. ``not-json``, ``not-object``, ``no-type``, ``bad-fields``: by decoding into the union of the known types in one pass.
   Only when that fails are ``type`` and ``id`` read alone, to tell an unknown type, which is no mistake but a push,
   from a known one with wrong fields.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate
from typing import Annotated, Generic, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from commsmgr.errors import PeerViolation
from commsmgr.messages import CommandData, Id, Push, ResultBody, ResultEnvelope

M_co = TypeVar("M_co", covariant=True)

_TypeName = Annotated[str, Meta(min_length=1, max_length=200)]

_DETAIL_LENGTH = 200

# The id of these belongs to another message, or to none. A nack of one of them would speak of that other message, and
# two peers that do not understand each other's answers would answer them for ever.
_ANSWERS = frozenset({"ack", "nack", "pong", "registration_ack"})


class Malformed(PeerViolation):
    """
    The peer sent a message that cannot be understood.

    :param reason: ``binary``, ``oversized``, ``not-utf8``, ``not-json``, ``too-deep``, ``not-object``, ``no-type`` or
        ``bad-fields``; stable, for metrics and for the ``code`` of a nack.
    :param detail: what is wrong, printable and short.
    :param id: the message's own id, if it has one that could be read, so that its sender can be told.
    """

    advice = "the peer's software and this one disagree; the connection goes on without this message"

    def __init__(self, reason: str, detail: str, *, id: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.id = id


class _Head(Struct):
    """What is read of a message that does not fit: raw, so that nothing but the frame of the object can be wrong."""

    type: Raw = Raw()
    id: Raw = Raw()


_head = msgspec.json.Decoder(_Head)
_type_name = msgspec.json.Decoder(_TypeName)
_id = msgspec.json.Decoder(Id)


def _string(decoder: msgspec.json.Decoder[str], raw: Raw) -> str | None:
    """Return the string in ``raw``, or None if it holds none, or another than ``decoder`` allows."""
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError:
        return None


# Brackets as signed steps of one: +1 for each that opens, -1 (255 as a byte) for each that closes.
_STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"{[}]"))


def _depth(payload: bytes) -> int:
    """
    Return how deep the brackets outside strings nest, in time linear in the payload.

    Of a run of backslashes the pairs are cut out first, so that a quote is escaped if and only if a backslash still
    stands before it; with escaped quotes gone, every second piece between quotes is outside strings. An unterminated
    string swallows the rest, which the JSON decoder will refuse.
    """
    plain = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    steps = outside.translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


class Decoder(Generic[M_co]):
    """
    Takes payloads from a peer who may send anything.

    :param union: the union of the envelope types that the peer may send, such as
        :data:`~commsmgr.messages.FromBackend`; the type checker learns it from the annotation of the variable.
    :param max_bytes: largest payload that is looked at.
    :param max_depth: deepest nesting of JSON objects and arrays, the message itself being the first level.
    """

    def __init__(self, union: object, *, max_bytes: int, max_depth: int) -> None:
        self._union: msgspec.json.Decoder[M_co] = msgspec.json.Decoder(union)
        self._types = frozenset(struct.__struct_config__.tag for struct in get_args(union))
        self._max_bytes = max_bytes
        self._max_depth = max_depth

    def narrowed(self, union: object) -> Decoder[M_co]:
        """Return a decoder with the same limits that knows only ``union``, a part of what this one knows."""
        return Decoder(union, max_bytes=self._max_bytes, max_depth=self._max_depth)

    def decode(self, payload: bytes, is_text: bool) -> M_co | Push:
        """
        Return the message in ``payload``, of a known type or as a push.

        :param is_text: whether it came as a text message (RFC 6455 section 5.6).
        :raise Malformed: it is neither; nothing else is ever raised.
        """
        if not is_text:
            raise Malformed("binary", "a message must be a text message")
        if len(payload) > self._max_bytes:
            raise Malformed("oversized", f"{len(payload)} bytes, at most {self._max_bytes} are taken")
        try:
            payload.decode()
        except UnicodeDecodeError as error:
            raise Malformed("not-utf8", f"{error.reason} at byte {error.start}") from None
        levels = payload.count(b"{") + payload.count(b"[")
        if levels > self._max_depth and _depth(payload) > self._max_depth:
            raise self._malformed("too-deep", f"more than {self._max_depth} levels", payload)
        try:
            try:
                return self._union.decode(payload)
            except msgspec.ValidationError as error:
                return self._push(payload, str(error))
            except msgspec.DecodeError as error:
                raise Malformed("not-json", _printable(str(error))) from None
        except RecursionError:
            # The stack was nearly used up when we were called: the limit of depth alone does not prevent this.
            raise Malformed("too-deep", "more levels than the stack has room for") from None

    def _push(self, payload: bytes, detail: str) -> Push:
        """Return as a push what does not fit into the union, if it is of an unknown type."""
        try:
            head = _head.decode(payload)
        except msgspec.ValidationError:
            raise Malformed("not-object", "a message must be a JSON object") from None
        except msgspec.DecodeError as error:
            raise Malformed("not-json", _printable(str(error))) from None
        name = _string(_type_name, head.type)
        if name is None:
            raise self._malformed("no-type", "a message needs a `type` of 1 to 200 characters", payload)
        if name in self._types:
            raise self._malformed("bad-fields", f"{name}: {detail}", payload)
        return Push(type=name, id=_string(_id, head.id) or "", payload=payload)

    def _malformed(self, reason: str, detail: str, payload: bytes) -> Malformed:
        """Return the error, with the message's id as far as that can still be read."""
        try:
            head = _head.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            return Malformed(reason, _printable(detail))
        own = _string(_type_name, head.type) not in _ANSWERS
        return Malformed(reason, _printable(detail), id=_string(_id, head.id) if own else None)


def _printable(text: str) -> str:
    """Return the start of ``text`` without what could confuse a log: the decoder's errors quote the peer."""
    return "".join(filter(str.isprintable, text[:_DETAIL_LENGTH]))


class _OldResult(Struct):
    """The form of a result that plain backends took before there were types; ``id`` is the command's."""

    id: Id
    output: str | UnsetType | None = UNSET
    error: str | UnsetType | None = UNSET


_old_result = msgspec.json.Decoder(_OldResult)


def decode_old_result(payload: bytes) -> ResultBody | None:
    """
    Return the result in a message that has no type, ``{"id", "output", "error"}``; None if it is no such result.

    For payloads that :meth:`Decoder.decode` refused with ``no-type``. A text in ``error`` makes it an ``error``.
    """
    try:
        old = _old_result.decode(payload)
    except (ValueError, RecursionError):
        return None
    if old.output is UNSET and old.error is UNSET:
        return None
    output, error = old.output or "", old.error or ""
    return ResultBody(id=old.id, command_id=old.id, status="error" if error else "success", output=output, error=error)


_encoder = msgspec.json.Encoder()
_canonical = msgspec.json.Encoder(order="deterministic")


def encode(message: Struct) -> bytes:
    """Return ``message`` as JSON in UTF-8."""
    return _encoder.encode(message)


def result_frame(id: str, timestamp: str, body: bytes) -> bytes:
    """Return the payload of a ``command_result`` whose ``data`` are the bytes of ``body``, unchanged."""
    return _encoder.encode(ResultEnvelope(id=id, timestamp=timestamp, data=Raw(body)))


def command_digest(data: CommandData) -> str:
    """
    Return what tells one command's content from another's: a SHA-256 in lower-case hexadecimal, 64 characters.

    The order of keys does not count, nor whether a default was written out. The fields are listed here, so that a
    digest that was stored stays valid when the struct grows.
    """
    content = (data.type, data.command, data.args, float(data.timeout), data.options)
    return hashlib.sha256(_canonical.encode(content)).hexdigest()
