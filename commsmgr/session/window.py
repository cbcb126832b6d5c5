"""
What is in flight: sent over one connection and not yet receipted, bounded by count and by bytes.

The bound is what keeps memory flat while a peer does not read, so one message larger than the whole window must still
pass: an empty window admits anything.
"""

from __future__ import annotations

from collections.abc import Iterable


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
        self._seqs: dict[str, int] = {}
        self._entries: dict[int, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The size of all that is in flight."""
        return self._bytes

    @property
    def room(self) -> tuple[int, int]:
        """How many messages and how many bytes still fit; neither is ever negative."""
        return max(self._max_messages - len(self._entries), 0), max(self._max_bytes - self._bytes, 0)

    def __contains__(self, seq: int) -> bool:
        """Whether the message with this number is in flight."""
        return seq in self._entries

    def admits(self, size: int) -> bool:
        """Return whether a message of ``size`` bytes may be sent now; always, when nothing is in flight."""
        if not self._entries:
            return True
        return len(self._entries) < self._max_messages and self._bytes + size <= self._max_bytes

    def add(self, seq: int, id: str, size: int) -> None:
        """
        Note that the message was sent. The caller has asked :meth:`admits`.

        :param seq: the outbox's number of the message.
        :param id: the message's id, by which a commsmgr.v1 backend acks it.
        :param size: bytes of its payload.
        :raise ValueError: ``seq`` or ``id`` is in flight already; a receipt could not tell the two apart.
        """
        if seq in self._entries or id in self._seqs:
            raise ValueError(f"message {id} (number {seq}) is in flight already")
        self._seqs[id] = seq
        self._entries[seq] = (id, size)
        self._bytes += size

    def seq_of(self, id: str) -> int | None:
        """Return the number of the message with ``id``, or None when it is not in flight."""
        return self._seqs.get(id)

    def settle(self, ids: Iterable[str]) -> list[int]:
        """Take the messages with these ids out; return their numbers. Ids that are not in flight are ignored."""
        settled = []
        for own_id in ids:
            seq = self._seqs.pop(own_id, None)
            if seq is not None:
                self._bytes -= self._entries.pop(seq)[1]
                settled.append(seq)
        return settled

    def settle_seqs(self, seqs: Iterable[int]) -> list[int]:
        """Take the messages with these numbers out; return those that were in flight, each once."""
        settled = []
        for seq in seqs:
            entry = self._entries.pop(seq, None)
            if entry is not None:
                own_id, size = entry
                del self._seqs[own_id]
                self._bytes -= size
                settled.append(seq)
        return settled

    def clear(self) -> int:
        """Forget everything, the connection being over; return how many messages ended without a receipt."""
        count = len(self._entries)
        self._seqs.clear()
        self._entries.clear()
        self._bytes = 0
        return count
