"""Who is let in: the bearer token, which WebSocket upgrades are refused, and the server's own TLS."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from OpenSSL.SSL import TLS1_2_VERSION, TLS_SERVER_METHOD, Context
from twisted.internet.ssl import DefaultOpenSSLContextFactory

from commsmgr.backend.entrance import Headers, Refusal
from commsmgr.backend.events import EventLog
from commsmgr.backend.faults import CAPTIVE_PORTAL, Faults
from commsmgr.backend.switchboard import DIALECT_PLAIN, DIALECT_V1


class Gate:
    """
    Judges who asks to be let in.

    :param dialects: those that are spoken.
    :param websocket_path: where WebSockets are accepted.
    :param check_token_on_upgrade: whether a WebSocket needs the token; None: if commsmgr.v1 will be spoken on it.
    :ivar token: the bearer token (RFC 6750); empty: none is needed.
    """

    def __init__(
        self,
        faults: Faults,
        events: EventLog,
        *,
        token: str,
        dialects: Sequence[str],
        websocket_path: str,
        check_token_on_upgrade: bool | None,
    ) -> None:
        self._faults = faults
        self._events = events
        self._dialects = dialects
        self._websocket_path = websocket_path
        self._check_token_on_upgrade = check_token_on_upgrade
        self.token = token

    def authorised(self, header: str | None) -> bool:
        """Return whether the value of an ``Authorization`` header is good enough; None: there was none."""
        if not self.token:
            return True
        scheme, _, token = (header or "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self.token.encode())

    def refuse_upgrade(self, path: str, headers: Headers) -> Refusal | None:
        """Return how an upgrade is refused, or None when it is welcome."""
        if fault := self._faults.strike("status", "websocket"):
            return fault.status, {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:.0f}"}, b""
        if self._faults.strike("html", "websocket"):
            return 200, {"Content-Type": "text/html"}, CAPTIVE_PORTAL
        refusal = self._judge(path, headers)
        if refusal is not None:
            self._events.emit("refused", transport="websocket", note=f"{refusal[0]} upgrade of {path[:200]}")
        return refusal

    def _judge(self, path: str, headers: Headers) -> Refusal | None:
        offered = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
        v1 = DIALECT_V1 in offered and DIALECT_V1 in self._dialects
        if "origin" in headers:
            # Every browser sends it with an upgrade (RFC 6455 section 4.1), whatever page asks, and no agent does.
            return 403, {}, b"an agent is no web page: expected no Origin"
        if path != self._websocket_path:
            return 404, {}, b""
        if not v1 and DIALECT_PLAIN not in self._dialects:
            return 400, {}, b"expected Sec-WebSocket-Protocol: commsmgr.v1"
        check = v1 if self._check_token_on_upgrade is None else self._check_token_on_upgrade
        if check and not self.authorised(headers.get("authorization")):
            return 401, {"WWW-Authenticate": "Bearer"}, b""
        return None


class ServerTLS(DefaultOpenSSLContextFactory):
    """The server's TLS context from PEM files, with the whole chain; TLS 1.2 at least."""

    def cacheContext(self) -> None:
        context = Context(TLS_SERVER_METHOD)
        context.set_min_proto_version(TLS1_2_VERSION)
        context.use_certificate_chain_file(self.certificateFileName)
        context.use_privatekey_file(self.privateKeyFileName)
        self._context = context
