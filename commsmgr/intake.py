"""
Commands in: from a link or a heartbeat's answer into the inbox, then acknowledged, then offered.

Theory of operation. The order is the promise: a command is stored (one commit), then acknowledged to the backend, then
offered to the agent. A crash before the commit: the backend still has it and sends it again (commsmgr.v1), or it is as
if it had never arrived (plain). After the commit: it is offered after the restart. The inbox knows every id, so that a
second delivery, whenever and however it comes, is acknowledged and not offered again.

The intake takes no more commands than the spool could store results for: it stops at :data:`FULL_AT` of the event
bounds, open commands counted as the events they will become, those that are still being committed included. A
commsmgr.v1 backend is asked to send again later; a plain one, which knows no such word, gets a ``rejected`` result, and
from :data:`SILENT_AT` on nothing: it has to find out by itself.
Such a result closes no command in the inbox: the refused command is not there, but another one of the same id may be.
So it is with commands that come faster than ``commands.max_rate`` allows.
A command that is known already takes no room and is not refused for want of it, nor for the rate, unless it is finished
and its result, which is put again, finds no room, or so many come that not each can be asked about (:data:`ASKING`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import msgspec
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.channel import CommandChannel
from commsmgr.errors import CommsError
from commsmgr.messages import Command, CommandData, Result, ResultStatus
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.policy.rate import TokenBucket
from commsmgr.session.conversation import CommandArrived
from commsmgr.spool import Accepted, Duplicate, Opened, Spool, StoredCommand

T = TypeVar("T")

FULL_AT = 0.8
"""Share of the event bounds from which on no more commands are taken; the rest is for the results of those taken."""

SILENT_AT = 0.9
"""Share from which on not even the refusal of a command is stored any more: results of those taken go first."""

ASKING = 100
"""Commands at once of which the inbox is asked whether it knows them, while there is no room for new ones."""

REFUSED_FOR = 5.0
"""Seconds after which a backend whose command was refused for want of room may send it again."""

BURST = 10.0
"""Seconds of ``commands.max_rate`` that may come at once."""


class CommandSource(Protocol):
    """Where a command came from, and is answered to: a link, or the heartbeats."""

    def acknowledge(self, command_id: str, /) -> None:
        """The command is in the inbox."""

    def refuse(self, command_id: str, code: str, message: str, retry_after: float | None, /) -> bool:
        """The command was not taken. Return False when the dialect has no word for that."""


class Intake:
    """
    Stores, acknowledges and offers commands.

    :param report: takes the result of a command in the inbox, and sees to it that it is stored and closes the command.
    :param say: takes a result that is sent as it is and closes no command.
    """

    log = Logger()

    def __init__(
        self,
        *,
        spool: Spool,
        channel: CommandChannel,
        whole: config.Config,
        metrics: Metrics,
        report: Callable[[Result], object],
        say: Callable[[Result], object],
        clock: IReactorTime,
    ) -> None:
        self._spool = spool
        self._channel = channel
        self._config = whole
        self._metrics = metrics
        self._report = report
        self._say = say
        self._accepting = 0
        self._asking = 0
        self._throttle = LogThrottle(clock.seconds)
        rate = whole.commands.max_rate
        self._rate = TokenBucket(rate, BURST * rate, clock.seconds)

    def recover(self, opened: Opened) -> None:
        """
        Settle what the last process left open.

        What was never offered is offered now. What was offered and has no result may have run: types that are safe to
        repeat are offered again, marked ``redelivered``; the others are reported as ``interrupted``.
        """
        for stored in opened.interrupted:
            command = self._command(stored, redelivered=True)
            if stored.body and command.type in self._config.commands.safe_to_repeat:
                self._channel.put(command)
            else:
                self.log.warn(
                    "{type} command {message_id} was interrupted when the agent last stopped",
                    event="command.interrupted",
                    type=command.type,
                    message_id=command.id,
                )
                self._report(
                    Result(
                        command_id=command.id,
                        key=command.key,
                        status="interrupted",
                        error="the agent stopped while the command ran; how far it came is not known",
                        exit_code=1,
                    )
                )
        for stored in opened.waiting:
            self._channel.put(self._command(stored, redelivered=False))

    def arrived(self, source: CommandSource, arrived: CommandArrived) -> None:
        """Take one command, if there is room for its result."""
        if not self._room():
            self._refuse_unless_known(source, arrived, "the agent holds as many commands and results as it can store")
            return
        if not self._rate.take():
            self._refuse_unless_known(source, arrived, "commands come faster than commands.max_rate")
            return
        body = msgspec.json.encode(arrived.data)
        self._accepting += 1
        accepting = self._spool.inbox.accept(id=arrived.id, digest=arrived.digest, body=body)
        accepting.addBoth(self._no_longer_accepting)
        accepting.addCallbacks(
            self._accepted, self._not_accepted, callbackArgs=(source, arrived), errbackArgs=(source, arrived)
        )

    def _no_longer_accepting(self, outcome: T) -> T:
        self._accepting -= 1
        return outcome

    def _room(self) -> bool:
        # The inbox counts as of the last commit: a burst within one turn must not overshoot.
        open_count = self._spool.inbox.open_count + self._accepting
        return open_count < self._config.commands.max_pending and self._below(FULL_AT, open_count)

    def _below(self, share: float, more: int = 0) -> bool:
        """Whether the outbox, and ``more`` events to come, hold less than a share of its bounds."""
        (events, size), bounds = self._spool.outbox.held(), self._config.spool
        return events + more < share * bounds.max_events and size < share * bounds.max_bytes

    def _accepted(self, outcome: Accepted | Duplicate, source: CommandSource, arrived: CommandArrived) -> None:
        if isinstance(outcome, Duplicate):
            self._rate.give_back()
            self._is_known(outcome, source, arrived)
            return
        source.acknowledge(arrived.id)
        self._metrics.message("command", "in", "accepted")
        self.log.info(
            "command {message_id} ({type}) received",
            event="command.received",
            message_id=arrived.id,
            type=arrived.data.type,
        )
        self._channel.put(self._command(outcome.command, redelivered=False))

    def _is_known(self, known: Duplicate, source: CommandSource, arrived: CommandArrived) -> None:
        source.acknowledge(arrived.id)
        self._metrics.message("command", "in", "duplicate")
        suppressed = self._throttle.allow("duplicate")
        if suppressed is not None:
            self.log.info(
                "command {message_id} came again: it is not run again ({suppressed} more before)",
                event="command.duplicate",
                message_id=arrived.id,
                suppressed=suppressed,
            )
        # Of a finished one the inbox has put the original result into the outbox again, if it still has it.
        if known.result_missing:
            status = cast(ResultStatus, known.status)
            self._say(
                Result(
                    command_id=arrived.id,
                    status=status,
                    error="the command was finished earlier and its result sent; its output is no longer kept",
                    exit_code=0 if status == "success" else 1,
                )
            )

    def _not_accepted(self, failure: Failure, source: CommandSource, arrived: CommandArrived) -> None:
        failure.trap(CommsError)
        self._refuse_unless_known(source, arrived, str(failure.value))

    def _refuse_unless_known(self, source: CommandSource, arrived: CommandArrived, why: str) -> None:
        if self._asking >= ASKING:
            # A flood: what is asked of the spool for each of them would keep it from everything else.
            self._refuse(source, arrived, why, unknown=False)
            return

        def answered(known: Duplicate | None) -> None:
            self._asking -= 1
            if known is None:
                self._refuse(source, arrived, why, unknown=True)
            else:
                self._is_known(known, source, arrived)

        def unanswered(failure: Failure) -> None:
            # The disk fails, or a finished one's result finds no room in the outbox: it may come again later.
            self._asking -= 1
            failure.trap(CommsError)
            self._refuse(source, arrived, why, unknown=False)

        self._asking += 1
        self._spool.inbox.known(arrived.id, arrived.digest).addCallbacks(answered, unanswered)

    def _refuse(self, source: CommandSource, arrived: CommandArrived, why: str, *, unknown: bool) -> None:
        """Refuse a command, by a result only if it is certain that it is ``unknown`` and so has no other."""
        self._metrics.message("command", "in", "refused")
        suppressed = self._throttle.allow("refused")
        if suppressed is not None:
            self.log.warn(
                "command {message_id} not taken: {why} ({suppressed} more before)",
                event="command.refused",
                message_id=arrived.id,
                why=why,
                suppressed=suppressed,
            )
        refused = source.refuse(arrived.id, "busy", why, REFUSED_FOR)
        if not refused and unknown and self._below(SILENT_AT):
            self._say(Result(command_id=arrived.id, status="rejected", error=why, exit_code=1))

    def _command(self, stored: StoredCommand, *, redelivered: bool) -> Command:
        # The body of a damaged row is empty: all that is left to say of that command is that it was interrupted.
        data = msgspec.json.decode(stored.body, type=CommandData) if stored.body else CommandData()
        bounds = self._config.commands
        return Command(
            id=stored.id,
            key=stored.key,
            type=data.type,
            command=data.command,
            args=tuple(data.args),
            timeout=min(data.timeout or bounds.default_timeout, bounds.max_timeout),
            options=data.options,
            redelivered=redelivered,
        )
