"""
Moves the outbox to the backend, and the backend's receipts back to the outbox.

Theory of operation. One coroutine per lane owns that lane: it alone takes entries from the lane's reader, so at any
moment a lane travels by one way only and its order holds. What is sent takes an entry out of the outbox for one of two
reasons: a receipt (an ack or barrier over WebSocket, a 2xx over HTTP), or a refusal for good (a nack without a time, a
4xx that judges it; it becomes a dead letter with the reason). All else that does so is no matter of the way: its
expiry, its damage, a newer state in its place, an operator who drops it. Whatever ends a way before that (a lost link,
a deadline, a crash of the process) leaves the entry where it is; the reader is rewound and the entry goes again, with
the same id and the same bytes.

The event lane goes over the WebSocket as soon as there is one, with as many entries in flight as the window admits.
When there has been none for ``delivery.http_fallback_after`` seconds it goes over HTTP, one at a time. A link that
comes up while an HTTP exchange is under way waits for its end: two ways at once would break the order.

The state lane always goes over HTTP: the protocol has no other way for an inventory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import NotRunning, SpoolError
from commsmgr.observe.metrics import Metrics
from commsmgr.openlink import OpenLink
from commsmgr.policy.fallback import Fallback
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.posting import Posting
from commsmgr.requests import Requests
from commsmgr.session.conversation import Nacked
from commsmgr.spool import Entry, Lane, Outbox, Reason
from commsmgr.transport.http import HTTPResponse
from commsmgr.waiters import Waiters

SHORTEST_PAUSE = 0.5
"""Seconds that a lane waits at least when the backend asks for an entry again later, even if it says "at once"."""

RESTART = 30.0
"""Seconds after which a lane goes on that a defect of ours has stopped."""


class Delivery:
    """
    Empties the outbox.

    :param timestamp: the time now as RFC 3339, for envelopes.
    :param redact: takes secrets out of what a backend says of a dead letter.
    :param on_receipt: called with the entry and the answer after a receipt over HTTP.
    """

    log = Logger()

    def __init__(
        self,
        *,
        outbox: Outbox,
        requests: Requests,
        whole: config.Config,
        clock: IReactorTime,
        random: Random,
        timestamp: Callable[[], str],
        redact: Callable[[str], str],
        metrics: Metrics,
        on_receipt: Callable[[Entry, HTTPResponse], None],
    ) -> None:
        self._outbox = outbox
        self._config = whole
        self._clock = clock
        self._timestamp = timestamp
        self._redact = redact
        self._metrics = metrics
        self._on_receipt = on_receipt
        self._link: OpenLink | None = None
        # Without WebSockets there is nothing to wait for.
        self._fallback_after = whole.delivery.http_fallback_after if whole.websocket.enabled else 0.0
        self._fallback: Fallback
        self._paused_until = 0.0
        self._paused_by = ""
        self._rewind_when_empty = False
        self._news: dict[Lane, Waiters[None]] = {lane: Waiters() for lane in Lane}
        self._readers = {lane: outbox.reader(lane) for lane in Lane}
        self._posting = {
            lane: Posting(
                reader,
                requests,
                whole=whole,
                clock=clock,
                random=random,
                metrics=metrics,
                delivered=self._delivered,
                given_up=lambda entry, reason: self._bury(entry.seq, entry.id, reason),
            )
            for lane, reader in self._readers.items()
        }
        self._progress: Waiters[None] = Waiters()
        self._sent: dict[int, tuple[str, float]] = {}
        self._throttle = LogThrottle(clock.seconds)
        self._loops: list[Deferred[None]] = []

    # -----------------------------------------------------------------------------------------------------------------
    # Life

    def start(self) -> None:
        """Begin to empty the outbox."""
        self._fallback = Fallback(self._fallback_after, self._clock.seconds())
        for lane, reader in self._readers.items():
            reader.on_ready = lambda lane=lane: self._wake(lane)
        self._loops = [
            Deferred.fromCoroutine(self._for_ever(lane, step)).addErrback(lambda failure: failure.trap(CancelledError))
            for lane, step in ((Lane.EVENT, self._deliver_event), (Lane.STATE, self._deliver_state))
        ]

    async def flush(self, deadline: float) -> None:
        """Wait until the event lane is empty, but no longer than ``deadline`` seconds, and only while a link is up."""
        ends = self._clock.seconds() + deadline
        while self._link is not None and self._outbox.stats.events and (left := ends - self._clock.seconds()) > 0:
            timer = self._clock.callLater(left, self._progress.fire, None)
            try:
                await self._progress.wait()
            finally:
                if timer.active():
                    timer.cancel()

    async def stop(self) -> None:
        """Send nothing more. An exchange under way is cancelled; its entry stays in the outbox."""
        loops, self._loops = self._loops, []
        for loop in loops:
            loop.cancel()
        for reader in self._readers.values():
            reader.on_ready = None

    async def _for_ever(self, lane: Lane, step: Callable[[], Awaitable[None]]) -> None:
        """Take one step after the other. A defect must not end a lane for good: it is logged, and the lane goes on."""
        while True:
            try:
                await step()
            except CancelledError:
                raise
            except Exception:
                self.log.failure(
                    "the {lane} lane was stopped by a defect; it goes on in {wait:.0f} s",
                    event="delivery.failed",
                    lane=lane.name,
                    wait=RESTART,
                )
                await deferLater(self._clock, RESTART)
                self._readers[lane].rewind()

    # -----------------------------------------------------------------------------------------------------------------
    # What links report

    def link_registered(self, link: OpenLink) -> None:
        """Results may travel over ``link`` from now on, beginning with the oldest that has no receipt."""
        self._link = link
        self._fallback.link_up(self._clock.seconds())
        if link.backend != self._paused_by:
            # Another backend has not asked for anything yet; the one that has keeps its pause across links.
            self._paused_until = 0.0
        self._readers[Lane.EVENT].rewind()
        self._wake(Lane.EVENT)

    def link_ended(self, link: OpenLink) -> None:
        """``link`` is gone; what was in flight on it goes again on the next way."""
        if link is self._link:
            self._link = None
            self._fallback.link_down(self._clock.seconds())
            self._sent.clear()
            self._readers[Lane.EVENT].rewind()
            self._wake(Lane.EVENT)
            self._progress.fire(None)

    def receipts(self, link: OpenLink, seqs: Sequence[int]) -> None:
        """The backend has these entries."""
        self._fallback.delivered()
        if self._sent:
            for seq in seqs:
                self._trace(seq)
        self._metrics.message("command_result", "out", "acked", len(seqs))
        self._forget(seqs)
        if self._rewind_when_empty or self._readers[Lane.EVENT].peek_size() is not None:
            self._wake(Lane.EVENT)

    def refused(self, link: OpenLink, seq: int, refusal: Nacked) -> None:
        """
        The backend did not take an entry.

        With ``retry_after`` the lane pauses and then goes again from that entry, as often as the backend asks. What was
        in flight behind it arrives before it: that is what the backend wants, and it is how one entry never blocks the
        others.
        """
        if refusal.retry_after is None:
            self._bury(seq, refusal.id, self._redact(f"{Reason.REFUSED}: {refusal.code} {refusal.message}")[:200])
        else:
            now = self._clock.seconds()
            if self._paused_until <= now:
                # Once: of a whole window that is refused, each would have the same page read again.
                self._readers[Lane.EVENT].rewind()
            wait = min(max(refusal.retry_after, SHORTEST_PAUSE), self._config.reconnect.retry_after_cap)
            self._paused_until = max(self._paused_until, now + wait)
            self._paused_by = link.backend
            self._metrics.message("command_result", "out", "deferred")
            suppressed = self._throttle.allow("deferred")
            if suppressed is not None:
                self.log.warn(
                    "{backend} does not take {message_id} now ({reason}); it goes again in {wait:.1f} s"
                    " ({suppressed} more before)",
                    event="delivery.deferred",
                    backend=link.backend,
                    message_id=refusal.id,
                    reason=f"{refusal.code} {refusal.message}"[:200],
                    wait=wait,
                    suppressed=suppressed,
                )
        self._wake(Lane.EVENT)

    # -----------------------------------------------------------------------------------------------------------------
    # The event lane

    async def _deliver_event(self) -> None:
        """Do what can be done for the lane now, or wait for news of it."""
        now = self._clock.seconds()
        link = self._link
        if self._paused_until > now:
            await self._news_or(Lane.EVENT, self._paused_until - now)
        elif link is not None:
            self._fill(link)
            await self._news[Lane.EVENT].wait()
        elif (wait := max(self._fallback.wait(now), self._posting[Lane.EVENT].wait)) > 0:
            await self._news_or(Lane.EVENT, wait)
        elif not await self._posting[Lane.EVENT].send_next():
            await self._news[Lane.EVENT].wait()

    def _fill(self, link: OpenLink) -> None:
        """Put as much in flight as the window admits."""
        reader = self._readers[Lane.EVENT]
        if self._rewind_when_empty and not link.in_flight:
            self._rewind_when_empty = False
            reader.rewind()
        while link.sendable:
            size = reader.peek_size()
            if size is None or not link.admits(size):
                return
            count, free = link.room
            entries = reader.take(max(count, 1), max(free, size))
            # After a rewind the reader gives out again what is still in flight on this very link; and of two entries
            # with one id only the first goes now.
            fresh = link.fresh(entries)
            if len(fresh) != len(entries):
                self._rewind_when_empty = True
            if fresh:
                link.send(fresh, self._timestamp())
                if self._config.observe.log_level == "debug":
                    now = self._clock.seconds()
                    self._sent.update((entry.seq, (entry.id, now)) for entry in fresh)

    # -----------------------------------------------------------------------------------------------------------------
    # The state lane

    async def _deliver_state(self) -> None:
        """Send the lane's next entry, or wait for one."""
        posting = self._posting[Lane.STATE]
        if (wait := posting.wait) > 0:
            await self._news_or(Lane.STATE, wait)
        elif not await posting.send_next():
            await self._news[Lane.STATE].wait()

    # -----------------------------------------------------------------------------------------------------------------
    # Inside

    def _delivered(self, entry: Entry, response: HTTPResponse) -> None:
        self._forget([entry.seq])
        with self.log.failuresHandled("what follows a receipt failed", event="delivery.receipt-failed"):
            self._on_receipt(entry, response)

    def _forget(self, seqs: Sequence[int]) -> None:
        forgetting = self._outbox.forget(seqs)
        forgetting.addErrback(self._spool_failed)
        forgetting.addCallback(self._progress.fire)

    def _trace(self, seq: int) -> None:
        """At debug level, say how long a receipt took; otherwise nothing was noted, and this costs a look-up."""
        message_id, sent_at = self._sent.pop(seq, ("", 0.0))
        if message_id:
            self.log.debug(
                "result {message_id} acknowledged after {milliseconds:.1f} ms",
                event="delivery.acknowledged",
                message_id=message_id,
                milliseconds=(self._clock.seconds() - sent_at) * 1000,
            )

    def _wake(self, lane: Lane) -> None:
        self._news[lane].fire(None)

    async def _news_or(self, lane: Lane, seconds: float) -> None:
        """Wait for news of the lane, but no longer than ``seconds``."""
        timer = self._clock.callLater(seconds, self._wake, lane)
        try:
            await self._news[lane].wait()
        finally:
            if timer.active():
                timer.cancel()

    def _bury(self, seq: int, message_id: str, reason: str) -> None:
        suppressed = self._throttle.allow(reason.partition(":")[0])
        if suppressed is not None:
            self.log.warn(
                "{message_id} cannot be delivered: {reason}; it is given up, and kept as a dead letter if the bounds of"
                " those allow ({suppressed} more before)",
                event="delivery.refused",
                message_id=message_id,
                reason=reason,
                suppressed=suppressed,
            )
        burying = self._outbox.bury(seq, reason)
        burying.addErrback(self._spool_failed)
        burying.addCallback(self._progress.fire)

    def _spool_failed(self, failure: Failure) -> None:
        """The spool keeps the receipt in memory and tries again by itself; here it only has to be known."""
        failure.trap(SpoolError, NotRunning)
        self.log.warn("{error}", event="delivery.spool-failed", error=str(failure.value))
