"""
The plain dialect, as backends of this family speak it: nothing is acknowledged over the WebSocket.

The first message with a top-level ``machine_id`` is the registration. Results may come as ``command_result`` or in an
old form that has no type at all; a result that came before is overwritten. What is not understood is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import msgspec
from msgspec import Struct

from commsmgr.backend.events import EventLog
from commsmgr.backend.faults import Faults
from commsmgr.backend.switchboard import DIALECT_PLAIN, Switchboard
from commsmgr.form import form_of
from commsmgr.messages import Id, Pong, RegistrationAck, RegistrationAckData, ResultBody, ResultStatus
from commsmgr.sanitise import Malformed
from commsmgr.session.wire import decode_old_result, encode


class Undecodable(ValueError):
    """What an agent sent is not what the protocol says; the text says why."""


class LooseResult(Struct, kw_only=True):
    """A result as plain agents send it: everything may be missing, and the duration has two names."""

    id: Id | None = None
    command_id: Id | None = None
    status: str = ""
    output: str = ""
    error: str = ""
    exit_code: int = 0
    execution_time: float = 0
    execution_time_ms: float = 0
    timestamp: str = ""

    def strict(self) -> ResultBody:
        """
        Return it as the protocol's own type.

        :raise Undecodable: it has no id, or a status that is not one of the protocol's.
        """
        result_id = self.id or self.command_id
        if result_id is None:
            raise Undecodable("the result has no id")
        status = self.status or ("error" if self.error else "success")
        if status not in get_args(ResultStatus):
            raise Undecodable(f"{status!r} is not the status of a result")
        duration = int(self.execution_time_ms or self.execution_time)
        return ResultBody(
            id=result_id,
            command_id=self.command_id or result_id,
            status=cast(ResultStatus, status),
            output=self.output,
            error=self.error,
            exit_code=self.exit_code,
            execution_time=duration,
            execution_time_ms=duration,
            timestamp=self.timestamp,
        )


class _Message(Struct, kw_only=True):
    """Just enough of a message to know what it is."""

    type: str = ""
    machine_id: Id | None = None
    id: Id | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


def decode(payload: bytes, type: Any) -> Any:
    """
    Decode JSON that a stranger sent.

    :raise Undecodable: it is not UTF-8, not JSON, too deep, or not of the type.
    """
    try:
        payload.decode()
        message = msgspec.json.decode(payload, type=type)
        form_of(type).check(message)
        return message
    except (ValueError, RecursionError, Malformed) as error:
        raise Undecodable(str(error)) from None


class PlainConversation:
    """
    One agent's WebSocket in the plain dialect.

    :param send: sends one message.
    :param abort: cuts the connection.
    """

    dialect = DIALECT_PLAIN

    def __init__(
        self,
        switchboard: Switchboard,
        events: EventLog,
        faults: Faults,
        *,
        send: Callable[[bytes], None],
        abort: Callable[[], None],
    ) -> None:
        self._switchboard = switchboard
        self._events = events
        self._faults = faults
        self._send = send
        self._abort = abort
        self.machine_id = ""

    def received(self, payload: bytes, is_text: bool) -> None:
        """A message came."""
        try:
            message = decode(payload, _Message)
            if not self.machine_id and message.machine_id:
                self._register(message)
            elif message.type == "command_result":
                self._result(decode(bytes(message.data), LooseResult).strict())
            elif message.type == "" and (old := decode_old_result(payload)) is not None:
                self._result(old)
            elif message.type == "ping":
                self._send(encode(Pong(id=message.id or "")))
            else:
                self._events.emit(
                    "message", machine_id=self.machine_id, transport="websocket", id=message.id or "", note=message.type
                )
        except Undecodable as error:
            self._events.emit(
                "refused", machine_id=self.machine_id, transport="websocket", note=f"not understood: {error}"
            )

    def deliver(self, envelope: bytes) -> None:
        """Send a message."""
        self._send(envelope)

    def superseded(self) -> None:
        """Nothing: a plain backend leaves the older connection open."""

    def ended(self, reason: str) -> None:
        """The connection is gone."""
        if self.machine_id:
            self._switchboard.left(self.machine_id, self, reason)

    def _register(self, message: _Message) -> None:
        self.machine_id = message.machine_id or ""
        if self._faults.strike("silent", "websocket") is None:
            ack = RegistrationAck(
                id=message.id or "",
                timestamp=self._switchboard.timestamp(),
                data=RegistrationAckData(message="registered", machine_id=self.machine_id),
            )
            # A plain backend knows no window in which it remembers ids.
            answer = msgspec.to_builtins(ack)
            answer["data"].pop("dedupe_window", None)
            self._send(msgspec.json.encode(answer))
        self._switchboard.joined(self.machine_id, self)

    def _result(self, result: ResultBody) -> None:
        crash = self._faults.strike("crash", "websocket")
        if crash is None or crash.stored:
            self._switchboard.results([(result, encode(result))], "websocket", overwrite=True)
        if crash is not None:
            self._abort()
