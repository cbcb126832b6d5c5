"""A disk that fails may have taken what it seemed to refuse: once it works again that is found, and not stuck."""

from __future__ import annotations

import os
import sqlite3
from random import Random
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import SpoolWriteFailed
from commsmgr.spool import Accepted, Lane, Opened, Spool
from commsmgr.spool.executor import InlineExecutor
from tests.faulty_vfs import FaultyVFS, Operation


class ResurfacedTests(SynchronousTestCase):
    """Everything is flushed in vain for a while: it is in the log, and nobody is told so."""

    def setUp(self) -> None:
        directory = self.mktemp()
        os.mkdir(directory, 0o700)
        vfs = FaultyVFS()
        vfs.install()
        self.addCleanup(vfs.uninstall)
        self.disk = vfs.disk(directory, Random(1))
        self.clock = Clock()
        settings = config.Spool(path=directory, durability="full")
        self.spool = Spool(
            settings, reactor=self.clock, wall=lambda: 1e9 + self.clock.seconds(), executor=InlineExecutor(self.clock)
        )
        self.done(self.spool.open())
        self.addCleanup(lambda: self.done(self.spool.close()))
        self.resurfaced: list[Opened] = []
        self.spool.on_resurfaced = self.resurfaced.append
        # The log has a head from now on; before that the first flush would come before what is written.
        self.done(self.put("earlier"))
        self.assertEqual(1, len(self.spool.outbox.reader(Lane.EVENT).take(10, 1000)))

    def done(self, deferred: Deferred[Any]) -> Any:
        """Return what a Deferred fires with within a second."""
        for _ in range(100):
            self.clock.advance(0.01)
        return self.successResultOf(deferred)

    def in_vain(self, deferred: Deferred[Any]) -> None:
        """Let the disk write what was asked for, and fail to flush it."""

        def refuse(operation: Operation) -> int:
            return sqlite3.SQLITE_IOERR_FSYNC if operation.kind == "sync" else sqlite3.SQLITE_OK

        self.disk.hook = refuse
        for _ in range(100):
            self.clock.advance(0.01)
        self.disk.hook = None
        self.failureResultOf(deferred, SpoolWriteFailed)

    def put(self, id: str) -> Deferred[int]:
        """Put an event."""
        return self.spool.outbox.put(lane=Lane.EVENT, kind="command_result", id=id, body=b"{}")

    def test_event(self) -> None:
        """An event that is there after all is handed out, before the one whose commit found it."""
        reader = self.spool.outbox.reader(Lane.EVENT)
        self.in_vain(self.put("refused"))
        self.done(self.put("accepted"))
        self.assertEqual(["refused", "accepted"], [entry.id for entry in reader.take(10, 1000)])

    def test_unread(self) -> None:
        """A page that a failing disk does not give is no defect of ours: nothing is logged as one."""
        self.patch(self.spool.outbox._store, "submit", lambda job: fail(SpoolWriteFailed("the disk is full")))
        self.spool.outbox.reader(Lane.EVENT).rewind()
        self.assertEqual([], self.flushLoggedErrors())

    def test_command(self) -> None:
        """A command that is there after all is told of once; duplicates of it are acknowledged and not offered."""
        accept = self.spool.inbox.accept
        self.in_vain(accept(id="refused", digest="", body=b"{}"))
        accepted = self.done(accept(id="accepted", digest="", body=b"{}"))
        self.assertIsInstance(accepted, Accepted)
        (opened,) = self.resurfaced
        self.assertEqual(((), ["refused"]), (opened.interrupted, [command.id for command in opened.waiting]))
        self.in_vain(self.put("event"))
        self.done(self.put("event"))
        self.assertEqual(1, len(self.resurfaced))
