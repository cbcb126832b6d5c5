"""
Frames as nearly all of them are (RFC 6455 section 5.2): text, whole and final, without extension, no control frames.

autobahn reads a frame in steps of a state machine, and cuts what it has read off the buffer at each of them, which
takes longer than all that is done with a small message after that. So the plain case is taken here, and whatever is not
plain is left to autobahn as it came: fragments, control and binary frames, reserved bits and opcodes, masks, lengths
that are wrong or too large, what is not there as a whole yet, and text that is not UTF-8. It judges those, and fails
the connection where it must. What is plain here is what autobahn would have passed on.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from autobahn.websocket.xormasker import create_xor_masker  # type: ignore[attr-defined]  # made by either of two modules

_FINAL_TEXT: Final = 0x81
# Lengths from here on are written in more bytes; in the place of the length this stands for two more.
_LONGER: Final = 126
_head = Struct("!BB4s").pack
_head_of_64k = Struct("!BBH4s").pack
_head_beyond = Struct("!BBQ4s").pack
# Above this size autobahn's masker is faster than arithmetic, with its native code at least.
_LONG_INTEGER: Final = 1500


def unfragmented_texts(data: bytes, limit: int) -> tuple[list[bytes], int]:
    """
    Take the text messages off the beginning of ``data`` that are plain frames of a server (not masked).

    Ask between two messages only. Where compression was agreed, a plain one is one that is not compressed (RFC 7692
    section 6): that is what a reserved bit says.

    :param limit: the largest payload, in bytes; what is larger is not plain.
    :return: their payloads, and how many bytes of ``data`` they were.
    """
    payloads: list[bytes] = []
    at, end = 0, len(data)
    while end - at >= 2 and data[at] == _FINAL_TEXT:
        length, begin = data[at + 1], at + 2
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
        if not (payload.isascii() or _is_utf8(payload)):
            break
        payloads.append(payload)
        at = following
    return payloads, at


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
    if length < _LONGER:
        header = _head(first, 0x80 | length, mask)
    elif length < 1 << 16:
        header = _head_of_64k(first, 0x80 | _LONGER, length, mask)
    else:
        header = _head_beyond(first, 0x80 | _LONGER + 1, length, mask)
    if length > _LONG_INTEGER:
        masked: bytes = create_xor_masker(mask, length).process(payload)
    else:
        # As numbers, the order of whose bytes does not matter; this one is the quicker.
        key = (mask * (length // 4 + 1))[:length]
        masked = (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(length, "little")
    return header + masked
