"""
commsmgr: the part of an agent that talks to its backend.

See :class:`Manager` to embed it in a Twisted agent, ``twistd commsmgr`` to run it by itself, and ``commsmgr spool`` to
look into a spool.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from commsmgr._version import __version__

if TYPE_CHECKING:
    from commsmgr.channel import CommandChannel
    from commsmgr.config import Config
    from commsmgr.errors import CommsError, ConfigError, DeadlineExceeded, QueueFull, TransportError
    from commsmgr.manager import Manager
    from commsmgr.messages import Command, Push, Result, SystemHealth
    from commsmgr.settings import load
    from commsmgr.status import Status
    from commsmgr.transport.http import HTTPResponse

__all__ = [
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
    "TransportError",
    "__version__",
    "load",
]

# Looked up when first asked for: whatever imports a part, as the command line does, need not load the network with it.
_HOMES = {
    "channel": ("CommandChannel",),
    "config": ("Config",),
    "errors": ("CommsError", "ConfigError", "DeadlineExceeded", "QueueFull", "TransportError"),
    "manager": ("Manager",),
    "messages": ("Command", "Push", "Result", "SystemHealth"),
    "settings": ("load",),
    "status": ("Status",),
    "transport.http": ("HTTPResponse",),
}


def __getattr__(name: str) -> Any:
    """Load a public name."""
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"commsmgr.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
