"""
The spool under power cuts and a failing disk, at every single operation of a scenario.

One run of the scenario is enough for all crashes: before each operation the disk is copied as a crash would leave it,
together with how much the agent had been told by then. Each copy is then opened and audited. Faults that the spool
survives change what it does next, so that each of those is a run of its own.

Two audits: what was told must be so, as seen through the spool's own interface; and the tables must be exactly as they
were after some commit, which for ``full`` is the last one told or the one that was under way.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, Literal

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import AlreadyCompleted, SpoolWriteFailed
from commsmgr.spool import Accepted, Duplicate, Lane, Opened, Spool, ballast, writer
from commsmgr.spool.ballast import Ballast
from commsmgr.spool.executor import InlineExecutor
from tests.faulty_vfs import IOERR, FaultyVFS, Operation

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
REMEMBER = 1000.0
Durability = Literal["full", "normal"]


class Note(Struct, frozen=True):
    """
    Something an agent asked of its spool, or was told by it.

    :ivar verb: what was asked.
    :ivar name: the message's or the command's id.
    """

    verb: str
    name: str
    told: bool


class Expected:
    """
    What must be in a spool, by the notes of its agent.

    :ivar events: ids of what is held for sure, in order.
    :ivar either: of what may be held or not: there was a request, and no answer.
    :ivar gone: of what must not be held any more.
    :ivar states: for each key, what may be held: what was told last, and what was asked for since.
    :ivar dead: of dead letters for sure; ``maybe_dead`` of those that may be.
    :ivar commands: how far each got for sure; ``begun`` how far it may have got.
    """

    def __init__(self, notes: Iterable[Note]) -> None:
        self.events: list[str] = []
        self.either: set[str] = set()
        self.gone: set[str] = set()
        self.states: dict[str, list[str | None]] = {}
        self.dead: set[str] = set()
        self.maybe_dead: set[str] = set()
        self.commands: dict[str, str] = {}
        self.begun: dict[str, str] = {}
        for note in notes:
            self._read(note.verb, note.name, note.told)

    def _read(self, verb: str, name: str, told: bool) -> None:
        match verb:
            case "put":
                if not told and name not in self.events:
                    self.gone.discard(name)
                    self.either.add(name)
                elif told and name not in self.events:
                    # A result may be put again before its receipt is told.
                    self.either.discard(name)
                    self.gone.discard(name)
                    self.events.append(name)
            case "forget" | "bury" | "expire":
                if not told:
                    if name in self.events:
                        self.events.remove(name)
                        self.either.add(name)
                    if verb != "forget" and name in self.either:
                        self.maybe_dead.add(name)
                elif name in self.either:
                    self.either.remove(name)
                    self.gone.add(name)
                    if verb == "bury":
                        self.dead.add(name)
            case "state":
                kept = self.states.setdefault(name.partition("-")[0], [None])
                if told:
                    del kept[: kept.index(name)]
                else:
                    kept.append(name)
            case "accept" | "offer" | "complete" | "forget-command":
                self.begun[name] = verb
                if told:
                    self.commands[name] = verb


class Agent:
    """Uses a spool on a virtual clock, and notes what it asks and what it is told."""

    def __init__(
        self, directory: str, durability: Durability, clock: Clock, after_work: Callable[[Agent], None]
    ) -> None:
        self.clock = clock
        self.notes: list[Note] = []
        self.failures: list[tuple[str, BaseException | None]] = []
        self.waiting: list[tuple[str, Deferred[Any]]] = []
        self.keys: dict[str, int] = {}
        self.opened: Opened | None = None
        settings = config.Spool(path=directory, durability=durability, remember_commands=REMEMBER)
        self.spool = Spool(settings, reactor=clock, wall=clock.seconds, executor=_Executor(clock, self, after_work))

    def ask(self, verb: str, name: str, asked: Callable[[], Deferred[Any]]) -> Deferred[Any]:
        """
        Ask for something, and note it when it is done.

        :return: fires with the answer, or with None when there was a failure.
        """
        self.notes.append(Note(verb, name, False))
        deferred = asked()
        self.waiting.append((f"{verb} {name}", deferred))

        def told(result: Any) -> Any:
            self.notes.append(Note(verb, name, True))
            return result

        def failed(failure: Failure) -> None:
            self.failures.append((f"{verb} {name}", failure.value))

        return deferred.addCallbacks(told, failed)

    def turn(self, *, until: float = 0.0) -> None:
        """Let happen what can without time passing, or until all is answered but for so many seconds at most."""
        for _ in range(8):
            self.clock.advance(0)
        while until > 0 and any(not each.called for _, each in self.waiting):
            self.clock.advance(0.5)
            until -= 0.5
        self.waiting = [each for each in self.waiting if not each[1].called]

    def open(self) -> None:
        """Open the spool, however long that takes, within reason."""
        for _ in range(1000):
            if self.opened is not None:
                return
            self.spool.open().addCallbacks(
                lambda opened: setattr(self, "opened", opened),
                lambda failure: self.failures.append(("open", failure.value)),
            )
            self.turn()
            self.clock.advance(0.5)
        raise AssertionError(f"cannot be opened: {self.failures[-1]}")

    def close(self) -> None:
        """Close the spool."""
        self.ask("close", "", self.spool.close)
        self.turn(until=100.0)
        self.opened = None

    # -- what it does

    def put(self, name: str, size: int = 100, ttl: float | None = None) -> None:
        put, body = self.spool.outbox.put, _body(name, size)
        self.ask("put", name, lambda: put(lane=Lane.EVENT, kind="note", id=name, body=body, ttl=ttl))

    def state(self, name: str) -> None:
        put, body, key = self.spool.outbox.put, _body(name, 300), name.partition("-")[0]
        self.ask("state", name, lambda: put(lane=Lane.STATE, kind="state", id=name, body=body, key=key))

    def send(self, count: int) -> None:
        """Take so many events, and have a receipt for them at once."""
        for entry in self.spool.outbox.reader(Lane.EVENT).take(count, 1 << 20):
            self.ask("forget", entry.id, partial(self.spool.outbox.forget, [entry.seq]))

    def bury(self) -> None:
        """Take an event that the backend refuses."""
        for entry in self.spool.outbox.reader(Lane.EVENT).take(1, 1 << 20):
            self.ask("bury", entry.id, partial(self.spool.outbox.bury, entry.seq, "refused"))

    def expire(self, name: str) -> None:
        """Look for what is over its time, which will be this."""
        self.ask("expire", name, self.spool.outbox.expire)

    def accept(self, name: str) -> None:
        def keep(answer: Any) -> None:
            if answer is not None:
                self.keys[name] = answer.command.key if isinstance(answer, Accepted) else answer.key

        inbox = self.spool.inbox
        self.ask("accept", name, lambda: inbox.accept(id=name, digest="d", body=_body(name, 200))).addCallback(keep)

    def offer(self, name: str) -> None:
        if name in self.keys:
            self.ask("offer", name, lambda: self.spool.inbox.offered([self.keys[name]]))

    def complete(self, name: str, size: int = 50) -> None:
        if name not in self.keys:
            return
        result, inbox = f"result-{name}", self.spool.inbox
        self.notes.append(Note("put", result, False))
        done = self.ask(
            "complete",
            name,
            lambda: inbox.complete(
                key=self.keys[name], command_id=name, status="success", result_id=result, body=_body(name, size)
            ),
        )
        done.addCallback(lambda seq: self.notes.append(Note("put", result, True)) if seq is not None else None)

    def duplicate(self, name: str) -> None:
        """A finished command comes again, perhaps after its result was sent."""

        def answered(answer: Any) -> None:
            if isinstance(answer, Duplicate) and answer.finished:
                self.notes.append(Note("put", f"result-{name}", True))

        self.notes.append(Note("put", f"result-{name}", False))
        self.ask("known", name, lambda: self.spool.inbox.known(name, "d")).addCallback(answered)


class _Executor(InlineExecutor):
    def __init__(self, clock: Clock, agent: Agent, after_work: Callable[[Agent], None]) -> None:
        super().__init__(clock)
        self._agent, self._after_work = agent, after_work

    def __call__(self, work: Callable[[], Any], /) -> Deferred[Any]:
        def observed() -> Any:
            try:
                return work()
            finally:
                self._after_work(self._agent)

        return super().__call__(observed)


def _body(name: str, size: int) -> bytes:
    return (name.encode() * size)[:size]


def scenario(agent: Agent) -> None:
    """Everything a spool is used for."""

    def turn(seconds: float = 0.5) -> None:
        agent.turn()
        agent.clock.advance(seconds)

    agent.open()
    for n in range(4):
        agent.put(f"a{n}", 5000 if n == 2 else 200)
    turn()
    for name in ("c1", "c2", "c3"):
        agent.accept(name)
    turn()
    agent.offer("c1")
    agent.offer("c2")
    agent.state("x-1")
    turn()
    agent.complete("c1")
    turn()
    agent.send(3)
    agent.state("x-2")
    agent.state("y-1")
    turn()
    agent.put("short", ttl=5.0)
    agent.put("long", 9000)
    turn()
    agent.send(2)  # the result of c1 among them
    turn(10.0)
    agent.expire("short")
    turn()
    agent.duplicate("c1")
    agent.put("b1")
    turn()
    agent.bury()
    turn()
    agent.put("b2", 20_000)
    agent.complete("c2", 5000)
    turn()
    agent.send(1)
    turn()
    agent.ask("report", "", lambda: agent.spool.losses.pending_report("loss"))
    turn()
    agent.ask("reported", "", lambda: agent.spool.losses.forget("loss"))
    turn()
    agent.turn(until=100.0)  # a close does not wait for a disk that fails
    agent.close()
    agent.open()
    agent.put("d1")
    agent.offer("c3")
    turn()
    agent.send(10)
    turn(REMEMBER)
    agent.notes += [Note("forget-command", name, False) for name in ("c1", "c2")]
    agent.ask("forget-finished", "", agent.spool.inbox.forget_finished)
    agent.state("x-3")
    turn()
    agent.put("d2")
    turn()


class Audit:
    """
    Opens a spool and compares it with what must be there.

    :param expected: None: only that it can be opened.
    :ivar wrong: what is not as it must be.
    """

    def __init__(self, directory: str, durability: Durability, expected: Expected | None) -> None:
        self.wrong: list[str] = []
        clock = Clock()
        clock.advance(10 * REMEMBER)
        self.agent = Agent(directory, durability, clock, lambda agent: None)
        self.agent.open()
        self.commits, self.tables = tables(self.agent.spool)
        if expected is not None:
            self._outbox(expected)
            self._inbox(expected)
        assert self.agent.opened is not None
        self.set_aside = self.agent.opened.set_aside
        self.agent.close()
        for what, error in self.agent.failures:
            self.wrong.append(f"{what}: {error!r}")

    def _must(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def _answer(self, deferred: Deferred[Any]) -> Any:
        self.agent.turn()
        answers: list[Any] = []
        deferred.addBoth(answers.append)
        return answers[0]

    def _outbox(self, expected: Expected) -> None:
        outbox, must = self.agent.spool.outbox, self._must
        entries = outbox.reader(Lane.EVENT).take(1000, 1 << 30)
        held = [entry.id for entry in entries]
        must(len(held) == len(set(held)), f"held twice: {held}")
        must([each for each in held if each in expected.events] == expected.events, f"{expected.events} are not {held}")
        unknown = {*held} - {*expected.events} - expected.either
        must(not unknown, f"{unknown} came back")
        must(all(entry.body == _body(entry.id.removeprefix("result-"), len(entry.body)) for entry in entries), "bodies")
        stats = outbox.stats
        must((stats.events, stats.event_bytes) == (len(held), sum(len(entry.body) for entry in entries)), f"{stats}")
        states = outbox.reader(Lane.STATE).take(1000, 1 << 30)
        must(stats.states == len(states), f"{stats}")
        by_key = {entry.key: entry.id for entry in states}
        must(len(by_key) == len(states), f"a state held twice: {states}")
        for key, kept in expected.states.items():
            must(by_key.get(key) in kept, f"state {key} is {by_key.get(key)}, not of {kept}")
        dead = [each.id for each in self._answer(outbox.dead_letters(100))]
        must(stats.dead_letters == len(dead), f"{stats}")
        must(expected.dead <= {*dead} <= expected.maybe_dead, f"dead letters {dead}, not {expected.dead}")

    def _inbox(self, expected: Expected) -> None:
        inbox, opened, must = self.agent.spool.inbox, self.agent.opened, self._must
        assert opened is not None
        interrupted, waiting = ({each.id for each in some} for some in (opened.interrupted, opened.waiting))
        must(inbox.open_count == len(interrupted) + len(waiting), "open_count")
        for name, begun in expected.begun.items():
            known = self._answer(inbox.known(name, "d"))
            if known is None:
                stage = "forget-command" if begun == "forget-command" else "nothing"
            elif known.finished:
                stage = "complete"
                must((known.status, known.result_id) == ("success", f"result-{name}"), f"{known}")
            else:
                stage = "offer" if name in interrupted else "accept" if name in waiting else "?"
            may = STAGES[STAGES.index(expected.commands.get(name, "nothing")) : STAGES.index(begun) + 1]
            must(stage in may, f"command {name} is at {stage}, not of {may}")


STAGES = ("nothing", "accept", "offer", "complete", "forget-command")
"""Of a command, as verbs of the notes about it."""


def tables(spool: Spool) -> tuple[int, Any]:
    """Return the number of the last commit, and all that is in the database."""
    books = spool._store._writer._books
    assert books is not None
    names = [name for (name,) in books.db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return books.counter.commits, [books.db.execute(f"SELECT * FROM {name}").fetchall() for name in names]


class Crash(Struct, frozen=True):
    """
    A spool as a crash would have left it.

    :ivar notes: how many notes the agent had made.
    :ivar done: the number of the last commit that had returned.
    :ivar durable: the number of the last commit after which the spool was closed in order.
    """

    directory: str
    operation: Operation | None
    notes: int
    done: int
    durable: int


class OnFaultyDisk(SynchronousTestCase):
    """A directory of a faulty disk, and many others beside it."""

    def setUp(self) -> None:
        self.patch(writer, "CHECKPOINT_BYTES", 30_000)
        self.patch(ballast, "SIZE", 4096)
        self.root = mkdtemp(dir=MEMORY)
        self.addCleanup(rmtree, self.root)
        self.vfs = FaultyVFS()
        self.vfs.install()
        self.addCleanup(self.vfs.uninstall)

    def directory(self, name: str) -> str:
        path = os.path.join(self.root, name)
        rmtree(path, ignore_errors=True)
        os.mkdir(path)
        return path


class CrashTests(OnFaultyDisk):
    """Before every operation that changes something, the process is killed or the power cut."""

    def crashes(self, durability: Durability, power_cut: bool, seed: int) -> tuple[Agent, list[Crash], dict[int, Any]]:
        """
        Run the scenario once.

        :return: its agent, what crashes would leave, and the tables after each commit.
        """
        disk = self.vfs.disk(self.directory("spool"), Random(seed))
        self.addCleanup(disk.close)
        crashes: list[Crash] = []
        commits: dict[int, Any] = {}
        done = durable = 0

        def after_work(agent: Agent) -> None:
            nonlocal done, durable
            if agent.spool._store._writer._books is not None:
                done, commits[done] = tables(agent.spool)
            else:
                durable = done

        def hook(operation: Operation) -> int:
            if operation.kind not in ("open", "read"):
                directory = self.directory(str(len(crashes)))
                disk.copy(directory, power_cut=power_cut)
                crashes.append(Crash(directory, operation, len(agent.notes), done, durable))
            return 0

        agent = Agent(disk.root, durability, Clock(), after_work)
        disk.hook = hook
        scenario(agent)
        disk.hook = None
        agent.close()
        self.assertEqual((disk.errors, agent.failures), ([], []))
        return agent, crashes, commits

    def audit(self, durability: Durability, power_cut: bool, seed: int) -> tuple[int, int]:
        """
        Crash everywhere, and compare with what must be.

        :return: how many crashes there were, and after how many of them something was lost.
        """
        agent, crashes, commits = self.crashes(durability, power_cut, seed)
        whole = durability == "full" or not power_cut
        lost = 0
        for crash in crashes:
            expected = Expected(agent.notes[: crash.notes]) if whole else None
            audit = Audit(crash.directory, durability, expected)
            wrong = audit.wrong
            if audit.set_aside is not None:
                wrong.append(f"set aside as {audit.set_aside}")
            elif audit.tables != commits[audit.commits]:
                wrong.append(f"the tables are not as after commit {audit.commits}")
            if not (crash.done if whole else crash.durable) <= audit.commits <= crash.done + 1:
                wrong.append(f"commit {audit.commits}, not {crash.done}")
            self.assertEqual(wrong, [], str(crash))
            lost += audit.commits < crash.done
            rmtree(crash.directory)
        return len(crashes), lost

    def test_power_cut_full(self) -> None:
        """With ``full`` a power cut loses nothing that was told, wherever it comes."""
        for seed in range(2):
            count, lost = self.audit("full", True, seed)
            self.assertGreater(count, 300)
            self.assertEqual(lost, 0)

    def test_power_cut_normal(self) -> None:
        """With ``normal`` a power cut loses the latest commits, and damages nothing."""
        count, lost = self.audit("normal", True, 0)
        self.assertGreater(lost, count // 10)

    def test_killed(self) -> None:
        """Without a power cut neither loses anything."""
        self.assertEqual(self.audit("full", False, 0)[1], 0)
        self.assertEqual(self.audit("normal", False, 0)[1], 0)


class Fault:
    """
    A disk that fails from an operation on.

    :param first: the operation's number among all, from 0 on, those that change nothing included.
    :param code: what that one fails with; later ones of its kind fail as well, and for SQLITE_FULL all that write.
    :param seconds: of the clock, after which all is well; 0: after the first.
    """

    def __init__(self, clock: Clock, first: int, code: int, seconds: float) -> None:
        self.operation: Operation | None = None
        self._clock, self._first, self._code, self._seconds = clock, first, code, seconds
        self._count = 0
        self._until = -1.0

    @property
    def active(self) -> bool:
        """Whether the disk is failing now."""
        return self._clock.seconds() < self._until

    def hook(self, operation: Operation) -> int:
        """Say how ``operation`` ends."""
        self._count += 1
        if self.operation is None:
            if self._count <= self._first:
                return 0
            self.operation = operation
            self._until = self._clock.seconds() + self._seconds
            return self._code
        return self._code if self.active and operation.kind == self.operation.kind else 0


class FaultTests(OnFaultyDisk):
    """At every operation the disk fails, once or for some seconds, and the spool goes on."""

    def setUp(self) -> None:
        super().setUp()
        restore = Ballast.restore
        self.full: Callable[[], bool] = lambda: False
        self.patch(Ballast, "restore", lambda ballast: not self.full() and restore(ballast))

    def operations(self) -> list[str]:
        """Return the kinds of all operations of the scenario."""
        kinds: list[str] = []

        def hook(operation: Operation) -> int:
            kinds.append(operation.kind)
            return 0

        disk = self.vfs.disk(self.directory("spool"), Random(0))
        disk.hook = hook
        agent = Agent(disk.root, "full", Clock(), lambda agent: None)
        scenario(agent)
        disk.hook = None
        agent.close()
        disk.close()
        return kinds

    def run_with(self, first: int, code: int, seconds: float) -> None:
        """Run the scenario with a fault; then, after a power cut, audit what is there."""
        clock = Clock()
        disk = self.vfs.disk(self.directory("spool"), Random(first))
        fault = Fault(clock, first, code, seconds)
        disk.hook = fault.hook
        self.full = lambda: code == sqlite3.SQLITE_FULL and fault.active
        agent = Agent(disk.root, "full", clock, lambda agent: None)
        scenario(agent)
        agent.turn(until=200.0)
        clock.advance(10.0)
        wrong = [f"{what} was not answered" for what, _ in agent.waiting]
        for what, error in agent.failures:
            if not isinstance(error, SpoolWriteFailed | AlreadyCompleted) or what.startswith("forget "):
                wrong.append(f"{what}: {error!r}")
        agent.ask("put", "last", lambda: agent.spool.outbox.put(lane=Lane.EVENT, kind="note", id="last", body=b"l"))
        agent.turn()
        if agent.notes[-1] != Note("put", "last", True) or agent.spool.trouble:
            wrong.append(f"does not go on: {agent.spool.trouble}")
        disk.hook = None
        directory = self.directory("left")
        disk.copy(directory, power_cut=True)
        audit = Audit(directory, "full", Expected(agent.notes))
        wrong += audit.wrong
        if audit.set_aside is not None:
            wrong.append(f"set aside as {audit.set_aside}")
        agent.close()
        self.assertEqual((wrong, disk.errors), ([], []), f"{first}, {code}, {seconds}: {fault.operation}")
        disk.close()

    def sweep(self, seconds: float, step: int) -> None:
        """
        Let the disk fail at each operation, its writes in turn as full and as broken.

        :param step: only at one of so many reads and writes, which are by far the most.
        """
        for first, kind in enumerate(self.operations()):
            if kind not in ("read", "write") or first % step == 0:
                full = kind == "write" and first // step % 2
                self.run_with(first, sqlite3.SQLITE_FULL if full else IOERR[kind], seconds)

    def test_once(self) -> None:
        """One operation fails: all is answered, nothing that was told is lost, and the spool goes on."""
        self.sweep(0.0, 7)

    def test_for_a_while(self) -> None:
        """Operations of one kind fail for some seconds: the same, and the receipts of that time are done afterwards."""
        self.sweep(4.0, 17)

    def test_totals_after_a_failed_undo(self) -> None:
        """A full disk that cannot be read just then either: what was undone is not counted."""
        disk = self.vfs.disk(self.directory("spool"), Random(0))
        agent = Agent(disk.root, "full", Clock(), lambda agent: None)
        agent.open()
        after_write = False

        def hook(operation: Operation) -> int:
            nonlocal after_write
            if operation.kind == "write":
                after_write = True
                return sqlite3.SQLITE_FULL
            unreadable, after_write = after_write and operation.kind == "read", False
            return IOERR["read"] if unreadable else sqlite3.SQLITE_OK

        disk.hook = hook
        agent.put("refused")
        agent.turn()
        self.assertIsInstance(agent.failures[-1][1], SpoolWriteFailed)
        disk.hook = None
        agent.put("kept")
        agent.turn()
        self.assertEqual((agent.spool.outbox.stats.events, disk.errors), (1, []))
        agent.close()
        disk.close()


class FailedFlushTests(OnFaultyDisk):
    """Flushes fail, and what they were for stays readable and is not on the disk; then the power is cut."""

    def crashes(self, seed: int) -> tuple[Agent, list[Crash]]:
        """Run the scenario with a time in which flushes fail; return what power cuts then and after it would leave."""
        random = Random(seed)
        first, share = random.randrange(350), random.choice((0.3, 0.6, 1.0))
        last = first + random.choice((20, 60, 200))
        disk = self.vfs.disk(self.directory("spool"), Random(seed))
        crashes: list[Crash] = []

        def hook(operation: Operation) -> int:
            if operation.kind in ("open", "read"):
                return 0
            if first <= disk.operations < last + 60 and random.random() < 0.2:
                directory = self.directory(str(len(crashes)))
                disk.copy(directory, power_cut=True)
                crashes.append(Crash(directory, operation, len(agent.notes), 0, 0))
            failing = operation.kind == "sync" and first <= disk.operations < last and random.random() < share
            return IOERR["sync"] if failing else 0

        agent = Agent(disk.root, "full", Clock(), lambda agent: None)
        disk.hook = hook
        scenario(agent)
        agent.turn(until=200.0)
        disk.hook = None
        agent.close()
        self.assertEqual(disk.errors, [])
        disk.close()
        return agent, crashes

    def test_power_cut(self) -> None:
        """Nothing that was told is lost, and no log looks damaged: what is found again was made durable first."""
        for seed in range(10):
            agent, crashes = self.crashes(seed)
            for crash in crashes:
                audit = Audit(crash.directory, "full", Expected(agent.notes[: crash.notes]))
                self.assertEqual((audit.wrong, audit.set_aside), ([], None), f"{seed}: {crash}")
                rmtree(crash.directory)

    def test_opening_writes_nothing(self) -> None:
        """A spool that is as it should be is opened without a write, however often that is tried on a failing disk."""
        disk = self.vfs.disk(self.directory("spool"), Random(0))
        agent = Agent(disk.root, "full", Clock(), lambda agent: None)
        agent.open()
        agent.put("kept")
        agent.turn()
        agent.close()
        written: list[Operation] = []

        def hook(operation: Operation) -> int:
            written.extend([operation] if operation.kind == "write" else [])
            return 0

        disk.hook = hook
        agent.open()
        self.assertEqual(written, [])
        disk.hook = None
        agent.close()
        disk.close()
