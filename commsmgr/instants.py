"""Moments as text, for the wire, the log and people."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any


def rfc3339(seconds: Any) -> str:
    """
    Return a moment as RFC 3339 has it, in UTC, with the milliseconds that are over: it is never ahead of the clock.

    :param seconds: since the epoch.
    :raise ValueError: it is no moment, or none that has a date.
    """
    try:
        second, part = _split(seconds)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{seconds!r} has no date") from error
    return f"{_date(second)}.{part:03}Z"


class Timestamps:
    """
    Tells the time as :func:`rfc3339` does.

    Each message asks for it, and many do within a millisecond. The date is made once a second.

    :param seconds: since the epoch.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._second: int | None = None
        self._date = ""
        self._part: int | None = None
        self._text = ""

    def __call__(self) -> str:
        """Return the time now."""
        second, part = _split(self._seconds())
        if part != self._part or second != self._second:
            if second != self._second:
                self._date = _date(second)
                self._second = second
            self._text = f"{self._date}.{part:03}Z"
            self._part = part
        return self._text


def shown(seconds: float) -> str:
    """Return a moment for people; a machine's clock may be anywhere, and this must not fail for it."""
    try:
        return f"{_date(math.floor(seconds))}Z"
    except (TypeError, ValueError, OverflowError):
        return f"{seconds} s"


def _split(seconds: float) -> tuple[int, int]:
    """Return the whole seconds, and the milliseconds that are over."""
    second = math.floor(seconds)
    # What is left of a float of today has bits to spare for this; the whole times 1000 may be rounded up.
    return second, min(int((seconds - second) * 1000.0), 999)


def _date(second: int) -> str:
    try:
        return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()
    except (OverflowError, OSError) as error:
        raise ValueError(f"{second} has no date") from error
