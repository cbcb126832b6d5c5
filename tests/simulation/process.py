"""
Processes that can die, with a disk that knows what was flushed.

A dead process is buried, not collected: its objects stay in the world's graveyard until the world is over, so that no
``finally`` and no destructor of theirs runs, just as none runs after SIGKILL.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from commsmgr import assembly
from commsmgr.backend import ledger
from commsmgr.spool import ballast, books, reader, replacing, writer
from tests.faulty_vfs import IOERR, Crashed, Operation
from tests.simulation.reactor import ProcessReactor
from tests.simulation.witness import Change, Witness

if TYPE_CHECKING:
    from tests.simulation.scenario import World

T = TypeVar("T")


class Process:
    """
    A program on a host of its own, which may be started again after its end.

    :ivar name: of the host and of the process.
    :ivar disk: what is below :attr:`directory`.
    :ivar reactor: of the present run or the last one.
    """

    reactor: ProcessReactor

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.runs = 0
        self.directory = os.path.join(world.directory, name)
        os.mkdir(self.directory, 0o700)
        self.disk = world.vfs.disk(self.directory, world.random(f"{name}/disk"))
        self.failing = ""
        self._share = 1.0
        self._luck = world.random(f"{name}/luck")
        self._crash_in = 0
        self._crash_power = False
        self._stopping: ProcessReactor | None = None

    # -- for programs -----------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Begin to run on :attr:`reactor`."""
        raise NotImplementedError

    def end(self) -> Deferred[None]:
        """Stop in good order."""
        raise NotImplementedError

    def remains(self) -> object:
        """Return what must not be collected when the process has died."""
        raise NotImplementedError

    # -- life and death ---------------------------------------------------------------------------------------------

    @property
    def ailing(self) -> bool:
        """Whether something is wrong with its disk."""
        return bool(self.failing) or self.disk.capacity is not None

    @property
    def stopping(self) -> bool:
        """Whether it is about to have stopped in good order."""
        return self.alive and self._stopping is self.reactor

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.runs > 0 and self.reactor.alive

    def random(self, name: str) -> Random:
        """Return random numbers for one part of this very run."""
        return self.world.random(f"{self.name}/{self.runs}/{name}")

    def start(self) -> None:
        """Run; nothing happens if it runs already."""
        if not self.alive:
            self.runs += 1
            world = self.world
            self.reactor = ProcessReactor(world.clock, world.network, self.name, self.random("reactor"))
            world.clock.guard(self.reactor, self.boot)

    def kill(self, *, power: bool = False) -> None:
        """Die now: with ``power`` the machine does too, and what was not flushed is lost."""
        if self.alive:
            self._die(power)
            self._bury(power)

    def crash_in(self, operations: int, *, power: bool) -> None:
        """Die in front of the disk operation that comes after so many."""
        self._crash_in = operations
        self._crash_power = power
        self._watch()

    def fail(self, kind: str, share: float = 1.0) -> None:
        """Let a share of the disk operations of a kind, or of ``any``, fail from now on; the empty string ends that."""
        self.failing = kind
        self._share = share
        self._watch()

    def stop(self) -> None:
        """End in good order, and note what is left behind."""
        if self.alive and self._stopping is not self.reactor:
            self.world.history.note(self.name, "stopping")
            reactor = self._stopping = self.reactor
            self.end().addCallback(lambda _: self.world.clock.callLater(STOPPED, self._stopped, reactor))

    def _stopped(self, reactor: ProcessReactor) -> None:
        history = self.world.history
        if not reactor.alive:
            return
        history.note(self.name, "stopped")
        for sentence in [*reactor.leftovers(), *self._descriptors(), *self._half_made()]:
            history.note(self.name, "leftover", sentence)
        # What is left of the process now is nothing that could act.
        self._die(False, noted=False)
        self._bury(False)

    def _die(self, power: bool, *, noted: bool = True) -> None:
        if noted:
            self.world.history.note(self.name, "died", power=power)
        # Whatever only a timer or a socket held on to would be collected with it.
        reactor = self.reactor
        remains = [*reactor.getDelayedCalls(), *reactor.transports, *reactor.connecting, *reactor.ports]
        self.world.graveyard.append(remains)
        reactor.kill(power=power)

    def _bury(self, power: bool) -> None:
        self.world.graveyard.append((self.reactor, self.remains()))
        self.disk.crash(power_cut=power)
        self._crash_in = 0
        self._watch()
        for descriptor in self._open_locks():
            # The number stays taken, for the dead may hold on to it; the lock goes with what it stood for.
            os.dup2(self.world.nothing, descriptor, inheritable=False)
            self.world.descriptors.append(descriptor)

    # -- the disk ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self.disk.hook = self._asked if self.failing or self._crash_in else None

    def _asked(self, operation: Operation) -> int:
        if self._crash_in and operation.kind in ("write", "truncate", "sync", "delete"):
            self._crash_in -= 1
            if not self._crash_in and self.alive:
                # The dead call runs on for a while, to no effect; the disk is as it was just before it.
                self._die(self._crash_power)
                self.world.clock.callLater(0, self._bury, self._crash_power)
                raise Crashed
        if self.failing in ("any", operation.kind) and self._luck.random() < self._share:
            return IOERR[operation.kind]
        return 0

    def _descriptors(self) -> list[str]:
        return [f"an open {os.path.basename(path)}" for path in self._open_files().values()]

    def _half_made(self) -> list[str]:
        return [f"the file {name}" for name in os.listdir(self.directory) if name.endswith(HALF_MADE)]

    def _open_locks(self) -> list[int]:
        return [number for number, path in self._open_files().items() if path.endswith(".lock")]

    def _open_files(self) -> dict[int, str]:
        """Return the descriptors that are open below the directory, but for those that the disk itself holds."""
        found = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                path = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
            if path.startswith(self.directory + "/") and path.endswith((".lock", ".ballast")):
                found[int(name)] = path
        return found


HALF_MADE = replacing.ENDINGS
"""What the names of files end in that nobody needs once a spool is open."""

STOPPED = 1.5
"""Seconds after the end of an orderly stop in which the last packets are gone."""


class Disks:
    """
    The spool's thread, without a thread: work is done at one moment, and its result is known at a later one.

    A process that dies in between has committed what nobody knows of.
    """

    linger = 0.05

    def __init__(self, reactor: ProcessReactor, random: Random) -> None:
        self._reactor = reactor
        self._random = random
        self._done_at = self._told_at = 0.0

    def __call__(self, work: Callable[[], T], /) -> Deferred[T]:
        """Do ``work``, after what was asked for before."""
        done: Deferred[T] = Deferred()
        now = self._reactor.seconds()
        self._done_at = max(now, self._done_at) + self._pause()
        self._reactor.callLater(self._done_at - now, self._do, work, done)
        return done

    def stop(self) -> Deferred[None]:
        """Fire after what was asked for before."""
        return self(lambda: None)

    def _do(self, work: Callable[[], T], done: Deferred[T]) -> None:
        outcome: Any
        try:
            outcome = work()
        except BaseException:
            outcome = Failure()
        now = self._reactor.seconds()
        self._told_at = max(now + self._pause() / 2, self._told_at)
        self._reactor.callLater(self._told_at - now, done.callback, outcome)

    def _pause(self) -> float:
        """Mostly a few milliseconds; now and then the disk is busy."""
        return 0.02 * self._random.random() ** 3 if self._random.random() < 0.98 else self._random.uniform(0.1, 0.5)


class _SimulatedOS:
    """What :mod:`commsmgr.spool.ballast` asks of the system, answered for disks of limited size."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def statvfs(self, path: str) -> object:
        """Tell how much room there is."""
        return SimpleNamespace(f_bavail=self._room(path), f_frsize=1)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        """Take room, if there is any."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if length - os.fstat(descriptor).st_size > self._room(os.path.dirname(path)):
            raise OSError(28, "No space left on device")
        os.truncate(descriptor, length)

    def _room(self, directory: str) -> int:
        disk = self._world.vfs.disk_of(os.path.join(directory, "x"))
        if disk is None or disk.capacity is None:
            return 1 << 40
        used = sum(entry.stat().st_size for entry in os.scandir(directory))
        return max(0, disk.capacity - used)


class _SimulatedSQLite:
    """What :mod:`commsmgr.backend.ledger` needs of sqlite3, where disks have no shared memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)

    def connect(self, path: str, **parameters: Any) -> sqlite3.Connection:
        """Open a database for oneself."""
        db = sqlite3.connect(path, **parameters)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        return db


def adapt(world: World) -> Callable[[], None]:
    """
    Let what asks the system ask the simulated one, and make small what otherwise would never come to its end.

    :return: undoes that.
    """
    changes: list[Change] = [
        *Witness(world).changes(),
        (assembly, "HOUSEKEEPING", 4.0),
        (ballast, "os", _SimulatedOS(world)),
        (ballast, "SIZE", 64 << 10),
        (ledger, "sqlite3", _SimulatedSQLite()),
        (writer, "CHECKPOINT_BYTES", 48 << 10),
        (reader, "MAX_ENTRIES", 12),
        (reader, "MAX_BYTES", 32 << 10),
        (books, "PAGE_ROWS", 8),
        (books, "PAGE_BYTES", 16 << 10),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]

    def make(values: list[Change]) -> None:
        for module, name, value in values:
            setattr(module, name, value)

    make(changes)
    return lambda: make(before)
