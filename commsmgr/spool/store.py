"""
The reactor's side of the writer: collects jobs, has them done a batch at a time, and tells what became of them.

One batch is under way at a time. What is handed over meanwhile waits and makes the next batch, so that the slower the
disk, the larger the batches: one commit and two hops between threads for each, not for each message.

Receipts are patient: they begin no batch at once, but join the next one, and have one of their own only when none has
come within the executor's ``linger``. An agent that sends a result for each receipt so pays one commit, not two. What a
receipt names is not sent again meanwhile; only after a crash it is, with the id that the backend knows.

After a batch: the next one is started if there is work for it; then every job's :meth:`Job.settled` is called, in the
order of the jobs, so that counts and readers follow the order of the database; then listeners and Deferreds are told.

A mistake of ours on that way fails what it concerns, and is logged; the next batch comes all the same.

Once it was asked for, closing goes on to its end whether or not somebody still waits for that: on a disk that hangs the
lock is released when it goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

from msgspec import structs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.errors import NotRunning, SpoolError, SpoolWriteFailed
from commsmgr.spool.batch import Outcome
from commsmgr.spool.books import Books
from commsmgr.spool.executor import Executor
from commsmgr.spool.replacing import SetAside
from commsmgr.spool.writer import Writer
from commsmgr.waiters import Waiters

MAX_JOBS: Final = 1000
MAX_BYTES: Final = 1 << 20
"""A batch ends at this many jobs, or bytes, so that the log stays small and nobody waits long; what is done again is
not counted, for it would keep all others out of the batch, and each batch would be followed by its like at once."""

RETRY_AFTER: Final = 1.0
"""Seconds after which persistent jobs are tried again when nothing else makes the writer try; doubled each time."""

RETRY_LONGEST: Final = 60.0
"""Seconds that they wait at most."""


class Job(ABC):
    """
    Something for the writer to do.

    :ivar size: bytes of bodies that it writes.
    :ivar essential: whether it is done although the disk is nearly full.
    :ivar persistent: whether it is tried again, before all later jobs, when the disk fails. When only a part of the
        database is damaged or cannot be read later jobs go first, for they may well be done; nothing depends on the
        order but for speed, as the outbox withholds what it has receipts for.
    :ivar patient: whether it may wait for others to share a commit with, up to :attr:`.Executor.linger`.
    :ivar done: the Deferred of what became of it, once it is submitted.
    """

    __slots__ = ("done",)
    done: Deferred[Any]
    size: int = 0
    essential: bool = False
    persistent: bool = False
    patient: bool = False

    @abstractmethod
    def work(self, books: Books) -> Any:
        """Do it, in the writer. A CommsError must be raised before anything was written."""

    def wanted(self) -> bool:
        """Say, in any thread, whether somebody still waits for what it does; else it need not be tried again."""
        return True

    def settled(self, result: Any) -> Any:
        """Take note, in the reactor's thread, of the result or Failure; return what the Deferred fires with."""
        return result


class _State(Enum):
    CLOSED = auto()
    OPEN = auto()
    CLOSING = auto()


class Store:
    """
    :param executor: does all that may block.
    :param after_batch: called with each outcome after its jobs were settled; its ``trouble`` lasts for as long as
        persistent jobs wait.
    """

    log = Logger()

    def __init__(
        self,
        writer: Writer,
        executor: Executor,
        reactor: IReactorTime,
        after_batch: Callable[[Outcome], None],
    ) -> None:
        self._writer = writer
        self._executor = executor
        self._reactor = reactor
        self._after_batch = after_batch
        self._state = _State.CLOSED
        self._jobs: deque[Job] = deque()
        self._busy = False
        self._again = 0
        self._parked: list[Job] = []
        self._retry: IDelayedCall | None = None
        self._lingering: IDelayedCall | None = None
        self._wait = 0.0
        self._trouble = ""
        self._closed: Waiters[None] = Waiters()

    async def open(self) -> SetAside | None:
        """Open the database, once it is closed; see :meth:`Writer.open`. Cancelling it has it closed again."""
        if self._state is _State.CLOSING:
            await self._closed.wait()
        try:
            aside = await self._executor(self._writer.open)
        except BaseException:
            # Who was cancelled does not wait for the disk, which may yet have opened it.
            await self._executor(self._writer.close).addBoth(lambda _: self._executor.stop())
            raise
        self._state = _State.OPEN
        return aside

    async def close(self) -> None:
        """
        Refuse new jobs, finish those that wait, close the database, release the lock.

        Cancelling it only stops waiting: all that is done as soon as the disk allows it.
        """
        if self._state is _State.OPEN:
            self._state = _State.CLOSING
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            if self._lingering is not None:
                self._lingering.cancel()
                self._lingering = None
            self._unpark()
            if not self._busy:
                self._next()
            if not self._busy:
                self._shut()
        if self._state is _State.CLOSING:
            await self._closed.wait()

    def _shut(self) -> None:
        """Nothing is left to be done."""
        shut = self._executor(self._writer.close).addCallback(lambda _: self._executor.stop())
        shut.addBoth(self._is_shut)

    def _is_shut(self, result: Any) -> None:
        if isinstance(result, Failure):
            self.log.failure("The spool failed to close.", result, event="spool.close-failed")
        self._state = _State.CLOSED
        self._closed.fire(None)

    def submit(self, job: Job) -> Deferred[Any]:
        """
        Have ``job`` done.

        :return: fires after the commit with what :meth:`Job.settled` made of the result; NotRunning unless open.
            Cancelling it undoes nothing: it only stops waiting.
        """
        if self._state is not _State.OPEN:
            job.settled(refused := Failure(NotRunning()))
            return fail(refused)
        done: Deferred[Any] = Deferred()
        job.done = done
        self._jobs.append(job)
        if not self._busy:
            if job.patient and self._executor.linger:
                self._linger()
            else:
                self._next()
        return done

    def answer(self) -> Deferred[None]:
        """Fire when the executor has done all that it was given before; at once unless open. Cancelling is harmless."""
        return self._executor(lambda: None) if self._state is _State.OPEN else succeed(None)

    def _next(self) -> None:
        if self._jobs:
            self._busy = True
            self._executor(self._batch).addCallback(self._settle)

    def _linger(self) -> None:
        """Let what waits go with the next batch, or with one of its own before long."""
        if self._lingering is None:
            self._lingering = self._timer(self._executor.linger, self._lingered)
        if self._lingering is None:
            self._next()

    def _lingered(self) -> None:
        self._lingering = None
        if not self._busy:
            self._next()

    def _timer(self, seconds: float, call: Callable[[], None]) -> IDelayedCall | None:
        """Return a timer, or None if the process has no descriptor left for one (see :class:`.SteadyReactor`)."""
        try:
            return self._reactor.callLater(seconds, call)
        except OSError:
            return None

    def _batch(self) -> tuple[list[Job], Outcome]:
        """Runs in the executor: whatever has been handed over by now belongs to the batch."""
        waiting, size = self._jobs, 0
        most = MAX_JOBS + self._again
        jobs: list[Job] = []
        try:
            while waiting and len(jobs) < most and size < MAX_BYTES:
                jobs.append(job := waiting.popleft())
                size += job.size
            return jobs, self._writer.run(jobs)
        except BaseException as error:  # whatever it is, the jobs wait, and so do those to come
            self.log.failure("The spool's writer failed by a mistake of its own.", event="spool.batch-failed")
            refused = Failure(SpoolError(fact := f"whether the spool has taken this is not known: {error!r}"))
            return jobs, Outcome([refused] * len(jobs), None, None, reopened=False, checkpoint=False, trouble=fact)

    def _settle(self, done: tuple[list[Job], Outcome]) -> None:
        jobs, outcome = done
        pairs: list[tuple[Job, Any]] = []
        again: list[Job] = []
        for job, result in zip(jobs, outcome.results, strict=True):
            if job.persistent and self._to_be_repeated(result) and job.wanted():
                again.append(job)
            else:
                pairs.append((job, result))
        if outcome.partly:
            # Together with others they would make the writer do those one by one, at a commit each, every time.
            self._parked += again
            self._again = 0
        else:
            self._jobs.extendleft(reversed(again))
            self._again = len(again)
        if not again and not self._parked:
            self._wait = 0.0
        self._busy = False
        if outcome.checkpoint:
            # In the same thread, ahead of the next batch, and after the outcome was told.
            self._executor(self._writer.checkpoint)
        if len(self._jobs) > self._again:
            if self._state is _State.OPEN and self._executor.linger and all(job.patient for job in self._jobs):
                self._linger()
            else:
                self._next()
        if (self._parked or (again and not self._busy)) and self._retry is None:
            self._wait = min(max(2 * self._wait, RETRY_AFTER), RETRY_LONGEST)
            self._retry = self._timer(self._wait, self._try_again)
            if self._retry is None:
                self._unpark()  # they go with whatever is handed over next, if only to see what has expired
        last = self._state is _State.CLOSING and not self._busy
        self._trouble = outcome.trouble or (self._trouble if self._parked else "")
        settled = [(job, self._settled(job, result)) for job, result in pairs]
        try:
            self._after_batch(structs.replace(outcome, trouble=self._trouble))
        except Exception:
            self.log.failure("What follows a batch of the spool has failed.", event="spool.batch-failed")
        for job, result in settled:
            if not job.done.called:  # cancelled ones were
                job.done.callback(result)
        if last:
            self._shut()

    def _settled(self, job: Job, result: Any) -> Any:
        try:
            return job.settled(result)
        except Exception:
            self.log.failure("What became of a job of the spool was not noted.", event="spool.batch-failed")
            return Failure()

    def _to_be_repeated(self, result: Any) -> bool:
        return self._state is _State.OPEN and isinstance(result, Failure) and isinstance(result.value, SpoolWriteFailed)

    def _try_again(self) -> None:
        self._retry = None
        self._unpark()
        if not self._busy:
            self._next()

    def _unpark(self) -> None:
        self._jobs.extend(self._parked)
        self._parked.clear()
