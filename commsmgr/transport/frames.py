"""
Frames as nearly all of them are (RFC 6455 section 5.2): whole, final, without extension, and no control frames.

autobahn reads a frame in steps of a state machine, and cuts what it has read off the buffer at each of them, which takes
longer than all that is done with a small message after that. So the plain case is taken here, and whatever is not plain
is left to autobahn as it came: fragments, control frames, reserved bits and opcodes, masks, lengths that are wrong or
too large, what is not there as a whole yet, and text that is not UTF-8. It judges those, and fails the connection where
it must. What is plain here is what autobahn would have passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from autobahn.websocket.xormasker import create_xor_masker  # type: ignore[attr-defined]  # made by either of two modules

_FINAL_TEXT: Final = 0x81
_FINAL_BINARY: Final = 0x82
# Lengths from here on are written in more bytes; in the place of the length this stands for two more.
_LONGER: Final = 126
# Above this size autobahn's masker is faster than arithmetic, with its native code at least.
_LONG_INTEGER: Final = 1500


def take_plain(data: bytes, limit: int, take: Callable[[bytes, bool], bool]) -> int:
    """
    Take the messages at the beginning of ``data`` that are plain frames of a server (not masked).

    Call it between two messages only, and on connections without compression.

    :param limit: the largest payload, in bytes; what is larger is not plain.
    :param take: called with each payload and whether it is text; no more is taken when it returns False.
    :return: how many bytes of ``data`` were taken.
    """
    at, end = 0, len(data)
    while end - at >= 2:
        first, length, begin = data[at], data[at + 1], at + 2
        if length >= _LONGER:
            if length > _LONGER or end - at < 4:
                break
            length, begin = data[at + 2] << 8 | data[at + 3], at + 4
            if length < _LONGER:
                break
        following = begin + length
        if following > end or length > limit:
            break
        payload = data[begin:following]
        if first == _FINAL_TEXT:
            if not (payload.isascii() or _is_utf8(payload)):
                break
        elif first != _FINAL_BINARY:
            break
        at = following
        if not take(payload, first == _FINAL_TEXT):
            break
    return at


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def encode_frame(opcode: int, payload: bytes, mask: bytes, *, fin: bool = True, rsv: int = 0) -> bytes:
    """
    Return one masked frame (RFC 6455 section 5.2).

    :param mask: four random bytes.
    """
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    length = len(payload)
    if length < 126:
        header = bytes((first, 0x80 | length))
    elif length < 1 << 16:
        header = bytes((first, 0x80 | 126)) + length.to_bytes(2, "big")
    else:
        header = bytes((first, 0x80 | 127)) + length.to_bytes(8, "big")
    if length > _LONG_INTEGER:
        masked: bytes = create_xor_masker(mask, length).process(payload)
    else:
        key = (mask * (length // 4 + 1))[:length]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
    return header + mask + masked
