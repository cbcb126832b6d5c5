"""What an agent leaves on disk is for its owner alone, whatever the umask and whoever runs it: in real processes."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

from tests.processes import ROOT, ProcessTestCase, Program, pause

UMASKS = ("000", "022")


def shared(top: Path) -> list[str]:
    """Return what is below ``top`` that others than the owner may read, write or enter."""
    found = []
    for path in (top, *top.rglob("*")):
        status = path.lstat()
        if not stat.S_ISSOCK(status.st_mode) and status.st_mode & 0o077:
            found.append(f"{path.relative_to(top)} {stat.filemode(status.st_mode)}")
    return found


class Files(ProcessTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.home = self.directory / "home"

    def with_umask(self, umask: str, *command: str) -> Program:
        """Start ``command`` as a shell would, that was told of ``umask``."""
        return self.start("/bin/sh", "-c", f'umask {umask}; exec "$@"', "sh", *command)

    def agent(self, umask: str, *options: str, config: str) -> Program:
        twistd = "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"
        files = (f"--logfile={self.home}/agent.log", f"--pidfile={self.home}/agent.pid")
        return self.with_umask(umask, sys.executable, "-c", twistd, *files, *options, "commsmgr", "--config", config)

    def set_up_home(self) -> None:
        """Make a directory with a spool in it that has to be set aside."""
        self.home.mkdir(mode=0o700)
        (self.home / "spool").mkdir(mode=0o700)
        (self.home / "spool" / "spool.db").touch(mode=0o600)
        (self.home / "spool" / "spool.db").write_bytes(b"no database at all" * 100)

    async def logged(self, words: str) -> None:
        log = self.home / "agent.log"
        while not (log.exists() and words in log.read_text()):
            await pause(0.02)

    async def used(self, url: str, process: int) -> None:
        """Have the agent write whatever it writes: what was set aside, a log of SQLite's, a new log file."""
        await self.logged("link.registered")
        status, body = await self.fetch(f"{url}/api/commands", {"machine_id": "m-1", "type": "ping"})
        self.assertEqual(201, status, body)
        os.kill(process, signal.SIGUSR1)
        while not (self.home / "agent.log.1").exists():
            await pause(0.02)
        await self.logged("heartbeat.answered")
        names = {path.name for path in self.home.rglob("*")}
        self.assertTrue({"agent.log", "agent.log.1", "agent.pid"} <= names, names)
        self.assertTrue({"spool.db", "spool.db-wal", "spool.lock", "spool.ballast"} <= names, names)
        self.assertTrue([name for name in names if name.endswith(".garbage")], names)
        self.assertEqual([], shared(self.home))

    async def test_foreground(self) -> None:
        """Under ``-n``, which leaves the umask to the caller: spool, what was set aside, logs, process id."""
        url = await self.backend_here()
        for umask in UMASKS:
            self.set_up_home()
            agent = self.agent(umask, "-n", config=self.configuration(url, spool={"path": f"{self.home}/spool"}))
            while not (self.home / "agent.pid").exists():
                await pause(0.02)
            await self.used(url, agent.transport.pid)
            self.assertEqual(-signal.SIGTERM, await agent.end(), agent.text)
            self.assertEqual([], shared(self.home), umask)
            self.home.rename(self.directory / f"done-{umask}")

    async def test_daemon(self) -> None:
        """As a daemon, whose log is opened before there is one."""
        url = await self.backend_here()
        self.set_up_home()
        launcher = self.agent("000", config=self.configuration(url, spool={"path": f"{self.home}/spool"}))
        self.assertEqual(0, await launcher.wait(), launcher.text)
        process = int((self.home / "agent.pid").read_text())
        await self.used(url, process)
        os.kill(process, signal.SIGTERM)
        await self.gone([process])
        self.assertEqual([], shared(self.home))

    async def test_embedded(self) -> None:
        """In somebody else's program, whose umask is its own affair: the spool, with the directories above it."""
        url = await self.backend_here()
        self.home.mkdir(mode=0o700)
        config = self.configuration(url, spool={"path": f"{self.home}/made/for/it"})
        script = str(ROOT / "tests" / "clock_agent.py")
        agent = self.with_umask("000", sys.executable, script, "epoll", config)
        while not (self.home / "made/for/it/spool.ballast").exists():
            await pause(0.02)
        self.assertEqual([], shared(self.home))
        await agent.end()
        self.assertEqual([], shared(self.home))
        self.assertEqual(["it"], os.listdir(self.home / "made" / "for"))

    async def test_log_that_is_there(self) -> None:
        """A log file that somebody has made for a group to read stays so, and so do those that follow."""
        url = await self.backend_here()
        self.home.mkdir(mode=0o700)
        log = self.home / "agent.log"
        log.touch()
        log.chmod(0o640)
        agent = self.agent("000", "-n", config=self.configuration(url))
        await self.logged("link.registered")
        agent.send(signal.SIGUSR1)
        while not (self.home / "agent.log.1").exists():
            await pause(0.02)
        await self.logged("heartbeat.answered")
        await agent.end()
        for name in ("agent.log", "agent.log.1"):
            self.assertEqual(0o640, stat.S_IMODE((self.home / name).stat().st_mode), name)

    async def test_tools(self) -> None:
        """What the tools for the spool write, and the spool that they have changed."""
        url = await self.backend_here()
        self.set_up_home()
        config = self.configuration(url, spool={"path": f"{self.home}/spool"})
        agent = self.agent("022", "-n", config=config)
        await self.logged("link.registered")
        await agent.end()
        for arguments in (
            ("export", "--output", f"{self.home}/export.jsonl"),
            ("repair",),
            ("drop", "--all", "events", "--yes"),
            ("verify",),
        ):
            tool = self.with_umask("000", sys.executable, "-m", "commsmgr", "spool", *arguments, "--config", config)
            await tool.wait()
            self.assertNotIn("Traceback", tool.text)
        self.assertTrue((self.home / "export.jsonl").exists())
        self.assertEqual([], shared(self.home))
        self.assertEqual([], os.listdir(self.temporary), "copies are gone")
