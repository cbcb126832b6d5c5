"""Running commands: a few at once, each within its time, each with exactly one result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.channel import CommandChannel
from commsmgr.errors import AlreadyCompleted, InvalidMessage, NotRunning, SpoolWriteFailed
from commsmgr.messages import Command, Result
from commsmgr.observe.metrics import Metrics
from commsmgr.runner import CommandRunner
from tests.command_kit import command


class RunnerTestCase(SynchronousTestCase):
    """A runner on a virtual clock; what it reports is collected, or goes wrong as a test wants."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.channel = CommandChannel(lambda keys: succeed(None))
        self.registry = CollectorRegistry()
        self.results: list[Result] = []
        self.answers: list[Exception | Deferred[str]] = []
        self.runner: CommandRunner

    def start(self, handler: Callable[[Command], Any], concurrency: int = 4) -> None:
        self.runner = CommandRunner(
            self.channel,
            handler,
            concurrency=concurrency,
            report=self.report,
            clock=self.clock,
            metrics=Metrics(self.registry, seconds=self.clock.seconds),
        )
        self.runner.start()

    def report(self, result: Result) -> Deferred[str]:
        self.results.append(result)
        answer = self.answers.pop(0) if self.answers else succeed("id")
        return answer if isinstance(answer, Deferred) else fail(answer)

    def stop(self, deadline: float = 1.0) -> Deferred[None]:
        self.channel.close()
        return Deferred.fromCoroutine(self.runner.stop(deadline))

    def finished(self, status: str) -> float:
        return self.registry.get_sample_value("commsmgr_command_seconds_count", {"status": status}) or 0.0

    def idle(self) -> None:
        """Stop, and see that nothing is left behind."""
        self.successResultOf(self.stop())
        self.assertEqual((self.clock.getDelayedCalls(), self.runner.running), ([], 0))


class Outcomes(RunnerTestCase):
    """Whatever the handler does, there is one result."""

    def outcome(self, handler: Callable[[Command], Any], **fields: Any) -> Result:
        self.start(handler)
        self.channel.put(command(3, **fields))
        (result,) = self.results
        self.assertEqual((result.command_id, result.key), ("c3", 3))
        self.assertEqual(self.finished(result.status), 1)
        self.idle()
        return result

    def test_result(self) -> None:
        """A handler may return a result."""
        result = self.outcome(lambda c: c.success("out", exit_code=0))
        self.assertEqual((result.status, result.output), ("success", "out"))

    def test_deferred(self) -> None:
        """A handler may return a Deferred."""
        self.assertEqual(self.outcome(lambda c: succeed(c.error("no"))).error, "no")

    def test_coroutine(self) -> None:
        """A handler may be a coroutine function."""

        async def handler(c: Command) -> Result:
            return c.rejected(await succeed("why"))

        result = self.outcome(handler)
        self.assertEqual((result.status, result.error, result.exit_code), ("rejected", "why", 1))

    def test_future(self) -> None:
        """A handler may return an asyncio Future."""
        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        future: asyncio.Future[Result] = loop.create_future()
        self.start(lambda c: future)
        self.channel.put(command(3))
        future.set_result(command(3).success("later"))
        loop.call_soon(loop.stop)
        loop.run_forever()
        self.assertEqual([result.output for result in self.results], ["later"])
        self.idle()

    def test_exception(self) -> None:
        """An exception becomes an error with its text, and is logged."""
        result = self.outcome(lambda c: 1 // 0)
        self.assertEqual((result.status, result.exit_code), ("error", 1))
        self.assertIn("ZeroDivisionError: integer division", result.error)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_failure(self) -> None:
        """So does a Deferred that fails, be it with a time-out or a cancellation of the handler's own."""
        for error in (ValueError("x"), defer.TimeoutError("inner"), CancelledError()):
            self.setUp()
            result = self.outcome(lambda c, error=error: fail(error))
            self.assertEqual((result.status, result.error), ("error", f"{type(error).__name__}: {error}"))
        self.assertEqual(len(self.flushLoggedErrors()), 3)

    def test_exit(self) -> None:
        """A handler that means to end the program (argparse does) ends its command only; the place is not lost."""
        exits = [SystemExit(2), KeyboardInterrupt("x"), asyncio.CancelledError()]

        def at_once(c: Command) -> Result:
            if c.key <= len(exits):
                raise exits[c.key - 1]
            return c.success("still here")

        async def later(c: Command) -> Result:
            await succeed(None)
            return at_once(c)

        for handler in (at_once, later):
            self.setUp()
            self.start(handler, concurrency=1)
            for key in (1, 2, 3, 4):
                self.channel.put(command(key))
            self.assertEqual(
                [(result.key, result.error) for result in self.results],
                [(1, "SystemExit: 2"), (2, "KeyboardInterrupt: x"), (3, "CancelledError: "), (4, "")],
            )
            self.idle()
        self.assertEqual(len(self.flushLoggedErrors(*map(type, exits))), 6)

    def test_an_exception_that_cannot_be_told(self) -> None:
        """An exception whose text fails in its turn ends its command like any other; the place is not lost."""

        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError("not even that")

            __repr__ = __str__

        def handler(c: Command) -> Result:
            if c.key == 1:
                raise Mute
            return c.success("still here")

        self.start(handler, concurrency=1)
        for key in (1, 2):
            self.channel.put(command(key))
        first, second = self.results
        self.assertEqual((first.status, first.error), ("error", "Mute: its text could not be had: ValueError"))
        self.assertEqual(second.output, "still here")
        self.idle()
        self.assertEqual(len(self.flushLoggedErrors(Mute)), 1)

    def test_thrown_away(self) -> None:
        """A runner that is thrown away while a handler waits, at the end of the process say, asks for no result."""
        self.start(lambda c: Deferred())
        outcome = self.runner._outcome(command(3))
        outcome.send(None)
        outcome.close()
        self.assertEqual(self.flushLoggedErrors(), [])
        self.successResultOf(self.stop())

    def test_wrong_type(self) -> None:
        """What is no Result becomes an error that says so."""
        for handler in (lambda c: None, lambda c: succeed("done")):
            self.setUp()
            result = self.outcome(handler)
            self.assertEqual(result.status, "error")
            self.assertIn("not a Result", result.error)

    def test_for_another_command(self) -> None:
        """A result is always that of the command which the handler was given."""
        self.outcome(lambda c: Result(command_id="another", key=99))

    def test_execution_time(self) -> None:
        """The time is what the handler says, or else what the clock says."""
        waiting: list[Deferred[Result]] = []
        self.start(lambda c: waiting.append(Deferred()) or waiting[-1])
        for own in (0.0, 0.25):
            self.channel.put(command(3))
            self.clock.advance(2)
            waiting.pop().callback(Result(command_id="c3", execution_time=own))
        self.assertEqual([result.execution_time for result in self.results], [2.0, 0.25])
        self.idle()

    def test_timeout(self) -> None:
        """When its time is up the handler is cancelled and the result is a timeout; not a moment earlier."""
        cancelled: list[object] = []
        self.start(lambda c: Deferred(cancelled.append))
        self.channel.put(command(3, timeout=5.0))
        self.clock.advance(4.99)
        self.assertEqual((self.results, cancelled, self.runner.running), ([], [], 1))
        self.clock.advance(0.02)
        (result,) = self.results
        self.assertEqual((result.status, result.error, result.key), ("timeout", "not finished within 5 s", 3))
        self.assertEqual(len(cancelled), 1)
        self.idle()

    def test_answer_to_the_cancellation(self) -> None:
        """A handler that answers its cancellation at once with a result is believed."""
        self.start(lambda c: Deferred(lambda d: d.callback(c.error("half done"))))
        self.channel.put(command(3, timeout=5.0))
        self.clock.advance(5)
        self.assertEqual([result.error for result in self.results], ["half done"])
        self.idle()

    def test_cancellation_not_heeded(self) -> None:
        """A handler that goes on after its cancellation keeps neither the result nor the place."""
        never: Deferred[None] = Deferred()

        async def stubborn(c: Command) -> Result:
            try:
                await Deferred()
            except CancelledError:
                await never
            raise ValueError("nobody hears this")

        self.start(stubborn, concurrency=1)
        self.channel.put(command(3, timeout=5.0))
        self.clock.advance(5)
        self.assertEqual([result.status for result in self.results], ["timeout"])
        self.assertEqual(self.runner.running, 0)
        never.callback(None)
        self.idle()


class Reporting(RunnerTestCase):
    """Storing a result may go wrong in several ways."""

    def test_concurrency(self) -> None:
        """So many run at once and no more; the next begins when one ends."""
        waiting: list[Deferred[Result]] = []
        self.start(lambda c: waiting.append(Deferred()) or waiting[-1], concurrency=2)
        for key in (1, 2, 3):
            self.channel.put(command(key))
        self.assertEqual((len(waiting), self.runner.running, len(self.channel)), (2, 2, 1))
        waiting[1].callback(command(2).success())
        self.assertEqual((len(waiting), self.runner.running, len(self.channel)), (3, 2, 0))
        for each in (waiting[0], waiting[2]):
            each.callback(command().success())
        self.assertEqual([result.key for result in self.results], [2, 1, 3])
        self.idle()

    def test_marked_together(self) -> None:
        """Those that wait are marked as offered side by side, not each after the commit of the one before."""
        marks: list[Deferred[None]] = []
        self.patch(self.channel, "_mark_offered", lambda keys: marks.append(Deferred()) or marks[-1])
        self.start(lambda c: c.success(), concurrency=3)
        for key in (1, 2, 3, 4):
            self.channel.put(command(key))
        self.assertEqual((len(marks), len(self.channel), self.runner.running), (3, 1, 0))
        for mark in marks[:3]:
            mark.callback(None)
        self.assertEqual([result.key for result in self.results], [1, 2, 3])
        self.assertEqual(len(marks), 4)
        marks[3].callback(None)
        self.assertEqual([result.key for result in self.results], [1, 2, 3, 4])
        self.idle()

    def test_result_cannot_be_sent(self) -> None:
        """A result that is too large or wrong becomes an error that says why; only that one counts."""
        self.answers = [InvalidMessage("the result has 99 bytes")]
        self.start(lambda c: c.success("much"))
        self.channel.put(command(3))
        first, second = self.results
        self.assertEqual((first.status, second.status, second.key), ("success", "error", 3))
        self.assertIn("99 bytes", second.error)
        self.assertEqual((self.finished("success"), self.finished("error")), (0, 1))
        self.idle()

    def test_nonsense_in_a_result(self) -> None:
        """A result whose fields cannot even be counted stops nothing."""
        self.answers = [InvalidMessage("not a result")]
        outcomes = iter([["success"], "success"])
        self.start(lambda c: Result(command_id=c.id, status=next(outcomes)), concurrency=1)
        self.channel.put(command(1))
        self.channel.put(command(2))
        self.assertEqual([result.key for result in self.results], [1, 1, 2])
        self.idle()

    def test_no_room(self) -> None:
        """While a result waits for room it keeps its place; it is handed over once, and not run or reported again."""
        storing: Deferred[str] = Deferred()
        self.answers = [storing]
        self.start(lambda c: c.success(str(c.key)), concurrency=1)
        self.channel.put(command(1))
        self.channel.put(command(2))
        self.clock.advance(100)
        self.assertEqual(([r.key for r in self.results], self.runner.running, len(self.channel)), ([1], 1, 1))
        self.assertEqual(self.finished("success"), 0)
        storing.callback("id")
        self.assertEqual([result.output for result in self.results], ["1", "2"])
        self.assertEqual(self.finished("success"), 2)
        self.idle()

    def test_reported_already(self) -> None:
        """When the handler has reported by itself, or the manager stops, the runner goes on."""
        for error in (AlreadyCompleted(), NotRunning()):
            self.answers.append(error)
        self.start(lambda c: c.success(), concurrency=1)
        for key in (1, 2, 3):
            self.channel.put(command(key))
        self.assertEqual([result.key for result in self.results], [1, 2, 3])
        self.idle()

    def test_mark_fails(self) -> None:
        """A command that cannot be marked as offered is not run, and tried again in a second."""
        marks: list[Exception | None] = [SpoolWriteFailed(), None]
        self.patch(self.channel, "_mark_offered", lambda keys: _mark(marks.pop(0)))
        self.start(lambda c: c.success(), concurrency=1)
        self.channel.put(command(1))
        self.assertEqual((self.results, len(self.channel)), ([], 1))
        self.clock.advance(1)
        self.assertEqual([result.key for result in self.results], [1])
        self.idle()

    def test_marks_fail_for_long(self) -> None:
        """A line each ten seconds says so, however many wait for a command, and how many it stands for."""
        lines: list[LogEvent] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        self.patch(self.channel, "_mark_offered", lambda keys: fail(SpoolWriteFailed()))
        self.start(lambda c: c.success(), concurrency=2)
        self.channel.put(command(1))
        self.channel.put(command(2))
        self.clock.pump([1] * 10)
        told = [line["suppressed"] for line in lines if line.get("event") == "command.not-offered"]
        self.assertEqual((told[0], len(told)), (0, 2))
        self.assertGreaterEqual(told[1], 9)
        self.patch(self.channel, "_mark_offered", lambda keys: succeed(None))
        self.clock.advance(1)
        self.assertEqual(len(self.results), 2)
        self.idle()

    def test_defect(self) -> None:
        """A defect in reporting is logged, and does not disturb the stop."""
        self.answers = [RuntimeError("defect")]
        self.start(lambda c: c.success(), concurrency=1)
        self.channel.put(command(1))
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.idle()


def _mark(error: Exception | None) -> Deferred[None]:
    return succeed(None) if error is None else fail(error)


class Stop(RunnerTestCase):
    """What runs may come to its end, within the share."""

    def test_lets_finish(self) -> None:
        """A command that ends in time is reported, and the stop waits for it and no longer."""
        waiting: Deferred[Result] = Deferred()
        self.start(lambda c: waiting)
        self.channel.put(command(1))
        stopping = self.stop(5.0)
        self.clock.advance(4)
        self.assertNoResult(stopping)
        waiting.callback(command(1).success())
        self.successResultOf(stopping)
        self.assertEqual((len(self.results), self.clock.getDelayedCalls()), (1, []))

    def test_cancels(self) -> None:
        """After the share what still runs is cancelled and has no result: the next start will report it."""
        cancelled: list[object] = []
        self.start(lambda c: Deferred(cancelled.append), concurrency=2)
        for key in (1, 2, 3):
            self.channel.put(command(key))
        stopping = self.stop(5.0)
        self.clock.advance(5)
        self.successResultOf(stopping)
        self.assertEqual((len(cancelled), self.results, self.runner.running), (2, [], 0))
        self.assertEqual((self.clock.getDelayedCalls(), self.finished("error")), ([], 0))

    def test_while_a_result_waits(self) -> None:
        """A result without room does not hold the stop up for longer than the share; its storing is given up."""
        cancelled: list[object] = []
        self.answers = [Deferred(cancelled.append)]
        self.start(lambda c: c.success(), concurrency=1)
        self.channel.put(command(1))
        stopping = self.stop(2.5)
        self.clock.advance(2.4)
        self.assertNoResult(stopping)
        self.clock.advance(0.1)
        self.successResultOf(stopping)
        self.assertEqual((len(cancelled), self.finished("success"), self.clock.getDelayedCalls()), (1, 0, []))

    def test_while_a_mark_waits(self) -> None:
        """Nor does a spool that takes no marks."""
        self.patch(self.channel, "_mark_offered", lambda keys: fail(SpoolWriteFailed()))
        self.start(lambda c: c.success(), concurrency=1)
        self.channel.put(command(1))
        stopping = Deferred.fromCoroutine(self.runner.stop(0.5))
        self.clock.advance(0.5)
        self.successResultOf(stopping)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_never_started(self) -> None:
        """Stopping what was never started takes no time."""
        self.start(lambda c: c.success(), concurrency=0)
        self.idle()
