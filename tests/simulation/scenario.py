"""
A world from its first moment to its last, and what is to be said of it.

Theory of operation
-------------------
A seed makes a :class:`~tests.simulation.setting.Setting`, a plan of faults, and every other random number, each
consumer with a generator of its own, so that one that draws more than before changes nothing for the others.

1. *Bad weather.* Agents and the backend work, and the plan does its worst.
2. *Healing.* All that is down is started, all that is broken is mended, and from this moment on the agents have a
   promised time to be in touch again.
3. *Settling.* Time goes on until nothing is waiting anywhere. Then some finished commands are sent once more, and one
   new one, and time goes on until these are answered too.
4. *The end.* Agents and backend stop in order, and leave nothing behind.
5. *Judgement.* The oracles look at the history and at what is on the disks.

Everything in here is the real thing but for the reactor, the network, the disk's behaviour and what time it is.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from msgspec import Struct
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher

from tests.faulty_vfs import Disk, FaultyVFS
from tests.simulation.agent import Agent
from tests.simulation.backend import Backend, Front
from tests.simulation.clock import Owner, VirtualClock
from tests.simulation.faults import Mischief, plan
from tests.simulation.history import History
from tests.simulation.network import Network, Path
from tests.simulation.oracles import Ends, judge
from tests.simulation.process import STOPPED, Process, adapt
from tests.simulation.setting import FRONTS, Setting, promised
from tests.simulation.workload import Commander

SETTLING = 240.0
"""Virtual seconds in which everything has to be settled after healing."""

LONGEST = 130.0
"""Virtual seconds that the last fault may take beyond the end of the bad weather."""

BACK = 20.0
"""Virtual seconds in which an agent goes from one backend to another."""

LOOK = 0.5
"""Virtual seconds between two looks at how things stand."""

EXPECTED = frozenset(("command.failed",))
"""Errors in the log that belong to what agents are told to do."""


class Outcome(Struct):
    """
    What became of one seed.

    :ivar figures: counts for the summary, by name.
    :ivar cpu: seconds.
    """

    seed: int
    setting: str
    plan: list[str]
    violations: list[str]
    history: str
    figures: dict[str, float]
    cpu: float = 0.0


class Clock(VirtualClock):
    """
    The clock, which also knows whose turn it is.

    :ivar running: the process in whose call the world is; None between calls and in the network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: Owner | None = None

    def guard(self, owner: Owner | None, function: Callable[..., object], *args: object, **kw: object) -> None:
        before, self.running = self.running, owner
        try:
            super().guard(owner, function, *args, **kw)
        finally:
            self.running = before


class World:
    """
    Everything that there is.

    :ivar busy: whether agents and backend still make up things to do.
    :ivar arrived: digests of results by id, as they came to the backend the last time.
    :ivar token: what the agents take for the token; ``backend_token`` is what the backend takes for it.
    :ivar graveyard: what must not be collected before the end.
    """

    def __init__(self, seed: int, vfs: FaultyVFS, directory: str) -> None:
        self.seed = seed
        self.vfs = vfs
        self.directory = directory
        self.setting = Setting.draw(self.random("setting"))
        self.plan = plan(self.setting, self.random("plan"))
        self.clock = Clock()
        self.history = History(self.clock.seconds)
        self.network = Network(self.clock, self.random("network"), self._sent)
        self.busy = True
        self.arrived: dict[str, str] = {}
        self.token = self.backend_token = "token-0"
        self.graveyard: list[object] = []
        self.descriptors: list[int] = []
        self.nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._tags: Counter[str] = Counter()
        self._touched: dict[str, bool] = {}
        self._usual: dict[str, tuple[float, float, float | None]] = {}
        self._watched: dict[str, tuple[int, Callable[[], object]]] = {}
        self.backend = Backend(self)
        self.fronts = [Front(self, name) for name in FRONTS] if self.setting.fronts else []
        self.agents = [Agent(self, name) for name in self.setting.agents]
        self.processes: list[Process] = [self.backend, *self.fronts, *self.agents]
        for process in self.processes:
            self.network.names[f"{process.name}.example"] = self.network.address(process.name)

    # -- for those who live here ------------------------------------------------------------------------------------

    def random(self, name: str) -> Random:
        """Return random numbers that depend on the seed and the name alone."""
        return Random(f"{self.seed}/{name}")

    def tag(self, kind: str) -> str:
        """Return a name that nothing else has."""
        self._tags[kind] += 1
        return f"{kind}-{self._tags[kind]}"

    def process(self, name: str) -> Process:
        """Return the process on a host."""
        return next(process for process in self.processes if process.name == name)

    def agent(self, name: str) -> Agent:
        """Return an agent."""
        return next(agent for agent in self.agents if agent.name == name)

    def path(self, ends: str) -> Path:
        """Return the path between two hosts, given with a slash between them."""
        path = self.network.path(*ends.split("/"))
        self._usual.setdefault(ends, (path.latency, path.jitter, path.bandwidth))
        return path

    def as_usual(self, ends: str) -> None:
        """Let a path be as wide and as short as it always was."""
        path = self.path(ends)
        path.latency, path.jitter, path.bandwidth = self._usual[ends]

    # -- for faults -------------------------------------------------------------------------------------------------

    def cut_all(self, host: str) -> None:
        """Cut whatever is connected to a host."""
        for process in self.processes:
            if process.name != host:
                self.network.path(process.name, host).cut()

    def power(self, process: Process, wanted: bool) -> bool:
        """Say whether a death may be a power cut: an agent that was not promised to survive one has none."""
        return wanted and (self.setting.durability == "full" or not isinstance(process, Agent))

    def used(self, disk: Disk) -> int:
        """Return the bytes that a disk holds."""
        return sum(entry.stat().st_size for entry in os.scandir(disk.root))

    def set_backend_token(self, token: str) -> None:
        """Let the backend want another token."""
        self.backend_token = token
        if self.backend.alive:
            self.backend.service.token = token

    def flood(self, agent: Agent, events: int) -> None:
        """Let an agent have much to say."""
        if agent.alive and agent.manager.status().running:
            random = self.random(f"flood/{self.clock.seconds()}/{agent.name}")
            for _ in range(events):
                agent.for_itself(agent.report(random))

    def after_sending(self, process: Process, packets: int, act: Callable[[], object]) -> None:
        """Act when a process has sent so many packets from now on; 0: do not."""
        self._watched.pop(process.name, None)
        if packets:
            self._watched[process.name] = (packets, act)

    def _sent(self, what: str, who: str, size: int) -> None:
        self.history.note("network", what, who, bytes=size)
        if what == "sent" and self._watched:
            host = who.partition(":")[0]
            packets, act = self._watched.pop(host, (0, None))
            if act is not None and packets == 1:
                self.clock.callLater(0, act)
            elif act is not None:
                self._watched[host] = (packets - 1, act)

    # -- from the first moment to the last --------------------------------------------------------------------------

    def run(self) -> None:
        """Let it all happen."""
        self._every(LOOK, self._look)
        for process in self.processes:
            # An agent may well be there before its backend.
            self.clock.callLater(self.random(f"{process.name}/start").uniform(0.0, 3.0), process.start)
        Commander(self, self.random("commands"))
        mischief = Mischief(self, self.plan)
        self.clock.run_until(self.setting.seconds)
        self.clock.run_while(lambda: bool(mischief.under_way), LONGEST)
        self._heal()
        if self._settle():
            self._try_out()
            if self._settle():
                self.history.note("world", "settled")
        self._end()

    def _heal(self) -> None:
        self.busy = False
        self._watched.clear()
        if self.backend.alive:
            self.backend.service.faults.clear()
        for process in self.processes:
            process.crash_in(0, power=False)
            process.fail("")
            process.disk.capacity = None
        self.token = self.backend_token
        self.clock.run_while(lambda: any(process.stopping for process in self.processes), 10.0)
        for process in self.processes:
            process.start()
        self._touched.clear()
        for agent in self.agents:
            self.history.note("world", "healed", agent.name, within=promised(agent.config) + LOOK)

    def _settle(self) -> bool:
        calm = self.clock.run_while(
            lambda: (
                not all(
                    agent.idle
                    and self._in_touch(agent)
                    and self.backend.has_nothing_for(agent.name)
                    and self.backend.has_latest_of(agent.name)
                    for agent in self.agents
                )
            ),
            SETTLING,
        )
        # Whatever is acknowledged by now may still come again.
        self.clock.run_until(self.clock.seconds() + 2.0)
        return calm

    def _try_out(self) -> None:
        # What a full agent refused it will gladly take now; here it is about what was done.
        done = (record for record in self.history.all("stored") if record.facts["status"] != "rejected")
        answered = {record.facts["command"] for record in done}
        # One may just be on its way back to the backend that it likes best.
        self.clock.run_while(lambda: not all(map(self._in_touch, self.agents)), BACK)
        for agent in self.agents:
            if self.setting.websocket and self.setting.dialect != "quirks":
                given = [record for record in self.history.all("gave") if record.facts["agent"] == agent.name]
                for record in [record for record in given if record.facts["id"] in answered][-3:]:
                    name = str(record.facts["id"])
                    self.history.note("world", "gave-again", record.subject, id=name)
                    self.backend.give_again(agent.name, name)
            certain = self.setting.dialect != "quirks"
            self.backend.give(agent.name, "quick", self.tag("command"), certain=certain)
        self.clock.run_until(self.clock.seconds() + 10.0)

    def _end(self) -> None:
        self.history.note("world", "ending")
        for processes in (self.agents, self.fronts, [self.backend]):
            self._end_all(processes)

    def _end_all(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.stop()
        self.clock.run_while(lambda: any(process.alive for process in processes), 10.0 + STOPPED)
        for process in processes:
            if process.alive:
                self.history.note(process.name, "leftover", "it did not stop")
                process.kill()

    def _in_touch(self, agent: Agent) -> bool:
        if not agent.alive or not self.backend.alive:
            return False
        connected = agent.manager.status().connected
        # One with quirks forgets agents that it is connected with, and they have no way to know.
        asked = self.setting.websocket and self.setting.dialect != "quirks"
        return connected and (not asked or self.backend.connected(agent.name))

    def _look(self) -> None:
        for agent in self.agents:
            touched = self._in_touch(agent)
            # Once healed is said, whoever is in touch says so too.
            if touched != self._touched.get(agent.name):
                self.history.note(agent.name, "in-touch" if touched else "apart")
                self._touched[agent.name] = touched

    def _every(self, seconds: float, act: Callable[[], None]) -> None:
        act()
        self.clock.callLater(seconds, self._every, seconds, act)

    # -- afterwards -------------------------------------------------------------------------------------------------

    def complaints(self) -> None:
        """Note what escaped."""
        for failure in self.clock.failures:
            says = failure.getErrorMessage()
            self.history.note(failure.owner or "network", "complaint", failure.type.__name__, says=says)
        for process in self.processes:
            for error in process.disk.errors:
                self.history.note(process.name, "complaint", "disk", says=repr(error))

    def logged(self, event: LogEvent) -> None:
        """Something was logged. Nobody hears what the dead say."""
        owner = self.clock.running
        if owner is not None and not owner.alive:
            return
        if owner is None and stumbled(event):
            return
        name = owner.name if owner is not None else "world"
        if event["log_level"] >= LogLevel.error and event.get("event") not in EXPECTED:
            self.history.note(name, "complaint", str(event.get("event", "")), says=_told(event))
        if str(event.get("log_namespace")).startswith("commsmgr.") and owner is not None:
            for agent in self.agents:
                if agent.name == name:
                    agent.logged(event)

    def figures(self) -> dict[str, float]:
        """Return counts for the summary."""
        words = Counter(record.what for record in self.history.records)
        kinds = Counter(f"fault {fault.kind}" for fault in self.plan)
        deaths = Counter(bool(record.facts["power"]) for record in self.history.all("died"))
        return {
            "virtual hours": self.clock.seconds() / 3600,
            "commands": words["gave"],
            "runs": words["ran"],
            "results": words["stored"],
            "inventories": words["inventory"],
            "nacks for good": sum(not record.facts["later"] for record in self.history.all("declined")),
            "losses told": sum(int(record.facts["count"]) for record in self.history.all("losses")),
            "registrations": words["registered"],
            "kills": deaths[False],
            "power cuts": deaths[True],
            "orderly stops": words["stopped"],
            "packets": words["sent"],
            **kinds,
        }


def stumbled(event: LogEvent) -> bool:
    """
    Say whether the dead stumbled when they were collected: a coroutine that was ended woke another one that was, too.

    Which one is first is up to the collector. An error that nobody looked at is two events, of which the second has
    the error; the first is no news.
    """
    if (failure := event.get("log_failure")) is None:
        return event.get("log_format") == "Unhandled error in Deferred:"
    return failure.check(RuntimeError) is not None and "already awaited coroutine" in failure.getErrorMessage()


def _told(event: LogEvent) -> str:
    """Return an event as one line; of a failure what it is and where it was raised."""
    told = formatEvent(event)
    if (failure := event.get("log_failure")) is not None:
        where = f" in {failure.frames[-1][0]}" if failure.frames else ""
        told = f"{told} {failure.type.__name__}: {failure.getErrorMessage()}{where}"
    return " ".join(told.split())


def run(seed: int) -> Outcome:
    """Run one seed from beginning to end."""
    began = time.process_time()
    collecting = gc.isenabled()
    gc.disable()
    scratch = "/dev/shm" if os.path.isdir("/dev/shm") else None
    directory = tempfile.mkdtemp(prefix="simulation-", dir=scratch)
    vfs = FaultyVFS()
    vfs.install()
    world = World(seed, vfs, directory)
    undo = adapt(world)
    globalLogPublisher.addObserver(world.logged)
    try:
        ends: Ends = {}
        try:
            world.run()
            gc.collect()  # for errors that nobody looked at
            ends = {agent.name: agent.found() for agent in world.agents}
        except Exception as error:
            # Whatever it was, others may run on, and this one is to be looked at.
            world.history.note("world", "complaint", type(error).__name__, says=str(error))
        world.complaints()
        outcome = Outcome(
            seed=seed,
            setting=str(world.setting),
            plan=[str(fault) for fault in world.plan],
            violations=judge(world.history, ends),
            history=world.history.text(),
            figures=world.figures(),
        )
    finally:
        globalLogPublisher.removeObserver(world.logged)
        undo()
        for process in world.processes:
            process.disk.close()
        descriptors = [world.nothing, *world.descriptors]
        del world, process
        silenced, sys.unraisablehook = (
            sys.unraisablehook,
            lambda _: None,
        )  # the dead may stumble when they are collected
        while gc.collect():
            pass  # a coroutine that is ended leaves more behind, which the next world must not hear of
        sys.unraisablehook = silenced
        for descriptor in descriptors:
            os.close(descriptor)
        vfs.uninstall()
        shutil.rmtree(directory)
        if collecting:
            gc.enable()
    outcome.cpu = time.process_time() - began
    return outcome
