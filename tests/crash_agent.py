"""
An agent that may be killed at any moment. Run by test_crash, which audits what it leaves.

Before it runs a command it writes ``run ID KEY REDELIVERED`` into a journal and has the disk confirm that, and
``accepted ID KEY`` when its result has been accepted: what a machine would remember of the effects of a command.
"""

from __future__ import annotations

import os
import sys
from random import Random

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from commsmgr import Manager, settings
from commsmgr.messages import Command

CONFIG, JOURNAL, SEED = sys.argv[1:]
random = Random(SEED)
journal = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
manager = Manager(settings.load(CONFIG, os.environ), reactor=reactor)


def note(*words: object) -> None:
    """Write a line that stays."""
    os.write(journal, (" ".join(map(str, words)) + "\n").encode())
    os.fsync(journal)


async def run(command: Command) -> None:
    """Run one command: it takes a moment, or none."""
    note("run", command.id, command.key, int(command.redelivered))
    if random.random() < 0.7:
        await deferLater(reactor, random.random() * 0.02)
    await manager.send_result(command.success("ran"))
    note("accepted", command.id, command.key)


async def work() -> None:
    """Run one command after the other."""
    async for command in manager.commands():
        await run(command)


manager.startService()
for _ in range(3):
    Deferred.fromCoroutine(work()).addErrback(lambda failure: failure.printTraceback())
reactor.addSystemEventTrigger("before", "shutdown", manager.stopService)
reactor.run()
