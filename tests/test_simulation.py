"""
The simulation: seeds of bad weather that every promise must survive, and the oracles that judge them.

The environment variable ``COMMSMGR_SIMULATION_SEEDS`` says how many seeds are run; 300 by default.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import fail
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.intake import Intake
from tests.simulation.history import AgentEnd, DeadLetter, Fact, History
from tests.simulation.oracles import MOVING, ORACLES, Ends, judge
from tests.simulation.scenario import run, stumbled
from tests.simulation.setting import CONCURRENCY

ROOT = Path(__file__).resolve().parent.parent
AGENT = "agent-1"


def simulate(*arguments: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    """Run the simulation's own command."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        # Where branches are counted, not in there: it would take twice as long and show little.
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


class SeedTests(SynchronousTestCase):
    """Whole worlds."""

    timeout = 600

    def test_seeds(self) -> None:
        """No oracle objects to any of the seeds."""
        ran = simulate("--seeds", os.environ.get("COMMSMGR_SIMULATION_SEEDS", "300"), "--jobs", "2")
        self.assertEqual(0, ran.returncode, ran.stdout[-20_000:])
        self.assertIn("nothing is objected to", ran.stdout)

    def test_replay(self) -> None:
        """A seed has the same history to the byte, in whatever order Python keeps its sets."""
        for seed in ("16", "26"):
            one, other = (simulate("--seed", seed, "--history", hash_seed=hashes).stdout for hashes in ("1", "2"))
            self.assertGreater(one.count("\n"), 1000, one)
            self.assertEqual(one, other)

    def test_planted(self) -> None:
        """A mistake in the product is found, and its seed says how to see it again."""

        def acknowledge_first(intake: Intake, source: Any, arrived: Any) -> None:
            source.acknowledge(arrived.id)
            arrive(intake, source, arrived)

        arrive = Intake.arrived
        self.patch(Intake, "arrived", acknowledge_first)
        violations = [said for seed in PLANTED for said in run(seed).violations]
        self.flushLoggedErrors()
        self.assertTrue(violations)
        self.assertTrue(all(said.startswith("held_is_answered") for said in violations), violations)

    def test_errors_that_nobody_looks_at(self) -> None:
        """They are heard of when they are collected, save for the stumbling of coroutines that are ended then."""
        for error, heard in ((ValueError("no"), True), (RuntimeError("cannot reuse already awaited coroutine"), False)):
            events: list[LogEvent] = []
            globalLogPublisher.addObserver(events.append)
            fail(error)
            gc.collect()
            globalLogPublisher.removeObserver(events.append)
            self.flushLoggedErrors(type(error))
            self.assertEqual([stumbled(event) for event in events], [True, not heard])


PLANTED = (5, 9, 11)
"""Seeds in which a command that was acknowledged too early is lost."""


class OracleTests(SynchronousTestCase):
    """Each oracle is content with a history in which all is well, and objects to one planted line."""

    def setUp(self) -> None:
        self.now = 0.0
        self.history = History(lambda: self.now)
        self.ends: Ends = {
            AGENT: AgentEnd(highest={"events": 3, "in_flight": 1}, bounds={"events": 10, "in_flight": 5})
        }
        self.gave("command-1", "c1")
        self.ran("command-1")
        self.kept("r1", "c1", key=1)
        self.stored("r1", "c1", "command-1")
        self.gave("command-2", "c2")
        self.ran("command-2", key=2)
        self.kept("r2", "c2", key=2)
        self.stored("r2", "c2", "command-2")
        self.stocked("s1", 1)
        self.comes(1)
        self.note("world", "healed", AGENT, within=20.0)
        self.note(AGENT, "in-touch")
        self.note("world", "settled")

    def note(self, who: str, what: str, subject: str = "", **facts: Fact) -> None:
        """Let something happen, a second after what happened before."""
        self.now += 1.0
        self.history.note(who, what, subject, **facts)

    def gave(self, tag: str, name: str, held: bool = True, type: str = "quick") -> None:
        self.note("backend", "gave", tag, id=name, agent=AGENT, type=type, held=held)

    def ran(self, tag: str, *, key: int = 1, redelivered: bool = False, repeatable: bool = False) -> None:
        self.note(AGENT, "ran", tag, key=key, redelivered=redelivered, repeatable=repeatable)

    def kept(self, name: str, command: str, status: str = "success", key: int = 0, ttl: float = -1.0) -> None:
        self.note(AGENT, "kept", name, command=command, key=key, status=status, digest="d", ttl=ttl)

    def stored(self, name: str, command: str, tag: str = "", status: str = "success", **facts: Fact) -> None:
        known: dict[str, Fact] = {"digest": "d", "short": False, "by": "http", "again": False}
        self.note("backend", "stored", name, command=command, tag=tag, status=status, **known | facts)

    def stocked(self, name: str, number: int) -> None:
        """Let an agent make an inventory."""
        self.note(AGENT, "handed", name, number=number)
        self.note(AGENT, "stock", name, number=number)

    def comes(self, number: int, *, told: bool = True) -> None:
        """Let an inventory come to the backend."""
        self.note("backend", "inventory", AGENT, number=number, told=told)

    def answered(self, name: str, command: str, status: str) -> None:
        self.kept(name, command, status)
        self.stored(name, command, status=status)

    def declined(self, name: str, code: str = "refused", *, later: bool = False, fault: bool = True) -> None:
        self.note("backend", "declined", name, code=code, later=later, fault=fault)

    def dies(self, name: str, reason: str, *, after: float = 9.0) -> None:
        """Make a dead letter of an event, and count it."""
        end = self.ends[AGENT]
        end.dead.append(DeadLetter(name, "command_result", "", reason, 100.0, 100.0 + after))
        end.unreported += 1
        counted = f"{reason.partition(':')[0]} command_result"
        end.losses[counted] = end.losses.get(counted, 0) + 1

    def objects(self, oracle: str, count: int = 1) -> None:
        """The oracle objects, so many times, and no other one does."""
        said = judge(self.history, self.ends)
        self.assertEqual([oracle] * count, [sentence.partition(":")[0] for sentence in said], said)

    def content(self) -> None:
        """Nobody objects."""
        self.assertEqual([], judge(self.history, self.ends))

    def test_content(self) -> None:
        """All is well."""
        self.content()
        self.assertEqual(len(ORACLES), len({oracle.__name__ for oracle in ORACLES}))

    def test_lost(self) -> None:
        """What was accepted and is nowhere is lost."""
        self.kept("r3", "reports-of-agent-1")
        self.objects("accepted_is_delivered")

    def test_not_kept(self) -> None:
        """What the agent was told must be true."""
        self.note(AGENT, "accepted", "event-1", id="r3")
        self.objects("accepted_is_delivered")

    def test_expired(self) -> None:
        """A dead letter may have expired when it had a time, and when that was over by the agent's clock."""
        self.kept("r3", "reports-of-agent-1", ttl=5.0)
        self.dies("r3", "expired", after=5.0)
        self.content()
        self.kept("r4", "reports-of-agent-1", ttl=5.0)
        self.dies("r4", "expired", after=4.0)
        self.objects("accepted_is_delivered")
        self.kept("r5", "reports-of-agent-1")
        self.dies("r5", "expired")
        self.objects("accepted_is_delivered", 2)

    def test_refused(self) -> None:
        """A dead letter may have been refused when the backend was told to refuse it, for good, in these words."""
        for name in ("r3", "r4", "r5", "r6", "r7"):
            self.kept(name, "reports-of-agent-1")
        self.declined("r3")
        self.dies("r3", "refused: refused the backend was told to")
        self.declined("r4", "HTTP 400")
        self.dies("r4", "refused: HTTP 400")
        self.declined("r5", later=True)
        self.dies("r5", "refused: refused the backend was told to")
        self.declined("r6", "unknown_command", fault=False)
        self.dies("r6", "refused: unknown_command")
        self.dies("r7", "damaged")
        self.objects("accepted_is_delivered", 3)

    def test_stuck(self) -> None:
        """What waits in an outbox for ever is not delivered."""
        self.ends[AGENT].waiting.append("r9")
        self.ends[AGENT].states.append("s9")
        self.objects("accepted_is_delivered", 2)

    def test_unanswered(self) -> None:
        """A command that the backend holds needs an answer; one that it dropped does not."""
        self.gave("command-3", "c3", held=False)
        self.content()
        self.gave("command-4", "c4")
        self.objects("held_is_answered")

    def test_open(self) -> None:
        """A command must not stay in the inbox."""
        self.ends[AGENT].open_commands.append("c9")
        self.objects("held_is_answered")

    def test_interrupted(self) -> None:
        """What had begun may be interrupted, and at a death so much as runs at once; what is repeatable never is."""
        self.gave("command-3", "c3")
        self.answered("r3", "c3", "interrupted")
        self.objects("held_is_answered")
        self.history.records[-2:] = []
        self.note(AGENT, "died", power=False)
        self.answered("r3", "c3", "interrupted")
        self.content()
        self.gave("command-4", "c4", type="repeat")
        self.answered("r4", "c4", "interrupted")
        self.objects("held_is_answered")
        self.history.records[-3:] = []
        for number in range(10, 10 + CONCURRENCY):
            self.gave(f"command-{number}", f"c{number}")
            self.answered(f"r{number}", f"c{number}", "interrupted")
        self.objects("held_is_answered")

    def test_wrong_status(self) -> None:
        """Nothing that is held is rejected, and only what fails is an error."""
        self.gave("command-3", "c3")
        self.answered("r3", "c3", "rejected")
        self.objects("held_is_answered")
        self.gave("command-4", "c4")
        self.answered("r4", "c4", "error")
        self.objects("held_is_answered", 2)

    def test_two_results(self) -> None:
        """A command has one result, however often that one comes."""
        self.stored("r1", "c1", "command-1", again=True)
        self.content()
        self.stored("r3", "c1", status="timeout")
        self.objects("effective_once")

    def test_rejected(self) -> None:
        """A command is rejected once for each time that it was sent."""
        self.gave("command-3", "c3", held=False)
        self.answered("r3", "c3", "rejected")
        self.content()
        self.answered("r4", "c3", "success")
        self.objects("effective_once")
        self.note("backend", "sent-again", "c3")
        self.content()

    def test_short(self) -> None:
        """That a result is no longer known may be said when it is not, each time that the command comes."""
        self.stored("r3", "c1", short=True)
        self.objects("effective_once")
        self.note(AGENT, "known", "c1", finished=True, missing=True)
        self.content()

    def test_never_given(self) -> None:
        """A result of a command that was never given is wrong; an agent's own events are no such thing."""
        self.stored("r3", "reports-of-agent-1")
        self.content()
        self.stored("r4", "c4")
        self.objects("effective_once")

    def test_tag_twice(self) -> None:
        """Something that was done once does not count twice, whatever it is called."""
        self.stored("r3", "reports-of-agent-1", "command-1")
        self.objects("effective_once")

    def test_other_content(self) -> None:
        """What comes is what was accepted, and what comes again is what came before."""
        self.stored("r1", "c1", "command-1", digest="e", again=True)
        self.objects("effective_once")

    def test_run_twice(self) -> None:
        """A command is run once."""
        self.gave("command-3", "c3", held=False)
        self.ran("command-3", key=3)
        self.content()
        self.ran("command-3", key=3, redelivered=True)
        # Offered again, and run again: both are wrong, and one sentence says so.
        self.objects("run_once")

    def test_repeated(self) -> None:
        """What is safe to repeat may be run again after a death, when it says so, until it has a result."""
        self.ran("command-3", key=3, repeatable=True)
        self.note(AGENT, "died", power=False)
        self.ran("command-3", key=3, repeatable=True, redelivered=True)
        self.content()
        self.ran("command-3", key=3, repeatable=True, redelivered=True)
        self.objects("run_once")
        self.ran("command-1", repeatable=True, redelivered=True)
        self.objects("run_once", 2)

    def test_run_elsewhere(self) -> None:
        """A command is run by the agent that it was given to."""
        self.note("backend", "gave", "command-3", id="c3", agent="agent-2", type="quick", held=False)
        self.ran("command-3", key=3)
        self.objects("run_once")

    def test_order(self) -> None:
        """What was accepted first arrives first, unless it was wanted later or was given up."""
        for name in ("r3", "r4"):
            self.kept(name, "reports-of-agent-1", ttl=1.0)
        for name in ("r4", "r3"):
            self.stored(name, "reports-of-agent-1")
        self.objects("in_order")
        for exempt in (True, False):
            self.declined("r3", later=exempt, fault=not exempt)
            self.content()
            self.history.records.pop()
        self.dies("r3", "expired")
        self.content()

    def test_stale_state(self) -> None:
        """The last inventory that was accepted arrives, and is the last."""
        self.stocked("s2", 2)
        self.objects("states_are_latest")
        self.comes(2)
        self.content()
        self.comes(1)
        self.objects("states_are_latest", 2)

    def test_replaced_state(self) -> None:
        """One that was given up, or is left at the end, has replaced what was accepted before, and nothing after it."""
        end = self.ends[AGENT]
        self.stocked("s2", 2)
        self.note(AGENT, "handed", "s3", number=2)
        self.objects("states_are_latest")
        end.states.append("s3")
        self.note("world", "ending")
        self.content()
        end.states.clear()
        end.dead.append(DeadLetter("s3", "inventory", "", "refused: refused", 100.0, 109.0))
        end.losses["refused inventory"] = end.unreported = 1
        self.declined("s3")
        self.content()
        self.stocked("s4", 3)
        self.objects("states_are_latest")

    def test_left_state(self) -> None:
        """A state may be left that was made when all was about to end, and no other."""
        self.note(AGENT, "handed", "s2", number=2)
        self.ends[AGENT].states.append("s2")
        self.objects("accepted_is_delivered")
        self.note("world", "ending")
        self.content()
        self.history.records.pop()
        self.now += 1.0
        self.note("world", "ending")
        self.objects("accepted_is_delivered")

    def test_late_state(self) -> None:
        """A slow one may arrive after its successor, but must not be the last if the agent is told."""
        self.note("world", "fault", "slow", number=1)
        self.comes(3)
        self.note("world", "over", "slow", number=1)
        self.comes(2)
        self.objects("states_are_latest")
        self.comes(4)
        self.content()
        self.comes(3, told=False)
        self.content()
        self.now += 60.0
        self.comes(3, told=False)
        self.comes(5)
        self.objects("states_are_latest")

    def test_bounds(self) -> None:
        """Nobody holds more than allowed."""
        self.ends[AGENT].highest |= {"events": 10, "in_flight": 5}
        self.content()
        self.ends[AGENT].highest |= {"events": 11, "in_flight": 6}
        self.objects("within_bounds", 2)

    def test_totals(self) -> None:
        """A total that has drifted away from what is there."""
        self.ends[AGENT].totals["events"] = (1, 1)
        self.content()
        self.ends[AGENT].totals["events"] = (2, 1)
        self.objects("totals_are_right")

    def test_complaint(self) -> None:
        """Errors are objected to."""
        self.note(AGENT, "complaint", "ValueError", says="no")
        self.objects("nothing_complains")

    def test_leftover(self) -> None:
        """What stays after a stop is objected to."""
        self.note(AGENT, "leftover", "a timer")
        self.objects("nothing_is_left")

    def test_late(self) -> None:
        """In touch again, but not in time."""
        self.note(AGENT, "apart")
        self.now += 20.0
        self.note(AGENT, "in-touch")
        self.objects("back_in_time")

    def test_never(self) -> None:
        """Never in touch again."""
        self.note(AGENT, "apart")
        self.objects("back_in_time")

    def test_apart(self) -> None:
        """In touch, and then no more; what happens while all is stopped does not count."""
        self.now += 20.0
        self.note("world", "ending")
        self.note(AGENT, "apart")
        self.content()
        del self.history.records[-2]
        self.objects("back_in_time", 2)

    def test_moving(self) -> None:
        """Apart on the way back to the preferred backend, but not for longer than that takes."""
        self.now += 20.0
        self.note(AGENT, "says", "backends.moved")
        self.now -= 1.0
        self.note(AGENT, "apart")
        self.note("world", "ending")
        self.content()
        self.now += MOVING
        self.history.records.pop()
        self.note("world", "ending")
        self.objects("back_in_time")

    def test_losses(self) -> None:
        """Everything that was given up is counted once under its reason, reported or not yet."""
        end = self.ends[AGENT]
        for name in ("r8", "r9"):
            self.kept(name, "reports-of-agent-1", ttl=1.0)
            self.dies(name, "expired")
        self.content()
        end.losses["expired command_result"] = end.unreported = 1
        self.objects("losses_are_counted")
        self.note("backend", "losses", AGENT, id="l1", reason="refused", kind="command_result", count=1)
        self.objects("losses_are_counted")
        self.history.records.pop()
        self.note("backend", "losses", AGENT, id="l1", reason="expired", kind="command_result", count=1)
        self.content()
        self.note("backend", "losses", AGENT, id="l2", reason="expired", kind="command_result", count=1)
        self.objects("losses_are_counted")
        self.history.records.pop()
        end.unreported = 2
        self.objects("losses_are_counted")

    def test_evicted(self) -> None:
        """A dead letter that gave way to another is counted once more, and may be missing."""
        self.kept("r8", "reports-of-agent-1", ttl=1.0)
        self.ends[AGENT].losses = {"expired command_result": 1, "evicted command_result": 1}
        self.ends[AGENT].unreported = 2
        self.content()
        self.ends[AGENT].losses["evicted command_result"] = 2
        self.ends[AGENT].unreported = 3
        self.objects("losses_are_counted")

    def test_unanswered_duplicate(self) -> None:
        """A duplicate gets the original result."""
        self.note("world", "gave-again", "command-1", id="c1")
        self.objects("duplicates_are_answered")
        self.stored("r1", "c1", "command-1", again=True)
        self.content()

    def test_text(self) -> None:
        """A line says when, who, what, and the facts in the order in which they were given."""
        self.note(AGENT, "ran", "command-9", key=1, late=0.25)
        self.assertEqual("  15.000000  agent-1    ran        command-9 key=1 late=0.25", self.history.text(1))
