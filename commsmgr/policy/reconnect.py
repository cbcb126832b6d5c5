"""
How long to wait before the next WebSocket attempt, by what ended the last one.

=============================================  ============  =========================================================
what ended it                                  pace          wait in seconds
=============================================  ============  =========================================================
close 1008, 4400 to 4499;                      ``REFUSED``   around ``refused_delay``: from half of it to one and a
upgrade, or a proxy's CONNECT, answered with                 half
4xx; we closed: it sent too fast
– but close 4408, 4425, 4429;                  ``USUAL``     full jitter
upgrade or CONNECT answered with 408, 425, 429
– but close 4401, upgrade answered with 401,   ``USUAL``     full jitter: the next attempt bears a fresh token
in the first attempt
close 1011, 1013                               ``TROUBLED``  ``TROUBLED_FLOOR`` times the base, and full jitter
close 1000, 1001, 1012; anything else          ``USUAL``     full jitter
=============================================  ============  =========================================================

On top of that, who was told how long to wait (Retry-After, an open breaker) waits no less than that, within
``retry_after_cap``, spread by a further ``SPREAD`` of it.

Close codes: RFC 6455 section 7.4.1 and the IANA registry of WebSocket close codes; those from 4400 to 4499 are by
custom the HTTP statuses 400 to 499. Statuses: RFC 9110 section 15, RFC 6585.
"""

from __future__ import annotations

from enum import Enum, auto
from random import Random
from typing import Final

from commsmgr.config import Reconnect
from commsmgr.errors import (
    BreakerOpen,
    ClosedByPeer,
    CommsError,
    HTTPStatusError,
    ProxyRefused,
    RateExceeded,
    UpgradeRefused,
)
from commsmgr.policy.backoff import full_jitter

TROUBLED_FLOOR: Final = 5.0
"""How many times the base a backend is left alone at least when it says that it is in trouble."""

SPREAD: Final = 0.2
"""Share of an asked-for wait added at random: the usual jitter alone is too short for a fleet told the same number."""


class _Pace(Enum):
    USUAL = auto()
    TROUBLED = auto()
    REFUSED = auto()


_BY_CLOSE_CODE: Final = {
    1008: _Pace.REFUSED,  # policy violation
    1011: _Pace.TROUBLED,  # internal error
    1013: _Pace.TROUBLED,  # try again later
    **dict.fromkeys(range(4400, 4500), _Pace.REFUSED),
    **dict.fromkeys((4408, 4425, 4429), _Pace.USUAL),
}

_BY_STATUS: Final = {
    **dict.fromkeys(range(400, 500), _Pace.REFUSED),
    **dict.fromkeys((408, 425, 429), _Pace.USUAL),
}

# A token may just have been rotated: one attempt with a fresh one costs little and saves a minute.
_WORTH_A_FRESH_TOKEN: Final = (401, 4401)


def delay(error: CommsError, attempt: int, *, settings: Reconnect, refused_delay: float, random: Random) -> float:
    """
    Return the seconds to wait before the next attempt.

    :param error: what ended the last attempt or connection.
    :param attempt: how many attempts in a row have failed before this one, counted from 0.
    :param settings: ``[reconnect]``.
    :param refused_delay: ``auth.refused_delay``, in seconds.
    :param random: the source of the jitter.
    """
    floor, base, cap = 0.0, settings.base, settings.cap
    match _pace(error, attempt):
        case _Pace.REFUSED:
            floor, base, cap = refused_delay / 2, refused_delay, refused_delay
        case _Pace.TROUBLED:
            floor = min(cap, TROUBLED_FLOOR * base)
    asked = min(_asked_for(error), settings.retry_after_cap)
    floor = max(floor, asked) + random.uniform(0.0, SPREAD * asked)
    return full_jitter(attempt, base=base, cap=cap, floor=floor, random=random)


def _asked_for(error: CommsError) -> float:
    """Return for how many seconds the backend, or our breaker on its behalf, asked to be left alone."""
    match error:
        case (
            UpgradeRefused(retry_after=seconds)
            | HTTPStatusError(retry_after=seconds)
            | ProxyRefused(retry_after=seconds)
        ):
            return seconds or 0.0
        case BreakerOpen(retry_in=seconds):
            return seconds
    return 0.0


def _pace(error: CommsError, attempt: int) -> _Pace:
    match error:
        case ClosedByPeer(code=code):
            pace = _BY_CLOSE_CODE.get(code, _Pace.USUAL)
        case RateExceeded():
            return _Pace.REFUSED
        case UpgradeRefused(status=code) | HTTPStatusError(status=code):
            pace = _BY_STATUS.get(code, _Pace.USUAL)
        case ProxyRefused(status=code):
            # Its 401 is about the agent's credentials for the proxy: no fresh token helps.
            return _BY_STATUS.get(code, _Pace.USUAL)
        case _:
            return _Pace.USUAL
    return _Pace.USUAL if attempt == 0 and code in _WORTH_A_FRESH_TOKEN else pace
