"""Dropping privileges: ``twistd --uid`` as root; without root, that nothing is started with more than was asked for."""

from __future__ import annotations

import grp
import os
import pwd
import re
import signal
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import privileges
from commsmgr.errors import ConfigError
from tests.processes import ProcessTestCase, Program, pause

DEAF = "http://127.0.0.1:9"


class Decisions(SynchronousTestCase):
    """What can be said without becoming somebody else."""

    def test_stays(self) -> None:
        """Who was not told to change, or cannot, stays as it is."""
        self.assertIsNone(privileges.to_become({}))
        self.assertIsNone(privileges.to_become({"uid": None, "gid": 5}))
        self.patch(os, "geteuid", lambda: 1000)
        self.assertIsNone(privileges.to_become({"uid": 1001, "gid": None}))

    def test_becomes(self) -> None:
        """The group is the user's own, unless another is named; a user that does not exist is a mistake."""
        self.patch(os, "geteuid", lambda: 0)
        nobody = pwd.getpwnam("nobody")
        self.assertEqual((nobody.pw_uid, nobody.pw_gid, "nobody"), privileges.to_become({"uid": nobody.pw_uid}))
        self.assertEqual((nobody.pw_uid, 7, "nobody"), privileges.to_become({"uid": nobody.pw_uid, "gid": 7}))
        error = self.assertRaises(ConfigError, privileges.to_become, {"uid": 4_000_000_000})
        self.assertEqual("command line: --uid: there is no user 4000000000", str(error))

    def test_place(self) -> None:
        """A place for a spool is one that can be written to, or the nearest directory that is there."""
        home = Path(self.mktemp()).absolute()
        home.mkdir()
        privileges.require_place(str(home), "x")
        privileges.require_place(str(home / "a" / "b"), "x")
        self.patch(os, "access", lambda path, mode, **how: False)
        for path, words in (
            (home, f"{home} cannot be written to: as root, install -d -m 0700 -o"),
            (home / "a" / "b", f"{home}/a/b cannot be made, as {home} cannot be written to: as root, install -d"),
        ):
            error = self.assertRaises(ConfigError, privileges.require_place, str(path), "x.toml")
            self.assertIn(f"x.toml: spool.path: {words}", str(error))
            self.assertTrue(str(error).endswith(f" {path}"))


class Dropped(ProcessTestCase):
    """Real processes, as root; another user sees that it gets nothing."""

    def setUp(self) -> None:
        super().setUp()
        os.chmod(self.directory, 0o755)
        self.nobody = pwd.getpwnam("nobody")
        self.home = self.directory / "home"
        self.home.mkdir(mode=0o700)

    def give(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.nobody.pw_uid, self.nobody.pw_gid)

    def agent(self, url: str, *more: str, check: bool = False, **sections: Any) -> Program:
        sections.setdefault("spool", {"path": f"{self.home}/spool"})
        config = self.configuration(url, **sections)
        options = ("-n", "--uid=nobody", "--gid=nogroup", f"--pidfile={self.directory}/agent.pid", *more)
        return self.twistd(*options, "commsmgr", "--config", config, *(["--check"] if check else []))

    async def not_root(self) -> None:
        """Who is not root cannot become another user: nothing is started, and nothing is made."""
        program = self.agent(DEAF)
        self.assertEqual(1, await program.wait())
        self.assertEqual([], os.listdir(self.home))

    async def test_works(self) -> None:
        """The agent runs as that user with no capability left, and has spool and log, also when this begins anew."""
        if os.geteuid():
            return await self.not_root()
        self.give(self.home)
        url = await self.backend_here()
        log = self.home / "agent.log"
        agent = self.agent(url, f"--logfile={log}")
        while not (log.exists() and "link.registered" in log.read_text()):
            await pause(0.02)
        facts = dict(
            re.findall(r"^(\w+):\s+(.*)$", Path(f"/proc/{agent.transport.pid}/status").read_text(), re.MULTILINE)
        )
        group = grp.getgrnam("nogroup").gr_gid
        self.assertEqual([str(self.nobody.pw_uid)] * 4, facts["Uid"].split(), "real, effective, saved, file system")
        self.assertEqual([str(group)] * 4, facts["Gid"].split())
        self.assertEqual([str(group)], facts["Groups"].split())
        self.assertEqual({0}, {int(facts[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")})
        agent.send(signal.SIGUSR1)
        while not (self.home / "agent.log.1").exists():
            await pause(0.02)
        for path in (self.home, *self.home.rglob("*")):
            self.assertEqual((self.nobody.pw_uid, group), (path.stat().st_uid, path.stat().st_gid), path)
            self.assertEqual(0, path.stat().st_mode & 0o077, path)
        self.assertEqual(-signal.SIGTERM, await agent.end())
        self.assertNotIn("Traceback", agent.text + log.read_text())
        return None

    async def test_what_only_root_can_read(self) -> None:
        """A token, a spool or a log that only root has is a mistake, told before the start, which makes nothing."""
        if os.geteuid():
            return await self.not_root()
        token = self.directory / "token"
        token.write_text("s3cret\n")
        token.chmod(0o600)
        who = "(by the user nobody, which --uid has the agent become)"
        for check in (True, False):
            program = self.agent(
                DEAF, check=check, auth={"token_file": str(token)}, spool={"path": f"{self.temporary}/s"}
            )
            self.assertEqual(1, await program.wait())
            self.assertEqual(1, len(program.lines), program.text)
            self.assertIn(f"auth.token_file: {token} cannot be read: Permission denied {who}", program.text)
            program = self.agent(DEAF, check=check)
            self.assertEqual(1, await program.wait())
            self.assertEqual(1, len(program.lines), program.text)
            self.assertIn(
                f"spool.path: {self.home}/spool cannot be made, as {self.home} cannot be written to", program.text
            )
            user, group = self.nobody.pw_uid, grp.getgrnam("nogroup").gr_gid
            self.assertIn(f"install -d -m 0700 -o {user} -g {group} {self.home}/spool {who}", program.text)
        program = self.agent(DEAF, f"--logfile={self.home}/agent.log", spool={"durability": "memory", "path": ""})
        self.assertEqual(1, await program.wait())
        self.assertIn(
            f"--logfile: {self.home}/agent.log cannot be written to (Permission denied) by the user nobody",
            program.text,
        )
        self.assertNotIn("Traceback", program.text)
        self.assertEqual([], os.listdir(self.home))
        self.assertEqual([], os.listdir(self.temporary))
        return None

    async def test_what_only_root_can_run_or_write(self) -> None:
        """A program that only root can run gives no token, and in a directory of root's none is kept."""
        if os.geteuid():
            return await self.not_root()
        self.give(self.home)
        program = self.directory / "program"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o700)
        kept = self.directory / "kept"
        for auth, words in (
            ({"token_command": [str(program)]}, f"auth.token_command: {program} is no program that can be run here"),
            ({"token": "s3cret", "accepted_token_file": str(kept)}, f"auth.accepted_token_file: {kept} cannot be made"),
        ):
            agent = self.agent(DEAF, check=True, auth=auth)
            self.assertEqual(1, await agent.wait(), agent.text)
            self.assertIn(words, agent.text)
        return None

    async def test_what_the_user_can_read(self) -> None:
        """The advice of the mistake is right: with the directory made as it says, the check is content."""
        if os.geteuid():
            return await self.not_root()
        self.home.chmod(0o755)
        refused = self.agent(DEAF, check=True)
        self.assertEqual(1, await refused.wait())
        advice = re.search(r"as root, (install -d .*) \(by the user", refused.text)
        assert advice is not None
        self.assertEqual(0, await self.start("/bin/sh", "-c", advice[1]).wait())
        token = self.home / "token"
        token.write_text("s3cret\n")
        token.chmod(0o600)
        self.give(token)
        program = self.agent(DEAF, check=True, auth={"token_file": str(token)})
        self.assertEqual(0, await program.wait(), program.text)
        return None

    async def test_link_in_place_of_the_log(self) -> None:
        """A link that this user has put in the log's place does not have root write where it leads."""
        if os.geteuid():
            return await self.not_root()
        self.give(self.home)
        for target in (self.directory / "made-by-root", self.directory / "roots"):
            (self.home / "agent.log").unlink(missing_ok=True)
            (self.home / "agent.log").symlink_to(target)
            program = self.agent(DEAF, f"--logfile={self.home}/agent.log")
            self.assertEqual(1, await program.wait())
            self.assertIn("agent.log cannot be written to (Permission denied)", program.text)
            self.assertEqual("root's own" if target.exists() else "", target.read_text() if target.exists() else "")
            (self.directory / "roots").write_text("root's own")
            (self.directory / "roots").chmod(0o600)
        return None
