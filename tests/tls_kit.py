"""
What the TLS tests share: the two transports of the package, and curl, all sent to one real listener.

curl is Debian's, a process of its own with another build of OpenSSL: what it says of a listener is a second opinion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import TestCase

from commsmgr import config
from commsmgr.errors import CommsError
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.http import HTTPClient
from commsmgr.transport.websocket import WebSocketClient
from commsmgr.urls import Target
from tests.certificates import Authority
from tests.loopback import FixedResolver, ReactorWith, Recorder, Recording, listen, real
from tests.websocket_kit import RecordingHandler, accept

CURL = "/usr/bin/curl"
HOST = "backend.example"
TOKEN = "token-that-nobody-may-see"
TIMEOUT = 20.0


def answer(recorder: Recorder) -> None:
    """Answer a request or an upgrade, as a backend that means well does."""
    if recorder.received.endswith(b"\r\n\r\n"):
        upgrade = b"Sec-WebSocket-Key" in recorder.received
        recorder.transport.write(
            accept(recorder.received) if upgrade else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
        )


class TransportsCase(TestCase):
    """
    Listeners, and three clients for them.

    :cvar authority: the one that is trusted.
    :ivar server: whatever listens; replace it before :meth:`listen`.
    """

    timeout = 60
    authority = Authority("Test CA")

    def setUp(self) -> None:
        self.ca_file = self.authority.save_pem(os.path.join(self.mktemp(), "ca.pem"))
        self.server = Recording(answer)
        self.reactor = ReactorWith(resolver=FixedResolver(["127.0.0.1"]))

    def listen(self, context: Any, host: str = HOST) -> int:
        """Let :attr:`server` listen where ``host`` leads; ``context`` is None for plain TCP. Return the port."""
        return listen(self, self.server, tls=context, interface="::1" if ":" in host else "127.0.0.1")

    def dialer(self, **settings: Any) -> Dialer:
        """Return a dialler that trusts :attr:`authority`, but for ``settings``."""
        settings.setdefault("ca_file", self.ca_file)
        return Dialer(self.reactor, config.TLS(**settings))

    async def by_http(self, port: int, host: str = HOST, **settings: Any) -> CommsError | None:
        """Send a request; return the error, or None when it was answered."""
        client = HTTPClient(self.reactor, self.dialer(**settings), config.HTTP(timeout=TIMEOUT))
        try:
            response = await client.exchange("GET", Target("https", host, port, ""), "/", token=TOKEN)
            self.assertEqual(response.body, b"OK")
            return None
        except CommsError as error:
            return error
        finally:
            await client.close()

    async def by_websocket(self, port: int, host: str = HOST, **settings: Any) -> CommsError | None:
        """Open a WebSocket; return the error, or None when it was opened."""
        over: Deferred[None] = Deferred()
        handler = RecordingHandler()
        handler.headers = lambda: _given({"Authorization": f"Bearer {TOKEN}"})
        handler.delay = 3600.0
        handler.on = {"opened": lambda *_: over.callback(None), "ended": lambda *_: over.called or over.callback(None)}
        client = WebSocketClient(
            self.reactor,
            Target("wss", host, port, "/ws"),
            dialer=self.dialer(**settings),
            handler=handler,
            settings=config.WebSocket(connect_timeout=TIMEOUT),
            subprotocols=[],
        )
        client.start()
        try:
            await over
            return None if handler.connections else handler.error
        finally:
            await client.stop(close_within=0.01)

    async def by_curl(self, port: int, host: str = HOST, arguments: Sequence[str] = ()) -> tuple[int, str]:
        """Send a request with curl; return its exit code, which is 0 when all is well, and what it says."""
        where = f"[{host}]" if ":" in host else host
        out, err, code = await getProcessOutputAndValue(
            CURL,
            # -q first: no file of the user's counts.
            ["-q", "-sS", "--http1.1", "--noproxy", "*", "--max-time", "30", "--cacert", self.ca_file]
            + ["--resolve", f"{host}:{port}:127.0.0.1"] * (host == HOST)
            + [*arguments, f"https://{where}:{port}/"],
            env={},
            reactor=real,
        )
        return code, (out + err).decode("utf-8", "replace")

    async def gone(self) -> None:
        """Wait until all connections that were accepted are gone."""
        for recorder in self.server.connections:
            await recorder.lost


def _given(headers: dict[str, str]) -> Deferred[Any]:
    given: Deferred[Any] = Deferred()
    given.callback(headers)
    return given
