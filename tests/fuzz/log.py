"""
A write-ahead log as a disk may give it back. The data are instructions, since no mutation hits a checksum.

The first byte says the page size of the database in pages; then come edits to a good log, each of five bytes: what is
done, three of where, and a value. What is done: 0 sets a byte, 1 cuts off, 2 copies a frame over another, 3 fills a
frame with zeros, 4 swaps the salts of a frame's with the header's, 5 makes its checksum right again.
"""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryFile

from commsmgr.spool import wal
from tests.fuzz.kit import nothing_wrong, promise

INSTRUMENT = ("commsmgr.spool.wal",)

TOKENS = (b"\x00\x00\x00\x00", b"\x02\x00\x00\x01\x02", b"\x05\x00\x00\x01\x00", b"\x01\x00\x10\x38\x00")

FRAMES = 6
SALTS = b"saltSALT"


def _good() -> bytes:
    """Return a log of three transactions of two pages each."""
    header = wal.MAGIC[1] + (3007000).to_bytes(4, "big") + wal.PAGE_SIZE.to_bytes(4, "big") + bytes(4) + SALTS
    seed = wal.log_checksum(_words(header), (0, 0))
    log = header + _pair(seed)
    for index in range(FRAMES):
        committed = 4 if index % 2 else 0
        frame = _pair((1 + index % 4, committed)) + SALTS + bytes(8) + bytes([index]) * wal.PAGE_SIZE
        seed = wal.frame_checksum(">", frame, seed)
        log += frame[:16] + _pair(seed) + frame[24:]
    return log


def _words(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4))


def _pair(numbers: tuple[int, int]) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


GOOD = _good()


def one(data: bytes) -> None:
    """See that the walk ends, and speaks only of pages that are there and of a database that could be."""
    pages = data[0] if data else 0
    log = bytearray(GOOD)
    for at in range(1, len(data) - 4, 5):
        _edit(log, data[at], int.from_bytes(data[at + 1 : at + 4], "big"), data[at + 4])
    with nothing_wrong(), TemporaryFile() as file:
        file.write(log)
        file.flush()
        read = wal.read(file, pages * wal.PAGE_SIZE, wal.part)
    for number, position in read.latest.items():
        promise(number > 0, "page 0 does not exist", read)
        promise(0 < position <= len(log) - wal.PAGE_SIZE, "a page beyond the end", read)
        promise((position - wal.HEADER - 24) % wal.FRAME == 0, "a page that begins within another", read)
    most = pages + len(log) // wal.PAGE_SIZE + (1 << 16)
    promise(0 <= read.pages <= max(most, 4), "a database that cannot be", read.pages)
    if bytes(log) == GOOD:
        promise(read.whole and not read.lost and len(read.latest) == 4 and read.pages == 4, "a good log is not", read)


def _edit(log: bytearray, what: int, where: int, value: int) -> None:
    frame = wal.HEADER + where % FRAMES * wal.FRAME
    other = wal.HEADER + value % FRAMES * wal.FRAME
    match what % 6:
        case 0 if log:
            log[where % len(log)] = value
        case 1:
            del log[where % (len(GOOD) + 1) :]
        case 2:
            log[frame : frame + wal.FRAME] = log[other : other + wal.FRAME]
        case 3:
            log[frame : frame + wal.FRAME] = bytes(len(log[frame : frame + wal.FRAME]))
        case 4:
            log[frame + 8 : frame + 16] = bytes([value]) * len(log[frame + 8 : frame + 16])
        case 5 if len(log) >= frame + wal.FRAME and bytes(log[:4]) in wal.MAGIC:
            before = log[frame - wal.FRAME + 16 : frame - wal.FRAME + 24] if where % FRAMES else log[24:32]
            first, second = _words(bytes(before))
            sums = wal.frame_checksum(">", bytes(log[frame : frame + wal.FRAME]), (first, second))
            log[frame + 16 : frame + 24] = _pair(sums)


def seeds() -> Iterator[bytes]:
    """Yield a good log, and some that a power cut or a disk has been at."""
    yield b"\x04"
    for what in range(6):
        for where in (0, 2, 5, 40, 4200):
            yield bytes([4, what]) + where.to_bytes(3, "big") + b"\x03"
    yield bytes([4, 0, 0, 0, 3, 9, 5, 0, 0, 1, 0])
