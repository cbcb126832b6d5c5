"""
Between bytes and envelopes: what came is checked before anybody looks at it, what leaves is encoded in one place.

What is checked, in which order and under which name, says :mod:`commsmgr.sanitise`. Here it is applied: to messages
over WebSocket by a :class:`Decoder`, to bodies of HTTP answers by a :class:`BodyDecoder`. Decoding into the union of
known types takes one pass. Only when that fails are ``type`` and ``id`` read alone, to tell an unknown type, which is
no mistake but a push, from a known one with wrong fields.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from commsmgr.config import Config
from commsmgr.form import check_understood, form_of, is_plain
from commsmgr.messages import CommandData, FromBackend, Id, Push, ResultBody, ResultEnvelope
from commsmgr.sanitise import Malformed, check_frame, scan

M_co = TypeVar("M_co", covariant=True)
T = TypeVar("T", bound=Struct)

_TypeName = Annotated[str, Meta(min_length=1, max_length=200)]

# The id of these belongs to another message, or to none. A nack of one of them would speak of that other message, and
# two peers that do not understand each other's answers would answer them for ever.
_ANSWERS = frozenset({"ack", "nack", "pong", "registration_ack"})


class _Head(Struct):
    """What is read of a message that does not fit: raw, so that nothing but the frame of the object can be wrong."""

    type: Raw = Raw()
    id: Raw = Raw()


_head = msgspec.json.Decoder(_Head)
_type_name = msgspec.json.Decoder(_TypeName)
_id = msgspec.json.Decoder(Id)


def _string(decoder: msgspec.json.Decoder[str], raw: Raw) -> str | None:
    """Return the printable string in ``raw``, or None if it holds none, or another than ``decoder`` allows."""
    try:
        text = decoder.decode(raw)
    except msgspec.DecodeError:
        return None
    return text if text.isprintable() else None


def _id_in(raw: Raw) -> str | None:
    """Return the id in ``raw``, or None if it holds none."""
    text = _string(_id, raw)
    return text if text is not None and text.isascii() else None


class BodyDecoder(Generic[T]):
    """
    Takes JSON objects of one type from a peer who may send anything.

    :param type: one of :mod:`commsmgr.messages`.
    :param max_bytes: largest payload that is looked at.
    :param max_depth: deepest nesting of JSON objects and arrays, the outermost being the first level.
    :param refuse_unknown: whether a field that is not declared is a mistake.
    """

    def __init__(self, type: type[T], *, max_bytes: int, max_depth: int, refuse_unknown: bool = False) -> None:
        self._decoder = msgspec.json.Decoder(type)
        self._form = form_of(type)
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._refuse_unknown = refuse_unknown

    def decode(self, payload: bytes | Raw) -> T:
        """
        Return what is in ``payload``.

        :raise Malformed: it is not of the type; nothing else is ever raised.
        """
        payload = bytes(payload)
        check_frame(payload, self._max_bytes, self._max_depth)
        try:
            message = self._decoder.decode(payload)
        except msgspec.ValidationError as error:
            scan(payload)
            raise Malformed("bad-fields", str(error)) from None
        except msgspec.DecodeError as error:
            raise Malformed("not-json", str(error)) from None
        except RecursionError:
            raise Malformed("too-deep", "more levels than the stack has room for") from None
        check_understood(self._form, message, payload, self._refuse_unknown)
        return message


class Decoder(Generic[M_co]):
    """
    Takes messages from a peer who may send anything.

    :param union: the union of the envelope types that the peer may send, such as
        :data:`~commsmgr.messages.FromBackend`; the type checker learns it from the annotation of the variable.
    :param max_bytes: largest payload that is looked at.
    :param max_depth: deepest nesting of JSON objects and arrays, the message itself being the first level.
    :param refuse_unknown: whether a field that is not declared is a mistake. A type that is not is a push all the same.
    """

    def __init__(self, union: object, *, max_bytes: int, max_depth: int, refuse_unknown: bool = False) -> None:
        self._union: msgspec.json.Decoder[Any] = msgspec.json.Decoder(union)
        self._forms = {struct: form_of(struct) for struct in get_args(union)}
        self._types = frozenset(struct.__struct_config__.tag for struct in self._forms)
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._refuse_unknown = refuse_unknown

    def narrowed(self, union: object) -> Decoder[M_co]:
        """Return a decoder with the same limits that knows only ``union``, a part of what this one knows."""
        return _decoder(union, self._max_bytes, self._max_depth, self._refuse_unknown)

    def decode(self, payload: bytes, is_text: bool) -> M_co | Push:
        """
        Return the message in ``payload``, of a known type or as a push.

        :param is_text: whether it came as a text message (RFC 6455 section 5.6).
        :raise Malformed: it is neither; nothing else is ever raised.
        """
        if not is_text:
            raise Malformed("binary", "a message must be a text message")
        if len(payload) <= self._max_bytes and is_plain(payload) and (settled := self._at_once(payload)) is not None:
            return settled
        try:
            check_frame(payload, self._max_bytes, self._max_depth)
            try:
                message = self._union.decode(payload)
            except msgspec.ValidationError as error:
                return self._push(payload, str(error))
            except msgspec.DecodeError as error:
                raise Malformed("not-json", str(error)) from None
            check_understood(self._forms[type(message)], message, payload, self._refuse_unknown)
        except Malformed as error:
            raise self._with_id(error, payload) from None
        except RecursionError:
            # The stack was nearly used up when we were called: the limit of depth alone does not prevent this.
            raise Malformed("too-deep", "more levels than the stack has room for") from None
        return message  # type: ignore[no-any-return]  # of the union, as the decoder has checked

    def _at_once(self, payload: bytes) -> M_co | None:
        """Return the message in a plain payload if one look at what comes of it settles that it passes every check."""
        try:
            message = self._union.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            return None
        return message if self._forms[type(message)].is_all_of(payload, message, self._max_depth) else None

    def _push(self, payload: bytes, detail: str) -> Push:
        """Return as a push what does not fit into the union, if it is of an unknown type."""
        try:
            head = _head.decode(payload)
        except msgspec.ValidationError:
            raise Malformed("not-object", "a message must be a JSON object") from None
        except msgspec.DecodeError as error:
            raise Malformed("not-json", str(error)) from None
        name = _string(_type_name, head.type)
        if name is None:
            raise Malformed("no-type", "a message needs a `type` of 1 to 200 printable characters")
        scan(payload)
        if name in self._types:
            raise Malformed("bad-fields", f"{name}: {detail}")
        return Push(type=name, id=_id_in(head.id) or "", payload=payload)

    def _with_id(self, error: Malformed, payload: bytes) -> Malformed:
        """Return ``error`` with the message's id, as far as that can still be read and is of use to its sender."""
        if error.reason in _WITHOUT_ID:
            return error
        try:
            head = _head.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            return error
        own = _string(_type_name, head.type) not in _ANSWERS
        ambiguous = error.reason == "duplicate-key" and error.id is None
        found = None if ambiguous else _id_in(head.id)
        return Malformed(error.reason, error.detail, id=found if own else None)


# What is too large or no text is not looked at any further.
_WITHOUT_ID = frozenset({"oversized", "not-utf8", "not-json", "not-object"})


def decoder(whole: Config) -> Decoder[FromBackend]:
    """Return what takes messages over WebSocket, within the bounds of the configuration."""
    limits = whole.websocket
    return _decoder(FromBackend, limits.max_message_bytes, limits.max_depth, whole.messages.unknown_fields == "refuse")


def body_decoder(type: type[T], whole: Config) -> BodyDecoder[T]:
    """Return what reads bodies of answers over HTTP, within the same bounds as messages over WebSocket."""
    refuse_unknown = whole.messages.unknown_fields == "refuse"
    return _body_decoder(type, whole.http.max_response_bytes, whole.websocket.max_depth, refuse_unknown)


# A decoder does not change once it is made, and to look at the types takes milliseconds: all managers of a process, and
# all connections, share them.
@lru_cache(maxsize=64)
def _decoder(union: object, max_bytes: int, max_depth: int, refuse_unknown: bool) -> Decoder[Any]:
    return Decoder(union, max_bytes=max_bytes, max_depth=max_depth, refuse_unknown=refuse_unknown)


@lru_cache(maxsize=64)
def _body_decoder(type: type[T], max_bytes: int, max_depth: int, refuse_unknown: bool) -> BodyDecoder[T]:
    return BodyDecoder(type, max_bytes=max_bytes, max_depth=max_depth, refuse_unknown=refuse_unknown)


class _OldResult(Struct):
    """The form of a result that plain backends took before there were types; ``id`` is the command's."""

    id: Id
    output: str | UnsetType | None = UNSET
    error: str | UnsetType | None = UNSET


_OLD_RESULT = form_of(_OldResult)
_old_result = msgspec.json.Decoder(_OldResult)


def decode_old_result(payload: bytes) -> ResultBody | None:
    """
    Return the result in a message that has no type, ``{"id", "output", "error"}``; None if it is no such result.

    For payloads that :meth:`Decoder.decode` refused with ``no-type``. A text in ``error`` makes it an ``error``.
    """
    try:
        old = _old_result.decode(payload)
        _OLD_RESULT.check(old)
    except (ValueError, RecursionError, Malformed):
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
