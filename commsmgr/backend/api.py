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

It asks for no token, and so answers only to this machine: the peer must be on the loopback, the Host header must name
it (against DNS rebinding), and what changes anything must come with ``Content-Type: application/json`` and, if the
sender is a browser, from the console's own origin (against other sites).
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import msgspec
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

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
            check(request)
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
        request.setHeader("Cache-Control", "no-store")
        request.setHeader("X-Content-Type-Options", "nosniff")
        return msgspec.json.encode(answer)


def check(request: Request) -> None:
    """
    Refuse whoever is not this machine's user.

    :raise _Problem: 403, with the reason.
    """
    if not ip_address(getattr(request.getClientAddress(), "host", "0.0.0.0").partition("%")[0]).is_loopback:
        raise _Problem(403, "the control API answers only to the machine that the backend runs on")
    host = request.getHeader("host") or ""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if not _is_loopback(name):
        raise _Problem(403, "the Host header does not name this machine")
    if request.method in (b"GET", b"HEAD"):
        return
    origin = request.getHeader("origin")
    if origin is not None and origin != f"{'https' if request.isSecure() else 'http'}://{host}":
        raise _Problem(403, "requests from other sites are refused")
    if request.method == b"POST" and (request.getHeader("content-type") or "").partition(";")[0] != "application/json":
        raise _Problem(415, "expected Content-Type: application/json")


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"


class EventStream(Resource):
    """Events as they happen (HTML Living Standard, section 9.2); begins with the recent ones that the client lacks."""

    isLeaf = True

    def __init__(self, backend: ReferenceBackend) -> None:
        super().__init__()
        self._backend = backend

    def render_GET(self, request: Request) -> bytes | int:
        try:
            check(request)
        except _Problem as problem:
            request.setResponseCode(problem.status)
            return str(problem).encode()
        request.setHeader("Content-Type", "text/event-stream")
        request.setHeader("Cache-Control", "no-store")
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
