"""
One WebSocket conversation from open to end, as the agent leads it: what arrives becomes events, what leaves becomes
bytes.

Theory of operation. Without I/O and without time: the owner sends the payloads, runs the timers and keeps the promises
(stores before it acks). What the conversation remembers is only how far registration has come; the table of transitions
below is all of it. Everything else that the backend may say is independent of that: a command that arrives before the
registration is answered is a command (some backends send what they have as soon as the socket is open), and one that
arrives after a goaway is one too.

The first ``registration_ack`` registers; in the plain dialect the owner's wait does too, because some backends answer
nothing. An ack that names another machine is not the answer to our registration: it is reported as ``wrong-machine``
and does not register. With commsmgr.v1 the owner's timeout then ends the link; a plain backend that merely spells our
id its own way registers by the wait.

The plain dialect does not have ack, nack, goaway and settings: there they are messages of unknown types like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import TypeAlias

from msgspec import Struct

from commsmgr.messages import (
    Ack,
    CommandData,
    CommandEnvelope,
    FromBackend,
    Goaway,
    LossReceipt,
    LossReceiptData,
    LossReport,
    Nack,
    NackData,
    Ping,
    Pong,
    Push,
    Register,
    RegisterData,
    RegistrationAck,
    RegistrationAckData,
    Settings,
)
from commsmgr.redact import single_line
from commsmgr.sanitise import Malformed
from commsmgr.session.wire import Decoder, command_digest, encode

_Plain: TypeAlias = RegistrationAck | CommandEnvelope | Ping | Pong


class Registered(Struct, frozen=True, tag=True):
    """Results may be sent."""


class CommandArrived(Struct, frozen=True, tag=True):
    """
    A command, perhaps not for the first time.

    :ivar digest: with ``id`` it tells a duplicate from another command; empty in commsmgr.v1, where the id alone does.
    """

    id: str
    digest: str
    data: CommandData


class Acked(Struct, frozen=True, tag=True):
    """The backend has these messages of ours."""

    ids: tuple[str, ...]


class Nacked(Struct, frozen=True, tag=True):
    """The backend did not take this message: try again after ``retry_after`` seconds, or never if that is None."""

    id: str
    code: str
    message: str
    retry_after: float | None


class GoingAway(Struct, frozen=True, tag=True):
    """Finish what is in flight, close, return after ``reconnect_after`` seconds at a moment spread over ``window``."""

    reconnect_after: float
    window: float


class SettingsArrived(Struct, frozen=True, tag=True):
    """Intervals in seconds for this session; None leaves one as configured."""

    heartbeat_interval: float | None
    inventory_interval: float | None


class Reply(Struct, frozen=True, tag=True):
    """Send this payload at once."""

    payload: bytes


class Pushed(Struct, frozen=True, tag=True):
    """A message of a type that this dialect does not have, for the embedding agent."""

    push: Push


class Invalid(Struct, frozen=True, tag=True):
    """A mistake of the backend's: a reason of :class:`~commsmgr.sanitise.Malformed`, or ``wrong-machine``."""

    reason: str
    detail: str


Event: TypeAlias = Registered | CommandArrived | Acked | Nacked | GoingAway | SettingsArrived | Reply | Pushed | Invalid


class State(Enum):
    """How far the conversation has come."""

    AWAITING_REGISTRATION = auto()
    REGISTERED = auto()
    DRAINING = auto()


class _Input(Enum):
    """What can change the state."""

    ACKNOWLEDGED = auto()
    WAIT_ELAPSED = auto()
    GOAWAY = auto()


_TRANSITIONS: dict[tuple[State, _Input], State] = {
    (State.AWAITING_REGISTRATION, _Input.ACKNOWLEDGED): State.REGISTERED,
    (State.AWAITING_REGISTRATION, _Input.WAIT_ELAPSED): State.REGISTERED,
    (State.AWAITING_REGISTRATION, _Input.GOAWAY): State.DRAINING,
    (State.REGISTERED, _Input.GOAWAY): State.DRAINING,
}
"""What is not here changes nothing: a second ack, an ack after the wait or the goaway, a second goaway."""


class Conversation:
    """
    One conversation. A new connection needs a new one.

    :param machine_id: who we are to the backend.
    :param hostname: for the registration, like ``agent_version``.
    :param v1: whether the backend selected the subprotocol ``commsmgr.v1``; otherwise it speaks plain.
    :param decoder: brings the limits, and knows all types of commsmgr.v1; for the plain dialect it is narrowed here.
    :param new_id: makes message ids.
    :param timestamp: tells the time as RFC 3339.
    """

    def __init__(
        self,
        *,
        machine_id: str,
        hostname: str,
        agent_version: str,
        v1: bool,
        decoder: Decoder[FromBackend],
        new_id: Callable[[], str],
        timestamp: Callable[[], str],
    ) -> None:
        self._machine_id = machine_id
        self._data = RegisterData(hostname=hostname, agent_version=agent_version)
        self._v1 = v1
        self._decoder = decoder if v1 else decoder.narrowed(_Plain)
        self._new_id = new_id
        self._timestamp = timestamp
        self._state = State.AWAITING_REGISTRATION

    @property
    def state(self) -> State:
        """How far it has come."""
        return self._state

    def open(self) -> bytes:
        """Return the registration's payload, which must be the first thing sent."""
        return encode(
            Register(machine_id=self._machine_id, id=self._new_id(), timestamp=self._timestamp(), data=self._data)
        )

    def receive(self, payload: bytes, is_text: bool) -> list[Event]:
        """
        Take a message; never raises.

        :param is_text: whether it was a text message.
        :return: what it means, in order.
        """
        try:
            message = self._decoder.decode(payload, is_text)
        except Malformed as error:
            invalid = Invalid(error.reason, error.detail)
            if self._v1 and error.id is not None:
                # Unanswered, a message that we can never take would be sent again after every registration.
                return [invalid, Reply(self.nack(error.id, error.reason, error.detail, None))]
            return [invalid]
        return self._understood(message)

    def wait_elapsed(self) -> list[Event]:
        """
        The time that a plain backend gets to answer the registration is over: silence is consent.

        Does nothing in commsmgr.v1, where the owner ends the link when the answer fails to come.
        """
        if self._v1:
            return []
        return self._registered(_Input.WAIT_ELAPSED, RegistrationAckData())

    def loss_receipt(self, report: LossReport) -> bytes:
        """Return the payload that says what was given up; commsmgr.v1 only."""
        data = LossReceiptData(losses=report.losses)
        return encode(LossReceipt(id=report.id, timestamp=self._timestamp(), data=data))

    def ack(self, ids: Iterable[str]) -> bytes:
        """Return the payload that says that these commands are stored durably; commsmgr.v1 only."""
        return encode(Ack(ids=list(ids)))

    def nack(self, id: str, code: str, message: str, retry_after: float | None) -> bytes:
        """
        Return the payload that says that a command was not taken; commsmgr.v1 only.

        :param retry_after: seconds after which the backend should try again, None for never.
        """
        return encode(Nack(id=id, data=NackData(code=code, message=message, retry_after=retry_after)))

    def _understood(self, message: FromBackend | Push) -> list[Event]:
        match message:
            case CommandEnvelope():
                digest = "" if self._v1 else command_digest(message.data)
                return [CommandArrived(message.id, digest, message.data)]
            case Ack():
                return [Acked(tuple(message.ids))]
            case Nack():
                data = message.data
                # Logged, and kept with a dead letter: on one line, whoever reads it.
                return [Nacked(message.id, data.code, single_line(data.message, 1000), data.retry_after)]
            case Ping():
                return [Reply(encode(Pong(id=message.id)))]
            case Pong():
                return []
            case Push():
                return [Pushed(message)]
            case Settings():
                return [SettingsArrived(message.data.heartbeat_interval, message.data.inventory_interval)]
            case Goaway():
                if self._changes(_Input.GOAWAY):
                    return [GoingAway(message.data.reconnect_after, message.data.window)]
                return []
            case RegistrationAck():
                return self._registered(_Input.ACKNOWLEDGED, message.data)

    def _registered(self, cause: _Input, data: RegistrationAckData) -> list[Event]:
        if self._state is State.AWAITING_REGISTRATION and data.machine_id not in ("", self._machine_id):
            return [Invalid("wrong-machine", f"the registration of {data.machine_id[:200]!r} was acknowledged")]
        return [Registered()] if self._changes(cause) else []

    def _changes(self, cause: _Input) -> bool:
        """Take the transition for ``cause``, if there is one from here."""
        target = _TRANSITIONS.get((self._state, cause))
        if target is None:
            return False
        self._state = target
        return True
