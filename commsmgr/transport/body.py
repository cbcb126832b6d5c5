"""Bodies of requests and answers, both without Twisted's global cooperator and both bounded."""

from __future__ import annotations

import zlib
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from commsmgr.errors import PeerViolation

CHUNK: Final = 1 << 16
"""Bytes of a body that are written at a time."""

_SLICE: Final = 1 << 18

PIECES: Final = 10_000
"""Pieces of a body, chunks or packets, however small they are; each costs the same work whatever is in it."""

PIECE: Final = 512
"""Bytes that the others must have on average."""


async def gzipped(clock: IReactorTime, body: bytes) -> bytes:
    """Return ``body`` in gzip form, compressed in slices of some milliseconds so that the reactor goes on meanwhile."""
    packer = zlib.compressobj(wbits=31)
    parts = []
    for start in range(0, len(body), _SLICE):
        if start:
            await deferLater(clock, 0)
        parts.append(packer.compress(body[start : start + _SLICE]))
    return b"".join([*parts, packer.flush()])


@implementer(IBodyProducer)
class BytesProducer:
    """
    Writes ``body`` as fast as the transport takes it.

    A push producer that needs no clock: it writes until it is paused, and goes on when it is resumed.

    :ivar written: bytes handed to the transport.
    """

    def __init__(self, body: bytes) -> None:
        self.length = len(body)
        self._body = body
        self.written = 0
        self._paused = False
        self._consumer: IConsumer | None = None
        self._done: Deferred[None] = Deferred(lambda _: self.stopProducing())

    @property
    def complete(self) -> bool:
        """Whether all has been handed to the transport."""
        return self.written >= self.length

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """The connection is there: write."""
        self._consumer = consumer
        self._write()
        return self._done

    def resumeProducing(self) -> None:
        """The transport has room again."""
        self._paused = False
        self._write()

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._paused = True

    def stopProducing(self) -> None:
        """The connection is gone, or the request was cancelled."""
        self._consumer = None

    def _write(self) -> None:
        while self._consumer is not None and not self._paused:
            start = self.written
            self.written = min(start + CHUNK, self.length)
            self._consumer.write(self._body[start : self.written])
            if self.complete and self._consumer is not None:
                self._consumer = None
                self._done.callback(None)


class BodyCollector(Protocol):
    """
    Takes the body of an answer.

    :param limit: bytes; more fails at once, whatever follows is dropped.
    :ivar body: fires with the body; fails with :class:`~commsmgr.errors.PeerViolation` when it is too large, comes in
        too many pieces, or its end cannot be known (RFC 9112 section 8), or with what ended the connection.
    :ivar received: bytes that came.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Not a list of the pieces: the smaller they are, the more memory each takes beside its own.
        self._content = bytearray()
        self._pieces = 0
        self.received = 0
        self.body: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        """A part of the body came."""
        self.received += len(data)
        if self.body.called:
            return
        self._pieces += 1
        if self.received > self._limit:
            self._refuse(too_large(self._limit))
        elif self._pieces > PIECES + self.received // PIECE:
            self._refuse(PeerViolation("the answer comes in too many small pieces", may_have_arrived=True))
        else:
            self._content += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body is complete, or will never be."""
        if self.body.called:
            return
        error: Any = reason.value
        if isinstance(error, ResponseDone):
            self.body.callback(bytes(self._content))
        elif isinstance(error, PotentialDataLoss):
            self.body.errback(
                PeerViolation(
                    "the answer has neither Content-Length nor chunks, so nobody knows whether it is whole",
                    may_have_arrived=True,
                )
            )
        else:
            self.body.errback(reason)

    def _refuse(self, error: PeerViolation) -> None:
        self._content.clear()
        self.body.errback(error)


def too_large(limit: int) -> PeerViolation:
    """Return the error for an answer beyond ``limit`` bytes."""
    return PeerViolation(f"the answer is larger than http.max_response_bytes, {limit}", may_have_arrived=True)
