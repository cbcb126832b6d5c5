"""
Where the spool's work is done: in one thread of its own, or, for a spool in memory, between two turns of the reactor.

An executor is called with a function and returns a Deferred of its result; calls are done one after another, in order.
A simulation brings its own.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.python.failure import Failure

from commsmgr.errors import SpoolWriteFailed

T = TypeVar("T")

_Call: TypeAlias = tuple[Callable[[], Any], Deferred[Any]]
"""What is to be done, and who waits for it."""


class Executor(Protocol):
    """
    Does work that may block. The Deferreds fire in the reactor's thread, in the order of the calls.

    Whatever goes wrong on the way there is the Deferred's failure.

    :ivar linger: seconds that what is in no hurry may wait for other work, because work by itself costs a commit.
    """

    linger: float

    def __call__(self, work: Callable[[], T], /) -> Deferred[T]: ...

    def stop(self) -> Deferred[None]:
        """Give up what the executor holds; nothing is under way then. The next call begins anew."""


class InlineExecutor:
    """Does the work in the reactor's thread, in a later turn: what is handed over in one turn is done together."""

    linger = 0.0

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._turn: list[_Call] = []

    def __call__(self, work: Callable[[], T], /) -> Deferred[T]:
        """Do ``work`` in the next turn."""
        done: Deferred[T] = Deferred()
        if not self._turn:
            _in_next_turn(self._reactor, self._work)
        self._turn.append((work, done))
        return done

    def _work(self) -> None:
        turn, self._turn = self._turn, []
        for work, done in turn:
            _deliver(done, _outcome(work))

    def stop(self) -> Deferred[None]:
        """Nothing to do."""
        return succeed(None)


class ThreadExecutor:
    """
    Does the work in one thread, which waits without a timeout: an idle spool wakes nobody.

    It is a daemon thread: a disk that hangs must not keep the process from ending, and what is committed is safe.

    It is told of work only when the reactor's turn is over. Told at once, it would sometimes begin in the middle of the
    turn, whenever the interpreter changes threads, and would find only a part of what the turn has for it; and until
    then it would wait for the interpreter, which costs more than to wait for work.
    """

    linger = 0.05

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._queue: SimpleQueue[_Call | None] | None = None
        self._turn: list[_Call] = []

    def __call__(self, work: Callable[[], T], /) -> Deferred[T]:
        """Do ``work`` in the thread, which is started if it is not there; SpoolWriteFailed if that cannot be."""
        done: Deferred[T] = Deferred()
        if self._queue is None:
            queue: SimpleQueue[_Call | None] = SimpleQueue()
            self._thread = Thread(target=self._run, args=(queue,), name="commsmgr-spool", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # as the system's limit of threads makes it
                return fail(SpoolWriteFailed(f"the spool has no thread to write in: {error}"))
            self._queue = queue
        if not self._turn:
            _in_next_turn(self._reactor, self._hand_over)
        self._turn.append((work, done))
        return done

    def _hand_over(self) -> None:
        turn, self._turn = self._turn, []
        for item in turn:
            assert self._queue is not None
            self._queue.put(item)

    def stop(self) -> Deferred[None]:
        """End the thread after what was handed over."""
        if self._queue is None:
            return succeed(None)
        self._hand_over()
        queue, self._queue = self._queue, None
        thread = self._thread
        ended: Deferred[None] = Deferred()
        # The thread has nothing left to do but to return when this comes, so that joining it does not block.
        queue.put((lambda: None, ended))
        queue.put(None)
        return ended.addCallback(lambda _: thread.join())

    def _run(self, queue: SimpleQueue[_Call | None]) -> None:
        call_from_thread = cast(IReactorFromThreads, self._reactor).callFromThread
        while (item := queue.get()) is not None:
            call_from_thread(_deliver, item[1], _outcome(item[0]))


def _in_next_turn(reactor: IReactorTime, call: Callable[[], None]) -> None:
    try:
        reactor.callLater(0, call)
    except OSError:
        # No descriptor is left for the clock (see SteadyReactor.callLater). This way needs none; it wakes the reactor.
        cast(IReactorFromThreads, reactor).callFromThread(call)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except BaseException:  # whatever it is, somebody in the reactor's thread waits for it
        return Failure()


def _deliver(done: Deferred[Any], outcome: Any) -> None:
    done.callback(outcome)  # a Failure makes it an errback
