"""``twistd commsmgr`` and ``twistd commsmgr-backend`` as operators run them, in real processes."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import stat
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.logger import Logger
from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import tap
from commsmgr._version import __version__
from commsmgr.backend import tap as backend_tap
from commsmgr.config import Backend, Config
from commsmgr.redact import Redactor
from commsmgr.transport.tls import ContextSource
from tests.certificates import Authority
from tests.processes import ProcessTestCase, Program, pause, together

EVERYWHERE_DEAF = "http://127.0.0.1:9"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class CommandLine(ProcessTestCase):
    """What is said before anything starts."""

    async def test_help(self) -> None:
        """From any directory twistd lists both programs, and each explains itself on lines of a terminal's width."""
        listing, agent = self.twistd("--help"), self.twistd("commsmgr", "--help")
        self.assertEqual([0, 0], await together(listing.wait(), agent.wait()))
        self.assertRegex(listing.text, r"(?m)^ +commsmgr +Connect this machine")
        self.assertRegex(listing.text, r"(?m)^ +commsmgr-backend +Run the reference backend")
        for words in ("--config=", "--check", "--demo", "--log-level=", "--listen=", r"Exit\s+code 1", "SIGTERM"):
            self.assertRegex(agent.text, words)
        self.assertLessEqual(max(map(len, agent.lines)), 80)
        self.assertNotIn("[default: ]", agent.text)

    async def test_mistakes(self) -> None:
        """Each mistake is told once, with file, key and what was expected; nothing is started and nothing written."""
        types = Path(self.configuration(EVERYWHERE_DEAF, name="types.toml", spool={"path": 5, "max_events": 0}))
        types.write_text(f"stop_dedline = 3\n{types.read_text()}")
        rules = self.configuration("http://example.com/api", name="rules.toml", auth={"token": "s3cret\r\nX: 1"})
        before = sorted(os.listdir(self.directory))
        first = self.twistd("-n", "commsmgr", "--config", str(types))
        second = self.twistd("commsmgr", "-c", rules)
        self.assertEqual([1, 1], await together(first.wait(), second.wait()))
        self.assertEqual(before, sorted(os.listdir(self.directory)))
        self.assertEqual(
            [
                f"twistd commsmgr: {types}: stop_dedline: unknown key; did you mean stop_deadline?",
                f"{types}: spool.path: expected a string, found 5",
                f"{types}: spool.max_events: expected a whole number from 1 to 10000000, found 0",
            ],
            first.lines,
        )
        exposed = "the token would travel unencrypted to example.com, which is not loopback; use https://, or set"
        self.assertEqual(
            [
                f"twistd commsmgr: {rules}: backends[0].url: {exposed} insecure = true",
                f"{rules}: auth.token: the token contains control characters (such as CR or LF)",
            ],
            second.lines,
        )

    def said(self, options: usage.Options, *arguments: str) -> tuple[object, str, str]:
        """Parse ``arguments`` in this process; return the exit code and what was written to the two outputs."""
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), self.assertRaises(SystemExit) as end:
            options.parseOptions(list(arguments))
        return end.exception.code, out.getvalue(), err.getvalue()

    def test_version(self) -> None:
        """``--version`` is that of commsmgr, not of Twisted."""
        for options in (tap.Options(), backend_tap.Options()):
            self.assertEqual((0, f"commsmgr {__version__}\n", ""), self.said(options, "--version"))

    def test_wrong_options(self) -> None:
        """A wrong command line gets one line that says what is wrong, not a page of help, and starts nothing."""
        config = self.configuration(EVERYWHERE_DEAF)
        before = sorted(os.listdir(self.directory))
        for options, words in {
            (): "which configuration? Give --config FILE, or --demo to look around",
            ("--check",): "which configuration?",
            ("--demo", "--config", config): "--demo brings its own configuration",
            ("--frobnicate",): "option --frobnicate not recognized",
            ("start",): "Wrong number of arguments",
            ("--config", "nowhere.toml"): "nowhere.toml: cannot be read: No such file or directory\n",
            ("--config", config, "--log-level=loud"): 'command line: observe.log_level: expected "debug"',
            ("--config", config, "--listen=here"): "command line: observe.listen: expected host:port",
        }.items():
            code, out, err = self.said(tap.Options(), *options)
            self.assertEqual((1, "", 1), (code, out, err.count("\n")))
            self.assertIn(f"twistd commsmgr: {words}", err)
        self.assertEqual(before, sorted(os.listdir(self.directory)))

    def test_check(self) -> None:
        """``--check`` says in one line that all is well, and starts nothing."""
        config = self.configuration(EVERYWHERE_DEAF)
        before = sorted(os.listdir(self.directory))
        said = f"{config}: the configuration is valid (backends: main)\n"
        self.assertEqual((0, said, ""), self.said(tap.Options(), "--config", config, "--check"))
        self.assertEqual(before, sorted(os.listdir(self.directory)))

    def test_tls_files(self) -> None:
        """TLS files that connections could not use are refused at once, with file and key; good ones are not."""
        own = Authority("Test CA").issue(names=["localhost"]).save(str(self.directory / "own"))
        other = Authority("Test CA").issue(names=["localhost"]).save(str(self.directory / "other"))
        odd, empty = self.directory / "odd.pem", self.directory / "empty.pem"
        odd.write_text("root:x:0:0:root:/root:/bin/sh\n")
        empty.write_text("")
        pair = {"certificate": own.cert_pem, "key": own.key_pem}
        for url in (EVERYWHERE_DEAF, "https://127.0.0.1:9"):
            for key, tls in (
                ("ca_file", {"ca_file": str(odd)}),
                ("ca_file", {"ca_file": str(empty), "ca_exclusive": True}),
                ("certificate", pair | {"certificate": str(odd)}),
                ("key", pair | {"key": str(odd)}),
                ("key", pair | {"key": other.key_pem}),
            ):
                config = self.configuration(url, tls=tls)
                for check in ([], ["--check"]):
                    code, out, err = self.said(tap.Options(), "--config", config, *check)
                    self.assertEqual((1, ""), (code, out), err)
                    self.assertTrue(err.startswith(f"twistd commsmgr: {config}: tls.{key}: {tls[key]}: "), err)
            for tls in ({}, pair | {"ca_file": own.cert_pem, "ca_exclusive": True}):
                config = self.configuration(url, tls=tls)
                self.assertEqual(0, self.said(tap.Options(), "--config", config, "--check")[0])

    def test_tls_warnings(self) -> None:
        """``--check`` warns of a single pin, where TLS is used, and calls the configuration valid all the same."""
        pins = [f"sha256//{'A' * 43}=", f"sha256//{'B' * 42}A="]
        ca_file = Authority().save_pem(str(self.directory / "ca.pem"))
        for url, count, said in (
            ("https://127.0.0.1:9", 1, "warning: tls.pins: one pin and no backup"),
            ("https://127.0.0.1:9", 2, ""),
        ):
            config = self.configuration(url, tls={"pins": pins[:count], "ca_file": ca_file, "ca_exclusive": True})
            code, out, err = self.said(tap.Options(), "--config", config, "--check")
            self.assertEqual((0, f"{config}: the configuration is valid (backends: main)\n"), (code, out))
            self.assertEqual(bool(said), bool(err))
            self.assertIn(said, err)

    def test_tls_looked_at_when_used(self) -> None:
        """Whether TLS works at all matters only if it is to be used: by URL, WebSocket's too, or by files."""
        looked: list[str] = []
        self.patch(ContextSource, "load", lambda source: looked.append("looked"))
        for url, websocket_url, times in (
            ("http://127.0.0.1:9", "", 0),
            ("https://127.0.0.1:9", "", 1),
            ("http://127.0.0.1:9", "wss://127.0.0.1:9/ws", 1),
        ):
            looked.clear()
            path = Path(self.configuration(url))
            path.write_text(
                path.read_text().replace("[[backends]]", f'[[backends]]\nwebsocket_url = "{websocket_url}"')
            )
            self.assertEqual(0, self.said(tap.Options(), "--config", str(path), "--check")[0])
            self.assertEqual(times, len(looked))

    def test_paths(self) -> None:
        """Relative paths mean what was checked, wherever the process goes later; empty ones stay empty."""
        config = self.configuration(
            EVERYWHERE_DEAF, spool={"path": "here/spool"}, auth={"token_file": "token", "accepted_token_file": "kept"}
        )
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.directory)
        Path("token").write_text("s3cret\n")
        options = tap.Options()
        options.parseOptions(["--config", os.path.basename(config)])
        there = os.getcwd()
        self.assertEqual(f"{there}/here/spool", options.config.spool.path)
        self.assertEqual(f"{there}/token", options.config.auth.token_file)
        self.assertEqual(f"{there}/kept", options.config.auth.accepted_token_file)
        Path("program").symlink_to("/bin/true")
        for program, anchored in (("./program", f"{there}/program"), ("true", "true")):
            config = self.configuration(EVERYWHERE_DEAF, auth={"token_command": [program, "./x"]})
            options.parseOptions(["--config", config])
            self.assertEqual((anchored, "./x"), options.config.auth.token_command)
        self.assertEqual("", options.config.tls.ca_file)


class LogFiles(SynchronousTestCase):
    """The log that a daemon writes."""

    def test_rotated(self) -> None:
        """It is rotated by size, and only so many old ones are kept: a link that comes and goes fills no disk."""
        self.patch(tap, "ROTATE_AT", 1000)
        self.patch(tap, "KEPT_LOGS", 2)
        self.patch(signal, "signal", lambda *_: None)
        self.addCleanup(os.umask, os.umask(0))
        directory = Path(self.mktemp())
        directory.mkdir(mode=0o700)
        options: Any = SimpleNamespace(parent={"logfile": str(directory / "agent.log")})
        observe = tap._observer(options, Config(backends=(Backend(url=EVERYWHERE_DEAF),)), Redactor(), None)
        assert observe is not None
        log = Logger("commsmgr.test", observer=observe)
        for number in range(100):
            log.info("line {number} of those that fill a disk, one after the other", event="x", number=number)
        self.assertEqual(["agent.log", "agent.log.1", "agent.log.2"], sorted(os.listdir(directory)))
        self.assertLess(max(path.stat().st_size for path in directory.iterdir()), 1200)
        self.assertEqual({0o600}, {mode(path) for path in directory.iterdir()}, "with a umask of 0, too")
        self.assertIn("line 99 of", (directory / "agent.log").read_text())


class Foreground(ProcessTestCase):
    """``twistd -n``."""

    def agent(self, config: str, *options: str) -> Program:
        return self.twistd("-n", "--umask=022", "commsmgr", "--config", config, *options)

    async def test_run_and_stop(self) -> None:
        """Text lines, the status page, a command's result, and after SIGTERM an orderly end by that signal."""
        backend, url = await self.backend()
        agent = self.agent(self.configuration(url))
        page = (await agent.line(r"site.started .*at (http\S+)"))[1]
        await agent.line(r"^\d{4}-\d\d-\d\dT[\d:.]+Z info  link.registered  backend=main  registered with main")
        self.assertEqual(200, (await self.fetch(f"{page}readyz"))[0])
        self.assertTrue(json.loads((await self.fetch(f"{page}status"))[1])["connected"])
        self.assertIn(b"commsmgr_", (await self.fetch(f"{page}metrics"))[1])
        order = {"machine_id": "m-1", "type": "echo", "command": "hello"}
        status, body = await self.fetch(f"{url}/api/commands", order)
        self.assertEqual(201, status, body)
        self.assertEqual("hello", (await self.result(url, json.loads(body)["id"]))["output"])
        spool = self.directory / "spool"
        self.assertEqual(0o700, mode(spool))
        self.assertEqual({0o600}, {mode(path) for path in spool.iterdir()})
        self.assertNotIn("debug", {line.split()[1] for line in agent.lines})
        self.assertEqual(-signal.SIGTERM, await agent.end())
        self.assertNotIn("Traceback", agent.text)
        self.assertNotIn("-wal", "".join(os.listdir(spool)), "the spool was not closed")
        await self.away(url)
        self.assertEqual(-signal.SIGINT, await backend.end(signal.SIGINT))
        self.assertNotIn("Traceback", backend.text)

    async def away(self, url: str) -> None:
        """Wait until the backend sees nobody connected."""
        while any(agent["connected"] for agent in json.loads((await self.fetch(f"{url}/api/state"))[1])["agents"]):
            await pause(0.02)

    async def test_json_and_levels(self) -> None:
        """In JSON each line is an object, with ``debug`` more; SIGUSR1 is harmless, SIGINT is as SIGTERM."""
        url = await self.backend_here()
        agent = self.agent(self.configuration(url, observe={"log_format": "json"}), "--log-level=debug")
        await agent.line('"event": "link.registered"')
        agent.send(signal.SIGUSR1)
        await agent.line('"event": "heartbeat.answered"')
        self.assertEqual(-signal.SIGINT, await agent.end(signal.SIGINT))
        levels = {json.loads(line)["level"] for line in agent.lines}
        self.assertTrue({"debug", "info"} <= levels, levels)

    async def test_two_signals(self) -> None:
        """A second SIGTERM or SIGINT during the stop changes nothing, and says nothing."""
        listener = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers: the stop takes a while
        self.addCleanup(listener.close)
        agent = self.agent(self.configuration(f"http://127.0.0.1:{listener.getsockname()[1]}", stop_deadline=1.0))
        page = (await agent.line(r"site.started .*at (http\S+)"))[1]
        await self.fetch(f"{page}healthz")  # the reactor runs, and Twisted has installed its handlers
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            agent.send(number)
        await agent.line("shutting down")
        for number in (signal.SIGTERM, signal.SIGINT):
            agent.send(number)
        self.assertIn(await agent.wait(), (-signal.SIGTERM, -signal.SIGINT))
        self.assertNotIn("Traceback", agent.text)
        self.assertNotIn("isn't running", agent.text)
        self.assertEqual(1, agent.text.count("shutting down"))

    async def test_spool_in_use(self) -> None:
        """A second process on the same spool says so and ends with exit code 1; the first one is not disturbed."""
        url = await self.backend_here()
        config = self.configuration(url)
        first = self.agent(config)
        await first.line("link.registered")
        second = self.agent(config)
        self.assertEqual(1, await second.wait())
        self.assertRegex(second.text, r"critical +manager.start-failed .*spool is in use by process \d+")
        status, body = await self.fetch(f"{url}/api/commands", {"machine_id": "m-1", "type": "ping"})
        self.assertEqual(201, status)
        self.assertEqual("pong", (await self.result(url, json.loads(body)["id"]))["output"])
        self.assertEqual(-signal.SIGTERM, await first.end())

    async def test_port_in_use(self) -> None:
        """When the status page's or the backend's port is taken, the log says so, and the exit code is 1."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            agent = self.agent(self.configuration(EVERYWHERE_DEAF), f"--listen={address}")
            backend = self.twistd("-n", "commsmgr-backend", f"--listen={address}")
            self.assertEqual([1, 1], await together(agent.wait(), backend.wait()))
        self.assertRegex(agent.text, rf"critical +manager.start-failed .*observe.listen: cannot listen on {address}")
        self.assertRegex(backend.text, rf"the backend could not start: .*{address}")
        self.assertNotIn("Traceback", agent.text + backend.text)
        self.assertFalse((self.directory / "spool").exists())

    async def test_any_weather(self) -> None:
        """Without a backend and with garbage for a spool it starts, says so, and keeps the garbage."""
        spool = self.directory / "spool"
        spool.mkdir(mode=0o700)
        (spool / "spool.db").write_bytes(b"no database at all" * 100)
        agent = self.agent(self.configuration(EVERYWHERE_DEAF))
        page = (await agent.line(r"site.started .*at (http\S+)"))[1]
        await agent.line("link.ended .* is down")
        status = json.loads((await self.fetch(f"{page}status"))[1])
        self.assertTrue(status["running"])
        self.assertFalse(status["connected"])
        (aside,) = spool.glob("spool.db.*.garbage")
        self.assertEqual(b"no database at all" * 100, aside.read_bytes())
        self.assertTrue([problem for problem in status["problems"] if str(aside) in problem], status["problems"])
        self.assertEqual(200, (await self.fetch(f"{page}healthz"))[0])
        self.assertEqual(503, (await self.fetch(f"{page}readyz"))[0])
        self.assertEqual(-signal.SIGTERM, await agent.end())


class Daemon(ProcessTestCase):
    """Without ``-n``."""

    async def started(self, rundir: Path, config: str, *options: str) -> int:
        """Start a daemon in ``rundir``; return its process id when it has registered."""
        launcher = self.twistd(
            f"--pidfile={rundir}/agent.pid",
            f"--logfile={rundir}/agent.log",
            f"--rundir={rundir}",
            *options,
            "commsmgr",
            "--config",
            config,
        )
        self.assertEqual(0, await launcher.wait(), launcher.text)
        self.assertEqual([], launcher.lines)
        process = int((rundir / "agent.pid").read_text())
        await self.logged(rundir, "link.registered")
        return process

    async def logged(self, rundir: Path, words: str) -> None:
        """Wait for words in the log."""
        log = rundir / "agent.log"
        while not (log.exists() and words in log.read_text()):
            await pause(0.02)

    async def test_daemon(self) -> None:
        """Process id, log and spool are where they were asked for; SIGUSR1 renews the log; SIGTERM removes the pid."""
        url = await self.backend_here()
        rundir = self.directory / "run"
        rundir.mkdir()
        config = self.configuration(url, spool={"path": "relative-spool"})
        process = await self.started(rundir, config)
        self.assertEqual([process], [one for one in self.marked() if one == process])
        self.assertTrue((self.directory / "relative-spool" / "spool.db").exists(), "relative to where it was called")
        self.assertEqual(sorted(["agent.log", "agent.pid"]), sorted(os.listdir(rundir)))
        os.kill(process, signal.SIGUSR1)
        while not (rundir / "agent.log.1").exists():
            await pause(0.02)
        await self.logged(rundir, "heartbeat.answered")
        self.assertIn("link.registered", (rundir / "agent.log.1").read_text())
        os.rename(rundir / "agent.log", rundir / "moved-by-logrotate.log")
        os.kill(process, signal.SIGUSR1)
        await self.logged(rundir, "heartbeat.answered")
        os.kill(process, signal.SIGTERM)
        await self.gone([process])
        self.assertFalse((rundir / "agent.pid").exists())
        logs = "".join(path.read_text() for path in rundir.iterdir())
        self.assertNotIn("Traceback", logs)
        self.assertIn("Server Shut Down", (rundir / "agent.log").read_text())

    async def test_user(self) -> None:
        """With ``--uid`` all that is created while it runs belongs to that user; only root can ask for it."""
        if os.geteuid() != 0:
            return await self.not_root()
        nobody = pwd.getpwnam("nobody")
        url = await self.backend_here()
        rundir = self.directory / "run"
        rundir.mkdir()
        os.chmod(self.directory, 0o755)
        os.chown(rundir, nobody.pw_uid, nobody.pw_gid)
        # The program that gives the token runs with what rights are left.
        command = ["/bin/sh", "-c", f"id -u > {rundir}/who; echo a-token-of-the-tests"]
        config = self.configuration(url, spool={"path": str(rundir / "spool")}, auth={"token_command": command})
        process = await self.started(rundir, config, "--uid=nobody")
        self.assertEqual(nobody.pw_uid, os.stat(f"/proc/{process}").st_uid)
        for path in (rundir / "spool", *(rundir / "spool").iterdir()):
            self.assertEqual((nobody.pw_uid, nobody.pw_gid), (path.stat().st_uid, path.stat().st_gid), path)
        self.assertEqual((0o700, 0o600), (mode(rundir / "spool"), mode(rundir / "spool" / "spool.db")))
        os.kill(process, signal.SIGUSR1)
        await self.logged(rundir, "heartbeat.answered")
        self.assertEqual(f"{nobody.pw_uid}\n", (rundir / "who").read_text())
        os.kill(process, signal.SIGTERM)
        await self.gone([process])
        self.assertFalse((rundir / "agent.pid").exists())
        self.assertNotIn("Traceback", "".join(path.read_text() for path in rundir.glob("agent.log*")))
        return None

    async def not_root(self) -> None:
        """Somebody else cannot become another user: nothing is started."""
        config = self.configuration(EVERYWHERE_DEAF)
        program = self.twistd("-n", f"--uid={os.geteuid() + 1}", "commsmgr", "--config", config)
        self.assertEqual(1, await program.wait())
        self.assertFalse((self.directory / "spool").exists())
