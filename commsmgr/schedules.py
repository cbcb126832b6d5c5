"""What happens by itself, again and again: heartbeats, inventories, housekeeping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from commsmgr.errors import CommsError


class Periodic:
    """
    Does one thing at intervals, never twice at once.

    The next time is counted from the last start, and a time that was missed because the last one took too long, or
    because the machine slept, is left out: a late heartbeat is replaced, never queued up.

    :param name: for the log.
    :param action: what to do; a :class:`~commsmgr.errors.CommsError` from it is logged and the schedule goes on.
    :param interval: seconds between two starts; 0 for never.
    :param jitter: the first start comes at a random moment within this many seconds, so that a fleet that was started
        together does not speak at once.
    """

    log = Logger()

    def __init__(
        self,
        name: str,
        action: Callable[[], Awaitable[object]],
        *,
        interval: float,
        jitter: float,
        clock: IReactorTime,
        random: Random,
    ) -> None:
        self.name = name
        self._action = action
        self._configured = self._interval = interval
        self._jitter = jitter
        self._clock = clock
        self._random = random
        self._call: IDelayedCall | None = None
        self._acting: Deferred[None] | None = None
        self._running = False
        self._began: float | None = None

    def start(self) -> None:
        """Begin."""
        self._running = True
        self._began = None
        if self._interval:
            self._call = self._clock.callLater(self._random.uniform(0, self._jitter), self._act)

    async def stop(self, deadline: float) -> None:
        """End, and cancel what is under way; takes no time."""
        self._running = False
        self._cancel_call()
        if self._acting is not None:
            self._acting.cancel()

    def set_interval(self, interval: float | None) -> None:
        """Use ``interval`` seconds instead of the configured ones; None for the configured ones again."""
        wanted = self._configured if interval is None else interval
        if wanted == self._interval:
            return
        self._interval = wanted
        if self._call is not None and self._began is None:
            # The first one is about to come, at its own moment: nothing a backend sets postpones that.
            return
        if self._running and self._acting is None:
            self._cancel_call()
            self._arm()

    def _arm(self) -> None:
        if self._interval:
            now = self._clock.seconds()
            elapsed = now - (now if self._began is None else self._began)
            # A clock that stepped back must not make the wait longer than the interval.
            wait = min(max(self._interval - elapsed, 0.0), self._interval)
            self._call = self._clock.callLater(wait, self._act)

    def _act(self) -> None:
        self._call = None
        self._began = self._clock.seconds()
        self._acting = acting = Deferred.fromCoroutine(self._once())
        # Not at the end of the coroutine: one that never waits would have ended before it was noted here.
        acting.addCallback(self._acted)

    async def _once(self) -> None:
        try:
            await self._action()
        except CancelledError:
            pass
        except CommsError as error:
            self.log.warn("{name}: {error}", event="schedule.failed", name=self.name, error=str(error))
        except Exception:
            self.log.failure("{name} failed", event="schedule.defect", name=self.name)

    def _acted(self, _: None) -> None:
        self._acting = None
        if self._running:
            self._arm()

    def _cancel_call(self) -> None:
        if self._call is not None and self._call.active():
            self._call.cancel()
        self._call = None
