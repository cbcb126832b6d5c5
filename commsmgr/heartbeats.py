"""
The heartbeat, put together and sent: a pulse, built when it is sent and kept nowhere. Its answer may bring commands.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from commsmgr import config
from commsmgr.errors import InvalidMessage, PeerViolation
from commsmgr.interfaces import MachineSource
from commsmgr.inventories import Inventories
from commsmgr.loss_reports import LossReports
from commsmgr.machine import Identity
from commsmgr.messages import CommandEnvelope, Delivery, Heartbeat, HeartbeatAnswer, SystemHealth
from commsmgr.observe.metrics import Metrics
from commsmgr.outgoing import encode_data, unicode
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.requests import Requests
from commsmgr.sanitise import Malformed
from commsmgr.session.conversation import CommandArrived
from commsmgr.session.wire import body_decoder
from commsmgr.status import QueueStatus
from commsmgr.transport.http import HTTPResponse


class Heartbeats:
    """
    Sends heartbeats, and is a source of commands: those that come in the answers.

    :param redact: takes secrets out of a text.
    :param in_thread: runs a function in a thread, since asking the machine how it is may block.
    :param activity: (commands waiting, commands running).
    :param on_command: takes a command that came in an answer.
    """

    log = Logger()

    def __init__(
        self,
        *,
        identity: Identity,
        machine: MachineSource,
        whole: config.Config,
        redact: Callable[[str], str],
        requests: Requests,
        in_thread: Callable[[Callable[[], SystemHealth]], Deferred[SystemHealth]],
        seconds: Callable[[], float],
        wall: Callable[[], float],
        timestamp: Callable[[], str],
        new_id: Callable[[], str],
        queue: Callable[[], QueueStatus],
        activity: Callable[[], tuple[int, int]],
        inventories: Inventories,
        on_command: Callable[[Heartbeats, CommandArrived], None],
        losses: LossReports,
        metrics: Metrics,
    ) -> None:
        self._identity = identity
        self._machine = machine
        self._redact = redact
        self._answers = body_decoder(HeartbeatAnswer, whole)
        self._commands = body_decoder(CommandEnvelope, whole)
        self._requests = requests
        self._in_thread = in_thread
        self._seconds = seconds
        self._wall = wall
        self._timestamp = timestamp
        self._new_id = new_id
        self._queue = queue
        self._activity = activity
        self._inventories = inventories
        self._on_command = on_command
        self._losses = losses
        self._metrics = metrics
        self._throttle = LogThrottle(seconds)
        self._began = seconds()
        self._acked: list[str] = []

    async def send(self, status: str = "online", *, deadline: float | None = None) -> HeartbeatAnswer:
        """
        Send one heartbeat.

        :param deadline: seconds for all attempts together.
        :raise InvalidMessage: ``status`` is no text, or a value is nothing that JSON can say.
        :raise CommsError: it could not be delivered; nothing is kept of it.
        """
        if not isinstance(status, str):
            raise InvalidMessage(f"the status of a heartbeat is a text, not {type(status).__name__}")
        health = await self._in_thread(self._machine.health)
        queue = self._queue()
        pending, running = self._activity()
        acked, self._acked = self._acked, []
        inventory = self._inventories.accepted_checksum
        oldest = queue.oldest_event_at
        beat = Heartbeat(
            machine_id=self._identity.machine_id,
            hostname=self._identity.hostname,
            timestamp=self._timestamp(),
            status=self._redact(unicode(status)),
            agent_version=self._identity.agent_version,
            uptime_seconds=int(self._seconds() - self._began),
            last_inventory=self._inventories.last_accepted,
            system_health=health,
            pending_commands=pending,
            active_tasks=running,
            delivery=Delivery(
                queued_events=queue.events,
                queued_bytes=queue.event_bytes,
                oldest_event_seconds=0.0 if oldest is None else max(self._wall() - oldest, 0.0),
                outage_budget_seconds=queue.outage_budget,
                unreported_losses=queue.unreported_losses,
                losses=self._losses.outstanding or msgspec.UNSET,
            ),
            acked_commands=acked,
        )
        try:
            response = await self._requests.send(
                "POST",
                "/heartbeat",
                body=encode_data(beat),
                idempotency_key=self._new_id(),
                deadline=deadline,
                check=self._read,
            )
        except BaseException:
            self._metrics.message("heartbeat", "out", "failed")
            # The backend may not have read them: confirmed once more by the next heartbeat.
            self._acked = acked + self._acked
            raise
        self._metrics.message("heartbeat", "out", "acked")
        self.log.info(
            "heartbeat answered after {milliseconds:.0f} ms",
            event="heartbeat.answered",
            milliseconds=response.elapsed * 1000,
        )
        answer = self._read(response)
        self._take_commands(answer)
        self._losses.acked(answer.acked_losses)
        if answer.inventory_checksum is not None:
            self._inventories.held(answer.inventory_checksum, expected=inventory)
        return answer

    def _take_commands(self, answer: HeartbeatAnswer) -> None:
        for raw in answer.commands:
            try:
                command = self._commands.decode(raw)
            except Malformed as error:
                self._metrics.invalid(error.reason)
                suppressed = self._throttle.allow(error.reason)
                if suppressed is not None:
                    self.log.warn(
                        "a command in a heartbeat's answer cannot be used: {error} ({suppressed} more like it before)",
                        event="heartbeat.invalid-command",
                        error=error.fact,
                        suppressed=suppressed,
                    )
                continue
            self._on_command(self, CommandArrived(command.id, "", command.data))

    def acknowledge(self, command_id: str) -> None:
        """The command is in the inbox; the next heartbeat says so."""
        self._acked.append(command_id)

    def refuse(self, command_id: str, code: str, message: str, retry_after: float | None) -> bool:
        """A command that is not confirmed comes again with a later answer: to say nothing is to refuse."""
        return True

    def _read(self, response: HTTPResponse) -> HeartbeatAnswer:
        """
        Read the answer to a heartbeat.

        :raise PeerViolation: it is no such answer; a portal or a proxy says 200 to everything, and proves nothing.
        """
        try:
            return self._answers.decode(response.body)
        except Malformed as error:
            self._metrics.invalid(error.reason)
            raise PeerViolation(
                f"the answer to a heartbeat (HTTP {response.status}) is not a backend's: {error.fact}"
            ) from error
