"""
The WebSocket to one backend, attempt after attempt.

A :class:`Link` is the handler of one :class:`~commsmgr.transport.websocket.WebSocketClient`: it says what each attempt
carries (a fresh token), opens an :class:`~commsmgr.openlink.OpenLink` on each connection that
comes of it, decides by :mod:`commsmgr.policy.reconnect` how long to wait when one is over, and counts the failures in
a row, by which :mod:`commsmgr.backends` turns to another backend. The breaker is not asked: it guards HTTP, and a
WebSocket that some proxy cuts must not close the way around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from commsmgr import config
from commsmgr.auth.authorization import WEBSOCKET, Authorization
from commsmgr.bearer import Token
from commsmgr.errors import CommsError, NotRunning
from commsmgr.observe.metrics import Metrics, reason_label
from commsmgr.openlink import LinkEvents, OpenLink
from commsmgr.policy.reconnect import delay
from commsmgr.policy.retry import counts_against_backend, refuses_token
from commsmgr.policy.tokens import Route
from commsmgr.session.conversation import Conversation, GoingAway
from commsmgr.status import Connecting, Draining, Idle, LinkState, Registered, Registering, Waiting
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.websocket import Connection, WebSocketClient
from commsmgr.urls import backend_name, websocket_target

V1 = "commsmgr.v1"

GOODBYE = 30.0
"""Seconds for the receipts of what is in flight when a backend announces that it leaves."""


class Link:
    """
    The WebSocket to one backend.

    :param backend: the backend's settings.
    :param conversation: makes the conversation for a new connection, given whether commsmgr.v1 was selected.
    :param redact: takes secrets out of what operators read in :attr:`state` and :attr:`last_error`.
    :param wall: seconds since the epoch, for what operators read.
    :ivar failures: attempts and connections that failed by the backend's fault, or because it did not take the token,
        since the last registration.
    :ivar on_failed: called after each of them.
    """

    log = Logger()

    def __init__(
        self,
        backend: config.Backend,
        whole: config.Config,
        *,
        reactor: IReactorTime,
        wall: Callable[[], float],
        random: Random,
        dialer: Dialer,
        authorization: Authorization,
        metrics: Metrics,
        conversation: Callable[[bool], Conversation],
        events: LinkEvents,
        redact: Callable[[str], str],
        user_agent: str,
    ) -> None:
        self.name = backend_name(backend)
        self.state: LinkState = Idle()
        self.open: OpenLink | None = None
        self.last_error = ""
        self.failures = 0
        self.on_failed: Callable[[], None] | None = None
        self._config = whole
        self._clock = reactor
        self._wall = wall
        self._random = random
        self._authorization = authorization
        self._route = Route(self.name, WEBSOCKET)
        self._metrics = metrics
        self._conversation = conversation
        self._events = events
        self._redact = redact
        self._token = Token("")
        self._floor = 0.0
        self._wait = self._failed_at = 0.0
        self._wanted = False
        self._leaving = False
        self.client = WebSocketClient(
            reactor,
            websocket_target(backend),
            dialer=dialer,
            handler=self,
            settings=whole.websocket,
            subprotocols=[V1] if whole.websocket.dialect == "auto" else [],
            user_agent=user_agent,
            headers=whole.http.headers,
            wall=wall,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Wanted or not

    def start(self, *, afresh: bool = False) -> None:
        """
        Begin to connect, and keep at it: at once, or when the wait is over that the last failure asked for. Links that
        take turns while none works would otherwise keep each other busy without any wait.

        :param afresh: forget earlier failures, because the backend has proven since then that it lives.
        """
        self._wanted = True
        if afresh:
            self.failures = 0
            self._wait = 0.0
            self.client.resetDelay()
        # However far the clock stepped back, no longer than that wait as a whole.
        left = min(self._wait, self._failed_at + self._wait - self._clock.seconds())
        if left > 0:
            self.state = Waiting(self.last_error, self._wall() + left, self.client.attempts)
        self.client.start(after=left)

    async def stop(self, deadline: float) -> int:
        """
        Say goodbye and stay away until :meth:`start`.

        :param deadline: seconds for receipts of what is in flight and for the closing handshake together.
        :return: how many entries were in flight without a receipt; they are still in the outbox.
        """
        began = self._clock.seconds()
        self._wanted = False
        without_receipt = 0
        link = self.open
        if link is not None and link.registered:
            self.state = Draining(self._wall())
            # Half for the receipts: a backend that gives none must not use up the time of the closing handshake.
            try:
                without_receipt = await link.drain().addTimeout(deadline / 2, self._clock)
            except defer.TimeoutError:
                without_receipt = link.in_flight
        elif link is not None:
            # An answer to its registration would come too late: nothing can be sent any more.
            self.open = None
            link.ended()
        left = max(deadline - (self._clock.seconds() - began), 0.1)
        await self.client.stop(close_within=left)
        if not self._wanted:
            self.state = Idle()
        return without_receipt

    # -----------------------------------------------------------------------------------------------------------------
    # WebSocketHandler

    def websocket_headers(self) -> Deferred[Mapping[str, str]]:
        """Ask for a token; without one that may be shown nothing is connected."""
        return Deferred.fromCoroutine(self._headers())

    async def _headers(self) -> Mapping[str, str]:
        token = self._token = await self._authorization.get(self._route)
        return {"Authorization": f"Bearer {token.value}"} if token.value else {}

    def websocket_connecting(self) -> None:
        """An attempt begins."""
        self.state = Connecting(self._wall())

    def websocket_opened(self, connection: Connection) -> None:
        """The upgrade succeeded: register."""
        v1 = connection.subprotocol == V1
        self.state = Registering(self._wall())
        self.open = OpenLink(
            connection,
            self._conversation(v1),
            backend=self.name,
            v1=v1,
            nonce=self._random.randbytes(6),
            settings=self._config.websocket,
            clock=self._clock,
            metrics=self._metrics,
            events=self._events,
            on_registered=self._registered,
            on_going_away=self._going_away,
        )
        self.open.start()

    def websocket_received(self, connection: Connection, payload: bytes, is_text: bool) -> None:
        """A message came."""
        if self.open is not None:
            self.open.received(payload, is_text)

    def websocket_pong(self, connection: Connection, payload: bytes) -> None:
        """A pong came."""
        if self.open is not None:
            self.open.pong(payload)

    def websocket_heard(self, connection: Connection) -> None:
        """Some bytes came."""
        if self.open is not None:
            self.open.heard()

    def websocket_ended(self, connection: Connection | None, error: CommsError) -> float:
        """An attempt or a connection is over; return how many seconds to wait before the next one."""
        link, self.open = self.open, None
        lost = link.ended() if link is not None else 0
        if isinstance(error, NotRunning) or not self._wanted:
            return self._left(link)
        wait = self._wait = self._wait_after(error)
        self._failed_at = self._clock.seconds()
        self.last_error = self._redact(str(error))
        label = reason_label(error)
        self._metrics.link_ended(self.name, label)
        self.log.info(
            "link to {backend} is down: {error}; next attempt in {wait:.1f} s, {lost} results without receipt",
            event="link.ended",
            backend=self.name,
            error=str(error),
            reason=label,
            wait=wait,
            lost=lost,
        )
        self.state = Waiting(self.last_error, self._wall() + wait, self.client.attempts)
        if link is not None and link.registered:
            self._events.ended(link)
        if (counts_against_backend(error) or refuses_token(error)) and not self._leaving:
            self.failures += 1
            if self.on_failed is not None:
                self.on_failed()
        self._leaving = False
        return wait

    def _left(self, link: OpenLink | None) -> float:
        """We wanted the end, whoever brought it about: nothing has failed, and nothing is waited for."""
        self._floor = 0.0
        self._leaving = False
        self._metrics.link_ended(self.name, None)
        self.log.info("left {backend}", event="link.left", backend=self.name)
        self.state = Idle()
        if link is not None and link.registered:
            self._events.ended(link)
        return 0.0

    def _wait_after(self, error: CommsError) -> float:
        if refuses_token(error):
            self._authorization.refused(self._route, self._token)
        floor, self._floor = self._floor, 0.0
        wait = delay(
            error,
            max(self.client.attempts - 1, 0),
            settings=self._config.reconnect,
            refused_delay=self._config.auth.refused_delay,
            random=self._random,
        )
        return max(floor, wait)

    # -----------------------------------------------------------------------------------------------------------------
    # What the open link reports

    def _registered(self) -> None:
        link = self.open
        assert link is not None
        dialect = V1 if link.v1 else "plain"
        self.failures = 0
        self._wait = 0.0
        self.last_error = ""
        self._authorization.accepted(self._route, self._token)
        self._metrics.link_registered(self.name, dialect)
        self.log.info(
            "registered with {backend} ({dialect})", event="link.registered", backend=self.name, dialect=dialect
        )
        self.state = Registered(self._wall(), dialect, link.tls)
        self._events.registered(link)

    def _going_away(self, notice: GoingAway) -> None:
        """
        Finish what is in flight, leave, and come back at a moment spread over the window.

        The spread is what keeps a deploy of the backend from becoming a stampede of agents.
        """
        cap = self._config.reconnect.retry_after_cap
        self._floor = min(notice.reconnect_after, cap) + self._random.uniform(0, min(notice.window, cap))
        self._leaving = True
        self.log.info(
            "{backend} is going away; back in {wait:.1f} s", event="link.goaway", backend=self.name, wait=self._floor
        )
        link = self.open
        if link is not None:
            self.state = Draining(self._wall())
            # A backend that leaves but acknowledges nothing any more must not hold us.
            draining = link.drain().addTimeout(GOODBYE, self._clock)
            draining.addErrback(lambda failure: failure.trap(defer.TimeoutError))
            draining.addCallback(lambda _: link.close())
