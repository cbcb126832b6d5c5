"""
The backend's side of every exchange, whatever transport and dialect: who is connected, commands out, results in.

A command for a commsmgr.v1 agent is stored first and kept until the agent acknowledges it, answers it or refuses it; it
goes out at once when the agent is connected, again after each registration, and in heartbeat answers while there is no
WebSocket. A command for a plain agent goes out on the WebSocket or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
from twisted.internet.defer import Deferred, succeed

from commsmgr.backend.events import EventLog, Kind
from commsmgr.backend.ledger import CommandRow, Ledger
from commsmgr.errors import CommsError, NotRunning
from commsmgr.messages import CommandData, CommandEnvelope, JSONObject, LossReport, ResultBody
from commsmgr.session.wire import encode

DIALECT_V1 = "commsmgr.v1"
DIALECT_PLAIN = "plain"

_HEARTBEAT_COMMANDS = 100
"""At most so many commands in one heartbeat's answer; the others follow in the next."""

Receipt: TypeAlias = Literal["stored", "duplicate", "unknown"]


class MachineNotConnected(CommsError, LookupError):
    """
    The command cannot reach its machine and was dropped.

    A plain backend keeps no commands; one for a machine that never spoke is most likely a typing mistake.
    """

    advice = "wait until the agent has registered"


class Conversation(Protocol):
    """A registered agent's WebSocket, as the switchboard sees it."""

    dialect: str

    def deliver(self, envelope: bytes) -> None:
        """Send one message."""

    def superseded(self) -> None:
        """Take notice that the same machine has registered on another WebSocket."""


class Switchboard:
    """
    Joins agents, commands and results.

    :param new_id: gives ids for commands.
    :param timestamp: gives the time as RFC 3339 text.
    :param quirks: as some plain backends do, closing an older WebSocket of a machine deregisters its newer one.
    """

    def __init__(
        self,
        ledger: Ledger,
        events: EventLog,
        *,
        new_id: Callable[[], str],
        timestamp: Callable[[], str],
        quirks: bool = False,
    ) -> None:
        self.ledger = ledger
        self.events = events
        self.timestamp = timestamp
        self._new_id = new_id
        self._quirks = quirks
        self._connected: dict[str, Conversation] = {}
        self._waiting: dict[str, list[Deferred[ResultBody]]] = {}

    # -- who is connected -------------------------------------------------------------------------------------------

    def joined(self, machine_id: str, conversation: Conversation, note: str = "") -> None:
        """A conversation has registered. It becomes the one that commands go to."""
        older = self._connected.get(machine_id)
        self._connected[machine_id] = conversation
        self.ledger.seen(machine_id, conversation.dialect)
        self.events.emit(
            "registered",
            machine_id=machine_id,
            transport="websocket",
            note=note or conversation.dialect,
            detail={"dialect": conversation.dialect},
        )
        if older is not None:
            older.superseded()

    def left(self, machine_id: str, conversation: Conversation, note: str) -> None:
        """A registered conversation's WebSocket is gone."""
        if self._quirks or self._connected.get(machine_id) is conversation:
            self._connected.pop(machine_id, None)
        self.events.emit("disconnected", machine_id=machine_id, transport="websocket", note=note)

    def conversation(self, machine_id: str) -> Conversation | None:
        """Return the WebSocket conversation that commands for the machine go to."""
        return self._connected.get(machine_id)

    # -- commands ---------------------------------------------------------------------------------------------------

    def send_command(self, machine_id: str, data: CommandData, id: str | None = None) -> str:
        """
        Give a command to a machine.

        :return: the command's id.
        :raise MachineNotConnected: the machine never spoke, or speaks plain and is not connected.
        """
        command_id = id or self._new_id()
        envelope = msgspec.json.encode(CommandEnvelope(id=command_id, data=data, timestamp=self.timestamp()))
        conversation = self._connected.get(machine_id)
        dialect = conversation.dialect if conversation is not None else self.ledger.dialect_of(machine_id)
        if conversation is None and dialect != DIALECT_V1:
            known = "was never heard of" if dialect is None else "speaks plain and is not connected"
            raise MachineNotConnected(f"machine {machine_id!r} {known}: the command was dropped")
        self.ledger.add_command(command_id, machine_id, envelope, "pending" if dialect == DIALECT_V1 else "taken")
        self.events.emit(
            "command",
            machine_id=machine_id,
            id=command_id,
            transport="websocket" if conversation is not None else "",
            note=f"{data.type} {'sent' if conversation is not None else 'kept until the agent connects'}",
            detail={"type": data.type, "command": data.command[:200], "args": [arg[:200] for arg in data.args[:20]]},
        )
        if conversation is not None:
            conversation.deliver(envelope)
        return command_id

    def pending(self, machine_id: str) -> list[CommandRow]:
        """Return the commands to send again after a registration, in the old order."""
        return self.ledger.pending(machine_id)

    def for_heartbeat(self, machine_id: str) -> list[msgspec.Raw]:
        """Return the envelopes that a heartbeat's answer has to carry: none while there is a WebSocket."""
        if machine_id in self._connected:
            return []
        return [msgspec.Raw(row.envelope) for row in self.ledger.pending(machine_id, _HEARTBEAT_COMMANDS)]

    def acked(self, machine_id: str, ids: Sequence[str], transport: Literal["http", "websocket"]) -> None:
        """The agent has these commands in its inbox. Ids of anything else are ignored."""
        with self.ledger.transaction():
            for command_id in self.ledger.settle(machine_id, ids, "taken"):
                self.tell("acked", machine_id=machine_id, id=command_id, transport=transport)

    def nacked(self, machine_id: str, id: str, reason: str, *, final: bool) -> None:
        """The agent did not take this command, for good if ``final``."""
        if final:
            self.ledger.settle(machine_id, [id], "refused")
        self.events.emit(
            "nacked", machine_id=machine_id, id=id, transport="websocket", note=reason, detail={"final": final}
        )

    def tell(self, kind: Kind, **facts: Any) -> None:
        """Emit an event (see :meth:`EventLog.emit`) once the transaction that is open is durable."""
        self.ledger.when_committed(partial(self.events.emit, kind, **facts))

    # -- results ----------------------------------------------------------------------------------------------------

    def results(
        self,
        batch: Sequence[tuple[ResultBody, bytes]],
        transport: Literal["http", "websocket"],
        *,
        require_command: bool = True,
        overwrite: bool = False,
    ) -> list[Receipt]:
        """
        Store results in one transaction; they are durable when this returns, or with the transaction around it.

        :param batch: each one decoded, and as it came.
        :param require_command: whether a result of a command that is not known here is refused (as ``unknown``).
        :param overwrite: see :meth:`Ledger.add_result`.
        """
        receipts: list[Receipt] = []
        with self.ledger.transaction():
            for body, raw in batch:
                command = self.ledger.command(body.command_id)
                if command is None and require_command:
                    receipts.append("unknown")
                    continue
                machine_id = command.machine_id if command is not None else ""
                new = self.ledger.add_result(body.id, body.command_id, machine_id, transport, raw, overwrite=overwrite)
                receipts.append("stored" if new else "duplicate")
            for (body, _), receipt in zip(batch, receipts, strict=True):
                self.ledger.when_committed(partial(self._announce, body, receipt, transport))
        return receipts

    def losses(self, machine_id: str, report: LossReport, transport: Literal["http", "websocket"]) -> None:
        """Store a loss receipt; it is durable when this returns, or with the transaction around it."""
        if not self.ledger.add_loss_receipt(report.id, machine_id, transport, encode(report)):
            return
        lost = ", ".join(f"{row.count} {row.kind} {row.reason}" for row in report.losses)
        self.tell(
            "losses",
            machine_id=machine_id,
            id=report.id,
            transport=transport,
            note=lost[:1000],
            detail={"losses": [msgspec.to_builtins(row) for row in report.losses]},
        )

    def when_result(self, command_id: str) -> Deferred[ResultBody]:
        """
        Wait for the result of a command, or give it at once. Cancelling stops waiting.

        It fails with :exc:`~commsmgr.errors.NotRunning` when the backend stops first.
        """
        known = self.result_of(command_id)
        if known is not None:
            return succeed(known)
        waiting: Deferred[ResultBody] = Deferred(self._waiting.setdefault(command_id, []).remove)
        self._waiting[command_id].append(waiting)
        return waiting

    def result_of(self, command_id: str) -> ResultBody | None:
        """Return the first result of a command, or None."""
        for row in self.ledger.results(command_id)[:1]:
            return msgspec.json.decode(row.body, type=ResultBody)
        return None

    def stop(self) -> None:
        """End every wait."""
        waiting, self._waiting = self._waiting, {}
        for deferreds in waiting.values():
            for deferred in deferreds:
                deferred.errback(NotRunning("the backend was stopped before the result came"))

    def _announce(self, body: ResultBody, receipt: Receipt, transport: Literal["http", "websocket"]) -> None:
        command = self.ledger.command(body.command_id)
        detail: JSONObject = {
            "command_id": body.command_id,
            "status": body.status,
            "exit_code": body.exit_code,
            "output": body.output[:2000],
            "error": body.error[:2000],
            "execution_time_ms": body.execution_time_ms or body.execution_time,
        }
        machine_id = command.machine_id if command is not None else ""
        if receipt == "unknown":
            self.events.emit(
                "refused",
                machine_id=machine_id,
                id=body.id,
                transport=transport,
                note=f"result of a command that is not known here: {body.command_id}",
                detail=detail,
            )
            return
        self.events.emit(
            "result" if receipt == "stored" else "duplicate",
            machine_id=machine_id,
            id=body.id,
            transport=transport,
            note=body.status,
            detail=detail,
        )
        for waiting in self._waiting.pop(body.command_id, []):
            waiting.callback(body)
