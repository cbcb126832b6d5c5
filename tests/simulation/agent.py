"""An agent: the real manager in a process that can die, with a handler that writes down what it does."""

from __future__ import annotations

import sqlite3
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import CollectorRegistry
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from commsmgr.errors import AlreadyCompleted, CommsError, NotRunning, SpoolError
from commsmgr.manager import Manager
from commsmgr.messages import Command, JSONObject, Result, ResultBody, SystemHealth
from commsmgr.spool import RESULT_KIND
from commsmgr.spool.files import DATABASE
from commsmgr.spool.totals import TOTALS
from tests.simulation.history import AgentEnd, DeadLetter
from tests.simulation.process import Disks, Process
from tests.simulation.setting import IN_FLIGHT, PENDING, REPEATABLE, agent_config

if TYPE_CHECKING:
    from tests.simulation.scenario import World

EPOCH = 1_800_000_000.0
"""What every wall clock shows when the world begins, give or take its own error."""


SUPERVISED = 3.0
"""Seconds after which a manager that could not start is started again."""


class Token:
    """The bearer token, as a file would give it that somebody else rotates."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get(self) -> Deferred[str]:
        return succeed(self._world.token)

    def refused(self, token: str) -> None:
        pass


class Agent(Process):
    """
    One agent on a machine of its own.

    What must survive the machine's death, such as what its commands did to the world, is kept here.

    :ivar step: seconds by which its wall clock is wrong.
    :ivar highest: the most that was ever held, by what.
    """

    manager: Manager

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.config = agent_config(world.setting, name, self.directory)
        self.step = 0.0
        self.highest: dict[str, int] = {}
        self._stock = 0

    def wall(self) -> float:
        """The time as this machine knows it."""
        return EPOCH + self.world.clock.seconds() + self.step

    # -- life -------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start a manager."""
        reader = self.world.setting.reader
        self._doing: dict[Deferred[object], None] = {}
        self.manager = Manager(
            self.config,
            reactor=self.reactor,
            registry=CollectorRegistry(),
            handler=None if reader else lambda command: Deferred.fromCoroutine(self.run(command)),
            token=Token(self.world),
            machine=self,
            wall=self.wall,
            random=self.random("manager"),
            executor=Disks(self.reactor, self.random("spool")),
            environ={},
        )
        self.note("starting")
        self.manager.startService()
        self.manager.started().addCallbacks(self._started, self._not_started)

    def _started(self, _: object) -> None:
        self.note("started")
        if self.world.setting.reader:
            for _ in range(self.config.commands.concurrency):
                self.for_itself(self._read(self.manager))
        self.for_itself(self._live(self.manager, self.random("life")))

    def _not_started(self, failure: Any) -> None:
        """Give up, as a program does whose supervisor will start it again."""
        if failure.check(NotRunning):
            return
        failure.trap(CommsError)
        # Only a bad disk may keep an agent from starting.
        self.note("failed" if self.ailing else "complaint", type(failure.value).__name__, says=str(failure.value))
        self.kill()
        self.world.clock.callLater(SUPERVISED, self.start)

    def end(self) -> Deferred[None]:
        for deferred in list(self._doing):
            deferred.cancel()
        return self.manager.stopService()

    def remains(self) -> object:
        return self.manager

    def note(self, what: str, subject: str = "", /, **facts: Any) -> None:
        """Write something down."""
        if self.alive:
            self.world.history.note(self.name, what, subject, **facts)

    def for_itself(self, coroutine: Any) -> None:
        """Run a coroutine that ends when the manager does."""
        deferred: Deferred[object] = Deferred.fromCoroutine(coroutine)
        self._doing[deferred] = None

        def over(outcome: Any) -> None:
            self._doing.pop(deferred, None)
            if isinstance(outcome, Failure):
                outcome.trap(NotRunning, CancelledError)

        deferred.addBoth(over)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def run(self, command: Command) -> Result:
        """Do what a command says. Its tag comes first in its arguments, and in what it puts out."""
        tag = command.args[0]
        self.note("ran", tag, key=command.key, redelivered=command.redelivered, repeatable=command.type == REPEATABLE)
        if seconds := command.options.get("seconds"):
            await deferLater(self.reactor, seconds)
        if command.type == "fail":
            raise RuntimeError(f"{tag} was told to fail")
        result = command.success(tag + "." * command.options.get("size", 0))
        if command.type == "self":
            await self._report(self.manager, result, tag, ttl=command.options.get("ttl"))
        return result

    async def _read(self, manager: Manager) -> None:
        channel = manager.commands()
        while True:
            try:
                command = await channel.get()
            except SpoolError:
                await deferLater(self.reactor, 1.0)
                continue
            try:
                result = await self.run(command)
            except RuntimeError as error:
                result = command.error(str(error))
            while not await self._report(manager, result, command.args[0]):
                await deferLater(self.reactor, 1.0)

    async def _report(self, manager: Manager, result: Result, tag: str, ttl: float | None = None) -> bool:
        try:
            message = await manager.send_result(result, ttl=ttl)
        except SpoolError as error:
            self.note("refused", tag, error=type(error).__name__)
            return False
        except AlreadyCompleted:
            return True
        self.note("accepted", tag, id=message)
        return True

    def logged(self, event: LogEvent) -> None:
        """The manager has said something."""
        name = str(event.get("event"))
        if name not in _QUIET:
            self.note("says", name)

    # -- what it does by itself -------------------------------------------------------------------------------------

    async def _live(self, manager: Manager, random: Random) -> None:
        while True:
            await deferLater(self.reactor, random.expovariate(1 / 6.0))
            if not self.world.busy:
                return
            if random.random() < 0.3:
                self.for_itself(self._take_stock(manager))
            else:
                self.for_itself(self.report(random))

    async def report(self, random: Random) -> bool:
        """Say something that no command asked for; sometimes it may be late."""
        tag = self.world.tag("event")
        ttl = random.uniform(0.5, 15.0) if random.random() < 0.25 else None
        result = Result(command_id=reports(self.name), status="success", output=tag + "." * random.randrange(200))
        return await self._report(self.manager, result, tag, ttl=ttl)

    async def _take_stock(self, manager: Manager) -> None:
        self._stock += 1
        number = self._stock
        try:
            await manager.send_inventory(self.inventory())
        except SpoolError as error:
            self.note("refused", f"inventory-{number}", error=type(error).__name__)

    def inventory(self) -> JSONObject:
        """Say what the machine is."""
        return {"system": {"hostname": self.name, "number": self._stock}}

    def health(self) -> SystemHealth:
        """Say how the machine is."""
        return SystemHealth(cpu_usage_percent=1.0, status="healthy")

    # -- how it stands ----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether everything is delivered, and every command has its result."""
        if not self.alive:
            return False
        status = self.manager.status()
        queue = status.queue
        # A plain backend has no word for losses.
        untold = queue.unreported_losses if self.world.setting.dialect == "v1" else 0
        return status.running and not (queue.events or queue.states or queue.open_commands or untold)

    def found(self) -> AgentEnd:
        """Read the spool, when the agent has stopped."""
        spool = self.config.spool
        end = AgentEnd(
            highest=self.highest,
            bounds={
                "events": spool.max_events,
                "event_bytes": spool.max_bytes,
                "open_commands": PENDING,
                "in_flight": IN_FLIGHT,
                "in_flight_bytes": self.config.websocket.window_bytes,
                "dead_letters": spool.max_dead_letters,
                "dead_bytes": spool.max_bytes // 4,
                "remembered_bytes": spool.max_bytes // 4,
            },
        )
        db = sqlite3.connect(f"{self.directory}/{DATABASE}")
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")  # the simulated disk has no shared memory
            end.waiting = [name for (name,) in db.execute("SELECT id FROM entry WHERE key = ''")]
            end.states = [name for (name,) in db.execute("SELECT id FROM entry WHERE key <> ''")]
            end.open_commands = [name for (name,) in db.execute("SELECT id FROM command WHERE finished_at IS NULL")]
            (end.unreported,) = db.execute("SELECT losses FROM counter").fetchone()
            for total, rows in TOTALS.items():
                end.totals[total] = db.execute(f"SELECT {total}, ({rows}) FROM counter").fetchone()
            losses = [(f"{reason} {kind}", n) for reason, kind, n in db.execute("SELECT reason, kind, n FROM loss")]
            for (receipt,) in db.execute("SELECT body FROM loss_receipt"):
                losses += [(f"{row['reason']} {row['kind']}", row["count"]) for row in msgspec.json.decode(receipt)]
            for name, count in losses:
                end.losses[name] = end.losses.get(name, 0) + count
            letters = db.execute("SELECT id, kind, reason, accepted_at, died_at, body FROM dead_letter")
            for name, kind, reason, accepted_at, died_at, body in letters:
                command = msgspec.json.decode(body, type=ResultBody).command_id if kind == RESULT_KIND else ""
                end.dead.append(DeadLetter(name, kind, command, reason, accepted_at, died_at))
        finally:
            db.close()
        return end


_QUIET = frozenset(("http.exchange", "command.received", "command.finished"))


def reports(agent: str) -> str:
    """Return the id of the command that an agent's own events answer: the backend knows it, the agent does not."""
    return f"reports-of-{agent}"


def tag_of(output: str) -> str:
    """Return the tag in a result's output, empty if it has none."""
    return output.partition(".")[0]
