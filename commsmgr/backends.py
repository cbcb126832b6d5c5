"""
The ordered list of backends: which one the WebSocket goes to, which one the next HTTP request goes to.

One backend is active at a time, at first the first. Theory of operation:

- *Away.* When the active backend's WebSocket has failed ``breaker.failures`` times in a row, the next one that has
  not failed lately takes over; if all have, the one whose failure is longest ago.
  There its link goes on with the backoff that it had, so that taking turns is not the same as trying without a wait.
- *Back.* A preferred backend comes back by proof, not by hope: from ``reconnect.return_after`` seconds after it was
  left the next HTTP request (usually a heartbeat) goes there first, and its success moves the WebSocket back. While
  the active one does not work either, any backend that answers is turned to at once. The link begins afresh then, but
  not more often than every ``return_after`` seconds: what HTTP proves need not hold for WebSockets.
- *HTTP* goes to the active backend unless its breaker is open or it has just refused the token, then to the others in
  order. The breaker sees HTTP only: a WebSocket that some proxy cuts must not close the way around it.

The old link is said goodbye to before the new one is started, so that a machine never has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import BreakerOpen
from commsmgr.link import Link
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.balancer import Candidate, choose
from commsmgr.policy.breaker import Breaker
from commsmgr.transport.http import HTTPClient
from commsmgr.urls import Target

GOODBYE = 5.0
"""Seconds that a link to a backend that is given up may take to drain."""


class Line(Struct):
    """
    One backend: its breaker, and the two transports to it.

    :ivar last_receipt: when it last proved that it takes what is sent, in seconds since the epoch; 0 for never.
    :ivar http_works: whether the last HTTP exchange with it went well; a WebSocket says for itself how it is.
    :ivar left_at: when its WebSocket was last given up for another backend's, by the reactor's clock.
    :ivar afresh_at: when its WebSocket last began afresh because HTTP had proven the backend, by the same clock.
    """

    name: str
    http_target: Target
    breaker: Breaker
    http: HTTPClient
    link: Link
    last_receipt: float = 0.0
    http_works: bool = False
    left_at: float | None = None
    afresh_at: float | None = None


class Backends:
    """
    Chooses among the lines, and moves the WebSocket when the choice changes.

    :param whole: ``breaker.failures``, ``reconnect.return_after``, ``websocket.enabled``.
    """

    log = Logger()

    def __init__(self, lines: Sequence[Line], *, whole: config.Config, clock: IReactorTime, metrics: Metrics) -> None:
        self.lines = tuple(lines)
        self._by_name = {line.name: line for line in lines}
        self.active = self.lines[0]
        self._websocket = whole.websocket.enabled
        self._failures = whole.breaker.failures
        self._return_after = whole.reconnect.return_after
        self._clock = clock
        self._metrics = metrics
        self._running = False
        self._moving = False
        for line in self.lines:
            line.breaker.on_change = lambda state, line=line: self._breaker_changed(line, state)
            line.link.on_failed = lambda line=line: self._link_failed(line)

    def start(self) -> None:
        """Begin with the active backend, at first the first of the list; how it failed before is forgotten."""
        self._running = True
        # During a move the end of the old link is waited for.
        if self._websocket and not self._moving:
            self.active.link.start(afresh=True)

    async def stop(self, deadline: float) -> None:
        """Say goodbye on every link and close every connection, within ``deadline`` seconds."""
        self._running = False
        ends = self._clock.seconds() + deadline
        for line in self.lines:
            await line.link.stop(max(ends - self._clock.seconds(), 0.1))
            await line.http.close()

    # -----------------------------------------------------------------------------------------------------------------
    # HTTP

    def for_request(self, refuses: Callable[[Line], bool] = lambda line: False) -> Line:
        """
        Return the line for one HTTP request; its breaker has given a permit, and must be told the outcome.

        :param refuses: says of a line that it takes no token now; such lines come last.
        :raise BreakerOpen: every backend is being left alone; it says for how long.
        """
        refusing: list[Line] = []
        for line in self._in_order():
            if refuses(line):
                refusing.append(line)
            elif line.breaker.try_acquire():
                return line
        for line in refusing:
            if line.breaker.try_acquire():
                return line
        wait = min(line.breaker.retry_in() for line in self.lines)
        raise BreakerOpen(f"every backend failed too often; the next probe is in {wait:.1f} s", retry_in=wait)

    def _in_order(self) -> Iterator[Line]:
        preferred = self.lines[: self.lines.index(self.active)]
        yield from (line for line in preferred if self._may_return(line))
        yield self.active
        yield from (line for line in self.lines if line is not self.active)

    def _may_return(self, line: Line) -> bool:
        return not self._lately(line.left_at)

    def _lately(self, at: float | None) -> bool:
        """Whether ``at`` is less than ``return_after`` ago; a clock that stepped back must not make that longer."""
        return at is not None and 0 <= self._clock.seconds() - at < self._return_after

    def answered(self, line: Line, *, works: bool, receipt_at: float | None) -> None:
        """
        An HTTP exchange with ``line``, for which its breaker had given a permit, is over.

        :param works: whether the outcome speaks for the backend.
        :param receipt_at: when it took what was sent, in seconds since the epoch; None when it did not.
        """
        line.http_works = works
        if works:
            line.breaker.succeeded()
        else:
            line.breaker.failed()
        if receipt_at is not None:
            self.receipt(line.name, receipt_at)
            self._proven(line)

    def receipt(self, name: str, at: float) -> None:
        """The backend ``name`` has just proven that it takes what is sent; ``at`` is in seconds since the epoch."""
        self._metrics.receipt(name)
        self._by_name[name].last_receipt = at

    def _breaker_changed(self, line: Line, state: str) -> None:
        self._metrics.breaker(line.name, state)
        self.log.info("the breaker of {backend} is {state}", event="breaker.changed", backend=line.name, state=state)

    # -----------------------------------------------------------------------------------------------------------------
    # Moving

    def _proven(self, line: Line) -> None:
        """A backend has answered over HTTP: is it a better one?"""
        if line is self.active:
            return
        preferred = self.lines.index(line) < self.lines.index(self.active)
        # Without WebSockets the one that answers is the active one, as far as there is such a thing.
        stuck = self._works_not(self.active) or not self._websocket
        if stuck or (preferred and self._may_return(line)):
            self._turn_to(line, proven=True)

    def _link_failed(self, line: Line) -> None:
        if line is not self.active or not self._works_not(line):
            return
        line.left_at = self._clock.seconds()
        others = [other for other in self.lines if other is not line]
        if others:
            longest_left = min(others, key=lambda other: other.left_at or 0.0)
            name = choose([Candidate(other.name, self._may_return(other)) for other in others], longest_left.name)
            self._turn_to(next(other for other in others if other.name == name), proven=False)

    def _works_not(self, line: Line) -> bool:
        return line.link.failures >= self._failures

    def _turn_to(self, line: Line, *, proven: bool) -> None:
        if not self._running or self._moving:
            return
        old, self.active = self.active, line
        self.log.warn("moving from {old} to {backend}", event="backends.moved", old=old.name, backend=line.name)
        if self._websocket:
            self._moving = True
            if afresh := proven and not self._lately(line.afresh_at):
                line.afresh_at = self._clock.seconds()
            Deferred.fromCoroutine(self._move(old, line, afresh)).addErrback(self._move_failed)

    async def _move(self, old: Line, new: Line, afresh: bool) -> None:
        try:
            await old.link.stop(GOODBYE)
        finally:
            # Even when the goodbye failed by a defect: an agent without any link would be worse.
            self._moving = False
            if self._running:
                new.link.start(afresh=afresh)

    def _move_failed(self, failure: Failure) -> None:
        self.log.failure("moving to another backend failed", failure, event="backends.move-failed")
