"""
How the backend misbehaves on purpose: what is wrong now, how often it may still strike, and when it ends.

At most one fault of each kind is active; setting one anew replaces it. A fault ends when its ``count`` is used up, its
``seconds`` have passed, or it is cleared. The code that answers agents asks :meth:`Faults.strike` at the moment at
which the fault would act. The console and the control API are never affected: one could not make the backend behave
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct
from twisted.internet.interfaces import IDelayedCall, IReactorTime

Transport: TypeAlias = Literal["http", "websocket"]

FaultKind: TypeAlias = Literal[
    "refuse",
    "hang",
    "drop",
    "slow",
    "status",
    "html",
    "no_ack",
    "nack",
    "crash",
    "close",
    "silent",
    "malformed",
    "blackhole",
]

DESCRIPTIONS: dict[FaultKind, str] = {
    "refuse": "new connections are closed at once; open ones go on",
    "hang": "requests and upgrades are accepted and never answered",
    "drop": "connections are cut: all of them now, or each after so many messages",
    "slow": "answers come late",
    "status": "requests and upgrades are answered with an HTTP error",
    "html": "requests and upgrades are answered with an HTML page, as a captive portal does",
    "no_ack": "results are stored, and never acknowledged (commsmgr.v1)",
    "nack": "results over WebSocket are refused (commsmgr.v1)",
    "crash": "the connection is cut when a result or a request was read, before or after it was stored",
    "close": "WebSockets are closed with a code: all of them now, or each after so many messages",
    "silent": "registrations are not answered",
    "malformed": "agents are sent what no agent expects",
    "blackhole": "connections stay open and nothing passes until the fault ends",
}

CAPTIVE_PORTAL = b"<!DOCTYPE html><title>Sign in</title><h1>Please sign in to use this network</h1>"
"""What an ``html`` fault answers."""


class Fault(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    One way to misbehave.

    :ivar transport: what it concerns.
    :ivar count: how many times it strikes; None: without limit. A ``blackhole`` is bounded by time only.
    :ivar seconds: how long it lasts; None: until it is cleared.
    :ivar after: ``drop`` and ``close``: after this many messages on a connection; None: all open ones, now, once.
    :ivar delay: ``slow``: seconds that each answer is late.
    :ivar status: ``status``: the HTTP status code.
    :ivar retry_after: ``status``: the header in seconds; ``nack``: come again after it. None: without.
    :ivar code: ``close``: the WebSocket close code (RFC 6455 section 7.4).
    :ivar stored: ``crash``: whether the message was stored before the connection is cut.
    :ivar form: ``malformed``: what is sent. ``bits`` is a frame with reserved bits set, ``utf8`` a text frame that is
        not UTF-8, ``unknown`` a sound message of a type nobody knows.
    :ivar direction: ``blackhole``: ``in`` is from the agents, ``out`` to them.
    """

    kind: FaultKind
    transport: Literal["both", "http", "websocket"] = "both"
    count: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    seconds: Annotated[float, Meta(gt=0, le=86400)] | None = None
    after: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    delay: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    status: Annotated[int, Meta(ge=300, le=599)] = 503
    retry_after: Annotated[float, Meta(ge=0, le=86400)] | None = None
    code: Annotated[int, Meta(ge=0, le=65535)] = 1011
    stored: bool = False
    form: Literal["garbage", "oversized", "binary", "unknown", "deep", "utf8", "bits"] = "garbage"
    direction: Literal["in", "out", "both"] = "both"

    @property
    def immediate(self) -> bool:
        """Whether it acts once, on what is open now, and is over with that."""
        return self.kind in ("drop", "close") and self.after is None

    def concerns(self, transport: Transport) -> bool:
        """Return whether ``transport`` is affected."""
        return self.transport in ("both", transport)


class _Active:
    """A fault in force: the strikes left, when it ends, and the timer for that."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.count
        self.until: float | None = None
        self.timer: IDelayedCall | None = None


class ActiveFault(Struct, frozen=True, kw_only=True):
    """A fault in force, for display. ``left`` are the strikes left, ``seconds_left`` is the time; None: no limit."""

    fault: Fault
    description: str
    left: int | None
    seconds_left: float | None


class Faults:
    """
    The faults in force.

    :param clock: measures ``seconds``.
    :ivar started: called with a fault when it begins (immediate ones too).
    :ivar ended: called with a fault when it is over, for whatever reason.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._active: dict[FaultKind, _Active] = {}
        self.started: Callable[[Fault], None] = lambda fault: None
        self.ended: Callable[[Fault], None] = lambda fault: None

    def set(self, fault: Fault) -> None:
        """Misbehave so from now on."""
        self.clear(fault.kind)
        if not fault.immediate:
            active = self._active[fault.kind] = _Active(fault)
            if fault.seconds is not None:
                active.until = self._clock.seconds() + fault.seconds
                active.timer = self._clock.callLater(fault.seconds, self._end, active)
        self.started(fault)

    def inject(self, kind: FaultKind, **settings: Any) -> Fault:
        """
        Misbehave so from now on; ``settings`` are the fields of :class:`Fault`.

        :raise ValueError: a field is unknown or its value out of bounds (it is msgspec's ValidationError).
        """
        fault = msgspec.convert({"kind": kind, **settings}, Fault)
        self.set(fault)
        return fault

    def clear(self, kind: str | None = None) -> None:
        """Behave again, in respect of ``kind`` or of everything; what is no kind of fault clears nothing."""
        for active in list(self._active.values()):
            if kind in (None, active.fault.kind):
                self._end(active)

    def peek(self, kind: FaultKind, transport: Transport) -> Fault | None:
        """Return the fault of ``kind`` that is in force for ``transport``, without counting a strike."""
        active = self._active.get(kind)
        return active.fault if active is not None and active.fault.concerns(transport) else None

    def strike(self, kind: FaultKind, transport: Transport, messages: int | None = None) -> Fault | None:
        """
        Return the fault of ``kind`` that acts on ``transport`` at this moment, and count it.

        :param messages: how many messages the connection has brought; a fault with ``after`` waits for that many.
        """
        fault = self.peek(kind, transport)
        if fault is None or (fault.after is not None and (messages or 0) < fault.after):
            return None
        active = self._active[kind]
        if active.left is not None:
            active.left -= 1
            if active.left == 0:
                self._end(active)
        return fault

    @property
    def active(self) -> tuple[ActiveFault, ...]:
        """What is in force now."""
        now = self._clock.seconds()
        return tuple(
            ActiveFault(
                fault=active.fault,
                description=DESCRIPTIONS[active.fault.kind],
                left=active.left,
                seconds_left=None if active.until is None else max(0.0, active.until - now),
            )
            for active in self._active.values()
        )

    def _end(self, active: _Active) -> None:
        if active.timer is not None and active.timer.active():
            active.timer.cancel()
        del self._active[active.fault.kind]
        self.ended(active.fault)


def malformed(form: str) -> tuple[bytes, bool]:
    """Return what a ``malformed`` fault of this form sends: the bytes, and whether as a binary frame."""
    match form:
        case "oversized":
            return b'{"type":"notice","data":"' + b"x" * (16 << 20) + b'"}', False
        case "binary":
            return bytes(range(256)), True
        case "unknown":
            return b'{"type":"flux_capacitor","id":"1","data":{"gigawatts":1.21}}', False
        case "deep":
            return b'{"type":"command","id":"deep","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", False
        case "utf8":
            return b'{"type":"ping","id":"\xff\xfe"}', False
        case _:
            return b'{"type": "command", "id": ', False
