"""A whole world for tests: the reference backend and a whole manager, on real loopback sockets and a real spool."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from random import Random
from typing import Any

import msgspec
from treq.client import HTTPClient
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.manager import Manager
from commsmgr.messages import Command, JSONObject, Result, SystemHealth

MACHINE = "machine-1"
TOKEN = "secret-token-of-the-tests"

reactor: Any = installed


class StillMachine:
    """A machine that is always the same."""

    def __init__(self) -> None:
        self.data: JSONObject = {"system": {"hostname": "still"}}

    def inventory(self) -> JSONObject:
        return self.data

    def health(self) -> SystemHealth:
        return SystemHealth(cpu_usage_percent=1.0, status="healthy")


class Runs:
    """
    A handler that notes every command it runs. Those of the type ``wait`` have no result before :meth:`release`.

    :ivar commands: in the order in which they were run.
    """

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self._waiting: list[Deferred[None]] = []

    @property
    def waiting(self) -> int:
        """How many commands wait."""
        return len(self._waiting)

    def __call__(self, command: Command) -> Result | Deferred[Result]:
        self.commands.append(command)
        if command.type != "wait":
            return self._result(command)
        waiting: Deferred[None] = Deferred(lambda _: self._waiting.remove(waiting))
        self._waiting.append(waiting)
        return waiting.addCallback(lambda _: self._result(command))

    def release(self) -> None:
        """Let those that wait have their results, in the order in which they came."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.callback(None)

    def _result(self, command: Command) -> Result:
        return command.success(" ".join(("ran", *command.args)))


def quick(backend: ReferenceBackend | str, directory: str, **changes: Any) -> config.Config:
    """
    Return a configuration with short waits and no schedules.

    :param changes: sections by name, each replacing the default one.
    """
    url = backend if isinstance(backend, str) else backend.url
    websocket_url = "" if isinstance(backend, str) else backend.websocket_url
    base = config.Config(
        backends=(config.Backend(url=url, websocket_url=websocket_url, name="main"),),
        machine_id=MACHINE,
        auth=config.Auth(token=TOKEN, refused_delay=1.0),
        reconnect=config.Reconnect(base=0.02, cap=0.1),
        breaker=config.Breaker(failures=1000, open_for=0.1),
        websocket=config.WebSocket(
            connect_timeout=5.0, register_wait=0.1, register_timeout=2.0, ping_interval=5.0, stable_after=0.0
        ),
        heartbeat=config.Heartbeat(interval=0),
        inventory=config.Inventory(interval=0),
        spool=config.Spool(path=directory, durability="normal"),
        stop_deadline=3.0,
    )
    return msgspec.structs.replace(base, **changes)


class WorldTestCase(TestCase):
    """
    Makes backends and managers, and sees that they are gone at the end.

    :ivar expected: names of log events of the level error and above that belong to the test; any other one fails it.
    """

    timeout = 8

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="commsmgr-test-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.events: list[LogEvent] = []
        self.expected: set[str] = set()
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(self._nothing_unexpected)

    def _nothing_unexpected(self) -> None:
        globalLogPublisher.removeObserver(self.events.append)
        errors = [
            event
            for event in self.logged()
            if event["log_level"] >= LogLevel.error and event.get("event") not in self.expected
        ]
        self.assertEqual([], list(map(formatEvent, errors)), "logged as errors")

    def logged(self, name: str = "") -> list[LogEvent]:
        """Return what commsmgr has logged in this test so far; with ``name``, the events of that name."""
        return [
            event
            for event in self.events
            if str(event.get("log_namespace")).startswith("commsmgr.") and name in ("", event.get("event"))
        ]

    def spool(self) -> str:
        """Return a directory for one more spool."""
        return tempfile.mkdtemp(dir=self.directory)

    async def backend(self, **parameters: Any) -> ReferenceBackend:
        """Return a backend that listens."""
        parameters.setdefault("token", TOKEN)
        backend = ReferenceBackend(reactor, wall=time.time, random=Random(1), **parameters)
        self.addCleanup(lambda: backend.stopService() if backend.running else None)
        await backend.startService()
        return backend

    def manager(self, settings: config.Config, **parameters: Any) -> Manager:
        """Return a manager that is not started yet."""
        parameters.setdefault("machine", StillMachine())
        parameters.setdefault("random", Random(2))
        manager = Manager(settings, reactor=reactor, **parameters)
        self.addCleanup(manager.stopService)
        return manager

    async def fetch(self, url: str) -> tuple[int, str]:
        """Return the status and the body of what is at ``url``."""
        response = await HTTPClient(Agent(reactor)).get(url, timeout=5)
        return response.code, await response.text()

    def assert_once_and_in_order(
        self, backend: ReferenceBackend, runs: Runs, ids: Iterable[str], note: str = ""
    ) -> None:
        """Each of the commands was run once, and has one result, which came in the order of the results' making."""
        wanted = dict.fromkeys(ids, 1)
        results = backend.ledger.results()
        self.assertEqual(wanted, Counter(command.id for command in runs.commands), f"{note}: runs")
        self.assertEqual(wanted, Counter(result.command_id for result in results), f"{note}: results")
        # The ids sort by the time they were made.
        self.assertEqual(sorted(result.id for result in results), [result.id for result in results], f"{note}: order")


def nothing_held(manager: Manager) -> bool:
    """Whether the manager's spool is empty, dead letters included."""
    queue = manager.status().queue
    return not (queue.events or queue.states or queue.open_commands or queue.dead_letters)


def pause(seconds: float) -> Deferred[None]:
    """Let time pass."""
    return deferLater(reactor, seconds, lambda: None)


async def together(*stories: Coroutine[Deferred[Any], Any, Any]) -> None:
    """Run coroutines side by side; when one fails the others are cancelled, and its error is raised."""
    running = [Deferred.fromCoroutine(story) for story in stories]
    try:
        await gatherResults(running, consumeErrors=True)
    except FirstError as first:
        for story in running:
            story.addErrback(lambda failure: None).cancel()
        first.subFailure.raiseException()


def until(condition: Callable[[], object], clock: IReactorTime = reactor, *, every: float = 0.005) -> Deferred[None]:
    """Fire as soon as ``condition`` is true; for what cannot be waited for otherwise. The test's timeout bounds it."""
    done: Deferred[None] = Deferred(lambda _: call[0].cancel())

    def look() -> None:
        if condition():
            done.callback(None)
        else:
            call[0] = clock.callLater(every, look)

    call = [clock.callLater(0, look)]
    return done
