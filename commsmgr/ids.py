"""
Message ids: UUIDv7 (RFC 9562 section 5.7), so that they sort by the time they were made.

A receiver may therefore forget old ids by prefix, and a log sorts by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_COUNTER_BITS = 12


class IdSource:
    """
    Makes message ids that never repeat and never go backwards within one process.

    :param seconds: the time as seconds since the epoch.
    :param random: where the random bits come from. Twisted's and autobahn's habit of reseeding the module-level
        generator must not touch ids, hence an instance of its own.

    The 12 bits after the version count within one millisecond (RFC 9562 section 6.2, method 1). When the clock steps
    back the last millisecond is kept and counted on: order matters more than the time in the id.
    """

    def __init__(self, seconds: Callable[[], float], random: Random) -> None:
        self._seconds = seconds
        self._random = random
        self._last = 0

    def __call__(self) -> str:
        """Return the next id, 36 characters of lower-case hexadecimal and hyphens."""
        now = int(self._seconds() * 1000) << _COUNTER_BITS
        self._last = last = max(now, self._last + 1)
        high = (last >> _COUNTER_BITS & 0xFFFF_FFFF_FFFF) << 16 | 0x7000 | (last & 0xFFF)
        low = 0b10 << 62 | self._random.getrandbits(62)
        digits = f"{high:016x}{low:016x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
