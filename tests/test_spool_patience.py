"""A spool that is opened as soon as its disk allows it."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import NotRunning, SpoolLocked, SpoolWriteFailed
from commsmgr.spool import Opened, PatientOpening

FULL = SpoolWriteFailed("the disk is full")
OPENED = Opened(None, (), ())


class PatienceTests(SynchronousTestCase):
    """With a spool that answers as it is told."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.attempts: list[float] = []
        self.answer: Any = lambda: fail(FULL)
        self.opening = PatientOpening(self, self.clock)  # type: ignore[arg-type]  # it needs no more than open()

    def open(self) -> Deferred[Opened]:
        """What the spool does."""
        self.attempts.append(self.clock.seconds())
        return self.answer()

    def start(self) -> Deferred[Opened | None]:
        return Deferred.fromCoroutine(self.opening.open())

    def wait(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.opening.wait())

    def test_pauses(self) -> None:
        """Attempts come ever more rarely, at last every 30 seconds, until one succeeds; then nothing is left."""
        opened = self.start()
        for _ in range(200):
            self.clock.advance(0.5)
        self.assertEqual(self.attempts, [0, 1, 3, 7, 15, 31, 61, 91])
        self.answer = lambda: succeed(OPENED)
        self.clock.advance(30)
        self.assertIs(self.successResultOf(opened), OPENED)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_who_waits(self) -> None:
        """Who waits is refused at the first failure, who comes later at once; who comes after it waits to be let in."""
        first: Deferred[Opened] = Deferred()
        self.answer = lambda: first
        opened, early = self.start(), self.wait()
        self.assertNoResult(early)
        self.answer = lambda: succeed(OPENED)
        first.errback(FULL)
        self.assertEqual(self.failureResultOf(early, SpoolWriteFailed).value.fact, FULL.fact)
        self.assertEqual(self.failureResultOf(self.wait(), SpoolWriteFailed).value.fact, FULL.fact)
        self.clock.advance(1)
        self.assertIs(self.successResultOf(opened), OPENED)
        late, refused = self.wait(), None
        self.assertNoResult(late)
        self.opening.let_in()
        self.successResultOf(late)
        refused = self.wait()
        self.opening.refuse(NotRunning())
        self.failureResultOf(refused, NotRunning)

    def test_what_waiting_cannot_help(self) -> None:
        """Another process on the spool ends the start at once, at a later attempt too."""
        opened = self.start()
        self.answer = lambda: fail(SpoolLocked())
        self.clock.advance(1)
        self.failureResultOf(opened, SpoolLocked)

    def test_stop(self) -> None:
        """A stop ends the pause at once; one that comes during an attempt lets that end, and makes no other."""
        opened = self.start()
        self.opening.stop()
        self.assertIsNone(self.successResultOf(opened))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.opening = PatientOpening(self, self.clock)  # type: ignore[arg-type]  # as above
        hung: Deferred[Opened] = Deferred()
        self.answer = lambda: hung
        opened = self.start()
        self.opening.stop()
        self.assertNoResult(opened)
        hung.errback(FULL)
        self.assertIsNone(self.successResultOf(opened))
        self.assertEqual((len(self.attempts), self.clock.getDelayedCalls()), (2, []))
