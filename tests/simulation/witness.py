"""
Writes down what happens inside commsmgr at the few places where a promise is made or broken.

Each witness stands between a caller and the real thing, changes nothing, and notes what it saw for the process whose
turn it is. The oracles can so judge each result by its id, from the commit to the backend, whatever its status.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import msgspec
from twisted.internet.defer import Deferred

from commsmgr.backend import http
from commsmgr.backend.faults import malformed
from commsmgr.backend.switchboard import Switchboard
from commsmgr.backend.v1 import V1Conversation
from commsmgr.intake import Intake
from commsmgr.messages import ResultBody
from commsmgr.session.window import Window
from commsmgr.spool import Lane, Outbox, Spool
from commsmgr.spool.inbox import Inbox

if TYPE_CHECKING:
    from tests.simulation.scenario import World

Change: TypeAlias = tuple[Any, str, Any]


def digest(body: ResultBody) -> str:
    """Return what is the same for the same content, however it was encoded on its way."""
    content = (body.id, body.command_id, body.status, body.output, body.error, body.exit_code)
    return f"{crc32(msgspec.json.encode(content)):08x}"


def number_of(inventory: bytes) -> int:
    """Return an inventory's number: the agent counts those that it makes by itself."""
    return int(msgspec.json.decode(inventory)["data"]["system"]["number"])


_MALFORMED = frozenset(malformed(form)[0] for form in ("garbage", "binary", "unknown", "deep", "utf8", "bits"))
"""Bodies that no backend sends unless it was told to."""


class Witness:
    """What is noted, and who notes it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def changes(self) -> list[Change]:
        """Return what has to be put in which place."""
        return [
            (Inbox, "complete", self._complete(Inbox.complete)),
            (Outbox, "put", self._put(Outbox.put)),
            (Spool, "_after_batch", self._after_batch(Spool._after_batch)),
            (Window, "add", self._add(Window.add)),
            (Intake, "_is_known", self._is_known(Intake._is_known)),
            (V1Conversation, "_nack", self._nack(V1Conversation._nack)),
            (Switchboard, "results", self._results(Switchboard.results)),
            (http, "_finish", self._finish(http._finish)),
        ]

    def _note(self, what: str, subject: str, /, **facts: Any) -> None:
        owner = self._world.clock.running
        if owner is not None and owner.alive:
            self._world.history.note(owner.name, what, subject, **facts)

    def _most(self, **held: int) -> None:
        owner = self._world.clock.running
        if owner is not None and owner.alive:
            highest = self._world.agent(owner.name).highest
            for name, value in held.items():
                highest[name] = max(highest.get(name, 0), value)

    # -- the spool

    def _kept(self, name: str, key: int | None, body: bytes, ttl: float | None) -> None:
        result = msgspec.json.decode(body, type=ResultBody)
        self._note(
            "kept",
            name,
            command=result.command_id,
            key=key or 0,
            status=result.status,
            digest=digest(result),
            ttl=-1.0 if ttl is None else ttl,
        )

    def _complete(self, genuine: Callable[..., Deferred[int]]) -> Callable[..., Deferred[int]]:
        def complete(inbox: Inbox, **facts: Any) -> Deferred[int]:
            def kept(seq: int) -> int:
                self._kept(facts["result_id"], facts["key"], facts["body"], facts.get("ttl"))
                return seq

            return genuine(inbox, **facts).addCallback(kept)

        return complete

    def _put(self, genuine: Callable[..., Deferred[int]]) -> Callable[..., Deferred[int]]:
        def put(outbox: Outbox, **facts: Any) -> Deferred[int]:
            def kept(seq: int) -> int:
                if facts["lane"] is Lane.EVENT:
                    self._kept(facts["id"], None, facts["body"], facts.get("ttl"))
                else:
                    self._note("stock", facts["id"], number=number_of(facts["body"]))
                return seq

            if facts["lane"] is Lane.STATE:
                # Noted before it is durable as well: nobody may be left to be told that it is.
                self._note("handed", facts["id"], number=number_of(facts["body"]))
            return genuine(outbox, **facts).addCallback(kept)

        return put

    def _after_batch(self, genuine: Callable[..., None]) -> Callable[..., None]:
        def after_batch(spool: Spool, outcome: Any) -> None:
            if (counter := outcome.counter) is not None:
                self._most(
                    events=counter.events,
                    event_bytes=counter.event_bytes,
                    open_commands=counter.open_commands,
                    dead_letters=counter.dead_letters,
                    dead_bytes=counter.dead_bytes,
                    remembered_bytes=counter.remembered_bytes,
                )
            genuine(spool, outcome)

        return after_batch

    # -- the agent

    def _add(self, genuine: Callable[..., None]) -> Callable[..., None]:
        def add(window: Window, *message: Any) -> None:
            genuine(window, *message)
            # One message alone may be larger than the window.
            self._most(in_flight=len(window), in_flight_bytes=window.bytes if len(window) > 1 else 0)

        return add

    def _is_known(self, genuine: Callable[..., None]) -> Callable[..., None]:
        def is_known(intake: Intake, known: Any, source: Any, arrived: Any) -> None:
            self._note("known", arrived.id, finished=known.finished, missing=known.result_missing)
            genuine(intake, known, source, arrived)

        return is_known

    # -- the backend

    def _nack(self, genuine: Callable[..., None]) -> Callable[..., None]:
        def nack(conversation: V1Conversation, id: str, code: str, message: str, retry_after: float | None) -> None:
            self._note("declined", id, code=code, later=retry_after is not None, fault=code == "refused")
            genuine(conversation, id, code, message, retry_after)

        return nack

    def _finish(self, genuine: Callable[..., None]) -> Callable[..., None]:
        def finish(request: Any, answer: Any) -> None:
            name = request.getHeader("idempotency-key")
            if answer.status >= 400 and name:
                # Two faults may meet in one answer, and the other has taken away the word.
                fault = b"told to misbehave" in answer.body or answer.body in _MALFORMED
                self._note("declined", name, code=f"HTTP {answer.status}", later=False, fault=fault)
            genuine(request, answer)

        return finish

    def _results(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def results(switchboard: Switchboard, batch: Any, *rest: Any, **more: Any) -> Any:
            # As it came, for what the ledger has may have come before.
            self._world.arrived.update((body.id, digest(body)) for body, _ in batch)
            return genuine(switchboard, batch, *rest, **more)

        return results
