"""
``twistd -n commsmgr --demo``: a reference backend on loopback and an agent beside it, and what they say to each other.

Both are the real ones, over real sockets; only the configuration is the demo's: short intervals, a spool in a directory
that is removed at the end, and a command every few seconds.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from random import SystemRandom
from typing import Any, TextIO

from twisted.application.service import Service
from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from commsmgr import config, process
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import CommsError
from commsmgr.handlers import BuiltinHandler
from commsmgr.manager import Manager
from commsmgr.redact import single_line

MACHINE_ID = "demo-agent"
EVERY = 3.0
"""Seconds between two commands."""

PATIENCE = 30.0
"""Seconds that a command's result is waited for: the console has buttons that make the backend misbehave."""

COMMANDS = (
    ("ping", "", ()),
    ("echo", "hello", ("from", "the", "backend")),
    ("uptime", "", ()),
    ("status", "", ()),
    ("reboot", "", ()),
)
"""What the backend asks for in turn; the last one is not among the built-in commands, and is rejected."""

_SHOWN = frozenset(
    (
        "link.registered",
        "link.ended",
        "link.goaway",
        "heartbeat.answered",
        "inventory.accepted",
        "command.received",
        "command.duplicate",
        "command.finished",
        "command.refused",
        "delivery.acknowledged",
        "breaker.changed",
    )
)


@implementer(ILogObserver)
class DemoObserver:
    """Shows the agent's events that tell the story, and everybody's warnings."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say

    def __call__(self, event: LogEvent) -> None:
        warning = event.get("log_level", LogLevel.info) >= LogLevel.warn
        if event.get("event") in _SHOWN or warning:
            who = "backend" if ".backend" in str(event.get("log_namespace")) else "agent"
            self._say(who, formatEvent(event))


class Screen:
    """
    Where the demo's lines go.

    :param closed: called once when nobody reads them any more.
    """

    def __init__(self, stream: TextIO, closed: Callable[[], object]) -> None:
        self._stream = stream
        self._closed = closed
        self._lost = False

    def say(self, who: str, text: str) -> None:
        """Write one line."""
        if self._lost:
            return
        try:
            self._stream.write(f"{time.strftime('%H:%M:%S')}  {who:<8} {single_line(text, 300)}\n")
            self._stream.flush()
        except OSError:
            self._lost = True
            self._closed()


class Demo(Service):
    """
    Starts the backend, then the manager, and plays the operator who sends commands.

    :param reactor: the program's.
    :param screen: where to tell what happens.
    """

    def __init__(self, reactor: Any, screen: Screen) -> None:
        self._reactor = reactor
        self._screen = screen
        self._backend = ReferenceBackend(reactor, token="demo-token", wall=time.time, random=SystemRandom())
        self._manager: Manager | None = None
        self._playing: Deferred[None] | None = None
        self._directory = ""

    def startService(self) -> None:
        """Begin as soon as the reactor runs: a signal that comes before that ends the process without any order."""
        super().startService()
        self._reactor.callWhenRunning(self._begin)

    def _begin(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="commsmgr-demo-")
        self._playing = Deferred.fromCoroutine(self._play()).addErrback(self._failed)

    def stopService(self) -> Deferred[None]:
        """Stop the agent in order, then the backend."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        if self._playing is not None:
            self._playing.cancel()
        if self._manager is not None:
            await self._manager.stopService()
        if self._backend.running:
            await self._backend.stopService()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._screen.say("demo", "stopped")

    async def _play(self) -> None:
        await self._backend.startService()
        self._screen.say("backend", f"listens on {self._backend.url}")
        self._screen.say("demo", f"open the backend's console in a browser: {self._backend.console_url}")
        began = self._reactor.seconds()
        manager = self._manager = Manager(
            _config(self._backend, self._directory),
            reactor=self._reactor,
            handler=BuiltinHandler(status=lambda: manager.status(), uptime=lambda: self._reactor.seconds() - began),
        )
        await manager.connect()
        for number in count():
            await deferLater(self._reactor, EVERY)
            await self._command(number)

    async def _command(self, number: int) -> None:
        kind, command, args = COMMANDS[number % len(COMMANDS)]
        began = self._reactor.seconds()
        try:
            command_id = self._backend.send_command(MACHINE_ID, kind, command, args)
        except CommsError as error:
            self._screen.say("backend", f"cannot send a command: {error}")
            return
        self._screen.say("backend", f"sends command {command_id}: {' '.join((kind, command, *args)).strip()}")
        try:
            result = await self._backend.when_result(command_id).addTimeout(PATIENCE, self._reactor)
        except defer.TimeoutError:
            self._screen.say("backend", f"has no result of {command_id} after {PATIENCE:.0f} s")
            return
        took = (self._reactor.seconds() - began) * 1000
        self._screen.say(
            "backend",
            f"has the result of {command_id} after {took:.0f} ms: {result.status} {result.output or result.error}",
        )

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._screen.say("demo", f"failed: {failure.getErrorMessage()}")
            process.fail(self._reactor)


def _config(backend: ReferenceBackend, directory: str) -> config.Config:
    return config.Config(
        backends=(config.Backend(url=backend.url, websocket_url=backend.websocket_url, name="demo"),),
        machine_id=MACHINE_ID,
        auth=config.Auth(token="demo-token"),
        spool=config.Spool(path=directory),
        heartbeat=config.Heartbeat(interval=5.0, jitter=0.5),
        inventory=config.Inventory(interval=60.0, jitter=1.0),
        observe=config.Observe(listen="127.0.0.1:0", log_level="debug"),
    )


def make_demo(reactor: Any) -> tuple[Service, ILogObserver]:
    """Return the demo as a service, and the observer that shows the log its way."""
    screen = Screen(sys.stdout, closed=lambda: process.fail(reactor))
    return Demo(reactor, screen), DemoObserver(screen.say)
