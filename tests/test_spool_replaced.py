"""A spool that is being replaced, and killed or without power at any step: it ends as if that had not been."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from twisted.logger import globalLogPublisher

from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool import Opened, ballast, files, image, schema
from commsmgr.spool.opening import Opening
from commsmgr.spool.replacing import BUILDING, PLAN
from tests.test_spool_salvage import Torn

PAGE = 4096

Files = dict[str, bytes]
"""The content of a directory, by name."""


class Stop(BaseException):
    """The process ends here."""


class Names:
    """
    What of a directory is durable, and the process that dies before its ``last``-th change of it.

    What plain code does to names, and its flushes, come through here. A name is durable when its directory was flushed
    since; what was done since may be on the disk or not, in whatever order. The content of a file is what it was when
    the file was flushed last, and nothing when it never was.

    :ivar left: what the death leaves, in each way that is possible; the first of these is for a death without a power
        cut. Empty when the process has not come so far.
    """

    def __init__(self, directory: Path, last: int) -> None:
        self.left: list[Files] = []
        self._directory = directory
        self._steps = last
        self._held: dict[int, int] = {}
        self._contents: dict[int, bytes] = {}
        self._since: list[tuple[str, str | None, int]] = []
        self._durable = self._names()
        for number, descriptor in self._held.items():
            self._contents[number] = _content(descriptor)

    @contextmanager
    def watched(self, patch: Callable[..., Any]) -> Iterator[None]:
        """Be in the way of all that plain code does to files."""
        replaced = {name: getattr(os, name) for name in ("rename", "unlink", "fsync", "open")}
        self._os_open = replaced["open"]

        def rename(source: str, target: str) -> None:
            self._step()
            number = os.stat(source, follow_symlinks=False).st_ino
            self._keep(source)
            replaced["rename"](source, target)
            self._since.append((os.path.basename(source), os.path.basename(target), number))

        def unlink(path: str) -> None:
            if os.path.lexists(path):
                self._step()
                self._keep(path)
                self._since.append((os.path.basename(path), None, os.stat(path).st_ino))
            replaced["unlink"](path)

        def fsync(descriptor: int) -> None:
            self._step()
            replaced["fsync"](descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                self._durable, self._since = self._names(), []
            else:
                self._contents[status.st_ino] = _content(self._keep(f"/proc/self/fd/{descriptor}"))

        def opened(path: str, flags: int, *mode: int) -> int:
            new = flags & os.O_CREAT and not os.path.lexists(path)
            if new:
                self._step()
            descriptor: int = replaced["open"](path, flags, *mode)
            if new:
                self._since.append(("", os.path.basename(path), os.fstat(descriptor).st_ino))
                self._keep(path)
            return descriptor

        patches = [patch(os, each.__name__, each) for each in (rename, unlink, fsync)]
        patches.append(patch(os, "open", opened))
        try:
            yield
        finally:
            for each in patches:
                each.restore()
            for descriptor in self._held.values():
                os.close(descriptor)

    def _step(self) -> None:
        self._steps -= 1
        if self._steps >= 0:
            return
        if not self.left:  # what the dead process would do to end in order is not done
            self.left = [{name: _content(self._held[number]) for name, number in self._names().items()}]
            self.left += [left for left in self.power_cuts() if left not in self.left]
        raise Stop

    def power_cuts(self) -> list[Files]:
        """Return what a power cut may leave now."""
        possible: list[Files] = []
        for chosen in _some(self._since):
            names = self._durable.copy()
            for source, target, number in chosen:
                if names.get(source) == number:
                    del names[source]
                if target is not None:
                    names[target] = number
            left = {name: self._contents.get(number, b"") for name, number in names.items()}
            if left not in possible:
                possible.append(left)
        return possible

    def _names(self) -> dict[str, int]:
        names = {}
        for entry in os.scandir(self._directory):
            self._keep(entry.path)
            names[entry.name] = entry.inode()
        return names

    def _keep(self, path: str) -> int:
        """Let a file's number mean this file as long as we ask."""
        descriptor = getattr(self, "_os_open", os.open)(path, os.O_RDONLY)
        number = os.fstat(descriptor).st_ino
        if number in self._held:
            os.close(descriptor)
        return self._held.setdefault(number, descriptor)


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _some(steps: list[Any]) -> Iterator[list[Any]]:
    """Yield what may be durable of ``steps``: each beginning, and each one missing, or alone."""
    for n in range(len(steps) + 1):
        yield steps[:n]
        yield steps[:n] + steps[n + 1 :]
        yield steps[n : n + 1]


class InterruptedTests(Torn):
    """Each test puts something unusable in place, and has the start interrupted at each of its steps."""

    def setUp(self) -> None:
        super().setUp()
        self.said: list[Any] = []
        observer = lambda event: self.said.append(event) if event.get("event") == "spool.set-aside" else None  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

    def place(self, content: Files) -> None:
        for path in self.directory.iterdir():
            path.unlink()
        for name, each in content.items():
            (self.directory / name).write_bytes(each)

    def content(self) -> Files:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}

    def outcome(self) -> tuple[Opened, Any]:
        """Start; return what was said of it, and all that must be the same however often it was interrupted."""
        opened, entries = self.start()
        losses = self.losses()
        content = self.content()
        for name in (files.DATABASE, f"{files.DATABASE}-wal", files.LOCK, ballast.NAME):
            content.pop(name, None)
        return opened, (sorted(entry.id for entry in entries), losses, content)

    def interrupt(self, original: Files, last: int) -> list[Files]:
        """Start, and die before the ``last``-th step; return what may be left."""
        self.place(original)
        names = Names(self.directory, last)
        with names.watched(self.patch):
            spool = self.spool()
            try:
                spool.open().addErrback(lambda failure: failure.trap(Stop))
                if not names.left:
                    # From here on messages are accepted.
                    for left in names.power_cuts():
                        self.assertIn(files.DATABASE, left)
                        self.assertNotIn(files.DATABASE + PLAN, left)
                    self.successResultOf(spool.close())
            except Stop:
                pass
        return names.left

    def sweep(self) -> Any:
        """Interrupt what is to be done with the present content; return what an uninterrupted start ends with."""
        original = self.content()
        opened, expected = self.outcome()
        (said,) = self.said
        steps = 0
        while True:
            self.said.clear()
            states = self.interrupt(original, steps)
            if not states:
                break
            before = len(self.said)
            for number, state in enumerate(states):
                where = f"step {steps}, state {number}: {sorted(state)}"
                del self.said[before:]
                self.place(state)
                again, outcome = self.outcome()
                self.assertEqual(outcome, expected, where)
                self.assertTrue(self.said, where)
                for each in self.said:
                    self.assertEqual((each["name"], each["salvaged"]), (said["name"], said["salvaged"]), where)
                if again.set_aside is not None:
                    self.assertEqual((again.set_aside, again.salvaged), (opened.set_aside, opened.salvaged), where)
                else:
                    self.assertEqual(len(self.said), before, where)
                self.assertIsNone(self.start()[0].set_aside, where)
            steps += 1
        self.assertGreater(steps, 10)
        return opened, expected

    def test_damaged(self) -> None:
        """What can be read is there once, what cannot is counted once, the originals are unchanged under one name."""
        self.fill(40)
        self.crash(10)
        with self.database.open("r+b") as file:
            file.seek((min(self.places()["e10"]) - 1) * PAGE)
            file.write(bytes(PAGE))
        self.mark()
        original = self.content()
        opened, (held, losses, aside) = self.sweep()
        self.assertIn("late9", held)
        self.assertGreater(losses, 0)
        self.assertEqual(losses, opened.salvaged.lost)
        self.assertEqual(sorted(aside.values()), sorted(original[name] for name in ("spool.db", "spool.db-wal")))

    def test_missing(self) -> None:
        """The same for a log whose database is missing."""
        self.fill(40)
        self.crash(10)
        self.database.unlink()
        _, (held, _, _) = self.sweep()
        self.assertIn("late9", held)

    def test_newer(self) -> None:
        """A newer version's spool is set aside whole, and nothing of it is taken over or counted."""
        self.fill(40)
        self.crash(10)
        content = self.database.read_bytes()
        self.database.write_bytes(content[:60] + (schema.VERSION + 1).to_bytes(4, "big") + content[64:])
        original = self.content()
        opened, (held, losses, aside) = self.sweep()
        self.assertEqual((held, losses, opened.salvaged), ([], 0, None))
        name = os.path.basename(opened.set_aside)
        self.assertEqual(aside, {name: original["spool.db"], f"{name}-wal": original["spool.db-wal"]})

    def test_first(self) -> None:
        """Where there was no spool at all, an interrupted start leaves nothing that looks like a damaged one."""
        steps = 0
        while states := self.interrupt({}, steps):
            for state in states:
                self.place(state)
                self.assertIsNone(self.start()[0].set_aside, (steps, sorted(state)))
            steps += 1
        self.assertGreater(steps, 4)

    def test_plan_that_is_damaged(self) -> None:
        """A plan that cannot be read is carried out where it was half done, but for what it would have said."""
        self.fill(40)
        self.database.rename(f"{self.database}{BUILDING}")
        Path(f"{self.database}{PLAN}").write_bytes(b'{"name": "../../else", "reason": "damaged"}')
        Path(f"{self.database}-wal").write_bytes(b"the old one's")
        opened, entries = self.start()
        self.assertIsNotNone(opened.set_aside)
        self.assertEqual(Path(f"{opened.set_aside}-wal").read_bytes(), b"the old one's")
        self.assertEqual(self.missing(entries), set())
        self.assertIsNone(self.start()[0].set_aside)

    def test_plan_of_nobody(self) -> None:
        """A plan that cannot be read does nothing to a database that is in its place, whatever is beside it."""
        self.fill(40)
        for building in (None, b"junk", self.pristine):
            for mark in (False, True):
                self.reset()
                Path(f"{self.database}{PLAN}").write_bytes(b"garbage")
                if building is not None:
                    Path(f"{self.database}{BUILDING}").write_bytes(building)
                if mark:
                    self.mark()
                opened, entries = self.start()
                self.assertEqual(opened.set_aside is not None, mark)
                self.assertEqual(self.missing(entries), set())
                self.assertEqual(set(self.content()) & {files.DATABASE + PLAN, files.DATABASE + BUILDING}, set())

    def test_plan_and_junk_without_a_database(self) -> None:
        """Nothing that is no database of ours comes in the place of one: the log that is left is read instead."""
        self.fill(40)
        self.crash(10)
        log = self.log.read_bytes()
        self.reset()
        self.database.unlink()
        self.log.write_bytes(log)
        Path(f"{self.database}{PLAN}").write_bytes(b"garbage")
        Path(f"{self.database}{BUILDING}").write_bytes(b"junk")
        opened, entries = self.start()
        self.assertIn(".missing", opened.set_aside or "")
        self.assertIn("late9", {entry.id for entry in entries})

    def test_plan_for_files_that_are_gone(self) -> None:
        """What nobody can find is not said to be set aside."""
        self.fill(40)
        name = f"{files.DATABASE}.20260101T000000Z.damaged"
        for there in (True, False):
            self.reset()
            plan = b'{"name":"%s","reason":"damaged","salvaged":null}' % name.encode()
            Path(f"{self.database}{PLAN}").write_bytes(plan)
            if there:
                (self.directory / name).write_bytes(b"the old one")
            opened, entries = self.start()
            self.assertEqual(opened.set_aside, str(self.directory / name) if there else None)
            self.assertEqual(self.missing(entries), set())

    def test_building_without_a_plan(self) -> None:
        """What was not finished is forgotten, and what it was made of is served."""
        self.fill(40)
        Path(f"{self.database}{BUILDING}").write_bytes(b"half")
        Path(f"{self.database}{PLAN}{files.NEW}").write_bytes(b"half")
        opened, entries = self.start()
        self.assertIsNone(opened.set_aside)
        self.assertEqual(self.missing(entries), set())
        self.assertEqual(set(self.content()), {files.DATABASE, files.LOCK, ballast.NAME})


class FoundLateTests(Torn):
    """Damage that SQLite alone finds, beside a log that it would like to fold in."""

    def ruin(self, table: str) -> None:
        """Zero the page at which ``table`` begins."""
        with closing(image.connect(str(self.database))) as db:
            (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        with self.database.open("r+b") as file:
            file.seek((root - 1) * PAGE)
            file.write(bytes(PAGE))

    def test_originals(self) -> None:
        """Wherever it is found, database and log are set aside as they were."""
        self.fill(40)
        self.crash(10)
        log = self.log.read_bytes()
        for table in ("command", "remembered", "dead_letter", "loss_receipt"):
            self.reset()
            self.log.write_bytes(log)
            self.ruin(table)
            database = self.database.read_bytes()
            opened, entries = self.start()
            self.assertIn(".damaged", opened.set_aside or "", table)
            self.assertEqual(self.missing(entries), set(), table)
            self.assertEqual(Path(opened.set_aside or "").read_bytes(), database, table)
            self.assertEqual(Path(f"{opened.set_aside}-wal").read_bytes(), log, table)

    def test_older_version(self) -> None:
        """One of an older layout is not brought up to date before it is known to be whole."""
        self.fill(40)
        first = self.patch(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        older = self.directory / "older"
        with closing(sqlite3.connect(older, isolation_level=None)) as db:
            schema.prepare(db, synchronous="OFF", in_memory=False)
        first.restore()
        older.replace(self.database)
        self.ruin("command")
        content = self.database.read_bytes()
        opened, _ = self.start()
        self.assertEqual(Path(opened.set_aside or "").read_bytes(), content)

    def test_told_by_a_later_attempt(self) -> None:
        """What an attempt has set aside that then failed is said by the one that succeeds."""
        self.fill(40)
        self.ruin("command")
        spool = self.spool()
        connect = self.patch(Opening, "connect", lambda opening: opening._connect("/nowhere/at/all", "FULL"))
        self.failureResultOf(spool.open(), SpoolWriteFailed)
        connect.restore()
        self.assertIsNotNone(self.open(spool).set_aside)
        self.successResultOf(spool.close())
