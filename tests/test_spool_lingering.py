"""Receipts wait for a commit that is made anyway, and what a turn of the reactor hands over is one batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.trial.unittest import TestCase

from commsmgr import config
from commsmgr.spool import Lane, Spool
from commsmgr.spool.batch import Outcome, Work
from commsmgr.spool.executor import ThreadExecutor
from commsmgr.spool.store import Store
from commsmgr.spool.writer import Writer
from tests.test_spool_store import OnClock

LINGER = 0.05


class LingeringTests(OnClock):
    """With an executor whose every batch costs a commit."""

    def setUp(self) -> None:
        super().setUp()
        self.executor.linger = LINGER
        self.batches: list[int] = []
        self.patch(Writer, "run", noting(self.batches))
        self.agent = self.spool()
        self.done(self.agent.open())
        self.seqs = [self.done(self.put(self.agent, f"e{n}")) for n in range(3)]
        self.events = self.agent.outbox.reader(Lane.EVENT)
        self.assertEqual([entry.seq for entry in self.events.take(10, 1000)], self.seqs)
        self.batches.clear()

    def tearDown(self) -> None:
        self.done(self.agent.close())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def turns(self) -> None:
        """Let everything happen that waits for no time to pass."""
        self.clock.pump([0] * 10)

    def held(self, spool: Spool) -> list[str]:
        """Return the ids of what ``spool`` has to be sent."""
        self.pass_time()
        return [entry.id for entry in spool.outbox.reader(Lane.EVENT).take(10, 1000)]

    def under_way(self) -> tuple[Store, Any]:
        """Have a batch done, and not yet told: the store takes it to be under way."""
        untold: list[tuple[Store, Any]] = []
        settling = self.patch(Store, "_settle", lambda *settled: untold.append(settled))
        self.put(self.agent, "begins")
        self.turns()
        settling.restore()
        return untold[0]

    def test_with_the_next_commit(self) -> None:
        """A receipt alone begins no batch; it goes with the next one, whatever that is for."""
        forgetting = self.agent.outbox.forget(self.seqs[:2])
        self.turns()
        self.assertNoResult(forgetting)
        self.assertEqual((self.batches, self.agent.outbox.stats.events), ([], 3))
        put = self.put(self.agent, "next")
        self.turns()
        self.successResultOf(forgetting)
        self.successResultOf(put)
        self.assertEqual((self.batches, self.agent.outbox.stats.events), ([2], 2))
        self.pass_time()
        self.assertEqual(self.batches, [2])

    def test_before_long(self) -> None:
        """Where nothing else comes, receipts have a batch of their own, all that came meanwhile together."""
        first = self.agent.outbox.forget(self.seqs[:1])
        self.clock.advance(LINGER * 0.9)
        second = self.agent.outbox.forget(self.seqs[1:])
        self.turns()
        self.assertNoResult(first)
        self.clock.advance(LINGER * 0.1)
        self.turns()
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual((self.batches, self.agent.outbox.stats.events), ([2], 0))

    def test_during_a_commit(self) -> None:
        """Receipts that come while a batch is under way begin none after it; other work does, and takes them along."""
        for others, batches in ((0, [1]), (1, [1, 2])):
            self.batches.clear()
            store, done = self.under_way()
            forgetting = self.agent.outbox.forget([self.seqs.pop()])
            for n in range(others):
                self.put(self.agent, f"other {n}")
            Store._settle(store, done)
            self.turns()
            self.assertEqual(self.batches, batches)
            self.assertEqual(forgetting.called, bool(others))
            self.pass_time()
            self.successResultOf(forgetting)

    def test_not_sent_again_meanwhile(self) -> None:
        """What has a receipt is not handed out any more, although it may still be on the disk."""
        self.agent.outbox.forget(self.seqs[:2])
        self.events.rewind()
        self.assertEqual(self.held(self.agent), ["e2"])

    def test_stop(self) -> None:
        """A receipt that waits is committed when the spool is closed."""
        forgetting = self.agent.outbox.forget(self.seqs[:2])
        closing = self.agent.close()
        self.turns()
        self.successResultOf(closing)
        self.successResultOf(forgetting)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.agent = self.spool()
        self.done(self.agent.open())
        self.assertEqual(self.held(self.agent), ["e2"])

    def test_stop_during_a_commit(self) -> None:
        """So is one that came while a batch was under way."""
        store, done = self.under_way()
        forgetting = self.agent.outbox.forget(self.seqs)
        closing = self.agent.close()
        Store._settle(store, done)
        self.turns()
        self.successResultOf(closing)
        self.successResultOf(forgetting)

    def test_crash(self) -> None:
        """After a crash before that commit the entry is sent again, with the id that the backend knows."""
        self.agent.outbox.forget(self.seqs)
        self.turns()
        crashed, self.directory = self.directory, self.mktemp()
        shutil.copytree(crashed, self.directory)
        again = self.spool()
        self.done(again.open())
        self.assertEqual(self.held(again), ["e0", "e1", "e2"])
        self.done(again.close())


class TurnTests(TestCase):
    """With the thread."""

    async def test_one_batch(self) -> None:
        """What one turn hands over is one batch, though the thread could have begun in the middle of the turn."""
        batches: list[int] = []
        self.patch(Writer, "run", noting(batches))
        spool = Spool(config.Spool(path=self.mktemp()), reactor=reactor, wall=time.time)
        await spool.open()
        await spool.outbox.dead_letters(0)
        batches.clear()
        puts = []
        for n in range(5):
            puts.append(spool.outbox.put(lane=Lane.EVENT, kind="note", id=f"e{n}", body=b"{}"))
            time.sleep(0.005)  # the interpreter is the thread's meanwhile
        await gatherResults(puts)
        self.assertEqual(batches, [5])
        # Handed over in the very turn in which the spool is closed.
        last = spool.outbox.put(lane=Lane.EVENT, kind="note", id="last", body=b"{}")
        await spool.close()
        self.assertEqual(self.successResultOf(last), 6)

    async def test_stop(self) -> None:
        """An executor that is stopped does what it was given in the same turn."""
        executor = ThreadExecutor(reactor)  # type: ignore[arg-type]
        done = executor(lambda: 1)
        await executor.stop()
        self.assertEqual(self.successResultOf(done), 1)


def noting(batches: list[int]) -> Any:
    """Return ``Writer.run`` that notes how many jobs each batch has."""
    run = Writer.run

    def noted(self: Writer, jobs: Sequence[Work]) -> Outcome:
        batches.append(len(jobs))
        return run(self, jobs)

    return noted
