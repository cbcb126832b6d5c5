"""Results on their way into the spool: reported, insisted on, said, and what becomes of them without a caller."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred, fail, maybeDeferred
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import AlreadyCompleted, InvalidMessage, NotRunning, QueueFull, SpoolWriteFailed
from commsmgr.messages import Command, Result
from commsmgr.redact import Redactor
from commsmgr.reporting import LONG, Reporting
from commsmgr.spool import Lane
from tests.command_kit import CommandWorld, Source, arrived


class ReportingTestCase(SynchronousTestCase):
    """A spool in memory that holds three events, on a virtual clock."""

    def setUp(self) -> None:
        self.world = CommandWorld(spool={"max_events": 3}, max_pending=2)
        self.sizes: list[tuple[int, int]] = []
        self.threads = 0
        self.lines: list[LogEvent] = []
        self._ids = iter(range(1, 1000))
        self.reporting = Reporting(
            self.world.spool,
            new_id=lambda: f"r{next(self._ids)}",
            timestamp=lambda: "now",
            settings=config.Delivery(max_body_bytes=1024, max_output_bytes=256),
            redact=Redactor(),
            in_thread=self.in_thread,
            accepted=lambda count, size: self.sizes.append((count, size)),
            metrics=self.world.metrics,
            clock=self.world.clock,
        )
        self.world.spool.inbox.on_completed = self.reporting.accepted
        globalLogPublisher.addObserver(self.lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.lines.append)

    def in_thread(self, function: Callable[[], tuple[bytes, int]]) -> Deferred[tuple[bytes, int]]:
        self.threads += 1
        return maybeDeferred(function)

    def counted(self, outcome: str) -> float:
        labels = {"kind": "command_result", "direction": "out", "outcome": outcome}
        return self.world.registry.get_sample_value("commsmgr_messages_total", labels) or 0.0

    def command(self, id: str = "c") -> Command:
        """Return a command that was offered."""
        self.world.intake.arrived(Source(), arrived(id))
        command: Command = self.world.get(self.world.channel.get())
        return command

    def fill(self) -> int:
        """Fill the outbox to its bound; return the number of one entry."""
        outbox = self.world.spool.outbox
        while outbox.stats.events < 3:
            seq: int = self.world.get(outbox.put(lane=Lane.EVENT, kind="x", id="other", body=b"{}"))
        return seq

    def make_room(self, seq: int) -> None:
        outbox = self.world.spool.outbox
        forgetting = outbox.forget([seq])
        # A receipt waits a moment for company: here it is.
        self.world.get(outbox.dead_letters(0))
        self.successResultOf(forgetting)

    def stored(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the ids and bodies of the results that have come to be sent since the last call."""
        entries = self.world.spool.outbox.reader(Lane.EVENT).take(1000, 1 << 20)
        return [(entry.id, msgspec.json.decode(entry.body)) for entry in entries if entry.kind == "command_result"]

    def logged(self, name: str) -> list[LogEvent]:
        return [line for line in self.lines if line.get("event") == name]

    def waiting(self, storing: Any) -> Deferred[Any]:
        """Begin, and let everything happen that waits for no time to pass."""
        deferred = storing if isinstance(storing, Deferred) else Deferred.fromCoroutine(storing)
        self.world.run()
        return deferred

    @property
    def open(self) -> int:
        return self.world.spool.inbox.open_count

    def idle(self) -> None:
        self.assertEqual(self.world.clock.getDelayedCalls(), [])


class Report(ReportingTestCase):
    """With a caller, who hears of what goes wrong."""

    def test_report(self) -> None:
        """It closes the command in the commit that accepts the result, and returns the result's id."""
        command = self.command()
        reporting = self.reporting.report(command.success("out"))
        self.assertEqual((self.open, self.sizes), (1, []))
        self.world.run()
        self.assertEqual(self.successResultOf(reporting), "r1")
        ((name, body),) = self.stored()
        self.assertEqual((name, body["id"], body["command_id"], body["output"]), ("r1", "r1", "c", "out"))
        self.assertEqual((body["timestamp"], self.open), ("now", 0))
        self.assertEqual(self.sizes, [(1, self.world.spool.outbox.stats.event_bytes)])

    def test_counted_together(self) -> None:
        """What one batch has stored is counted once, and what it has refused is not counted."""
        first, second = self.command("one"), self.command("two")
        for result in (first.success("out"), first.success("again"), second.success()):
            self.reporting.report(result).addErrback(lambda failure: failure.trap(AlreadyCompleted))
        self.world.run()
        self.assertEqual(self.sizes, [(2, self.world.spool.outbox.stats.event_bytes)])
        self.assertEqual(self.counted("accepted"), 2)

    def test_ttl(self) -> None:
        """A result may be of use for some time only."""
        self.successResultOf(self.waiting(self.reporting.report(Result(command_id="elsewhere"), ttl=5.0)))
        self.world.clock.advance(4.9)
        self.assertEqual(self.world.get(self.world.spool.outbox.expire()), 0)
        self.world.clock.advance(0.2)
        self.assertEqual(self.world.get(self.world.spool.outbox.expire()), 1)

    def test_refused(self) -> None:
        """What the spool does not take, or cannot be encoded, is an error at once, and counts as nothing."""
        command = self.command()
        self.failureResultOf(
            self.waiting(self.reporting.report(command.success("x", exit_code=1 << 60))), InvalidMessage
        )
        self.fill()
        self.failureResultOf(self.waiting(self.reporting.report(command.success())), QueueFull)
        self.assertEqual((self.open, self.sizes, self.stored()), (1, [], []))
        self.idle()

    def test_too_long(self) -> None:
        """A command that says too much gets its result all the same, with a note of how much is missing."""
        command = self.command()
        self.successResultOf(self.waiting(self.reporting.report(command.success("x" * 5000))))
        ((_, body),) = self.stored()
        self.assertEqual((self.open, self.threads, self.counted("truncated"), self.counted("accepted")), (0, 0, 1, 1))
        self.assertIn(f"[truncated: {body['truncated_bytes']} of 5000 bytes left out]", body["output"])

    def test_in_a_thread(self) -> None:
        """What is long is looked at in a thread, and secrets are gone before it is stored."""
        command = self.command()
        text = "password=hunter2 " + "x" * LONG
        self.successResultOf(self.waiting(self.reporting.report(command.error("e", output=text))))
        ((_, body),) = self.stored()
        self.assertEqual((self.open, self.threads), (0, 1))
        self.assertTrue(body["output"].startswith("password=[redacted] xx"))

    def test_say(self) -> None:
        """What is only said closes no command, not even one of the same id, and does not wait for room either."""
        self.command()
        self.successResultOf(self.waiting(self.reporting.say(Result(command_id="c", status="rejected"))))
        ((_, body),) = self.stored()
        self.assertEqual((body["command_id"], body["status"], self.open, len(self.sizes)), ("c", "rejected", 1, 1))
        self.fill()
        self.failureResultOf(self.waiting(self.reporting.say(Result(command_id="c"))), QueueFull)
        self.assertEqual(len(self.sizes), 1)
        self.idle()


class Insist(ReportingTestCase):
    """A result that nobody could report again is tried until it is stored."""

    def test_no_room(self) -> None:
        """It is tried every second and stored as soon as there is room, once."""
        command, seq = self.command(), self.fill()
        complete, tried = self.world.spool.inbox.complete, []

        def trying(**what: Any) -> Deferred[int]:
            tried.append(what["command_id"])
            return complete(**what)

        self.patch(self.world.spool.inbox, "complete", trying)
        insisting = self.waiting(self.reporting.insist(command.success("late")))
        self.world.clock.pump([1] * 5)
        self.assertNoResult(insisting)
        self.assertEqual((self.open, self.sizes), (1, []))
        self.assertEqual(tried, ["c"] * 6)
        self.make_room(seq)
        self.world.clock.advance(0.99)
        self.world.run()
        self.assertNoResult(insisting)
        self.world.clock.advance(0.01)
        self.world.run()
        name = self.successResultOf(insisting)
        ((stored, body),) = self.stored()
        self.assertEqual((stored, body["output"], self.open, len(self.sizes)), (name, "late", 0, 1))
        self.idle()

    def test_log(self) -> None:
        """However many wait, a line each ten seconds says so, and how many it stands for: a full disk fills no log."""
        results = [self.command(name).success() for name in ("one", "two")]
        self.fill()
        for result in results:
            self.reporting.aside(self.reporting.insist(result), result)
        self.world.run()
        self.world.clock.pump([1] * 10)
        told = [(line["message_id"], line["suppressed"]) for line in self.logged("command.result-waits")]
        self.assertEqual(told, [("one", 0), ("one", 19)])
        self.reporting.stop()
        self.idle()

    def test_disk(self) -> None:
        """A disk that fails is waited for as well."""
        inbox, complete = self.world.spool.inbox, self.world.spool.inbox.complete
        command = self.command()
        self.patch(inbox, "complete", lambda **_: fail(SpoolWriteFailed()))
        insisting = self.waiting(self.reporting.insist(command.success()))
        self.assertNoResult(insisting)
        self.patch(inbox, "complete", complete)
        self.world.clock.advance(1)
        self.world.run()
        self.successResultOf(insisting)
        self.assertEqual(self.open, 0)

    def test_no_use(self) -> None:
        """What waiting cannot help is raised at once: a second result, a wrong one, a spool that is closed."""
        command = self.command()
        self.failureResultOf(
            self.waiting(self.reporting.insist(command.success("x", exit_code=1 << 60))), InvalidMessage
        )
        self.successResultOf(self.waiting(self.reporting.insist(command.success())))
        self.failureResultOf(self.waiting(self.reporting.insist(command.success())), AlreadyCompleted)
        self.world.get(self.world.spool.close())
        self.failureResultOf(self.waiting(self.reporting.insist(command.success())), NotRunning)
        self.assertEqual(self.logged("command.result-waits"), [])
        self.idle()

    def test_cancelled(self) -> None:
        """Cancelling ends it; the command stays open."""
        command = self.command()
        self.fill()
        insisting = self.waiting(self.reporting.insist(command.success()))
        insisting.cancel()
        self.failureResultOf(insisting, CancelledError)
        self.assertEqual(self.open, 1)
        self.idle()


class Aside(ReportingTestCase):
    """Without a caller."""

    def aside(self, storing: Any, result: Result) -> None:
        self.reporting.aside(storing, result)
        self.world.run()

    def test_stored(self) -> None:
        """What is stored is stored, and nothing is said or kept of it; stopping afterwards is nothing."""
        command = self.command()
        self.aside(self.reporting.insist(command.success()), command.success())
        self.assertEqual((self.open, len(self.sizes), self.logged("command.not-reported")), (0, 1, []))
        self.assertEqual(self.reporting._aside, {})
        self.reporting.stop()
        self.assertEqual(len(self.stored()), 1)

    def test_refused(self) -> None:
        """What the spool does not take is a line in the log, whether it says so at once or later."""
        result = Result(command_id="c", status="rejected")
        self.fill()
        self.aside(self.reporting.say(result), result)
        self.patch(self.world.spool.outbox, "put", lambda **_: later)
        later: Deferred[int] = Deferred()
        self.aside(self.reporting.say(result), result)
        later.errback(SpoolWriteFailed("the disk"))
        lines = self.logged("command.not-reported")
        self.assertEqual([(line["status"], line["message_id"]) for line in lines], [("rejected", "c")] * 2)
        self.assertIn("the disk", lines[1]["error"])
        self.assertEqual(self.reporting._aside, {})

    def test_defect(self) -> None:
        """A defect is logged with its traceback, as one."""
        self.patch(self.world.spool.outbox, "put", lambda **_: fail(ZeroDivisionError()))
        self.aside(self.reporting.say(Result(command_id="c")), Result(command_id="c"))
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_stop(self) -> None:
        """Stopping ends all that still waits, silently; the commands stay open for the next start."""
        commands = [self.command("one"), self.command("two")]
        seq = self.fill()
        for command in commands:
            self.aside(self.reporting.insist(command.success()), command.success())
        self.assertEqual(len(self.logged("command.result-waits")), 1)
        self.reporting.stop()
        self.idle()
        self.make_room(seq)
        self.world.clock.advance(5)
        self.assertEqual((self.open, self.sizes, self.logged("command.not-reported")), (2, [], []))
        gc.collect()
        self.assertEqual((self.reporting._aside, self.flushLoggedErrors()), ({}, []))
