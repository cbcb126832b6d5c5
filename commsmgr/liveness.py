"""
Whether the backend at the other end of an open WebSocket still lives, and takes what is sent.

Two witnesses. The keep-alive (:mod:`commsmgr.session.keepalive`) asks when nothing comes. And receipts: a backend that
answers pings but has receipted nothing for ``websocket.receipt_timeout`` although results are in flight is of no use,
and the next connection may be better. Both decide; this module has the timer, and tells the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from commsmgr import config
from commsmgr.errors import PeerSilent
from commsmgr.session.keepalive import Dead, KeepAlive, SendPing, Wait

LEAP = 5.0
"""Seconds by which a check may come too late before it counts as a leap of the clock, or as sleep."""


class Liveness:
    """
    Watches one connection from :meth:`start` to :meth:`stop`.

    :param in_flight: how many results have no receipt yet.
    :param ping: sends a ping; False when the connection does not take it any more.
    :param dead: ends the connection, for the reason given.
    """

    def __init__(
        self,
        settings: config.WebSocket,
        clock: IReactorTime,
        *,
        in_flight: Callable[[], int],
        ping: Callable[[], bool],
        dead: Callable[[PeerSilent], None],
    ) -> None:
        now = clock.seconds()
        self._receipt_timeout = settings.receipt_timeout
        self._clock = clock
        self._in_flight = in_flight
        self._ping = ping
        self._dead = dead
        self._keepalive = KeepAlive(
            settings.ping_interval,
            settings.ping_timeout,
            now,
            pong_timeout=max(settings.receipt_timeout, settings.ping_interval + settings.ping_timeout),
        )
        self._progress_at = self._due = now
        self._call: IDelayedCall | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin to watch."""
        self._check()

    def stop(self) -> None:
        """The connection is over."""
        self._stopped = True
        if self._call is not None and self._call.active():
            self._call.cancel()

    def heard(self) -> None:
        """Some bytes came."""
        self._keepalive.heard(self._clock.seconds())

    def pinged(self) -> None:
        """A ping was sent, whatever for."""
        self._keepalive.pinged(self._clock.seconds())

    def ponged(self) -> None:
        """One of our pings was answered."""
        self._keepalive.ponged(self._clock.seconds())

    def progressed(self) -> None:
        """A receipt came, or a refusal: the backend deals with what is sent."""
        self._progress_at = self._clock.seconds()

    def sending(self) -> None:
        """Something is about to be in flight after nothing was: the time for its receipt begins."""
        self.progressed()
        # The next check was scheduled when there was nothing to wait for.
        due = self._progress_at + self._receipt_timeout
        if self._call is not None and self._call.active() and self._due > due:
            self._due = due
            self._call.reset(self._receipt_timeout)

    def _check(self) -> None:
        """Ask both witnesses, do what they say, and come back when there is something to ask again."""
        self._call = None
        now = self._clock.seconds()
        if not self._progress_at <= now <= self._due + LEAP:
            # The clock leapt, or the machine slept: that says nothing about the peer, which gets its whole time anew.
            self._progress_at = now
        count = self._in_flight()
        stuck_at = self._progress_at + self._receipt_timeout if count else inf
        if now >= stuck_at:
            self._dead(PeerSilent(f"no receipt for {count} results in flight within {self._receipt_timeout:g} s"))
            return
        action = self._keepalive.check(now)
        if isinstance(action, SendPing):
            if not self._ping():
                # It is being closed, within a time of its own: killing it would hide the reason.
                return
            self._keepalive.pinged(now)
            action = self._keepalive.check(now)
        match action:
            case Dead(reason):
                self._dead(PeerSilent(f"the backend no longer answers: {reason}"))
            case Wait(seconds) if not self._stopped:
                self._due = min(now + seconds, stuck_at)
                self._call = self._clock.callLater(self._due - now, self._check)
