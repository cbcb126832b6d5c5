"""A backend that thinks up names without end: ids, types, codes, reasons. None of them stays anywhere in memory."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import ClosedByPeer, HTTPStatusError, UpgradeRefused
from commsmgr.observe.metrics import Metrics, reason_label
from commsmgr.openlink import LinkEvents
from commsmgr.schedules import Periodic
from tests.command_kit import CommandWorld
from tests.link_kit import LinkBench

MANY = 10_000
"""Names of each kind and in each dialect: a hundred and twenty thousand."""
BLOCKS = 500
"""Objects that may be more afterwards: what grows with the first of its kind, and the interpreter's own."""

KINDS: dict[str, Callable[[str], Any]] = {
    "push": lambda name: {"type": name, "id": name},
    "command": lambda name: {"type": "command", "id": name, "data": {"type": name}},
    "no command": lambda name: {"type": "command", "id": name, "data": name},
    "ack": lambda name: {"type": "ack", "ids": [name]},
    "nack": lambda name: {"type": "nack", "id": name, "data": {"code": name, "message": name}},
    "no type": lambda name: {"type": [name], name: name},
}


def settled() -> int:
    """Return how many objects there are, garbage apart."""
    gc.collect()
    return sys.getallocatedblocks()


class Names(SynchronousTestCase):
    """One link, and the intake behind it."""

    def test_nothing_stays(self) -> None:
        """Neither objects nor lines of the metrics grow with the number of distinct names."""
        # Commands are refused beyond the first: what is taken is in the inbox, on the disk, which has its own bounds.
        world = CommandWorld(max_pending=1)
        events = LinkEvents(
            registered=lambda link: None,
            ended=lambda link: None,
            receipts=lambda link, seqs: None,
            refused=lambda link, seq, refusal: None,
            command=world.intake.arrived,
            pushed=lambda push: None,
            settings=lambda settings: None,
            losses_acked=lambda told: None,
            losses_refused=lambda refusal: None,
        )
        for v1 in (True, False):
            bench = LinkBench(world.clock, v1=v1, settings=config.WebSocket(), metrics=world.metrics, events=events)
            bench.register()

            def flood(numbers: Iterator[int], bench: LinkBench = bench) -> None:
                for number in numbers:
                    for make in KINDS.values():
                        bench.say(json.dumps(make(f"name-{number}")).encode())
                    if number % 100 == 0:
                        world.run()
                        if bench.connection.pings():
                            bench.pong()
                        bench.connection.take()
                        world.said.clear()

            flood(iter(range(1001)))
            before, series = settled(), self.series(world.registry)
            flood(iter(range(1001, MANY + 1)))
            self.assertLess(settled() - before, BLOCKS)
            self.assertEqual(self.series(world.registry), series)
            self.assertFalse([line for line in series if "name" in line.partition("{")[2]], series)
            self.assertEqual(bench.connection.killed, [])
            bench.link.ended()

    def series(self, registry: CollectorRegistry) -> set[str]:
        """Return the names and labels of all that Prometheus would read."""
        return {f"{sample.name}{sample.labels}" for family in registry.collect() for sample in family.samples}

    def test_reasons(self) -> None:
        """Statuses and close codes, all that could be written, make a few labels."""
        labels = {reason_label(ClosedByPeer(code=code)) for code in range(1 << 16)}
        labels |= {reason_label(UpgradeRefused(status=status)) for status in range(10_000)}
        labels |= {reason_label(HTTPStatusError(status=status)) for status in range(10_000)}
        self.assertLess(len(labels), 70)
        registry = CollectorRegistry()
        metrics = Metrics(registry, seconds=lambda: 0.0)
        for label in labels:
            metrics.link_ended("one", label)
        self.assertLess(len(self.series(registry)), 100)


class Settings(SynchronousTestCase):
    """Intervals that a backend sets all the time."""

    def test_to_and_fro(self) -> None:
        """Whatever a backend sets, and how often: no two starts are nearer than its least interval, and they go on."""
        clock = Clock()
        starts: list[float] = []

        def act() -> Any:
            starts.append(clock.seconds())
            return succeed(None)

        schedule = Periodic("beat", act, interval=30.0, jitter=5.0, clock=clock, random=Random(1))
        schedule.start()
        for turn in range(10_000):
            for interval in (1.0, 86400.0, 1.0):
                schedule.set_interval(interval)
            clock.advance(0.01)
            self.assertEqual(len(clock.getDelayedCalls()), 1, turn)
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        self.assertGreaterEqual(min(gaps), 0.999)
        self.assertLess(max(gaps), 1.02)
        # The last word counts, and the configured interval is back when the link is gone.
        schedule.set_interval(86400.0)
        schedule.set_interval(None)
        before = len(starts)
        clock.pump([1.0] * 61)
        self.assertEqual(len(starts) - before, 2)
        self.successResultOf(Deferred.fromCoroutine(schedule.stop(1.0)))
        self.assertEqual(clock.getDelayedCalls(), [])
