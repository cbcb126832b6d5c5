"""One log line for many of a kind."""

from __future__ import annotations

from collections.abc import Callable


class LogThrottle:
    """
    Lets one log line of a reason through per interval, and counts the others.

    :param seconds: a clock; which one does not matter, and when it steps back a line more comes through.
    :param interval: seconds between two lines of the same reason.
    """

    __slots__ = ("_bursts", "_interval", "_seconds")

    _MOST_REASONS = 64

    def __init__(self, seconds: Callable[[], float], interval: float = 10.0) -> None:
        self._seconds = seconds
        self._interval = interval
        self._bursts: dict[str, tuple[float, int]] = {}

    def allow(self, reason: str) -> int | None:
        """
        Say whether to log ``reason`` now.

        :return: None when not; otherwise how many occurrences were held back since the last one that was let through.
            More than 64 reasons within one interval share one burst, so that a peer that invents them floods nothing.
        """
        now = self._seconds()
        if reason not in self._bursts and len(self._bursts) >= self._MOST_REASONS:
            self._bursts = {known: burst for known, burst in self._bursts.items() if not self._over(burst[0], now)}
            if len(self._bursts) >= self._MOST_REASONS:
                reason = ""
        burst = self._bursts.get(reason)
        if burst is not None and not self._over(burst[0], now):
            self._bursts[reason] = (burst[0], burst[1] + 1)
            return None
        self._bursts[reason] = (now, 0)
        return burst[1] if burst is not None else 0

    def _over(self, began: float, now: float) -> bool:
        return not began <= now < began + self._interval
