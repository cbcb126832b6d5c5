"""A start in any weather: the spool is opened as soon as its disk allows it."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from commsmgr.errors import CommsError, SpoolWriteFailed
from commsmgr.spool.records import Opened
from commsmgr.spool.spool import Spool
from commsmgr.waiters import Waiters

FIRST_PAUSE: Final = 1.0
"""Seconds from a failed attempt to the next one; doubled each time."""

LONGEST_PAUSE: Final = 30.0


class PatientOpening:
    """
    Opens ``spool``, again and again while its disk is full, failing or read-only, and knows who waits for that.

    Who waits gets :class:`SpoolWriteFailed` when an attempt fails: nobody can say how long it will be full.
    """

    log = Logger()

    def __init__(self, spool: Spool, clock: IReactorTime) -> None:
        self._spool = spool
        self._clock = clock
        self._waiters: Waiters[None] = Waiters()
        self._refusal: SpoolWriteFailed | None = None
        self._pause: Deferred[None] | None = None
        self._stopped = False

    async def open(self) -> Opened | None:
        """
        Open it. Who waits still does: that ends with :meth:`let_in`.

        :return: what was found; None when :meth:`stop` came first.
        :raise SpoolLocked: another process has it.
        :raise SpoolUnusable: waiting cannot help.
        """
        seconds = FIRST_PAUSE
        while not self._stopped:
            try:
                opened = await self._spool.open()
            except SpoolWriteFailed as error:
                await self._wait(error, seconds)
                seconds = min(2 * seconds, LONGEST_PAUSE)
            else:
                self._refusal = None
                return opened
        return None

    async def _wait(self, error: SpoolWriteFailed, seconds: float) -> None:
        if self._stopped:
            return
        self.log.warn(
            "{reason}; the start goes on when that has ended; trying again in {seconds:.0f} s",
            event="spool.open-failed",
            reason=error.fact,
            seconds=seconds,
        )
        self._refusal = error
        self._pause = deferLater(self._clock, seconds)
        self.refuse(error)
        with suppress(CancelledError):
            await self._pause
        self._pause = None

    def stop(self) -> None:
        """Make no further attempt; one that is under way ends by itself."""
        self._stopped = True
        if self._pause is not None:
            self._pause.cancel()

    async def wait(self) -> None:
        """
        Wait until the spool is open.

        :raise SpoolWriteFailed: its disk does not allow it now.
        """
        if self._refusal is not None:
            raise SpoolWriteFailed(self._refusal.fact)
        await self._waiters.wait()

    def let_in(self) -> None:
        """The spool is open and ready."""
        self._waiters.fire(None)

    def refuse(self, error: CommsError) -> None:
        """The spool will not be opened, or not soon."""
        self._waiters.fail(error)
