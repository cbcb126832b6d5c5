"""What the spool keeps, as frozen structs, and the checksum that tells a damaged row from a whole one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum, StrEnum
from typing import Annotated, Final, TypeAlias
from zlib import crc32

from msgspec import Meta, Struct, field

Instant: TypeAlias = Annotated[float, Meta(ge=0, lt=253402300800)]
"""Seconds since the epoch, up to the end of the year 9999."""

RESULT_KIND = "command_result"
"""The kind of the entries that :meth:`Inbox.complete` puts into the outbox: the tag of a result's envelope."""


MAX_NUMBER: Final = 1 << 50
"""What is beyond this is damage: no number of an entry and no count of losses comes near it."""

LEAP: Final = 1 << 24
"""Numbers passed over where nothing may be known any more of some that were used: none is used for two messages."""


class Reason(StrEnum):
    """Why a message was given up. Of a dead letter's it is the part before the first colon."""

    REFUSED = "refused"
    EXPIRED = "expired"
    OVER_AGE = "over-age"
    EVICTED = "evicted"
    DAMAGED = "damaged"
    DROPPED = "dropped"
    UNKNOWN = "unknown"
    OTHER = "other"


class Lane(IntEnum):
    """Events are all kept and sent in order; of states only the latest of each key matters."""

    EVENT = 0
    STATE = 1


_LANE_BITS = 56


def first_seq(lane: int) -> int:
    """Return the number that every entry's ``seq`` of ``lane`` is greater than: the lane is its highest bits."""
    return lane << _LANE_BITS


def lane_of(seq: int) -> Lane:
    """Return the lane that the entry ``seq`` is in, also of a number that is none, as a damaged row may have."""
    return Lane.EVENT if seq < first_seq(Lane.STATE) else Lane.STATE


def runs(seqs: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of numbers without a gap: receipts come in the order of the entries."""
    first = last = None
    for seq in seqs:
        if last is not None and first is not None:
            if seq == last + 1:
                last = seq
                continue
            yield first, last
        first = last = seq
    if first is not None and last is not None:
        yield first, last


class Entry(Struct, frozen=True):
    """
    One message that waits to be sent.

    :ivar seq: its name in the outbox; grows with the order of acceptance within a lane, and is never used again.
    :ivar kind: what it is, for whoever sends it; the tag of its envelope.
    :ivar body: the bytes that will be sent.
    :ivar accepted_at: seconds since the epoch.
    :ivar expires_at: seconds since the epoch, or None when it never expires.
    :ivar key: what it is the state of; empty for an event.
    """

    seq: int
    lane: Lane
    kind: str
    id: str
    body: bytes
    accepted_at: float
    expires_at: float | None = None
    key: str = ""


class Gone(Struct, frozen=True):
    """An entry that was given up: its number, and the class of the reason."""

    seq: int
    reason: str


class Page(Struct, frozen=True):
    """
    Entries of a lane as they stand in the database.

    :ivar last: the greatest number looked at; ``complete`` says that there was nothing after it.
    """

    entries: list[Entry]
    last: int
    complete: bool
    damaged: list[Gone]


class DeadLetter(Struct, frozen=True):
    """A message that will not be sent any more, and why; its ``body`` may be damaged when the reason says so."""

    seq: int
    kind: str
    id: str
    key: str
    accepted_at: float
    died_at: float
    reason: str
    body: bytes


class Loss(Struct, frozen=True):
    """
    How many messages of a kind were given up for one reason, and when the first and the last of them were.

    :ivar first_at: seconds since the epoch, as is ``last_at``; bounded, since they may come from a damaged row.
    """

    reason: str
    kind: str
    count: Annotated[int, Meta(ge=1)]
    first_at: Instant
    last_at: Instant


class PendingLossReport(Struct, frozen=True):
    """What the backend has to be told in one report, until it has acknowledged this ``id``."""

    id: str
    losses: list[Loss]


class StoredCommand(Struct, frozen=True):
    """
    A command in the inbox.

    :ivar key: its name in the inbox; plain backends may give two commands one ``id``.
    :ivar digest: what tells two commands with one id apart; the caller makes it from the content.
    :ivar body: as accepted; empty when the row was found damaged.
    :ivar offered: whether the agent may have seen it.
    """

    key: int
    id: str
    digest: str
    body: bytes
    offered: bool
    accepted_at: float


class Accepted(Struct, frozen=True):
    """The command is in the inbox now."""

    command: StoredCommand


class Duplicate(Struct, frozen=True):
    """
    The same command was accepted before.

    :ivar finished: whether it has a result.
    :ivar status: that result's status, empty while there is none.
    :ivar result_id: that result's message id, empty while there is none.
    :ivar result_missing: the result was sent long ago and its body is no longer remembered, so that it could not be put
        into the outbox again: the caller may send a short one made of ``status``.
    """

    key: int
    finished: bool
    status: str = ""
    result_id: str = ""
    result_missing: bool = False


class Salvaged(Struct, frozen=True):
    """
    How much of a torn spool was taken over into the new one.

    :ivar commands: those without a result.
    :ivar finished: those with one.
    :ivar lost: messages and commands that could not be read, as far as they can be counted.
    :ivar uncounted: whether there may have been more of them: nothing that could be read says how many there were.
    """

    events: int = 0
    states: int = 0
    commands: int = 0
    finished: int = 0
    dead_letters: int = 0
    lost: int = 0
    uncounted: bool = False

    def __str__(self) -> str:
        lost = (
            f"at least {self.lost} unreadable (how many is not known)" if self.uncounted else f"{self.lost} unreadable"
        )
        return f"{self.events} events and {self.commands} commands recovered, {lost}"


class Opened(Struct, frozen=True):
    """
    What was found when the spool was opened.

    :ivar set_aside: the file name under which an unusable spool was put out of the way, or None.
    :ivar salvaged: what was taken over from it; None when nothing was, for it is not ours or too new.
    :ivar interrupted: commands that the agent may have begun and that have no result, in order of acceptance; damaged
        ones count as such, for they cannot be offered.
    :ivar waiting: commands that the agent never saw, in order of acceptance.
    """

    set_aside: str | None
    interrupted: tuple[StoredCommand, ...]
    waiting: tuple[StoredCommand, ...]
    salvaged: Salvaged | None = None


class OutboxStats(Struct):
    """
    What the outbox holds, as of the last commit. ``dropped`` counts since the spool object was made, by reason.

    :ivar oldest_event_at: when the oldest event still held was accepted, in seconds since the epoch; None without any.
    """

    events: int = 0
    event_bytes: int = 0
    states: int = 0
    dead_letters: int = 0
    oldest_event_at: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def entry_checksum(
    seq: int, kind: str, id: str, key: str, accepted_at: float, expires_at: float | None, body: bytes
) -> int:
    """Return the CRC-32 of an entry, its body included: SQLite itself does not notice a flipped bit in a payload."""
    return crc32(body, crc32(f"{seq}\n{kind}\n{id}\n{key}\n{accepted_at}\n{expires_at}".encode()))


def command_checksum(id: str, digest: str, body: bytes) -> int:
    """Return the CRC-32 of a command."""
    return crc32(body, crc32(f"{id}\n{digest}".encode()))
