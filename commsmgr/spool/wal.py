"""
What stands in a write-ahead log, as SQLite would see it, and what SQLite does not say: whether it is damaged.

SQLite takes a log up to the first frame whose checksum is wrong, and none of it when its header is wrong. After a power
cut that is right: what was not flushed was not told to anybody. But when the disk has flipped a bit, all that was
accepted since is gone without a word, and a command that was offered counts as never seen. So at a start that finds a
log, once, its frames are walked:

* A frame is bad, and more was written to this log after the end of its transaction: that transaction was flushed, and
  the log is damaged. Frames of this log are known by its salts, which are new and random each time it begins anew. What
  was written after has an end of a transaction of its own, or goes on from the one before.
* A frame is bad, and nothing follows its transaction: that is what a power cut leaves, for the disk may write the
  frames of one transaction in any order. A flipped bit in the very last transaction cannot be told from this. Nor does
  a rest count that has no end and does not go on: it is what was left of a larger transaction that was never finished,
  and over whose beginning this one was being written.
* The header is bad: before frames are written the header is flushed, so a power cut can leave this only when the log
  was about to begin anew. Then all that is in it is in the database as well; if not, the log is damaged.

With ``durability = "normal"`` transactions are not flushed, and a disk that writes in another order may leave in a
power cut what looks like damage. That errs on the safe side: what was lost is counted, and no command is run twice.

What stands behind a bad frame is not thrown away: each frame shows by itself that it goes on from the one before. The
page that was bad stays as it was, which costs what was new on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from struct import Struct as Layout
from struct import unpack
from typing import BinaryIO, Final, TypeAlias

from msgspec import Struct

PAGE_SIZE: Final = 4096
MAGIC: Final = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
HEADER: Final = 32
FRAME: Final = 24 + PAGE_SIZE

_ZEROS: Final = bytes(FRAME)

_MASK: Final = 0xFFFFFFFF
_SLACK: Final = 1 << 16
"""Pages by which a database may outgrow its files: what frames that are bad speak of must not make it terabytes."""

_PAIR: Final = Layout(">2I")


Take: TypeAlias = Callable[[BinaryIO, int, int], bytes]
"""Reads a part of a file: :func:`part`, or :func:`around` what the disk cannot read."""


class Log(Struct, frozen=True):
    """
    :ivar whole: whether the header is.
    :ivar latest: where in the file the latest committed copy of each page stands.
    :ivar pages: of the database after the last transaction; 0 without any.
    :ivar bad: where the first bad frame is, if the log is damaged.
    :ivar lost: whether transactions are, or may be, incomplete or missing.
    """

    whole: bool
    latest: dict[int, int]
    pages: int
    bad: int | None
    lost: bool


def read(file: BinaryIO, database_bytes: int, take: Take) -> Log:
    """
    Walk the log ``file``.

    :param database_bytes: of the database that it belongs to.
    """
    header = take(file, 0, HEADER)
    most = (database_bytes + os.fstat(file.fileno()).st_size) // PAGE_SIZE + _SLACK
    whole = is_whole(header)
    known, order, salts = whole, _order(header), header[16:24]
    stored = computed = _PAIR.unpack(header[24:]) if len(header) == HEADER else (0, 0)
    latest: dict[int, int] = {}
    pending: dict[int, int] = {}
    held: tuple[dict[int, int], int, int] | None = None
    pages, lost, torn = 0, False, False
    first_bad = bad = None
    start = HEADER - FRAME
    while len(frame := take(file, start := start + FRAME, FRAME)) == FRAME:
        if frame == _ZEROS:
            # Nobody wrote it: a hole, which may be of gigabytes. By its checksum and salts it would be one of a log of
            # zeros, to which nothing else belongs.
            stored = computed = 0, 0
            if known:
                first_bad, torn = start if first_bad is None else first_bad, True
            else:
                lost = True
            continue
        number, committed = _PAIR.unpack(frame[:8])
        seeds = dict.fromkeys((stored, computed))
        stored = computed = _PAIR.unpack(frame[16:24])
        if not known:  # the first frame that can be one stands for the log's beginning
            found = _goes_on_from(header, frame) if start == HEADER else None
            found = found or _is_gone_on_from(frame, take(file, start + FRAME, FRAME))
            if found is None or not number or max(number, committed) > most:
                lost = True
                continue
            known, salts, order, good = True, frame[8:16], found, True
        else:
            # The checksum that was stored in the frame before may be what is wrong.
            sums = [frame_checksum(order, frame, seed) for seed in seeds]
            good, computed = number > 0 and frame[8:16] == salts and stored in sums, sums[-1]
        ours = frame[8:16] == salts
        goes_on = held is not None and good and start == held[2]
        if ours and held is not None and (committed or goes_on):  # written after the end of a transaction that is bad
            latest |= held[0]
            pages, held, bad = held[1] or pages, None, first_bad
        if not good:  # the page stays as it was: nothing tells whether its number is the right one
            first_bad, torn = start if first_bad is None else first_bad, True
        if good:
            pending[number] = start + FRAME - PAGE_SIZE
        # Of an earlier log neither half of the salts would be right.
        if committed and (frame[8:12] == salts[:4] or frame[12:16] == salts[4:]):
            if torn:
                held = pending, committed if good else 0, start + FRAME
            else:
                latest |= pending
                pages = committed
            pending, torn = {}, False
    return Log(whole, latest, pages, bad, lost or bad is not None or held is not None or not (whole or pages))


def is_news(log: Log, file: BinaryIO, database: BinaryIO) -> bool:
    """Say whether ``log`` holds anything that is not in ``database``."""
    return any(
        part(file, position, PAGE_SIZE) != part(database, (number - 1) * PAGE_SIZE, PAGE_SIZE)
        for number, position in log.latest.items()
        if 0 < number <= log.pages
    )


def is_whole(header: bytes) -> bool:
    """Say whether the log's header is as it was written."""
    return (
        len(header) == HEADER
        and header[:4] in MAGIC
        and log_checksum(unpack(f"{_order(header)}6I", header[:24]), (0, 0)) == _PAIR.unpack(header[24:])
    )


def part(file: BinaryIO, start: int, size: int) -> bytes:
    """
    Return ``size`` bytes of the file, or what there is of them.

    :raise OSError: the disk cannot read them all.
    """
    return os.pread(file.fileno(), size, start)


def around(file: BinaryIO, start: int, size: int) -> bytes:
    """As :func:`part`, with zeros where the disk cannot read, page by page."""
    with suppress(OSError):
        return part(file, start, size)
    end = min(start + size, os.fstat(file.fileno()).st_size)
    found = bytearray(max(end - start, 0))
    for page in range(start - start % PAGE_SIZE, end, PAGE_SIZE):
        first, behind = max(page, start), min(page + PAGE_SIZE, end)
        with suppress(OSError):
            found[first - start : behind - start] = part(file, first, behind - first)
    return bytes(found)


def _order(header: bytes) -> str:
    return ">" if header[:4] == MAGIC[1] else "<"


def _goes_on_from(header: bytes, frame: bytes) -> str | None:
    """Find the byte order in which the first frame goes on from the header, or from what that should have been."""
    if len(header) < HEADER:
        return None
    stored = _PAIR.unpack(frame[16:24])
    for order in "<>":
        for seed in (_PAIR.unpack(header[24:]), log_checksum(unpack(f"{order}6I", header[:24]), (0, 0))):
            if frame_checksum(order, frame, seed) == stored:
                return order
    return None


def _is_gone_on_from(frame: bytes, following: bytes) -> str | None:
    """
    Find the byte order in which ``following`` goes on from ``frame``.

    :return: None when it does not: ``frame`` is damaged, or of an earlier log.
    """
    if len(following) < FRAME:
        return "<"  # there is none, and it does not matter
    seed, stored = _PAIR.unpack(frame[16:24]), _PAIR.unpack(following[16:24])
    if frame[8:16] == following[8:16]:
        for order in "<>":
            if frame_checksum(order, following, seed) == stored:
                return order
    return None


def frame_checksum(order: str, frame: bytes, seed: tuple[int, int]) -> tuple[int, int]:
    """
    Return the checksum of a frame of the log, its header and the page.

    :param order: of the bytes in its words, as :mod:`struct` writes it.
    :param seed: the checksum of the frame before it, or of the log's header.
    """
    return log_checksum(
        unpack(f"{order}{len(frame) // 4 - 6}I", frame[24:]), log_checksum(unpack(f"{order}2I", frame[:8]), seed)
    )


def log_checksum(words: tuple[int, ...], seed: tuple[int, int]) -> tuple[int, int]:
    """Return the checksum of ``words``, going on from ``seed``."""
    first, second = seed
    both = iter(words)
    for even, odd in zip(both, both, strict=True):
        first = (first + even + second) & _MASK
        second = (second + odd + first) & _MASK
    return first, second
