"""
The agents' HTTP calls: heartbeat, inventory, result (RFC 9110), relative to the base URL.

Requests are judged in this order: the faults in force, Origin (403), the token (401), the size (413), the encoding
(400, 415), the idempotency key (a repeated one gets the same answer and nothing is done again; with another body it
gets 422), and then the message itself. Only successes are remembered under their key: an error may be cured.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from commsmgr.backend import ledger
from commsmgr.backend.events import EventLog
from commsmgr.backend.faults import CAPTIVE_PORTAL, Faults, malformed
from commsmgr.backend.plain import LooseResult, Undecodable, decode
from commsmgr.backend.switchboard import DIALECT_V1, Switchboard
from commsmgr.messages import HeartbeatAnswer, Id, InventoryAnswer, LossReport
from commsmgr.session.wire import encode


class Refused(Exception):
    """
    A request is answered with an error.

    :param status: the HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Answer(Struct, kw_only=True):
    """What a request is answered with."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = {}


class AgentHTTP:
    """
    What the agents' calls have in common.

    :param authorised: says whether the value of an ``Authorization`` header (or None) is good enough.
    :param max_body_bytes: of a body, after decompression too.
    :param quirks: errors are HTML, as some plain backends' are.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        switchboard: Switchboard,
        events: EventLog,
        faults: Faults,
        *,
        authorised: Callable[[str | None], bool],
        dialects: tuple[str, ...],
        max_body_bytes: int,
        quirks: bool,
    ) -> None:
        self.reactor = reactor
        self.switchboard = switchboard
        self.events = events
        self.faults = faults
        self.authorised = authorised
        self.v1 = DIALECT_V1 in dialects
        self.max_body_bytes = max_body_bytes
        self.quirks = quirks

    # -- the three calls --------------------------------------------------------------------------------------------

    def heartbeat(self, body: bytes) -> bytes:
        """``POST /heartbeat``."""
        message = decode(body, _Heartbeat)
        if not message.machine_id:
            raise Refused(400, "machine_id is missing")
        switchboard, machine_id = self.switchboard, message.machine_id
        v1 = self.v1 and message.acked_commands is not None
        losses = self._losses(message) if v1 else None
        with switchboard.ledger.transaction():
            switchboard.ledger.seen(machine_id, DIALECT_V1 if v1 else "")
            switchboard.ledger.heartbeat(machine_id, body)
            if v1:
                switchboard.acked(machine_id, message.acked_commands or [], "http")
                if losses is not None:
                    switchboard.losses(machine_id, losses, "http")
            switchboard.tell("heartbeat", machine_id=machine_id, transport="http", note=message.status)
        return encode(
            HeartbeatAnswer(
                status="ok",
                timestamp=switchboard.timestamp(),
                message="heartbeat received",
                commands=switchboard.for_heartbeat(machine_id) if v1 else [],
                acked_losses=losses.id if losses is not None else "",
                inventory_checksum=switchboard.ledger.inventory_checksum_of(machine_id) if v1 else None,
            )
        )

    def _losses(self, message: _Heartbeat) -> LossReport | None:
        """Return the loss receipt in a heartbeat, which counts as a heartbeat all the same when that is malformed."""
        try:
            delivery: _Delivery = decode(bytes(message.delivery), _Delivery)
        except Undecodable as error:
            self.events.emit(
                "refused", machine_id=message.machine_id or "", transport="http", note=f"losses not understood: {error}"
            )
            return None
        return delivery.losses

    def inventory(self, body: bytes) -> bytes:
        """``POST /inventory``."""
        message = decode(body, _Inventory)
        if not message.machine_id:
            raise Refused(400, "machine_id is missing")
        digest = hashlib.sha256(bytes(message.data)).hexdigest()
        if message.checksum != digest:
            raise Refused(400, f"the checksum does not match: the SHA-256 of data as received is {digest}")
        with self.switchboard.ledger.transaction():
            self.switchboard.ledger.seen(message.machine_id)
            self.switchboard.ledger.inventory(message.machine_id, body, digest)
            self.switchboard.tell(
                "inventory",
                machine_id=message.machine_id,
                transport="http",
                note=f"{len(body)} bytes",
                detail={"checksum": digest},
            )
        return encode(InventoryAnswer(status="ok", checksum_received=digest))

    def result(self, body: bytes) -> bytes:
        """``POST /commands/result``."""
        result = decode(body, LooseResult).strict()
        (receipt,) = self.switchboard.results([(result, encode(result))], "http")
        if receipt == "unknown":
            raise Refused(404, f"there is no command {result.command_id}")
        return msgspec.json.encode({"status": "ok", "message": receipt})

    # -- answering --------------------------------------------------------------------------------------------------

    def answer(self, request: Request, call: Callable[[bytes], bytes]) -> Answer:
        """Judge a request that no fault took away, and do what it asks."""
        try:
            return Answer(body=self._judge(request, call))
        except Undecodable as error:
            refused = Refused(400, str(error))
        except Refused as error:
            refused = error
        path = request.path.decode("latin-1")
        self.events.emit("refused", transport="http", note=f"{refused.status} {path}: {refused}")
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
        if self.quirks:
            page = b"<html><body><h1>Error</h1></body></html>"
            return Answer(status=refused.status, body=page, content_type="text/html", headers=headers)
        problem = msgspec.json.encode({"status": "error", "message": str(refused)})
        return Answer(status=refused.status, body=problem, headers=headers)

    def _judge(self, request: Request, call: Callable[[bytes], bytes]) -> bytes:
        if request.getHeader("origin") is not None:
            # Every browser sends it with a POST. Without a token any page could pretend to be an agent.
            raise Refused(403, "an agent is no web page: expected no Origin")
        if not self.authorised(request.getHeader("authorization")):
            raise Refused(401, "the bearer token is missing or wrong")
        body = self._body(request)
        key = request.getHeader("idempotency-key")
        if not key:
            return call(body)
        key = f"{request.path.decode('latin-1')} {key}"
        fingerprint = hashlib.sha256(body).digest()
        known = self.switchboard.ledger.answer(key)
        if known is not None:
            if known.fingerprint != fingerprint:
                raise Refused(422, "this Idempotency-Key came before with another body")
            return known.body
        # One transaction: a key that is remembered without its effect would lose the message.
        with self.switchboard.ledger.transaction():
            answer = call(body)
            self.switchboard.ledger.remember(key, ledger.Answer(fingerprint, 200, answer))
        return answer

    def _body(self, request: Request) -> bytes:
        if isinstance(request, BoundedRequest) and request.too_large:
            raise Refused(413, f"a body may have {self.max_body_bytes} bytes")
        content = request.content
        body = content.read() if content is not None else b""
        encoding = (request.getHeader("content-encoding") or "identity").strip().lower()
        if encoding == "gzip":
            return self._inflate(body)
        if encoding != "identity":
            raise Refused(415, f"content encoding {encoding!r} is not supported")
        return body

    def _inflate(self, body: bytes) -> bytes:
        inflater = zlib.decompressobj(wbits=31)
        try:
            plain = inflater.decompress(body, self.max_body_bytes + 1)
        except zlib.error as error:
            raise Refused(400, f"the body is not gzip: {error}") from None
        if len(plain) > self.max_body_bytes:
            raise Refused(413, f"a body may have {self.max_body_bytes} bytes after decompression")
        if not inflater.eof:
            raise Refused(400, "the gzip body is cut short")
        return plain


class _Heartbeat(Struct, kw_only=True):
    machine_id: Id | None = None
    status: str = ""
    acked_commands: list[Id] | None = None
    delivery: msgspec.Raw = msgspec.Raw(b"{}")
    """Looked into for commsmgr.v1 only: a stranger may mean anything by it."""


class _Delivery(Struct, kw_only=True):
    losses: LossReport | None = None


class _Inventory(Struct, kw_only=True):
    machine_id: Id | None = None
    checksum: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")


class AgentCall(Resource):
    """One of the agents' calls, with the faults around it."""

    isLeaf = True

    def __init__(self, agents: AgentHTTP, call: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._agents = agents
        self._call = call

    def render(self, request: Request) -> int:
        """Answer a POST; 405 to anything else, also to HEAD, for which Twisted would look for a GET."""
        if request.method == b"POST":
            return self.render_POST(request)
        problem = b'{"status":"error","message":"only POST is possible here"}'
        _finish(request, Answer(status=405, body=problem, headers={"Allow": "POST"}))
        return NOT_DONE_YET

    def render_POST(self, request: Request) -> int:
        faults = self._agents.faults
        entrance: Any = request.channel.transport
        entrance.messages += 1
        if faults.strike("drop", "http", entrance.messages):
            entrance.abortConnection()
            return NOT_DONE_YET
        if faults.strike("hang", "http"):
            return NOT_DONE_YET
        crash = None
        if fault := faults.strike("status", "http"):
            answer = Answer(status=fault.status, body=b'{"status":"error","message":"told to misbehave"}')
            if fault.retry_after is not None:
                answer.headers["Retry-After"] = f"{fault.retry_after:.0f}"
        elif faults.strike("html", "http"):
            answer = Answer(body=CAPTIVE_PORTAL, content_type="text/html")
        else:
            crash = faults.strike("crash", "http")
            if crash is None or crash.stored:
                answer = self._agents.answer(request, self._call)
        if crash is not None:
            entrance.abortConnection()
            return NOT_DONE_YET
        if fault := faults.strike("malformed", "http"):
            answer.body = malformed(fault.form)[0]
        if slow := faults.strike("slow", "http"):
            later = self._agents.reactor.callLater(slow.delay, _finish, request, answer)
            request.notifyFinish().addErrback(lambda _: later.cancel())
        else:
            _finish(request, answer)
        return NOT_DONE_YET


def _finish(request: Request, answer: Answer) -> None:
    request.setResponseCode(answer.status)
    request.setHeader("Content-Type", answer.content_type)
    request.setHeader("Content-Length", str(len(answer.body)))
    for name, value in answer.headers.items():
        request.setHeader(name, value)
    request.write(answer.body)
    request.finish()


class BoundedRequest(Request):
    """
    A request whose body beyond the limit is read and thrown away.

    Closing the connection instead would often destroy the 413 on its way to an agent that is still sending.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.too_large = False
        self._bytes = 0
        self._limit: int = self.channel.site.max_body_bytes  # type: ignore[attr-defined]  # set by Site

    def handleContentChunk(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes <= self._limit:
            super().handleContentChunk(data)
        else:
            self.too_large = True


class BoundedSite(Site):
    """A site on the reactor that it was given and nothing else: no access log, no timer for the log's clock."""

    noisy = False

    def __init__(self, reactor: IReactorTime, root: Resource, max_body_bytes: int) -> None:
        super().__init__(root, requestFactory=BoundedRequest, reactor=reactor, parsePOSTFormSubmission=False)
        self.displayTracebacks = False
        self.max_body_bytes = max_body_bytes

    def startFactory(self) -> None:
        """No log file."""

    def stopFactory(self) -> None:
        """No log file."""

    def log(self, request: HTTPRequest) -> None:
        """Nothing: the events tell more."""
