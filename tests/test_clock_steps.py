"""
The clock is set, and the process is stopped and continued: agents in processes of their own, on real sockets.

Four at once, as the programs and the reactors are two each: ``twistd commsmgr`` and somebody else's program that embeds
a manager, on the epoll and on the asyncio reactor. The wall clock that they see is set by libfaketime, while they run;
``CLOCK_MONOTONIC`` and ``CLOCK_BOOTTIME`` stay as they are, as they do when a real clock is set.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from twisted.internet.defer import Deferred

from commsmgr.backend.events import BackendEvent
from commsmgr.backend.service import ReferenceBackend
from tests.processes import ROOT, ProcessTestCase, Program, pause, reactor, together

WITHIN = 2.0
"""Seconds after a step in which an agent must have gone on."""

BEAT = 0.5
"""Seconds between two heartbeats."""


def faketime() -> str:
    """Return where libfaketime is."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        raise AssertionError("tests of clock steps need libfaketime: install the Debian package faketime")
    return str(found[0])


class Agent:
    """
    One agent, and what the backend sees of it.

    :ivar beats: when its heartbeats came, by this process's clock.
    :ivar lost: how often its connection ended.
    """

    def __init__(self, name: str, program: Program, clock: Path, backend: ReferenceBackend) -> None:
        self.name = name
        self.beats: list[float] = []
        self.lost = 0
        self._program = program
        self._clock = clock
        self._backend = backend
        backend.subscribe(self._see)

    def _see(self, event: BackendEvent) -> None:
        if event.machine_id == self.name:
            self.beats += [time.monotonic()] if event.kind == "heartbeat" else []
            self.lost += event.kind == "disconnected"

    def step(self, offset: int) -> None:
        """Set its clock this many seconds ahead of the real one."""
        new = self._clock.with_suffix(".new")
        new.write_text(f"{offset:+d}\n")
        new.replace(self._clock)

    @property
    def ahead(self) -> float:
        """By how many seconds the clock is ahead that its last heartbeat was written by."""
        (body,) = (row.heartbeat for row in self._backend.ledger.machines() if row.machine_id == self.name)
        assert body is not None
        return datetime.fromisoformat(json.loads(body)["timestamp"]).timestamp() - time.time()

    async def steady(self) -> None:
        """Return when it is connected, and its heartbeats come at their pace."""
        while not (self._backend.connected(self.name) and len(self.beats) > 4 and self._regular(self.beats[-4:])):
            await pause(0.05)

    def _regular(self, beats: list[float]) -> bool:
        return all(abs(later - earlier - BEAT) < BEAT / 2 for earlier, later in pairwise(beats))

    async def goes_on(self, what: str) -> None:
        """It sends a heartbeat and runs a command, both soon enough, and then goes on at its pace."""
        began = time.monotonic()
        seen = len(self.beats)

        def late(*_: object) -> None:
            raise AssertionError(f"{self.name} does not go on after {what}:\n{self._program.text[-3000:]}")

        await Deferred.fromCoroutine(self._goes_on(seen)).addTimeout(WITHIN, reactor, late)
        await pause(began + WITHIN - time.monotonic())
        # As many as there is time for, and one that was due anyway: nothing is made up for.
        assert len(self.beats) - seen <= WITHIN / BEAT + 2, f"{self.name}, a storm after {what}: {self.beats[seen:]}"

    async def _goes_on(self, seen: int) -> None:
        while not self._backend.connected(self.name):
            await pause(0.01)
        command = self._backend.send_command(self.name, "ping")
        while len(self.beats) == seen:
            await pause(0.01)
        result = await self._backend.when_result(command)
        assert result.output == "pong", result


class ClockSteps(ProcessTestCase):
    """Nothing stands still, nothing bursts, no connection is given up."""

    async def agent(self, name: str, start: Callable[..., Program], backend: ReferenceBackend) -> Agent:
        clock = self.directory / f"{name}.clock"
        clock.write_text("+0\n")
        config = self.configuration(
            backend.url,
            name=f"{name}.toml",
            machine_id=name,
            # How fast the disk is, is not the question here.
            spool={"path": str(self.directory / name), "durability": "normal"},
            heartbeat={"interval": BEAT, "jitter": 0.1},
            websocket={"ping_interval": 1.0, "ping_timeout": 1.0},
        )
        program = start(
            config,
            LD_PRELOAD=faketime(),
            FAKETIME_TIMESTAMP_FILE=str(clock),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            # Else Python's wait for its lock, which goes by CLOCK_MONOTONIC, ends at once, and threads spin for it.
            FAKETIME_FORCE_MONOTONIC_FIX="0",
            NO_FAKE_STAT="1",
        )
        agent = Agent(name, program, clock, backend)
        await agent.steady()
        return agent

    async def agents(self) -> tuple[ReferenceBackend, list[Agent]]:
        """Return a backend, and one agent of each kind that is connected with it."""
        backend = ReferenceBackend(reactor, wall=time.time, random=Random(1))
        await backend.startService()
        self.addCleanup(backend.stopService)

        def twistd(kind: str) -> Callable[..., Program]:
            return lambda config, **env: self.twistd("-n", "-r", kind, "commsmgr", "--config", config, **env)

        def embedded(kind: str) -> Callable[..., Program]:
            return lambda config, **env: self.python(ROOT / "tests" / "clock_agent.py", kind, config, **env)

        agents = [
            self.agent(f"{start.__name__}-{kind}", start(kind), backend)
            for start in (twistd, embedded)
            for kind in ("epoll", "asyncio")
        ]
        return backend, await together(*agents)

    async def test_steps_and_stops(self) -> None:
        """After a step ahead or back, and after it was stopped for a while, each agent goes on within two seconds."""
        backend, agents = await self.agents()
        for offset, what in ((3600, "a step of 1 h ahead"), (-3600, "a step of 2 h back"), (0, "a step of 1 h ahead")):
            for agent in agents:
                agent.step(offset)
            await together(*(agent.goes_on(what) for agent in agents))
            for agent in agents:
                self.assertLess(abs(offset - agent.ahead), 30, f"{agent.name}: its clock was not set")
        self.assertEqual([0, 0, 0, 0], [agent.lost for agent in agents], "a step of the clock cost a connection")

        # Longer than the keep-alive's whole patience.
        await self.stopped(agents, 5.0)
        await together(*(agent.goes_on("being stopped") for agent in agents))
        self.assertEqual([0, 0, 0, 0], [agent.lost for agent in agents], "a stop cost a living connection")

        await self.stopped(agents, 1.5, backend.crash)
        await together(*(agent.goes_on("being stopped, its connection gone") for agent in agents))
        self.assertEqual([1, 1, 1, 1], [agent.lost for agent in agents])

    async def stopped(self, agents: list[Agent], seconds: float, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Let nobody run for a while, as if the machine slept."""
        processes = [agent._program for agent in agents]
        for process in processes:
            process.send(signal.SIGSTOP)
        await pause(seconds)
        meanwhile()
        for process in processes:
            process.send(signal.SIGCONT)
