"""
Tells the backend what had to be given up: one loss report at a time, until it is acknowledged. On the wire and in the
database such a report is called ``loss_receipt``; everywhere else a receipt is the backend's word for what it has.

Theory of operation. The spool (:mod:`commsmgr.spool.losses`) counts losses durably and moves them, in one transaction,
into a report with an id (:mod:`commsmgr.spool.lossbook`). As soon as there is a loss a report is made; what is lost
while it is outstanding waits for the next one, so that a burst of losses makes two reports and not thousands.

============  ========================================================================================================
state         what a crash in it means
============  ========================================================================================================
QUIET         nothing is to be told
ASKING        the report is made or it is not; the next start asks again, and no loss is in two of them
OUTSTANDING   the next start has the same report with the same id; a backend that knows it acknowledges it again
FORGETTING    as OUTSTANDING, unless the transaction was committed
============  ========================================================================================================

An outstanding report goes over each commsmgr.v1 WebSocket once, after its registration or when it is made, and with
every heartbeat. That is all there is: it is no event, takes no room in the window, holds nothing up, and a link that
does not acknowledge it is not ended for that. A plain backend has no word for it, and sees it in the heartbeats only.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import NotRunning, SpoolWriteFailed
from commsmgr.instants import rfc3339
from commsmgr.messages import LossReport, LossRow
from commsmgr.observe.metrics import Metrics
from commsmgr.openlink import OpenLink
from commsmgr.session.conversation import Nacked
from commsmgr.spool import Losses, PendingLossReport

SHORTEST_PAUSE = 0.5
"""Seconds before a report is sent again that the backend wants later, even if it says "at once"."""


class _State(Enum):
    QUIET = auto()
    ASKING = auto()
    OUTSTANDING = auto()
    FORGETTING = auto()


class LossReports:
    """
    Begins by itself when the spool is open and something was lost.

    :param whole: ``reconnect.retry_after_cap`` bounds how long a backend may put a report off.
    :param new_id: makes message ids.
    """

    log = Logger()

    def __init__(
        self,
        losses: Losses,
        whole: config.Config,
        *,
        new_id: Callable[[], str],
        clock: IReactorTime,
        metrics: Metrics,
    ) -> None:
        self._losses = losses
        self._new_id = new_id
        self._longest_pause = whole.reconnect.retry_after_cap
        self._clock = clock
        self._metrics = metrics
        self._state = _State.QUIET
        self._report = LossReport(id="", losses=[])
        self._link: OpenLink | None = None
        self._later: IDelayedCall | None = None
        losses.on_change = self._changed

    @property
    def outstanding(self) -> LossReport | None:
        """What a heartbeat has to tell."""
        return self._report if self._state is _State.OUTSTANDING else None

    # -----------------------------------------------------------------------------------------------------------------
    # What links and heartbeats report

    def link_registered(self, link: OpenLink) -> None:
        """Reports may travel over ``link`` from now on."""
        self._link = link
        self._send()

    def link_ended(self, link: OpenLink) -> None:
        """``link`` is gone; the next one is told again."""
        if link is self._link:
            self._link = None
            if self._later is not None:
                self._later.cancel()
                self._later = None

    def acked(self, id: str) -> None:
        """The backend has stored the report ``id``; one that is not outstanding was acknowledged before."""
        if self._state is _State.OUTSTANDING and id == self._report.id:
            self._metrics.message("loss_receipt", "out", "acked")
            self.log.info(
                "the backend knows of {count} lost messages", event="losses.reported", count=self._count, receipt_id=id
            )
            self._forget()

    def refused(self, refusal: Nacked) -> None:
        """The backend did not take the report: it wants it later, or not at all."""
        if self._state is not _State.OUTSTANDING or refusal.id != self._report.id:
            return
        if refusal.retry_after is None:
            self._metrics.message("loss_receipt", "out", "refused")
            self.log.warn(
                "the backend does not want to know of {count} lost messages ({code} {message}): it is not told again",
                event="losses.refused",
                count=self._count,
                code=refusal.code,
                message=refusal.message,
                receipt_id=refusal.id,
            )
            self._forget()
        elif self._later is None:
            self._metrics.message("loss_receipt", "out", "deferred")
            wait = min(max(refusal.retry_after, SHORTEST_PAUSE), self._longest_pause)
            self._later = self._clock.callLater(wait, self._again)
            self.log.info(
                "the backend wants to know of {count} lost messages in {wait:.1f} s, not now",
                event="losses.put-off",
                count=self._count,
                wait=wait,
                receipt_id=refusal.id,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Inside

    @property
    def _count(self) -> int:
        return sum(row.count for row in self._report.losses)

    def _changed(self) -> None:
        """The spool has counted a loss, or found some when it was opened."""
        if self._state is _State.QUIET and self._losses.unreported:
            self._state = _State.ASKING
            self._losses.pending_report(self._new_id()).addCallback(self._made).addErrback(self._failed)

    def _made(self, report: PendingLossReport | None) -> None:
        if report is None:
            self._state = _State.QUIET
            return
        self._state = _State.OUTSTANDING
        rows = [
            LossRow(
                reason=loss.reason,
                kind=loss.kind,
                count=loss.count,
                first_at=rfc3339(loss.first_at),
                last_at=rfc3339(loss.last_at),
            )
            for loss in report.losses
        ]
        self._report = LossReport(id=report.id, losses=rows)
        self._send()

    def _forget(self) -> None:
        self._state = _State.FORGETTING
        self._losses.forget(self._report.id).addCallback(self._forgotten).addErrback(self._failed)

    def _forgotten(self, _: object) -> None:
        self._state = _State.QUIET
        self._changed()

    def _failed(self, failure: Failure) -> None:
        """The spool was closed, on a failing disk perhaps, or there is a defect; the next loss or start asks again."""
        self._state = _State.QUIET
        if not failure.check(NotRunning, SpoolWriteFailed):
            self.log.failure("Losses cannot be reported.", failure, event="losses.failed")

    def _again(self) -> None:
        self._later = None
        self._send()

    def _send(self) -> None:
        link = self._link
        if self._state is _State.OUTSTANDING and self._later is None and link is not None and link.sendable:
            link.report_losses(self._report)
