"""
Which token is shown to whom: the one that the provider gives, or an earlier one that still works.

Theory of operation. A *route* is one transport to one backend; each has a record of its own, because backends may take
different tokens, a plain one may look at none when a WebSocket is opened, and what something on the way answers to one
transport must not stop the other. A record knows the newest token, the one that was accepted last, and which ones were
refused and are not shown again for a while. How a route stands follows from what happened last:

==============  ========================  =========================  ==========================
standing        newest was accepted       newest was refused (401)   the provider has another one
==============  ========================  =========================  ==========================
``UNTRIED``     ``ACCEPTED``              ``REFUSED``                ``UNTRIED``
``ACCEPTED``    ``ACCEPTED``              ``REFUSED``                ``UNTRIED``
``REFUSED``     ``ACCEPTED``              ``REFUSED``                ``UNTRIED``
==============  ========================  =========================  ==========================

While ``REFUSED``, the token that the backend accepted before is shown, if there is one that has neither been refused
since nor expired: it is *standing in*. The newest is shown again after its wait, one attempt each time, and another one
at once; but when several in a row were refused each further one waits as well, because a provider may make a new one
for every refusal. So nothing here can become a loop, whoever asks and however often.

Accepted means a 2xx, or a registered WebSocket: a 101 alone need not have been checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum, auto
from math import inf
from random import Random
from typing import Final, NamedTuple

from commsmgr.bearer import Token

REFUSED_SPREAD: Final = 1.5
"""At most so many times ``auth.refused_delay`` a refused token is not shown again, and at least half of that delay."""

FREE: Final = 3
"""So many different tokens in a row may be refused before the next one has to wait."""

_REMEMBERED: Final = 8
"""Refused tokens that are remembered of a route: more than are ever in use at the same time."""


class Route(NamedTuple):
    """One transport to one backend."""

    backend: str
    transport: str


class Standing(Enum):
    """How the newest token stands with a route."""

    UNTRIED = auto()
    ACCEPTED = auto()
    REFUSED = auto()


class Held(NamedTuple):
    """No token may be shown now; the newest one may be again in ``seconds``."""

    seconds: float


class _Record:
    def __init__(self) -> None:
        self.newest: str | None = None
        self.standing = Standing.UNTRIED
        self.stands_in = False
        self.accepted: Token | None = None
        self.held_until: dict[str, float] = {}
        self.refused_in_a_row = 0
        self.all_held_until = -inf


class TokenTable:
    """
    The records of all routes. Pure: times are passed in.

    :param refused_delay: ``auth.refused_delay``, in seconds.
    """

    def __init__(self, *, refused_delay: float, random: Random) -> None:
        self._refused_delay = refused_delay
        self._random = random
        self._records: dict[Route, _Record] = {}
        # The same by backend: a message must not cost more because there are many backends.
        self._of: dict[str, dict[Route, _Record]] = {}

    def choose(self, route: Route, newest: Token | None, *, now: float, wall: float) -> Token | Held:
        """
        Return the token to show, or for how long there is none.

        :param newest: what the provider gives; None when it gives none.
        :param now: seconds of the clock by which waits are measured.
        :param wall: seconds since the epoch, by which tokens expire.
        """
        record = self._record(route)
        if newest is not None:
            if record.newest != newest.value:
                record.newest, record.standing = newest.value, Standing.UNTRIED
            if not self._held(record, newest.value, now):
                # Even one that has expired by our clock: the backend's is the one that counts.
                record.stands_in = False
                return newest
        for earlier in self._accepted(route):
            if not self._held(record, earlier.value, now) and not _expired(earlier, wall):
                record.stands_in = True
                return earlier
        record.stands_in = False
        return Held(0.0 if newest is None else self._held(record, newest.value, now))

    def holds(self, route: Route, newest: Token, *, now: float, wall: float) -> bool:
        """Say whether :meth:`choose` would give no token for ``route``; nothing changes by that."""
        record = self._record(route)
        return bool(self._held(record, newest.value, now)) and all(
            self._held(record, earlier.value, now) or _expired(earlier, wall) for earlier in self._accepted(route)
        )

    def accepted(self, route: Route, token: Token) -> bool:
        """
        The backend has taken ``token``.

        :return: whether :meth:`kept` has changed.
        """
        record = self._record(route)
        record.held_until.pop(token.value, None)
        if token.value == record.newest:
            self._taken(route.backend, token.value)
            record.standing = Standing.ACCEPTED
            record.refused_in_a_row = 0
        elif record.standing is Standing.ACCEPTED:
            # A late answer to what was sent before the rotation.
            return False
        if not token.value or token == record.accepted:
            return False
        record.accepted = token
        return True

    def _taken(self, backend: str, newest: str) -> None:
        """The backend takes the newest: where an earlier one stands in, as for an open WebSocket, nothing is wrong."""
        for record in self._of[backend].values():
            if record.newest == newest and record.stands_in:
                record.standing = Standing.UNTRIED

    def refused(self, route: Route, token: Token, now: float) -> float:
        """
        The backend has answered 401 to ``token``.

        :return: in how many seconds it may be shown again.
        """
        record = self._record(route)
        if token.value == record.newest:
            record.standing = Standing.REFUSED
        if record.accepted is not None and record.accepted.value == token.value:
            record.accepted = None
        wait = self._refused_delay * self._random.uniform(0.5, REFUSED_SPREAD)
        if record.held_until.pop(token.value, None) is None:
            record.refused_in_a_row += 1
        record.held_until[token.value] = now + wait
        record.all_held_until = now + wait if record.refused_in_a_row >= FREE else -inf
        while len(record.held_until) > _REMEMBERED:
            del record.held_until[next(iter(record.held_until))]
        return wait

    def kept(self) -> dict[Route, Token]:
        """Return what each route accepted last and has not refused since: what is worth keeping over a restart."""
        return {route: record.accepted for route, record in self._records.items() if record.accepted is not None}

    def remember(self, kept: Mapping[Route, Token]) -> None:
        """Begin with what an earlier run has kept."""
        for route, token in kept.items():
            self._record(route).accepted = token

    @property
    def refusing(self) -> list[Route]:
        """The routes on which the newest token was refused."""
        return [route for route, record in self._records.items() if record.standing is Standing.REFUSED]

    @property
    def standing_in(self) -> list[Route]:
        """The routes on which an earlier token was shown last, in place of the newest."""
        return [route for route, record in self._records.items() if record.stands_in]

    def stands(self, backend: str) -> tuple[bool, bool]:
        """Return whether ``backend`` is among the :attr:`refusing`, and whether among the :attr:`standing_in`."""
        refusing = standing_in = False
        for record in self._of.get(backend, {}).values():
            refusing |= record.standing is Standing.REFUSED
            standing_in |= record.stands_in
        return refusing, standing_in

    def stands_in(self, route: Route) -> bool:
        """Return whether ``route`` is among the :attr:`standing_in`."""
        return self._record(route).stands_in

    def _record(self, route: Route) -> _Record:
        record = self._records.get(route)
        if record is None:
            record = self._records[route] = _Record()
            self._of.setdefault(route.backend, {})[route] = record
        return record

    def _accepted(self, route: Route) -> Iterator[Token]:
        """Yield what this route accepted, then what the backend's other transport did."""
        own = self._records[route].accepted
        if own is not None:
            yield own
        for other, record in self._of[route.backend].items():
            if other != route and record.accepted is not None:
                yield record.accepted

    def _held(self, record: _Record, token: str, now: float) -> float:
        """Return for how many seconds a token is held back; a clock that steps back must not make that longer."""
        until = record.held_until.get(token)
        if until is None:
            known = record.accepted is not None and record.accepted.value == token
            until = -inf if known else record.all_held_until
        left = until - now
        return left if 0 < left <= REFUSED_SPREAD * self._refused_delay else 0.0


def _expired(token: Token, wall: float) -> bool:
    return token.expires_at is not None and token.expires_at <= wall
