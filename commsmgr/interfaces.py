"""
What an embedding agent may supply.

Each is a plain callable or a small protocol, so that an agent needs no base class of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from commsmgr.bearer import Token
from commsmgr.messages import Command, JSONObject, Push, Result, SystemHealth


class CommandHandler(Protocol):
    """
    Runs commands, at most ``commands.concurrency`` at once.

    :return: the result, at once or later. Raising reports an ``error`` result with the exception's text. When the
        command's timeout ends, what was returned is cancelled and a ``timeout`` result is reported.
    """

    def __call__(self, command: Command, /) -> Result | Awaitable[Result]: ...


class PushHandler(Protocol):
    """Takes a message of a type that commsmgr does not know. An exception is logged and changes nothing."""

    def __call__(self, push: Push, /) -> None: ...


class TokenProvider(Protocol):
    """
    Gives the bearer token (RFC 6750) for each request and each WebSocket upgrade.

    :meth:`get` gives it as a string or, when it is known until when it is good, as a
    :class:`~commsmgr.bearer.Token`. :meth:`refused` says that the backend answered 401 to this very token: the next
    :meth:`get` should bring a newer one if there is any.
    """

    def get(self) -> Awaitable[str | Token]: ...

    def refused(self, token: str) -> None: ...


class MachineSource(Protocol):
    """
    Says what the machine is and how it is. Called in a thread: it may read files and block for a while.

    :meth:`inventory` returns the ``data`` object of an inventory message (``system``, ``hardware``, ``software``,
    ``network``).
    """

    def inventory(self) -> JSONObject: ...

    def health(self) -> SystemHealth: ...
