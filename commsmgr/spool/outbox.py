"""
What waits to be sent: submissions in, entries out to the :mod:`readers <.reader>`, receipts back in.

An event that was accepted leaves the outbox in one of these ways only: by a receipt (:meth:`Outbox.forget`), refused
for good (:meth:`Outbox.bury`), over its time (:meth:`Outbox.expire`), found damaged, or dropped by an operator while no
agent runs (``commsmgr spool drop``); all but the first leave a dead letter, where there is room for it, and a count. A
state is replaced by the next of its key besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import InvalidMessage, NotRunning, QueueFull, SpoolWriteFailed
from commsmgr.spool import outbox_jobs
from commsmgr.spool.batch import Outcome
from commsmgr.spool.counter import Counter
from commsmgr.spool.reader import Reader
from commsmgr.spool.records import DeadLetter, Entry, Gone, Lane, OutboxStats
from commsmgr.spool.store import Store


class Outbox:
    """
    Made by :class:`commsmgr.spool.Spool`. All Deferreds fire after the commit; cancelling one undoes nothing, for what
    is handed over to the writer will be done. All fail with NotRunning unless the spool is open.

    :ivar stats: what is held, as of the last commit.
    :ivar on_change: called, once per batch, after :attr:`stats` changed.
    """

    log = Logger()

    def __init__(self, settings: config.Spool, wall: Callable[[], float]) -> None:
        self.stats = OutboxStats()
        self.on_change: Callable[[], None] | None = None
        self._settings = settings
        self._wall = wall
        self._store: Store
        self._reserved_events = 0
        self._reserved_bytes = 0
        self._in_trouble = False
        self._receipted: set[int] = set()
        self._readers = {lane: Reader(lane, self._fetch, self._receipted) for lane in Lane}
        self._event_reader = self._readers[Lane.EVENT]

    def attach(self, store: Store) -> None:
        """Use ``store``; called once, by the spool."""
        self._store = store

    # -- in

    def put(
        self, *, lane: Lane, kind: str, id: str, body: bytes, key: str = "", ttl: float | None = None
    ) -> Deferred[int]:
        """
        Accept a message for sending.

        :param key: what it is the state of; it replaces an unsent older one of the same key. Empty for events.
        :param ttl: seconds after which it need not be sent any more.
        :return: its number, after the commit. Fails with QueueFull when a bound is reached, at once, what is still
            being committed included, and later only where a result was put again meanwhile; with SpoolWriteFailed when
            the disk did not take it (after a failing flush it may be there all the same, and then is sent); with
            InvalidMessage when ``key`` and ``lane`` do not fit.
        """
        if (lane is Lane.STATE) != bool(key):
            return fail(InvalidMessage("a state has a key, an event has none"))
        accepted_at = float(self._wall())
        expires_at = None if ttl is None else accepted_at + ttl
        if lane is Lane.STATE:
            return self._store.submit(outbox_jobs.PutState(self, kind, id, body, accepted_at, expires_at, key))
        if (refusal := self.refusal(len(body))) is not None:
            return fail(refusal)
        return self._store.submit(outbox_jobs.PutEvent(self, kind, id, body, accepted_at, expires_at))

    def refusal(self, size: int, counter: Counter | None = None) -> QueueFull | None:
        """
        Return why an event of ``size`` bytes cannot be accepted now, or None.

        :param counter: the totals within a batch, for whom the last commit is too long ago. What this batch has
            accepted counts twice then: that makes it refuse too early rather than too late.
        """
        totals = self.stats if counter is None else counter
        return self._full(totals.events + self._reserved_events, totals.event_bytes + self._reserved_bytes, size)

    def require_room(self, size: int, counter: Counter) -> None:
        """
        Raise QueueFull unless an event of ``size`` bytes, for which room was reserved, has it in this batch.

        Results that are put again reserve none before, so that they may have come between the look and the act.
        """
        if (refusal := self._full(counter.events, counter.event_bytes, size)) is not None:
            raise refusal

    def _full(self, events: int, held: int, size: int) -> QueueFull | None:
        if events >= self._settings.max_events:
            return QueueFull(f"{events} events are waiting, spool.max_events is {self._settings.max_events}")
        if held + size > self._settings.max_bytes:
            return QueueFull(
                f"{held} bytes of events are waiting, {size} more would exceed spool.max_bytes,"
                f" which is {self._settings.max_bytes}"
            )
        return None

    def held(self) -> tuple[int, int]:
        """Return how many events are held and their bytes, those that are still being committed included."""
        return self.stats.events + self._reserved_events, self.stats.event_bytes + self._reserved_bytes

    def reserve(self, size: int) -> None:
        """Count an event as held before it is committed."""
        self._reserved_events += 1
        self._reserved_bytes += size

    def release(self, size: int) -> None:
        """Undo :meth:`reserve`, once the event is committed, or will not be."""
        self._reserved_events -= 1
        self._reserved_bytes -= size

    # -- out

    def reader(self, lane: Lane) -> Reader:
        """Return the reader of ``lane``, always the same one: there is one consumer."""
        return self._readers[lane]

    def forget(self, seqs: Iterable[int]) -> Deferred[None]:
        """
        Take note of receipts: these entries are not handed out again from now on.

        A receipt is never lost while the spool is open: when the disk fails, deletion is tried again until it works,
        and the Deferred waits. It also waits a moment for a commit that is made for something else (see
        :mod:`.store`). Numbers that are not known are ignored.
        """
        wanted = list(seqs)
        job = outbox_jobs.Forget(self, wanted)
        self._withhold(wanted)
        return self._store.submit(job)

    def bury(self, seq: int, reason: str) -> Deferred[None]:
        """
        Make a dead letter of an entry that was refused for good; it is not handed out again from now on.

        A disk that fails only delays it.

        :param reason: kept with it. Counted under its part before the first colon, which should be one of a few words.
        """
        self._withhold([seq])
        return self._store.submit(outbox_jobs.Bury(self, seq, reason, self._wall()))

    def expire(self) -> Deferred[int]:
        """
        Make dead letters of what is over its time: ``expired`` by its own ``ttl``, ``over-age`` by spool.max_age.

        What was taken and not forgotten is left alone, for its receipt may be on its way; a rewind ends that. Ages are
        told by the wall clock: after a step back things live longer.

        :return: how many. To be called from time to time; works in slices.
        """
        return Deferred.fromCoroutine(self._expire())

    async def _expire(self) -> int:
        stats = self.stats
        # What is being put just now is not over its time yet. The oldest event is read, and no total: those may be too
        # low. And an idle spool whose last batch has failed has nothing else that would show whether it works again.
        total, more = 0, bool(stats.events or stats.states or stats.oldest_event_at is not None or self._in_trouble)
        while more:
            now = self._wall()
            oldest = now - self._settings.max_age if self._settings.max_age else None
            gone: list[Gone]
            gone, more = await self._store.submit(outbox_jobs.Expire(self, now, oldest))
            total += len(gone)
        return total

    def dead_letters(self, limit: int) -> Deferred[list[DeadLetter]]:
        """Return the latest dead letters, at most ``limit``, the latest first."""
        return self._store.submit(outbox_jobs.Ask(lambda books: books.dead_letters(limit)))

    # -- for the spool and for jobs

    def start(self) -> None:
        """The spool is open."""
        for reader in self._readers.values():
            reader.start()

    def stop(self) -> None:
        """The spool is closed."""
        self._in_trouble = False
        self._receipted.clear()
        for reader in self._readers.values():
            reader.stop()

    def _withhold(self, seqs: list[int]) -> None:
        """Do not hand these out any more, until :meth:`forgotten`."""
        self._receipted.update(seqs)
        for reader in self._readers.values():
            reader.discard(seqs)

    def committed(self, entry: Entry) -> None:
        """``entry`` is in the database now."""
        reader = self._event_reader if entry.lane is Lane.EVENT else self._readers[entry.lane]
        reader.committed(entry)

    def discard(self, seq: int) -> None:
        """The entry is not in the database any more."""
        for reader in self._readers.values():
            reader.discard([seq])

    def forgotten(self, seqs: Iterable[int]) -> None:
        """The deletion of receipted entries is committed, or nobody will try it any more."""
        self._receipted.difference_update(seqs)

    def given_up(self, gone: Iterable[Gone]) -> None:
        """These are dead letters now."""
        dropped = self.stats.dropped
        for each in gone:
            dropped[each.reason] = dropped.get(each.reason, 0) + 1
            self.discard(each.seq)

    def after_batch(self, outcome: Outcome) -> None:
        """Take over the totals, and tell those who listen."""
        stats, counter = self.stats, outcome.counter
        self._in_trouble = bool(outcome.trouble)
        changed = False
        if counter is not None:
            now = (counter.events, counter.event_bytes, counter.states, counter.dead_letters, outcome.oldest_event_at)
            before = (stats.events, stats.event_bytes, stats.states, stats.dead_letters, stats.oldest_event_at)
            changed = now != before
            stats.events, stats.event_bytes, stats.states, stats.dead_letters, stats.oldest_event_at = now
        listeners: list[Callable[[], None] | None] = [self.on_change if changed else None]
        for reader in self._readers.values():
            if outcome.reopened:
                reader.lost_track()
            listeners.append(reader.announce)
        for listener in listeners:
            if listener is not None:
                try:
                    listener()
                except Exception:
                    self.log.failure("A listener of the outbox failed.", event="spool.listener-failed")

    def _fetch(self, lane: Lane, after: int, generation: int) -> None:
        self._store.submit(outbox_jobs.Fetch(self, lane, after, generation, self._wall())).addErrback(self._not_fetched)

    def _not_fetched(self, failure: Failure) -> None:
        # Of a disk that fails the writer tells; the next look at the lane asks again.
        if not isinstance(failure.value, NotRunning | SpoolWriteFailed):
            self.log.failure("A page of the outbox could not be read.", failure=failure, event="spool.read-failed")
