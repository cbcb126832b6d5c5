"""Moments as text, for the wire, the log and people."""

from __future__ import annotations

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


def shown(seconds: float) -> str:
    """Return a moment for people; a machine's clock may be anywhere, and this must not fail for it."""
    try:
        return rfc3339(seconds, "seconds")
    except ValueError:
        return f"{seconds} s"
