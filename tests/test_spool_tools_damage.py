"""``commsmgr spool`` on databases that are damaged in every way: a sentence and an exit status, never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from contextlib import suppress as ignoring  # trial takes a suppress in a test module for its own
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from commsmgr import config
from commsmgr.cli import main
from commsmgr.errors import SpoolError, SpoolWriteFailed
from commsmgr.spool import Lane, Spool, ballast, files, wal
from commsmgr.spool.books import Books
from commsmgr.spool.executor import InlineExecutor
from commsmgr.spooltool import snapshot
from tests.faulty_vfs import FaultyVFS, Operation
from tests.test_spool_tools import Tools

SEEDS = range(10)
"""More take more time and find what these do; thousands were run when this was written."""

LOOKING = (["ls"], ["ls", "states"], ["ls", "dead"], ["ls", "commands"], ["ls", "losses"], ["show", "e1"], ["export"])
CHANGING = (
    ["requeue", "--all"],
    ["requeue", "d1"],
    ["drop", "e1", "inventory", "d2", "--yes"],
    ["drop", "--all", "events", "--yes"],
    ["drop", "--all", "states", "--yes"],
    ["drop", "--all", "dead", "--yes"],
)

VALUES: tuple[Any, ...] = (
    None, b"", b"\xff\x00\xfe", "text", "", "x" * 10_000, 0, -1, 1 << 56, 3 << 56, 1 << 62, -(1 << 63), 1e300,
    float("inf"), 3.5,
)  # fmt: skip


def loosened(db: sqlite3.Connection, table: str, change: Callable[[], object]) -> None:
    """Do ``change`` while the columns of ``table`` take any value, as a file that is damaged may hold any."""
    (definition,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    loose = definition.replace("NOT NULL", "").replace("CHECK (one = 1)", "")
    for text in (loose, definition):
        (version,) = db.execute("PRAGMA schema_version").fetchone()
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (text, table))
        db.execute(f"PRAGMA schema_version = {version + 1}")
        db.execute("PRAGMA writable_schema = RESET")
        if text is loose:
            change()


class Damaging(Tools):
    """A spool with something of everything, and ways to damage it."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(ballast, "SIZE", 4096)
        self.fill()
        spool = self.open()
        self.wait(spool.losses.pending_report("l1"))
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "over-age"))
        self.put(spool, "large", body=b"y" * 20_000)
        self.wait(spool.outbox.put(lane=Lane.EVENT, kind="note", id="t", body=b"", ttl=60))
        self.close(spool)
        self.whole = self.directory.parent / "whole"
        shutil.copytree(self.directory, self.whole)

    def back(self, directory: Path) -> None:
        """Have the spool as it is in ``directory``."""
        shutil.rmtree(self.directory)
        shutil.copytree(directory, self.directory)

    def set(self, table: str, column: str, value: Any, *, as_text: bool = False) -> None:
        """Put ``value`` into some row of ``table``, whatever its definition says."""
        expression = "CAST(? AS TEXT)" if as_text else "?"
        with closing(sqlite3.connect(self.database, isolation_level=None)) as db:

            def update() -> None:
                key = "reason" if table == "loss" else "rowid"
                with ignoring(sqlite3.IntegrityError):  # a primary key takes whole numbers only, whatever the file says
                    db.execute(
                        f"UPDATE OR IGNORE {table} SET {column} = {expression}"
                        f" WHERE {key} = (SELECT {key} FROM {table} LIMIT 1)",
                        (value,),
                    )

            loosened(db, table, update)

    def flip(self, random: Random, data: bytes, count: int) -> bytes:
        changed = bytearray(data)
        for _ in range(count):
            changed[random.randrange(len(changed))] = random.randrange(256)
        return bytes(changed)

    def damage(self, random: Random) -> str:
        """Damage the spool; return how, for whoever reads of a failure."""
        data = self.database.read_bytes()
        match random.choice(("bytes", "page", "end", "value", "value", "value", "row", "table", "definition")):
            case "bytes":
                count = random.choice((1, 10, 200))
                self.database.write_bytes(self.flip(random, data, count))
                return f"{count} bytes"
            case "page":
                page = random.randrange(len(data) // 4096)
                self.database.write_bytes(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])
                return f"page {page}"
            case "end":
                size = random.randrange(len(data))
                self.database.write_bytes(data[:size])
                return f"cut to {size}"
            case how:
                with closing(sqlite3.connect(self.database, isolation_level=None)) as db:
                    tables = db.execute(
                        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
                    )
                    table = random.choice([name for (name,) in tables])
                    columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info ({table})")]
                    column = random.choice(columns)
                    if how == "row":
                        db.execute(f"DELETE FROM {table}")
                    elif how == "table":
                        db.execute(f"DROP TABLE {table}")
                    elif how == "definition":
                        db.execute("PRAGMA writable_schema = ON")
                        old = random.choice([column, "INTEGER", "TEXT", "("])
                        new = random.choice([b"X", b"", b"\xe1", b")"])
                        db.execute(
                            "UPDATE sqlite_master SET sql = CAST(replace(sql, ?, CAST(? AS TEXT)) AS TEXT)"
                            " WHERE name = ?",
                            (old, new, table),
                        )
                if how == "value":
                    value = random.choice((*VALUES, b"\xffA"))
                    self.set(table, column, value, as_text=value == b"\xffA")
                    return f"{table}.{column} = {value!r}"[:200]
                return f"{how} {table}.{column}"

    def tried(self, *arguments: str) -> tuple[int, str]:
        """Run the tool on what may be damaged; return its exit status and its complaint."""
        stdout, stderr = StringIO(), StringIO()
        status = main(["spool", *arguments, "--path", str(self.directory)], stdout, stderr)
        complaint = stderr.getvalue()
        self.assertIn(status, (0, 1))
        self.assertNotIn("a fault of this program", complaint)
        if complaint or (status and arguments[0] != "verify"):
            self.assertRegex(complaint, r"\Acommsmgr: [^\n]+\n\Z")
            self.assertEqual(status, 1)
        return status, complaint


class Fuzzed(Damaging):
    """Damage of random kinds."""

    def test_random_damage(self) -> None:
        """Whatever is damaged, each command ends with a status and a sentence; what was repaired has no fault."""
        for seed in SEEDS:
            random = Random(seed)
            self.back(self.whole)
            how = [self.damage(random)]
            try:
                self.all_commands()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {how}") from error

    def all_commands(self) -> None:
        damaged = self.directory.parent / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.directory, damaged)
        for arguments in (["verify"], *LOOKING):
            self.tried(*arguments)
        for arguments in CHANGING:
            self.tried(*arguments)
            self.back(damaged)
        if not self.tried("repair")[0]:
            self.assertEqual(self.tried("verify")[0], 0)
            for arguments in LOOKING:
                if arguments != ["show", "e1"]:  # it may be lost
                    self.assertEqual(self.tried(*arguments)[0], 0)
        self.back(damaged)
        self.start()

    def start(self) -> None:
        """The agent starts with it, or is told why not by an error of ours."""
        settings = config.Spool(path=str(self.directory), durability="normal")
        spool = Spool(settings, reactor=self.clock, wall=lambda: self.now, executor=InlineExecutor(self.clock))
        try:
            self.wait(spool.open())
            self.put(spool, "new")
            self.handed_out(spool)
            self.wait(spool.losses.pending_report("l2"))
        except SpoolError:
            self.assertIn(files.beginning(str(self.database), wal.part), files.NOT_OURS)
        self.wait(spool.close())


class Rows(Damaging):
    """Rows that hold what they cannot."""

    def test_dead_letters(self) -> None:
        """A dead letter of wrong types is listed as damaged among the others, is not sent again, and can be dropped."""
        with closing(sqlite3.connect(self.database, isolation_level=None)) as db:
            change = "UPDATE dead_letter SET {} WHERE id = '{}'"
            loosened(db, "dead_letter", lambda: db.execute(change.format("body = NULL", "d1")))
            loosened(db, "dead_letter", lambda: db.execute(change.format("seq = 'x'", "d4")))
            loosened(db, "dead_letter", lambda: db.execute(change.format("kind = x'00', reason = NULL", "d2")))
        rows = {row["id"]: row for row in self.rows("ls", "dead")}
        self.assertEqual(set(rows), {"d1", "d2", "d3", "d4"})
        self.assertEqual([name for name, row in rows.items() if row.get("damaged")], ["d4", "d2", "d1"])
        self.assertIn("d1 is damaged", self.refused("requeue", "d3", "d1"))
        self.assertIn("d2 is damaged", self.refused("requeue", "d3", "d2"))
        self.assertEqual(self.rows("requeue", "--all")[0]["left"], 3)
        self.assertEqual([row["id"] for row in self.rows("drop", "d1", "d2", "d4", "--yes")], ["d1", "d2", "d4"])
        self.assertEqual(self.ids("dead"), [])

    def test_waiting_without_body(self) -> None:
        """An event whose body is gone is dropped as one of no bytes, alone and with all the others."""
        for arguments in (["e1"], ["--all", "events"]):
            self.back(self.whole)
            self.set("entry", "body", None)
            self.assertIn("damaged", self.rows("export", "events")[0])
            self.rows("drop", *arguments, "--yes")

    def test_losses(self) -> None:
        """A loss that cannot be is listed as damaged, found by verify, and counts as one of unknown kind."""
        for column, value in (("n", "many"), ("n", 0), ("n", 1 << 62), ("kind", b"\x00"), ("last_at", float("inf"))):
            self.back(self.whole)
            self.set("loss", column, value)
            self.assertEqual([row.get("damaged") for row in self.rows("ls", "losses")], [None, None, True])
            problems, _ = self.verified(status=1)
            self.assertIn("a loss by the reason over-age is damaged", "".join(each["text"] for each in problems))
            self.rows("repair")
            self.verified()
            left = [(row["reason"], row["kind"], row["count"]) for row in self.rows("ls", "losses")]
            self.assertEqual(left[2:], [("damaged", "unknown", 1)])

    def test_losses_of_an_agent(self) -> None:
        """An agent whose losses are damaged, or their receipt's id, reports that something was lost, and the others."""
        self.rows("drop", "e1", "--yes")
        shutil.rmtree(self.whole)
        shutil.copytree(self.directory, self.whole)
        for table, column, value in (
            ("loss", "n", "many"),
            ("loss", "reason", b"\xff"),
            ("loss_receipt", "id", b"\xff"),
        ):
            self.back(self.whole)
            self.set(table, column, value, as_text=value == b"\xff")
            spool = self.open()
            if table == "loss":
                self.wait(spool.losses.forget("l1"))
            receipt = self.wait(spool.losses.pending_report("l2"))
            self.assertEqual(receipt.id, "l2")
            self.assertEqual(len(receipt.losses), 2)
            if table == "loss":
                self.assertIn("over-age", {loss.reason for loss in receipt.losses})
            self.close(spool)

    def test_wild_numbers(self) -> None:
        """An entry whose number is none is found and buried, and no number is taken after it."""
        for seq in (-5, 1 << 55, 3 << 56):
            self.back(self.whole)
            self.set("entry", "seq", seq)
            self.assertEqual(self.verified(status=1)[0][0]["problem"], "row")
            self.rows("repair")
            self.verified()
            self.assertEqual(self.put(self.open(), "new"), [11])

    def test_total_that_is_no_text(self) -> None:
        """An agent whose totals hold text, which is not even text, makes a new database of what is there."""
        self.set("counter", "events", b"\xff", as_text=True)
        self.assertIn("the totals are damaged", self.tried("requeue", "--all")[1])
        self.assertEqual(self.handed_out(self.open()), ["e1", "e2", "e3", "large", "t"])

    def test_age_that_is_none(self) -> None:
        """An agent starts although the oldest event's time is text."""
        self.set("entry", "accepted_at", "yesterday")
        spool = self.open()
        self.assertEqual(self.handed_out(spool), ["e2", "e3", "large", "t"])

    def change_page(self, table: str, change: Callable[[bytes], bytes]) -> None:
        """Change the page in which all of ``table`` is."""
        with closing(sqlite3.connect(self.database, isolation_level=None)) as db:
            (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        data = bytearray(self.database.read_bytes())
        place = slice((page - 1) * 4096, page * 4096)
        data[place] = change(bytes(data[place]))
        self.database.write_bytes(data)

    def test_not_found(self) -> None:
        """A row that a walk comes to and a look by its number does not find, for the tree is in disorder, is damage."""
        # In a leaf the places of the cells, two bytes each and in the order of the numbers, begin at the eighth byte.
        self.change_page("dead_letter", lambda page: page[:8] + page[14:16] + page[10:14] + page[8:10] + page[16:])
        self.assertEqual(len(self.ids("dead")), 4)
        for arguments in (["requeue", "--all"], ["drop", "--all", "dead", "--yes"]):
            self.assertIn("not found by its number (nothing was changed", self.refused(*arguments))
        self.rows("repair")
        self.verified()

    def test_the_others(self) -> None:
        """Where one table cannot be read the others are exported, and the complaint follows."""
        self.change_page("dead_letter", lambda page: bytes(len(page)))
        rows, complaint = self.run_tool("export", status=1)
        self.assertEqual({row["table"] for row in rows}, {"events", "states", "commands", "losses"})
        self.assertIn("not everything in", complaint)


class Files(Damaging):
    """Files that are not what they should be."""

    def all_refuse(self, part: str, commands: tuple[list[str], ...]) -> None:
        for arguments in commands:
            self.assertIn(part, self.tried(*arguments)[1], arguments)

    def test_definitions(self) -> None:
        """A table that is missing, or has another column, is damage: tools say so, and the next start mends it."""
        for statement, part in (
            ("DROP TABLE loss", "the table loss is missing"),
            ("DROP TABLE counter", "the table counter is missing"),
            ("ALTER TABLE dead_letter RENAME COLUMN reason TO reasoo", "the table dead_letter is not as it should be"),
            ("PRAGMA user_version = 0", "is not as it should be"),
        ):
            self.back(self.whole)
            self.tamper(statement)
            self.all_refuse(part, (*LOOKING, *CHANGING))
            self.assertIn(part, "".join(each["text"] for each in self.verified(status=1)[0]))
            spool = self.open()
            self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3", "large", "t"])
            self.close(spool)
            self.assertEqual(len(self.verified()[1]["set_aside"]), 1)

    def test_definition_that_is_no_text(self) -> None:
        """Where SQLite would quote bytes that are no text, its complaint is not the tool's end, nor the agent's."""
        for whole, broken, part in (
            (b"CREATE TABLE entry", b"CR\xe1ATE TABLE entry", "the definitions of the tables are damaged"),
            (b"offered INTEGER", b"off\xe1red INTEGER", "the table command is not as it should be"),
        ):
            self.back(self.whole)
            self.database.write_bytes(self.database.read_bytes().replace(whole, broken))
            self.all_refuse(part, (*LOOKING, *CHANGING))
            self.verified(status=1)
            spool = self.open()
            self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3", "large", "t"])
            self.close(spool)

    def test_directories(self) -> None:
        """A directory in the place of the database, or of its log, is told."""
        for name in (files.DATABASE, f"{files.DATABASE}-wal"):
            self.back(self.whole)
            path = self.directory / name
            path.unlink(missing_ok=True)
            path.mkdir()
            self.all_refuse(str(path), (["verify"], *LOOKING, *CHANGING, ["repair"]))

    def test_lock(self) -> None:
        """A directory in the place of the lock is told by what would take it; looking needs no lock."""
        lock = self.directory / files.LOCK
        lock.unlink()
        lock.mkdir()
        self.all_refuse(str(lock), (*CHANGING, ["repair"]))
        self.assertEqual(len(self.rows("ls")), 5)

    def test_one_line(self) -> None:
        """A complaint is one line, and steers no terminal, whatever it quotes."""
        self.assertIn(r"is called a\nb\x1b[2J", self.refused("show", "a\nb\x1b[2J"))

    def test_defect(self) -> None:
        """A defect of the tool's own is a sentence too, with its place, and the database is as it was."""

        def defect(*arguments: object) -> None:
            raise ZeroDivisionError("what nobody\nthought of")

        self.patch(Books, "bury", defect)
        complaint = self.refused("drop", "e1", "--yes")
        self.assertIn("a fault of this program, which please report: ZeroDivisionError", complaint)
        self.assertIn(f"at {Path(__file__).name}:", complaint)
        self.patch(snapshot, "prepare", lambda *a, **k: sqlite3.connect(":memory:").execute("nonsense"))
        self.assertIn("the copy of it that is read, cannot be used: near", self.refused("ls"))


class Sectors(Damaging):
    """Sectors that the disk cannot read any more."""

    def setUp(self) -> None:
        super().setUp()
        vfs = FaultyVFS()
        vfs.install()
        self.addCleanup(vfs.uninstall)
        self.disk = vfs.disk(str(self.directory), Random(1))
        self.bad: tuple[int, int] | None = None
        genuine = wal.part

        def part(file: BinaryIO, start: int, size: int) -> bytes:
            if self.is_bad(os.fstat(file.fileno()), start, size):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return genuine(file, start, size)

        def asked(operation: Operation) -> int:
            place = operation.offset, operation.size
            bad = operation.kind == "read" and self.is_bad(os.stat(operation.path), *place)
            return sqlite3.SQLITE_IOERR_READ if bad else sqlite3.SQLITE_OK

        self.patch(wal, "part", part)
        self.disk.hook = asked

    def is_bad(self, status: os.stat_result, start: int, size: int) -> bool:
        if self.bad is None or status.st_ino != self.bad[0]:
            return False
        return start - 4096 < self.bad[1] < start + size

    def spoil(self, path: Path, page: int) -> None:
        """Have a page of the file at ``path`` unreadable, and of no use to whom it is given all the same."""
        with open(path, "r+b") as file:
            file.seek(page * 4096)
            file.write(b"\xee" * min(4096, path.stat().st_size - page * 4096))
        self.bad = path.stat().st_ino, page * 4096

    def mended(self) -> list[str]:
        """Repair; return the names of the events that were taken over, when all others are told as lost."""
        rows = self.rows("repair")
        if rows[0]["done"] != "set_aside":  # nobody needs this page
            self.verified()
            return self.ids("events")
        self.assertTrue((self.directory / rows[0]["name"]).exists())
        if rows[0]["events"] + rows[0]["states"] + rows[0]["commands"] < 7:
            self.assertGreater(rows[0]["lost"], 0, rows)
        self.verified()
        spool = self.open()
        self.put(spool, "new")
        self.close(spool)
        return self.ids("events")[:-1]

    def test_database(self) -> None:
        """Whichever page of the database cannot be read, repair takes over what is in the others."""
        pages = self.database.stat().st_size // 4096
        taken = []
        for page in range(pages):
            self.bad = None
            self.back(self.whole)
            self.spoil(self.database, page)
            taken.append(self.mended())
        self.assertEqual(max(taken, key=len), ["e1", "e2", "e3", "large", "t"])
        self.assertEqual(len([each for each in taken if "large" not in each and "e1" in each]), 4, taken)
        self.assertEqual(len([each for each in taken if "e1" not in each]), 1, taken)

    def test_log(self) -> None:
        """Whichever page of the log cannot be read, repair takes over what stands before it, and behind it."""
        spool = self.open()
        for number in range(12):
            self.put(spool, f"l{number}", body=bytes(3000))
        with_log = self.directory.parent / "with-log"
        shutil.copytree(self.directory, with_log)
        self.close(spool)
        log = Path(f"{self.database}-wal")
        for page in range(0, (with_log / log.name).stat().st_size // 4096 + 1, 9):
            self.bad = None
            self.back(with_log)
            self.spoil(log, page)
            taken = self.mended()
            self.assertLessEqual({"e1", "e2", "e3", "large", "t"}, set(taken))
            self.assertGreater(len(taken), 14, page)

    def test_others(self) -> None:
        """Without repair nothing is set aside: what would look or change says what does it, and the agent waits."""
        with closing(sqlite3.connect(self.database)) as db:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entry'").fetchone()
        for page in (0, root - 1):
            self.bad = None
            self.back(self.whole)
            self.spoil(self.database, page)
            before = {path.name for path in self.directory.iterdir()}
            complaint = self.tried("drop", "e1", "--yes")[1]
            self.assertIn("can be read", complaint)
            self.assertIn("commsmgr spool repair mends it", complaint)
            with self.assertRaises(SpoolWriteFailed):
                self.open()
            self.assertEqual({path.name for path in self.directory.iterdir()}, before)


class Bounds(Damaging):
    """How many dead letters are kept."""

    def test_unknown(self) -> None:
        """Without the agent's configuration nobody knows its bounds: no dead letter gives way by the defaults."""
        count = config.Spool().max_dead_letters
        self.tamper(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO dead_letter (seq, kind, id, key, accepted_at, died_at, reason, body)"
            " SELECT -i, 'note', 'old', '', 0, 0, 'expired', x'' FROM n",
            count,
        )
        self.tamper("UPDATE counter SET dead_letters = dead_letters + ?", count)
        self.rows("drop", "e1", "--yes")
        self.assertEqual(self.verified()[1]["totals"]["dead_letters"], count + 5)
        toml = self.directory.parent / "agent.toml"
        toml.write_text(f'[spool]\npath = "{self.directory}"\n')
        self.rows("drop", "e2", "--yes", "--config", str(toml))
        self.assertEqual(self.verified()[1]["totals"]["dead_letters"], count)
