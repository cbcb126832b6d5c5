"""Programs that print a token: real processes, on a reactor that minds its children and on one that does not."""

from __future__ import annotations

import json
import os
import signal
import time
from base64 import urlsafe_b64encode
from random import Random

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.process import ProcessReader, reapProcessHandlers
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.auth.renewal import Renewal
from commsmgr.auth.token_command import MAX_OUTPUT, TokenCommand
from commsmgr.bearer import Token
from commsmgr.errors import ConfigError, TokenError
from tests.processes import PATIENCE, ProcessTestCase, pause, reactor

SECRET = "s3cr3t-of-the-command"
NOW = 1_700_000_000.0


class CommandTestCase(ProcessTestCase):
    """Runs small shell scripts as commands; what is left of them is found by the mark in their environment."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(os, "environ", {**os.environ, "COMMSMGR_TEST_MARK": self.mark, "GREETING": SECRET})

    def command(self, script: str) -> TokenCommand:
        return TokenCommand(["/bin/sh", "-c", script], reactor=reactor, wall=lambda: NOW)

    async def token(self, script: str) -> Token:
        return await Deferred.fromCoroutine(self.command(script).run()).addTimeout(PATIENCE, reactor)

    async def fails(self, script: str) -> str:
        """Return what is said of a command that gives no token."""
        with self.assertRaises(TokenError) as caught:
            await self.token(script)
        self.assertNotIn(SECRET, str(caught.exception))
        return str(caught.exception)


class OutputTests(CommandTestCase):
    """What a command may print."""

    async def test_bare(self) -> None:
        """The token alone, with or without line breaks; if it is a JSON Web Token it says when it expires."""
        self.assertEqual(Token(SECRET), await self.token(f"echo {SECRET}"))
        self.assertEqual(Token(SECRET), await self.token(f"printf %s {SECRET}"))
        jwt = "x." + urlsafe_b64encode(b'{"exp":1800000000}').decode().rstrip("=") + ".y"
        self.assertEqual(Token(jwt, 1_800_000_000.0), await self.token(f"echo {jwt}"))

    async def test_json(self) -> None:
        """The answer of a token endpoint (RFC 6749), whose expires_in counts from when the command was started."""
        answer = {"access_token": SECRET, "token_type": "Bearer", "expires_in": 3600, "scope": "a b"}
        self.assertEqual(Token(SECRET, NOW + 3600), await self.token(f"echo '{json.dumps(answer)}'"))
        self.assertEqual(Token(SECRET), await self.token(f"""echo '{{"access_token": "{SECRET}"}}'"""))

    async def test_anything_else(self) -> None:
        """Whatever else is printed is an error that quotes nothing of it."""
        for script in (
            "true",
            f"echo {SECRET} and more",
            f'echo \'{{"token": "{SECRET}"}}\'',
            f'echo \'{{"access_token": "{SECRET}", "expires_in": "{SECRET}"}}\'',
            f'echo \'{{"access_token": "{SECRET} x"}}\'',
            f"echo '{{{SECRET}'",
            f"printf '{SECRET}\\377'",
        ):
            self.assertIn("sh printed", await self.fails(script))

    async def test_environment(self) -> None:
        """It has the agent's environment, and nothing to read."""
        self.assertEqual(SECRET, (await self.token('read line; echo "$line$GREETING"')).value)


class EndTests(CommandTestCase):
    """How a command may end."""

    async def test_fails(self) -> None:
        """A status other than 0 counts, whatever was printed; what it wrote to standard error is only counted."""
        said = await self.fails(f"echo {SECRET}; echo {SECRET} >&2; exit 3")
        self.assertIn(f"exit status 3, and {len(SECRET) + 1} bytes on standard error", said)
        self.assertIn(f"signal {int(signal.SIGTERM)}", await self.fails("kill -TERM $$"))

    async def test_cannot_be_started(self) -> None:
        """A program that is not there is an exit status of the child that tried, or an error."""
        command = TokenCommand([f"{self.directory}/none"], reactor=reactor, wall=time.time)
        with self.assertRaises(TokenError) as caught:
            await command.run()
        self.assertIn("none", str(caught.exception))

    async def test_too_much(self) -> None:
        """One that prints without end is killed, and little of it is kept."""
        self.assertIn(f"more than {MAX_OUTPUT} bytes", await self.fails("while :; do echo xxxxxxxxxxxxxxxx; done"))
        said = await self.fails("i=0; while [ $i -lt 20000 ]; do echo xxxxxxxxxxxxxxxx >&2; i=$((i+1)); done; exit 1")
        self.assertIn("340000 bytes on standard error", said)

    async def test_hangs(self) -> None:
        """One that does not end is killed at its deadline, though what it has started holds its output open."""
        pid = self.directory / "pid"
        for script in ("exec sleep 60", f"sleep 60 & echo $! > {pid}; wait"):
            renewal = Renewal(
                self.command(script).run, keep=True, timeout=0.3, clock=reactor, wall=time.time, random=Random(1)
            )
            with self.assertRaises(TokenError) as caught:
                await renewal.get()
            self.assertIn("no token came within 0.3 s", str(caught.exception))
            while reapProcessHandlers or any(isinstance(each, ProcessReader) for each in reactor.getReaders()):
                await pause(0.01)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        await self.gone(self.marked())

    async def test_stop(self) -> None:
        """Who stops waits until the program is gone, and finds no process and no timer left."""
        renewal = Renewal(
            self.command("exec sleep 60").run, keep=True, timeout=30, clock=reactor, wall=time.time, random=Random(1)
        )
        waiting = renewal.get()
        # A child that has not become another program yet does not bear the mark.
        while len(self.marked()) != 1:
            await pause(0.01)
        await renewal.stop(PATIENCE)
        self.assertEqual(({}, []), (reapProcessHandlers, self.marked()))
        await self.assertFailure(waiting, TokenError)

    async def test_cancelled(self) -> None:
        """Cancelling kills it."""
        running = Deferred.fromCoroutine(self.command("exec sleep 60").run())
        running.cancel()
        await self.assertFailure(running, CancelledError)
        self.assertEqual(({}, []), (reapProcessHandlers, self.marked()))

    async def test_shared(self) -> None:
        """Many who ask at once share one run."""
        count = self.directory / "count"
        renewal = Renewal(
            self.command(f"echo x >> {count}; echo {SECRET}").run,
            keep=True,
            timeout=PATIENCE,
            clock=reactor,
            wall=time.time,
            random=Random(1),
        )
        for waiting in [renewal.get() for _ in range(10)]:
            self.assertEqual(SECRET, (await waiting).value)
        self.assertEqual("x\n", count.read_text())


# A reactor whose program keeps SIGCHLD for itself; and one that ignores it, so that the kernel keeps no exit status.
_EMBEDDED = """
import signal, sys, time
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from commsmgr.auth import token_command
token_command.REAP_TRIES = 10
command = token_command.TokenCommand(["/bin/sh", "-c", sys.argv[2]], reactor=reactor, wall=time.time)
def run():
    Deferred.fromCoroutine(command.run()).addCallbacks(
        lambda token: print("TOKEN", token.value), lambda failure: print("ERROR", failure.value)
    ).addBoth(lambda _: reactor.stop())
reactor.callWhenRunning(run)
reactor.run(installSignalHandlers=False)
"""


class EmbeddedTests(ProcessTestCase):
    """Reactors of other programs."""

    async def story(self, how: str, script: str) -> str:
        path = self.directory / "embedded.py"
        path.write_text(_EMBEDDED)
        program = self.python(path, how, script)
        await program.wait()
        return program.text

    async def test_no_sigchld(self) -> None:
        """Where nobody tells Twisted of the end of a child the token comes all the same, and so does an exit status."""
        self.assertIn(f"TOKEN {SECRET}", await self.story("unhandled", f"echo {SECRET}"))
        slow = f"echo {SECRET}; exec >&- 2>&-; sleep 0.2; exit 4"
        self.assertIn("ERROR sh ended with exit status 4", await self.story("unhandled", slow))

    async def test_ignored_sigchld(self) -> None:
        """Where the exit status is lost nothing hangs, and the error says why."""
        self.assertIn("has its own way with SIGCHLD", await self.story("ignored", f"echo {SECRET}"))


class UnfitReactorTests(SynchronousTestCase):
    """A reactor that has no processes."""

    def test_refused(self) -> None:
        """It is named, with the key."""
        error = self.assertRaises(ConfigError, TokenCommand, ["x"], reactor=Clock(), wall=time.time)
        self.assertEqual("auth.token_command", error.key)
        self.assertIn("Clock", str(error))

    def test_repr(self) -> None:
        """Arguments may be secret."""
        self.assertNotIn(SECRET, repr(TokenCommand(["x", SECRET], reactor=reactor, wall=time.time)))
