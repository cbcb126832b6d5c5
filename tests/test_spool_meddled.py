"""A spool that somebody meddles with: rows that no agent writes, files that go or are none."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from twisted.logger import globalLogPublisher

from commsmgr.errors import SpoolLocked, SpoolUnusable
from commsmgr.spool import Entry, Lane, Spool, ballast, files, schema, totals
from commsmgr.spool.records import LEAP
from tests.test_spool_tools import Tools

# Has a database open as an agent has it, until its input ends.
HOLDER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA locking_mode = EXCLUSIVE")
db.execute("SELECT count(*) FROM entry").fetchall()
print("open", flush=True)
sys.stdin.read()
"""


class Meddled(Tools):
    """A spool with something in every table."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()


class TotalsTests(Meddled):
    """The one row on which every transaction depends."""

    def test_start(self) -> None:
        """A start without totals, or with what is no number, salvages: all that waited is there, and more is taken."""
        for statement in (
            "DELETE FROM counter",
            "UPDATE counter SET next_event = 'abc'",
            "UPDATE counter SET losses = 1.5",
        ):
            self.tamper(statement)
            spool = self.open()
            opened = self.wait(spool.open())
            self.assertIn("damaged", opened.set_aside, statement)
            self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3"])
            self.assertEqual(spool.outbox.stats.events, 3)
            (seq,) = self.put(spool, "new")
            self.wait(spool.outbox.forget([seq]))
            self.close(spool)

    def test_counted_anew(self) -> None:
        """Totals that are numbers and cannot be right are counted anew, with a line: nothing is set aside."""
        for statement, lacking in (
            ("UPDATE counter SET events = -1, dead_letters = 7", {"events", "dead_letters"}),
            ("UPDATE counter SET commits = -5, open_commands = 1 << 60", {"commits", "open_commands"}),
            ("UPDATE counter SET next_event = -1, next_state = 1 << 60", {"next_event", "next_state"}),
        ):
            right = self.totals()
            said: list[Any] = []
            globalLogPublisher.addObserver(said.append)
            self.addCleanup(globalLogPublisher.removeObserver, said.append)
            self.tamper(statement)
            spool = self.open()
            self.assertIsNone(self.wait(spool.open()).set_aside)
            self.assertEqual(sum(event.get("event") == "spool.totals-counted" for event in said), 1)
            self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3"])
            self.close(spool)
            self.verified()
            now = self.totals()
            for name in lacking & {"next_event", "next_state"}:
                # Where it stood before nobody knows: it is far beyond all that can have been used.
                self.assertEqual(now[name], right.pop(name) + LEAP)
            self.assertEqual({**right, "commits": 0}, {**{name: now[name] for name in right}, "commits": 0})

    def test_nothing(self) -> None:
        """A total of nothing where there is something, or the other way round, is seen, and what waits expires."""
        for name, wrong in (("events", 0), ("states", 0), ("open_commands", 0)):
            self.tamper(f"UPDATE counter SET {name} = {wrong}")
            self.close(self.open())
            self.assertNotEqual(self.totals()[name], wrong, name)
            self.verified()
        self.tamper("UPDATE counter SET events = 0, event_bytes = 0, states = 0")
        spool = self.open(max_age=60.0)
        self.now += 61.0
        self.assertEqual(self.wait(spool.outbox.expire()), 3)
        self.wait(spool.outbox.forget([entry.seq for entry in spool.outbox.reader(Lane.STATE).take(1, 1 << 20)]))
        self.close(spool)
        self.verified()
        self.tamper("UPDATE counter SET events = 7, states = 7")
        self.close(self.open())
        self.verified()

    def test_too_low_while_it_runs(self) -> None:
        """Where totals that are too low have come to nothing, what waits expires all the same."""
        self.tamper("DELETE FROM entry WHERE key <> ''")
        self.tamper("UPDATE counter SET events = 1, event_bytes = 1, states = 0")
        spool = self.open(max_age=60.0)
        self.wait(spool.outbox.forget([spool.outbox.reader(Lane.EVENT).take(1, 1)[0].seq]))
        self.assertEqual((spool.outbox.stats.events, spool.outbox.stats.states), (0, 0))
        spool.outbox.reader(Lane.EVENT).rewind()
        self.now += 61.0
        self.assertEqual(self.wait(spool.outbox.expire()), 2)
        self.close(spool)

    def totals(self) -> dict[str, int]:
        with closing(sqlite3.connect(self.database)) as db:
            return totals.found(db)

    def test_too_low(self) -> None:
        """Totals that are too low end at nothing: below that the next transaction that is undone would be damage."""
        self.tamper("UPDATE counter SET events = 1, event_bytes = 1, states = 0, open_commands = 0")
        spool = self.open()
        self.handed_out(spool)
        self.wait(spool.outbox.forget([entry.seq for entry in self.entries(spool)]))
        self.assertEqual(spool.outbox.stats.events, 0)
        (seq,) = self.put(spool, "new")
        self.assertEqual(spool.outbox.stats.events, 1)
        self.wait(spool.outbox.forget([seq]))
        self.close(spool)
        self.assertEqual([value for value in self.totals().values() if value < 0], [])
        spool = self.open()
        self.assertIsNone(self.wait(spool.open()).set_aside)
        self.close(spool)

    def entries(self, spool: Spool) -> list[Entry]:
        reader = spool.outbox.reader(Lane.EVENT)
        reader.rewind()
        self.wait(spool.outbox.dead_letters(1))
        return reader.take(100, 1 << 20)

    def test_numbers_of_what_was_sent(self) -> None:
        """Numbers of dead letters and of results that were sent are in use too."""
        for statement, name in (
            ("UPDATE dead_letter SET seq = 500 WHERE n = (SELECT max(n) FROM dead_letter)", "next_event"),
            ("UPDATE command SET result_seq = 700 WHERE finished_at IS NOT NULL", "next_event"),
            ("UPDATE dead_letter SET seq = (1 << 56) + 900 WHERE n = (SELECT min(n) FROM dead_letter)", "next_state"),
        ):
            self.tamper(statement)
            self.close(self.open())
            self.assertEqual(self.totals()[name] % 100, 1, statement)
            self.verified()

    def test_what_a_start_need_not_read(self) -> None:
        """Dead letters that cannot be read are no reason not to start, or to set aside what can."""
        self.tamper(
            "WITH n (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM n LIMIT 50) INSERT INTO dead_letter"
            " (seq, kind, id, key, accepted_at, died_at, reason, body)"
            " SELECT n, 'note', 'letter-' || n, '', 1, 1, 'expired', zeroblob(1000) FROM n"
        )
        content = bytearray(self.database.read_bytes())
        page = content.index(b"letter-45") // 4096 * 4096
        content[page : page + 4096] = b"\xa5" * 4096
        self.database.write_bytes(content)
        spool = self.open()
        self.assertIsNone(self.wait(spool.open()).set_aside)
        self.close(spool)

    def test_tools(self) -> None:
        """verify names the damage, what would change the spool refuses, repair mends it."""
        for statement in ("DELETE FROM counter", "UPDATE counter SET next_event = 'abc'"):
            self.tamper(statement)
            (problem,), report = self.verified(status=1)
            self.assertIn("the totals are damaged", problem["text"])
            self.assertEqual(report["totals"]["events"], 3)
            self.assertEqual(self.ids("events"), ["e1", "e2", "e3"])
            self.assertIn("the totals are damaged (nothing was changed", self.refused("drop", "e1", "--yes"))
            done = self.rows("repair")
            self.assertEqual((done[0]["done"], done[0]["events"], done[-1]["count"]), ("set_aside", 3, 1))
            self.verified()

    def test_newer(self) -> None:
        """verify says which version has written a spool that is too new, wherever that stands."""
        self.tamper(f"PRAGMA user_version = {schema.VERSION + 7}")
        (problem,), report = self.verified(status=1)
        self.assertEqual((problem["reason"], report["version"]), ("newer", schema.VERSION + 7))

    def test_numbers_that_are_in_use(self) -> None:
        """Next numbers that are too low are raised by the start, once: all is accepted, and nothing is set aside."""
        said: list[str] = []
        observer = lambda event: said.append(event["event"]) if "event" in event else None  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.tamper("UPDATE counter SET next_event = 2, next_state = 0")
        spool = self.open()
        self.assertIsNone(self.wait(spool.open()).set_aside)
        self.assertIn("spool.numbers-raised", said)
        self.close(spool)
        said.clear()
        spool = self.open()
        self.put(spool, "new")
        self.wait(spool.outbox.put(lane=Lane.STATE, kind="inventory", id="s2", body=b"[2]", key="other"))
        self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3", "new"])
        self.assertEqual(spool.outbox.stats.states, 2)
        self.close(spool)
        self.assertEqual(said, [])
        self.verified()

    def test_letters_that_are_not_there(self) -> None:
        """Totals that tell of too many dead letters do not stop a lane when the next one is added."""
        self.tamper("UPDATE counter SET dead_letters = 5000")
        spool = self.open(max_dead_letters=10)
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "expired"))
        self.assertEqual(self.put(spool, "new"), [seq + 1])


class RowTests(Meddled):
    """Rows of other types than any agent writes."""

    def meddle(self, *statements: str) -> None:
        """Change rows without the table's constraints, for damage knows none."""
        db = sqlite3.connect(self.database)
        (schema,) = db.execute("PRAGMA schema_version").fetchone()
        for lax in (True, False):
            db.execute("PRAGMA writable_schema = ON")
            with db:
                if lax:
                    db.execute("CREATE TEMP TABLE strict AS SELECT name, sql FROM main.sqlite_master")
                    db.execute("UPDATE main.sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")
                else:
                    db.execute(
                        "UPDATE main.sqlite_master SET sql = (SELECT s.sql FROM temp.strict s"
                        " WHERE s.name = sqlite_master.name)"
                    )
            schema += 1
            db.execute(f"PRAGMA schema_version = {schema}")
            if lax:
                for statement in statements:
                    with db:
                        db.execute(statement)
        db.close()

    def test_lane_goes_on(self) -> None:
        """An event without a body, without a kind or with a number for a body becomes a dead letter; the others go."""
        for column, value in (("body", "NULL"), ("kind", "NULL"), ("body", "42"), ("accepted_at", "NULL")):
            self.meddle(f"UPDATE entry SET {column} = {value} WHERE id = 'e2'")
            spool = self.open()
            self.assertEqual(self.handed_out(spool), ["e1", "e3"], column)
            (letter,) = self.wait(spool.outbox.dead_letters(1))
            self.assertEqual((letter.id, letter.reason), ("e2", "damaged"))
            self.close(spool)
            shutil.rmtree(self.directory)
            self.fill()

    def test_command(self) -> None:
        """A command whose body is none does not stop the start: it is reported as interrupted."""
        for value in ("NULL", "'text'"):
            self.meddle(f"UPDATE command SET body = {value} WHERE id = 'c2'")
            spool = self.open()
            opened = self.wait(spool.open())
            self.assertEqual([command.id for command in opened.interrupted], ["c2"])
            self.close(spool)


class NamesTests(Meddled):
    """Names of the spool's files that something else has."""

    def test_directories(self) -> None:
        """A directory in the place of a file gets out of the way with a line in the log, and the start is as ever."""
        said: list[str] = []
        observer = lambda event: said.append(event["path"]) if event.get("event") == "spool.name-cleared" else None  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        endings = (".building", ".image", ".plan", ".plan.new", "-journal", "-shm")
        endings += (".building-wal", ".building-shm", ".image-wal", ".image-journal")
        beside = [f"{files.DATABASE}{ending}" for ending in endings]
        for name in (files.MARK, ballast.NAME, *beside):
            path = self.directory / name
            path.unlink(missing_ok=True)
            path.mkdir()
            (path / "somebody's").touch()
            spool = self.open()
            self.assertIsNone(self.wait(spool.open()).set_aside, name)
            self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3"], name)
            (seq,) = self.put(spool, "new")
            self.assertEqual(spool.trouble, "", name)
            self.wait(spool.outbox.forget([seq]))
            self.close(spool)
            self.assertEqual(said, [str(path)])
            self.assertEqual(len(list(self.directory.glob(f"{name}.*.no-file/*"))), 1)
            said.clear()

    def test_links(self) -> None:
        """A link in the place of a file is refused by all, for SQLite would keep the log where the file is."""
        for name in (files.DATABASE, f"{files.DATABASE}-wal", files.LOCK):
            for target in (self.directory.parent / f"elsewhere-{name}", Path("/nonexistent/file")):
                path = self.directory / name
                path.touch()
                if target.parent.exists():
                    path.rename(target)
                else:
                    path.unlink()
                path.symlink_to(target)
                self.refused_by_all(path, f"{path} is a symbolic link to {target}", looking=name != files.LOCK)
                self.assertEqual(target.exists(), target.parent.exists())
                path.unlink()
                if target.exists():
                    target.rename(path)
            shutil.rmtree(self.directory)
            self.fill()
        moved = self.directory.parent / "moved"
        self.directory.rename(moved)
        self.directory.symlink_to(moved)
        self.verified()
        spool = self.open()
        self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3"])
        self.close(spool)

    def test_pipes(self) -> None:
        """What would be waited for without end is refused at once."""
        for name in (files.DATABASE, f"{files.DATABASE}-wal", files.LOCK):
            path = self.directory / name
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            self.refused_by_all(path, f"{path} is not a file", looking=name != files.LOCK)
            shutil.rmtree(self.directory)
            self.fill()

    def refused_by_all(self, path: Path, sentence: str, *, looking: bool) -> None:
        with self.assertRaises(SpoolUnusable) as refused:
            self.open()
        self.assertIn(sentence, str(refused.exception))
        for arguments in (["drop", "--all", "events", "--yes"], ["repair"], *[["ls"], ["verify"]][: 2 * looking]):
            self.assertIn(sentence, self.run_tool(*arguments, status=1)[1], arguments)

    def test_lock_file_that_was_removed(self) -> None:
        """Who finds the lock free, but not the database, is refused for good, and touches nothing: agents and tools."""
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self.database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.addCleanup(holder.communicate)
        assert holder.stdout is not None
        self.assertEqual(holder.stdout.readline(), b"open\n")
        files.mark(str(self.directory), "by the test")
        Path(f"{self.database}-wal").write_bytes(bytes(5000))
        content = {path.name: path.read_bytes() for path in self.directory.glob(f"{files.DATABASE}*")}
        with self.assertRaises(SpoolLocked) as refused:
            self.open()
        self.assertIn("is in use by a process that does not hold spool.lock", str(refused.exception))
        self.assertEqual(content, {path.name: path.read_bytes() for path in self.directory.glob(f"{files.DATABASE}*")})
        for arguments in (["drop", "--all", "events", "--yes"], ["requeue", "--all"], ["repair"]):
            complaint = self.run_tool(*arguments, status=1)[1]
            self.assertIn("is in use by a process that does not hold spool.lock", complaint)
            self.assertIn("stop the agent first", complaint)
        left = {path.name: path.read_bytes() for path in self.directory.glob(f"{files.DATABASE}*")}
        self.assertEqual(content, left)

    def test_other_program(self) -> None:
        """A database that only SQLite knows to be in use is refused for good as well, and not tried again for ever."""
        with closing(sqlite3.connect(self.database, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with self.assertRaises(SpoolLocked) as refused:
                self.open()
        self.assertIn("in use by another program", str(refused.exception))
        self.close(self.open())
