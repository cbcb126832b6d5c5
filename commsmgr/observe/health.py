"""What a :class:`~commsmgr.status.Status` means: is the manager alive, is it ready, and why not. Pure."""

from __future__ import annotations

from commsmgr.instants import shown
from commsmgr.redact import single_line
from commsmgr.status import (
    BackendStatus,
    Connecting,
    Draining,
    Idle,
    LinkState,
    QueueStatus,
    Registered,
    Registering,
    Status,
    Waiting,
)

_LONGEST = 4096


def live(status: Status) -> bool:
    """
    Whether the manager runs, or waits for its spool's disk.

    A backend that is away, or a full disk, is no reason to restart the agent, so they play no part.
    """
    return status.running or bool(status.queue.trouble)


def ready(status: Status) -> bool:
    """Whether what is handed over now is kept, and can reach a backend now, over either transport."""
    return status.running and not status.queue.trouble and (status.connected or status.reachable)


def explain(status: Status) -> str:
    """Return one printable paragraph: connected to what and since when, or why not; what waits; what is wrong."""
    if not status.running:
        waits = "waits for its spool" if status.queue.trouble else "is not running"
        parts = [f"not connected: the manager {waits}"]
    else:
        parts = [_connection(status), _queue(status.queue)]
        if status.queue.trouble not in status.problems:
            parts.append(status.queue.trouble)
    return single_line(". ".join(part.rstrip(".") for part in (*parts, *status.problems) if part), _LONGEST)


def _connection(status: Status) -> str:
    registered = [backend for backend in status.backends if isinstance(backend.link, Registered)]
    if status.connected and registered:
        # The active one first; another may still be in conversation while the manager changes over.
        backend = min(registered, key=lambda backend: not backend.active)
        return f"connected to {backend.name} {_registered(backend.link)}"
    said = "not connected, but reachable over HTTP" if status.reachable else "not connected"
    return f"{said}: " + ("; ".join(map(_why, status.backends)) or "no backend is configured")


def _why(backend: BackendStatus) -> str:
    """Return why there is no proven connection to ``backend``."""
    said = f"{backend.name} {_link(backend.link)}"
    if isinstance(backend.link, Registered):
        proof = f"last at {shown(backend.last_receipt)}" if backend.last_receipt else "never so far"
        said += f", but has not proven lately that it takes what is sent ({proof})"
    if backend.breaker != "closed":
        said += f", its circuit breaker is {backend.breaker.replace('_', '-')}"
    known = backend.link.reason if isinstance(backend.link, Waiting) else ""
    if backend.last_error and backend.last_error not in known:
        said += f", last error: {backend.last_error}"
    return said


def _link(state: LinkState) -> str:
    match state:
        case Idle():
            return "is not wanted now"
        case Waiting(reason=reason, until=until, attempts=attempts):
            times = f"{attempts} attempt{'' if attempts == 1 else 's'}"
            return f"failed after {times}: {reason.rstrip('.')}; the next one starts at {shown(until)}"
        case Connecting(since=since):
            return f"is being connected since {shown(since)}"
        case Registering(since=since):
            return f"has not answered the registration sent at {shown(since)}"
        case Draining(since=since):
            return f"is being left since {shown(since)}"
        case Registered():
            return f"is registered {_registered(state)}"


def _registered(state: LinkState) -> str:
    assert isinstance(state, Registered)
    return f"({state.dialect}, {state.tls or 'without TLS'}) since {shown(state.since)}"


def _queue(queue: QueueStatus) -> str:
    said = ""
    if queue.events:
        oldest = "" if queue.oldest_event_at is None else f", the oldest since {shown(queue.oldest_event_at)}"
        said = f"{queue.events} event{' waits' if queue.events == 1 else 's wait'} ({queue.event_bytes} bytes){oldest}"
        if queue.outage_budget is not None:
            said += f"; at the present rate there is room for another {queue.outage_budget:.0f} s"
    if queue.dead_letters:
        said += f"{'. ' if said else ''}{queue.dead_letters} dead letter{'' if queue.dead_letters == 1 else 's'}"
    return said
