"""One deadline over a piece of work, whatever the work makes of being interrupted."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

T = TypeVar("T")


def within(
    clock: IReactorTime, seconds: float, work: Coroutine[Deferred[Any], Any, T], expired: Callable[[], Exception]
) -> Deferred[T]:
    """
    Start ``work`` and give it ``seconds``.

    Twisted's layers answer a cancellation with errors of their own: a name lookup that failed, a response that was
    never received. Here the reason of the interruption wins: a failure is ``expired()`` after the deadline, and
    :class:`~twisted.internet.defer.CancelledError` when the returned Deferred was cancelled. Work that succeeds all
    the same has succeeded.

    :param expired: makes the error, asked at the moment the time is out.
    """
    interruption: Exception | None = None

    def interrupt(reason: Exception) -> None:
        nonlocal interruption
        interruption = reason
        inner.cancel()

    def ended(value: T | Failure) -> T | Failure:
        if timer.active():
            timer.cancel()
        if interruption is not None and isinstance(value, Failure):
            raise interruption
        return value

    outer: Deferred[T] = Deferred(lambda _: interrupt(CancelledError()))
    # Armed before the work begins, so that it wins over timers of the same length that the work sets.
    timer = clock.callLater(seconds, lambda: interrupt(expired()))
    inner = Deferred.fromCoroutine(work)
    inner.addBoth(ended).chainDeferred(outer)
    return outer
