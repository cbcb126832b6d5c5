"""
How long to wait before trying again: full jitter, applied after the cap.

The wait is uniform between nothing and a bound that doubles with each attempt. Spreading over the whole range, and not
by a few percent around a point, is what keeps the agents of a fleet apart when their backend comes back for all of
them at once; applying it after the cap is what keeps them apart when all have reached the cap.

Other waits: :mod:`~commsmgr.policy.reconnect` says which bounds and floor an ended connection gets, and asks here;
``RETRY_AFTER`` in :mod:`commsmgr.spool.store` and ``FIRST_PAUSE`` in :mod:`commsmgr.spool.patience` double without
jitter, for a machine's disk is its own; ``DELAY_AFTER_FAULT`` in :mod:`commsmgr.transport.websocket` follows a defect.
"""

from __future__ import annotations

from random import Random

# A power of two that a float can still hold. A bound needs no more doublings than this to reach any cap.
_MOST_DOUBLINGS = 1000


def full_jitter(attempt: int, *, base: float, cap: float, random: Random, floor: float = 0.0) -> float:
    """
    Return the seconds to wait: ``floor`` plus a uniform share of ``min(cap, base * 2**attempt)``.

    :param attempt: how many attempts have failed before this wait, counted from 0; as large as you like.
    :param base: the bound of the first wait, in seconds.
    :param cap: the largest bound, in seconds. The floor comes on top.
    :param random: the source of the jitter.
    :param floor: the least wait, in seconds.
    """
    bound = min(cap, base * 2.0 ** min(attempt, _MOST_DOUBLINGS))
    return floor + random.uniform(0.0, bound)
