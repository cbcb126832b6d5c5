"""Moments as text, for the wire, the log and people."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any


def rfc3339(seconds: Any, timespec: str = "milliseconds") -> str:
    """
    Return a moment as RFC 3339 has it, in UTC.

    :param seconds: since the epoch.
    :raise ValueError: it is no moment, or none that has a date.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
    except (TypeError, OverflowError, OSError) as error:
        raise ValueError(f"{seconds!r} has no date") from error


class Timestamps:
    """
    Tells the time as RFC 3339, to the millisecond.

    Each message asks for it, and many do within a millisecond. The date is made once a second.

    :param seconds: since the epoch.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._second: int | None = None
        self._date = ""
        self._millisecond: int | None = None
        self._text = ""

    def __call__(self) -> str:
        """Return the time now."""
        now = math.floor(self._seconds() * 1000)
        if now != self._millisecond:
            second, part = divmod(now, 1000)
            if second != self._second:
                self._date = rfc3339(second, "seconds").removesuffix("Z")
                self._second = second
            self._text = f"{self._date}.{part:03}Z"
            self._millisecond = now
        return self._text


def shown(seconds: float) -> str:
    """Return a moment for people; a machine's clock may be anywhere, and this must not fail for it."""
    try:
        return rfc3339(seconds, "seconds")
    except ValueError:
        return f"{seconds} s"
