"""commsmgr's spool, by the interface that the manager uses, in a running reactor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import msgspec
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from benchmarks.on_reactor import on_reactor
from benchmarks.sample import Sample, Watch, resident
from commsmgr import config
from commsmgr.spool import Spool
from commsmgr.spool.records import Lane

WARM_UP = 10
TAKEN = 1000
"""Entries taken and not yet acknowledged while a spool is drained, as a backend's window bounds them."""
RECEIPTS = 100
"""Entries acknowledged at once."""


def run(operations: int, size: int, batch: int) -> Sample:
    """Put ``operations`` events of ``size`` bytes: ``batch`` of them, and the next once all of these are durable."""

    async def work(reactor: Any) -> Sample:
        spool, watch = _spool(), Watch()
        await spool.open()
        await _put(spool, WARM_UP * batch, size, batch)
        watch.start()
        await _put(spool, operations, size, batch)
        sample = watch.stop(operations)
        _require(spool.outbox.stats.events, operations + WARM_UP * batch)
        await spool.close()
        return sample

    return on_reactor(work)


def fill(queued: int, operations: int, size: int) -> Sample:
    """
    Put ``operations`` events by the hundred, fill the spool up to ``queued``, put ``operations`` by the hundred again.

    The extra is the second rate as a ratio to the first.
    """

    async def work(reactor: Any) -> Sample:
        spool, watch = _spool(), Watch()
        await spool.open()
        await _put(spool, WARM_UP * 100, size, 100)
        watch.start()
        await _put(spool, operations, size, 100)
        empty = watch.stop(operations)
        await _put(spool, queued - operations - WARM_UP * 100, size, 1000)
        watch.start()
        await _put(spool, operations, size, 100)
        full = watch.stop(operations)
        _require(spool.outbox.stats.events, queued + operations)
        await spool.close()
        return msgspec.structs.replace(full, extra={"enqueue_ratio": full.value("rate") / empty.value("rate")})

    return on_reactor(work)


def backlog(queued: int, operations: int, size: int) -> Sample:
    """
    Start with a spool of ``queued + operations`` events that another process has made, and drain it.

    Operations are events drained. Extras: that of :func:`fill`; ``start``, seconds from opening to the first events
    handed out; ``drain_ratio``, the rate of the last tenth as a ratio to the first's; ``memory_ratio``, resident memory
    at the end as a ratio to that after the first tenth; ``megabytes`` on disk.
    """
    arguments = {"queued": queued, "operations": operations, "size": size}
    filled = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", "commsmgr_spool:fill", msgspec.json.encode(arguments).decode()],
        stdout=subprocess.PIPE,
        check=True,
    )
    extra = msgspec.json.decode(filled.stdout, type=Sample).extra
    extra["megabytes"] = os.stat("spool/spool.db").st_size / 1e6

    async def work(reactor: Any) -> Sample:
        total, spool, watch = queued + operations, _spool(), Watch()
        watch.start()
        await spool.open()
        drain = _Drain(spool, total)
        await drain.upto(1)
        extra["start"] = watch.stop(1).wall
        watch.start()
        await drain.upto(total // 10)
        first, memory = watch.stop(1).wall, resident()
        await drain.upto(total - total // 10)
        before = watch.stop(1).wall
        await drain.upto(total)
        sample = watch.stop(total)
        extra["drain_ratio"] = first / (sample.wall - before)
        extra["memory_ratio"] = resident() / memory
        _require(spool.outbox.stats.events, 0)
        await spool.close()
        return msgspec.structs.replace(sample, extra=extra)

    return on_reactor(work)


class _Drain:
    """Takes all events in order and acknowledges them."""

    def __init__(self, spool: Spool, total: int) -> None:
        self._spool, self._total = spool, total
        self._reader = spool.outbox.reader(Lane.EVENT)
        self._taken = self._drained = 0
        self._target, self._reached = 0, Deferred[None]()
        self._reader.on_ready = self._pump

    def upto(self, drained: int) -> Deferred[None]:
        """Fire when so many were acknowledged durably."""
        self._target, self._reached = drained, Deferred()
        self._pump()
        return self._reached

    def _pump(self) -> None:
        while self._taken - self._drained < TAKEN:
            seqs = [entry.seq for entry in self._reader.take(RECEIPTS, 1 << 20)]
            if not seqs:
                break
            if seqs != list(range(self._taken + 1, self._taken + 1 + len(seqs))):
                raise RuntimeError("events are missing or out of order")
            self._taken += len(seqs)
            self._spool.outbox.forget(seqs).addCallback(self._forgotten, len(seqs))

    def _forgotten(self, _: None, count: int) -> None:
        self._drained += count
        if self._drained >= self._target and not self._reached.called:
            self._reached.callback(None)
        self._pump()


def _spool() -> Spool:
    many = 1 << 40
    settings = config.Spool(path="spool", max_events=many, max_bytes=many)
    return Spool(settings, reactor=reactor, wall=time.time)


async def _put(spool: Spool, count: int, size: int, batch: int) -> None:
    """Put ``count`` events, ``batch`` of them and the next ones when all of these are durable."""
    body = b"r" * size
    for done in range(0, count, batch):
        await _put_together(spool, range(done, min(done + batch, count)), body)


def _put_together(spool: Spool, numbers: range, body: bytes) -> Deferred[None]:
    put, outstanding, all_durable = spool.outbox.put, len(numbers), Deferred[None]()

    def durable(_: int) -> None:
        nonlocal outstanding
        outstanding -= 1
        if not outstanding:
            all_durable.callback(None)

    for number in numbers:
        accepted = put(lane=Lane.EVENT, kind="command_result", id=f"{number:032x}", body=body)
        accepted.addCallbacks(durable, all_durable.errback)
    return all_durable


def _require(held: int, wanted: int) -> None:
    if held != wanted:
        raise RuntimeError(f"{held} events are held, not {wanted}")
