"""
Real processes that are killed at the Nth write, for every N: nothing lost, nothing done twice.

An agent on a real spool works off a fixed scenario with a real backend on a real ledger (:mod:`tests.sweep_children`),
dies at one write, is started again, and finishes. Then what the backend has, what the machine remembers and what the
spool still holds are compared.
"""

from __future__ import annotations

import re
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from commsmgr.backend.ledger import Ledger
from commsmgr.messages import LossReport, ResultBody
from commsmgr.spool import files
from tests.processes import ProcessTestCase, Program, together
from tests.sweep_children import JOURNAL, LEDGER, SCENARIO, STOPPED, Order, command_id

CHILDREN = Path(__file__).with_name("sweep_children.py")
AT_ONCE = 2
"""Agents that run at the same time."""
ENDED = 3
"""How many must have ended by themselves before a sweep is over: not every run has the same number of writes."""
MOST = 1000
"""More writes than any run has."""


class SweepTestCase(ProcessTestCase):
    """Gives orders to the process that forks, and audits what its children leave."""

    timeout = 180

    def setUp(self) -> None:
        super().setUp()
        # Where branches are counted, not in there: it would take twice as long, and who is killed tells nothing.
        self.parent: Program = self.python(CHILDREN, COVERAGE_PROCESS_START="", COVERAGE_PROCESS_CONFIG="")
        self.addCleanup(self._end)
        self.names = count(1)
        self.statuses: Counter[str] = Counter()
        self.kills = 0
        self.again = 0
        self.given_up = 0

    def _end(self) -> Any:
        self.parent.transport.closeStdin()
        return self.parent.wait()

    def fork(self, **fields: Any) -> Order:
        """Start an agent or a backend."""
        order = Order(name=f"p{next(self.names)}", **fields)
        Path(order.directory).mkdir(exist_ok=True)
        self.parent.transport.write(msgspec.json.encode(order) + b"\n")
        return order

    async def ended(self, order: Order) -> int:
        """Wait for the end of a process; return its exit code, or minus the number of the signal that ended it."""
        return int((await self.parent.line(rf"^{order.name} ended (-?\d+)$"))[1])

    async def backend(self, **fields: Any) -> Order:
        """Start a backend and wait until it listens; the order returned has its port."""
        fields = {"directory": str(self.directory / "backend")} | fields
        order = self.fork(role="backend", **fields)
        line = await self.parent.line(rf"^{order.name} (listens (\d+)|ended .*)$")
        self.assertTrue(line[2], f"{line[0]}\n{self.told(order)}")
        return msgspec.structs.replace(order, port=int(line[2]))

    def agent(self, backend: Order, machine: str, **fields: Any) -> Order:
        """Start an agent."""
        return self.fork(
            role="agent",
            machine=machine,
            directory=str(self.directory / machine),
            port=backend.port,
            ledger=str(Path(backend.directory) / LEDGER),
            **fields,
        )

    def told(self, order: Order) -> str:
        """Return what a process wrote."""
        return (Path(order.directory) / f"{order.name}.log").read_text()

    async def killed_and_started(self, backend: Order, machine: str, at: int, **fields: Any) -> bool:
        """Let an agent die at a write, and another one finish; return False when it ended by itself before that."""
        wanted = fields.get("signal", signal.SIGKILL)
        first = self.agent(backend, machine, at=at, **fields)
        code = await self.ended(first)
        if code == 0:
            return False
        self.assertEqual(-signal.SIGKILL if wanted == signal.SIGKILL else STOPPED, code, self.told(first))
        second = self.agent(backend, machine, **{key: value for key, value in fields.items() if key != "signal"})
        self.assertEqual(0, await self.ended(second), self.told(second))
        self.kills += 1
        return True

    async def sweep(self, backend: Order, points: Iterable[int], **fields: Any) -> None:
        """Let agents die at each of ``points``, until they end before that; audit all of them."""
        ended = 0
        machines = []

        async def one(at: int) -> bool:
            nonlocal ended
            machines.append(machine := f"m-{at}")
            ended += not await self.killed_and_started(backend, machine, at, **fields)
            return ended < ENDED

        await self.side_by_side(points, one)
        self.audit(backend, machines)

    async def side_by_side(self, points: Iterable[int], one: Callable[[int], Awaitable[bool]]) -> None:
        """Call ``one`` for each of ``points``, until it returns False."""
        each = iter(points)

        async def work() -> None:
            for at in each:
                if not await one(at):
                    return

        await together(*(work() for _ in range(AT_ONCE)))

    # -- the audit --------------------------------------------------------------------------------------------------

    def audit(self, backend: Order, machines: Iterable[str]) -> None:
        """Compare what the backend has with what the agents did and hold."""
        ledger = Ledger(str(Path(backend.directory) / LEDGER), time.time)
        self.addCleanup(ledger.close)
        rows = defaultdict(list)
        for row in ledger.results():
            rows[row.command_id.partition(":")[0]].append(row)
            self.again += row.copies > 1
        checksums = {row.machine_id: row.checksum for row in ledger.machines()}
        wrong: dict[str, list[str]] = {}
        for machine in machines:
            reports = [msgspec.json.decode(row.body, type=LossReport) for row in ledger.loss_receipts(machine)]
            found = [*self.wrong(machine, rows[machine]), *self.unaccounted(machine, reports)]
            if not checksums.get(machine):
                found.append("no inventory")
            if ledger.pending(machine):
                found.append("the backend still keeps commands")
            if found:
                wrong[machine] = found
        self.assertEqual({}, wrong, "\n".join(f"{machine}: {found}" for machine, found in wrong.items()))

    def journal(self, machine: str) -> str:
        """Return what a machine remembers."""
        return (self.directory / machine / JOURNAL).read_text()

    def wrong(self, machine: str, rows: Any) -> Iterator[str]:
        """Yield what is wrong with one machine."""
        results = {row.command_id: msgspec.json.decode(row.body, type=ResultBody) for row in rows}
        if sorted(row.command_id for row in rows) != sorted({command_id(machine, each) for each in SCENARIO}):
            yield "not one result of each command"
        ids = [row.id for row in rows]
        if ids != sorted(ids):  # they sort by the time at which they were made
            yield "the results came in another order than that of their acceptance"
        runs: dict[str, list[str]] = defaultdict(list)
        for line in self.journal(machine).splitlines():
            match line.split():
                case ["run", command, redelivered]:
                    runs[command].append(redelivered)
                case ["accepted", result] if result not in ids:
                    yield f"{result} was accepted and did not arrive"
        for command, result in results.items():
            ran = runs[command]
            kind = command.partition(":")[2].partition(".")[0]
            self.statuses[result.status] += 1
            if kind == "again":
                if result.status != "success" or not ran or set(ran[1:]) - {"1"}:
                    yield f"{command}: {result.status} after {ran}"
            elif len(ran) > 1:
                yield f"{command} ran {len(ran)} times"
            elif result.status != "interrupted" and (
                not ran or result.status != ("error" if kind == "failing" else "success")
            ):
                yield f"{command}: {result.status} after {ran}"
        spool = self.directory / machine / "spool"
        strange = {path.name for path in spool.iterdir()} - {files.DATABASE, files.LOCK, "spool.ballast"}
        if strange:
            yield f"in the spool's directory: {strange}"
        with sqlite3.connect(spool / files.DATABASE) as db:
            for table in ("entry", "loss", "loss_receipt", "command WHERE finished_at IS NULL"):
                (held,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
                if held:
                    yield f"{held} left in {table}"
        db.close()

    def unaccounted(self, machine: str, reports: Iterable[LossReport]) -> Iterator[str]:
        """Yield what is wrong with what had to be given up, and with what the backend was told of that."""
        with closing(sqlite3.connect(self.directory / machine / "spool" / files.DATABASE)) as db:
            dead = [letter for (letter,) in db.execute("SELECT id FROM dead_letter")]
        told: Counter[tuple[str, str]] = Counter()
        for report in reports:
            for loss in report.losses:
                told[loss.reason, loss.kind] += loss.count
        if told != Counter({("refused", "command_result"): len(dead)}):
            yield f"of {len(dead)} dead letters the backend was told {told}"
        strays = re.findall("^stray (.+)$", self.journal(machine), re.MULTILINE)
        if set(strays) - set(dead):
            yield f"{strays} were accepted, and {dead} are dead letters"
        self.given_up += len(dead)


class AgentKilled(SweepTestCase):
    """An agent dies at one of its writes."""

    async def test_v1(self) -> None:
        """In commsmgr.v1, at every write."""
        backend = await self.backend(machines=[f"m-{number}" for number in range(1, MOST)])
        await self.sweep(backend, range(1, MOST))
        # A run has some 250 writes, and fewer the slower the machine is: then more share one commit.
        self.assertGreater(self.kills, 180)
        self.assertGreater(self.given_up, 180)
        # Had nothing been under way when the agents were killed, this would show nothing.
        self.assertGreater(self.statuses["interrupted"], 100)

    async def test_http_only(self) -> None:
        """Without any WebSocket: commands in heartbeats' answers, results by POST."""
        backend = await self.backend(machines=[f"m-{number}" for number in range(1, MOST)])
        await self.sweep(backend, range(8, MOST, 16), http_only=True)
        self.assertGreater(self.kills, 10)

    async def test_plain(self) -> None:
        """With a plain backend, which keeps nothing: whoever gave the commands gives them again."""
        backend = await self.backend(plain=True)
        await self.sweep(backend, range(4, MOST, 12), plain=True)
        self.assertGreater(self.kills, 10)

    async def test_sigterm(self) -> None:
        """It is asked to stop at a write, and does that in order and in time; the next one finishes."""
        backend = await self.backend(machines=[f"m-{number}" for number in range(1, MOST)])
        await self.sweep(backend, range(10, MOST, 16), signal=signal.SIGTERM)
        self.assertGreater(self.kills, 10)

    async def test_sigterm_with_a_handler(self) -> None:
        """The same when the manager runs the commands: whatever runs may finish, and nothing is interrupted."""
        backend = await self.backend(machines=[f"m-{number}" for number in range(1, MOST)])
        await self.sweep(backend, range(6, MOST, 16), signal=signal.SIGTERM, handler=True)
        self.assertGreater(self.kills, 10)
        self.assertEqual(0, self.statuses["interrupted"])


class BackendKilled(SweepTestCase):
    """A backend dies at one of its writes, and is started again at the same port; the agent goes on by itself."""

    async def test_each_way(self) -> None:
        """In commsmgr.v1, over WebSocket and over HTTP, and in the plain dialect."""
        # Close together where there are acks: few of these writes stand between the receipt of a result and its ack.
        for way, step in (({}, 2), ({"http_only": True}, 8), ({"plain": True}, 9)):
            await self.side_by_side(range(1, MOST, step), partial(self.killed, **way))
        self.assertGreater(self.kills, 20)
        self.assertEqual(0, self.statuses["interrupted"])
        self.assertGreater(self.again, 0, "no result came twice: no backend died between a receipt and its ack")

    async def killed(self, at: int, *, plain: bool = False, http_only: bool = False) -> bool:
        machine = f"m-{next(self.names)}"
        held: dict[str, Any] = {
            "directory": str(self.directory / f"backend-{machine}"),
            "plain": plain,
            "machines": [] if plain else [machine],
        }
        backend = await self.backend(at=at, **held)
        agent = self.agent(backend, machine, http_only=http_only, plain=plain)
        first = await self.parent.line(rf"^({backend.name}|{agent.name}) ended (-?\d+)$")
        died = first[1] == backend.name
        if died:
            self.assertEqual(-signal.SIGKILL, int(first[2]), self.told(backend))
            self.kills += 1
            await self.backend(port=backend.port, **held)
        self.assertEqual(0, await self.ended(agent), self.told(agent))
        self.audit(backend, [machine])
        return died
