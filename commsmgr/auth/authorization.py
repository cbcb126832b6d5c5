"""
The bearer token of each request and each WebSocket upgrade, and what its acceptance or refusal leads to.

Both transports ask here: :meth:`Authorization.get` before they show a token, and :meth:`Authorization.accepted` or
:meth:`Authorization.refused` when the backend has judged it. Which token that is decides
:mod:`commsmgr.policy.tokens`; where tokens come from, and when there is a newer one, is the provider's affair.

A WebSocket that is open stays open when its token has expired or was replaced. Neither dialect has a message for a new
token: it is shown at the upgrade, and a backend that minds its end closes with 4401, whereupon the agent comes back
soon with the new one, which is at hand because it was renewed ahead of time. To leave unasked would save nothing, and
with a plain backend it would lose the commands that are sent to a machine while it is not connected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from commsmgr.auth.accepted_tokens import AcceptedTokens
from commsmgr.auth.renewal import Renewal
from commsmgr.bearer import Token, as_token
from commsmgr.errors import CommsError, TokenError
from commsmgr.instants import shown
from commsmgr.interfaces import TokenProvider
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.tokens import Held, Route, TokenTable
from commsmgr.redact import Redactor
from commsmgr.status import TokenStatus

HTTP, WEBSOCKET = "http", "websocket"


class Authorization:
    """
    Gives tokens, and hears what became of them.

    :param source: the provider's kind, for operators.
    :param clock: for waits.
    :param wall: seconds since the epoch, in which tokens expire.
    :param redactor: learns of each token, so that no log line shows one.
    :param file: keeps accepted tokens over a restart; None: they are forgotten.
    """

    log = Logger()

    def __init__(
        self,
        provider: TokenProvider,
        *,
        source: str,
        table: TokenTable,
        clock: IReactorTime,
        wall: Callable[[], float],
        redactor: Redactor,
        metrics: Metrics,
        file: AcceptedTokens | None = None,
    ) -> None:
        self._provider = provider
        self._source = source
        self._table = table
        self._clock = clock
        self._wall = wall
        self._redactor = redactor
        self._metrics = metrics
        self._file = file
        self._given: str | Token | None = None
        self._newest: Token | None = None
        self._standing_in: set[Route] = set()

    def start(self) -> None:
        """Begin with the tokens that were accepted before the restart."""
        if self._file is not None:
            self._begin_with(self._file.load())

    def _begin_with(self, kept: Mapping[Route, Token]) -> None:
        for token in kept.values():
            self._redactor.secret(token.value)
        self._table.remember(kept)

    async def stop(self, deadline: float) -> None:
        """End a fetch that is under way, and see that what is to be kept is kept."""
        if isinstance(self._provider, Renewal):
            await self._provider.stop(deadline / 2)
        if self._file is not None:
            await self._file.written()

    def look(self) -> None:
        """Renew the token if it is time; to be called every now and then."""
        if isinstance(self._provider, Renewal):
            self._provider.look()

    async def get(self, route: Route) -> Token:
        """
        Return the token to show on ``route``.

        Cancelling cancels what the provider has returned.

        :raise TokenError: there is none: the provider has none, or it was refused just now, and no earlier one works.
        """
        newest: Token | None = None
        missing: TokenError | None = None
        try:
            newest = await self._fetched()
        except TokenError as error:
            missing = error
        chosen = self._table.choose(route, newest, now=self._clock.seconds(), wall=self._wall())
        self._tell(route, missing)
        if not isinstance(chosen, Held):
            return chosen
        if missing is not None:
            raise missing
        if newest is None or not newest.value:
            raise TokenError(f"{route.backend} wants a token; it is asked again in {chosen.seconds:.0f} s")
        raise TokenError(
            f"{route.backend} refused this token, or several before it; it is shown again in {chosen.seconds:.0f} s"
        )

    def holds(self, route: Route) -> bool:
        """Say whether no token that is known now may be shown on ``route``, because the backend refused it lately."""
        newest = self._newest
        return newest is not None and self._table.holds(route, newest, now=self._clock.seconds(), wall=self._wall())

    async def _fetched(self) -> Token:
        try:
            given = await self._provider.get()
            # Most providers give the same object again and again: it is checked once, not for each request.
            if given is self._given and self._newest is not None:
                return self._newest
            token = as_token(given)
            self._given = given
        except (CommsError, CancelledError):
            raise
        except Exception as error:
            # The provider may be the embedding agent's. Its defect must not end the loops that send, as ours would.
            self.log.failure("the token provider failed", event="token.fault")
            raise TokenError(f"the token provider failed: {type(error).__name__}") from None
        if token != self._newest:
            self._redactor.secret(token.value)
            self._metrics.token_expires(token.expires_at)
            if self._newest is not None:
                self.log.info(
                    "there is a new token; it expires: {expires}",
                    event="token.renewed",
                    expires="nobody says when" if token.expires_at is None else shown(token.expires_at),
                )
            self._newest = token
        return token

    def accepted(self, route: Route, token: Token) -> None:
        """The backend has taken ``token``: it answered 2xx, or registered the WebSocket that was opened with it."""
        if self._table.accepted(route, token) and self._file is not None:
            self._file.keep(self._table.kept())
        self._show(route)

    def refused(self, route: Route, token: Token) -> None:
        """The backend has answered 401 to ``token``, or closed the WebSocket that was opened with it with 4401."""
        before = self._table.kept()
        wait = self._table.refused(route, token, self._clock.seconds())
        self.log.warn(
            "{backend} refused the token over {transport}; it is shown again in {wait:.0f} s",
            event="token.refused",
            backend=route.backend,
            transport=route.transport,
            wait=wait,
        )
        kept = self._table.kept()
        if kept != before and self._file is not None:
            self._file.keep(kept)
        self._show(route)
        self._provider.refused(token.value)

    def _tell(self, route: Route, missing: TokenError | None) -> None:
        """Log when an earlier token begins to stand in for the newest, or no longer has to."""
        stands_in = self._table.stands_in(route)
        if stands_in and route not in self._standing_in:
            self.log.warn(
                "going back to the token that {backend} accepted before, because {reason}",
                event="token.earlier",
                backend=route.backend,
                transport=route.transport,
                reason="the newer one was refused" if missing is None else missing.fact,
            )
        if stands_in:
            self._standing_in.add(route)
        else:
            self._standing_in.discard(route)
        self._show(route)

    def _show(self, route: Route) -> None:
        refused, earlier = self._table.stands(route.backend)
        self._metrics.token_standing(route.backend, refused=refused, earlier=earlier)

    @property
    def status(self) -> TokenStatus:
        """How the token stands; nothing in it is secret."""
        return TokenStatus(
            source=self._source,
            expires_at=None if self._newest is None else self._newest.expires_at,
            refused=tuple(" over ".join(route) for route in self._table.refusing),
            earlier=tuple(" over ".join(route) for route in self._table.standing_in),
        )
