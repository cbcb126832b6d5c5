"""
One open WebSocket: the conversation on it, its keep-alive, what is in flight, and the receipts.

Theory of operation. An :class:`OpenLink` lives from the opening of one connection to its end and is never used again.
The pure parts decide (:class:`~commsmgr.session.conversation.Conversation` what a message means,
:class:`~commsmgr.liveness.Liveness` whether the peer lives,
:class:`~commsmgr.session.barrier.Barrier` what a pong proves, :class:`~commsmgr.session.window.Window` how much may be
in flight, :class:`~commsmgr.answers.Answers` how much a peer is answered that does not read); this module carries
their decisions to the connection and the news to the owner.

Nothing here is durable. An entry is in the outbox until its receipt has been handed to
:attr:`LinkEvents.receipts`; a connection that ends before that leaves it there, and the next link sends it again with
the same id. A command is acknowledged only by :meth:`OpenLink.acknowledge`, which the intake calls after its commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from commsmgr import config
from commsmgr.answers import Answers
from commsmgr.errors import PeerSilent
from commsmgr.liveness import Liveness
from commsmgr.messages import LossReport, Push
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.log_throttle import LogThrottle
from commsmgr.session.barrier import Barrier
from commsmgr.session.conversation import (
    Acked,
    CommandArrived,
    Conversation,
    GoingAway,
    Invalid,
    Nacked,
    Pushed,
    Registered,
    Reply,
    SettingsArrived,
)
from commsmgr.session.window import Window
from commsmgr.session.wire import result_frame
from commsmgr.spool import Entry
from commsmgr.waiters import Waiters

if TYPE_CHECKING:
    from commsmgr.transport.websocket import Connection


class LinkEvents(Struct, frozen=True):
    """
    Who hears what happens on a link; each is called on the reactor's thread.

    :ivar registered: the backend knows the agent; results may be sent on this link.
    :ivar ended: a link that was registered is gone; what it had in flight is still in the outbox.
    :ivar receipts: the backend has the entries with these numbers; there is room for more.
    :ivar refused: the backend did not take the entry with this number.
    :ivar command: a command came.
    :ivar pushed: a message came that is for the embedding agent.
    :ivar settings: the backend sets intervals, for as long as this link lives.
    :ivar losses_acked: the backend has stored the loss receipt with this id.
    :ivar losses_refused: the backend did not take it.
    """

    registered: Callable[[OpenLink], None]
    ended: Callable[[OpenLink], None]
    receipts: Callable[[OpenLink, Sequence[int]], None]
    refused: Callable[[OpenLink, int, Nacked], None]
    command: Callable[[OpenLink, CommandArrived], None]
    pushed: Callable[[Push], None]
    settings: Callable[[SettingsArrived], None]
    losses_acked: Callable[[str], None]
    losses_refused: Callable[[Nacked], None]


class OpenLink:
    """
    The conversation on one open connection.

    :param v1: whether the backend selected commsmgr.v1 at the upgrade.
    :param on_registered: called once, when the backend knows the agent.
    :param on_going_away: called when the backend announces that it leaves.
    :param nonce: a few random bytes that tell this connection's pings from any other's.
    """

    log = Logger()

    def __init__(
        self,
        connection: Connection,
        conversation: Conversation,
        *,
        backend: str,
        v1: bool,
        nonce: bytes,
        settings: config.WebSocket,
        clock: IReactorTime,
        metrics: Metrics,
        events: LinkEvents,
        on_registered: Callable[[], None],
        on_going_away: Callable[[GoingAway], None],
    ) -> None:
        self.backend = backend
        self.v1 = v1
        self.tls = connection.tls
        self.registered = False
        self._connection = connection
        self._conversation = conversation
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._events = events
        self._on_registered = on_registered
        self._on_going_away = on_going_away
        self._window = Window(settings.window_messages, settings.window_bytes)
        self._barrier = Barrier(nonce)
        self._liveness = Liveness(
            settings,
            clock,
            in_flight=self._window.__len__,
            ping=lambda: connection.ping(self._barrier.probe()),
            dead=connection.kill,
        )
        self._answers = Answers(conversation, clock, send=self._send, ping=self._probe, dead=connection.kill)
        self._loss_receipt = ""
        self._unusable = ""
        self._register_call: IDelayedCall | None = None
        self._drained: Waiters[int] = Waiters()
        self._draining = False
        self._ended = False
        self._throttle = LogThrottle(clock.seconds)

    # -----------------------------------------------------------------------------------------------------------------
    # From open to registered

    def start(self) -> None:
        """Register: the first message on a link, before which nothing else may be sent."""
        self._send(self._conversation.open(), "register")
        wait = self._settings.register_timeout if self.v1 else self._settings.register_wait
        self._register_call = self._clock.callLater(wait, self._registration_unanswered)
        self._liveness.start()

    def _registration_unanswered(self) -> None:
        self._register_call = None
        if self.v1:
            came = f"; what came could not be used: {self._unusable}" if self._unusable else ""
            self._connection.kill(
                PeerSilent(f"no answer to the registration within {self._settings.register_timeout} s{came}")
            )
        else:
            self._handle(self._conversation.wait_elapsed())

    # -----------------------------------------------------------------------------------------------------------------
    # What the connection reports

    def received(self, payload: bytes, is_text: bool) -> None:
        """A whole message came."""
        self._metrics.traffic("in", "websocket", len(payload))
        self._handle(self._conversation.receive(payload, is_text))

    def heard(self) -> None:
        """Some bytes came: the peer lives."""
        self._liveness.heard()

    def pong(self, payload: bytes) -> None:
        """A pong came; in the plain dialect it is the receipt for all that was sent before its ping."""
        ids = self._barrier.pong(payload)
        if ids is None:
            return
        self._liveness.ponged()
        self._answers.pong(payload)
        if ids:
            self._receipts(self._window.settle(ids))
        if not self.v1 and self._barrier.oldest_unanswered is None:
            # What was sent while that ping was under way has none of its own yet.
            self._ping(self._barrier.flush())

    def ended(self) -> int:
        """
        The connection is gone: stop every timer.

        :return: how many entries were in flight without a receipt; they are still in the outbox.
        """
        self._ended = True
        self._liveness.stop()
        self._answers.stop()
        if self._register_call is not None and self._register_call.active():
            self._register_call.cancel()
        lost = self._window.clear()
        self._drained.fire(lost)
        return lost

    # -----------------------------------------------------------------------------------------------------------------
    # Results out

    @property
    def sendable(self) -> bool:
        """Whether results may be sent now."""
        return self.registered and not self._draining and not self._ended

    @property
    def room(self) -> tuple[int, int]:
        """How many messages and bytes may still be put in flight; either may be 0, never negative."""
        return self._window.room

    def admits(self, size: int) -> bool:
        """Whether a message of ``size`` bytes may be put in flight: always when nothing else is."""
        return self._window.admits(size)

    @property
    def in_flight(self) -> int:
        """How many entries were sent and have no receipt yet."""
        return len(self._window)

    def fresh(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return those of ``entries`` whose ids are not in flight here, and of several with one id the first."""
        ids, in_flight = {entry.id for entry in entries}, self._window.ids
        if len(ids) == len(entries) and in_flight.isdisjoint(ids):
            return entries
        first = {entry.id: entry for entry in reversed(entries) if entry.id not in in_flight}
        return [entry for entry in entries if first.get(entry.id) is entry]

    def send(self, entries: Sequence[Entry], timestamp: str) -> None:
        """Send results, in this order. What does not get a receipt stays in the outbox."""
        if not len(self._window):
            self._liveness.sending()
        frames = [result_frame(entry.id, timestamp, entry.body) for entry in entries]
        self._window.add(entries)
        self._metrics.traffic("out", "websocket", sum(map(len, frames)))
        self._connection.send_many(frames)
        if not self.v1:
            full: bytes | None = None
            for entry, payload in zip(entries, frames, strict=True):
                full = self._barrier.sent(entry.id, len(payload)) or full
            # One ping in the air at a time, save when a batch is full: a busy link pays one per batch, and a quiet
            # one has its receipt after one round trip.
            quiet = full is None and self._barrier.oldest_unanswered is None
            self._ping(self._barrier.flush() if quiet else full)

    def report_losses(self, report: LossReport) -> None:
        """Send a loss receipt, beside the window: nothing waits for its answer. Plain: nothing."""
        if self.v1:
            self._loss_receipt = report.id
            self._answers.report_losses(report)

    # -----------------------------------------------------------------------------------------------------------------
    # Commands in

    def acknowledge(self, command_id: str) -> None:
        """Tell the backend that a command is in the inbox; coalesced per turn of the reactor. Plain: nothing."""
        if self.v1 and not self._ended:
            self._answers.acknowledge(command_id)

    def refuse(self, command_id: str, code: str, message: str, retry_after: float | None) -> bool:
        """
        Tell the backend that a command was not taken.

        On a link that is over nothing needs to be said: a commsmgr.v1 backend sends again what was not acknowledged.

        :return: False when the dialect has no word for it.
        """
        if self.v1 and not self._ended:
            self._answers.refuse(command_id, code, message, retry_after)
        return self.v1

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def drain(self) -> Deferred[int]:
        """
        Send nothing new and wait for the receipts of what is in flight.

        :return: fires with the number of entries that got no receipt, as soon as it is 0 or the connection ends.
        """
        self._draining = True
        if not self._ended:
            self._answers.flush()
        if self._ended or not len(self._window):
            return succeed(len(self._window))
        return self._drained.wait()

    def close(self) -> None:
        """Say goodbye with a close frame (RFC 6455 section 7.1.1)."""
        self._connection.close(1000, "agent leaves")

    # -----------------------------------------------------------------------------------------------------------------
    # Inside

    def _handle(self, events: Sequence[object]) -> None:
        for event in events:
            if self._ended:
                return
            match event:
                case CommandArrived():
                    self._events.command(self, event)
                case Acked(ids):
                    seqs = self._window.settle(ids)
                    if told := self._loss_receipt in ids:
                        self._events.losses_acked(self._loss_receipt)
                    if len(seqs) + told != len(ids):
                        self._metrics.message("ack", "in", "stray")
                    if seqs:
                        self._receipts(seqs)
                case Reply(payload):
                    self._answers.reply(payload)
                case Registered():
                    self._register()
                case Nacked():
                    self._nacked(event)
                case Pushed(push):
                    self._metrics.message("push", "in", "ok")
                    self._events.pushed(push)
                case Invalid(reason, detail):
                    self._invalid(reason, detail)
                case GoingAway():
                    self._on_going_away(event)
                case SettingsArrived() if self.registered:
                    self._events.settings(event)

    def _register(self) -> None:
        if self._register_call is not None and self._register_call.active():
            self._register_call.cancel()
        self._register_call = None
        self.registered = True
        self._on_registered()

    def _nacked(self, event: Nacked) -> None:
        if event.id == self._loss_receipt:
            self._events.losses_refused(event)
            return
        seqs = self._window.settle([event.id])
        if not seqs:
            self._metrics.message("nack", "in", "stray")
            return
        self._connection.answered()
        self._events.refused(self, seqs[0], event)
        self._progressed()

    def _receipts(self, seqs: Sequence[int]) -> None:
        self._connection.answered()
        self._events.receipts(self, seqs)
        self._progressed()

    def _progressed(self) -> None:
        self._liveness.progressed()
        if self._draining and not len(self._window):
            self._drained.fire(0)

    def _invalid(self, reason: str, detail: str) -> None:
        self._metrics.invalid(reason)
        self._unusable = self._unusable or f"{reason}: {detail}"
        suppressed = self._throttle.allow(reason)
        if suppressed is not None:
            self.log.warn(
                "{backend} sent what cannot be used: {reason}: {detail} ({suppressed} more like it before)",
                event="link.invalid",
                backend=self.backend,
                reason=reason,
                detail=detail,
                suppressed=suppressed,
            )

    def _send(self, payload: bytes, kind: str) -> None:
        sent = self._connection.send(payload)
        self._metrics.message(kind, "out", "ok" if sent else "lost")
        if sent:
            self._metrics.traffic("out", "websocket", len(payload))

    def _ping(self, payload: bytes | None) -> None:
        if payload is not None and self._connection.ping(payload):
            self._liveness.pinged()

    def _probe(self) -> bytes:
        payload = self._barrier.probe()
        self._ping(payload)
        return payload
