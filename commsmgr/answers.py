"""
What a link writes because its peer makes it: receipts and refusals of commands, answers to questions, loss receipts.

Theory of operation. A peer that sends and does not read makes us write, and what it does not read stays in our memory.
Results have the window for that, because each of them gets a receipt. Answers get none; to leave one out would leave a
command pending for as long as the link lives. So there is one rule for all of them: they count as unread until the pong
comes to a ping that was sent after them (the peer handles frames in order, so it has read them). Beyond
:data:`ASK_FROM` such a ping is sent; beyond :data:`MOST_UNREAD` the link is ended, whatever else the peer sends.

Nothing here is durable, and nothing is lost with a link: of what was not answered a commsmgr.v1 backend sends
everything again after the next registration, and a loss receipt goes again over every link until it is acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from commsmgr.errors import PeerSilent
from commsmgr.messages import LossReport
from commsmgr.session.conversation import Conversation

ASK_FROM = 256 << 10
"""Bytes of unread answers from which on a ping asks for a proof that the peer reads them."""

MOST_UNREAD = 4 << 20
"""Bytes of unread answers at which the link ends. A peer that says all it has before it reads gets along with that."""

FRAME = 64
"""Bytes that a waiting message takes in memory beside its own."""

MOST_IDS = 1000
"""Commands acknowledged in one message."""


class Answers:
    """
    Writes the answers of one link, in the order in which they are asked for, acknowledgements once per turn.

    :param send: sends a payload of the kind given.
    :param ping: sends a ping and returns its payload, which is greater than those of all pings before it.
    :param dead: ends the link, for the reason given; may be called again before the link has ended.
    """

    def __init__(
        self,
        conversation: Conversation,
        clock: IReactorTime,
        *,
        send: Callable[[bytes, str], None],
        ping: Callable[[], bytes],
        dead: Callable[[PeerSilent], None],
    ) -> None:
        self._conversation = conversation
        self._clock = clock
        self._send = send
        self._ping = ping
        self._dead = dead
        self._ids: list[str] = []
        self._call: IDelayedCall | None = None
        self._unread = 0
        self._asked_for = 0
        self._proof: bytes | None = None

    def acknowledge(self, command_id: str) -> None:
        """Say that a command is stored: with all the others of this turn of the reactor, when it is over."""
        self._ids.append(command_id)
        if len(self._ids) >= MOST_IDS:
            self.flush()
        elif self._call is None:
            self._call = self._clock.callLater(0, self.flush)

    def flush(self) -> None:
        """Say at once which commands are stored."""
        self.stop()
        ids, self._ids = self._ids, []
        if ids:
            self._answer(self._conversation.ack(ids), "ack")

    def refuse(self, command_id: str, code: str, message: str, retry_after: float | None) -> None:
        """Say that a command was not taken."""
        self._answer(self._conversation.nack(command_id, code, message, retry_after), "nack")

    def reply(self, payload: bytes) -> None:
        """Answer what the conversation can answer by itself."""
        self._answer(payload, "reply")

    def report_losses(self, report: LossReport) -> None:
        """Say what was given up."""
        self._answer(self._conversation.loss_receipt(report), "loss_receipt")

    def pong(self, payload: bytes) -> None:
        """One of this link's pings was answered: all that was written before it is read."""
        if self._proof is not None and payload >= self._proof:
            self._unread -= self._asked_for
            self._proof = None

    def stop(self) -> None:
        """Leave no timer behind."""
        if self._call is not None and self._call.active():
            self._call.cancel()
        self._call = None

    def _answer(self, payload: bytes, kind: str) -> None:
        self._unread += len(payload) + FRAME
        if self._unread > MOST_UNREAD:
            self._dead(PeerSilent("the backend sends, and does not read what it is answered"))
            return
        self._send(payload, kind)
        if self._unread >= ASK_FROM and self._proof is None:
            self._asked_for, self._proof = self._unread, self._ping()
