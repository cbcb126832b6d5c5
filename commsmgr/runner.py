"""Runs the embedding agent's handler on commands: a few at once, each within its time, each with exactly one result."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Awaitable, Callable
from contextlib import suppress
from inspect import isawaitable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.channel import CommandChannel
from commsmgr.errors import InvalidMessage, NotRunning, SpoolError, UsageError
from commsmgr.interfaces import CommandHandler
from commsmgr.messages import Command, Result
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.waiters import Overrun, bounded

AGAIN = 1.0
"""Seconds between attempts to take a command that the spool cannot mark as offered."""


class CommandRunner:
    """
    Takes commands from the channel and runs the handler on them.

    A result for which the spool has no room stays here and keeps its place among the ``concurrency``: that stops the
    channel, and through it the intake, until there is room.

    :param concurrency: how many commands run at once.
    :param report: stores a result, and waits for room in the spool as long as it takes.
    """

    log = Logger()

    def __init__(
        self,
        channel: CommandChannel,
        handler: CommandHandler,
        *,
        concurrency: int,
        report: Callable[[Result], Awaitable[object]],
        clock: IReactorTime,
        metrics: Metrics,
    ) -> None:
        self._channel = channel
        self._handler = handler
        self._concurrency = concurrency
        self._report = report
        self._clock = clock
        self._throttle = LogThrottle(clock.seconds)
        self._metrics = metrics
        self._loops: list[Deferred[None]] = []
        self._alive = 0
        self._somebody_waits = False
        self._started = False
        self._given_up = False
        self.running = 0

    def start(self) -> None:
        """Begin to take commands."""
        self._started = True
        self._begin_loop()

    async def stop(self, deadline: float) -> None:
        """
        Let what runs come to its end, but no longer than ``deadline`` seconds; then cancel it.

        A command that is cancelled here has no result: it is reported as interrupted, or offered again, after the next
        start.
        """
        self._started = False
        loops = self._loops.copy()

        def give_up() -> None:
            # A handler may also fail with a CancelledError of its own, and that is an error like any other.
            self._given_up = True
            for loop in loops:
                loop.cancel()

        cancel = self._clock.callLater(deadline, give_up)
        for loop in loops:
            await loop
        if cancel.active():
            cancel.cancel()

    def _begin_loop(self) -> None:
        """Have somebody wait for a command, unless somebody does, or as many as may be are busy."""
        if self._started and not self._somebody_waits and self._alive < self._concurrency:
            self._alive += 1
            loop = Deferred.fromCoroutine(self._loop()).addErrback(self._loop_failed)
            self._loops.append(loop)
            # Not at the end of the coroutine: one that never waits would have ended before it was noted here.
            loop.addCallback(lambda _: self._loop_ended(loop))

    async def _loop(self) -> None:
        with suppress(NotRunning, CancelledError):
            # One waits; each that takes a command leaves another one behind to wait for the next. It does so while the
            # command is being marked as offered, so that those that come together are marked in one commit.
            while not self._somebody_waits:
                self._somebody_waits = True
                try:
                    await self._channel.arrival()
                finally:
                    self._somebody_waits = False
                taking = Deferred.fromCoroutine(self._next())
                self._begin_loop()
                command = await taking
                self.running += 1
                try:
                    await self._run(command)
                finally:
                    self.running -= 1

    async def _next(self) -> Command:
        while True:
            try:
                return await self._channel.get()
            except SpoolError as error:
                suppressed = self._throttle.allow(type(error).__name__)
                if suppressed is not None:
                    self.log.warn(
                        "a command waits: {error} ({suppressed} more before)",
                        event="command.not-offered",
                        error=str(error),
                        suppressed=suppressed,
                    )
                await deferLater(self._clock, AGAIN)

    def _loop_failed(self, failure: Failure) -> None:
        self.log.failure("commands are run by one less: a defect", failure, event="commands.failed")
        self._concurrency -= 1
        self._begin_loop()

    def _loop_ended(self, loop: Deferred[None]) -> None:
        self._alive -= 1
        self._loops.remove(loop)

    async def _run(self, command: Command) -> None:
        began = self._clock.seconds()
        result = await self._outcome(command)
        took = self._clock.seconds() - began
        result = _completed(result, command, took)
        while True:
            try:
                await self._report(result)
                break
            except InvalidMessage as error:
                result = _completed(command.error(f"the result could not be sent: {error}"), command, took)
            except UsageError as error:
                # Reported already, by the handler itself, or the manager stops: the inbox says what is true.
                self.log.debug("{error}", event="command.not-reported", error=str(error), message_id=command.id)
                break
        # Only now: before it was reported nobody had checked what the handler returned.
        self._metrics.command_finished(result.status, took)
        self.log.info(
            "command {message_id} ({type}): {status} after {seconds:.3f} s",
            event="command.finished",
            message_id=command.id,
            type=command.type,
            status=result.status,
            seconds=took,
        )

    async def _outcome(self, command: Command) -> Result:
        try:
            outcome = self._handler(command)
            if isawaitable(outcome):
                outcome = await bounded(_deferred(outcome), command.timeout, self._clock)
        except Overrun:
            return Result(
                command_id=command.id,
                status="timeout",
                error=f"not finished within {command.timeout:g} s",
                exit_code=1,
            )
        except GeneratorExit:
            raise
        except BaseException as error:
            # A handler may well raise SystemExit (argparse does), and that must not cost its place.
            if self._given_up and isinstance(error, CancelledError):
                raise
            self.log.failure("the handler failed on {message_id}", event="command.failed", message_id=command.id)
            return command.error(f"{type(error).__name__}: {_text(error)}")
        if not isinstance(outcome, Result):
            return command.error(f"the handler returned {type(outcome).__name__}, not a Result")
        return outcome


def _deferred(outcome: Awaitable[Result]) -> Deferred[Result]:
    """Make a Deferred of whatever a handler returns: a Deferred, a coroutine, or a Future on the asyncio reactor."""
    if isinstance(outcome, Deferred):
        return outcome
    if isinstance(outcome, Future):
        return Deferred.fromFuture(outcome)

    async def wait() -> Result:
        return await outcome

    return Deferred.fromCoroutine(wait())


def _text(error: BaseException) -> str:
    """Return what an exception says; its class is somebody else's, and may fail at that."""
    try:
        return str(error)
    except Exception as another:
        return f"its text could not be had: {type(another).__name__}"


def _completed(result: Result, command: Command, took: float) -> Result:
    """Fill in what the handler need not say."""
    return Result(
        command_id=command.id,
        key=command.key,
        status=result.status,
        output=result.output,
        error=result.error,
        exit_code=result.exit_code,
        execution_time=result.execution_time or took,
    )
