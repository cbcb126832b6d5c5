"""
What is in flight: sent over one connection and not yet receipted, bounded by count and by bytes.

The bound is what keeps memory flat while a peer does not read, so one message larger than the whole window must still
pass: an empty window admits anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Protocol


class Sendable(Protocol):
    """
    What the window needs to know of a message.

    :ivar seq: the outbox's number of it.
    :ivar id: what a receipt calls it.
    :ivar body: what takes room.
    """

    @property
    def seq(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def body(self) -> bytes: ...


class Window:
    """
    One connection's messages in flight.

    :param max_messages: how many there may be.
    :param max_bytes: how many bytes they may have together; a single larger one passes alone.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The size of all that is in flight; the simulation holds it against the bound."""
        return self._bytes

    @property
    def room(self) -> tuple[int, int]:
        """How many messages and how many bytes still fit; neither is ever negative."""
        return max(self._max_messages - len(self._entries), 0), max(self._max_bytes - self._bytes, 0)

    @property
    def ids(self) -> Set[str]:
        """The ids of what is in flight."""
        return self._entries.keys()

    def admits(self, size: int) -> bool:
        """Return whether a message of ``size`` bytes may be sent now; always, when nothing is in flight."""
        if not self._entries:
            return True
        return len(self._entries) < self._max_messages and self._bytes + size <= self._max_bytes

    def add(self, messages: Sequence[Sendable]) -> None:
        """
        Note that messages were sent. The caller has asked :meth:`admits`.

        :raise ValueError: two of them have one id, or one's is in flight already; a receipt could not tell them apart.
        """
        added = {message.id: (message.seq, len(message.body)) for message in messages}
        if len(added) < len(messages) or not self._entries.keys().isdisjoint(added):
            raise ValueError(f"of {', '.join(message.id for message in messages)} one is in flight already")
        self._entries.update(added)
        self._bytes += sum(size for _, size in added.values())

    def settle(self, ids: Iterable[str]) -> list[int]:
        """Take the messages with these ids out; return their numbers. Ids that are not in flight are ignored."""
        settled = []
        for own_id in ids:
            entry = self._entries.pop(own_id, None)
            if entry is not None:
                seq, size = entry
                self._bytes -= size
                settled.append(seq)
        return settled

    def clear(self) -> int:
        """Forget everything, the connection being over; return how many messages ended without a receipt."""
        count = len(self._entries)
        self._entries.clear()
        self._bytes = 0
        return count
