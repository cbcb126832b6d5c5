"""
What tests of whole processes share: start one, read its lines as they come, end it, and see that nothing is left.

Every process, and what it starts in turn, bears a mark in its environment. At the end of a test none with the test's
mark may be left, daemons included; what is left all the same is killed, and the test fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from treq.client import HTTPClient
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent

from commsmgr.backend.service import ReferenceBackend

ROOT = Path(__file__).resolve().parent.parent
MARK = "COMMSMGR_TEST_MARK"
PATIENCE = 20.0
"""Seconds for anything to happen; the machine may be busy."""

reactor: Any = installed

# twistd's script is not on the path of every environment that can run the tests. It ends itself by a signal, without
# the clean-up in which a measurement of coverage would be saved.
_TWISTD = """
import sys
from twisted.application import app
from twisted.scripts.twistd import run
coverage = sys.modules.get("coverage")
running = coverage and coverage.Coverage.current()
if running:
    end = app._exitWithSignal
    app._exitWithSignal = lambda number: (running.stop(), running.save(), end(number))
sys.argv[0] = "twistd"
run()
"""


class Program(ProcessProtocol):
    """
    A running process.

    :ivar lines: what it wrote to standard output and error, in the order of arrival.
    :ivar ended: fires with its exit code, or with minus the number of the signal that ended it.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ended: Deferred[int] = Deferred()
        self.code: int | None = None
        self._rest = {1: b"", 2: b""}
        self._wanted: list[tuple[re.Pattern[str], Deferred[re.Match[str]]]] = []

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)

    def line(self, pattern: str) -> Deferred[re.Match[str]]:
        """Wait for a line that matches, which may have come already; fails when the process ends without one."""
        wanted = re.compile(pattern)
        found: Deferred[re.Match[str]] = Deferred()
        for line in self.lines:
            if match := wanted.search(line):
                found.callback(match)
                return found
        if self.code is not None:
            found.errback(AssertionError(f"no line {pattern!r} in\n{self.text}"))
            return found
        self._wanted.append((wanted, found))
        return found.addTimeout(
            PATIENCE, reactor, lambda *_: Failure(AssertionError(f"no line {pattern!r} in\n{self.text}"))
        )

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            os.kill(self.transport.pid, number)

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.send(number)
        return await self.wait()

    async def wait(self) -> int:
        """Wait for the end, return the exit code."""
        if self.code is None:
            await self.ended.addTimeout(PATIENCE, reactor)
        assert self.code is not None
        return self.code

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        *lines, self._rest[childFD] = (self._rest[childFD] + data).split(b"\n")
        for line in lines:
            self._got(line.decode("utf-8", "backslashreplace"))

    def _got(self, line: str) -> None:
        self.lines.append(line)
        for wanted in list(self._wanted):
            if match := wanted[0].search(line):
                self._wanted.remove(wanted)
                wanted[1].callback(match)

    def processEnded(self, reason: Failure) -> None:
        for rest in self._rest.values():
            if rest:
                self._got(rest.decode("utf-8", "backslashreplace"))
        value: Any = reason.value
        if isinstance(value, ProcessDone):
            self.code = 0
        else:
            self.code = -value.signal if value.signal is not None else value.exitCode
        for pattern, found in self._wanted:
            found.errback(AssertionError(f"ended with {self.code} without {pattern.pattern!r}:\n{self.text}"))
        self._wanted = []
        self.ended.callback(self.code)


class ProcessTestCase(TestCase):
    """Starts processes in a directory of its own, ``self.directory``, and sees that all of them are gone at the end."""

    timeout = 60

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="commsmgr-test-"))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        # An own directory for temporary files shows what is left of those.
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir(mode=0o1777)
        self.mark = f"{os.getpid()}-{self.id()}"
        self.addCleanup(self._nothing_left)

    def start(self, *command: str, cwd: Path | None = None, **environment: str) -> Program:
        """Start ``command``; it is killed at the end of the test if need be."""
        program = Program()
        given = {name: value for name, value in os.environ.items() if not name.startswith("COMMSMGR_")}
        given |= {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            MARK: self.mark,
            **environment,
        }
        reactor.spawnProcess(program, command[0], command, env=given, path=str(cwd or self.directory))
        self.addCleanup(program.end, signal.SIGKILL)
        return program

    def python(self, script: Path, *arguments: str, **environment: str) -> Program:
        """Start the running interpreter on ``script``."""
        return self.start(sys.executable, str(script), *arguments, **environment)

    def twistd(self, *arguments: str, cwd: Path | None = None, **environment: str) -> Program:
        """Start twistd; without ``--pidfile`` it has none, so that many can run in one directory."""
        if not any(argument.startswith("--pidfile") for argument in arguments):
            arguments = ("--pidfile=", *arguments)
        return self.start(sys.executable, "-c", _TWISTD, *arguments, cwd=cwd, **environment)

    async def backend(self, *arguments: str, listen: str = "127.0.0.1:0") -> tuple[Program, str]:
        """Start the reference backend; return it and its URL."""
        program = self.twistd("-n", "commsmgr-backend", f"--listen={listen}", *arguments)
        return program, (await program.line(r"reference backend .* at (http\S+)"))[1]

    async def backend_here(self) -> str:
        """Start a reference backend in this process, which is quicker; return its URL."""
        backend = ReferenceBackend(reactor, wall=time.time, random=Random(1))
        await backend.startService()
        self.addCleanup(backend.stopService)
        return backend.url

    def configuration(self, url: str, *, name: str = "agent.toml", **sections: Any) -> str:
        """
        Write a configuration with short waits; return its path.

        :param sections: keys that replace or extend those of each section, with ``machine_id`` and ``stop_deadline`` on
            their own.
        """
        tables: dict[str, dict[str, Any]] = {
            "spool": {"path": str(self.directory / "spool")},
            "reconnect": {"base": 0.05, "cap": 0.2},
            "breaker": {"failures": 1000, "open_for": 0.1},
            "heartbeat": {"interval": 0.3, "jitter": 0.1},
            "inventory": {"interval": 0},
            "observe": {"listen": "127.0.0.1:0"},
        }
        top = {name: sections.pop(name, value) for name, value in (("machine_id", "m-1"), ("stop_deadline", 3.0))}
        for section, keys in sections.items():
            tables[section] = tables.get(section, {}) | keys
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        for table, keys in {"[backends]": {"url": url, "name": "main"}, **tables}.items():
            lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    async def fetch(self, url: str, body: Any = None) -> tuple[int, bytes]:
        """GET ``url``, or POST ``body`` to it as JSON; return status and body."""
        method, headers, data = "GET", {}, None
        if body is not None:
            method, headers, data = "POST", {"Content-Type": "application/json"}, msgspec.json.encode(body)
        client = HTTPClient(Agent(reactor))
        response = await client.request(method, url, headers=headers, data=data, timeout=PATIENCE)
        return response.code, await response.content()

    async def result(self, backend_url: str, command_id: str) -> Any:
        """Wait until the backend has the result of a command."""
        for _ in range(int(PATIENCE / 0.05)):
            status, body = await self.fetch(f"{backend_url}/api/commands/{command_id}")
            assert status == 200, body
            if (result := msgspec.json.decode(body)["result"]) is not None:
                return result
            await pause(0.05)
        raise AssertionError(f"no result of {command_id}")

    def marked(self) -> list[int]:
        """Return the processes that bear the test's mark (where ``/proc`` shows that)."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has just ended, or is somebody else's
                continue
        return found

    async def gone(self, processes: Iterable[int]) -> None:
        """Wait until none of ``processes`` exists."""
        waiting = list(processes)
        for _ in range(int(PATIENCE / 0.02)):
            waiting = [process for process in waiting if _exists(process)]
            if not waiting:
                return
            await pause(0.02)
        raise AssertionError(f"still there: {waiting}")

    async def _nothing_left(self) -> None:
        left = self.marked()
        for process in left:
            os.kill(process, signal.SIGKILL)
        self.assertEqual([], left, "processes were left")


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # what ended and was not waited for by whoever adopted it
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True


def pause(seconds: float) -> Deferred[None]:
    """Let time pass."""
    return deferLater(reactor, seconds, lambda: None)


def together(*waiting: Awaitable[Any]) -> Deferred[Any]:
    """Wait for all of ``waiting``; return their outcomes in order. The first failure fails at once."""

    async def one(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return gatherResults([Deferred.fromCoroutine(one(awaitable)) for awaitable in waiting], consumeErrors=True)
