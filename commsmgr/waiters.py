"""Many may wait for one thing to happen."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")


class Waiters(Generic[T]):
    """
    Deferreds that fire together.

    Each waiter has a Deferred of its own, because a Deferred hands its result to the first coroutine that awaits it
    and ``None`` to the second. Cancelling one takes it off the list and touches no other.
    """

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
