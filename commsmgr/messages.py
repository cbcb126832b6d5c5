"""
What the agent and a backend say to each other: frozen typed structs, the single source of the wire's schema.

The JSON Schema in the docs, the validation of what arrives, and the bytes that leave all come from these types. Fields
that a receiver does not know are ignored, on both sides, unless an operator wants them refused: that is how either can
be newer than the other. What :mod:`commsmgr.sanitise` holds against a message is declared here too: lengths, counts,
ranges and the characters of ids and names.

Bodies (what travels over HTTP, and inside ``data`` over WebSocket) stand first, WebSocket envelopes after them.
"""

# Without "annotations" from __future__: msgspec would have to compile each of those strings again, at every start.
from enum import Enum, auto
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

LARGEST = (1 << 64) - 1
SMALLEST = -(1 << 63)
"""Integers in data without a schema are kept to the last digit within these; what exceeds them is refused."""


class Charset(Enum):
    """Characters that a text may have. Declared beside lengths, not as patterns: those took half of all decoding."""

    ID = auto()
    """Printable ASCII: an id is echoed into logs, JSON and an HTTP header, and this keeps all three safe."""

    NAME = auto()
    """What is printable (:meth:`str.isprintable`): no control characters, no change of writing direction."""


Id: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        description="printable ASCII, 1 to 200 characters",
        extra={"charset": Charset.ID},
        extra_json_schema={"pattern": "^[ -~]*$"},
    ),
]
Name: TypeAlias = Annotated[
    str,
    Meta(
        max_length=4096,
        description="printable, at most 4096 characters",
        extra={"charset": Charset.NAME},
        extra_json_schema={"pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028-\u202e]*$"},
    ),
]
Text: TypeAlias = Annotated[str, Meta(max_length=1 << 20)]
ShortText: TypeAlias = Annotated[str, Meta(max_length=4096)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=10 * 365 * 86400, description="seconds")]
Percent: TypeAlias = Annotated[float, Meta(ge=0, le=100)]
# Larger ones are not the same to every reader of JSON (RFC 7493 section 2.2).
Integer: TypeAlias = Annotated[int, Meta(ge=-(1 << 53) + 1, le=(1 << 53) - 1)]
JSONObject: TypeAlias = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Heartbeat: POST /heartbeat


class SystemHealth(Struct, frozen=True, kw_only=True):
    """How the machine is, as far as the standard library or psutil can tell; percentages from 0 to 100."""

    cpu_usage_percent: Percent = 0.0
    memory_usage_percent: Percent = 0.0
    disk_usage_percent: Percent = 0.0
    status: Literal["healthy", "warning", "critical", "unknown"] = "unknown"


class LossRow(Struct, frozen=True, kw_only=True):
    """
    How many messages of a kind were given up for one reason, and when the first and the last of them were.

    ``kind`` is ``command_result``, ``inventory`` or another type of message. ``reason`` is ``refused`` (for good, by
    the backend), ``expired`` (over its own time), ``over-age`` (over the operator's), ``damaged`` (on the disk),
    ``evicted`` (a dead letter that gave way to newer ones: it was counted before, when it died), or another word.
    """

    reason: Name
    kind: Name
    count: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    first_at: ShortText
    last_at: ShortText


class LossReport(Struct, frozen=True, kw_only=True):
    """A loss receipt within a heartbeat; ``id`` and content are those of the ``loss_receipt`` over WebSocket."""

    id: Id
    losses: Annotated[list[LossRow], Meta(max_length=1000)]


class Delivery(Struct, frozen=True, kw_only=True):
    """How delivery stands: what the agent still holds for the backend, and how long it could go on without it."""

    queued_events: int = 0
    queued_bytes: int = 0
    oldest_event_seconds: float = 0.0
    outage_budget_seconds: float | None = None
    """Seconds of outage that the spool can still buffer at the present rate; None while nothing is being produced."""
    unreported_losses: int = 0
    """How many messages were given up that no acknowledged loss receipt tells of, those of ``losses`` included."""
    losses: LossReport | msgspec.UnsetType = msgspec.UNSET
    """The loss receipt that no backend has acknowledged yet; absent when there is none."""


class Heartbeat(Struct, frozen=True, kw_only=True):
    """The agent lives. ``last_inventory`` is the RFC 3339 time of the last accepted inventory, or empty."""

    machine_id: str
    hostname: str
    timestamp: str
    status: str = "online"
    agent_version: str = ""
    uptime_seconds: int = 0
    last_inventory: str = ""
    system_health: SystemHealth = SystemHealth()
    pending_commands: int = 0
    active_tasks: int = 0
    delivery: Delivery = Delivery()
    acked_commands: list[str] | msgspec.UnsetType = msgspec.UNSET
    """commsmgr.v1: ids of commands that came in an earlier heartbeat's answer and are now in the inbox."""


class CommandData(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to do. ``timeout`` is in seconds, 0 for the agent's default; ``options`` is passed on as it came."""

    type: Name = ""
    command: Text = ""
    args: Annotated[list[Text], Meta(max_length=10_000)] = []
    timeout: Annotated[float, Meta(ge=0, le=30 * 86400)] = 0
    options: JSONObject = {}


class CommandEnvelope(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="command"):
    """A command. The envelope's ``id`` is the command's."""

    id: Id
    data: CommandData
    timestamp: ShortText = ""


class HeartbeatAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    The answer to a heartbeat; ``commands`` only from a commsmgr.v1 backend while no WebSocket can be had.

    ``acked_losses``, from a commsmgr.v1 backend only, is the id of the heartbeat's loss receipt, once it is stored.
    ``inventory_checksum``, from a commsmgr.v1 backend only, is that of the inventory that it has, empty if it has none.
    """

    status: ShortText = ""
    timestamp: ShortText = ""
    message: ShortText = ""
    commands: Annotated[list[msgspec.Raw], Meta(max_length=1000)] = []
    """Each one a ``command`` envelope; raw, so that a malformed one does not take the others with it."""
    acked_losses: Name = ""
    inventory_checksum: Name | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Inventory: POST /inventory


class Inventory(Struct, frozen=True, kw_only=True):
    """What the machine is. ``checksum`` is the SHA-256 of the bytes of ``data`` as sent, in lower-case hexadecimal."""

    machine_id: str
    timestamp: str
    checksum: str
    data: msgspec.Raw
    type: Literal["inventory"] = "inventory"


class InventoryAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to an inventory; ``checksum_received`` is the checksum that the backend stored."""

    status: ShortText = ""
    checksum_received: Name = ""


# ---------------------------------------------------------------------------------------------------------------------
# Result: POST /commands/result, or the ``data`` of a ``command_result``

ResultStatus: TypeAlias = Literal["success", "error", "timeout", "rejected", "interrupted"]


class ResultBody(Struct, frozen=True, kw_only=True):
    """
    What became of a command.

    Plain backends read the duration as ``execution_time`` over WebSocket and as ``execution_time_ms`` over HTTP, both
    in milliseconds. Both are always written, so that one encoding, stored once, serves either transport unchanged.
    """

    id: Id
    command_id: Id
    status: ResultStatus
    output: str = ""
    error: str = ""
    exit_code: Integer = 0
    execution_time: Integer = 0
    execution_time_ms: Integer = 0
    timestamp: str = ""
    truncated_bytes: Integer | msgspec.UnsetType = msgspec.UNSET
    """How many bytes (in UTF-8) of ``output`` and ``error`` were left out; absent when both are whole."""


# ---------------------------------------------------------------------------------------------------------------------
# WebSocket envelopes


class RegisterData(Struct, frozen=True, kw_only=True):
    """Who the agent is."""

    hostname: str = ""
    agent_version: str = ""


class Register(Struct, frozen=True, kw_only=True, tag="register"):
    """The agent's first message on a WebSocket. No result is sent before it is answered."""

    machine_id: Id
    id: Id
    timestamp: str
    data: RegisterData = RegisterData()


class SettingsData(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Intervals that a backend may set for the length of a session, in seconds; absent ones stay as configured."""

    heartbeat_interval: Annotated[float, Meta(ge=1, le=86400)] | None = None
    inventory_interval: Annotated[float, Meta(ge=60, le=30 * 86400)] | None = None


class RegistrationAckData(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``dedupe_window`` is how many seconds the backend remembers ids."""

    message: ShortText = ""
    machine_id: Name = ""
    dedupe_window: Seconds = 86400


class RegistrationAck(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="registration_ack"):
    """The backend knows the agent."""

    id: Name = ""
    timestamp: ShortText = ""
    data: RegistrationAckData = RegistrationAckData()


class ResultEnvelope(Struct, frozen=True, kw_only=True, tag="command_result"):
    """A result on its way to the backend; ``data`` is a :class:`ResultBody`, as stored."""

    id: Id
    timestamp: str
    data: msgspec.Raw


class LossReceiptData(Struct, frozen=True, kw_only=True):
    """One row for each reason and kind."""

    losses: Annotated[list[LossRow], Meta(max_length=1000)]


class LossReceipt(Struct, frozen=True, kw_only=True, tag="loss_receipt"):
    """
    commsmgr.v1: messages that the agent has given up since the receipt before this one.

    Acknowledged by its ``id`` like a result. One is outstanding at a time; it is sent again, with the same id and the
    same content, until it is acknowledged, and a backend that knows the id does nothing else.
    """

    id: Id
    timestamp: str
    data: LossReceiptData


class Ping(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ping"):
    """A question for a pong by message; the agent's own keep-alive is the protocol's ping frame."""

    id: Name = ""


class Pong(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pong"):
    """The answer to a ``ping`` message, with its id."""

    id: Name = ""


class Ack(Struct, frozen=True, kw_only=True, tag="ack"):
    """commsmgr.v1: these messages are stored durably and need not be sent again."""

    ids: Annotated[list[Id], Meta(max_length=100_000)]


class NackData(Struct, frozen=True, kw_only=True):
    """With ``retry_after`` (seconds) the message is tried again, without it it is refused for good."""

    code: Name = ""
    message: ShortText = ""
    retry_after: Seconds | None = None


class Nack(Struct, frozen=True, kw_only=True, tag="nack"):
    """commsmgr.v1: this message was not taken."""

    id: Id
    data: NackData = NackData()


class GoawayData(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Come back after ``reconnect_after`` seconds, at a moment spread over ``window`` seconds."""

    reconnect_after: Seconds = 0
    window: Seconds = 0


class Goaway(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="goaway"):
    """commsmgr.v1: the backend is about to leave; finish what is in flight and return later."""

    data: GoawayData = GoawayData()


class Settings(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="settings"):
    """commsmgr.v1: intervals for this session."""

    data: SettingsData = field(default_factory=SettingsData)


FromBackend: TypeAlias = RegistrationAck | CommandEnvelope | Ping | Pong | Ack | Nack | Goaway | Settings
"""Every message type that an agent understands over WebSocket; anything else is handed on as a push."""

FromAgent: TypeAlias = Register | ResultEnvelope | LossReceipt | Ping | Pong | Ack | Nack
"""Every message type that a backend understands over WebSocket, save the old form of a result (no type at all)."""


# ---------------------------------------------------------------------------------------------------------------------
# What the embedding agent holds in its hands


class Result(Struct, frozen=True, kw_only=True):
    """
    What the agent says of a command.

    :ivar execution_time: seconds that the command took.
    :ivar key: the command's :attr:`Command.key`; None means the oldest open command with ``command_id``.
    """

    command_id: str
    status: ResultStatus = "success"
    output: str = ""
    error: str = ""
    exit_code: int = 0
    execution_time: float = 0.0
    key: int | None = None


class Command(Struct, frozen=True, kw_only=True):
    """
    A command that was offered to the agent and has to be answered with one :class:`Result`.

    :ivar key: names this command in the inbox; two commands of a plain backend may bear the same ``id``.
    :ivar timeout: seconds the command may take, already within the bounds of the configuration.
    :ivar redelivered: whether it was offered before the process last stopped, and may have run then.
    """

    id: str
    key: int
    type: str
    command: str
    args: tuple[str, ...]
    timeout: float
    options: JSONObject
    redelivered: bool = False

    def success(self, output: str = "", *, exit_code: int = 0) -> Result:
        """Return a result that says that the command did what it should."""
        return Result(command_id=self.id, status="success", output=output, exit_code=exit_code, key=self.key)

    def error(self, error: str, *, output: str = "", exit_code: int = 1) -> Result:
        """Return a result that says that the command ran and failed."""
        return Result(command_id=self.id, status="error", output=output, error=error, exit_code=exit_code, key=self.key)

    def rejected(self, error: str) -> Result:
        """Return a result that says that the command was not run at all."""
        return Result(command_id=self.id, status="rejected", error=error, exit_code=1, key=self.key)


class Push(Struct, frozen=True, kw_only=True):
    """A message of a type that commsmgr does not know (``config_update`` …), as it came, for the embedding agent."""

    type: str
    id: str
    payload: bytes
