"""
One lane's entries over HTTP, one at a time: what an answer means for the entry, and when the next attempt may come.

A 2xx is the receipt. Some answers judge the entry itself, and it is given up; all others judge the way or the moment,
and the entry goes again later, with the same id as its ``Idempotency-Key``.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from commsmgr import config
from commsmgr.errors import BreakerOpen, CommsError, HTTPStatusError, ProxyRefused
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.backoff import full_jitter
from commsmgr.policy.retry import Permanent, Refused, judge
from commsmgr.requests import Requests, not_html
from commsmgr.spool import Entry, Reader, Reason
from commsmgr.transport.http import HTTPResponse

PATHS = {"command_result": "/commands/result", "inventory": "/inventory"}
"""Where each kind of entry goes over HTTP."""

_JUDGES_THE_ENTRY = (400, 404, 409, 410, 413, 414, 415, 422)
_BEFORE_MARKUP = b"\xef\xbb\xbf \t\r\n"


def _refusal(error: CommsError) -> str:
    """
    Return why the backend will never take this very entry, or nothing when it has not said so.

    A redirect, 403, 407 or 501 judges the way and not the entry, and so does any web page: they come from a portal, a
    proxy or a wrong URL, and must not turn a whole outbox into dead letters.
    """
    if not isinstance(error, HTTPStatusError) or error.status not in _JUDGES_THE_ENTRY:
        return ""
    # However a page begins (a doctype, a comment, a mere <head>), a backend's answer does not begin so.
    return "" if error.body.lstrip(_BEFORE_MARKUP).startswith(b"<") else f"HTTP {error.status}"


class Posting:
    """
    The way of one lane over HTTP.

    :param delivered: called with an entry and the answer that is its receipt.
    :param given_up: called with an entry and why the backend will never take it.
    """

    log = Logger()

    def __init__(
        self,
        reader: Reader,
        requests: Requests,
        *,
        whole: config.Config,
        clock: IReactorTime,
        random: Random,
        metrics: Metrics,
        delivered: Callable[[Entry, HTTPResponse], None],
        given_up: Callable[[Entry, str], None],
    ) -> None:
        self._reader = reader
        self._requests = requests
        self._reconnect = whole.reconnect
        self._refused_delay = whole.auth.refused_delay
        self._clock = clock
        self._random = random
        self._metrics = metrics
        self._delivered = delivered
        self._given_up = given_up
        self._failures = 0
        self._not_before = 0.0

    @property
    def wait(self) -> float:
        """Seconds until the next attempt may be made; not positive when it may be made now."""
        return self._not_before - self._clock.seconds()

    async def send_next(self) -> bool:
        """
        Send the next entry; cancelling aborts the exchange, and the entry stays in the outbox.

        :return: False when there is none.
        """
        entries = self._reader.take(1, 1)
        if not entries:
            return False
        entry = entries[0]
        path = PATHS.get(entry.kind)
        if path is None:
            # A newer version may have left it in the spool.
            self._given_up(entry, f"{Reason.UNKNOWN}: no way for a {entry.kind}")
            return True
        try:
            response = await self._requests.send(
                "POST", path, body=entry.body, idempotency_key=entry.id, attempts=1, check=not_html
            )
        except CommsError as error:
            if self._requests.proven and (reason := _refusal(error)):
                self._metrics.message(entry.kind, "out", "refused")
                self._given_up(entry, f"{Reason.REFUSED}: {reason}")
                # One poisoned entry costs little; a backend that refuses everything gets it slower and slower, so that
                # an operator can step in before the whole outbox is among the dead letters.
                self._back_off()
            else:
                self._failed(entry, error)
                self._reader.rewind()
            return True
        self._failures = 0
        self._metrics.message(entry.kind, "out", "acked")
        self._delivered(entry, response)
        return True

    def _failed(self, entry: Entry, error: CommsError) -> None:
        self._metrics.message(entry.kind, "out", "failed")
        floor = 0.0
        if isinstance(error, HTTPStatusError | ProxyRefused):
            # 401 after a fresh token: nothing but another token helps, so it is asked for slowly. A redirect and the
            # like: nothing but another URL does. What a proxy refuses, only who runs it, or the settings, can change.
            hopeless = isinstance(judge(error.status), Permanent | Refused)
            asked = min(error.retry_after or 0.0, self._reconnect.retry_after_cap)
            floor = max(self._refused_delay if hopeless else 0.0, asked)
        elif isinstance(error, BreakerOpen):
            floor = error.retry_in
        wait = self._back_off(floor)
        self.log.info(
            "{kind} {message_id} not delivered over HTTP: {error}; again in {wait:.1f} s",
            event="delivery.retry",
            kind=entry.kind,
            message_id=entry.id,
            error=str(error),
            wait=wait,
        )

    def _back_off(self, floor: float = 0.0) -> float:
        """Let the lane wait before its next attempt over HTTP; return how many seconds."""
        pace = self._reconnect
        wait = full_jitter(self._failures, base=pace.base, cap=pace.cap, random=self._random, floor=floor)
        self._failures += 1
        self._not_before = self._clock.seconds() + wait
        return wait
