"""What a manager was given, and what each of its runs is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred

from commsmgr import credentials
from commsmgr._version import __version__
from commsmgr.config import Config
from commsmgr.instants import rfc3339
from commsmgr.interfaces import CommandHandler, MachineSource, PushHandler, TokenProvider
from commsmgr.observe.metrics import Metrics
from commsmgr.proxies import choose
from commsmgr.redact import Redactor
from commsmgr.spool import Executor
from commsmgr.transport.endpoint import Dialer, TLSFacts
from commsmgr.urls import Target


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The parameters of :class:`~commsmgr.manager.Manager`, checked and with their defaults filled in."""

    config: Config
    reactor: Any
    registry: CollectorRegistry
    handler: CommandHandler | None
    on_push: PushHandler | None
    token: TokenProvider | None
    machine: MachineSource | None
    redactor: Redactor
    wall: Callable[[], float]
    random: Random
    executor: Executor | None
    environ: Mapping[str, str]

    @property
    def version(self) -> str:
        """The agent's version, as backends hear it."""
        return self.config.agent_version or __version__

    def timestamp(self) -> str:
        """Return the time now as RFC 3339, in UTC."""
        return rfc3339(self.wall())

    def dialer(self, user_agent: str, observe_tls: Callable[[Target, TLSFacts], None]) -> Dialer:
        """Return what opens the connections of one run."""
        return Dialer(
            self.reactor,
            self.config.tls,
            observe_tls=observe_tls,
            # Chosen once a run for each target, whatever becomes of the process's environment meanwhile.
            proxy=cache(partial(choose, self.config.proxy, self.environ)),
            user_agent=user_agent,
            wall=self.wall,
            secret=self.redactor.secret,
        )


class NotedToken:
    """Passes tokens on, so that the log never shows one and the metrics know when it expires."""

    def __init__(self, provider: TokenProvider, redactor: Redactor, metrics: Metrics) -> None:
        self._provider = provider
        self._redactor = redactor
        self._metrics = metrics
        self._last = ""

    def get(self) -> Deferred[str]:
        return self._provider.get().addCallback(self._note)

    def refused(self, token: str) -> None:
        self._provider.refused(token)

    def _note(self, token: str) -> str:
        if token != self._last:
            self._last = token
            self._redactor.secret(token)
            self._metrics.token_expires(credentials.expiry(token))
        return token
