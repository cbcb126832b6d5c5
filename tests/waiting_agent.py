"""
An agent in somebody else's program that tells systemd how it is, on a disk that is full until SIGUSR1: for
test_systemd.
"""

from __future__ import annotations

import os
import signal
import sys

from twisted.application.service import MultiService
from twisted.internet import reactor

from commsmgr import Manager, settings
from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool.writer import Writer
from commsmgr.systemd import SystemdNotify

whole = Writer.open


def full(writer: Writer) -> None:
    """Open no spool."""
    raise SpoolWriteFailed("disk full, says the test")


Writer.open = full
signal.signal(signal.SIGUSR1, lambda *_: setattr(Writer, "open", whole))
agent = MultiService()
manager = Manager(settings.load(sys.argv[1], os.environ), reactor=reactor)
manager.setServiceParent(agent)
SystemdNotify(manager, reactor=reactor).setServiceParent(agent)
agent.startService()
reactor.addSystemEventTrigger("before", "shutdown", agent.stopService)
reactor.run()
