"""commsmgr's spool, by the interface that the manager uses, in a running reactor."""

from __future__ import annotations

import os
import time
from shutil import copytree
from statistics import median
from time import process_time
from typing import Any

import msgspec
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from benchmarks.on_reactor import on_reactor
from benchmarks.sample import Sample, Watch, resident
from benchmarks.servers.filled_spools import SIZE
from commsmgr import config
from commsmgr.spool import Spool
from commsmgr.spool.records import Lane

WARM_UP = 10
TAKEN = 1000
"""Entries taken and not yet acknowledged while a spool is drained, as a backend's window bounds them."""
RECEIPTS = 100
"""Entries acknowledged at once."""
TOGETHER = 1000
"""Events put, and then drained, where a number of them shall go on waiting."""
PARTS = 10
"""Parts of a drain that are looked at by themselves."""


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


def queued(queued: int, operations: int, spools: str) -> Sample:
    """
    In a spool with ``queued`` events put some, by the hundred, and drain as many, and so on: so many always wait.

    An operation is one event put and one drained. Extras: the processor time of each, in microseconds.
    """

    async def work(reactor: Any) -> Sample:
        spool, watch = _spool(f"{spools}/{queued}"), Watch()
        await spool.open()
        _require(spool.outbox.stats.events, queued)
        drain = _Drain(spool)
        cpu = [0.0, 0.0]
        for done in range(-TOGETHER, operations, TOGETHER):
            if done == 0:
                watch.start()
                cpu = [0.0, 0.0]
            began = process_time()
            await _put(spool, TOGETHER, SIZE, 100)
            put = process_time()
            await drain.more(TOGETHER)
            cpu[0] += put - began
            cpu[1] += process_time() - put
        enqueue, forget = (each / operations * 1e6 for each in cpu)
        sample = watch.stop(operations, us_CPU_to_enqueue=enqueue, us_CPU_to_drain=forget)
        _require(spool.outbox.stats.events, queued)
        await spool.close()
        return sample

    return on_reactor(work)


def drained(queued: int, spools: str) -> Sample:
    """
    Start with a copy of a spool of ``queued`` events, and drain it.

    Operations are events drained. Extras: ``start``, seconds from opening to the first events handed out; the rates of
    the last parts as ratios to the first parts', by time (``drain_ratio``) and by processor time; ``memory_ratio``, the
    same of resident memory; ``megabytes`` on disk.
    """
    copytree(f"{spools}/{queued}", "spool")
    # Or to flush the first receipts would mean to flush the copy.
    os.sync()
    megabytes = os.stat("spool/spool.db").st_size / 1e6

    async def work(reactor: Any) -> Sample:
        spool, watch = _spool("spool"), Watch()
        watch.start()
        await spool.open()
        drain = _Drain(spool)
        await drain.more(RECEIPTS)
        start = watch.stop(1).wall
        parts = []
        watch.start()
        for _ in range(PARTS):
            part = Watch()
            part.start()
            await drain.more((queued - RECEIPTS) // PARTS)
            parts.append(part.stop(queued // PARTS, resident=resident()))
        sample = watch.stop(queued)
        _require(spool.outbox.stats.events, 0)
        await spool.close()

        def ratio(metric: str) -> float:
            """Of the middle of the last three parts to that of the first: one alone may have been disturbed."""
            first, last = (median(each.value(metric) for each in some) for some in (parts[:3], parts[-3:]))
            return last / first

        extra = {
            "start": start,
            "drain_ratio": 1 / ratio("wall"),
            "drain_ratio_by_CPU": 1 / ratio("cpu"),
            "memory_ratio": ratio("resident"),
            "megabytes": megabytes,
        }
        return msgspec.structs.replace(sample, extra=extra)

    return on_reactor(work)


class _Drain:
    """Takes events in order and acknowledges them."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._reader = spool.outbox.reader(Lane.EVENT)
        self._last = 0
        self._untaken = self._unacknowledged = 0
        self._reader.on_ready = self._pump

    def more(self, count: int) -> Deferred[None]:
        """Fire when ``count`` more are acknowledged durably."""
        self._untaken = self._unacknowledged = count
        self._reached: Deferred[None] = Deferred()
        self._pump()
        return self._reached

    def _pump(self) -> None:
        while self._untaken and self._unacknowledged - self._untaken < TAKEN:
            seqs = [entry.seq for entry in self._reader.take(min(RECEIPTS, self._untaken), 1 << 20)]
            if not seqs:
                break
            first = self._last + 1 if self._last else seqs[0]
            if seqs != list(range(first, first + len(seqs))):
                raise RuntimeError("events are missing or out of order")
            self._last = seqs[-1]
            self._untaken -= len(seqs)
            self._spool.outbox.forget(seqs).addCallback(self._forgotten, len(seqs))

    def _forgotten(self, _: None, count: int) -> None:
        self._unacknowledged -= count
        if not self._unacknowledged:
            self._reached.callback(None)
        self._pump()


def _spool(path: str = "spool") -> Spool:
    many = 1 << 40
    settings = config.Spool(path=path, max_events=many, max_bytes=many)
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
