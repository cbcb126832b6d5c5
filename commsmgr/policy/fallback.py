"""When results go over HTTP for want of a WebSocket."""

from __future__ import annotations


class Fallback:
    """
    Says how long to wait for a link.

    A link that comes and goes without delivering anything is no way: a proxy that cuts every WebSocket must not keep
    the results from going over HTTP.

    :param after: seconds without a way from which on there is no more waiting.
    :param now: seconds of a monotonic clock, here and below.
    """

    def __init__(self, after: float, now: float) -> None:
        self._after = after
        self._lost_at = self._up_at = now
        self._has_delivered = False

    def link_up(self, now: float) -> None:
        """There is a link."""
        self._up_at = now

    def delivered(self) -> None:
        """Something was delivered over the link."""
        self._has_delivered = True

    def link_down(self, now: float) -> None:
        """The link is gone: the wait begins anew if it was a way."""
        if self._has_delivered or now - self._up_at >= self._after:
            self._lost_at = now
        self._has_delivered = False

    def wait(self, now: float) -> float:
        """Return the seconds that are left to wait for a link; 0 or less: none."""
        return self._lost_at + self._after - now
