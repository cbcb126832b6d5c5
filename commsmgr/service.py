"""
One run of a manager: the parts in the order in which they start, and their orderly end.

``MultiService.stopService`` stops children concurrently and waits for none. Here the order is the promise: nothing new
is begun, what runs may finish, what is finished is sent, links say goodbye, and the spool closes last but for the
page that shows all this. Each step has a share of one deadline, and a step that overruns it costs nothing but that
step: what was accepted is in the spool.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from msgspec import Struct
from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.errors import NotRunning
from commsmgr.waiters import Overrun, bounded


class Step(Struct, frozen=True):
    """
    How one part starts and stops.

    :ivar name: under which the part is found in the service tree.
    :ivar start: runs before the next part's; what it raises ends the start, and the parts started so far are stopped.
    :ivar stop: gets the seconds that it may take.
    :ivar share: of the stop deadline's rest, what this part may take.
    """

    name: str
    start: Callable[[], Awaitable[None] | None]
    stop: Callable[[float], Awaitable[object]]
    share: float = 0.5


class Part(Service):
    """One part as a child in the service tree, so that it can be found there by its name."""

    def __init__(self, step: Step, parent: OrderedService) -> None:
        self.name = step.name
        self.parent = parent
        self.step = step


class OrderedService(MultiService):
    """
    Parts that start one after the other, and stop one after the other in the reverse order within a deadline.

    :param steps: in the order of starting.
    :param stop_deadline: seconds for the stop of all parts together.
    :ivar started: fires with None when every part has started, or fails with what kept one from starting, which is
        NotRunning when the stop came first.
    """

    log = Logger()

    def __init__(self, steps: Sequence[Step], *, stop_deadline: float, clock: IReactorTime) -> None:
        super().__init__()
        # As setServiceParent does it for a service that does not run, only that takes longer than to make the parts.
        self._parts = [Part(step, self) for step in steps]
        self.services = self._parts.copy()
        self.namedServices = {part.name: part for part in self._parts}
        self._stop_deadline = stop_deadline
        self._clock = clock
        self.started: Deferred[None] = Deferred()

    def startService(self) -> None:
        """Start the parts, each when the one before it has started."""
        Service.startService(self)
        self.started = Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        try:
            for part in self._parts:
                part.startService()
                starting = part.step.start()
                if starting is not None:
                    await starting
                if not self.running:
                    raise NotRunning("stopped while it was starting")
        except Exception:
            await self._stop_parts(self._clock.seconds() + self._stop_deadline)
            raise

    def stopService(self) -> Deferred[None]:
        """
        Stop the parts that have started.

        :return: fires when the last one has stopped, at the latest a little after the deadline; never fails.
        """
        Service.stopService(self)
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        ends = self._clock.seconds() + self._stop_deadline
        await self._starting_over()
        await self._stop_parts(ends)

    async def _stop_parts(self, ends: float) -> None:
        for part in reversed(self._parts):
            if not part.running:
                continue
            left = max(ends - self._clock.seconds(), 0.1)
            await self._stop_part(part, left * part.step.share, left)

    async def _starting_over(self) -> None:
        """Wait until nothing is being started any more: a part half started is better neither left nor stopped."""
        waiting: Deferred[None] = Deferred()

        def over(outcome: object) -> object:
            if not waiting.called:
                waiting.callback(None)
            return outcome

        self.started.addBoth(over)
        # Half of the time: a part that cannot end its start must not keep the others from stopping.
        with suppress(Overrun):
            await bounded(waiting, self._stop_deadline / 2, self._clock)

    async def _stop_part(self, part: Part, share: float, left: float) -> None:
        stopping = Deferred.fromCoroutine(_awaited(part.step.stop(share)))
        try:
            # A part keeps its share by itself; the bound is for one that does not.
            await bounded(stopping, left, self._clock)
        except Overrun:
            self.log.error(
                "{part} did not stop within {seconds:.1f} s", event="stop.overrun", part=part.name, seconds=left
            )
        except Exception:
            self.log.failure("{part} failed to stop", Failure(), event="stop.failed", part=part.name)
        part.stopService()


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable
