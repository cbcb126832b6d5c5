"""An open WebSocket, and who owns the conversation on it: the two sides of the WebSocket client's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from twisted.internet.defer import Deferred

from commsmgr.errors import CommsError, ConnectionEnded
from commsmgr.transport.guarded import MAX_CONTROL_BYTES, GuardedProtocol

if TYPE_CHECKING:
    from commsmgr.transport.attempt import Attempt

CLOSE_WITHIN: Final = 2.0
"""Seconds that the closing handshake may take, unless somebody is in more of a hurry."""


class WebSocketHandler(Protocol):
    """
    Owns the conversation; implemented by the link.

    Every call comes on the reactor's thread. An exception in any of them is logged, ends the connection, and goes no
    further.
    """

    def websocket_headers(self) -> Deferred[Mapping[str, str]]:
        """
        Return header fields for the next request, such as a fresh Authorization.

        A failure ends the attempt like a failed connection. Cancelled when the attempt ends first: its time counts
        towards ``connect_timeout``.
        """

    def websocket_connecting(self) -> None:
        """An attempt begins."""

    def websocket_opened(self, connection: Connection) -> None:
        """The upgrade succeeded: messages may be sent from now on."""

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        """A whole message came; text is valid UTF-8. Also after our own :meth:`Connection.close`, until the peer's."""

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        """A pong came, asked for or not."""

    def websocket_heard(self, connection: Connection) -> None:
        """Some bytes came. Called for each packet, before what is in it: keep it cheap."""

    def websocket_ended(self, connection: Connection | None, error: CommsError) -> float:
        """
        The attempt is over; called exactly once for each :meth:`websocket_connecting`.

        :param connection: None when it never was open.
        :param error: why; :class:`~commsmgr.errors.NotRunning` when it was stopped.
        :return: seconds to wait before the next attempt.
        """


class Connection:
    """
    An open WebSocket, as its owner holds it.

    :ivar subprotocol: the one that the backend selected, or None.
    :ivar opened_at: when, by the reactor's clock.
    :ivar tls: the TLS version, such as ``TLSv1.3``; empty without TLS.
    """

    def __init__(self, attempt: Attempt, protocol: GuardedProtocol, opened_at: float) -> None:
        self._attempt = attempt
        self._protocol = protocol
        self.subprotocol: str | None = protocol.websocket_protocol_in_use
        self.opened_at = opened_at
        self.tls = protocol.tls_version

    def send(self, payload: bytes) -> bool:
        """
        Send one text message.

        :param payload: valid UTF-8.
        :return: False, and nothing was sent, when the WebSocket is not open any more.
        """
        return self._protocol.send_texts((payload,))

    def send_many(self, payloads: Sequence[bytes]) -> bool:
        """Send one text message each, in one write; as :meth:`send`."""
        return self._protocol.send_texts(payloads)

    def ping(self, payload: bytes) -> bool:
        """
        Send a ping frame; as :meth:`send`.

        :raise ValueError: more than 125 bytes (RFC 6455 section 5.5).
        """
        if len(payload) > MAX_CONTROL_BYTES:
            raise ValueError(f"a ping bears at most {MAX_CONTROL_BYTES} bytes, not {len(payload)}")
        return self._protocol.send_ping(payload)

    def answered(self) -> None:
        """
        The message or pong that is being taken answers something that was sent, once and for all.

        It then does not count towards ``websocket.max_message_rate``: how many of them come is our own affair.
        """
        self._protocol.answered()

    def close(self, code: int = 1000, reason: str = "") -> None:
        """
        Begin the closing handshake (RFC 6455 section 7.1.2); after :data:`CLOSE_WITHIN` the connection is dropped.

        Nothing happens when it is not open any more.

        :raise ValueError: a code that must not be sent (RFC 6455 section 7.4).
        """
        if not (1000 <= code <= 1013 and code not in (1004, 1005, 1006)) and not 3000 <= code <= 4999:
            raise ValueError(f"{code} is not a close code that may be sent")
        self._attempt.close(ConnectionEnded("closed by us", may_have_arrived=True), code=code, reason=reason)

    def kill(self, error: CommsError) -> None:
        """Drop the connection now, with whatever is in its buffers; the owner hears of its end with ``error``."""
        self._attempt.kill(error)
