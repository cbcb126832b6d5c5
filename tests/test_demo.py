"""The demo as newcomers run it: ``twistd -n commsmgr --demo``, a real process."""

from __future__ import annotations

import json
import os
import signal
from contextlib import redirect_stderr
from io import StringIO

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import process, tap
from commsmgr.demo import Demo as Operator
from commsmgr.demo import Screen
from commsmgr.errors import NotRunning
from tests.processes import ProcessTestCase, together

LATENCY = r"after (\d+(\.\d+)?) ms"


class Demo(ProcessTestCase):
    """The README's first command, once all is installed."""

    async def test_story(self) -> None:
        """
        It tells what happens in readable lines, shows the console, runs commands, its own and those of the console,
        and leaves nothing behind when it is stopped.
        """
        before = sorted(os.listdir(self.directory))
        demo = self.twistd("-n", "--pidfile=twistd.pid", "commsmgr", "--demo")
        console = (await demo.line(r"demo +open the backend's console in a browser: (http://127\.0\.0\.1:\d+/)$"))[1]
        await demo.line(r"agent +registered with demo \(commsmgr\.v1\)")
        await demo.line(rf"agent +heartbeat answered {LATENCY}")
        await demo.line(rf"agent +inventory accepted {LATENCY}")

        status, page = await self.fetch(console)
        self.assertEqual(200, status)
        self.assertIn(b"<html", page)
        (agent,) = json.loads((await self.fetch(f"{console}api/state"))[1])["agents"]
        self.assertTrue(agent["connected"])
        order = {"machine_id": agent["machine_id"], "type": "echo", "command": "from", "args": ["the", "console"]}
        status, answer = await self.fetch(f"{console}api/commands", order)
        self.assertEqual(201, status, answer)
        command = json.loads(answer)["id"]
        result = await self.result(console.rstrip("/"), command)
        self.assertEqual(("success", "from the console"), (result["status"], result["output"]))
        await demo.line(rf"agent +command {command} \(echo\) received")
        await demo.line(rf"agent +command {command} \(echo\): success")
        await demo.line(rf"agent +result \S+ acknowledged {LATENCY}")

        own = (await demo.line(r"backend +sends command (\S+): ping"))[1]
        await demo.line(rf"backend +has the result of {own} {LATENCY}: success pong")

        self.assertEqual(-signal.SIGTERM, await demo.end())
        self.assertRegex(demo.lines[-1], "demo +stopped$")
        for line in demo.lines:
            self.assertRegex(line, r"^\d\d:\d\d:\d\d  (demo|agent|backend) +\S", "readable lines only")
        self.assertEqual([], os.listdir(self.temporary), "temporary files were left")
        self.assertEqual(before, sorted(os.listdir(self.directory)))

    async def test_stopped_early(self) -> None:
        """Ctrl-C ends it at any moment of its start, without a traceback and without leaving anything."""
        demos = [self.twistd("-n", "commsmgr", "--demo") for _ in range(2)]
        for demo, words in zip(demos, ("listens on", "registered"), strict=True):
            demo.line(words).addCallback(lambda _, demo=demo: demo.send(signal.SIGINT))
        self.assertEqual([-signal.SIGINT] * 2, await together(*(demo.wait() for demo in demos)))
        for demo in demos:
            self.assertNotIn("Traceback", demo.text)
            self.assertNotIn("failed", demo.text)
            self.assertNotIn("warn", demo.text)
        self.assertEqual([], os.listdir(self.temporary))

    async def test_nobody_reads(self) -> None:
        """When what it writes into is closed, as by ``| head``, it ends as well, in order."""
        demo = self.twistd("-n", "commsmgr", "--demo")
        await demo.line("registered")
        demo.transport.closeStdout()
        self.assertEqual(1, await demo.wait())
        self.assertNotIn("Traceback", demo.text)
        self.assertEqual([], os.listdir(self.temporary))

    def test_daemon(self) -> None:
        """Without ``-n`` nobody would see it: it says how to call it."""
        options, said = tap.Options(), StringIO()
        options.parent = {"nodaemon": 0}
        with redirect_stderr(said), self.assertRaises(SystemExit) as end:
            options.parseOptions(["--demo"])
        self.assertEqual(1, end.exception.code)
        self.assertEqual("twistd commsmgr: the demo needs a terminal: twistd -n commsmgr --demo\n", said.getvalue())


class Results(SynchronousTestCase):
    """The operator whom the demo plays."""

    def test_patience(self) -> None:
        """He does not wait for ever for a result that a misbehaving backend never has."""
        clock, said = Clock(), StringIO()
        operator = Operator(clock, Screen(said, closed=lambda: self.fail("closed")))
        cancelled: list[object] = []
        self.patch(operator._backend, "send_command", lambda *_: "c-1")
        self.patch(operator._backend, "when_result", lambda _: Deferred(cancelled.append))
        waiting = Deferred.fromCoroutine(operator._command(0))
        clock.advance(29.9)
        self.assertNoResult(waiting)
        clock.advance(0.1)
        self.successResultOf(waiting)
        self.assertRegex(
            said.getvalue(), r"backend +sends command c-1: ping\n.* backend +has no result of c-1 after 30 s"
        )
        self.assertEqual((len(cancelled), clock.getDelayedCalls()), (1, []))

    def test_nobody_connected(self) -> None:
        """A command for an agent that is away is not waited for."""
        said = StringIO()
        operator = Operator(Clock(), Screen(said, closed=lambda: self.fail("closed")))

        def away(*_: object) -> str:
            raise NotRunning("the agent is away")

        self.patch(operator._backend, "send_command", away)
        self.successResultOf(Deferred.fromCoroutine(operator._command(0)))
        self.assertIn("cannot send a command: the agent is away", said.getvalue())

    def test_defect(self) -> None:
        """What goes wrong is told, and ends the demo; being stopped is nothing that goes wrong."""
        said = StringIO()
        ended: list[object] = []
        operator = Operator(Clock(), Screen(said, closed=lambda: self.fail("closed")))
        self.patch(process, "fail", ended.append)
        operator._failed(Failure(CancelledError()))
        self.assertEqual((said.getvalue(), ended), ("", []))
        operator._failed(Failure(NotRunning("a reason")))
        self.assertRegex(said.getvalue(), r"demo +failed: a reason")
        self.assertEqual(len(ended), 1)
