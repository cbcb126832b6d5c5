"""Command handlers that do no harm, for the demo and for trying out a backend. They touch nothing on the machine."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from commsmgr.messages import Command, Result

_SHOWN = 100  # characters of an unknown type that the rejection repeats


class BuiltinHandler:
    """
    Answers the command types ``ping``, ``echo``, ``uptime`` and ``status``, and rejects all others.

    :param status: gives what ``status`` answers, as JSON; :meth:`commsmgr.Manager.status`, say.
    :param uptime: gives the seconds that ``uptime`` answers.
    """

    def __init__(self, *, status: Callable[[], msgspec.Struct], uptime: Callable[[], float]) -> None:
        self._status = status
        self._uptime = uptime

    def __call__(self, command: Command, /) -> Result:
        """Return the result of ``command``, at once."""
        match command.type:
            case "ping":
                return command.success("pong")
            case "echo":
                return command.success(" ".join(filter(None, (command.command, *command.args))))
            case "uptime":
                return command.success(f"{self._uptime():.3f}")
            case "status":
                return command.success(msgspec.json.encode(self._status()).decode())
        return command.rejected(f"unknown command type {command.type[:_SHOWN]!r}: not ping, echo, uptime or status")
