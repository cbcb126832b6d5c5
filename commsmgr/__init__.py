"""
commsmgr: the part of an agent that talks to its backend.

See :class:`Manager` to embed it in a Twisted agent, and ``twistd commsmgr`` to run it by itself.
"""

from commsmgr._version import __version__
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
