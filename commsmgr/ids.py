"""
Message ids: UUIDv7 (RFC 9562 section 5.7), so that they sort by the time they were made.

A receiver may therefore forget old ids by prefix, and a log sorts by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_MOST = 0xFFF
"""How far the counter goes."""

_STOCK = 32
"""Ids for which random bits are asked for at a time; few, for each manager has a stock."""

_VARIANTS = {digit: "89ab"[value & 3] for value, digit in enumerate("0123456789abcdef")}
"""The variant (RFC 9562 section 4.1) for a random digit, two bits of which are left to chance."""


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
        self._millisecond = 0
        self._count = _MOST
        self._head = ""
        self._tails: list[str] = []

    def __call__(self) -> str:
        """Return the next id, 36 characters of lower-case hexadecimal and hyphens."""
        now = int(self._seconds() * 1000)
        self._count += 1
        if now > self._millisecond or self._count > _MOST:
            self._begin(max(now, self._millisecond + 1))
        if not self._tails:
            self._restock()
        return f"{self._head}{self._count:03x}{self._tails.pop()}"

    def _begin(self, millisecond: int) -> None:
        self._millisecond, self._count = millisecond, 0
        digits = f"{millisecond & 0xFFFF_FFFF_FFFF:012x}"
        self._head = f"{digits[:8]}-{digits[8:]}-7"

    def _restock(self) -> None:
        digits = self._random.randbytes(8 * _STOCK).hex()
        self._tails = [
            f"-{_VARIANTS[digits[at]]}{digits[at + 1 : at + 4]}-{digits[at + 4 : at + 16]}"
            for at in range(0, len(digits), 16)
        ]
