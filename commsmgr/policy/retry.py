"""
What to do after an HTTP exchange: is it done, worth another attempt, a matter of the token, or hopeless?

===============================================  ==============  =====================================================
outcome                                          verdict         why
===============================================  ==============  =====================================================
2xx                                              ``Done``
401                                              ``Refused``     the token: fetch a newer one, then a slow path
408, 425, 429                                    ``RetryAfter``  the backend itself says: not now (RFC 9110, 8470, 6585)
501, 505                                         ``Permanent``   the backend will not learn it while we wait
other 5xx                                        ``RetryAfter``
a number that is no status                       ``RetryAfter``  counts as 5xx (RFC 9110 section 15)
1xx, 3xx, other 4xx                              ``Permanent``   a redirect is never followed: the token would travel
an error that bears a status                     by its status
a proxy that opens no way to the backend         by its status, but 401 is ``Permanent``: it is not about our token
another error                                    ``RetryAfter`` if it is ``retryable``, else ``Permanent``
===============================================  ==============  =====================================================
"""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final, TypeAlias

from msgspec import Struct

from commsmgr.errors import (
    BreakerOpen,
    ClosedByPeer,
    CommsError,
    DeadlineExceeded,
    HTTPStatusError,
    ProxyRefused,
    TransportError,
    UpgradeRefused,
)


class Done(Struct, frozen=True):
    """The backend took it."""


class RetryAfter(Struct, frozen=True):
    """Another attempt can help, at least ``floor`` seconds from now; the backoff comes on top."""

    floor: float = 0.0


class Refused(Struct, frozen=True):
    """The backend refused the token (401): another attempt can help with another token only."""


class Permanent(Struct, frozen=True):
    """The same thing will never succeed; ``reason`` is for the dead letter and the log."""

    reason: str


Verdict: TypeAlias = Done | RetryAfter | Refused | Permanent

_RETRIED_4XX: Final = (408, 425, 429)
_PERMANENT_5XX: Final = (501, 505)

# Close codes by which a backend says, or an abnormal end shows, that the trouble is on its side (RFC 6455 section
# 7.4.1, IANA registry): no close frame, internal error, try again later, bad gateway, TLS.
_TROUBLE_CODES: Final = (1006, 1011, 1013, 1014, 1015)

_SECONDS: Final = re.compile(r"-?[0-9]+")


def judge(outcome: int | CommsError, *, retry_after: float | None = None) -> Verdict:
    """
    Say what to do after an exchange.

    :param outcome: the HTTP status code of the answer, or why there is none.
    :param retry_after: seconds that the answer asked to wait, already capped (:func:`parse_retry_after`).
    """
    match outcome:
        case int():
            return _judge_status(outcome, retry_after or 0.0)
        case HTTPStatusError(status=status, retry_after=asked):
            return _judge_status(status, retry_after or asked or 0.0)
        case ProxyRefused(status=status, retry_after=asked):
            verdict = _judge_status(status, retry_after or asked or 0.0)
            return verdict if isinstance(verdict, RetryAfter) else Permanent(outcome.fact)
        case BreakerOpen(retry_in=seconds):
            return RetryAfter(seconds)
    return RetryAfter(retry_after or 0.0) if outcome.retryable else Permanent(outcome.fact)


def _judge_status(status: int, floor: float) -> Verdict:
    if 200 <= status < 300:
        return Done()
    if status == 401:
        return Refused()
    if status in _RETRIED_4XX or (not 100 <= status < 500 and status not in _PERMANENT_5XX):
        return RetryAfter(floor)
    if 300 <= status < 400:
        return Permanent(f"HTTP {status}: redirects are not followed; set the backend's final url")
    return Permanent(f"HTTP {status}")


def counts_against_backend(outcome: int | CommsError) -> bool:
    """
    Say whether the breaker should take ``outcome`` for a failure of the backend.

    A backend that answers 4xx works: it is the caller who is wrong, or (429) too eager. One that answers 5xx, cannot
    be reached or trusted, breaks off, or lets a deadline pass does not.
    """
    match outcome:
        case int():
            return not 100 <= outcome < 500
        case HTTPStatusError(status=status) | UpgradeRefused(status=status):
            return not 100 <= status < 500
        case ClosedByPeer(code=code):
            return code in _TROUBLE_CODES
        case BreakerOpen():
            return False
    return isinstance(outcome, TransportError | DeadlineExceeded)


def refuses_token(error: CommsError) -> bool:
    """
    Say whether ``error``, which ended a WebSocket or an attempt at one, says that the backend does not take the token.

    Such a backend works; but another one may take what this one does not.
    """
    match error:
        case UpgradeRefused(status=401) | ClosedByPeer(code=4401):
            return True
    return False


def parse_retry_after(value: str, now: float, cap: float) -> float | None:
    """
    Return the seconds that a Retry-After field asks for (RFC 9110 section 10.2.3), or None when it makes no sense.

    :param value: the field's value: seconds, or a date in any of the three forms of RFC 9110 section 5.6.7.
    :param now: the time, as seconds since the epoch.
    :param cap: the longest wait returned, in seconds. What lies in the past is no wait: 0.
    """
    value = value.strip()
    if _SECONDS.fullmatch(value):
        # Not int(): that refuses thousands of digits, and infinity is as good as any number over the cap.
        seconds = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
            # asctime's form names no zone; every HTTP date is in UTC.
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), cap)
