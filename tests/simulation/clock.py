"""
The one clock of a simulated world.

Theory of operation
-------------------
Time is a number, and passes only from one scheduled call to the next. Calls stand in a heap by moment and then by the
order in which they were scheduled, so what happens is decided by the program and its random numbers, never by the
machine. Calls are Twisted's own :class:`~twisted.internet.base.DelayedCall`, which moves lazily: a call that was put
off keeps its place in the heap and is put back when that place is reached.

A call belongs to an owner, the process that scheduled it, or to nobody: the network outlives its processes. Whoever is
dead is called no more. What escapes from a call is kept, as the reactor's main loop would log it, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

from twisted.internet.base import DelayedCall
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

STEPS = 1_000_000
"""Calls that one run may take. Whole worlds need some hundred per virtual second."""


class Owner(Protocol):
    """Whoever schedules calls and can die."""

    @property
    def name(self) -> str: ...

    @property
    def alive(self) -> bool: ...


class Escaped(Failure):
    """
    What escaped from a call.

    :ivar moment: when.
    :ivar owner: the name of the process that it happened in; empty for the network.
    """

    def __init__(self, moment: float, owner: str) -> None:
        super().__init__()
        self.moment = moment
        self.owner = owner

    def __str__(self) -> str:
        return f"{self.moment:.6f} {self.owner or 'network'}: {self.getErrorMessage()}"


class HotLoop(AssertionError):
    """More calls than a run may take: something does not wait."""


class Call(DelayedCall):
    """A scheduled call; see :class:`~twisted.internet.base.DelayedCall`."""

    owner: Owner | None = None
    sequence = 0


@implementer(IReactorTime)
class VirtualClock:
    """
    The clock.

    :param start: its first moment, in seconds.
    :ivar failures: what escaped from calls, in order.
    :ivar steps: how many calls were made so far.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.failures: list[Escaped] = []
        self.steps = 0
        self._now = start
        self._sequence = 0
        self._heap: list[tuple[float, int, Call]] = []
        self._cancelled = 0

    # -- IReactorTime -----------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Return the time now."""
        return self._now

    def callLater(self, delay: float, callable: Callable[..., Any], *args: object, **kw: object) -> Call:
        """Schedule a call that belongs to nobody."""
        return self.schedule(None, delay, callable, *args, **kw)

    def getDelayedCalls(self) -> list[DelayedCall]:
        """Return all calls that are still to come, in order."""
        calls = [call for _, sequence, call in self._heap if call.active() and call.sequence == sequence]
        return [*sorted(calls, key=lambda call: (call.getTime(), call.sequence))]

    # -- for processes ----------------------------------------------------------------------------------------------

    def schedule(
        self, owner: Owner | None, delay: float, function: Callable[..., Any], *args: object, **kw: object
    ) -> Call:
        """
        Schedule a call that belongs to ``owner``. The dead may schedule what they like; nothing of it happens.

        :param delay: seconds, not negative.
        """
        assert delay >= 0, f"{function} in {delay} seconds"
        return self._schedule(owner, self._now + delay, function, args, kw)

    def call_at(self, moment: float, function: Callable[..., Any], *args: object) -> Call:
        """Schedule a call that belongs to nobody at exactly ``moment``; a sum could miss it by a rounding error."""
        return self._schedule(None, moment, function, args, {})

    def _schedule(
        self,
        owner: Owner | None,
        moment: float,
        function: Callable[..., Any],
        args: tuple[object, ...],
        kw: dict[str, object],
    ) -> Call:
        call = Call(moment, function, args, kw, self._cancel, self._push, self.seconds)
        call.owner = owner
        if owner is None or owner.alive:
            self._push(call)
        return call

    def calls_of(self, owner: Owner) -> list[DelayedCall]:
        """Return the calls of ``owner`` that are still to come, in order."""
        return [call for call in self.getDelayedCalls() if isinstance(call, Call) and call.owner is owner]

    def forget(self, owner: Owner) -> None:
        """Drop all calls of ``owner``, who has died. They are not cancelled: nobody is there who could notice."""
        self._heap = [entry for entry in self._heap if entry[2].owner is not owner]
        heapify(self._heap)

    def guard(self, owner: Owner | None, function: Callable[..., object], *args: object, **kw: object) -> None:
        """Call now, and keep what escapes. What a process raises that died in this very call, nobody hears."""
        try:
            function(*args, **kw)
        except Exception:
            if owner is None or owner.alive:
                self.failures.append(Escaped(self._now, owner.name if owner is not None else ""))

    # -- time passes ------------------------------------------------------------------------------------------------

    def run_until(self, moment: float, *, steps: int = STEPS) -> None:
        """
        Let time pass until ``moment``, its own calls included.

        :raise HotLoop: ``steps`` calls were not enough.
        """
        last = self.steps + steps
        while self._next() <= moment:
            self._step(last)
        self._now = max(self._now, moment)

    def run_while(self, condition: Callable[[], bool], limit: float, *, steps: int = STEPS) -> bool:
        """
        Let time pass until ``condition``, asked after each call, is false.

        :param limit: virtual seconds at most.
        :return: whether it became false; otherwise all of ``limit`` has passed.
        :raise HotLoop: ``steps`` calls were not enough.
        """
        end = self._now + limit
        last = self.steps + steps
        while condition():
            if self._next() > end:
                self._now = end
                return False
            self._step(last)
        return True

    # -- inside -----------------------------------------------------------------------------------------------------

    def _push(self, call: DelayedCall) -> None:
        assert isinstance(call, Call)
        self._sequence += 1
        call.sequence = self._sequence
        heappush(self._heap, (call.time, self._sequence, call))

    def _cancel(self, call: DelayedCall) -> None:
        # Most timers are cancelled long before they are due; without this they would fill the heap.
        self._cancelled += 1
        if self._cancelled > 100 and self._cancelled > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2] is not call and not entry[2].cancelled]
            heapify(self._heap)
            self._cancelled = 0

    def _next(self) -> float:
        """Return the moment of the next call, infinity when there is none; tidy up the heap's top on the way."""
        while self._heap:
            moment, sequence, call = self._heap[0]
            if call.active() and call.sequence == sequence:
                if call.delayed_time <= 0:
                    return moment
                call.activate_delay()
                heappop(self._heap)
                self._push(call)
            else:
                heappop(self._heap)
        return float("inf")

    def _step(self, last: int) -> None:
        """Make the call at the heap's top; :meth:`_next` has looked at it."""
        if self.steps >= last:
            raise HotLoop(f"too many calls: at {self._now:.6f} the next one is {self._heap[0][2]}")
        self.steps += 1
        moment, _, call = heappop(self._heap)
        self._now = moment
        call.called = 1
        self.guard(call.owner, call.func, *call.args, **call.kw)
