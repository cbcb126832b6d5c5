"""
The control API under ``/api/``, for the console, tests and the demo. JSON in, JSON out.

======================================  =============================================================================
``GET /api/state``                      the backend, its agents, the faults in force
``GET /api/stream``                     events as server-sent events; ``Last-Event-ID`` is honoured
``POST /api/commands``                  ``{machine_id, type, command, args, timeout, options}``; 201 ``{id}``
``GET /api/commands/ID``                the command's state, and its result or null
``POST /api/faults``                    misbehave: the fields of :class:`~commsmgr.backend.faults.Fault`
``DELETE /api/faults``, ``…/KIND``      behave again
``POST /api/goaway``                    ``{reconnect_after, window}`` to every commsmgr.v1 agent
``POST /api/settings``                  ``{heartbeat_interval, inventory_interval}`` to every commsmgr.v1 agent
======================================  =============================================================================

It asks for no token, and so answers only to this machine: the peer must be on the loopback, Host must name it, a
browser's request must come from the console's own origin (:mod:`commsmgr.browsers`), reading included, and what changes
anything must have ``Content-Type: application/json``, which no form has and no other page's script may send unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from twisted.web.http import FORBIDDEN
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from commsmgr.backend.console import protect, stranger
from commsmgr.backend.events import BackendEvent
from commsmgr.backend.faults import DESCRIPTIONS, Fault
from commsmgr.backend.switchboard import MachineNotConnected
from commsmgr.messages import CommandData, GoawayData, JSONObject, SettingsData

if TYPE_CHECKING:
    from commsmgr.backend.service import ReferenceBackend

_BODY_LIMIT = 1 << 20
_RECEIPTS = 20
"""How many loss receipts of an agent are shown."""


class _CommandOrder(CommandData, frozen=True, kw_only=True):
    """A command and the machine that it is for."""

    machine_id: str


class _Problem(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ControlResource(Resource):
    """One path of the control API; ``methods`` maps a method to what it does with the rest of the path and the body."""

    isLeaf = True

    def __init__(self, methods: dict[bytes, Callable[[list[str], bytes], tuple[int, Any]]]) -> None:
        super().__init__()
        self._methods = methods

    def render(self, request: Request) -> bytes:
        try:
            _check(request)
            method = self._methods.get(request.method)
            if method is None:
                raise _Problem(405, f"{request.method.decode('latin-1')} is not possible here")
            rest = [part.decode() for part in request.postpath or () if part]
            content = request.content.read(_BODY_LIMIT + 1) if request.content is not None else b""
            if len(content) > _BODY_LIMIT:
                raise _Problem(413, "the request is too large")
            status, answer = method(rest, content)
        except _Problem as problem:
            status, answer = problem.status, {"error": str(problem)}
        except MachineNotConnected as error:
            status, answer = 409, {"error": error.fact}
        except (ValueError, RecursionError) as error:
            status, answer = 400, {"error": str(error)}
        request.setResponseCode(status)
        request.setHeader("Content-Type", "application/json")
        protect(request)
        return msgspec.json.encode(answer)


def _check(request: Request) -> None:
    """
    Refuse whoever is not this machine's user, and what a form could send.

    :raise _Problem: with the reason.
    """
    if wrong := stranger(request):
        raise _Problem(FORBIDDEN, wrong)
    kind = (request.getHeader("content-type") or "").partition(";")[0].strip().lower()
    if request.method == b"POST" and kind != "application/json":
        raise _Problem(415, "expected Content-Type: application/json")


class EventStream(Resource):
    """Events as they happen (HTML Living Standard, section 9.2); begins with the recent ones that the client lacks."""

    isLeaf = True

    def __init__(self, backend: ReferenceBackend) -> None:
        super().__init__()
        self._backend = backend

    def render_GET(self, request: Request) -> bytes | int:
        protect(request)
        if wrong := stranger(request):
            request.setResponseCode(FORBIDDEN)
            request.setHeader("Content-Type", "text/plain; charset=utf-8")
            return wrong.encode()
        request.setHeader("Content-Type", "text/event-stream")
        last = request.getHeader("last-event-id") or ""
        seen = int(last) if last.isdecimal() and len(last) < 19 else 0
        log = self._backend.event_log
        if log.recent and seen > log.recent[-1].seq:
            seen = 0  # the backend was started anew and counts afresh

        def send(event: BackendEvent) -> None:
            request.write(b"id: %d\ndata: %b\n\n" % (event.seq, msgspec.json.encode(event)))

        request.write(b"retry: 1000\n\n")
        for event in log.recent:
            if event.seq > seen:
                send(event)
        unsubscribe = log.subscribe(send)
        request.notifyFinish().addBoth(lambda _: unsubscribe())
        return NOT_DONE_YET


def overview(backend: ReferenceBackend) -> JSONObject:
    """Return how things stand, for display; no secret is in it."""
    agents = []
    for row in backend.ledger.machines():
        spoken = backend.connected(row.machine_id)
        agents.append(
            {
                "machine_id": row.machine_id,
                "connected": bool(spoken),
                "dialect": spoken or row.dialect,
                "seen_at": row.seen_at,
                "heartbeat_at": row.heartbeat_at,
                "heartbeat": msgspec.Raw(row.heartbeat or b"{}"),
                "inventory_at": row.inventory_at,
                "checksum": row.checksum,
                "kept_commands": len(backend.ledger.pending(row.machine_id)),
                "loss_receipts": [
                    {"at": receipt.at, "transport": receipt.transport, "report": msgspec.Raw(receipt.body)}
                    for receipt in backend.ledger.loss_receipts(row.machine_id, _RECEIPTS)
                ],
            }
        )
    return {
        "url": backend.url,
        "websocket_url": backend.websocket_url,
        "dialects": backend.dialects,
        "token_required": bool(backend.token),
        "quirks": backend.quirks,
        "durable": backend.durable,
        "now": backend.wall(),
        "agents": agents,
        "faults": backend.faults.active,
        "fault_kinds": DESCRIPTIONS,
    }


def control_api(backend: ReferenceBackend) -> Resource:
    """Return the resource for ``/api``."""

    def state(rest: list[str], body: bytes) -> tuple[int, Any]:
        return 200, overview(backend)

    def send(rest: list[str], body: bytes) -> tuple[int, Any]:
        order = msgspec.json.decode(body, type=_CommandOrder)
        given = backend.send_command(
            order.machine_id, order.type, order.command, order.args, order.timeout, order.options
        )
        return 201, {"id": given}

    def command(rest: list[str], body: bytes) -> tuple[int, Any]:
        row = backend.ledger.command("/".join(rest))
        if row is None:
            raise _Problem(404, "there is no such command")
        return 200, {
            "id": row.id,
            "machine_id": row.machine_id,
            "state": row.state,
            "command": msgspec.Raw(row.envelope),
            "result": backend.result_of(row.id),
        }

    def misbehave(rest: list[str], body: bytes) -> tuple[int, Any]:
        backend.faults.set(msgspec.json.decode(body, type=Fault))
        return 200, {"faults": backend.faults.active}

    def behave(rest: list[str], body: bytes) -> tuple[int, Any]:
        backend.faults.clear(rest[0] if rest else None)
        return 200, {"faults": backend.faults.active}

    def goaway(rest: list[str], body: bytes) -> tuple[int, Any]:
        data = msgspec.json.decode(body, type=GoawayData)
        return 200, {"agents": backend.goaway(data.reconnect_after, data.window)}

    def settings(rest: list[str], body: bytes) -> tuple[int, Any]:
        data = msgspec.json.decode(body, type=SettingsData)
        return 200, {"agents": backend.push_settings(data.heartbeat_interval, data.inventory_interval)}

    api = Resource()
    api.putChild(b"state", ControlResource({b"GET": state}))
    api.putChild(b"stream", EventStream(backend))
    api.putChild(b"commands", ControlResource({b"POST": send, b"GET": command}))
    api.putChild(b"faults", ControlResource({b"POST": misbehave, b"DELETE": behave}))
    api.putChild(b"goaway", ControlResource({b"POST": goaway}))
    api.putChild(b"settings", ControlResource({b"POST": settings}))
    return api
