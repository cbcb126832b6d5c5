"""
How things stand, as unions of frozen states. No state holds a secret: all of this is shown to operators.

Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct


class Idle(Struct, frozen=True, tag=True):
    """Not wanted now: the manager is stopped, or a preferred backend is in use."""


class Waiting(Struct, frozen=True, tag=True):
    """The last attempt failed for ``reason``; the next one starts at ``until``."""

    reason: str
    until: float
    attempts: int


class Connecting(Struct, frozen=True, tag=True):
    """An attempt is under way since ``since``."""

    since: float


class Registering(Struct, frozen=True, tag=True):
    """The WebSocket is open and the registration is unanswered since ``since``."""

    since: float


class Registered(Struct, frozen=True, tag=True):
    """In conversation since ``since``; ``tls`` is the protocol version, empty without TLS."""

    since: float
    dialect: str
    tls: str = ""


class Draining(Struct, frozen=True, tag=True):
    """Saying goodbye: what is in flight is finished, nothing new is sent."""

    since: float


LinkState: TypeAlias = Idle | Waiting | Connecting | Registering | Registered | Draining


class BackendStatus(Struct, frozen=True):
    """One backend. ``last_receipt`` is when it last proved that it takes what we send, 0 for never."""

    name: str
    url: str
    active: bool
    link: LinkState
    breaker: str
    last_receipt: float = 0.0
    last_error: str = ""


class QueueStatus(Struct, frozen=True):
    """
    What is held for the backend.

    :ivar outage_budget: seconds of outage that can still be buffered, None while nothing is being produced.
    :ivar dropped: how many messages became dead letters since the start, by reason.
    :ivar unreported_losses: how many losses the backend was not told of yet, across restarts.
    :ivar trouble: what is wrong with the spool's disk or database, for an operator; empty when all is well.
    """

    events: int = 0
    event_bytes: int = 0
    states: int = 0
    dead_letters: int = 0
    oldest_event_at: float | None = None
    outage_budget: float | None = None
    open_commands: int = 0
    dropped: dict[str, int] = {}
    unreported_losses: int = 0
    trouble: str = ""


class TokenStatus(Struct, frozen=True):
    """
    How the bearer token stands.

    :ivar source: where it comes from: ``none``, ``token``, ``token_file`` … as in ``[auth]``, or ``provider``.
    :ivar expires_at: when the newest one expires, if that is known.
    :ivar refused: where the newest one was refused, as "main over http".
    :ivar earlier: where one is in use instead that was accepted before.
    """

    source: str = "none"
    expires_at: float | None = None
    refused: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


class Status(Struct, frozen=True):
    """
    One manager, whole.

    :ivar connected: a backend is registered over WebSocket and has proven within the keep-alive that it lives.
    :ivar reachable: the last exchange with some backend, over either transport, went well.
    :ivar problems: sentences for an operator; empty when all is well.
    """

    running: bool
    connected: bool
    reachable: bool
    machine_id: str
    version: str
    backends: tuple[BackendStatus, ...]
    queue: QueueStatus
    problems: tuple[str, ...] = ()
    auth: TokenStatus = TokenStatus()
