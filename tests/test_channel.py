"""The channel of commands: in order, each once, durably marked before anybody sees it."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.channel import CommandChannel
from commsmgr.errors import NotRunning, SpoolWriteFailed
from commsmgr.messages import Command
from tests.command_kit import command


class ChannelTests(SynchronousTestCase):
    """One consumer and many."""

    def setUp(self) -> None:
        self.marks: list[tuple[list[int], Deferred[None]]] = []
        self.channel = CommandChannel(self.mark)

    def mark(self, keys: Iterable[int]) -> Deferred[None]:
        self.marks.append((list(keys), Deferred()))
        return self.marks[-1][1]

    def settle(self) -> None:
        """Say that what is to be marked is marked, until nothing more comes."""
        while self.marks:
            self.marks.pop(0)[1].callback(None)

    def keys(self, *waiting: Deferred[Command]) -> list[int]:
        return [self.successResultOf(each).key for each in waiting]

    def test_in_order_each_once(self) -> None:
        """Commands go out in the order of acceptance, to consumers in the order of asking."""
        early = [self.channel.get(), self.channel.get()]
        for key in (1, 2, 3):
            self.channel.put(command(key))
        late = self.channel.get()
        self.settle()
        self.assertEqual(self.keys(*early, late), [1, 2, 3])
        self.assertEqual(len(self.channel), 0)

    def test_marked_before_seen(self) -> None:
        """The consumer waits until the mark is durable."""
        self.channel.put(command(7))
        waiting = self.channel.get()
        self.assertEqual(self.marks[0][0], [7])
        self.assertNoResult(waiting)
        self.settle()
        self.assertEqual(self.keys(waiting), [7])

    def test_cancelled_in_line(self) -> None:
        """Who gives up before there is a command takes none."""
        first, second = self.channel.get(), self.channel.get()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.channel.put(command(1))
        self.settle()
        self.assertEqual(self.keys(second), [1])

    def test_cancelled_while_marking(self) -> None:
        """A command on its way to somebody who gives up goes to the next in line, ahead of later ones."""
        first = self.channel.get()
        self.channel.put(command(1))
        self.channel.put(command(2))
        second = self.channel.get()
        third = self.channel.get()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.settle()
        self.assertEqual(self.keys(second, third), [2, 1])

    def test_cancelled_with_nobody_else(self) -> None:
        """The command is there for whoever asks next."""
        self.channel.put(command(1))
        self.channel.get().addErrback(lambda failure: None).cancel()
        self.marks.clear()
        self.assertEqual(len(self.channel), 1)
        waiting = self.channel.get()
        self.settle()
        self.assertEqual(self.keys(waiting), [1])

    def test_mark_fails(self) -> None:
        """Without a durable mark nobody gets the command; those that fail together keep their order."""
        for key in (1, 2, 3):
            self.channel.put(command(key))
        waiting = [self.channel.get(), self.channel.get()]
        for _, mark in self.marks:
            mark.errback(SpoolWriteFailed())
        for each in waiting:
            self.failureResultOf(each, SpoolWriteFailed)
        self.marks.clear()
        again = [self.channel.get() for _ in range(3)]
        self.settle()
        self.assertEqual(self.keys(*again), [1, 2, 3])

    def test_close(self) -> None:
        """Who waits and who comes later hears that the manager stops; nothing is handed out any more."""
        waiting = self.channel.get()
        self.channel.close()
        self.failureResultOf(waiting, NotRunning)
        self.channel.put(command(1))
        self.failureResultOf(self.channel.get(), NotRunning)

    def test_close_while_marking(self) -> None:
        """What is marked as offered already is handed out: the next start would call it interrupted."""
        self.channel.put(command(1))
        waiting = self.channel.get()
        self.channel.close()
        self.settle()
        self.assertEqual(self.keys(waiting), [1])

    def test_iteration_ends_at_the_stop(self) -> None:
        """``async for`` gives command after command, and ends when the manager stops."""
        channel = CommandChannel(lambda keys: succeed(None))

        async def read() -> list[int]:
            return [each.key async for each in channel]

        reading = Deferred.fromCoroutine(read())
        channel.put(command(1))
        channel.put(command(2))
        self.assertNoResult(reading)
        channel.close()
        self.assertEqual(self.successResultOf(reading), [1, 2])

    def test_iteration_fails_with_the_spool(self) -> None:
        """A mark that cannot be stored ends the iteration with its error, not silently."""
        self.channel.put(command(1))
        reading = Deferred.fromCoroutine(self.channel.__anext__())
        self.marks[0][1].errback(SpoolWriteFailed())
        self.failureResultOf(reading, SpoolWriteFailed)
