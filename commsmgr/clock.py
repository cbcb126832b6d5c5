"""
A clock for timers that steps of the wall clock do not touch, beside whatever reactor the program runs.

Theory of operation. Twisted's reactors keep their timers by the wall clock. When that is set back by two hours, no
timer fires for two hours, and when it is set ahead all of them fire at once. In somebody else's program that cannot be
changed: there may be timers already. So commsmgr has timers of its own, kept by ``CLOCK_BOOTTIME``, which is never set
and goes on while the machine sleeps: after a night the deadlines are over, and not where they were in the evening. A
timerfd in the reactor's set of readers wakes them; how long the reactor itself means to wait plays no part in that.

:func:`steady` gives a reactor whose ``seconds`` and ``callLater`` are these, and whose everything else is the reactor's
own. All managers on one reactor share one, and so two descriptors however many they are. These exist as long as a call
is pending: nobody has to close the clock, and a reactor on which nothing is left to do is as clean as before.

What remains on the reactor's own timers is inside Twisted's transports: the timeout of connecting, which is not used
(:mod:`commsmgr.transport.dialer` has a deadline over the whole attempt), and calls for the very next turn.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any
from weakref import WeakValueDictionary

from twisted.internet.base import DelayedCall
from twisted.internet.interfaces import IReactorTime, IReadDescriptor
from twisted.internet.posixbase import PosixReactorBase
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import directlyProvides, implementer, providedBy

_SLACK = 64
"""Entries of calls that are no longer meant, from which on the heap is tidied if they are the greater part."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


@implementer(IReadDescriptor)
class _Reader:
    """
    A descriptor with a counter, a timerfd or an eventfd, that is open and among the reactor's readers while it is used.

    :param ring: called on the reactor's thread when it has counted something.
    :param over: called when the reactor gives up all that it reads, at its end.
    """

    def __init__(
        self, reactor: Any, open: Callable[[], int], ring: Callable[[], None], over: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._open = open
        self._ring = ring
        self._over = over
        self._descriptor = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {self._ring!r}>"

    def opened(self) -> int:
        """Return the descriptor, open."""
        if self._descriptor < 0:
            self._descriptor = self._open()
            self._reactor.addReader(self)
        return self._descriptor

    def close(self) -> None:
        """Leave nothing behind."""
        if self._descriptor >= 0:
            self._reactor.removeReader(self)
            os.close(self._descriptor)
            self._descriptor = -1

    # What the reactor calls.

    def fileno(self) -> int:
        """Return the descriptor, -1 when there is none."""
        return self._descriptor

    def doRead(self) -> None:
        """It has counted: begin again at 0."""
        with suppress(BlockingIOError):  # set anew in the turn in which it rang
            os.read(self._descriptor, 8)
        self._ring()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor ends."""
        self.close()
        self._over()

    def logPrefix(self) -> str:
        """Return what the log calls it."""
        return "clock"


class Alarm:
    """
    Wakes the reactor at a time by ``CLOCK_BOOTTIME``.

    A timer for what is to come, and a bell for what is due already: a timer of no time costs ten times as much.

    :param seconds: that clock.
    :param ring: called on the reactor's thread when the time has come, and now and then for nothing.
    :param over: called when the reactor ends, and will ring no more.
    """

    def __init__(
        self, reactor: Any, seconds: Callable[[], float], ring: Callable[[], None], over: Callable[[], None]
    ) -> None:
        self._seconds = seconds
        self._ring = ring
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = _Reader(reactor, self._open_timer, self._timer_rang, over)
        self._bell = _Reader(reactor, lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), ring, over)
        self._at: float | None = None

    def set(self, at: float) -> None:
        """
        Ring at ``at``, and not when it was set to before.

        :raise OSError: the process has no descriptor left.
        """
        # Both at once, so that who has once been woken will not fail to set the alarm for the next time.
        bell, timer = self._opened()
        wait = at - self._seconds()
        if wait <= 0:
            os.eventfd_write(bell, 1)
        elif at != self._at:
            # Rounded up: one that rings too early rings twice.
            whole, part = divmod(int(wait * 1e9) + 1, 1_000_000_000)
            value = _Timer(value=_Timespec(whole, part))
            self._checked(self._libc.timerfd_settime(timer, 0, ctypes.byref(value), None))
            self._at = at

    def close(self) -> None:
        """Ring no more, and leave nothing behind."""
        self._timer.close()
        self._bell.close()
        self._at = None

    def _opened(self) -> tuple[int, int]:
        try:
            return self._bell.opened(), self._timer.opened()
        except OSError:
            self.close()
            raise

    def _open_timer(self) -> int:
        return self._checked(self._libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC))

    def _timer_rang(self) -> None:
        self._at = None
        self._ring()

    def _checked(self, outcome: int) -> int:
        if outcome < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"timer: {os.strerror(number)}")
        return outcome


boottime: Callable[[], float] = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
"""Returns the seconds since the machine was started, sleep included."""


@implementer(IReactorTime)
class SteadyReactor:
    """
    A reactor's own self, but for the time.

    :param reactor: what everything else is left to.
    :param seconds: a clock that is never set.
    :param alarm: makes an :class:`Alarm`.
    """

    _guard = Logger().failureHandler("a call at its time failed")

    def __init__(
        self,
        reactor: Any,
        seconds: Callable[[], float] = boottime,
        alarm: Callable[[Any, Callable[[], float], Callable[[], None], Callable[[], None]], Alarm] = Alarm,
    ) -> None:
        self._reactor = reactor
        self.seconds = seconds
        self._alarm = alarm(reactor, seconds, self._run, self._forget)
        # Those that are to be called, and in the heap where each stands: its time, then the order of asking. An entry
        # is left behind when its call is cancelled, or is to come earlier. Outside of _run the alarm is set for the
        # first one, or for one before it that is not meant any more: most calls are timeouts that are cancelled, and
        # to ring once for nothing costs less than to set the alarm anew each time.
        self._calls: set[DelayedCall] = set()
        self._heap: list[tuple[float, int, DelayedCall]] = []
        self._asked = 0
        self._is_running = False
        directlyProvides(self, providedBy(reactor))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._reactor!r}: {list(self._calls)}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def callLater(self, delay: float, callable: Callable[..., object], *args: object, **kw: object) -> DelayedCall:
        """
        Call ``callable`` in ``delay`` seconds, in a later turn of the reactor; what it raises is logged.

        :raise OSError: no other call is pending, and the process has no descriptor left. Nothing will be called then.
        """
        assert delay >= 0, f"{delay} s is in the past"
        call = DelayedCall(self.seconds() + delay, callable, args, kw, self._cancelled, self._place, self.seconds)
        self._calls.add(call)
        try:
            self._place(call)
        except OSError:
            # Left in the heap it would pass for the one that the alarm is set for, and nothing would be called again.
            self._calls.discard(call)
            self._heap = [entry for entry in self._heap if self._is_meant(entry)]
            heapify(self._heap)
            raise
        return call

    def getDelayedCalls(self) -> list[DelayedCall]:
        """Return the calls that are to come; those of the reactor itself are not among them."""
        return list(self._calls)

    def _place(self, call: DelayedCall) -> None:
        """Put a call in the heap, where its time is."""
        if len(self._heap) > 2 * len(self._calls) + _SLACK:
            self._heap = [entry for entry in self._heap if self._is_meant(entry)]
            heapify(self._heap)
        self._asked += 1
        heappush(self._heap, (call.time, self._asked, call))
        if self._heap[0][2] is call and not self._is_running:
            self._arm()

    def _cancelled(self, call: DelayedCall) -> None:
        self._calls.discard(call)
        if not self._is_running and not self._calls:
            self._arm()

    def _forget(self) -> None:
        """The reactor has ended: what was asked for will not be called, as with the reactor's own calls."""
        # Left in the heap the first would pass for the one that the alarm is set for. A reactor that goes on all the
        # same, as trial's does after a test that left something behind, would never call anything again.
        self._calls.clear()
        self._heap.clear()
        self._alarm.close()

    def _is_meant(self, entry: tuple[float, int, DelayedCall]) -> bool:
        return entry[2] in self._calls and entry[2].time == entry[0]

    def _arm(self) -> None:
        """Have the first call of all wake us; without one, nothing is left in the reactor."""
        while self._heap and not self._is_meant(self._heap[0]):
            heappop(self._heap)
        if self._heap:
            self._alarm.set(self._heap[0][0])
        else:
            self._alarm.close()

    def _run(self) -> None:
        """Make the calls that are due. What they ask for comes in a later turn, however soon it is due."""
        now = self.seconds()
        due: list[DelayedCall] = []
        while self._heap and self._heap[0][0] <= now:
            entry = heappop(self._heap)
            if self._is_meant(entry):
                due.append(entry[2])
        self._is_running = True
        for call in due:
            # One that was put forward and back again stands in the heap twice for one time; the first has put it off.
            if not call.active() or call.time > now:
                continue
            if call.delayed_time > 0:
                call.activate_delay()
                self._place(call)
                continue
            self._calls.discard(call)
            call.called = 1
            with self._guard:
                call.func(*call.args, **call.kw)
        self._is_running = False
        self._arm()


_steady: WeakValueDictionary[Any, SteadyReactor] = WeakValueDictionary()


def steady(reactor: Any) -> Any:
    """
    Return ``reactor`` with a time that nobody sets, always the same one for the same reactor.

    What is none of Twisted's own reactors has a time of its own making, and is returned as it is; so is any reactor
    where there is no timerfd, which only Linux has.
    """
    if sys.platform != "linux" or not isinstance(reactor, PosixReactorBase):
        return reactor
    found = _steady.get(reactor)
    return _steady.setdefault(reactor, SteadyReactor(reactor)) if found is None else found
