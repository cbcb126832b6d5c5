"""
The upgrade (RFC 6455 section 4), with and without the short way of plain answers: autobahn's verdicts are the same.

The request is held against the one that autobahn would write.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from autobahn.twisted.websocket import WebSocketClientProtocol
from autobahn.websocket.types import ConnectingRequest
from twisted.internet.error import ConnectionDone

from commsmgr import config
from commsmgr.transport import guarded
from commsmgr.transport.bare import BareProtocol
from commsmgr.transport.handshake import UpgradeRequest, is_plainly_accepted
from tests.websocket_kit import TEXT, MemoryTestCase, accept, close_frame, frame

PLAIN: tuple[bytes, ...] = (
    b"%(answer)s",
    b"%(answer)s" + frame(TEXT, b"early"),
    b"%(answer)s" + frame(TEXT, b"ea", fin=False),
    b"%(answer)s" + close_frame(1001, b"away"),
    b"%(answer)s" + b"nonsense",
    b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n%(answer)s",
)
"""What may come with, or before, a good answer."""

FIELDS: tuple[str, ...] = (
    "Sec-WebSocket-Protocol: commsmgr.v1",
    "sec-websocket-protocol:commsmgr.v1 ",
    "Sec-WebSocket-Protocol: second",
    "Sec-WebSocket-Protocol:",
    "Sec-WebSocket-Protocol: other",
    "Sec-WebSocket-Protocol: COMMSMGR.V1",
    "Sec-WebSocket-Protocol: commsmgr.v1, second",
    "Sec-WebSocket-Protocol: commsmgr.v1\r\nSec-WebSocket-Protocol: commsmgr.v1",
    "Sec-WebSocket-Extensions:",
    "Sec-WebSocket-Extensions: permessage-deflate",
    "Sec-WebSocket-Extensions: other",
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Connection: Upgrade",
    "Connection: keep-alive",
    "Server: x\r\nDate: y",
    "Set-Cookie: a\r\nSet-Cookie: b",
    ": nothing",
    ": nothing\r\n: nothing",
    "no colon",
    " folded",
    "X: \xff\x85",
)
"""Further fields of an answer that is good without them."""

EDITS: tuple[tuple[bytes, bytes], ...] = (
    (b"Upgrade: websocket\r\n", b""),
    (b"Upgrade: websocket", b"Upgrade: WebSocket"),
    (b"Upgrade: websocket", b"UPGRADE:websocket\t"),
    (b"Upgrade: websocket", b"Upgrade: websocket, x"),
    (b"Upgrade: websocket", b"Upgrade : websocket"),
    (b"Connection: Upgrade\r\n", b""),
    (b"Connection: Upgrade", b"connection: upgrade"),
    (b"Connection: Upgrade", b"Connection: keep-alive, Upgrade"),
    (b"Connection: Upgrade", b"Connection: close"),
    (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: x"),
    (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept:"),
    (b"Sec-WebSocket-Accept: ", b"X: "),
    (b"=\r\n", b"\r\n"),
    (b"101 Switching Protocols", b"101"),
    (b"101 Switching Protocols", b"101 "),
    (b"HTTP/1.1", b"HTTP/1.0"),
    (b"HTTP/1.1", b"HTTP/2"),
    (b"HTTP/1.1", b"HTTQ/1.1"),
    (b"101", b"200"),
    (b"101", b"1010"),
    (b"\r\n", b"\n"),
)
"""Replacements in a good answer."""


class AnswerTests(MemoryTestCase):
    """Every answer, with the short way and without it."""

    subprotocols = ("commsmgr.v1", "second")

    def play(self, template: bytes, fields: tuple[str, ...], edit: tuple[bytes, bytes], pieces: bool) -> list[object]:
        """Return all that is to be seen of a connection whose upgrade is answered like that."""
        self.handler.__init__()  # type: ignore[misc]
        client = self.make_client(entropy=lambda size: bytes(range(size)))
        client.start()
        transport = self.endpoint.succeed()
        answer = accept(transport.take(), *fields).replace(*edit)
        data = template.replace(b"%(answer)s", answer)
        for piece in [data[at : at + 1] for at in range(len(data))] if pieces else [data]:
            if not transport.aborted:
                transport.protocol.dataReceived(piece)
        seen: list[object] = [list(self.handler.events), transport.aborted, transport.take()]
        seen += [self.handler.messages, [connection.subprotocol for connection in self.handler.connections]]
        transport.lose(ConnectionDone())
        seen += [(type(error), str(error)) for _, error in self.handler.ended]
        self.successResultOf(client.stop())
        self.settle()
        return seen

    def both(self, template: bytes, fields: tuple[str, ...] = (), edit: tuple[bytes, bytes] = (b"", b"")) -> bool:
        """Play an answer in every way, compare what is to be seen, and return whether the short way was taken."""
        taken: list[bool] = []

        def noted(*arguments: Any) -> bool:
            taken.append(is_plainly_accepted(*arguments))
            return taken[-1]

        outcomes = []
        for pieces in (False, True):
            for short_way in (noted, lambda *_: False):
                patch = self.patch(guarded, "is_plainly_accepted", short_way)
                outcomes.append(self.play(template, fields, edit, pieces))
                patch.restore()
            self.assertEqual(outcomes[-2], outcomes[-1], (template, fields, edit))
        return any(taken)

    def test_plain(self) -> None:
        """A good answer goes the short way, whatever comes with it."""
        for template in PLAIN:
            self.assertTrue(self.both(template), template)
            self.assertTrue(self.both(template, FIELDS[:1]), template)

    def test_fields(self) -> None:
        """Further fields, of which some make the answer a bad one."""
        taken = [field for field in FIELDS if self.both(b"%(answer)s", (field,))]
        self.assertEqual(len(taken), 9, taken)

    def test_edits(self) -> None:
        """Answers that lack something, or say it differently."""
        taken = [edit for edit in EDITS if self.both(b"%(answer)s", FIELDS[:1], edit)]
        self.assertEqual(len(taken), 10, taken)

    def test_compression(self) -> None:
        """Where compression was agreed autobahn has judged it."""
        self.settings = config.WebSocket(connect_timeout=20.0, compress=True)
        self.assertFalse(
            self.both(b"%(answer)s" + frame(TEXT, b"plain"), ("Sec-WebSocket-Extensions: permessage-deflate",))
        )


class RequestTests(MemoryTestCase):
    """The request for the upgrade."""

    def autobahn(self, request: UpgradeRequest, offers: list[Any]) -> bytes:
        """Return the request that autobahn writes."""
        written: list[bytes] = []
        protocol: Any = BareProtocol()
        protocol.perMessageCompressionOffers = offers
        protocol.sendData = written.append
        host, _, port = request.host.rpartition(":")
        headers = dict(request.headers)
        options = ConnectingRequest(
            host=host,
            port=int(port),
            resource=request.path,
            useragent=headers.pop("User-Agent", None),
            headers=headers,
            protocols=list(request.protocols),
        )
        WebSocketClientProtocol._actuallyStartHandshake(protocol, options)
        key = protocol.websocket_key
        return written[0].replace(key, b64encode(bytes(range(16))))

    def test_as_autobahn_writes_it(self) -> None:
        """The lines are autobahn's, each with what stands in it."""
        for settings in (config.WebSocket(), config.WebSocket(compress=True)):
            for headers in (None, {"X-Site": "7"}, {"User-Agent": "mine"}):
                for subprotocols in ((), ("commsmgr.v1",), ("commsmgr.v1", "second")):
                    client = self.make_client(
                        settings=settings,
                        headers=headers,
                        subprotocols=subprotocols,
                        entropy=lambda size: bytes(range(size)),
                    )
                    client.start()
                    ours = self.endpoint.succeed().take()
                    given = {"Authorization": "Bearer t0ken"}
                    theirs = self.autobahn(client._request(given), client.perMessageCompressionOffers)
                    self.assertEqual(sorted(ours.split(b"\r\n")), sorted(theirs.split(b"\r\n")))
                    self.assertEqual(ours.split(b"\r\n")[0], theirs.split(b"\r\n")[0])
                    self.assertTrue(ours.endswith(b"\r\n\r\n"))
                    client.stop()
                    self.settle()
