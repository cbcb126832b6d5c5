"""An agent that is killed again and again while commands and results flow: nothing lost, nothing done twice."""

from __future__ import annotations

import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall

from commsmgr.backend.events import BackendEvent
from commsmgr.backend.service import ReferenceBackend
from commsmgr.messages import ResultBody
from tests.processes import PATIENCE, ProcessTestCase, Program, pause, reactor

AGENT = Path(__file__).with_name("crash_agent.py")
ROUNDS = 5
EVERY = 0.004
"""Seconds between two commands."""
MOST_OPEN = 60


class Crash(ProcessTestCase):
    """SIGKILL at moments that a seed decides, counted in what the backend hears from the agent."""

    async def test_killed_again_and_again(self) -> None:
        """
        In the end every command has exactly one result, which says the truth about it; none ran twice but those that
        may; and each result that the agent was told is accepted has arrived.
        """
        random = Random(20)
        self.backend_service = backend = ReferenceBackend(
            reactor, wall=time.time, random=random, path=str(self.directory / "backend.db")
        )
        await backend.startService()
        self.addCleanup(backend.stopService)
        journal = self.directory / "journal"
        config = self.configuration(backend.url, commands={"safe_to_repeat": ["again"]}, observe={"listen": ""})
        sent: dict[str, str] = {}
        acked: set[str] = set()
        self.addCleanup(backend.subscribe(lambda event: acked.add(event.id) if event.kind == "acked" else None))

        def send() -> None:
            if len(sent) - self.finished() < MOST_OPEN:
                kind = random.choice(("once", "once", "again"))
                sent[backend.send_command("m-1", kind)] = kind
            if random.random() < 0.005:
                backend.crash()  # the connection breaks, too

        for number in range(ROUNDS):
            agent = self.python(AGENT, config, str(journal), str(number))
            await self.registered(agent)
            sending = LoopingCall(send)
            sending.start(EVERY)
            try:
                await self.heard(random.choice(("acked", "result")), random.randrange(1, 60), agent)
                if random.random() < 0.5:
                    await pause(random.random() * 0.01)
            finally:
                sending.stop()
            self.assertEqual(-signal.SIGKILL, await agent.end(signal.SIGKILL), agent.text)

        agent = self.python(AGENT, config, str(journal), "last")
        deadline = reactor.seconds() + PATIENCE
        while self.finished() < len(sent) and reactor.seconds() < deadline and agent.code is None:
            await pause(0.02)
        self.assertEqual(0, await agent.end(), agent.text)
        self.assertEqual([], agent.lines)
        self.audit(sent, acked, journal.read_text())

    def finished(self) -> int:
        """Say how many commands have a result."""
        return len({row.command_id for row in self.backend_service.ledger.results()})

    def registered(self, agent: Program) -> Deferred[object]:
        """Wait until an agent is connected; fails when the process ends before that."""
        return self.heard("registered", 1, agent)

    def heard(self, kind: str, times: int, agent: Program) -> Deferred[object]:
        """Wait until the backend has heard so many things of a kind; fails when the process ends before that."""
        heard: Deferred[object] = Deferred()
        left = times

        def observe(event: BackendEvent) -> None:
            nonlocal left
            if event.kind == kind:
                left -= 1
                if not left and not heard.called:
                    heard.callback(None)

        stop = self.backend_service.subscribe(observe)
        agent.ended.addCallback(
            lambda code: heard.called or heard.errback(AssertionError(f"ended with {code}:\n{agent.text}"))
        )

        def over(outcome: object) -> object:
            stop()
            return outcome

        return heard.addTimeout(PATIENCE, reactor).addBoth(over)

    def audit(self, sent: dict[str, str], acked: set[str], journal: str) -> None:
        """Compare what the backend has with what the agent did."""
        results: dict[str, list[ResultBody]] = defaultdict(list)
        for row in self.backend_service.ledger.results():
            results[row.command_id].append(msgspec.json.decode(row.body, type=ResultBody))
        self.assertEqual(set(), set(sent) - set(results), "commands without a result")
        self.assertEqual(set(), set(results) - set(sent), "results of commands that nobody sent")
        self.assertEqual({}, {one: found for one, found in results.items() if len(found) > 1}, "more than one result")
        # Not all of them: of one that was stored when the agent was killed, the result may come before any receipt.
        self.assertEqual(set(), acked - set(sent))
        self.assertGreater(len(acked), 20, "hardly anything was under way: this shows nothing")

        runs: dict[str, list[str]] = defaultdict(list)
        accepted: set[str] = set()
        for line in journal.splitlines():
            match line.split():
                case ["run", command, _, redelivered]:
                    runs[command].append(redelivered)
                case ["accepted", command, _]:
                    accepted.add(command)
        self.assertEqual({}, {one: found for one, found in runs.items() if sent[one] == "once" and len(found) > 1})
        for command, kind in sent.items():
            (result,) = results[command]
            if command in accepted:
                self.assertEqual("success", result.status, "an accepted result did not arrive")
            if kind == "again":
                self.assertEqual("success", result.status)
                self.assertEqual({"1"}, set(runs[command][1:]) | {"1"}, "it was not told that it may have run before")
            else:
                self.assertIn(result.status, ("success", "interrupted"))
            self.assertTrue(runs[command] or result.status == "interrupted", "a success that never ran")
        statuses = Counter(result.status for (result,) in results.values())
        self.assertGreater(statuses["success"], 20, statuses)
        # Had nothing been under way when the agent was killed, this test would show nothing.
        self.assertGreater(statuses["interrupted"], 0)
