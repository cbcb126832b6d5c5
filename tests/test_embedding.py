"""A manager inside somebody else's program: as a service, again and again, beside another one, on another reactor."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from twisted.application.service import Application, IService, IServiceCollection, MultiService
from twisted.internet.defer import gatherResults

from commsmgr import config
from commsmgr.errors import ConfigError, NotRunning, SpoolLocked
from commsmgr.messages import Command, Result
from tests.processes import ROOT, ProcessTestCase
from tests.world import MACHINE, TOKEN, Runs, WorldTestCase, nothing_held, quick, reactor, until

EXAMPLE = ROOT / "docs" / "examples" / "embedded_agent.py"


class AsAService(WorldTestCase):
    """In a tree of services, started and stopped as often as its owner likes."""

    async def test_under_an_application(self) -> None:
        """Under an application's MultiService it starts and stops with everything else, in order."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.spool()), handler=Runs())
        application = Application("agent")
        agent = MultiService()
        agent.setServiceParent(IServiceCollection(application))
        manager.setServiceParent(agent)
        self.assertIs(manager, agent.getServiceNamed("commsmgr"))
        IService(application).startService()
        await manager.when_connected()
        await until(lambda: backend.connected(MACHINE))
        await backend.when_result(backend.send_command(MACHINE, "echo"))
        left = backend.when("disconnected")
        await IService(application).stopService()
        self.assertEqual("closed with 1000", (await left).note)
        self.assertFalse(manager.status().running)

    async def test_added_to_and_taken_from_a_running_parent(self) -> None:
        """A parent that runs already starts it, and taking it away stops it."""
        backend = await self.backend()
        agent = MultiService()
        agent.startService()
        manager = self.manager(quick(backend, self.spool()))
        manager.setServiceParent(agent)
        await manager.when_connected()
        await manager.disownServiceParent()
        self.assertFalse(manager.status().running)
        await agent.stopService()

    async def test_again_and_again(self) -> None:
        """After ``stopService`` it starts again, on the same spool and registry, and without waiting in between."""
        backend = await self.backend()
        registry = CollectorRegistry()
        manager = self.manager(quick(backend, self.spool()), handler=(runs := Runs()), registry=registry)
        ids = []
        for _ in range(3):
            await manager.connect()
            await until(lambda: backend.connected(MACHINE))
            ids.append(backend.send_command(MACHINE, "echo"))
            await backend.when_result(ids[-1])
            await manager.disconnect()
            self.assertNotIn(b"commsmgr_", generate_latest(registry))
        self.assert_once_and_in_order(backend, runs, ids)
        forsaken = manager.connect()
        stopping = manager.disconnect()
        connecting = manager.connect()
        with self.assertRaises(NotRunning):
            await forsaken
        await stopping
        self.assertTrue((await connecting).connected)

    async def test_stopped_before_it_was_started(self) -> None:
        """Stopping at any moment of a start leaves nothing behind."""
        backend = await self.backend()
        for turns in range(6):
            manager = self.manager(quick(backend, self.spool()))
            manager.startService()
            for _ in range(turns):
                await until(lambda: True)
            await manager.stopService()
            self.assertFalse(manager.status().running)

    async def test_two_managers(self) -> None:
        """Two in one process share nothing: each has its own backend, spool, metrics and commands."""
        backends = [await self.backend(), await self.backend()]
        runs = [Runs(), Runs()]
        managers = [
            self.manager(quick(backend, self.spool()), handler=each)
            for backend, each in zip(backends, runs, strict=True)
        ]
        await gatherResults([manager.connect() for manager in managers])
        await until(lambda: all(backend.connected(MACHINE) for backend in backends))
        ids = [[backend.send_command(MACHINE, "echo") for _ in range(3)] for backend in backends]
        for backend, manager, each, wanted in zip(backends, managers, runs, ids, strict=True):
            await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))  # noqa: B023  # run at once
            self.assert_once_and_in_order(backend, each, wanted)
        await managers[0].disconnect()
        self.assertTrue(managers[1].status().connected)

    async def test_two_managers_cannot_share(self) -> None:
        """The second one on the same spool, or on the same registry, is told so and harms nobody."""
        backend = await self.backend()
        directory, registry = self.spool(), CollectorRegistry()
        first = self.manager(quick(backend, directory), registry=registry)
        await first.connect()
        second = self.manager(quick(backend, directory))
        with self.assertRaises(SpoolLocked):
            await second.connect()
        self.assertTrue(any("spool" in problem for problem in second.status().problems))
        third = self.manager(quick(backend, self.spool()), registry=registry)
        with self.assertRaises(ConfigError):
            await third.connect()
        with self.assertRaises(ConfigError):
            await third.connect()
        self.expected.add("manager.start-failed")
        self.assertTrue(first.status().connected)
        self.assertEqual("ok", (await first.send_heartbeat()).status)
        await first.disconnect()
        self.assertTrue((await second.connect()).connected, "it can be started again when the first one is gone")

    async def test_stop_lets_commands_finish(self) -> None:
        """What runs when the manager stops may finish, and its result still goes out."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.spool()), handler=(runs := Runs()))
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        command_id = backend.send_command(MACHINE, "wait")
        await until(lambda: runs.waiting)
        stopping = manager.disconnect()
        reactor.callLater(0.05, runs.release)
        await stopping
        result = backend.result_of(command_id)
        self.assertEqual("success", result.status if result else "")

    async def test_stop_has_a_deadline(self) -> None:
        """A command that does not end, and a backend that says nothing, hold the stop up no longer than allowed."""
        backend = await self.backend()
        manager = self.manager(quick(backend, directory := self.spool(), stop_deadline=0.3), handler=(runs := Runs()))
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        command_id = backend.send_command(MACHINE, "wait")
        await until(lambda: runs.waiting)
        backend.faults.inject("blackhole")
        began = reactor.seconds()
        await manager.disconnect()
        self.assertLess(reactor.seconds() - began, 0.8)
        backend.faults.clear()
        again = self.manager(quick(backend, directory), handler=Runs())
        await again.connect()
        self.assertEqual("interrupted", (await backend.when_result(command_id)).status)


class TheExample(ProcessTestCase):
    """``docs/examples/embedded_agent.py``, as a process and as a module."""

    async def test_as_a_process(self) -> None:
        """It connects, runs a command of its own, rejects others, and ends with 0 at SIGTERM."""
        url = await self.backend_here()
        agent = self.python(EXAMPLE, url, str(self.directory / "spool"), AGENT_TOKEN=TOKEN)
        machine = (await agent.line("connected as (.+)"))[1]
        outcomes = {}
        for kind in ("disk", "reboot"):
            status, answer = await self.fetch(f"{url}/api/commands", {"machine_id": machine, "type": kind})
            self.assertEqual(201, status, answer)
            outcomes[kind] = await self.result(url, msgspec.json.decode(answer)["id"])
        self.assertIn("bytes are free on /", outcomes["disk"]["output"])
        self.assertEqual("rejected", outcomes["reboot"]["status"])
        self.assertEqual(0, await agent.end(signal.SIGTERM), agent.text)
        self.assertEqual(1, len(agent.lines), agent.text)

    def test_as_a_module(self) -> None:
        """It can be imported without doing anything, and is small."""
        spec = importlib.util.spec_from_file_location("embedded_agent", EXAMPLE)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.assertTrue(callable(module.make_agent))
        self.assertLess(len(EXAMPLE.read_text().splitlines()), 60)


ON_ASYNCIO = f"""
import asyncio, sys, tempfile, time
from random import Random
from twisted.internet import asyncioreactor
asyncioreactor.install(asyncio.new_event_loop())
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from commsmgr import Manager
from commsmgr.backend.service import ReferenceBackend
from tests.world import quick

async def slow(command):
    await asyncio.sleep(0.01)
    return command.success("slept")

def handler(command):
    return asyncio.ensure_future(slow(command))

async def main():
    backend = ReferenceBackend(reactor, token="{TOKEN}", wall=time.time, random=Random(1))
    await backend.startService()
    with tempfile.TemporaryDirectory() as directory:
        manager = Manager(quick(backend, directory), reactor=reactor, handler=handler)
        await manager.connect()
        while not backend.connected("{MACHINE}"):
            await task.deferLater(reactor, 0.01)
        result = await backend.when_result(backend.send_command("{MACHINE}", "sleep"))
        answer = await manager.send_heartbeat()
        print(type(reactor).__name__, result.status, result.output, answer.status)
        await manager.disconnect()
    await backend.stopService()

task.react(lambda _: Deferred.fromCoroutine(main()))
"""


class OnAsyncio(ProcessTestCase):
    """On Twisted's asyncio reactor, which has to be installed before any other."""

    async def test_whole_manager(self) -> None:
        """Everything works there, and a handler may return an asyncio Future."""
        program = self.start(sys.executable, "-c", ON_ASYNCIO)
        self.assertEqual(0, await program.wait(), program.text)
        self.assertEqual(["AsyncioSelectorReactor success slept ok"], program.lines)


DOOMED = """
import sys
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from commsmgr import Manager
from tests.world import quick

def handler(command):
    print("runs", command.id, flush=True)
    if command.type == "quick":
        return command.success("done in time")
    return Deferred()

manager = Manager(quick(sys.argv[1], sys.argv[2]), reactor=reactor, handler=handler)
reactor.callWhenRunning(manager.startService)
reactor.run()
"""


class Killed(WorldTestCase, ProcessTestCase):
    """An agent that is killed in the middle of its work, and its successor on the same spool."""

    timeout = 30

    def setUp(self) -> None:
        WorldTestCase.setUp(self)
        directory = self.directory
        ProcessTestCase.setUp(self)
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)

    async def test_sigkill(self) -> None:
        """
        What had begun is reported as interrupted, or run again where that is safe; what was done is not done again.
        """
        backend = await self.backend()
        directory = str(self.directory / "spool")
        doomed = self.start(sys.executable, "-c", DOOMED, backend.url, directory)
        await backend.when("registered")
        ids = {kind: backend.send_command(MACHINE, kind) for kind in ("quick", "fragile", "safe")}
        for command_id in ids.values():
            await doomed.line(f"runs {command_id}")
        await backend.when_result(ids["quick"])
        self.assertEqual(-signal.SIGKILL, await doomed.end(signal.SIGKILL))

        seen: list[Command] = []

        def handler(command: Command) -> Result:
            seen.append(command)
            return command.success("at the second attempt")

        settings = quick(backend, directory, commands=config.Commands(safe_to_repeat=("safe",)))
        manager = self.manager(settings, handler=handler)
        await manager.connect()
        results = {kind: await backend.when_result(command_id) for kind, command_id in ids.items()}
        self.assertEqual("done in time", results["quick"].output)
        self.assertEqual("interrupted", results["fragile"].status)
        self.assertEqual("at the second attempt", results["safe"].output)
        self.assertEqual([(ids["safe"], True)], [(command.id, command.redelivered) for command in seen])
        await until(lambda: nothing_held(manager))
        self.assertEqual(3, len(backend.ledger.results()))
