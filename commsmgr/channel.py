"""The channel of commands: what the agent reads from, whether by ``get()``, by ``async for``, or through a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from twisted.internet.defer import Deferred

from commsmgr.errors import NotRunning
from commsmgr.messages import Command
from commsmgr.waiters import Waiters


class CommandChannel:
    """
    Commands in the order in which they were accepted, each handed out once.

    The channel is bounded because the inbox is: a command stands here only while it is open there, and the intake takes
    no more than ``commands.max_pending``.

    :param mark_offered: makes durable that the commands with these keys are about to be handed out. A crash after that
        and before the result means that nobody knows how far the command came.
    """

    def __init__(self, mark_offered: Callable[[Iterable[int]], Awaitable[None]]) -> None:
        self._mark_offered = mark_offered
        # No deque: an empty one takes 600 bytes, and there are few commands.
        self._waiting: list[Command] = []
        self._arrivals: Waiters[None] = Waiters()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def __aiter__(self) -> CommandChannel:
        return self

    async def __anext__(self) -> Command:
        try:
            return await self.get()
        except NotRunning:
            raise StopAsyncIteration from None

    def get(self) -> Deferred[Command]:
        """
        Take the next command.

        :return: fires when there is one and it is durably marked as offered. Cancelling takes the caller out of the
            line; a command that was on its way to it goes to the next in line.
        :raise NotRunning: the manager stops; what is not taken is offered after the next start.
        :raise SpoolError: the mark could not be stored; the command stays in the channel.
        """
        return Deferred.fromCoroutine(self._get())

    async def arrival(self) -> None:
        """Wait until there is a command to take, or there will be none."""
        while not self._waiting and not self._closed:
            await self._arrivals.wait()

    async def _get(self) -> Command:
        await self.arrival()
        if self._closed:
            raise NotRunning("the manager stops: no more commands")
        command = self._waiting.pop(0)
        try:
            await self._mark_offered([command.key])
        except BaseException:
            self._put_back(command)
            raise
        return command

    def _put_back(self, command: Command) -> None:
        # In its place, for several that fail together come back one after the other.
        place = next((n for n, other in enumerate(self._waiting) if other.key > command.key), len(self._waiting))
        self._waiting.insert(place, command)
        self._arrivals.fire(None)

    def put(self, command: Command) -> None:
        """Add a command that is in the inbox."""
        self._waiting.append(command)
        self._arrivals.fire(None)

    def close(self) -> None:
        """Hand out nothing more; everybody who waits gets :class:`~commsmgr.errors.NotRunning`."""
        self._closed = True
        self._waiting.clear()
        self._arrivals.fire(None)
