"""The unit for systemd: what it says, what systemd makes of it, and the command that prints it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from io import StringIO
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import systemd_unit
from commsmgr.cli import main
from commsmgr.config import Backend, Config
from commsmgr.errors import UsageError

SOURCE = Path(systemd_unit.__file__).parent / "data" / "commsmgr.service"
MOST = 30
"""Tenths of the exposure that ``systemd-analyze security`` may give it; 0 is none, 100 the worst."""


def settings(text: str) -> dict[str, list[str]]:
    """Return what the unit sets, each name with its values in order."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


class Content(SynchronousTestCase):
    def setUp(self) -> None:
        self.said = settings(SOURCE.read_text("utf-8"))

    def value(self, name: str) -> str:
        (value,) = self.said[name]
        return value

    def test_notify(self) -> None:
        """systemd waits for READY, takes it from the agent's own process alone, and watches for signs of life."""
        self.assertEqual(("notify", "main"), (self.value("Type"), self.value("NotifyAccess")))
        self.assertGreaterEqual(int(self.value("WatchdogSec")), 30)
        self.assertEqual(("on-failure", "0"), (self.value("Restart"), self.value("StartLimitIntervalSec")))
        self.assertGreaterEqual(int(self.value("RestartSec")), 5)

    def test_fits_the_defaults(self) -> None:
        """The stop has more time than the agent takes for it, and the state directory is the spool's."""
        defaults = Config(backends=(Backend(url="https://a.example"),))
        self.assertGreater(float(self.value("TimeoutStopSec")), 2 * defaults.stop_deadline)
        self.assertEqual(defaults.spool.path, f"/var/lib/{self.value('StateDirectory')}")
        self.assertEqual(("0700", "0077"), (self.value("StateDirectoryMode"), self.value("UMask")))

    def test_credential(self) -> None:
        """The token comes as a credential, under the name that the comment tells to configure."""
        self.assertEqual("token:/etc/commsmgr/token", self.value("LoadCredential"))
        self.assertIn('token_credential = "token"', SOURCE.read_text("utf-8"))

    def test_without_rights(self) -> None:
        """It has a user of its own, no capabilities and no way to them; a core dump would hold the token."""
        self.assertEqual("yes", self.value("DynamicUser"))
        self.assertEqual(("", ""), (self.value("CapabilityBoundingSet"), self.value("AmbientCapabilities")))
        self.assertEqual(("yes", "0"), (self.value("NoNewPrivileges"), self.value("LimitCORE")))
        self.assertEqual(["@system-service", "~@privileged @resources"], self.said["SystemCallFilter"])

    def test_what_works(self) -> None:
        """What the agent would not work with is not forbidden: TLS needs what MemoryDenyWriteExecute= takes."""
        self.assertEqual("no", self.value("MemoryDenyWriteExecute"))
        for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"):
            self.assertIn(family, self.value("RestrictAddressFamilies").split())
        for name in ("PrivateNetwork", "IPAddressDeny", "ProtectProc", "ProcSubset"):
            self.assertNotIn(name, self.said)

    def test_advice(self) -> None:
        """What an agent that runs commands has to loosen are lines that are there."""
        (advice,) = re.findall(r"RUN COMMANDS.*?(?=^\w)", SOURCE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        names = set(re.findall(r"^#   (\w+)=", advice, re.MULTILINE))
        self.assertGreater(len(names), 7)
        self.assertEqual(set(), names - set(self.said))


class Analysed(SynchronousTestCase):
    """By systemd itself (Debian's package ``systemd``), which need not run for that."""

    def setUp(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="commsmgr-test-"))
        self.addCleanup(shutil.rmtree, directory)
        self.path = directory / "commsmgr.service"
        self.path.write_text(systemd_unit.unit(f"{sysconfig.get_path('scripts')}/twistd"))

    def analyse(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["systemd-analyze", *arguments, str(self.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout

    def exposure(self) -> tuple[int, float]:
        status, text = self.analyse("security", "--no-pager", "--offline=true", f"--threshold={MOST}")
        found = re.search(r"Overall exposure level for commsmgr.service: ([\d.]+)", text)
        assert found is not None, text
        return status, float(found[1])

    def change(self, old: str, new: str) -> None:
        text = self.path.read_text()
        self.assertEqual(1, text.count(old))
        self.path.write_text(text.replace(old, new))

    def test_verified(self) -> None:
        """It has no mistake and names nothing that is not there; a mistake would be seen."""
        self.assertEqual((0, ""), self.analyse("verify"))
        for old, new in (("RestrictRealtime=yes", "RestrictRealtme=yes"), ("/twistd ", "/twistd-is-not-there ")):
            before = self.path.read_text()
            self.change(old, new)
            self.assertNotEqual((0, ""), self.analyse("verify"), new)
            self.path.write_text(before)

    def test_exposure(self) -> None:
        """The exposure is under 3.0; without some of the lines it would not be."""
        status, exposure = self.exposure()
        self.assertEqual(0, status)
        self.assertLess(exposure, 3.0)
        for name in ("DynamicUser=yes", "User=commsmgr", "CapabilityBoundingSet=\n", "NoNewPrivileges=yes"):
            self.change(f"\n{name}", "\n#")
        self.change("\nSystemCallFilter=@system-service\nSystemCallFilter=~@privileged @resources", "")
        status, exposure = self.exposure()
        self.assertNotEqual(0, status)
        self.assertGreater(exposure, 3.0)


class Command(SynchronousTestCase):
    """``commsmgr systemd-unit``."""

    def say(self, *arguments: str) -> tuple[int, str, str]:
        stdout, stderr = StringIO(), StringIO()
        return main([*arguments], stdout, stderr), stdout.getvalue(), stderr.getvalue()

    def test_printed(self) -> None:
        """It prints the unit with this environment's twistd, and says if the service could not see that."""
        self.patch(systemd_unit, "hidden", lambda paths: "")
        status, text, complaint = self.say("systemd-unit")
        self.assertEqual((0, ""), (status, complaint))
        twistd = f"{sysconfig.get_path('scripts')}/twistd"
        (start,) = settings(text)["ExecStart"]
        self.assertEqual(f"{twistd} -n --pidfile= commsmgr --config /etc/commsmgr/agent.toml", start)
        self.assertEqual(SOURCE.read_text("utf-8"), text.replace(twistd, systemd_unit.PLACE))
        self.patch(systemd_unit, "hidden", lambda paths: "/home/me/bin/python")
        status, again, complaint = self.say("systemd-unit")
        self.assertEqual((1, text), (status, again))
        self.assertIn("the service will not see /home/me/bin/python (ProtectHome=, PrivateTmp=)", complaint)

    def test_hidden(self) -> None:
        """What ProtectHome= and PrivateTmp= take away is found, also behind a link."""
        for path in ("/home/me/venv/bin/twistd", "/root/bin/python", "/run/user/1000/x", "/tmp/x", "/var/tmp/x"):
            self.assertEqual(path, systemd_unit.hidden(("/opt/a", path)))
        self.assertEqual(
            "", systemd_unit.hidden(("/opt/venv/bin/twistd", "/usr/bin/python3", "/homes/x", "/srv/home/x"))
        )
        link = Path(self.mktemp()).absolute()
        link.symlink_to("/home/me/python")
        self.assertEqual("/home/me/python", systemd_unit.hidden((str(link),)))

    def test_wrong_place(self) -> None:
        """A twistd that is not there, or whose path means something else in a unit, is refused."""
        self.assertIn("is not there", str(self.assertRaises(UsageError, systemd_unit.unit, "/opt/nowhere/twistd")))
        for name in ("with blank", "100%", "$HOME", 'quo"te', "semi;colon", "back\\slash"):
            path = Path(self.mktemp()).absolute() / name / "twistd"
            path.parent.mkdir(parents=True)
            path.touch()
            error = self.assertRaises(UsageError, systemd_unit.unit, str(path))
            self.assertIn("mean something else in a unit", str(error))
        self.patch(sysconfig, "get_path", lambda name: "/opt/nowhere")
        status, text, complaint = self.say("systemd-unit")
        self.assertEqual((1, ""), (status, text))
        self.assertIn("/opt/nowhere/twistd is not there", complaint)
