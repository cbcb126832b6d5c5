"""A spool that somebody would like to lead astray: by links in the place of its files, or by its directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from commsmgr.errors import SpoolError, SpoolUnusable
from commsmgr.spool import ballast, directory, files, image
from commsmgr.spool.replacing import BUILDING, IMAGE, PLAN
from tests.test_spool_tools import Tools

REFUSED = (files.DATABASE, f"{files.DATABASE}-wal", files.LOCK)
CLEARED = (
    files.MARK,
    ballast.NAME,
    *(f"{files.DATABASE}{ending}" for ending in (BUILDING, IMAGE, PLAN, PLAN + files.NEW)),
    *(f"{files.DATABASE}{ending}{beside}" for ending in ("", BUILDING, IMAGE) for beside in ("-journal", "-shm")),
    *(f"{files.DATABASE}{ending}-wal" for ending in (BUILDING, IMAGE)),
)


class Links(Tools):
    """Symbolic links to a file elsewhere that the agent, with its privileges, could write to."""

    def setUp(self) -> None:
        super().setUp()
        self.fill()
        self.victim = self.directory.parent / "passwd"
        self.victim.write_bytes(b"root:x:0:0:root:/root:/bin/sh\n" * 10)
        self.victim.chmod(0o644)
        self.before = self.facts()

    def facts(self) -> object:
        found = self.victim.stat()
        return self.victim.read_bytes(), found.st_mode, found.st_mtime_ns, found.st_size, found.st_ino

    def plant(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(self.victim)

    def untouched(self, name: str) -> None:
        self.assertEqual(self.before, self.facts(), name)

    def test_before_the_start(self) -> None:
        """In any name of the spool's, a link is refused or put out of the way, and the file that it leads to stays."""
        for name in REFUSED:
            path = self.directory / name
            kept = self.directory.parent / "kept"
            if path.exists():
                path.rename(kept)
            self.plant(path)
            with self.assertRaises(SpoolUnusable) as refused:
                self.open()
            self.assertIn(f"{path} is a symbolic link to {self.victim}", str(refused.exception))
            for tool in (["drop", "--all", "events", "--yes"], ["requeue", "--all"], ["repair"]):
                self.run_tool(*tool, status=1)
            self.untouched(name)
            path.unlink()
            if kept.exists():
                kept.rename(path)
        for name in CLEARED:
            self.plant(self.directory / name)
            spool = self.open()
            self.put(spool, f"after {name}")
            self.close(spool)
            self.untouched(name)
            self.assertFalse((self.directory / name).is_symlink(), name)

    def test_while_it_runs(self) -> None:
        """What is written while the agent runs follows no link either, and takes no other file for the spool's."""
        spool = self.open()
        database = str(self.database)
        room = ballast.Ballast(str(self.directory))
        room.drop()
        for name, write in (
            (ballast.NAME, room.restore),
            (files.MARK, lambda: files.mark(str(self.directory), "damaged")),
            (f"{files.DATABASE}{PLAN}{files.NEW}", lambda: files.write(database + PLAN, b"plan")),
            (f"{files.DATABASE}{BUILDING}", lambda: files.create(database + BUILDING)),
            (f"{files.DATABASE}{IMAGE}", lambda: image.make(database, database + IMAGE, bytes(4096), use_log=True)),
        ):
            self.plant(self.directory / name)
            self.patch(image, "_has_schema", lambda *_: False)  # so that a copy is needed
            try:
                self.assertFalse(write(), name)
            except OSError as error:
                self.assertTrue(files.cannot_heal(error), name)
            self.untouched(name)
            (self.directory / name).unlink(missing_ok=True)
        self.assertTrue(room.restore(), "without the link")
        self.close(spool)

    def test_moved_while_it_runs(self) -> None:
        """A database that is moved, with a link left in its place, is no longer the one that was opened."""
        spool = self.open()
        moved = self.directory.parent / "moved"
        self.database.rename(moved)
        self.database.symlink_to(moved)
        self.assertRaises(SpoolError, self.put, spool, "e4")
        self.assertIn("removed or replaced", spool.trouble)
        self.database.unlink()
        moved.rename(self.database)


class Directory(Tools):
    """Who may write to it, and who it belongs to."""

    def refused(self, *words: str) -> None:  # type: ignore[override]  # another question than the tools'
        with self.assertRaises(SpoolUnusable) as refused:
            self.open()
        for word in words:
            self.assertIn(word, str(refused.exception))

    def test_made(self) -> None:
        """It and what is missing above it are made for the owner alone, whatever the umask."""
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        home = self.directory
        self.directory = home / "a" / "b"
        self.close(self.open())
        for path in (home, home / "a", self.directory):
            self.assertEqual(0o700, stat.S_IMODE(path.stat().st_mode), path)
        for path in self.directory.iterdir():
            self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode), path)

    def test_kept(self) -> None:
        """One that others may only look into was made so on purpose, and stays as it is."""
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.close(self.open())
        self.assertEqual(0o755, stat.S_IMODE(self.directory.stat().st_mode))

    def test_writable_by_others(self) -> None:
        """One that others can write to is refused with the mode and the cure, and not a file is made in it."""
        self.directory.mkdir()
        for mode in (0o770, 0o707, 0o777, 0o1777, 0o720):
            self.directory.chmod(mode)
            self.refused(f"{self.directory} has mode {mode:04o}", f"chmod 700 {self.directory}")
            self.assertEqual([], os.listdir(self.directory))

    def test_writable_by_others_later(self) -> None:
        """The tools that change a spool refuse it as the agent does; those that only look do not."""
        self.fill()
        self.directory.chmod(0o777)
        for tool in (["drop", "--all", "events", "--yes"], ["requeue", "--all"], ["repair"]):
            self.assertIn("has mode 0777", self.run_tool(*tool, status=1)[1])
        self.assertEqual(6, len(self.rows("ls", "events")) + len(self.rows("ls", "dead")))

    def test_of_another_user(self) -> None:
        """One of somebody else's is refused, also by the superuser, with both users and the cure."""
        self.directory.mkdir(mode=0o700)
        user = os.geteuid()
        self.patch(os, "geteuid", lambda: user + 1)
        self.refused(f"belongs to user {user}", f"runs as user {user + 1}", f"chown -R {user + 1} {self.directory}")
        self.assertEqual([], os.listdir(self.directory))

    def test_link(self) -> None:
        """It may be a link of our own or root's (as systemd makes), to a directory of ours; not one of another user."""
        target = self.directory.parent / "target"
        target.mkdir(mode=0o700)
        self.directory.symlink_to(target)
        self.close(self.open())
        real, owner = os.lstat, 0
        is_link = lambda path: str(path) == str(self.directory)  # noqa: E731

        def lstat(path: str) -> os.stat_result:
            found = real(path)
            return os.stat_result((*found[:4], owner, *found[5:])) if is_link(path) else found

        self.patch(os, "lstat", lstat)
        self.close(self.open())
        owner = os.geteuid() + 1
        before = sorted(os.listdir(target))
        self.refused(
            f"{self.directory} is a symbolic link that user {owner} has made", f"spool.path to {target} itself"
        )
        self.assertEqual(before, sorted(os.listdir(target)))

    def test_link_to_what_others_can_write_to(self) -> None:
        """What counts of a link's target is what counts of a directory."""
        target = self.directory.parent / "target"
        target.mkdir()
        target.chmod(0o777)
        self.directory.symlink_to(target)
        self.refused("has mode 0777")

    def test_no_directory(self) -> None:
        """A file or a dangling link in its place is an error of the system's own, and nothing is made."""
        self.directory.write_bytes(b"")
        self.assertRaises(FileExistsError, directory.make, str(self.directory))
        self.directory.unlink()
        self.directory.symlink_to(self.directory.parent / "nowhere")
        self.assertRaises(FileExistsError, directory.make, str(self.directory))
        self.refused("cannot be used")
        self.assertEqual(["spool"], os.listdir(self.directory.parent))
