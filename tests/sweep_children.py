"""
Forks agents and backends that end themselves at a given write. Run by test_kill_sweep, which audits what they leave.

The parent has imported everything but a reactor, so that a process costs a fork and not a start of Python. It reads one
order (JSON) a line, forks, and writes ``NAME ended CODE`` when that process has ended; a backend writes ``NAME listens
PORT`` itself. The parent ends, and its children with it, at the end of its input.

What counts as a write: each send on a socket, of which the last one is cut in half; of an agent also what SQLite does
to the spool (write, truncate, sync, delete); of a backend also each statement that writes to its ledger. Within such a
statement, that is between what SQLite does to the ledger's files in one COMMIT, no backend dies: other processes read
the ledger, which the file system that counts cannot serve.

Before an agent runs a command it writes ``run ID REDELIVERED`` into its journal and has the disk confirm that, and
``accepted ID`` with the id of a result that was accepted: what a machine would remember of the effects of a command.
``stray ID`` is a result whose command no backend knows: it becomes a dead letter, and the backend is told of the loss.
A plain backend takes any result, so there it is not sent.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from random import Random
from typing import Any

import msgspec
from msgspec import Struct
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

from commsmgr import config, process
from commsmgr.backend.events import BackendEvent
from commsmgr.backend.ledger import Ledger
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import NotRunning
from commsmgr.manager import Manager
from commsmgr.messages import Command, CommandData, CommandEnvelope, JSONObject, Result, SystemHealth
from commsmgr.observe.logs import make_observer
from commsmgr.redact import Redactor
from tests.faulty_vfs import FaultyVFS, Operation

SCENARIO = ("quick.1", "slow.1", "failing.1", "again.1", "quick.2", "quick.2", "quick.3", "again.2")
"""What each machine is told to do, in order: the type of the command, and which one of that type. One comes twice."""

DURATIONS = {"quick": 0.0, "failing": 0.0, "slow": 0.03, "again": 0.01}
"""Seconds that a command of each type takes."""

STOP_DEADLINE = 3.0
STOPPED, LATE, STUCK = 10, 11, 12
"""Exit codes of an agent: it got its signal and stopped within its deadline, or later; it did not finish."""

PATIENCE = 10.0
"""Seconds in which an agent has to finish."""

LEDGER, JOURNAL = "ledger.db", "journal"


class Order(Struct, frozen=True, kw_only=True):
    """
    One process.

    :ivar role: ``agent`` or ``backend``.
    :ivar name: names this very process.
    :ivar directory: its own, with the spool and the journal, or with the ledger.
    :ivar at: the number of the write at which it sends itself ``signal``; 0: it never does.
    :ivar plain: the backend speaks plain only.
    :ivar port: backend: where it listens, 0 for any; agent: where the backend listens.
    :ivar machine: agent: its machine_id.
    :ivar http_only: agent: it uses no WebSocket.
    :ivar handler: agent: the manager runs its handler; otherwise it takes the commands and sends the results itself.
    :ivar machines: backend: those for which it holds commands from the beginning.
    :ivar ledger: agent: the backend's file, which tells it that it is done.
    """

    role: str
    name: str
    directory: str
    at: int = 0
    signal: int = signal.SIGKILL
    plain: bool = False
    port: int = 0
    machine: str = ""
    http_only: bool = False
    handler: bool = False
    machines: list[str] = []
    ledger: str = ""


class Fate:
    """Counts this process's writes, from whatever thread, and sends it its signal at one of them."""

    def __init__(self, order: Order) -> None:
        self._at = order.at if order.role == "agent" else 0
        self._order = order
        self._writes = count(1)
        self.struck_at: float | None = None

    def begin(self) -> None:
        """Count from here: for a backend, which nobody can talk to before it listens."""
        self._at, self._writes = self._order.at, count(1)

    def is_due(self) -> bool:
        """Count one write; say whether it is the one."""
        return next(self._writes) == self._at

    def strike(self) -> None:
        """Send the signal; of SIGKILL nobody returns."""
        self.struck_at = time.monotonic()
        os.kill(os.getpid(), self._order.signal)

    def watch_disk(self, root: str) -> None:
        """Count what SQLite writes below ``root``."""

        def hook(operation: Operation) -> int:
            if operation.kind in ("write", "truncate", "sync", "delete") and self.is_due():
                self.strike()
            return sqlite3.SQLITE_OK

        vfs = FaultyVFS()
        vfs.install()
        vfs.disk(root, Random(0)).hook = hook

    def watch_statements(self) -> None:
        """Count the statements that write; for a database that other processes read, which that VFS cannot serve."""
        fate = self

        class Watched(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]  # less precise
                if statement.startswith(("INSERT", "UPDATE", "DELETE", "COMMIT")) and fate.is_due():
                    fate.strike()
                return super().execute(statement, *values)

        connect: Any = sqlite3.connect
        sqlite3.connect = lambda *values, **options: connect(*values, factory=Watched, **options)

    def watch_sockets(self) -> None:
        """Count what is sent; of what is sent last only one half goes out."""
        from twisted.internet.tcp import Connection

        send = Connection.writeSomeData

        def send_or_die(connection: Any, data: bytes) -> Any:
            if not self.is_due():
                return send(connection, data)
            sent = send(connection, data[: len(data) // 2])
            self.strike()
            return sent

        Connection.writeSomeData = send_or_die


class StillMachine:
    """A machine that is always the same."""

    def inventory(self) -> JSONObject:
        return {"system": {"hostname": "still"}}

    def health(self) -> SystemHealth:
        return SystemHealth(status="healthy")


def command_id(machine: str, command: str) -> str:
    """Return the id of one of the scenario's commands."""
    return f"{machine}:{command}"


def settings(order: Order) -> config.Config:
    """Return an agent's configuration: all waits short, and the spool as durable as can be."""
    return config.Config(
        backends=(config.Backend(url=f"http://127.0.0.1:{order.port}", name="main"),),
        machine_id=order.machine,
        stop_deadline=STOP_DEADLINE,
        reconnect=config.Reconnect(base=0.02, cap=0.05),
        breaker=config.Breaker(failures=1000, open_for=0.1),
        # A 404 that is the first answer of all may come from a wrong URL: it judges no result, and is asked for again.
        auth=config.Auth(refused_delay=1.0),
        websocket=config.WebSocket(enabled=not order.http_only, stable_after=0.0),
        heartbeat=config.Heartbeat(interval=0.05 if order.http_only else 0, jitter=0),
        inventory=config.Inventory(interval=0),
        spool=config.Spool(path=os.path.join(order.directory, "spool"), durability="full"),
        commands=config.Commands(safe_to_repeat=("again",)),
    )


def run_agent(order: Order, fate: Fate) -> int:
    """Work until the backend has everything and nothing is left here, or until a signal."""
    from twisted.internet import reactor as installed
    from twisted.internet.defer import CancelledError, Deferred
    from twisted.internet.task import LoopingCall, deferLater

    reactor: Any = installed
    path = os.path.join(order.directory, JOURNAL)
    journal = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    noted = os.read(journal, 1 << 20)
    prepared = False

    def note(*words: object) -> None:
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(journal)

    async def run(command: Command) -> Result:
        note("run", command.id, int(command.redelivered))
        if duration := DURATIONS[command.type]:
            await deferLater(reactor, duration)
        return command.error("it failed") if command.type == "failing" else command.success("it ran")

    manager = Manager(
        settings(order),
        reactor=reactor,
        machine=StillMachine(),
        random=Random(order.name),
        handler=run if order.handler else None,
    )

    async def work() -> None:
        async for command in manager.commands():
            note("accepted", await manager.send_result(await run(command)))

    async def main() -> None:
        nonlocal prepared
        await manager.started()
        looking.start(0.01, now=False)
        if b"stock" not in noted:
            await manager.send_inventory()
            note("stock")
        if b"stray" not in noted and not order.plain:
            note("stray", await manager.send_result(Result(command_id=command_id(order.machine, "nobody.1"))))
        prepared = True

    def begin() -> None:
        # Not before the reactor handles signals.
        manager.startService()
        for story in (main,) if order.handler else (main, work, work, work):
            Deferred.fromCoroutine(story()).addErrback(failed)

    def failed(failure: Failure) -> None:
        # Stopped by the signal while it waited.
        failure.trap(NotRunning, CancelledError)

    def look() -> None:
        queue = manager.status().queue
        held = queue.events or queue.states or queue.open_commands or queue.unreported_losses
        if prepared and not held and backend_has_all(order):
            looking.stop()
            reactor.stop()
        elif time.monotonic() - began > PATIENCE:
            print(manager.status())
            sys.stdout.flush()
            os._exit(STUCK)

    began = time.monotonic()
    looking = LoopingCall(look)
    reactor.addSystemEventTrigger("before", "shutdown", manager.stopService)
    process.stop_once(reactor)
    reactor.callWhenRunning(begin)
    reactor.run()
    if fate.struck_at is None:
        return 0
    return STOPPED if time.monotonic() - fate.struck_at < STOP_DEADLINE + 1 else LATE


def backend_has_all(order: Order) -> bool:
    """Say whether the backend has the machine's inventory and a result of every command; no while it is dead."""
    ids = {command_id(order.machine, command) for command in SCENARIO}
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{order.ledger}?mode=ro", uri=True)) as ledger,
    ):
        query = f"SELECT count(DISTINCT command_id) FROM results WHERE command_id IN ({','.join('?' * len(ids))})"
        (answered,) = ledger.execute(query, tuple(ids)).fetchone()
        query = "SELECT count(*) FROM machines WHERE machine_id = ? AND inventory_at > 0"
        (inventories,) = ledger.execute(query, (order.machine,)).fetchone()
        return bool(answered == len(ids) and inventories)
    return False


def run_backend(order: Order, fate: Fate, say: Callable[[str], None]) -> int:
    """Be the reference backend, until a signal."""
    from twisted.internet import reactor as installed

    reactor: Any = installed
    backend = ReferenceBackend(
        reactor,
        wall=time.time,
        random=Random(order.name),
        listen=f"127.0.0.1:{order.port}",
        path=os.path.join(order.directory, LEDGER),
        dialects=("plain",) if order.plain else ("commsmgr.v1", "plain"),
    )

    def give(event: BackendEvent) -> None:
        """A plain backend keeps no commands: whoever gave them gives them again, until they are answered."""
        if event.kind == "registered":
            for command in SCENARIO:
                given = command_id(event.machine_id, command)
                if backend.result_of(given) is None:
                    backend.send_command(event.machine_id, command.partition(".")[0], command, id=given)

    if order.plain:
        backend.subscribe(give)

    def listens(_: object) -> None:
        fate.begin()
        say(f"{order.name} listens {backend.port}")

    starting: Any = backend.startService()
    starting.addCallback(listens)
    starting.addErrback(lambda failure: (failure.printTraceback(sys.stderr), reactor.stop()))
    reactor.addSystemEventTrigger("before", "shutdown", backend.stopService)
    reactor.run()
    return 0


def hold_commands(order: Order) -> None:
    """Write the commands of all machines into the ledger, unless that was done before."""
    ledger = Ledger(os.path.join(order.directory, LEDGER), time.time)
    if not ledger.machines():
        with ledger.transaction():
            for machine in order.machines:
                ledger.seen(machine, "commsmgr.v1")
                for command in SCENARIO:
                    given = command_id(machine, command)
                    data = CommandData(type=command.partition(".")[0], command=command)
                    envelope = CommandEnvelope(id=given, data=data, timestamp="2026-11-22T12:00:00Z")
                    ledger.add_command(given, machine, msgspec.json.encode(envelope), "pending")
    ledger.close()


def be(order: Order, say: Callable[[str], None]) -> int:
    """Do what a child was forked for; return its exit code."""
    fate = Fate(order)
    fate.watch_sockets()
    if order.role == "agent":
        spool = os.path.join(order.directory, "spool")
        os.makedirs(spool, mode=0o700, exist_ok=True)
        fate.watch_disk(spool)
        return run_agent(order, fate)
    hold_commands(order)
    fate.watch_statements()
    return run_backend(order, fate, say)


def fork(order: Order) -> int:
    """Fork a child; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        out = os.fdopen(os.dup(1), "w")
        log = os.open(os.path.join(order.directory, f"{order.name}.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for new, old in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(new, old)
        globalLogPublisher.addObserver(make_observer(sys.stdout, format="text", level="info", redactor=Redactor(())))
        code = be(order, lambda text: print(text, file=out, flush=True))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Take orders, and tell of ends."""
    ends, end = os.pipe()
    os.set_blocking(ends, False)
    os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(end)
    gc.freeze()
    running: dict[int, str] = {}
    rest = b""
    while True:
        ready = select.select([0, ends], [], [])[0]
        if ends in ready:
            os.read(ends, 4096)
            while running:
                child, status = os.waitpid(-1, os.WNOHANG)
                if not child:
                    break
                os.write(1, f"{running.pop(child)} ended {os.waitstatus_to_exitcode(status)}\n".encode())
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                order = msgspec.json.decode(line, type=Order)
                running[fork(order)] = order.name
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve()
