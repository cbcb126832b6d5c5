"""
Which backend to use: ordered failover.

The decision is a function of a snapshot, so that another rule (least requests of two choices, weights) can take its
place without anything else changing.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class Candidate(Struct, frozen=True):
    """One backend, as the balancer sees it: its name, and whether it can be used now."""

    name: str
    available: bool


def choose(candidates: Sequence[Candidate], current: str | None) -> str | None:
    """
    Return the name of the backend to use: the first that is available.

    When none is, moving would gain nothing: stay with ``current``, or take the first when there is no current one or
    it is not among the candidates any more.

    :param candidates: all backends, in order of preference.
    :param current: the backend in use.
    :return: None only when there are no candidates at all.
    """
    names = [candidate.name for candidate in candidates]
    usable = [candidate.name for candidate in candidates if candidate.available]
    fallback = [current] if current in names else names
    return next(iter(usable or fallback), None)
