"""What a manager was given, and what each of its runs is built from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from random import Random
from typing import Any

from msgspec import Struct
from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred

from commsmgr import proxies
from commsmgr._version import __version__
from commsmgr.auth import providers
from commsmgr.auth.accepted_tokens import AcceptedTokens
from commsmgr.auth.authorization import Authorization
from commsmgr.auth.providers import CallableToken
from commsmgr.auth.renewal import Renewal
from commsmgr.auth.token_command import TokenCommand
from commsmgr.bearer import Token
from commsmgr.config import Config
from commsmgr.instants import Timestamps
from commsmgr.interfaces import CommandHandler, MachineSource, PushHandler, TokenProvider
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.tokens import TokenTable
from commsmgr.redact import Redactor
from commsmgr.rules import TOKEN_SOURCES
from commsmgr.spool import Executor
from commsmgr.transport.dialer import Dialer
from commsmgr.transport.peer import TLSFacts
from commsmgr.urls import Target, backend_name, http_target, websocket_target


class Environment(Struct, frozen=True, kw_only=True):
    """
    The parameters of :class:`~commsmgr.manager.Manager`, checked and with their defaults filled in.

    :ivar timestamp: tells the time by ``wall`` as RFC 3339, in UTC.
    """

    config: Config
    reactor: Any
    registry: CollectorRegistry | None
    handler: CommandHandler | None
    on_push: PushHandler | None
    token: TokenProvider | None
    machine: MachineSource | None
    redactor: Redactor
    wall: Callable[[], float]
    timestamp: Timestamps
    random: Random
    executor: Executor | None
    environ: Mapping[str, str]

    @property
    def version(self) -> str:
        """The agent's version, as backends hear it."""
        return self.config.agent_version or __version__

    def dialer(self, user_agent: str, observe_tls: Callable[[Target, TLSFacts], None]) -> Dialer:
        """Return what opens the connections of one run."""
        return Dialer(
            self.reactor,
            self.config.tls,
            observe_tls=observe_tls,
            proxy=partial(proxies.choose, self.config.proxy, self.environ),
            user_agent=user_agent,
            wall=self.wall,
            secret=self.redactor.secret,
        )


def token_provider(env: Environment) -> TokenProvider:
    """
    Return what gives the token: the embedding agent's own provider, or what ``[auth]`` asks for.

    :raise ConfigError: the token given here and now is missing or unusable, or this reactor cannot run a command.
    """
    auth = env.config.auth

    def renewed(fetch: Callable[[], Awaitable[Token]], *, keep: bool) -> Renewal:
        return Renewal(
            fetch, keep=keep, timeout=auth.command_timeout, clock=env.reactor, wall=env.wall, random=env.random
        )

    if isinstance(env.token, CallableToken):
        return renewed(env.token.get, keep=False)
    return env.token or providers.from_config(
        auth,
        env.environ,
        command=lambda argv: renewed(TokenCommand(argv, reactor=env.reactor, wall=env.wall).run, keep=True),
    )


def authorization(
    env: Environment,
    provider: TokenProvider,
    metrics: Metrics,
    in_thread: Callable[[Callable[[], None]], Deferred[None]],
) -> Authorization:
    """
    Return what both transports ask for tokens.

    :param in_thread: does what may block.
    """
    auth = env.config.auth
    source = "provider" if env.token else next((name for name in TOKEN_SOURCES if getattr(auth, name)), "none")
    return Authorization(
        provider,
        source=source,
        table=TokenTable(refused_delay=auth.refused_delay, random=env.random),
        clock=env.reactor,
        wall=env.wall,
        redactor=env.redactor,
        metrics=metrics,
        file=(
            AcceptedTokens(auth.accepted_token_file, in_thread, _places(env.config))
            if auth.accepted_token_file
            else None
        ),
    )


def _places(config: Config) -> dict[str, str]:
    """Return where each backend is, by its name: the origins of its two transports."""
    return {
        backend_name(backend): " ".join(
            f"{target.scheme}://{target.authority}" for target in (http_target(backend), websocket_target(backend))
        )
        for backend in config.backends
    }
