"""Many may wait for one thing to happen, and nobody for ever."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

T = TypeVar("T")


class Waiters(Generic[T]):
    """
    Deferreds that fire together.

    Each waiter has a Deferred of its own, because a Deferred hands its result to the first coroutine that awaits it
    and ``None`` to the second. Cancelling one takes it off the list and touches no other.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Deferred[T]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self) -> Deferred[T]:
        """Return a Deferred that fires at the next :meth:`fire` or :meth:`fail`."""
        waiter: Deferred[T] = Deferred(self._give_up)
        self._waiting.append(waiter)
        return waiter

    def _give_up(self, waiter: Deferred[T]) -> None:
        # While firing, the list that a cancelled waiter stood in is no longer this one.
        if waiter in self._waiting:
            self._waiting.remove(waiter)

    def fire(self, value: T) -> None:
        """Give ``value`` to everybody who waits now; who comes later waits for the next one."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            # A callback of an earlier waiter may have cancelled this one.
            if not waiter.called:
                waiter.callback(value)

    def fail(self, error: Exception) -> None:
        """Give ``error`` to everybody who waits now."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.called:
                waiter.errback(error)


class Overrun(defer.TimeoutError):
    """:func:`bounded` has waited long enough; not to be confused with a time-out of what was waited for."""


def bounded(waited: Deferred[T], seconds: float, clock: IReactorTime) -> Deferred[T]:
    """
    Wait for ``waited``, but no longer than ``seconds``; then cancel it, and do not wait on if it does not heed that.

    ``Deferred.addTimeout`` would wait on for a coroutine that catches the cancellation.

    :return: fires as ``waited`` does, or fails with :class:`Overrun`. Cancelling it cancels ``waited``.
    """
    expired = False
    waiting: Deferred[T] = Deferred(lambda _: waited.cancel())

    def over(outcome: T | Failure) -> None:
        if timer.active():
            timer.cancel()
        if waiting.called:
            return
        if expired and isinstance(outcome, Failure) and outcome.check(CancelledError):
            outcome = Failure(Overrun())
        waiting.callback(outcome)  # a Failure makes it an errback

    def expire() -> None:
        nonlocal expired
        expired = True
        waited.cancel()
        if not waiting.called:
            waiting.errback(Overrun())

    timer = clock.callLater(seconds, expire)
    waited.addBoth(over)
    return waiting
