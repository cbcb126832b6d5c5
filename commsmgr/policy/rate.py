"""How often something may happen: so many at once, so many per second in the long run."""

from __future__ import annotations

import math
from collections.abc import Callable


class TokenBucket:
    """
    Holds up to ``burst`` tokens and gains ``rate`` of them a second; what happens takes some.

    It is asked for each message, so it looks at the clock only when it seems to be empty. What it gained until then
    counts no further than a full bucket: within ``burst / rate`` seconds at most twice ``burst`` are taken.

    :param rate: tokens per second; 0 for a bucket that is never empty.
    :param burst: how many it holds, above 0; it is full at the start.
    :param seconds: a monotonic clock. When it steps back, what was gained since the last look is forgotten.
    """

    def __init__(self, rate: float, burst: float, seconds: Callable[[], float]) -> None:
        self._rate = rate
        self._most = self._tokens = float(burst) if rate else math.inf
        self._seconds = seconds
        self._since = seconds()

    def take(self, count: float = 1) -> bool:
        """
        Take ``count`` tokens, or none and return False when the bucket is empty.

        Whatever is in it pays for any ``count``; what it owes then is gained back first. So one large thing passes.
        """
        if self._tokens <= 0:
            now = self._seconds()
            gained = max(now - self._since, 0.0) * self._rate
            self._since = now
            self._tokens = min(self._tokens + gained, self._most)
            if self._tokens <= 0:
                return False
        self._tokens -= count
        return True

    def give_back(self, count: float = 1) -> None:
        """What was taken did not happen, or should not have been paid for."""
        self._tokens = min(self._tokens + count, self._most)
