"""
commsmgr: the part of an agent that talks to its backend.

See :class:`Manager` to embed it in a Twisted agent, ``twistd commsmgr`` to run it by itself, and ``commsmgr spool`` to
look into a spool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from commsmgr._version import __version__
from commsmgr.lazy import names as _names

if TYPE_CHECKING:
    from commsmgr.auth.providers import CallableToken
    from commsmgr.bearer import Token
    from commsmgr.channel import CommandChannel
    from commsmgr.config import Config
    from commsmgr.errors import CommsError, ConfigError, DeadlineExceeded, QueueFull, TransportError
    from commsmgr.manager import Manager
    from commsmgr.messages import Command, Push, Result, SystemHealth
    from commsmgr.settings import load
    from commsmgr.status import Status
    from commsmgr.transport.http import HTTPResponse

__all__ = [
    "CallableToken",
    "Command",
    "CommandChannel",
    "CommsError",
    "Config",
    "ConfigError",
    "DeadlineExceeded",
    "HTTPResponse",
    "Manager",
    "Push",
    "QueueFull",
    "Result",
    "Status",
    "SystemHealth",
    "Token",
    "TransportError",
    "__version__",
    "load",
]

__getattr__, __dir__ = _names(
    __name__,
    {
        "bearer": ("Token",),
        "channel": ("CommandChannel",),
        "config": ("Config",),
        "auth.providers": ("CallableToken",),
        "errors": ("CommsError", "ConfigError", "DeadlineExceeded", "QueueFull", "TransportError"),
        "manager": ("Manager",),
        "messages": ("Command", "Push", "Result", "SystemHealth"),
        "settings": ("load",),
        "status": ("Status",),
        "transport.http": ("HTTPResponse",),
    },
)
