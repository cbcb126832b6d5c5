"""
What happens in the backend, as it happens: for the console, the demo's output, and tests that wait without polling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from commsmgr.messages import JSONObject

Kind: TypeAlias = Literal[
    "registered",  # an agent's WebSocket is registered
    "disconnected",  # and is gone again
    "heartbeat",
    "inventory",
    "command",  # a command was accepted for an agent: sent, or kept until it connects
    "acked",  # the agent has the command in its inbox (commsmgr.v1)
    "nacked",  # the agent refused the command (commsmgr.v1)
    "result",  # a result was stored
    "duplicate",  # a result came again
    "losses",  # an agent has told of messages that it had to give up (commsmgr.v1)
    "refused",  # a request, an upgrade or a message was refused; `note` says why
    "message",  # any other message of an agent
    "fault",  # the backend began to misbehave
    "behaving",  # a fault ended
]


class BackendEvent(Struct, frozen=True, kw_only=True):
    """
    One thing that happened.

    :ivar seq: counts from 1 since the backend was made.
    :ivar at: seconds since the epoch.
    :ivar id: of the message concerned, empty when there is none.
    :ivar note: a few words for a person.
    """

    seq: int
    at: float
    kind: Kind
    machine_id: str = ""
    transport: Literal["", "http", "websocket"] = ""
    id: str = ""
    note: str = ""
    detail: JSONObject = {}


Observer: TypeAlias = Callable[[BackendEvent], None]


class EventLog:
    """
    Tells observers of events, and keeps the latest ones.

    :param wall: seconds since the epoch.
    :param keep: how many events :attr:`recent` holds.
    """

    log = Logger()

    def __init__(self, wall: Callable[[], float], keep: int = 500) -> None:
        self._wall = wall
        self._seq = 0
        self._observers: list[Observer] = []
        self.recent: deque[BackendEvent] = deque(maxlen=keep)

    def emit(
        self,
        kind: Kind,
        *,
        machine_id: str = "",
        transport: Literal["", "http", "websocket"] = "",
        id: str = "",
        note: str = "",
        detail: JSONObject | None = None,
    ) -> None:
        """Tell every observer. An observer's exception is logged and changes nothing."""
        self._seq += 1
        event = BackendEvent(
            seq=self._seq,
            at=self._wall(),
            kind=kind,
            machine_id=machine_id,
            transport=transport,
            id=id,
            note=note,
            detail=detail or {},
        )
        self.recent.append(event)
        for observer in tuple(self._observers):
            try:
                observer(event)
            except Exception:
                self.log.failure("an observer of backend events failed", event="backend.observer-failed")

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer`` with each event from now on; what is returned ends that, and may be called twice."""
        self._observers.append(observer)

        def unsubscribe() -> None:
            if observer in self._observers:
                self._observers.remove(observer)

        return unsubscribe

    def when(
        self, kind: Kind, predicate: Callable[[BackendEvent], bool] = lambda event: True
    ) -> Deferred[BackendEvent]:
        """
        Wait for the next event of ``kind`` that ``predicate`` likes; past ones do not count. Cancelling stops waiting.
        """

        def observe(event: BackendEvent) -> None:
            if event.kind == kind and predicate(event):
                unsubscribe()
                waiting.callback(event)

        unsubscribe = self.subscribe(observe)
        waiting: Deferred[BackendEvent] = Deferred(lambda _: unsubscribe())
        return waiting
