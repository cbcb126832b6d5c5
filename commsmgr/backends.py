"""
The ordered list of backends: which one the WebSocket goes to, which one the next HTTP request goes to.

One backend is active at a time. When its breaker opens, the first backend in the list that works takes over. A
preferred backend comes back by proof, not by hope: when its breaker lets a probe through, the next HTTP request
(usually a heartbeat) goes there; its success closes the breaker and the WebSocket moves back. The old link is said
goodbye to before the new one is started, so that a machine never has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(slots=True)
class Line:
    """One backend: its settings, its breaker, and the two transports to it."""

    name: str
    settings: config.Backend
    http_target: Target
    breaker: Breaker
    http: HTTPClient
    link: Link
    last_receipt: float = 0.0
    reachable: bool = False


class Backends:
    """
    Chooses among the lines, and moves the WebSocket when the choice changes.

    :param websocket: false when only HTTP is wanted.
    """

    log = Logger()

    def __init__(self, lines: Sequence[Line], *, websocket: bool, clock: IReactorTime, metrics: Metrics) -> None:
        self.lines = tuple(lines)
        self.active = self.lines[0]
        self._websocket = websocket
        self._clock = clock
        self._metrics = metrics
        self._running = False
        self._moving = False
        for line in self.lines:
            line.breaker.on_change = lambda state, line=line: self._breaker_changed(line, state)

    def start(self) -> None:
        """Begin with the first backend of the list."""
        self._running = True
        # During a move the end of the old link is waited for.
        if self._websocket and not self._moving:
            self.active.link.start()

    async def stop(self, deadline: float) -> int:
        """
        Say goodbye on every link and close every connection.

        :return: how many entries were in flight without a receipt.
        """
        self._running = False
        ends = self._clock.seconds() + deadline
        without_receipt = 0
        for line in self.lines:
            # A link that is not let go in good manners must not use up the time of the connections after it.
            without_receipt += await line.link.stop(max((ends - self._clock.seconds()) * 0.7, 0.1))
            await line.http.close(max(ends - self._clock.seconds(), 0.1))
        return without_receipt

    def for_request(self) -> Line:
        """
        Return the line for one HTTP request; its breaker has given a permit, and must be told the outcome.

        :raise BreakerOpen: every backend is being left alone; it says for how long.
        """
        for line in self.lines:
            if line.breaker.try_acquire():
                return line
        wait = min(line.breaker.retry_in() for line in self.lines)
        raise BreakerOpen(f"every backend failed too often; the next probe is in {wait:.1f} s", retry_in=wait)

    def receipt(self, name: str, at: float) -> None:
        """The backend ``name`` has just proven that it takes what is sent; ``at`` is in seconds since the epoch."""
        for line in self.lines:
            if line.name == name:
                line.last_receipt = at
                line.reachable = True

    def _breaker_changed(self, line: Line, state: str) -> None:
        self._metrics.breaker(line.name, state)
        self.log.info("the breaker of {backend} is {state}", event="breaker.changed", backend=line.name, state=state)
        if state == "closed" and line is self.active:
            line.link.permit_free()
        self._reconsider()

    def _reconsider(self) -> None:
        if not self._running or self._moving:
            return
        candidates = [Candidate(line.name, line.breaker.state == "closed") for line in self.lines]
        name = choose(candidates, self.active.name)
        chosen = next(line for line in self.lines if line.name == name)
        if chosen is not self.active:
            self._moving = True
            Deferred.fromCoroutine(self._move(chosen)).addErrback(self._move_failed)

    async def _move(self, chosen: Line) -> None:
        old, self.active = self.active, chosen
        self.log.warn("moving from {old} to {backend}", event="backends.moved", old=old.name, backend=chosen.name)
        try:
            if self._websocket:
                await old.link.stop(GOODBYE)
        finally:
            # Even when the goodbye failed by a defect: an agent without any link would be worse.
            self._moving = False
            if self._running and self._websocket:
                chosen.link.start()
        # The world may have changed while the old link took its leave.
        self._reconsider()

    def _move_failed(self, failure: Failure) -> None:
        self.log.failure("moving to another backend failed", failure, event="backends.move-failed")
