"""Tests for the built-in command handlers."""

from __future__ import annotations

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.handlers import BuiltinHandler
from commsmgr.interfaces import CommandHandler
from commsmgr.messages import Command, Result
from commsmgr.status import QueueStatus, Status


def status() -> Status:
    return Status(
        running=True,
        connected=False,
        reachable=False,
        machine_id="m",
        version="1",
        backends=(),
        queue=QueueStatus(events=3),
        problems=("backend away – since noon",),
    )


class BuiltinHandlerTests(SynchronousTestCase):
    handler: CommandHandler = BuiltinHandler(status=status, uptime=lambda: 12.5)

    def run_command(self, kind: str, command: str = "", *args: str) -> Result:
        given = Command(id="c-1", key=7, type=kind, command=command, args=args, timeout=5.0, options={})
        result = self.handler(given)
        assert isinstance(result, Result)
        self.assertEqual((result.command_id, result.key), ("c-1", 7))
        return result

    def test_ping(self) -> None:
        """ping is answered with pong."""
        result = self.run_command("ping")
        self.assertEqual((result.status, result.output, result.exit_code), ("success", "pong", 0))

    def test_echo(self) -> None:
        """echo gives back the command and its arguments, blanks and all, and nothing for nothing."""
        self.assertEqual(self.run_command("echo", "hello", "wide  world", "ü").output, "hello wide  world ü")
        self.assertEqual(self.run_command("echo", "", "only", "args").output, "only args")
        self.assertEqual(self.run_command("echo").output, "")

    def test_uptime(self) -> None:
        """uptime gives seconds."""
        self.assertEqual(self.run_command("uptime").output, "12.500")

    def test_status(self) -> None:
        """status gives the whole status as JSON, as it is at that moment."""
        result = self.run_command("status")
        self.assertEqual(msgspec.json.decode(result.output, type=Status), status())

    def test_unknown(self) -> None:
        """Anything else is rejected without being run, in any spelling; the reason names the type, shortened."""
        for kind in ("", "shell", "PING", "ping ", "__call__"):
            result = self.run_command(kind, "rm", "-rf", "/")
            self.assertEqual((result.status, result.output, result.exit_code), ("rejected", "", 1))
            self.assertIn(repr(kind), result.error)
        self.assertLess(len(self.run_command("x" * 4096).error), 250)

    def test_failing_status(self) -> None:
        """An exception passes: the manager makes an error result of it."""

        def broken() -> Status:
            raise ZeroDivisionError

        self.handler = BuiltinHandler(status=broken, uptime=lambda: 0.0)
        self.assertRaises(ZeroDivisionError, self.run_command, "status")
