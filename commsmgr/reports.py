"""
What the agent says of itself: the heartbeat and the inventory, put together and sent.

The heartbeat is a pulse: built when it is sent, kept nowhere. The inventory is a state: a newer one replaces an unsent
older one in the outbox, and content that the backend already has is not sent again before ``inventory.resend_after``.

What a backend has is the last that came to it, and that need not be the last that was sent: a request that was given up
on a slow way, perhaps by an agent that has died since, may arrive after its successor. Nothing can be read from times
and ids then, for clocks step. So a commsmgr.v1 backend says in each answer to a heartbeat which inventory it has, and
if that is another than the one it took last, the next inventory is sent even if nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import TypeAlias

import msgspec
from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger

from commsmgr import config
from commsmgr.errors import InvalidMessage, PeerViolation
from commsmgr.interfaces import MachineSource
from commsmgr.losses import LossReports
from commsmgr.machine import stable_view
from commsmgr.messages import (
    CommandEnvelope,
    Delivery,
    Heartbeat,
    HeartbeatAnswer,
    Inventory,
    InventoryAnswer,
    JSONObject,
    SystemHealth,
)
from commsmgr.observe.metrics import Metrics
from commsmgr.outgoing import encode_data, unicode
from commsmgr.policy.burst import Burst
from commsmgr.redact import Redactor
from commsmgr.requests import Requests
from commsmgr.sanitise import Malformed
from commsmgr.session.conversation import CommandArrived
from commsmgr.session.wire import reader
from commsmgr.spool import Entry, Lane, Outbox
from commsmgr.status import QueueStatus
from commsmgr.transport.http import HTTPResponse

_Stock: TypeAlias = tuple[bytes, bytes]

LONG = 64 << 10
"""Bytes from which on an inventory is looked at in a thread."""


class Identity(msgspec.Struct, frozen=True):
    """Who the agent is to its backend."""

    machine_id: str
    hostname: str
    agent_version: str


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
        self._answers = reader(HeartbeatAnswer, whole)
        self._commands = reader(CommandEnvelope, whole)
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
        self._burst = Burst(seconds)
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
                command = self._commands.read(raw)
            except Malformed as error:
                self._metrics.invalid(error.reason)
                suppressed = self._burst.allow(error.reason)
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
            return self._answers.read(response.body)
        except Malformed as error:
            self._metrics.invalid(error.reason)
            raise PeerViolation(
                f"the answer to a heartbeat (HTTP {response.status}) is not a backend's: {error.fact}"
            ) from error


class Inventories:
    """
    Sends inventories through the outbox.

    :param in_thread: runs a function in a thread, since taking stock of a machine takes a while, and so does looking
        for secrets in what is long.
    :ivar last_accepted: when a backend took one, as RFC 3339; empty for never.
    :ivar accepted_checksum: of the one that a backend took last; empty for none, or when a backend has another.
    """

    log = Logger()

    def __init__(
        self,
        *,
        identity: Identity,
        machine: MachineSource,
        outbox: Outbox,
        whole: config.Config,
        redactor: Redactor,
        in_thread: Callable[[Callable[[], _Stock]], Deferred[_Stock]],
        wall: Callable[[], float],
        timestamp: Callable[[], str],
        new_id: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        self._identity = identity
        self._machine = machine
        self._outbox = outbox
        self._settings = whole.inventory
        self._max_body_bytes = whole.delivery.max_body_bytes
        self._answers = reader(InventoryAnswer, whole)
        self._redactor = redactor
        self._in_order = DeferredLock()
        self._in_thread = in_thread
        self._wall = wall
        self._timestamp = timestamp
        self._new_id = new_id
        self._metrics = metrics
        self._sent: tuple[bytes, float] = (b"", 0.0)
        self._fingerprints: dict[str, bytes] = {}
        self.last_accepted = ""
        self.accepted_checksum = ""

    async def send(self, data: JSONObject | None = None, *, force: bool = False) -> str | None:
        """
        Put an inventory into the outbox.

        :param data: the inventory, of what JSON has: dicts with texts as keys, lists, texts, numbers, truth values,
            None; it may be changed as soon as this has returned. None: take it from the machine.
        :param force: send it although the backend has the same.
        :return: the message's id once it is durable, or None when the backend already has this content.
        :raise InvalidMessage: ``data`` is nothing that JSON can say, or larger than ``delivery.max_body_bytes``.
        :raise SpoolError: it could not be kept.
        """
        encoded = None if data is None else self._encoded(data)
        # A later one must not be overtaken by one that took longer in its thread.
        await self._in_order.acquire()
        try:
            if encoded is None:
                stock = await self._in_thread(lambda: self._taken(self._encoded(self._machine.inventory())))
            elif len(encoded) > LONG:
                stock = await self._in_thread(lambda: self._taken(encoded))
            else:
                stock = self._taken(encoded)
            return await self._put(stock, force)
        finally:
            self._in_order.release()

    def _encoded(self, data: object) -> bytes:
        if not isinstance(data, dict):
            raise InvalidMessage(f"an inventory is a JSON object, not {type(data).__name__}")
        encoded = encode_data(data)
        if len(encoded) > self._max_body_bytes:
            raise InvalidMessage(f"the inventory has {len(encoded)} bytes, more than {self._max_body_bytes}")
        return encoded

    def _taken(self, encoded: bytes) -> _Stock:
        """Return what will be sent, and its fingerprint; in whatever thread."""
        data = self._redactor.data(msgspec.json.decode(encoded))
        redacted = encode_data(data)
        return redacted, sha256(msgspec.json.encode(stable_view(data), order="deterministic")).digest()

    async def _put(self, stock: _Stock, force: bool) -> str | None:
        encoded, fingerprint = stock
        known, at = self._sent
        if not force and fingerprint == known and 0 <= self._wall() - at < self._settings.resend_after:
            self._metrics.message("inventory", "out", "unchanged")
            return None
        body = msgspec.json.encode(
            Inventory(
                machine_id=self._identity.machine_id,
                timestamp=self._timestamp(),
                checksum=sha256(encoded).hexdigest(),
                data=msgspec.Raw(encoded),
            )
        )
        if len(body) > self._max_body_bytes:
            raise InvalidMessage(f"the inventory has {len(body)} bytes, more than {self._max_body_bytes}")
        message_id = self._new_id()
        await self._outbox.put(lane=Lane.STATE, kind="inventory", id=message_id, body=body, key="inventory")
        self._fingerprints = {message_id: fingerprint}
        return message_id

    def delivered(self, entry: Entry, response: HTTPResponse) -> None:
        """The backend has taken an inventory."""
        self._sent = (self._fingerprints.pop(entry.id, b""), self._wall())
        self.last_accepted = self._timestamp()
        sent = msgspec.json.decode(entry.body, type=Inventory).checksum
        try:
            received = self._answers.read(response.body).checksum_received
        except Malformed as error:
            self._metrics.invalid(error.reason)
            received = ""
        if received and received != sent:
            self._differs(received, sent)
            return
        self.accepted_checksum = sent
        self.log.info(
            "inventory accepted after {milliseconds:.0f} ms",
            event="inventory.accepted",
            milliseconds=response.elapsed * 1000,
            message_id=entry.id,
        )

    def held(self, checksum: str, *, expected: str) -> None:
        """
        A backend has answered a heartbeat, and said which inventory it has.

        Nothing can be said while one is on its way: it may have come already, and will if it has not.

        :param checksum: of that inventory, empty if it has none.
        :param expected: :attr:`accepted_checksum` when the heartbeat was sent.
        """
        if expected and expected == self.accepted_checksum != checksum and not self._outbox.stats.states:
            self._differs(checksum, expected)

    def _differs(self, received: str, sent: str) -> None:
        """Send an inventory the next time even if it is unchanged."""
        self._metrics.message("inventory", "out", "checksum-differs")
        self._sent = (b"", 0.0)
        self.accepted_checksum = ""
        self.log.warn(
            "the backend has an inventory with checksum {received}, sent was {sent}; it will be sent again",
            event="inventory.checksum-differs",
            received=received[:80],
            sent=sent,
        )
