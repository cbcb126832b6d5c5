"""
autobahn's WebSocket protocol with a guard around it.

autobahn knows RFC 6455 well, but lets exceptions escape from ``dataReceived``, leaves zombies when a callback raises,
trusts the HTTP answer, times things on the global reactor and takes its masks from the global random generator. Here it
does none of that: what it raises ends this connection and goes no further, its timers are off
(:mod:`~commsmgr.transport.attempt` has one of its own), :mod:`~commsmgr.transport.handshake` writes the request and
reads the answer first, and :mod:`~commsmgr.transport.frames` writes all frames and reads the plain ones.

Once :meth:`GuardedProtocol.drop` was called, or the peer's close frame has come, nothing that arrives counts any more
(RFC 6455 section 5.5.1).

What a peer can make us do is bounded too. Each frame takes a token of :class:`~commsmgr.policy.rate.TokenBucket`,
whether it ever becomes a message or not, and so do packets that begin none and each :data:`UNIT` bytes of a message,
counted when it is unpacked. When there is none left nothing more is read, and the connection ends, with close code 1008
(RFC 6455 section 7.4.1). Reading more slowly instead would be no mercy: what is behind the flood, pongs and
receipts, would come so late that the link would be taken for dead, and the flood would begin anew on the next one.
"""

# mypy: allow-untyped-calls
# Twisted and autobahn are typed in parts only.

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from autobahn.util import encode_truncate
from autobahn.websocket.protocol import WebSocketProtocol
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr.errors import CommsError, PeerViolation, RateExceeded, TransportError
from commsmgr.policy.rate import TokenBucket
from commsmgr.transport.answer_head import MAX_HEAD_BYTES, SWITCHING_PROTOCOLS
from commsmgr.transport.bare import BareProtocol
from commsmgr.transport.frames import encode_frame, unfragmented_texts
from commsmgr.transport.handshake import KEY_BYTES, UpgradeRequest, clean, is_plainly_accepted, read_head, refusal

NO_STATUS: Final = 1005
"""What stands for the code of a close frame without one (RFC 6455 section 7.4.1)."""

MAX_CONTROL_BYTES: Final = 125

PONGS: Final = 64 << 10
"""Bytes of pongs that are written without a proof that the peer reads them."""

UNIT: Final = 4096
"""Bytes of a message that count as much as a frame: decoding them takes about as long."""

FLOODED: Final = (1008, "too many messages")
"""Close code (RFC 6455 section 7.4.1) and reason for a peer that sends too much."""

_TEXT: Final = 1


class ProtocolOwner(Protocol):
    """What a :class:`GuardedProtocol` tells, and asks, as it goes. None of these raises."""

    def connected(self, protocol: GuardedProtocol) -> UpgradeRequest: ...

    def opened(self) -> None: ...

    def heard(self) -> None: ...

    def received(self, payload: bytes, is_text: bool) -> None: ...

    def pong(self, payload: bytes) -> None: ...

    def peer_closed(self, code: int, reason: str) -> None: ...

    def violated(self, error: CommsError) -> None:
        """The peer broke a rule, and our close frame that says so is on its way."""

    def flooded(self, error: CommsError) -> None:
        """The peer sends too much, and is not listened to any more; it is yet to be told so, by :attr:`FLOODED`."""

    def drop(self, error: CommsError) -> None:
        """There is nothing left to say: the connection must go."""


class GuardedProtocol(BareProtocol):
    """
    One WebSocket connection.

    :param entropy: returns that many random bytes, for the key (RFC 6455 section 4.1) and masks (section 10.3).
    :param wall: seconds since the epoch, for dates in Retry-After.
    :param rate: how much may come; shared with the connections before and after this one.
    """

    transport: Any  # TCP's or TLS's
    _log = Logger()

    def __init__(
        self,
        owner: ProtocolOwner,
        entropy: Callable[[int], bytes],
        wall: Callable[[], float],
        rate: TokenBucket,
    ) -> None:
        super().__init__()
        self._owner = owner
        self._entropy = entropy
        self._wall = wall
        self._rate = rate
        self._deaf = False
        self._frame_begun = False
        self._message = bytearray()
        self._heads = 0
        self._pongs = 0
        self._proof = b""
        self._latest: bytes | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    @property
    def tls_version(self) -> str:
        """The TLS version spoken, such as ``TLSv1.3``; empty without TLS."""
        transport = self.transport
        secure = ISSLTransport.providedBy(self.transport)
        return str(transport.getHandle().get_protocol_version_name()) if secure else ""

    def send_texts(self, payloads: Sequence[bytes]) -> bool:
        """Send each as one text message, all in one write; return False when the WebSocket is not open."""
        if self.state != WebSocketProtocol.STATE_OPEN:
            return False
        if self._perMessageCompress is None:
            masks = self._entropy(4 * len(payloads))
            self.transport.writeSequence(
                [
                    encode_frame(_TEXT, payload, masks[4 * index : 4 * index + 4])
                    for index, payload in enumerate(payloads)
                ]
            )
        else:
            # autobahn applies its one limit in both directions; ours is for what we take.
            limit, self.maxMessagePayloadSize = self.maxMessagePayloadSize, 0
            try:
                for payload in payloads:
                    self.sendMessage(payload)
            finally:
                self.maxMessagePayloadSize = limit
        return True

    def send_ping(self, payload: bytes) -> bool:
        """Send a ping frame; return False when the WebSocket is not open."""
        if self.state != WebSocketProtocol.STATE_OPEN:
            return False
        self.sendFrame(9, payload)
        return True

    def answered(self) -> None:
        """What came just now was the answer to something that we sent: it is not the peer who makes us busy."""
        self._rate.give_back()

    def send_close(self, code: int, reason: str) -> None:
        """Send a close frame; the reason is cut to what such a frame can bear."""
        # Not sendClose(): that one allows no other standard code than 1000.
        self.sendCloseFrame(code, encode_truncate(reason, MAX_CONTROL_BYTES - 2))

    def drop(self) -> None:
        """Abort the transport, whatever stands in its buffers; its end is then heard of as that of any other."""
        self._deaf = True
        try:
            # So that autobahn stops in the middle of what it was working on.
            self.dropConnection(abort=True)
        except Exception:
            self._log.failure("autobahn failed while its connection was dropped", event="websocket.fault")
        self.transport.abortConnection()

    # -----------------------------------------------------------------------------------------------------------------
    # Guards around autobahn's entries

    def connectionMade(self) -> None:
        self._guarded(super().connectionMade)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._deaf = True
        self._guarded(super().connectionLost, reason)

    def dataReceived(self, data: bytes) -> None:
        if self._deaf:
            return
        self._owner.heard()
        self._frame_begun = False
        # What autobahn's own method does, without its statistics; they cost more than a small message.
        self.data += data
        self.consumeData()
        if not self._frame_begun:
            self._count()

    def consumeData(self) -> None:
        # autobahn calls this by itself too, with what came in one packet with the answer to the upgrade.
        if self._deaf:
            return
        self._guarded(super().consumeData)
        if self.failedByMe and not self._deaf:
            self._owner.violated(PeerViolation(f"closed with {self.localCloseCode}: {_text(self.localCloseReason)}"))

    def processData(self) -> bool:
        # autobahn's step, which it repeats while there is data. Plain messages before what is left to it are taken
        # here. Once it has failed the connection no message counts.
        if self.current_frame is None and not self.inside_message and not self.failedByMe:
            payloads, taken = unfragmented_texts(self.data, self.maxMessagePayloadSize)
            if taken:
                self.data = self.data[taken:]
                self._frame_begun = True
                for payload in payloads:
                    if not self._rate.take():
                        self._flooded()
                    elif len(payload) >= UNIT:
                        self._count(len(payload) // UNIT)
                    if self._deaf:
                        return False
                    self._owner.received(payload, True)
                if self._deaf or not self.data:
                    return False
        return bool(super().processData())

    def _guarded(self, step: Callable[..., object], *args: object) -> None:
        try:
            step(*args)
        except Exception as error:
            self._log.failure("autobahn failed; the connection is dropped", event="websocket.fault")
            self._owner.drop(PeerViolation(f"what the backend sent could not be processed: {type(error).__name__}"))

    def _count(self, units: int = 1) -> None:
        """Something came that makes work; end the connection when it is too much."""
        if not self._rate.take(units) and not self._deaf:
            self._flooded()

    def _flooded(self) -> None:
        error = RateExceeded("closed with 1008: it sends more messages than websocket.max_message_rate")
        self.data = b""
        if self.state == WebSocketProtocol.STATE_OPEN:
            self._deaf = True
            # To read it away would be work again.
            self.transport.pauseProducing()
            self._owner.flooded(error)
        else:
            self._owner.drop(error)

    def unregisterProducer(self) -> None:
        # None is ever registered, and not every transport likes to be told so.
        pass

    # -----------------------------------------------------------------------------------------------------------------
    # The upgrade

    def startHandshake(self) -> None:
        request = self._owner.connected(self)
        self.websocket_key = b64encode(self._entropy(KEY_BYTES))
        extensions = [offer.get_extension_string() for offer in self.perMessageCompressionOffers]
        self.transport.write(request.encoded(self.websocket_key, extensions))

    def processHandshake(self) -> None:
        try:
            head = read_head(self.data)
            while head is not None and head.is_interim:
                self._heads += head.end
                if self._heads > MAX_HEAD_BYTES:
                    raise PeerViolation(f"interim answers to the WebSocket upgrade exceed {MAX_HEAD_BYTES} bytes")
                self.data = self.data[head.end :]
                head = read_head(self.data)
        except TransportError as error:
            self._owner.drop(error)
            return
        if head is None:
            return
        if head.status != SWITCHING_PROTOCOLS:
            self._owner.drop(refusal(head, self._wall()))
            return
        if is_plainly_accepted(head, self.websocket_key, self.factory.protocols):
            self.data = self.data[head.end :]
            self.enter_open(head.headers.get("sec-websocket-protocol") or None)
        else:
            self.data = clean(head) + self.data[head.end :]
            super().processHandshake()

    def failHandshake(self, reason: str) -> None:
        self._owner.drop(PeerViolation(f"the answer to the WebSocket upgrade is wrong: {reason[:200]}"))

    # -----------------------------------------------------------------------------------------------------------------
    # What autobahn calls

    def onOpen(self) -> None:
        self._owner.opened()

    def onFrameBegin(self) -> None:
        self._frame_begun = True
        self._count()
        super().onFrameBegin()

    # autobahn keeps the pieces of a message in lists, where each of them, empty ones included, takes more memory than
    # any limit of bytes accounts for.

    def onMessageBegin(self, isBinary: bool) -> None:
        self.message_is_binary = isBinary
        self.message_data_total_length = 0
        self._message = bytearray()

    def onMessageFrameData(self, payload: bytes) -> None:
        if not self.failedByMe:
            self._message += payload

    def onMessageFrameEnd(self) -> None:
        pass

    def onMessageEnd(self) -> None:
        message, self._message = self._message, bytearray()
        if len(message) >= UNIT:
            self._count(len(message) // UNIT)
        if not self.failedByMe and not self._deaf:
            self._owner.received(bytes(message), not self.message_is_binary)

    def processControlFrame(self) -> bool:
        # autobahn finishes the frame that was one too many, if it is empty.
        return True if self._deaf else bool(super().processControlFrame())

    def onPing(self, payload: bytes) -> None:
        """
        Answer, as long as the peer reads: it makes us write, and its pings alone do not prove that.

        Beyond :data:`PONGS` bytes a ping of our own asks for that proof; until it comes only the latest ping is kept to
        be answered, which RFC 6455 section 5.5.3 allows.
        """
        if self._proof:
            self._latest = payload
            return
        super().onPing(payload)
        self._pongs += len(payload) + 6
        if self._pongs > PONGS:
            self._proof = self._entropy(8)
            self.send_ping(self._proof)

    def onPong(self, payload: bytes) -> None:
        if not self._proof or payload != self._proof:
            self._owner.pong(payload)
            return
        self._pongs, self._proof = 0, b""
        latest, self._latest = self._latest, None
        if latest is not None:
            self.onPing(latest)

    def onCloseFrame(self, code: int | None, reasonRaw: bytes | None) -> None:
        super().onCloseFrame(code, reasonRaw)  # type: ignore[arg-type]  # autobahn itself passes None
        if self.failedByMe:
            # The frame itself was wrong, or this is the answer to our saying that something else was.
            return
        self._deaf = True
        self.data = b""
        self._owner.peer_closed(
            NO_STATUS if self.remoteCloseCode is None else self.remoteCloseCode, self.remoteCloseReason or ""
        )

    def sendFrame(
        self, opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        # The other arguments are for fuzzing and for trickling; autobahn leaves them at their defaults.
        self.transport.write(encode_frame(opcode, payload, self._entropy(4), fin=fin, rsv=rsv))


def _text(reason: bytes | None) -> str:
    return (reason or b"").decode("utf-8", "replace")
