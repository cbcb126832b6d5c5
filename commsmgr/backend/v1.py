"""
commsmgr.v1 from the backend's side: nothing is lost, whichever end of the conversation dies when.

Results that arrive in one turn of the reactor are stored in one transaction, and only then acknowledged, in one
``ack``. A crash before the transaction: the agent sends them again. A crash between transaction and ack: the agent
sends them again, the ledger knows their ids, they are acknowledged again and nothing else happens. Commands are stored
before they are sent, and sent again in their old order after each registration until the agent acknowledges them.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from commsmgr.backend.events import EventLog
from commsmgr.backend.faults import Faults
from commsmgr.backend.switchboard import DIALECT_V1, Switchboard
from commsmgr.messages import (
    Ack,
    FromAgent,
    LossReceipt,
    LossReport,
    Nack,
    NackData,
    Ping,
    Pong,
    Push,
    Register,
    RegistrationAck,
    RegistrationAckData,
    ResultBody,
    ResultEnvelope,
)
from commsmgr.sanitise import Malformed
from commsmgr.session.wire import BodyDecoder, Decoder, encode

DUPLICATE_MACHINE = 4409
"""Close code for a WebSocket whose machine has registered on another one: two agents bear one machine_id."""


_MAX_DEPTH = 64


class V1Conversation:
    """
    One agent's WebSocket in commsmgr.v1.

    :param clock: for the batching of one turn, and for commands that the agent wants later.
    :param dedupe_window: seconds that ids are remembered, told to the agent.
    :param max_bytes: largest message taken.
    :param send: sends one message.
    :param close: closes the WebSocket with a code and a reason.
    :param abort: cuts the connection.
    """

    dialect = DIALECT_V1

    def __init__(
        self,
        switchboard: Switchboard,
        events: EventLog,
        faults: Faults,
        clock: IReactorTime,
        *,
        dedupe_window: float,
        max_bytes: int,
        send: Callable[[bytes], None],
        close: Callable[[int, str], None],
        abort: Callable[[], None],
    ) -> None:
        self._switchboard = switchboard
        self._events = events
        self._faults = faults
        self._clock = clock
        self._dedupe_window = dedupe_window
        self._send = send
        self._close = close
        self._abort = abort
        self._decoder: Decoder[FromAgent] = Decoder(FromAgent, max_bytes=max_bytes, max_depth=_MAX_DEPTH)
        self._results = BodyDecoder(ResultBody, max_bytes=max_bytes, max_depth=_MAX_DEPTH)
        self._batch: list[tuple[ResultBody, bytes]] = []
        self._timers: set[IDelayedCall] = set()
        self.machine_id = ""

    def received(self, payload: bytes, is_text: bool) -> None:
        """A message came."""
        try:
            message = self._decoder.decode(payload, is_text)
        except Malformed as error:
            self._malformed(error)
            return
        if isinstance(message, Register):
            self._register(message)
        elif not self.machine_id:
            self._refused("a message before the registration")
        elif isinstance(message, ResultEnvelope):
            self._result(message)
        elif isinstance(message, LossReceipt):
            self._losses(message)
        elif isinstance(message, Ack):
            self._switchboard.acked(self.machine_id, message.ids, "websocket")
        elif isinstance(message, Nack):
            self._nacked(message)
        elif isinstance(message, Ping):
            self._send(encode(Pong(id=message.id)))
        elif isinstance(message, Push):
            self._events.emit(
                "message", machine_id=self.machine_id, transport="websocket", id=message.id, note=message.type
            )

    def deliver(self, envelope: bytes) -> None:
        """Send a message."""
        self._send(envelope)

    def superseded(self) -> None:
        """The machine registered anew elsewhere: end this one."""
        self._close(DUPLICATE_MACHINE, "the machine has registered on another connection")

    def ended(self, reason: str) -> None:
        """The connection is gone. What was not stored yet was not acknowledged either: the agent still has it."""
        self._batch.clear()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self.machine_id:
            self._switchboard.left(self.machine_id, self, reason)

    def _register(self, message: Register) -> None:
        if self.machine_id:
            self._refused("a second registration")
            return
        self.machine_id = message.machine_id
        if self._faults.strike("silent", "websocket") is not None:
            return
        ack = RegistrationAck(
            id=message.id,
            timestamp=self._switchboard.timestamp(),
            data=RegistrationAckData(
                message="registered", machine_id=self.machine_id, dedupe_window=self._dedupe_window
            ),
        )
        self._send(encode(ack))
        for command in self._switchboard.pending(self.machine_id):
            self._send(command.envelope)
        self._switchboard.joined(self.machine_id, self)

    def _result(self, message: ResultEnvelope) -> None:
        raw = bytes(message.data)
        try:
            body = self._results.decode(raw)
        except Malformed as error:
            self._malformed(Malformed(error.reason, error.detail, id=message.id))
            return
        if not self._batch:
            self._later(0, self._flush)
        self._batch.append((body, raw))

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if (fault := self._faults.strike("nack", "websocket")) is not None:
            for body, _ in batch:
                self._nack(body.id, "refused", "the backend was told to refuse results", fault.retry_after)
            return
        crash = self._faults.strike("crash", "websocket")
        if crash is not None and not crash.stored:
            self._abort()
            return
        receipts = self._switchboard.results(batch, "websocket")
        if crash is not None:
            self._abort()
            return
        for (body, _), receipt in zip(batch, receipts, strict=True):
            if receipt == "unknown":
                self._nack(body.id, "unknown_command", f"there is no command {body.command_id}", None)
        ids = [body.id for (body, _), receipt in zip(batch, receipts, strict=True) if receipt != "unknown"]
        if ids and self._faults.strike("no_ack", "websocket") is None:
            self._send(encode(Ack(ids=ids)))

    def _losses(self, message: LossReceipt) -> None:
        crash = self._faults.strike("crash", "websocket")
        if crash is None or crash.stored:
            report = LossReport(id=message.id, losses=message.data.losses)
            self._switchboard.losses(self.machine_id, report, "websocket")
        if crash is not None:
            self._abort()
        elif self._faults.strike("no_ack", "websocket") is None:
            self._send(encode(Ack(ids=[message.id])))

    def _nack(self, id: str, code: str, message: str, retry_after: float | None) -> None:
        self._send(encode(Nack(id=id, data=NackData(code=code, message=message, retry_after=retry_after))))

    def _nacked(self, message: Nack) -> None:
        again = message.data.retry_after
        reason = f"{message.data.code} {message.data.message}".strip()
        self._switchboard.nacked(self.machine_id, message.id, reason, final=again is None)
        if again is not None:
            self._later(again, self._again, message.id)

    def _again(self, id: str) -> None:
        for command in self._switchboard.pending(self.machine_id):
            if command.id == id:
                self._send(command.envelope)

    def _malformed(self, error: Malformed) -> None:
        self._refused(f"not understood: {error.fact}")
        if error.id is not None and self.machine_id:
            self._nack(error.id, error.reason, error.detail, None)

    def _refused(self, note: str) -> None:
        self._events.emit("refused", machine_id=self.machine_id, transport="websocket", note=note)

    def _later(self, delay: float, function: Callable[..., None], *args: object) -> None:
        def run() -> None:
            self._timers.discard(timer)
            function(*args)

        timer = self._clock.callLater(delay, run)
        self._timers.add(timer)
