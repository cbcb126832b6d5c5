"""
The circuit breaker: a backend that failed several times in a row is left alone for a while, then probed once.

Every permit that :meth:`Breaker.try_acquire` grants is given back by exactly one of ``succeeded``, ``failed`` and
``released``. The machine, by state and event:

=============  =========================  ===============  ========================  ===========================
state          ``try_acquire``            ``succeeded``    ``failed``                ``released``
=============  =========================  ===============  ========================  ===========================
``closed``     granted                    count back to 0  count + 1; at the limit   –
                                                           ``open``
``open``       refused; after its time    –                –                         –
               granted: ``half_open``
``half_open``  refused: a probe is out    ``closed``       ``open``                  ``open``, its time over
=============  =========================  ===============  ========================  ===========================

So there is never more than one probe, because the state *is* that the probe is out. Reports of attempts that began
before the breaker opened find it open, and change nothing. One that comes while a probe is out is taken for the
probe's: the worst that follows is a state that the next attempt or two correct.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import ClassVar, Final, Literal, TypeAlias

from msgspec import Struct

from commsmgr import config

SPREAD: Final = 0.2
"""Share of ``open_for`` added at random, so that a fleet does not probe in step."""


class _Closed(Struct, frozen=True):
    """Everything passes; ``failures`` in a row so far."""

    name: ClassVar[Literal["closed"]] = "closed"
    failures: int = 0


class _Open(Struct, frozen=True):
    """Nothing passes before ``until``, on the breaker's clock."""

    name: ClassVar[Literal["open"]] = "open"
    until: float


class _HalfOpen(Struct, frozen=True):
    """One probe is out."""

    name: ClassVar[Literal["half_open"]] = "half_open"


_State: TypeAlias = _Closed | _Open | _HalfOpen


class Breaker:
    """
    The breaker of one backend, shared by its transports.

    :param settings: ``[breaker]``.
    :param seconds: a monotonic clock.
    :param random: the source of the jitter.
    :ivar on_change: called with the new :attr:`state` whenever it changes, after the change; for logs and metrics, and
        to wake who waits for a permit. It must not raise.
    """

    def __init__(self, settings: config.Breaker, seconds: Callable[[], float], random: Random) -> None:
        self._settings = settings
        self._seconds = seconds
        self._random = random
        self._state: _State = _Closed()
        self.on_change: Callable[[str], None] | None = None

    @property
    def state(self) -> Literal["closed", "open", "half_open"]:
        """The name of the state: ``open`` until a probe is let through, ``half_open`` while it is out."""
        return self._state.name

    def try_acquire(self) -> bool:
        """Return whether an attempt may be made now; if so, it must be given back."""
        match self._state:
            case _Closed():
                return True
            case _Open(until) if until <= self._seconds():
                self._become(_HalfOpen())
                return True
        return False

    def retry_in(self) -> float:
        """
        Return the seconds until a permit could be had, 0 if at once.

        While a probe is out nobody can know: the answer is ``open_for``, what its failure would cost;
        :attr:`on_change` tells of its success.
        """
        match self._state:
            case _Closed():
                return 0.0
            case _Open(until):
                return max(0.0, until - self._seconds())
        return self._settings.open_for

    def succeeded(self) -> None:
        """An attempt showed that the backend works."""
        match self._state:
            case _Closed() | _HalfOpen():
                self._become(_Closed())

    def failed(self) -> None:
        """An attempt showed that the backend does not work."""
        match self._state:
            case _Closed(failures) if failures + 1 < self._settings.failures:
                self._become(_Closed(failures + 1))
            case _Closed() | _HalfOpen():
                wait = self._settings.open_for * self._random.uniform(1.0, 1.0 + SPREAD)
                self._become(_Open(self._seconds() + wait))

    def released(self) -> None:
        """An attempt says nothing about the backend: it was cancelled, or its caller was wrong."""
        match self._state:
            case _HalfOpen():
                self._become(_Open(self._seconds()))

    def _become(self, state: _State) -> None:
        before, self._state = self._state, state
        if before.name != state.name and self.on_change is not None:
            self.on_change(state.name)
