"""
Keeps a token that costs something to get, and gets the next one before it ends.

Theory of operation. A token whose end is known is renewed at a random moment in the last part of its life, so that not
all agents of a fleet ask at once; until the next one is there, everybody gets the present one. One fetch is under way
at a time, and all who ask share it. After a fetch that failed, and after one that brought the very token that had just
been refused, the next one waits: whoever asks for a token meanwhile gets the present one, or the failure.

How long a token lives is measured when it comes, and from then on by the clock that nobody sets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf
from random import Random
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.bearer import Token
from commsmgr.errors import TokenError
from commsmgr.policy.backoff import full_jitter
from commsmgr.waiters import Overrun, Waiters, bounded

T = TypeVar("T")

RENEW_FROM, RENEW_UNTIL = 0.7, 0.9
"""Shares of a token's life between which it is renewed."""

SHORTEST_LIFE = 1.0
"""Seconds for which a token is kept at least."""

LIFE_OF_THE_DEAD = 30.0
"""
Seconds for which one is kept that has ended already when it comes: where the machine's clock is ahead all of them seem
to, and the backend takes them all the same.
"""

RETRY_BASE, RETRY_CAP = 2.0, 120.0
"""Bounds of the wait after a fetch that brought nothing, in seconds: half of it is fixed, half is random."""


class Renewal:
    """
    A token provider that keeps what ``fetch`` brings.

    :param fetch: gets a new token; what it returns is cancelled when its time is over, and at :meth:`stop`.
    :param keep: whether a token whose end nobody knows is kept until it is refused; else it is used once.
    :param timeout: seconds for one fetch.
    :param clock: for waits and for the life of tokens.
    :param wall: seconds since the epoch, in which the end of a token is given.
    """

    _log = Logger()

    def __init__(
        self,
        fetch: Callable[[], Awaitable[Token]],
        *,
        keep: bool,
        timeout: float,
        clock: IReactorTime,
        wall: Callable[[], float],
        random: Random,
    ) -> None:
        self._fetch = fetch
        self._keep = keep
        self._timeout = timeout
        self._clock = clock
        self._wall = wall
        self._random = random
        self._token: Token | None = None
        self._refused = ""
        self._good_until = self._renew_at = self._not_before = -inf
        self._in_vain = 0
        self._failure: str | None = None
        # The fetch with its deadline, and without: it may take a moment to end when it has been cancelled.
        self._fetching: Deferred[Token] | None = None
        self._ended: Deferred[Token] = Deferred()
        self._waiters: Waiters[Token] = Waiters()

    def get(self) -> Deferred[Token]:
        """
        Return the token.

        Cancelling stops the waiting; the fetch goes on for others. Errors: :class:`TokenError` when there is no token
        that is still good and none could be fetched.
        """
        self._fetch_if_due()
        if self._token is not None and self._clock.seconds() < self._good_until:
            return succeed(self._token)
        if self._fetching is not None:
            return self._waiters.wait()
        if self._failure is not None:
            return fail(TokenError(self._failure))
        # Fetched just now, to be used once; or refused, and no newer one is to be had yet.
        assert self._token is not None
        return succeed(self._token)

    def refused(self, token: str) -> None:
        """Have the next :meth:`get` fetch a newer one, unless there is one already, or that was just tried."""
        if self._token is not None and token == self._token.value:
            self._refused = token
            self._good_until = self._renew_at = -inf

    def look(self) -> None:
        """Renew the token if it is time; called now and then, so that this does not wait for somebody to use it."""
        if self._renew_at > -inf:
            self._fetch_if_due()

    async def stop(self, deadline: float) -> None:
        """
        Cancel what is under way; whoever waits for it gets a :class:`TokenError`.

        :param deadline: seconds to wait for its end.
        """
        if self._fetching is None:
            return
        over: Deferred[None] = Deferred()

        def ended(outcome: T) -> T:
            over.callback(None)
            return outcome

        self._ended.addBoth(ended)
        self._fetching.cancel()
        with suppress(Overrun):
            await bounded(over, deadline, self._clock)

    def _fetch_if_due(self) -> None:
        now = self._clock.seconds()
        if self._fetching is None and now >= self._renew_at and now >= self._not_before:
            self._ended = Deferred.fromCoroutine(self._fetched())
            self._fetching = bounded(self._ended, self._timeout, self._clock)
            self._fetching.addCallbacks(self._got, self._failed)

    async def _fetched(self) -> Token:
        return await self._fetch()

    def _got(self, token: Token) -> None:
        now = self._clock.seconds()
        self._fetching, self._failure = None, None
        if token.value != self._refused:
            self._in_vain = 0
            self._not_before = -inf
        elif self._keep or token.expires_at is not None:
            # No newer one is to be had yet.
            self._put_off(now)
        self._refused = ""
        self._token = token
        if token.expires_at is None:
            self._good_until = self._renew_at = inf if self._keep else -inf
        else:
            left = token.expires_at - self._wall()
            life = max(left, SHORTEST_LIFE) if left > 0 else LIFE_OF_THE_DEAD
            self._good_until = now + life
            self._renew_at = now + life * self._random.uniform(RENEW_FROM, RENEW_UNTIL)
        self._waiters.fire(token)

    def _failed(self, failure: Failure) -> None:
        now = self._clock.seconds()
        self._fetching = None
        match failure.value:
            case TokenError(fact=fact):
                self._failure = fact
            case Overrun():
                self._failure = f"no token came within {self._timeout:g} s"
            case CancelledError():
                self._failure = "the token is no longer waited for"
            case error:
                # Not its text, which could show a secret.
                self._failure = f"the token provider failed: {type(error).__name__}"
        self._put_off(now)
        if now < self._good_until:
            self._log.warn(
                "the token could not be renewed: {reason}; the present one is good for {left:.0f} s more, and the next "
                "try is due in {wait:.0f} s",
                event="token.renewal-failed",
                reason=self._failure,
                left=self._good_until - now,
                wait=self._not_before - now,
            )
        self._waiters.fail(TokenError(self._failure))

    def _put_off(self, now: float) -> None:
        bound = min(RETRY_CAP, RETRY_BASE * 2.0 ** min(self._in_vain, 10))
        self._not_before = now + full_jitter(0, base=bound / 2, cap=bound / 2, floor=bound / 2, random=self._random)
        self._in_vain += 1
