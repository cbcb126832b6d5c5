"""Spools in memory: few databases are open, however many spools there are, and none sees what is another's."""

from __future__ import annotations

from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.spool import resting
from tests.test_spool_memory import World


class RestingTests(SynchronousTestCase):
    """More spools than may be open."""

    def setUp(self) -> None:
        self.patch(resting, "OPEN", 3)
        self.patch(resting, "_open", resting._Open())

    def opened(self) -> World:
        world = World()
        world.open()
        self.addCleanup(lambda: world.get(world.spool.close()))
        return world

    def test_nothing_is_lost_at_rest(self) -> None:
        """Events and commands come back from a database that was closed meanwhile, and numbers go on."""
        worlds = [self.opened() for _ in range(10)]
        for number, world in enumerate(worlds):
            first = world.get(world.event(f"event-{number}"))
            accepted = world.get(world.inbox.accept(id=f"command-{number}", digest="", body=b"{}"))
            self.assertEqual((first, accepted.command.id), (1, f"command-{number}"))
        self.assertEqual(len(resting._open.writers), 3)
        for number, world in enumerate(worlds):
            world.events.rewind()
            world.run()
            self.assertEqual(world.taken(), [f"event-{number}"])
            self.assertEqual(world.get(world.event("second")), 2)
            unfinished = world.get(world.inbox.unfinished())
            self.assertEqual([command.id for command, _ in unfinished], [f"command-{number}"])
        self.assertEqual(len(resting._open.writers), 3)

    def test_nothing_is_shared_but_nothing(self) -> None:
        """Those that hold nothing take turns with one database, and whoever writes keeps it."""
        first, second = self.opened(), self.opened()
        self.assertEqual(len(resting._open.writers), 0)
        lent = resting._open.empty
        self.assertIsNotNone(lent)
        first.get(first.event("first"))
        self.assertIsNone(resting._open.empty)
        self.assertEqual(second.get(second.outbox.expire()), 0)
        second.events.rewind()
        second.run()
        self.assertEqual(second.taken(), [])
        self.assertIsNot(resting._open.empty, lent)
        third = self.opened()
        self.assertEqual((third.taken(), first.taken()), ([], ["first"]))

    def test_large_ones_stay_open(self) -> None:
        """A database that weighs more than what an open one takes is not copied to and fro."""
        large = self.opened()
        large.get(large.event("large", b"x" * resting.LARGE))
        with mock.patch.object(resting, "_awake", wraps=resting._awake) as awake:
            for _ in range(5):
                world = self.opened()
                world.get(world.event("small"))
            opened = awake.call_count
            large.get(large.event("another"))
            self.assertEqual(awake.call_count, opened)
        self.assertEqual(large.taken(), ["large", "another"])

    def test_cannot_rest(self) -> None:
        """What is committed is told of as such, though another spool could not be put to rest for it."""
        worlds = [self.opened() for _ in range(4)]
        for world in worlds[:3]:
            world.get(world.event("first"))
        self.patch(resting.RestingWriter, "rest", mock.Mock(side_effect=MemoryError))
        last = worlds[3]
        for name in ("one", "two"):
            last.get(last.event(name))
        self.assertEqual(last.taken(), ["one", "two"])
        self.assertEqual(len(self.flushLoggedErrors(MemoryError)), 2)

    def test_nothing_remains(self) -> None:
        """A spool that is closed leaves no database, and begins with nothing."""
        world = self.opened()
        world.get(world.event("gone"))
        world.get(world.spool.close())
        self.assertEqual(len(resting._open.writers), 0)
        world.open()
        self.assertEqual(world.taken(), [])
