"""
HTTP requests with everything around them: a backend that may be tried, a token, retries within a budget, one deadline.

Theory of operation. One request is a few attempts. Each attempt takes a permit of a breaker, a token,
one exchange, and gives the verdict of :mod:`commsmgr.policy.retry` back to both. All attempts bear the same
``Idempotency-Key``, so an attempt whose answer was lost may be repeated: a backend that saw it answers again and does
nothing. The deadline lies over all of it, the waits included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.auth.authorization import HTTP, Authorization
from commsmgr.backends import Backends, Line
from commsmgr.errors import (
    BreakerOpen,
    CommsError,
    DeadlineExceeded,
    HTTPStatusError,
    NotRunning,
    PeerViolation,
    ProxyRefused,
    TokenError,
    TransportError,
)
from commsmgr.policy.backoff import full_jitter
from commsmgr.policy.budget import RetryBudget
from commsmgr.policy.retry import (
    Done,
    Permanent,
    Refused,
    RetryAfter,
    Verdict,
    counts_against_backend,
    judge,
    parse_retry_after,
)
from commsmgr.policy.tokens import Route
from commsmgr.transport.http import HTTPResponse

_SHOWN_BODY = 1024


class _Request(NamedTuple):
    """What stays the same from attempt to attempt."""

    method: str
    path: str
    body: bytes
    content_type: str
    headers: Mapping[str, str]
    idempotency_key: str
    check: Callable[[HTTPResponse], object] | None


def not_html(response: HTTPResponse) -> None:
    """
    Refuse an answer in HTML: it comes from a captive portal or a proxy, and no backend has read what was sent.

    :raise PeerViolation: the answer says that it is HTML.
    """
    if _is_html(response):
        raise PeerViolation(
            f"the answer (HTTP {response.status}) is a web page, not a backend's: is there a portal between?"
        )


def _is_html(response: HTTPResponse) -> bool:
    return "html" in response.headers.get("content-type", "").lower()


class Requests:
    """
    Sends HTTP requests to whichever backend can take them.

    :param wall: seconds since the epoch, for dates in Retry-After.
    """

    log = Logger()

    def __init__(
        self,
        backends: Backends,
        whole: config.Config,
        authorization: Authorization,
        *,
        clock: IReactorTime,
        wall: Callable[[], float],
        random: Random,
    ) -> None:
        self._backends = backends
        self._http = whole.http
        self._reconnect = whole.reconnect
        self._authorization = authorization
        self._clock = clock
        self._wall = wall
        self._random = random
        self._budget = RetryBudget(ratio=0.5)
        self._sending: dict[Deferred[HTTPResponse], None] = {}  # in order, which a set has not
        self._is_stopped = False

    def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        idempotency_key: str = "",
        deadline: float | None = None,
        attempts: int | None = None,
        check: Callable[[HTTPResponse], object] | None = None,
    ) -> Deferred[HTTPResponse]:
        """
        Send one request, with retries.

        :param path: below the backend's base URL, beginning with a slash.
        :param idempotency_key: the same for every attempt; empty for methods that are idempotent by themselves.
        :param deadline: seconds for everything together; by default what all attempts and waits can take.
        :param attempts: how often to try; ``http.attempts`` by default.
        :param check: looks at a 2xx response and raises :class:`~commsmgr.errors.PeerViolation` when it cannot come
            from the backend, but from a captive portal, say; that attempt has then failed.
        :return: fires with a 2xx response. Cancelling aborts the exchange under way; the request may have arrived.
        :raise HTTPStatusError: any other answer: at once when it is permanent, else after the last attempt.
        :raise TransportError: no answer; the last attempt's error.
        :raise TokenError: no token could be had.
        :raise DeadlineExceeded: the time was up; it says whether the request may have arrived.
        :raise NotRunning: the manager was stopped meanwhile; the request may have arrived.
        """
        fields = dict(headers or {})
        if idempotency_key:
            fields["Idempotency-Key"] = idempotency_key
        request = _Request(method, path, body, content_type, fields, idempotency_key, check)
        ends = None if deadline is None else self._clock.seconds() + deadline
        sending = Deferred.fromCoroutine(self._send(request, max(attempts or self._http.attempts, 1), ends))
        if not sending.called:
            self._sending[sending] = None
            sending.addBoth(self._sent, sending)
        return sending

    def stop(self) -> None:
        """End every wait: whoever still waits for an answer is told that the manager was stopped."""
        self._is_stopped = True
        for sending in list(self._sending):
            sending.cancel()

    def _sent(self, outcome: HTTPResponse | Failure, sending: Deferred[HTTPResponse]) -> HTTPResponse | Failure:
        self._sending.pop(sending, None)
        if self._is_stopped and isinstance(outcome, Failure) and outcome.check(CancelledError):
            raise NotRunning("the manager was stopped; the request may have arrived")
        return outcome

    @property
    def proven(self) -> bool:
        """Whether any backend has ever taken something; before that, its answers may be those of a wrong URL."""
        return any(line.last_receipt for line in self._backends.lines)

    async def _send(self, request: _Request, attempts: int, ends: float | None) -> HTTPResponse:
        arrived = False
        refusal: CommsError | None = None
        attempt = 0
        while True:
            error: CommsError | None
            floor = 0.0
            # Before a permit is taken: the time may be over, and a permit that nobody gives back blocks the backend.
            left = self._left(ends, arrived)
            try:
                # After a refusal the same backend again, with the newer token that was asked for.
                line = self._backends.for_request(self._refuses) if refusal is None else self._backends.for_request()
                verdict, response, error = await self._attempt(line, request, left, retried=attempts > 1)
            except BreakerOpen as all_open:
                verdict, response, error = RetryAfter(all_open.retry_in), None, all_open
            except TokenError as unusable:
                # There may be no other token than the one that was just refused: then the refusal is the answer.
                raise (unusable if refusal is None else refusal) from None
            if response is not None and isinstance(verdict, Done):
                return response
            assert error is not None
            match verdict:
                case Permanent():
                    raise error
                case Refused():
                    # Once more with a token that the provider has been asked to renew; a second 401 is the answer.
                    if refusal is not None:
                        raise error
                    refusal = error
                    continue
                case RetryAfter(floor):
                    arrived = arrived or getattr(error, "may_have_arrived", False)
            attempt += 1
            if attempt >= attempts or not (isinstance(error, BreakerOpen) or self._budget.allows_retry()):
                raise error
            wait = full_jitter(
                attempt - 1, base=self._reconnect.base, cap=self._reconnect.cap, random=self._random, floor=floor
            )
            self.log.debug(
                "{method} {path}: {error}; attempt {attempt} of {attempts} in {wait:.2f} s",
                event="http.retry",
                method=request.method,
                path=request.path,
                error=str(error),
                attempt=attempt + 1,
                attempts=attempts,
                wait=wait,
                message_id=request.idempotency_key,
            )
            left = self._left(ends, arrived)
            if left is not None and wait >= left:
                raise DeadlineExceeded(
                    f"{request.method} {request.path} cannot succeed before its deadline; the last error: {error}",
                    may_have_arrived=arrived,
                ) from error
            await deferLater(self._clock, wait)

    def _refuses(self, line: Line) -> bool:
        return self._authorization.holds(Route(line.name, HTTP))

    def _left(self, ends: float | None, arrived: bool) -> float | None:
        if ends is None:
            return None
        left = ends - self._clock.seconds()
        if left <= 0:
            raise DeadlineExceeded("the time for the request ran out", may_have_arrived=arrived)
        return left

    async def _attempt(
        self, line: Line, request: _Request, left: float | None, *, retried: bool
    ) -> tuple[Verdict, HTTPResponse | None, CommsError | None]:
        """One exchange, its verdict, and its accounting with breaker and budget; the error unless it is done."""
        settled = False
        try:
            route = Route(line.name, HTTP)
            token = await self._authorization.get(route)
            response: HTTPResponse | None = None
            outcome: int | CommsError
            error: CommsError | None = None
            wanted: float | None = None
            try:
                response = await line.http.exchange(
                    request.method,
                    line.http_target,
                    request.path,
                    body=request.body,
                    content_type=request.content_type,
                    headers=request.headers,
                    token=token.value,
                    timeout=self._http.timeout if left is None else min(self._http.timeout, left),
                )
                if request.check is not None and 200 <= response.status < 300:
                    request.check(response)
            except (TransportError, DeadlineExceeded) as failed:
                outcome, error = failed, failed
                asked = failed.retry_after if isinstance(failed, ProxyRefused) else None
                wanted = None if asked is None else min(asked, self._reconnect.retry_after_cap)
            else:
                outcome = response.status
                if (asked_for := response.headers.get("retry-after")) is not None:
                    wanted = parse_retry_after(asked_for, self._wall(), self._reconnect.retry_after_cap)
            verdict = judge(outcome, retry_after=wanted)
            if response is not None and error is None and not isinstance(verdict, Done):
                error = HTTPStatusError(
                    f"{request.method} {request.path} at {line.name}: HTTP {response.status}",
                    status=response.status,
                    body=response.body[:_SHOWN_BODY],
                    retry_after=wanted,
                )
            settled = True
            self._account(line, outcome, verdict, retried=retried)
            if isinstance(verdict, Refused):
                self._authorization.refused(route, token)
            elif isinstance(verdict, Done) and response is not None and not _is_html(response):
                # A portal's web page would say nothing about the token.
                self._authorization.accepted(route, token)
            return verdict, response, error
        finally:
            if not settled:
                line.breaker.released()

    def _account(self, line: Line, outcome: int | CommsError, verdict: Verdict, *, retried: bool) -> None:
        done = isinstance(verdict, Done)
        self._backends.answered(
            line, works=not counts_against_backend(outcome), receipt_at=self._wall() if done else None
        )
        match verdict:
            case Done():
                self._budget.succeeded()
            case RetryAfter() if retried:
                # Who tries once only, as delivery does, keeps a pace of its own.
                self._budget.failed()
