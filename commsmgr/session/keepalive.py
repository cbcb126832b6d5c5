"""
Whether the peer still lives: when to ping, when to give up.

Theory of operation. There are two ways to be dead:

- ``silent``: after ``interval`` seconds in which nothing came a ping is sent, after ``timeout`` more the peer is dead.
  A link that breaks without a word is noticed within ``interval + timeout``.
- ``no-pong``: data comes, yet a ping has had no pong for ``pong_timeout``: what we send gets lost. So that there is a
  ping to miss, one is sent when the last pong is ``pong_timeout`` old, and such a loss is noticed within twice that.

The clock may jump and the machine may sleep, and neither says anything about the peer. A check notices it: by a time
before something that was noted earlier, or by coming later than it was asked to. Then everything noted so far is void,
a ping is due at once, and it gets its whole ``timeout``: a sleeping laptop wakes up to one ping and that patience.

How late is late? While a ping is unanswered, waits are cut into slices of a quarter of ``timeout``; another quarter (at
least a second, which a busy process may need) is allowed on top. So a leap ahead by more than half of ``timeout`` is
always noticed; a smaller one may not be, and then shortens the patience by as much as it leapt. Likewise a small step
back lengthens it.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

_STALL = 1.0
_LEAST_WAIT = 0.001


class Wait(Struct, frozen=True, tag=True):
    """Nothing to do; check again after ``seconds``, at least a thousandth."""

    seconds: float


class SendPing(Struct, frozen=True, tag=True):
    """Send a ping now, call :meth:`KeepAlive.pinged`, and check again at once to learn how long to wait."""


class Dead(Struct, frozen=True, tag=True):
    """Give the connection up; ``reason`` is ``silent`` or ``no-pong``."""

    reason: str


Action: TypeAlias = Wait | SendPing | Dead


class KeepAlive:
    """
    One connection's keep-alive. All times are seconds of one clock that the owner reads.

    The owner calls :meth:`check` from one timer, which it arms anew by each :class:`Wait`; it need not touch the timer
    when something comes or is sent.

    :param interval: silence after which a ping is sent.
    :param timeout: silence after that which ends the connection.
    :param now: when the connection was opened.
    :param pong_timeout: how long a ping may go without its pong although other data comes. Should be longer than the
        peer takes to read a full window over the slowest network.
    """

    def __init__(self, interval: float, timeout: float, now: float, *, pong_timeout: float) -> None:
        self._interval = interval
        self._timeout = timeout
        self._pong_timeout = pong_timeout
        self._slice = timeout / 4
        self._lateness = max(self._slice, _STALL)
        self._heard = now
        self._ponged = now
        self._pinged: float | None = None
        self._checked = now
        self._due = now

    def heard(self, now: float) -> None:
        """Anything came from the peer: bytes count, not only whole messages."""
        self._heard = now

    def pinged(self, now: float) -> None:
        """A ping was sent, whatever for. Only the oldest unanswered one counts."""
        if self._pinged is None:
            self._pinged = now

    def ponged(self, now: float) -> None:
        """A pong came that answers one of our pings; strays are only :meth:`heard`."""
        self._heard = self._ponged = now
        self._pinged = None

    def check(self, now: float) -> Action:
        """Return what to do now."""
        noted = max(self._heard, self._checked, self._pinged or self._checked)
        steady = noted <= now <= self._due + self._lateness
        self._checked = self._due = now
        if not steady:
            self._heard, self._ponged, self._pinged = now - self._interval, now, None
        if self._pinged is None:
            ping_at = min(self._heard + self._interval, self._ponged + self._pong_timeout)
            if now < ping_at:
                return self._wait(ping_at - now)
            # An owner that only comes back when the ping should have been answered is not late.
            self._due += self._timeout
            return SendPing()
        silent_at = max(self._heard + self._interval, self._pinged) + self._timeout
        if now >= silent_at:
            return Dead("silent")
        no_pong_at = self._pinged + self._pong_timeout
        if now >= no_pong_at:
            return Dead("no-pong")
        return self._wait(min(silent_at - now, no_pong_at - now, self._slice))

    def _wait(self, seconds: float) -> Wait:
        # What is left by rounding can be too little to move a timer's clock: without a least the owner could spin.
        seconds = max(seconds, _LEAST_WAIT)
        self._due += seconds
        return Wait(seconds)
