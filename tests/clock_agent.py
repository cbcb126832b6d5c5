"""
An agent in somebody else's program, for test_clock_steps: nothing is done to the reactor, which is installed as asked.

Called with ``epoll`` or ``asyncio``, and a configuration. It answers the built-in commands.
"""

from __future__ import annotations

import os
import sys

REACTOR, CONFIG = sys.argv[1:]
if REACTOR == "asyncio":
    from twisted.internet import asyncioreactor

    asyncioreactor.install()
else:
    from twisted.internet import epollreactor

    epollreactor.install()

from twisted.internet import reactor  # noqa: E402  # installed above
from twisted.logger import globalLogBeginner, textFileLogObserver  # noqa: E402

from commsmgr import Manager, settings  # noqa: E402
from commsmgr.handlers import BuiltinHandler  # noqa: E402

globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stdout)])
manager = Manager(
    settings.load(CONFIG, os.environ),
    reactor=reactor,
    handler=BuiltinHandler(status=lambda: manager.status(), uptime=lambda: 0.0),
)
manager.startService()
reactor.addSystemEventTrigger("before", "shutdown", manager.stopService)
reactor.run()
