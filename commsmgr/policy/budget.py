"""
Two budgets: how much retrying a backend in trouble should bear, and how long an outage the spool can still bridge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_GRAIN = 1.0
"""Seconds within which what is accepted counts as accepted at once."""


class RetryBudget:
    """
    Stops retries when most of what is tried fails, so that they do not multiply the load of a backend that is down.

    The rule is gRPC's retry throttle (gRFC A6): a failure worth retrying takes one token, a success gives back
    ``ratio`` of one, and retries are allowed only above half. First attempts are never held back.

    :param tokens: how many tokens there are at most, and at the start.
    :param ratio: tokens per success.
    """

    def __init__(self, tokens: float = 10, ratio: float = 0.1) -> None:
        self._most = self._tokens = float(tokens)
        self._ratio = ratio

    def failed(self) -> None:
        """An attempt failed in a way that another could mend."""
        self._tokens = max(0.0, self._tokens - 1)

    def succeeded(self) -> None:
        """An attempt succeeded."""
        self._tokens = min(self._most, self._tokens + self._ratio)

    def allows_retry(self) -> bool:
        """Return whether a failed attempt may be repeated."""
        return self._tokens > self._most / 2


class OutageBudget:
    """
    Estimates how long an outage the spool can still buffer at the present rate of events.

    The rates are exponentially weighted sums: what was accepted ``window`` seconds ago weighs 1/e. They are divided by
    the part of the window that has been seen, so that an agent that has just started does not promise too much.

    :param seconds: a monotonic clock.
    :param window: how far the estimate looks back, in seconds. After three windows without an event nothing counts as
        being produced.
    """

    def __init__(self, seconds: Callable[[], float], window: float = 300.0) -> None:
        self._seconds = seconds
        self._window = window
        self._start = self._last = seconds()
        self._events = 0.0
        self._bytes = 0.0

    def accepted(self, count: int, size_bytes: int) -> None:
        """``count`` events of ``size_bytes`` together were accepted into the spool."""
        now = self._seconds()
        if not 0 <= now - self._last < _GRAIN:
            weight = self._weight(now)
            self._events *= weight
            self._bytes *= weight
            self._last = now
        self._events += count
        self._bytes += size_bytes

    def seconds_left(self, free_count: int, free_bytes: int) -> float | None:
        """
        Return how many seconds of outage the spool can buffer, None while nothing is being produced.

        :param free_count: events that still fit.
        :param free_bytes: bytes of event bodies that still fit.
        """
        now = self._seconds()
        if not self._events or now - self._last > 3 * self._window:
            return None
        # Under a second there is no telling a burst from a rate.
        seen = -math.expm1(-max(1.0, now - self._start) / self._window) * self._window
        weight = self._weight(now) / seen
        left = free_count / (self._events * weight)
        if self._bytes:
            left = min(left, free_bytes / (self._bytes * weight))
        return max(0.0, left)

    def _weight(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._last) / self._window)
