"""An agent whose every command has a result of a given size. Run by tests that watch its memory from outside."""

from __future__ import annotations

import os
import sys
from typing import Any

from twisted.internet import reactor as installed
from twisted.logger import globalLogPublisher

from commsmgr import Manager, settings
from commsmgr.messages import Command, Result
from commsmgr.observe.logs import make_observer
from commsmgr.redact import Redactor

CONFIG, SIZE = sys.argv[1], int(sys.argv[2])
LEVEL: Any = sys.argv[3]
reactor: Any = installed


def run(command: Command) -> Result:
    """Say much."""
    return command.success("x" * SIZE)


globalLogPublisher.addObserver(make_observer(sys.stdout, format="text", level=LEVEL, redactor=Redactor(())))
manager = Manager(settings.load(CONFIG, os.environ), reactor=reactor, handler=run, on_push=lambda push: None)
reactor.addSystemEventTrigger("before", "shutdown", manager.stopService)
reactor.callWhenRunning(manager.startService)
reactor.run()
