"""
Message ids: UUIDv7 (RFC 9562 section 5.7), so that they sort by the time they were made.

A receiver may therefore forget old ids by prefix, and a log sorts by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_COUNTER_BITS = 12
_STOCK = 32
"""Ids for which random bits are asked for at a time; few, for each manager has a stock."""


class IdSource:
    """
    Makes message ids that never repeat and never go backwards within one process.

    :param seconds: the time as seconds since the epoch.
    :param random: where the random bits come from. Twisted's and autobahn's habit of reseeding the module-level
        generator must not touch ids, hence an instance of its own. It is asked for many bits at a time: the system's
        are a system call each time, in which another thread may take the interpreter. So after a fork only one side may
        go on with it.

    The 12 bits after the version count within one millisecond (RFC 9562 section 6.2, method 1). When the clock steps
    back the last millisecond is kept and counted on: order matters more than the time in the id.
    """

    def __init__(self, seconds: Callable[[], float], random: Random) -> None:
        self._seconds = seconds
        self._random = random
        self._digits = ""
        self._at = 0
        self._last = 0

    def __call__(self) -> str:
        """Return the next id, 36 characters of lower-case hexadecimal and hyphens."""
        now = int(self._seconds() * 1000) << _COUNTER_BITS
        self._last = last = now if now > self._last else self._last + 1
        if self._at == len(self._digits):
            self._digits, self._at = self._random.randbytes(8 * _STOCK).hex(), 0
        digits, at = self._digits, self._at
        self._at = at + 16
        milliseconds = last >> _COUNTER_BITS & 0xFFFF_FFFF_FFFF
        # The variant (RFC 9562 section 4.1), which leaves 62 of 64 bits to chance.
        variant = "89ab"[int(digits[at], 16) & 3]
        return (
            f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-7{last & 0xFFF:03x}"
            f"-{variant}{digits[at + 1 : at + 4]}-{digits[at + 4 : at + 16]}"
        )
