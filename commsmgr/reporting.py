"""
Results on their way into the spool.

A result closes its command, in one transaction with its own acceptance; or it says something without closing any: of a
command that was refused, or that was finished long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.errors import CommsError, QueueFull, SpoolWriteFailed
from commsmgr.messages import Result
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.results import encode_result
from commsmgr.spool import RESULT_KIND, Lane, Spool

LONG = 256 << 10
"""Characters of text from which on a result is encoded in a thread."""

AGAIN = 1.0
"""Seconds between attempts to store a result for which the spool has no room."""


class Reporting:
    """
    Encodes results and stores them.

    :param timestamp: the time now as RFC 3339.
    :param settings: how large a body and its texts may be.
    :param redact: takes secrets out of a text.
    :param in_thread: runs a function in a thread, since that takes a while for a long text.
    :param accepted: called, once per batch of the spool, with how many results were stored and the bytes of their
        bodies.
    """

    log = Logger()

    def __init__(
        self,
        spool: Spool,
        *,
        new_id: Callable[[], str],
        timestamp: Callable[[], str],
        settings: config.Delivery,
        redact: Callable[[str], str],
        in_thread: Callable[[Callable[[], tuple[bytes, int]]], Deferred[tuple[bytes, int]]],
        accepted: Callable[[int, int], None],
        clock: IReactorTime,
        metrics: Metrics,
    ) -> None:
        self._spool = spool
        self._new_id = new_id
        self._timestamp = timestamp
        self._settings = settings
        self._redact = redact
        self._in_thread = in_thread
        self._on_accepted = accepted
        self._metrics = metrics
        self._clock = clock
        self._throttle = LogThrottle(clock.seconds)
        self._aside: dict[Deferred[object], None] = {}  # in order, which a set has not

    def report(self, result: Result, *, ttl: float | None = None) -> Deferred[str]:
        """Store a result and close its command; fires with the message's id, and fails as the spool does."""
        if _is_long(result):
            return Deferred.fromCoroutine(self._report_long(result, ttl))
        message_id = self._new_id()
        try:
            body, left_out = self._encode(result, message_id, self._timestamp())
        except Exception:
            return fail()
        return self._complete(result, message_id, body, left_out, ttl)

    async def _report_long(self, result: Result, ttl: float | None) -> str:
        message_id = self._new_id()
        body, left_out = await self._in_thread(partial(self._encode, result, message_id, self._timestamp()))
        return await self._complete(result, message_id, body, left_out, ttl)

    def _complete(
        self, result: Result, message_id: str, body: bytes, left_out: int, ttl: float | None
    ) -> Deferred[str]:
        stored = self._spool.inbox.complete(
            key=result.key, command_id=result.command_id, status=result.status, result_id=message_id, body=body, ttl=ttl
        )
        return stored.addCallback(self._truncated) if left_out else stored

    async def insist(self, result: Result) -> str:
        """As :meth:`report`, but wait for room, and for a disk that works, however long it takes."""
        while True:
            try:
                return await self.report(result)
            except (QueueFull, SpoolWriteFailed) as error:
                suppressed = self._throttle.allow(type(error).__name__)
                if suppressed is not None:
                    self.log.warn(
                        "the result of {message_id} waits: {error} ({suppressed} more before)",
                        event="command.result-waits",
                        message_id=result.command_id,
                        error=str(error),
                        suppressed=suppressed,
                    )
                await deferLater(self._clock, AGAIN)

    async def say(self, result: Result) -> None:
        """Store a result that closes no command."""
        message_id = self._new_id()
        encode = partial(self._encode, result, message_id, self._timestamp())
        body, left_out = await self._in_thread(encode) if _is_long(result) else encode()
        await self._spool.outbox.put(lane=Lane.EVENT, kind=RESULT_KIND, id=message_id, body=body)
        self.accepted(1, len(body))
        if left_out:
            self._truncated(message_id)

    def aside(self, storing: Coroutine[Any, Any, object], result: Result) -> None:
        """Do ``storing``, one of the above for ``result``, without anybody waiting; what it raises is logged."""
        deferred: Deferred[object] = Deferred.fromCoroutine(storing)
        if not deferred.called:
            self._aside[deferred] = None
        deferred.addBoth(self._done, deferred).addErrback(self._not_reported, result)

    def stop(self) -> None:
        """Insist no longer. A command whose result was not stored is reported as interrupted after the next start."""
        for deferred in list(self._aside):
            deferred.cancel()

    def accepted(self, count: int, size: int) -> None:
        """Take note of ``count`` results of ``size`` bytes together that the spool has now."""
        self._on_accepted(count, size)
        self._metrics.message("command_result", "out", "accepted", count)

    def _done(self, outcome: object, deferred: Deferred[object]) -> object:
        self._aside.pop(deferred, None)
        return outcome

    def _encode(self, result: Result, message_id: str, timestamp: str) -> tuple[bytes, int]:
        """Encode ``result``; in any thread."""
        return encode_result(
            result,
            message_id=message_id,
            timestamp=timestamp,
            limit=self._settings.max_body_bytes,
            max_output=self._settings.max_output_bytes,
            redact=self._redact,
        )

    def _truncated(self, message_id: str) -> str:
        self._metrics.message("command_result", "out", "truncated")
        return message_id

    def _not_reported(self, failure: Failure, result: Result) -> None:
        if failure.check(CancelledError):
            return
        failure.trap(CommsError)
        self.log.warn(
            "the {status} of {message_id} could not be reported: {error}",
            event="command.not-reported",
            status=result.status,
            message_id=result.command_id,
            error=str(failure.value),
        )


def _is_long(result: Result) -> bool:
    """Say whether to encode ``result`` takes so long that it is not done in the reactor's thread."""
    if not isinstance(result, Result):
        return False  # encoding it tells what is wrong
    output, error = result.output, result.error
    return (len(output) if isinstance(output, str) else 0) + (len(error) if isinstance(error, str) else 0) > LONG
