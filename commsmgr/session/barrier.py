"""
Receipts from a peer that gives none: a ping after the messages, and its pong is the receipt.

Theory of operation. A WebSocket peer handles frames in order, so a pong for a ping that was sent after a message proves
that the peer's WebSocket layer read that message. How much more it proves depends on the peer: some have run the
application's handler by then, some have only queued the message for it. One ping serves for all messages since the
last.

A ping's payload is the connection's nonce and a counter (RFC 6455 section 5.5.2: at most 125 bytes). A peer may answer
only the latest of several pings (section 5.5.3), so a pong receipts its own ping and all before. Pongs that bear
anything else (unsolicited ones are allowed, and proxies make some) are strays and prove nothing, nor does a second pong
for the same ping. Keep-alive pings share the counter: each of them is a barrier too.

What has no pong when the connection ends has no receipt; it is sent again on the next connection, which has a barrier
and a nonce of its own, so that no pong can count for the wrong connection.
"""

from __future__ import annotations

_COUNTER_BYTES = 8
_MAX_PAYLOAD = 125


class Barrier:
    """
    One connection's receipts by ping and pong.

    :param nonce: random bytes of this connection, 1 to 117.
    :param every_messages: a ping is due after this many messages.
    :param every_bytes: or after this many bytes of messages.
    :raise ValueError: the nonce is empty or leaves no room for the counter.
    """

    def __init__(self, nonce: bytes, *, every_messages: int = 100, every_bytes: int = 65536) -> None:
        if not 0 < len(nonce) <= _MAX_PAYLOAD - _COUNTER_BYTES:
            raise ValueError(f"the nonce must have 1 to {_MAX_PAYLOAD - _COUNTER_BYTES} bytes, not {len(nonce)}")
        self._nonce = nonce
        self._every_messages = every_messages
        self._every_bytes = every_bytes
        self._last_ping = 0
        self._unpinged: list[str] = []
        self._unpinged_bytes = 0
        # Few; and an empty deque would be the largest part of a link that is idle.
        self._batches: list[tuple[int, list[str]]] = []

    @property
    def oldest_unanswered(self) -> int | None:
        """
        The counter of the oldest ping that has no pong, or None.

        Counters grow by one with each ping and never repeat: when this is the same as some time ago, nothing was
        receipted in that time.
        """
        return self._batches[0][0] if self._batches else None

    def sent(self, id: str, size: int) -> bytes | None:
        """
        Note that a message was sent.

        :param id: the message's.
        :param size: bytes of its payload.
        :return: the payload of a ping to send right after it, or None while the batch is not full.
        """
        self._unpinged.append(id)
        self._unpinged_bytes += size
        if len(self._unpinged) >= self._every_messages or self._unpinged_bytes >= self._every_bytes:
            return self.probe()
        return None

    def flush(self) -> bytes | None:
        """Return the payload of a ping for what was sent since the last one, None if nothing was."""
        return self.probe() if self._unpinged else None

    def probe(self) -> bytes:
        """Return the payload of a ping in any case, for the keep-alive; it covers what was sent before, if anything."""
        self._last_ping += 1
        self._batches.append((self._last_ping, self._unpinged))
        self._unpinged = []
        self._unpinged_bytes = 0
        return self._nonce + self._last_ping.to_bytes(_COUNTER_BYTES, "big")

    def pong(self, payload: bytes) -> list[str] | None:
        """
        Take a pong.

        :return: the ids of the messages that it receipts, in the order sent, empty for a ping that covered none;
            None for a stray, which proves nothing.
        """
        nonce, counter = payload[:-_COUNTER_BYTES], int.from_bytes(payload[-_COUNTER_BYTES:], "big")
        if nonce != self._nonce or not self._batches or not self._batches[0][0] <= counter <= self._last_ping:
            return None
        receipted: list[str] = []
        while self._batches and self._batches[0][0] <= counter:
            receipted += self._batches.pop(0)[1]
        return receipted
