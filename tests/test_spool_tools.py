"""``commsmgr spool``: looking into a spool beside its agent, and changing it without one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from commsmgr import config
from commsmgr.cli import main
from commsmgr.spool import Accepted, Duplicate, Lane, Spool, ballast, files, lossbook, schema
from commsmgr.spool.books import Books
from commsmgr.spool.executor import InlineExecutor
from commsmgr.spool.opening import Opening
from commsmgr.spooltool import access, snapshot
from tests.command_kit import latest_event
from tests.processes import ROOT

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where spools are made: how long a disk takes is not what is tested here."""

NOW = 1_700_000_000.0
STAMP = "2023-11-14T22:13:20.000Z"

# Puts and forgets as fast as it can, with a log that begins anew all the time, until its input ends.
WRITER = """
import select, sys, time
from twisted.internet import reactor, defer, task
from commsmgr import config
from commsmgr.spool import Lane, Spool, ballast, writer
writer.CHECKPOINT_BYTES = 256 << 10
ballast.SIZE = 1 << 20
async def work():
    spool = Spool(config.Spool(path=sys.argv[1], durability="normal"), reactor=reactor, wall=time.time)
    await spool.open()
    waiting, number = [], 0
    while not select.select([0], [], [], 0)[0]:
        names = [f"e{number + each}" for each in range(10)]
        number += 10
        puts = [spool.outbox.put(lane=Lane.EVENT, kind="note", id=name, body=b"x" * 2000) for name in names]
        waiting += await defer.gatherResults(puts)
        if len(waiting) > 100:
            await spool.outbox.forget(waiting[:60])
            del waiting[:60]
        await task.deferLater(reactor, 0.005)  # else the log may begin anew faster than a busy machine copies it
        if number == 100:
            print("writing", flush=True)
    await spool.close()
task.react(lambda _: defer.Deferred.fromCoroutine(work()))
"""

# What the command line loads when it is used.
LOADED = """
import sys
from commsmgr.cli import main
status = main(["spool", "ls", "--path", sys.argv[1]])
heavy = ("twisted.internet.reactor", "treq", "autobahn", "twisted.web", "OpenSSL", "cryptography", "prometheus_client")
print(status, [name for name in heavy if name in sys.modules])
"""


def fold(db: sqlite3.Connection) -> None:
    """Have all of the log written into the database, as the agent does; that it begins anew is for the next commit."""
    _, frames, folded = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    assert 0 < frames == folded, (frames, folded)


class Tools(SynchronousTestCase):
    """A spool in a directory, an agent that comes and goes, and the command line in this process."""

    def setUp(self) -> None:
        self.patch(ballast, "SIZE", 1 << 20)
        home = tempfile.mkdtemp(prefix="commsmgr-test-", dir=MEMORY)
        self.addCleanup(shutil.rmtree, home)
        self.directory = Path(home) / "spool"
        self.database = self.directory / files.DATABASE
        self.clock = Clock()
        self.now = NOW

    def wait(self, deferred: Deferred[Any]) -> Any:
        """Have the spool do what it was asked for."""
        fired: list[Any] = []
        deferred.addBoth(fired.append)
        for _ in range(100):
            if fired:
                break
            self.clock.advance(0)
        (result,) = fired
        if isinstance(result, Failure):
            result.raiseException()
        return result

    def open(self, **options: Any) -> Spool:
        """Start the agent's side."""
        settings = config.Spool(path=str(self.directory), durability="normal", **options)  # quicker
        spool = Spool(settings, reactor=self.clock, wall=lambda: self.now, executor=InlineExecutor(self.clock))
        self.wait(spool.open())
        self.addCleanup(lambda: self.wait(spool.close()))
        return spool

    def close(self, spool: Spool) -> None:
        self.wait(spool.close())

    def put(self, spool: Spool, *names: str, kind: str = "note", body: bytes = b'{"a": 1}') -> list[int]:
        puts = [spool.outbox.put(lane=Lane.EVENT, kind=kind, id=name, body=body) for name in names]
        return [self.wait(put) for put in puts]

    def fill(self) -> None:
        """Leave a closed spool: events e1 to e3, a state, dead letters d1 to d3, an open and a finished command."""
        spool = self.open()
        for name, reason in (("d1", "refused: HTTP 404"), ("d2", "expired"), ("d3", "refused: nack")):
            (seq,) = self.put(spool, name)
            self.wait(spool.outbox.bury(seq, reason))
        self.put(spool, "e1", "e2", body=b'{"big": 12345678901234567890.10,\n "a": "\xc3\xa9"}')
        self.put(spool, "e3", body=b"\xff\x00")
        self.wait(spool.outbox.put(lane=Lane.STATE, kind="inventory", id="s1", body=b"[1]", key="inventory"))
        done = self.accept(spool, "c1")
        complete = spool.inbox.complete(key=done, command_id="c1", status="success", result_id="r1", body=b'{"r":1}')
        self.wait(complete)
        self.wait(spool.outbox.forget([self.wait(latest_event(spool))]))
        self.accept(spool, "c2")
        self.close(spool)

    def accept(self, spool: Spool, name: str) -> int:
        accepted = self.wait(spool.inbox.accept(id=name, digest="", body=b'{"type":"ping"}'))
        self.assertIsInstance(accepted, Accepted)
        return int(accepted.command.key)

    def run_tool(self, *arguments: str, status: int = 0) -> tuple[list[dict[str, Any]], str]:
        """Run ``commsmgr spool`` on the spool; return the rows it wrote and its complaint."""
        stdout, stderr = StringIO(), StringIO()
        where = () if "--config" in arguments else ("--path", str(self.directory))
        got = main(["spool", *arguments, *where], stdout, stderr)
        self.assertEqual(got, status, stdout.getvalue() + stderr.getvalue())
        return [json.loads(line) for line in stdout.getvalue().splitlines()], stderr.getvalue()

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """Run it where all is well."""
        rows, complaint = self.run_tool(*arguments)
        self.assertEqual(complaint, "")
        return rows

    def refused(self, *arguments: str, status: int = 1) -> str:
        """Run it where it must not do it: return the sentence, and see that it wrote nothing and changed nothing."""
        before = self.content()
        rows, complaint = self.run_tool(*arguments, status=status)
        self.assertEqual(rows, [])
        self.assertEqual(self.content(), before)
        return complaint

    def content(self) -> object:
        """All that is in the closed database, or its bytes when it is none."""
        if not self.database.exists():
            return None
        db = sqlite3.connect(f"file:{self.database}?mode=ro&immutable=1", uri=True)
        try:
            return list(db.iterdump())
        except sqlite3.DatabaseError:
            return self.database.read_bytes()
        finally:
            db.close()

    def ids(self, table: str) -> list[str]:
        return [row["id"] for row in self.rows("ls", table)]

    def handed_out(self, spool: Spool) -> list[str]:
        """What the agent would send now."""
        self.clock.advance(0)
        return [entry.id for entry in spool.outbox.reader(Lane.EVENT).take(1000, 1 << 30)]

    def tamper(self, statement: str, *values: Any) -> None:
        """Change the closed database behind the spool's back."""
        db = sqlite3.connect(self.database)
        with db:
            db.execute(statement, values)
        db.close()

    def verified(self, status: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the problems that verify finds, and its report."""
        *problems, report = self.run_tool("verify", status=status)[0]
        self.assertEqual(report["problems"], len(problems))
        self.assertEqual(report["ok"], not problems)
        return problems, report


class Looking(Tools):
    """ls, show and export."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()

    def test_ls(self) -> None:
        """Without a table ls lists the waiting events, the oldest first and without bodies."""
        expected = {"table": "events", "seq": 4, "kind": "note", "id": "e1", "accepted_at": STAMP, "bytes": 44}
        rows = self.rows("ls")
        self.assertEqual(rows[0], expected)
        self.assertEqual([row["id"] for row in rows], ["e1", "e2", "e3"])
        self.assertEqual(rows, self.rows("ls", "events"))
        self.assertEqual([row["id"] for row in self.rows("ls", "--limit", "2")], ["e1", "e2"])

    def test_ls_tables(self) -> None:
        """The other tables are listed in the order in which an operator wants them, each row saying what matters."""
        (state,) = self.rows("ls", "states")
        self.assertEqual((state["key"], state["id"]), ("inventory", "s1"))
        self.assertNotIn("seq", state)
        dead = [(row["id"], row["seq"], row["reason"], row["died_at"]) for row in self.rows("ls", "dead")]
        self.assertEqual(dead[0], ("d3", 3, "refused: nack", STAMP))
        self.assertEqual([row[0] for row in dead], ["d3", "d2", "d1"])
        waiting, finished = self.rows("ls", "commands")
        self.assertEqual((waiting["id"], waiting["state"]), ("c2", "waiting"))
        self.assertEqual((finished["id"], finished["state"], finished["status"]), ("c1", "finished", "success"))
        losses = {row["reason"]: row["count"] for row in self.rows("ls", "losses")}
        self.assertEqual(losses, {"refused": 2, "expired": 1})

    def test_reported_losses(self) -> None:
        """Losses that are being reported are listed with the receipt's id, beside those that came since."""
        spool = self.open()
        self.wait(spool.losses.pending_report("l1"))
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "over-age"))
        self.close(spool)
        rows = [(row.get("receipt_id"), row["reason"], row["count"]) for row in self.rows("ls", "losses")]
        self.assertEqual(sorted(rows[:2]), [("l1", "expired", 1), ("l1", "refused", 2)])
        self.assertEqual(rows[2:], [(None, "over-age", 1)])

    def test_expiry(self) -> None:
        """An event with a time of its own shows until when."""
        spool = self.open()
        self.wait(spool.outbox.put(lane=Lane.EVENT, kind="note", id="t", body=b"", ttl=60))
        self.close(spool)
        self.assertEqual(self.rows("ls")[-1]["expires_at"], "2023-11-14T22:14:20.000Z")

    def test_show(self) -> None:
        """An entry is found by id, number or key; JSON is shown as it will be sent, anything else in base64."""
        by_id, by_number = self.rows("show", "e1"), self.rows("show", "4")
        self.assertEqual(by_id, by_number)
        self.assertEqual(by_id[0]["body"], {"big": 12345678901234567890.10, "a": "é"})
        stdout = StringIO()
        main(["spool", "show", "e1", "--path", str(self.directory)], stdout, StringIO())
        self.assertIn('"body":{"big":12345678901234567890.10,"a":"é"}', stdout.getvalue())
        self.assertEqual(self.rows("show", "e3")[0]["body_base64"], "/wA=")
        self.assertEqual(self.rows("show", "inventory"), self.rows("show", "s1"))
        self.assertEqual(self.rows("show", "d1"), self.rows("show", "1"))
        self.assertEqual(self.rows("show", "c2")[0]["body"], {"type": "ping"})
        self.assertEqual(self.rows("show", "c1")[0]["result"], {"r": 1})

    def test_show_nothing(self) -> None:
        """A name that means nothing is told, with exit status 1; odd names are names like others."""
        for name in ("nobody", "99", "9" * 40, "²", "'; DROP TABLE entry; --"):
            self.assertIn(f"nothing in {self.directory} is called {name}", self.refused("show", name))
        self.assertEqual(len(self.ids("events")), 3)

    def test_export(self) -> None:
        """Everything is exported with its body, or the tables that were named, in their order."""
        rows = self.rows("export")
        tables = [row["table"] for row in rows]
        expected = ["events"] * 3 + ["states"] + ["dead"] * 3 + ["commands"] * 2 + ["losses"] * 2
        self.assertEqual(tables, expected)
        self.assertTrue(all({"body", "body_base64", "result"} & row.keys() for row in rows if row["table"] != "losses"))
        self.assertEqual(self.rows("export", "dead", "states"), rows[4:7] + rows[3:4])
        self.assertEqual(self.rows("export", "--limit", "4"), rows[:4])

    def test_export_to_file(self) -> None:
        """A file is written for its owner's eyes alone, whatever the umask, and never over another."""
        self.addCleanup(os.umask, os.umask(0))
        output = self.directory.parent / "export.jsonl"
        self.assertEqual(self.rows("export", "--output", str(output)), [
            {"done": "exported", "count": 11, "output": str(output)}
        ])  # fmt: skip
        self.assertEqual(stat.S_IMODE(output.stat().st_mode), 0o600)
        self.assertEqual([json.loads(line) for line in output.read_text().splitlines()], self.rows("export"))
        before = output.read_bytes()
        self.assertIn("exists already", self.refused("export", "--output", str(output)))
        self.assertEqual(output.read_bytes(), before)

    def test_export_breaks_off(self) -> None:
        """What could not be exported wholly leaves no file that might be taken for all."""
        output = self.directory.parent / "export.jsonl"
        self.database.write_bytes(b"")
        self.assertIn("cannot be opened (empty)", self.refused("export", "--output", str(output)))
        self.assertFalse(output.exists())

    def test_damaged_row(self) -> None:
        """A row whose checksum is wrong is shown as damaged, even with text that is no text."""
        self.tamper("UPDATE entry SET body = x'7b7d' WHERE id = 'e1'")
        self.tamper("UPDATE entry SET kind = CAST(x'ff41' AS TEXT), accepted_at = 1e300 WHERE id = 'e2'")
        first, second, third = self.rows("export", "events")
        self.assertEqual((first["damaged"], second["damaged"]), (True, True))
        self.assertEqual((second["kind"], second["accepted_at"]), ("�A", "1e+300"))
        self.assertNotIn("damaged", third)
        self.assertEqual(len(self.rows("ls")), 3)

    def test_older_layout(self) -> None:
        """A spool that an older version left is read with the present layout, and stays as it was."""
        self.database.unlink()
        db = sqlite3.connect(self.database)
        db.executescript(f"PRAGMA application_id = {schema.APPLICATION_ID}; {schema.MIGRATIONS[0]}")
        db.executescript("PRAGMA user_version = 1; PRAGMA journal_mode = WAL;")
        db.execute("INSERT INTO loss VALUES ('expired', 'note', 2, 0, 1)")
        db.commit()
        db.close()
        self.database.chmod(0o600)
        before = self.database.read_bytes()
        self.assertEqual(self.rows("ls", "losses")[0]["count"], 2)
        self.assertEqual(self.verified()[1]["version"], 1)
        self.assertEqual(self.database.read_bytes(), before)

    def test_cannot_be_opened(self) -> None:
        """A spool that is absent, damaged, foreign or too new is told as such, with what to do."""
        self.patch(schema, "VERSION", 1)
        self.patch(files, "VERSION", 1)
        self.assertIn("written by a newer commsmgr", self.refused("ls"))
        self.database.write_bytes(b"x" * 200)
        self.assertIn("cannot be opened (garbage) (commsmgr spool verify", self.refused("ls"))
        shutil.rmtree(self.directory)
        for command in (["ls"], ["show", "x"], ["export"], ["verify"], ["requeue", "--all"], ["repair"]):
            self.assertIn("there is no spool.db in", self.refused(*command))
        self.assertFalse(self.directory.exists())

    def test_damaged_within(self) -> None:
        """Where the structure breaks off within the listing, what comes before is listed and the rest is told."""
        spool = self.open()
        self.put(spool, *(f"m{n}" for n in range(300)), body=b"x" * 300)
        self.close(spool)
        data = bytearray(self.database.read_bytes())
        at = data.index(b"m250")
        page = at // 4096 * 4096
        data[page : page + 4096] = bytes(4096)
        self.database.write_bytes(data)
        rows, complaint = self.run_tool("ls", status=1)
        self.assertGreater(len(rows), 100)
        self.assertIn("not everything", complaint)
        problems, _ = self.verified(status=1)
        self.assertIn("structure", {each["problem"] for each in problems})


class Copying(Tools):
    """The copy that is read."""

    def test_beside_a_writer(self) -> None:
        """Beside a busy writer whose log begins anew all the time every look shows one moment, and none goes back."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.addCleanup(writer.wait, 20)
        self.addCleanup(writer.kill)
        assert writer.stdin is not None and writer.stdout is not None
        self.addCleanup(writer.stdout.close)
        self.assertEqual(writer.stdout.readline(), b"writing\n")
        newest, logs = 0, set()
        for turn in range(1000):
            if turn >= 50 and len(logs) > 10:  # it depends on the disk how fast the writer is
                break
            if turn % 4 == 0:
                self.verified()
            numbers = [row["seq"] for row in self.rows("ls")]
            self.assertEqual(numbers, list(range(numbers[0], numbers[-1] + 1)))
            self.assertGreaterEqual(numbers[-1], newest)
            newest = numbers[-1]
            logs.add((self.directory / "spool.db-wal").read_bytes()[16:24])
        self.assertGreater(len(logs), 10)  # of how many logs something was read
        self.assertIn(f"in use by process {writer.pid}", self.run_tool("requeue", "--all", status=1)[1])
        writer.stdin.close()
        self.assertEqual(writer.wait(20), 0)
        self.verified()

    def test_log_is_read(self) -> None:
        """What is committed and stands in the log alone is seen; nothing in the spool's directory is touched."""
        spool = self.open()
        self.put(spool, "e1")
        before = {each.name: each.stat() for each in self.directory.iterdir()}
        self.assertGreater(before["spool.db-wal"].st_size, 0)
        self.assertEqual(self.in_child("ls"), ["e1"])
        after = {each.name: each.stat() for each in self.directory.iterdir()}
        self.assertEqual(
            {name: (each.st_ino, each.st_size, each.st_mtime_ns) for name, each in before.items()},
            {name: (each.st_ino, each.st_size, each.st_mtime_ns) for name, each in after.items()},
        )

    def in_child(self, *arguments: str) -> list[str]:
        """Run the tool in a process of its own: in the agent's own the copying would drop SQLite's locks."""
        done = subprocess.run(
            [sys.executable, "-m", "commsmgr", "spool", *arguments, "--path", str(self.directory)],
            cwd=ROOT,
            capture_output=True,
            timeout=30,
            check=True,
        )
        return [json.loads(line)["id"] for line in done.stdout.splitlines()]

    def torn(self, *steps: Callable[[], object]) -> list[tuple[str, float]]:
        """
        Read in a copy that is made while ``steps`` happen, each once: before anything is copied, when half of the
        database is, and when all of it is and nothing of the log. Return the ids with what :meth:`commit` wrote.
        """
        waiting = [*steps]
        whole = snapshot._copy

        def step() -> None:
            if waiting:
                waiting.pop(0)()

        def copy(source: str, target: str) -> None:
            step()
            if not os.path.exists(source):
                whole(source, target)
                return
            with open(source, "rb", buffering=0) as file, open(target, "wb") as half:
                size = os.fstat(file.fileno()).st_size
                half.write(file.read(size // 2 + 100))
                if source.endswith(files.DATABASE):
                    step()
                half.write(file.read())

        self.patch(snapshot, "_copy", copy)
        with snapshot.readable(str(self.directory)) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            return db.execute("SELECT id, accepted_at FROM entry ORDER BY seq").fetchall()

    def agent(self) -> sqlite3.Connection:
        """Have a spool of some hundred pages open as the agent has it."""
        spool = self.open()
        self.put(spool, *(f"m{n}" for n in range(400)), body=b"x" * 1000)
        self.close(spool)
        db = sqlite3.connect(self.database, isolation_level=None)
        self.addCleanup(db.close)
        schema.prepare(db, synchronous="OFF", in_memory=False)
        return db

    def test_half_a_checkpoint(self) -> None:
        """A copy of the database that has half of a checkpoint is as good as any: the log has the other half too."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1")
        rows = self.torn(lambda: None, lambda: fold(db))
        self.assertEqual({at for _, at in rows}, {1})
        self.assertEqual(len(rows), 400)

    def test_log_begins_anew(self) -> None:
        """When the log begins anew after half of the database was copied, it is all copied once more."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1")

        def anew() -> None:
            fold(db)
            db.execute("UPDATE entry SET accepted_at = 2 WHERE id = 'm0'")

        rows = self.torn(lambda: None, anew)
        self.assertEqual(rows[0], ("m0", 2))
        self.assertEqual({at for _, at in rows[1:]}, {1})

    def test_log_is_copied_last(self) -> None:
        """What is committed and folded in between is all there, since the log is copied after the database."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1 WHERE id = 'm0'")

        def more() -> None:
            db.execute("UPDATE entry SET accepted_at = 2")
            fold(db)

        rows = self.torn(lambda: None, lambda: None, more)
        self.assertEqual({at for _, at in rows}, {2})

    def test_log_grows(self) -> None:
        """A commit whose frames were half copied is dropped whole, and the one before it is there."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1")
        log = Path(f"{self.database}-wal")
        size = log.stat().st_size
        db.execute("UPDATE entry SET accepted_at = 2")
        data = log.read_bytes()

        def shortened(source: str, target: str) -> None:
            shutil.copyfile(source, target)
            if source.endswith("-wal"):
                os.truncate(target, (size + len(data)) // 2 + 100)

        self.patch(snapshot, "_copy", shortened)
        with snapshot.readable(str(self.directory)) as copy:
            self.assertEqual(copy.execute("SELECT DISTINCT accepted_at FROM entry").fetchall(), [(1,)])

    def test_first_log(self) -> None:
        """When a log comes into being meanwhile, and goes again, it is all copied once more."""
        self.agent().close()
        self.assertFalse(Path(f"{self.database}-wal").exists())

        def run() -> None:
            db = sqlite3.connect(self.database, isolation_level=None)
            schema.prepare(db, synchronous="OFF", in_memory=False)
            db.execute("UPDATE entry SET accepted_at = 1")
            db.close()

        rows = self.torn(lambda: None, run)
        self.assertEqual({at for _, at in rows}, {1})

    def test_log_goes(self) -> None:
        """When an agent stops and takes its log with it, nothing of an earlier attempt's log is left in the copy."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1")

        def anew() -> None:
            fold(db)
            db.execute("UPDATE entry SET accepted_at = 2 WHERE id = 'm0'")

        def stop(seconds: float) -> None:
            db.execute("UPDATE entry SET accepted_at = 3")
            db.close()

        self.patch(time, "sleep", stop)
        rows = self.torn(lambda: None, anew)
        self.assertEqual({at for _, at in rows}, {3})

    def test_set_aside_meanwhile(self) -> None:
        """Between the renames of a database that is set aside and its log there seems to be none: look again."""
        db = self.agent()
        db.execute("UPDATE entry SET accepted_at = 1")
        new = self.directory / "new"
        with sqlite3.connect(new) as other:
            db.backup(other)
        other.execute("PRAGMA journal_mode = WAL")
        other.close()
        self.patch(time, "sleep", lambda seconds: (Path(f"{self.database}-wal").unlink(), new.rename(self.database)))
        rows = self.torn(lambda: self.database.rename(self.directory / "old"))
        self.assertEqual(len(rows), 400)

    def test_too_fast(self) -> None:
        """A spool that changes during every copy is told, after a bounded number of them."""
        self.fill()
        changes = iter(range(1000))
        self.patch(snapshot, "_state", lambda path: next(changes))
        self.patch(snapshot, "LONGEST_PAUSE", 0.0)
        self.assertIn("changes faster than it can be copied", self.refused("ls"))
        self.assertEqual(next(changes), 2 * snapshot.ATTEMPTS)

    def test_no_room(self) -> None:
        """Without room for the copy the sentence says which directory is meant and how to name another."""
        self.fill()

        def copyfile(source: str, target: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", source)

        self.patch(shutil, "copyfile", copyfile)
        complaint = self.refused("ls")
        self.assertIn("no room for a copy", complaint)
        self.assertIn("TMPDIR", complaint)

    def test_nothing_left(self) -> None:
        """The copies have no names any more while they are read, so that no death of the tool leaves one."""
        self.fill()
        temporary = Path(self.mktemp()).absolute()
        temporary.mkdir()
        self.patch(tempfile, "tempdir", str(temporary))
        with snapshot.readable(str(self.directory)) as db:
            self.assertEqual(db.execute("SELECT count(*) FROM entry").fetchone(), (4,))
            self.assertEqual(os.listdir(temporary), [])


class Requeueing(Tools):
    """Dead letters that are sent again."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()

    def losses(self) -> dict[str, int]:
        return {row["reason"]: row["count"] for row in self.rows("ls", "losses")}

    def test_one(self) -> None:
        """A dead letter becomes the newest event with its own id and body, and is no loss any more."""
        (row,) = self.rows("requeue", "d1")
        self.assertEqual(
            {"done": "requeued", "id": "d1", "kind": "note", "seq": 8, "bytes": 8, "loss_reported": False}, row
        )
        self.assertEqual(self.ids("events"), ["e1", "e2", "e3", "d1"])
        self.assertEqual(self.ids("dead"), ["d3", "d2"])
        self.assertEqual(self.losses(), {"refused": 1, "expired": 1})
        self.assertEqual(self.rows("show", "d1")[0]["body"], {"a": 1})
        self.verified()
        spool = self.open()
        self.assertEqual(self.handed_out(spool), ["e1", "e2", "e3", "d1"])
        self.assertEqual((spool.outbox.stats.events, spool.outbox.stats.dead_letters), (4, 2))
        self.assertEqual(spool.losses.unreported, 2)

    def test_several(self) -> None:
        """By ids and numbers, each once and in the order in which they died."""
        self.assertEqual([row["id"] for row in self.rows("requeue", "d3", "1", "d1")], ["d1", "d3"])
        self.assertEqual(self.ids("events")[3:], ["d1", "d3"])

    def test_all(self) -> None:
        """All go, or those of one reason, or so many; one row sums it up."""
        (row,) = self.rows("requeue", "--all", "--reason", "refused", "--limit", "1")
        self.assertEqual({"done": "requeued", "count": 1, "bytes": 8, "losses_reported": 0, "left": 2}, row)
        self.assertEqual(self.ids("dead"), ["d3", "d2"])
        (row,) = self.rows("requeue", "--all", "--reason", "refused")
        self.assertEqual((row["count"], self.ids("dead")), (1, ["d2"]))
        (row,) = self.rows("requeue", "--all")
        self.assertEqual((row["count"], self.ids("dead"), self.losses()), (1, [], {}))
        (row,) = self.rows("requeue", "--all")
        self.assertEqual(row["count"], 0)
        self.verified()

    def test_reported(self) -> None:
        """A loss that the backend was told of, or is being told of, stays told; a later one is taken back."""
        spool = self.open()
        self.wait(spool.losses.pending_report("l1"))
        self.now += 10
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "refused: later"))
        self.close(spool)
        self.assertTrue(self.rows("requeue", "d1")[0]["loss_reported"])
        self.assertFalse(self.rows("requeue", "d4")[0]["loss_reported"])
        self.assertEqual({(row["receipt_id"], row["reason"], row["count"]) for row in self.rows("ls", "losses")},
                         {("l1", "refused", 2), ("l1", "expired", 1)})  # fmt: skip
        self.verified()

    def test_other(self) -> None:
        """A loss that was counted under another name, for there were too many reasons, is taken back there."""
        self.patch(lossbook, "MAX_ROWS", 2)
        spool = self.open()
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "over-age"))
        self.close(spool)
        self.assertEqual(self.losses(), {"refused": 2, "expired": 1, "other": 1})
        self.assertFalse(self.rows("requeue", "d4")[0]["loss_reported"])
        self.assertEqual(self.losses(), {"refused": 2, "expired": 1})
        self.verified()

    def test_bounds(self) -> None:
        """Beyond the bounds of the configuration nothing is requeued, and the sentence says which bound."""
        toml = self.directory.parent / "agent.toml"

        def configure(bounds: str) -> None:
            toml.write_text(f"[spool]\npath = {json.dumps(str(self.directory))}\n{bounds}\n")

        configure("max_events = 5")
        complaint = self.refused("requeue", "--all", "--config", str(toml))
        self.assertIn("3 events are waiting, 3 more would exceed spool.max_events, which is 5", complaint)
        spool = self.open()
        self.put(spool, "large", body=b"x" * 930)
        self.close(spool)
        configure("max_bytes = 1027")
        complaint = self.refused("requeue", "d1", "--config", str(toml))
        self.assertIn("1020 bytes of events are waiting, 8 more would exceed spool.max_bytes, which is 1027", complaint)
        configure("max_bytes = 1028")
        self.assertEqual(self.rows("requeue", "d1", "--config", str(toml))[0]["id"], "d1")
        configure("max_events = 6")
        self.assertEqual(self.rows("requeue", "--all", "--limit", "1", "--config", str(toml))[0]["count"], 1)

    def test_refused(self) -> None:
        """A state, a damaged letter and an unknown name are refused, and with them the whole command."""
        spool = self.open()
        self.wait(spool.outbox.bury(spool.outbox.reader(Lane.STATE).take(1, 1 << 20)[0].seq, "refused"))
        (seq,) = self.put(spool, "torn")
        self.wait(spool.outbox.bury(seq, "damaged"))
        self.close(spool)
        self.assertIn("inventory is a state", self.refused("requeue", "d1", "inventory"))
        self.assertIn("torn is damaged", self.refused("requeue", "d1", "torn"))
        self.assertIn("no dead letter is called e1", self.refused("requeue", "d1", "e1"))
        (row,) = self.rows("requeue", "--all")
        self.assertEqual((row["count"], row["left"]), (3, 2))
        self.assertEqual(self.ids("dead"), ["torn", "s1"])

    def test_result(self) -> None:
        """A duplicate of the command whose result was requeued does not put the result into the lane once more."""
        spool = self.open()
        key = self.accept(spool, "c3")
        complete = spool.inbox.complete(key=key, command_id="c3", status="success", result_id="r3", body=b"{}")
        self.wait(complete)
        self.wait(spool.outbox.bury(self.wait(latest_event(spool)), "refused"))
        self.close(spool)
        self.rows("requeue", "r3")
        spool = self.open()
        duplicate = self.wait(spool.inbox.accept(id="c3", digest="", body=b"{}"))
        self.assertIsInstance(duplicate, Duplicate)
        self.assertEqual(self.handed_out(spool).count("r3"), 1)

    def test_killed(self) -> None:
        """Killed at any statement, requeue leaves all or nothing, and a spool without a fault."""
        toml = self.directory.parent / "agent.toml"
        toml.write_text(f'[spool]\npath = {json.dumps(str(self.directory))}\ndurability = "normal"\n')
        db = self.database.read_bytes()
        seen = set()
        for moment in range(1, 200):
            self.database.write_bytes(db)
            for ending in ("-wal", "-shm"):
                (self.directory / f"{files.DATABASE}{ending}").unlink(missing_ok=True)
            if not self.dies(moment, str(toml)):
                break
            totals = self.verified()[1]["totals"]
            self.assertIn((totals["dead_letters"], totals["events"]), ((3, 3), (0, 6)))
            seen.add(totals["events"])
        else:
            self.fail("it never came to its end")
        self.assertEqual(seen, {3, 6})
        self.assertGreater(moment, 30)

    def dies(self, moment: int, toml: str) -> bool:
        """Requeue all in a child that is killed before or after some statement; say whether it came so far."""
        child = os.fork()
        if not child:
            count = 0

            class Watched(sqlite3.Connection):
                def execute(self, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]  # same, less precise
                    self.tick()
                    cursor = super().execute(*values)
                    self.tick()
                    return cursor

                def tick(self) -> None:
                    nonlocal count
                    count += 1
                    if count == moment:
                        os.kill(os.getpid(), signal.SIGKILL)

            connect = sqlite3.connect
            try:
                sqlite3.connect = lambda *a, **k: connect(*a, factory=Watched, **k)  # type: ignore[assignment]
                main(["spool", "requeue", "--all", "--config", toml], StringIO(), StringIO())
            finally:
                sqlite3.connect = connect  # what counts branches keeps them in a database as well
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)

    def test_in_use(self) -> None:
        """While an agent has the spool all that would change it is refused, with its process and what to do."""
        self.open()
        for command in (["requeue", "--all"], ["drop", "e1", "--yes"], ["repair"]):
            rows, complaint = self.run_tool(*command, status=1)
            self.assertEqual(rows, [])
            self.assertIn(f"in use by process {os.getpid()} (stop the agent first", complaint)
            self.assertNotIn("Traceback", complaint)


class Dropping(Tools):
    """What an operator gives up."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()

    def test_waiting(self) -> None:
        """A waiting event or state becomes a dead letter and is counted as a loss, so that the backend will know."""
        event, state = self.rows("drop", "inventory", "e2", "--yes")
        self.assertEqual(
            (event["table"], event["id"], state["table"], state["key"]), ("events", "e2", "states", "inventory")
        )
        self.assertEqual(self.ids("events"), ["e1", "e3"])
        self.assertEqual(self.ids("states"), [])
        self.assertEqual(
            [(row["id"], row["reason"]) for row in self.rows("ls", "dead")][:2], [("s1", "dropped"), ("e2", "dropped")]
        )
        losses = {(row["reason"], row["kind"]): row["count"] for row in self.rows("ls", "losses")}
        self.assertEqual((losses["dropped", "note"], losses["dropped", "inventory"]), (1, 1))
        self.verified()
        spool = self.open()
        self.assertEqual(self.handed_out(spool), ["e1", "e3"])
        self.assertEqual(spool.losses.unreported, 5)

    def test_dead_letter(self) -> None:
        """A dead letter is deleted, and stays a loss."""
        (row,) = self.rows("drop", "d2", "--yes")
        self.assertEqual((row["table"], row["reason"]), ("dead", "expired"))
        self.assertEqual(self.ids("dead"), ["d3", "d1"])
        self.assertEqual(sum(row["count"] for row in self.rows("ls", "losses")), 3)
        self.verified()

    def test_both_at_the_bound(self) -> None:
        """A letter that is named is deleted, also when one that was named with it would have pushed it out."""
        path = self.directory.parent / "agent.toml"
        path.write_text(f'[spool]\npath = "{self.directory}"\nmax_dead_letters = 3\n')
        rows, _ = self.run_tool("drop", "e2", "d1", "--yes", "--config", str(path))
        self.assertEqual([(row["table"], row["id"]) for row in rows], [("events", "e2"), ("dead", "d1")])
        self.assertEqual(self.ids("dead"), ["e2", "d3", "d2"])
        self.assertNotIn("evicted", {row["reason"] for row in self.rows("ls", "losses")})
        self.verified()

    def test_no_utf8(self) -> None:
        """A name that is no UTF-8, as Python hands it on, is a mistake on the command line."""
        for command in (["show", "\udcff"], ["requeue", "\udcff"], ["drop", "\udcff", "--yes"]):
            self.assertIn("not UTF-8", self.refused(*command, status=2))
        self.verified()

    def test_undone(self) -> None:
        """What was dropped and requeued waits again and is no loss."""
        self.rows("drop", "e2", "--yes")
        self.rows("requeue", "e2")
        self.assertEqual(self.ids("events"), ["e1", "e3", "e2"])
        self.assertNotIn("dropped", {row["reason"] for row in self.rows("ls", "losses")})

    def test_all(self) -> None:
        """All of a table, or so many of the oldest, in however many slices; the disk gets its room back."""
        spool = self.open()
        self.put(spool, *(f"m{n}" for n in range(1200)), body=b"x" * 1000)
        self.close(spool)
        self.assertEqual(self.rows("drop", "--all", "events", "--limit", "2", "--yes")[0]["count"], 2)
        self.assertEqual(self.ids("events")[:2], ["e3", "m0"])
        self.assertEqual(self.rows("drop", "--all", "events", "--yes"), [
            {"done": "dropped", "table": "events", "count": 1201, "bytes": 1_200_002}
        ])  # fmt: skip
        self.assertEqual(len(self.ids("dead")), 1206)
        self.assertEqual(self.rows("drop", "--all", "states", "--yes")[0]["count"], 1)
        size = self.database.stat().st_size
        self.assertEqual(self.rows("drop", "--all", "dead", "--yes")[0]["count"], 1207)
        self.assertLess(self.database.stat().st_size, size / 4)
        _, report = self.verified()
        self.assertEqual((report["totals"]["events"], report["totals"]["dead_letters"]), (0, 0))

    def test_refused(self) -> None:
        """Nothing is dropped without --yes, and never a command, of which a duplicate would be run."""
        self.assertIn("nothing was dropped: say --yes", self.refused("drop", "e1", status=2))
        self.assertIn("c2 is a command", self.refused("drop", "e1", "c2", "--yes"))
        self.assertIn("is called nobody", self.refused("drop", "e1", "nobody", "--yes"))
        self.assertIn("commands cannot be dropped", self.refused("drop", "--all", "commands", "--yes", status=2))

    def test_full_disk(self) -> None:
        """On a full disk the reserved room is given up, so that something can be dropped; else nothing is changed."""
        reserve = self.directory / ballast.NAME
        real, held = access.transaction, []

        def full(books: Any, work: Any) -> Any:
            held.append(reserve.exists())
            if len(held) == 1:
                books.db.close()
                raise self.full()
            return real(books, work)

        self.patch(access, "transaction", full)
        self.rows("drop", "e1", "--yes")
        self.assertEqual(held, [True, False])

        def always(books: Any, work: Any) -> Any:
            books.db.close()
            raise self.full()

        self.patch(access, "transaction", always)
        complaint = self.refused("drop", "e2", "--yes")
        self.assertIn("cannot be written: database or disk is full (nothing was changed", complaint)

    def test_full_disk_when_mended(self) -> None:
        """Repair tells that the spool was replaced, whatever fails for want of room afterwards."""
        whole = self.database.read_bytes()
        really_open, really_do = Opening._open, access.transaction
        left = 0

        def _open(opening: Opening) -> Books:
            books = really_open(opening)
            fail(books)
            return books

        def transaction(books: Books, work: Any) -> Any:
            fail(books)
            return really_do(books, work)

        def fail(books: Books) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                books.db.close()
                raise self.full()

        for owner, failing in ((Opening, _open), (access, transaction)):
            for times in (1, 2):
                left = times
                self.database.write_bytes(b"garbage!" + whole[8:])
                patch = self.patch(owner, failing.__name__, failing)
                rows, complaint = self.run_tool("repair", status=times - 1)
                patch.restore()
                self.assertIn("garbage", rows[0]["name"])
                self.assertTrue((self.directory / rows[0]["name"]).exists())
                if times == 1:
                    self.assertEqual((rows[0]["events"], rows[-1]["done"]), (3, "repaired"))
                else:
                    self.assertEqual(len(rows), 1)
                    self.assertIn("database or disk is full (what is listed was done, and nothing else", complaint)
                self.assertEqual(self.ids("events"), ["e1", "e2", "e3"])

    def full(self) -> sqlite3.OperationalError:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        return error

    def test_owner(self) -> None:
        """Used by the superuser on another user's spool, no file comes into being that this user could not use."""
        if os.geteuid():
            raise SkipTest("needs the superuser")
        user = 65534
        outside = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, outside)
        outside.chmod(0o755)
        shutil.copytree(self.directory, outside / "spool")
        self.directory = outside / "spool"
        self.database = self.directory / files.DATABASE
        (self.directory / files.LOCK).unlink()
        for path in (self.directory, *self.directory.iterdir()):
            os.chown(path, user, user)
        owners = []
        real = access.transaction

        def watched(*arguments: Any) -> Any:
            owners.append({path.name: path.stat().st_uid for path in self.directory.iterdir()})
            self.assertEqual({path.stat().st_gid for path in self.directory.iterdir()}, {user})
            return real(*arguments)

        self.patch(access, "transaction", watched)
        self.rows("requeue", "--all")
        data = self.database.read_bytes()
        self.database.write_bytes(b"x" * 4096 + data[4096:])
        self.rows("repair")
        self.verified()
        self.assertEqual({"spool.db", "spool.db-wal", "spool.lock", "spool.ballast"}, set(owners[0]))
        owners.append({path.name: path.stat().st_uid for path in self.directory.iterdir()})
        self.assertEqual({owner for each in owners for owner in each.values()}, {user})
        self.assertEqual((os.geteuid(), os.getegid()), (0, os.getgid()))


class Mending(Tools):
    """verify and repair."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()

    def test_whole(self) -> None:
        """A spool without a fault has none, and its totals are told; there is nothing to repair."""
        problems, report = self.verified()
        self.assertEqual(problems, [])
        totals = {"events": 3, "event_bytes": 90, "states": 1, "dead_letters": 3, "dead_bytes": 24, "open_commands": 1}
        self.assertEqual(report["totals"], totals | {"remembered_bytes": 7, "losses": 3})
        self.assertEqual((report["version"], report["set_aside"]), (schema.VERSION, []))
        self.assertEqual(report["reserve_bytes"], ballast.SIZE)
        self.assertEqual(self.rows("repair"), [{"done": "repaired", "count": 0}])

    def test_rows(self) -> None:
        """Flipped bits are found in entries, commands and remembered results; repair buries what cannot be sent."""
        for statement in (
            "UPDATE entry SET body = x'7b7e' WHERE id = 'e2'",
            "UPDATE entry SET kind = CAST(x'ff' AS TEXT) WHERE id = 's1'",
            "UPDATE command SET body = x'00' WHERE id = 'c2'",
            "UPDATE remembered SET body = x'00000000000000'",
            "UPDATE counter SET event_bytes = event_bytes - 42",
        ):
            self.tamper(statement)
        problems, _ = self.verified(status=1)
        self.assertEqual([(each["problem"], each["id"]) for each in problems], [
            ("row", "e2"), ("row", "s1"), ("row", "c2"), ("row", "r1")
        ])  # fmt: skip
        done = self.rows("repair")
        self.assertEqual([(each["done"], each.get("id")) for each in done], [
            ("buried", "e2"), ("buried", "s1"), ("marked", "c2"), ("forgotten", "r1"), ("repaired", None)
        ])  # fmt: skip
        self.verified()
        self.assertEqual(
            [(row["id"], row["reason"]) for row in self.rows("ls", "dead")][:2], [("s1", "damaged"), ("e2", "damaged")]
        )
        self.assertEqual(self.ids("events"), ["e1", "e3"])
        (command,) = self.wait(self.open().open()).interrupted
        self.assertEqual((command.id, command.body), ("c2", b""))

    def test_totals(self) -> None:
        """Every total that does not agree with the rows is found and counted anew; numbers never go back."""
        wrong = (
            "events",
            "event_bytes",
            "states",
            "dead_letters",
            "dead_bytes",
            "open_commands",
            "remembered_bytes",
            "losses",
        )
        self.tamper("UPDATE counter SET next_event = 5, next_state = 1, commits = 7")
        for name in wrong:
            self.tamper(f"UPDATE counter SET {name} = {name} + 100")
        problems, report = self.verified(status=1)
        self.assertEqual({each["total"] for each in problems}, {*wrong, "next_event", "next_state"})
        self.assertEqual(report["totals"]["events"], 3)
        self.rows("repair")
        self.verified()
        spool = self.open()
        self.assertEqual(self.put(spool, "new"), [8])
        self.assertEqual((spool.outbox.stats.events, spool.inbox.open_count), (4, 1))

    def test_numbers(self) -> None:
        """A number that a dead letter has is not given again; one that was given and is forgotten is not either."""
        spool = self.open()
        (seq,) = self.put(spool, "d4")
        self.wait(spool.outbox.bury(seq, "expired"))
        self.close(spool)
        self.tamper("UPDATE counter SET next_event = ?", seq)
        (problem,), _ = self.verified(status=1)
        self.assertEqual((problem["total"], problem["right"]), ("next_event", seq + 1))
        self.tamper("UPDATE counter SET next_event = 50, events = 7")
        self.assertEqual([row.get("total") for row in self.rows("repair")], ["events", None])
        self.assertEqual(self.put(self.open(), "new"), [50])

    def test_header(self) -> None:
        """A file that cannot be opened is reported with the reason that the agent's start would give."""
        good = self.database.read_bytes()
        for data, reason in (
            (b"", "empty"),
            (b"\0" * 200, "garbage"),
            (good[:68] + b"mmoc" + good[72:], "foreign"),
            (good[:60] + b"\0\0\1\0" + good[64:], "newer"),
            (good[:100] + b"\xff" * 3996, "damaged"),
        ):
            self.database.write_bytes(data)
            (problem,), _ = self.verified(status=1)
            self.assertEqual((problem["problem"], problem["reason"]), ("file", reason))
            if reason in files.NOT_OURS:
                self.assertIn(f"is {reason}", self.refused("repair"))

    def test_salvage(self) -> None:
        """A file that cannot be opened is set aside and what can be read of it taken over, as a start does."""
        data = self.database.read_bytes()
        self.database.write_bytes(b"x" * 4096 + data[4096:])
        self.assertIn("cannot be used (garbage)", self.refused("requeue", "--all"))
        aside, *_, last = self.rows("repair")
        self.assertEqual(
            (aside["done"], aside["events"], aside["states"], last["done"]), ("set_aside", 3, 1, "repaired")
        )
        _, report = self.verified()
        self.assertEqual(report["set_aside"], [aside["name"]])
        self.assertEqual((self.ids("events"), self.ids("dead")), (["e1", "e2", "e3"], ["d3", "d2", "d1"]))

    def test_structure(self) -> None:
        """Structures that are broken within are found by both, though opening does not; what is whole is taken over."""
        self.tamper("DROP INDEX command_open")
        db = sqlite3.connect(self.database)
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'key) WHERE', 'id) WHERE') WHERE name = 'entry_key'")
        db.commit()
        db.close()
        problems, _ = self.verified(status=1)
        self.assertEqual({each["problem"] for each in problems}, {"structure"})
        self.assertEqual(self.rows("repair")[0]["done"], "set_aside")
        self.verified()
        self.assertEqual((self.ids("events"), self.ids("states")), (["e1", "e2", "e3"], ["s1"]))

    def test_marked(self) -> None:
        """Damage that an agent met while it ran is a problem, keeps others from changing anything, and is mended."""
        files.mark(str(self.directory), "database disk image is malformed")
        (problem,), _ = self.verified(status=1)
        self.assertEqual((problem["problem"], problem["reason"]), ("file", "damaged"))
        self.assertIn("found damaged (database disk image is malformed)", problem["text"])
        self.assertIn("cannot be used (damaged)", self.refused("drop", "e1", "--yes"))
        (self.directory / files.MARK).write_bytes(b"")  # as on a full disk
        self.assertIn("found damaged (nobody could write down how)", self.verified(status=1)[0][0]["text"])
        self.assertEqual([row["done"] for row in self.rows("repair")], ["set_aside", "repaired"])
        self.verified()
        Path(f"{self.database}.plan").write_bytes(b"")  # as when a start was interrupted that mended it
        (problem,), _ = self.verified(status=1)
        self.assertIn("was interrupted: the next start, or repair, ends it", problem["text"])
        self.assertIn("cannot be used (damaged)", self.refused("drop", "e1", "--yes"))

    def test_interrupted_salvage(self) -> None:
        """A start that died when the old database was out of the way, and the new one not in its place, is told so."""
        self.database.rename(f"{self.database}.building")
        name = f"{files.DATABASE}.20260101T000000Z.damaged"
        Path(f"{self.database}.plan").write_text(json.dumps({"name": name, "reason": "damaged", "salvaged": None}))
        problems, _ = self.verified(status=1)
        self.assertEqual({each["problem"] for each in problems}, {"file"})
        self.assertIn("cannot be opened (missing) (commsmgr spool verify", self.refused("ls"))
        self.rows("repair")
        self.verified()
        self.assertEqual(self.ids("events"), ["e1", "e2", "e3"])

    def test_permissions(self) -> None:
        """Files that others may read are found, and those that the agent's user may not."""
        self.database.chmod(0o644)
        (problem,), _ = self.verified(status=1)
        self.assertEqual((problem["problem"], problem["file"]), ("permissions", "spool.db"))
        self.database.chmod(0o600)
        if not os.geteuid():
            os.chown(self.directory, 65534, 65534)
            self.assertEqual({each["problem"] for each in self.verified(status=1)[0]}, {"permissions"})

    def test_room(self) -> None:
        """On a nearly full disk the reserve that was given up is a problem."""
        reserve = self.directory / ballast.NAME
        reserve.unlink()
        self.assertEqual(self.verified()[1]["reserve_bytes"], 0)
        space = os.statvfs(self.directory)
        self.patch(ballast, "SIZE", space.f_bavail * space.f_frsize)
        self.assertEqual([each["problem"] for each in self.verified(status=1)[0]], ["room"])

    def test_set_aside(self) -> None:
        """Databases that were set aside are named, their logs are not."""
        for ending in ("", "-wal"):
            (self.directory / f"spool.db.20260101T000000Z.damaged{ending}").write_bytes(b"")
        self.assertEqual(self.verified()[1]["set_aside"], ["spool.db.20260101T000000Z.damaged"])


class CommandLine(Tools):
    """The program itself."""

    COMMANDS: ClassVar = ("ls", "show", "export", "requeue", "drop", "verify", "repair")

    def say(self, *arguments: str) -> tuple[int, str, str]:
        stdout, stderr = StringIO(), StringIO()
        return main(arguments, stdout, stderr), stdout.getvalue(), stderr.getvalue()

    def test_help(self) -> None:
        """Every command explains itself, with an example, on standard output."""
        for command in ([], ["spool"], *(["spool", name] for name in self.COMMANDS)):
            status, text, complaint = self.say(*command, "--help")
            self.assertEqual((status, complaint), (0, ""))
            self.assertRegex(text, rf"example:\n  {' '.join(['commsmgr', *command])}")

    def test_version(self) -> None:
        """The version is told."""
        self.assertRegex(self.say("--version")[1], r"^commsmgr \d+\.\d+")

    def test_usage(self) -> None:
        """Mistakes on the command line are told on standard error, with exit status 2, and nothing is done."""
        self.fill()
        for arguments in (
            [],
            ["nothing"],
            ["spool"],
            ["spool", "nothing"],
            ["spool", "ls", "nothing"],
            ["spool", "ls", "--limit", "0"],
            ["spool", "ls", "--limit", "-1"],
            ["spool", "ls", "--path", "a", "--config", "b"],
            ["spool", "show"],
            ["spool", "requeue"],
            ["spool", "requeue", "d1", "--all"],
            ["spool", "requeue", "d1", "--reason", "refused"],
            ["spool", "drop", "--yes"],
            ["spool", "drop", "d1", "--all", "dead", "--yes"],
            ["spool", "drop", "d1", "--limit", "1", "--yes"],
        ):
            status, text, complaint = self.say(*arguments)
            self.assertEqual((status, text), (2, ""), arguments)
            self.assertIn("usage: commsmgr", complaint)

    def test_configuration(self) -> None:
        """Only [spool] is read: a token that is nowhere to be had keeps nobody from looking into the spool."""
        self.fill()
        toml = self.directory.parent / "agent.toml"
        toml.write_text(f'auth.token_file = "/nowhere"\n[spool]\npath = {json.dumps(str(self.directory))}\n')
        self.assertEqual(len(self.rows("ls", "--config", str(toml))), 3)
        for text, sentence in (
            ("[spool]\npaht = 1", "spool.paht: unknown key; did you mean path?"),
            ("[spool]\nmax_events = 0", "spool.max_events: expected"),
            ("spool = 1", "spool: expected a table"),
            ('[spool]\npath = ""', "spool.path: is empty"),
            ('[spool]\ndurability = "memory"', "spool.durability: is memory"),
            ("[", "not valid TOML"),
        ):
            toml.write_text(text)
            self.assertIn(f"commsmgr: {toml}: {sentence}", self.refused("ls", "--config", str(toml), status=2))
        self.assertIn("cannot be read", self.refused("ls", "--config", str(toml) + "x", status=2))

    def test_light(self) -> None:
        """Neither a reactor nor anything of the network is loaded: an answer is there at once."""
        self.fill()
        done = subprocess.run(
            [sys.executable, "-c", LOADED, str(self.directory)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        self.assertEqual(done.stdout.splitlines()[-1], "0 []")

    def test_closed_pipe(self) -> None:
        """When the reader has seen enough the program ends, and says nothing."""
        spool = self.open()
        self.put(spool, *(f"e{n}" for n in range(2000)))
        self.close(spool)
        command = [sys.executable, "-m", "commsmgr", "spool", "ls", "--path", str(self.directory)]
        program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert program.stdout is not None and program.stderr is not None
        self.assertEqual(json.loads(program.stdout.readline())["id"], "e0")
        program.stdout.close()
        self.assertEqual(program.stderr.read(), b"")
        program.stderr.close()
        self.assertEqual(program.wait(20), 0)

    def test_unreadable(self) -> None:
        """A file that may not be read is one sentence with its name, not a traceback."""
        self.fill()

        def copyfile(source: str, target: str) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", source)

        self.patch(shutil, "copyfile", copyfile)
        self.assertEqual(
            self.refused("ls"),
            f"commsmgr: {self.database}: Permission denied; run it as the agent's user, or as the superuser\n",
        )

    def test_other_user(self) -> None:
        """A user who may not look into the directory is told that, and not that there is no spool."""
        self.fill()
        self.directory.parent.chmod(0o755)
        self.directory.chmod(0)
        user = os.geteuid()
        for command in (["ls"], ["verify"], ["requeue", "--all"], ["repair"]):
            if not user:
                os.seteuid(65534)  # the superuser may look anywhere
            try:
                stdout, stderr = StringIO(), StringIO()
                status = main(["spool", *command, "--path", str(self.directory)], stdout, stderr)
            finally:
                os.seteuid(user)
            self.assertEqual((status, stdout.getvalue()), (1, ""))
            self.assertEqual(
                stderr.getvalue(),
                f"commsmgr: {self.directory}: Permission denied; run it as the agent's user, or as the superuser\n",
            )
        self.directory.chmod(0o700)

    def test_no_directory(self) -> None:
        """The database's own name in place of its directory's is told, and so is an empty name."""
        self.fill()
        for command in (["ls"], ["verify"], ["requeue", "--all"], ["repair"]):
            status, _, complaint = self.say("spool", *command, "--path", str(self.database))
            self.assertEqual(status, 1)
            self.assertIn(f"{self.database} is no directory; name the one that holds spool.db", complaint)
        self.assertEqual(self.say("spool", "ls", "--path", "")[0], 2)

    def test_no_output(self) -> None:
        """Without standard output and error the exit status tells how it went."""
        self.fill()
        for directory, status in ((self.directory, 0), (self.directory / "none", 1)):
            done = subprocess.run(
                ["/bin/sh", "-c", '"$0" -m commsmgr spool ls --path "$1" >&- 2>&-', sys.executable, str(directory)],
                cwd=ROOT,
                timeout=30,
                check=False,
            )
            self.assertEqual(done.returncode, status)
