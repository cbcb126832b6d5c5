"""How a manager stands, put together from its parts: for operators, health checks, metrics and the heartbeat."""

from __future__ import annotations

from commsmgr.auth.authorization import Authorization
from commsmgr.backends import Backends
from commsmgr.environment import Environment
from commsmgr.errors import CommsError
from commsmgr.policy.budget import OutageBudget
from commsmgr.spool import Opened, Spool
from commsmgr.status import BackendStatus, QueueStatus, Registered, Status


class Overview:
    """
    Looks at the parts of one run, and keeps next to nothing itself.

    :param machine_id: who the agent is to its backends.
    :ivar running: whether the spool is open.
    :ivar opened: what was found when the spool was opened, or None.
    """

    def __init__(
        self,
        environment: Environment,
        backends: Backends,
        spool: Spool,
        authorization: Authorization,
        machine_id: str,
    ) -> None:
        self._environment = environment
        self._config = environment.config
        self._backends = backends
        self._spool = spool
        self._machine_id = machine_id
        self._authorization = authorization
        self._outage = OutageBudget(environment.reactor.seconds)
        self.running = False
        self.opened: Opened | None = None

    def accepted(self, count: int, size: int) -> None:
        """Events of ``size`` bytes together were accepted: the outage budget depends on how fast they come."""
        self._outage.accepted(count, size)

    @property
    def connected(self) -> bool:
        """Whether a backend can be talked to, as :attr:`Status.connected` says it."""
        return self._registered or (not self._config.websocket.enabled and self._http_works)

    @property
    def _registered(self) -> bool:
        return any(isinstance(line.link.state, Registered) for line in self._backends.lines)

    @property
    def _http_works(self) -> bool:
        return any(line.http_works for line in self._backends.lines)

    def status(self, failed: CommsError | None) -> Status:
        """Say how things stand."""
        return Status(
            running=self.running,
            connected=self.connected,
            reachable=self._registered or self._http_works,
            machine_id=self._machine_id,
            version=self._environment.version,
            backends=tuple(
                BackendStatus(
                    name=line.name,
                    url=line.http_target.join(""),
                    active=line is self._backends.active,
                    link=line.link.state,
                    breaker=line.breaker.state,
                    last_receipt=line.last_receipt,
                    last_error=line.link.last_error,
                )
                for line in self._backends.lines
            ),
            queue=self.queue(),
            problems=tuple(self._problems(failed)),
            auth=self._authorization.status,
        )

    def _problems(self, failed: CommsError | None) -> list[str]:
        problems = [] if failed is None else [str(failed)]
        if self.opened is not None and self.opened.set_aside is not None:
            rest = "nothing was taken over" if self.opened.salvaged is None else str(self.opened.salvaged)
            problems.append(f"the spool could not be used and was set aside as {self.opened.set_aside}: {rest}")
        if self._spool.trouble:
            problems.append(self._spool.trouble)
        token = self._authorization.status
        if token.refused:
            instead = "; where one was accepted before, that is used" if token.earlier else ""
            problems.append(f"the token was refused (HTTP 401) by {', '.join(token.refused)}{instead}")
        active = self._backends.active
        if active.link.last_error and not isinstance(active.link.state, Registered):
            problems.append(f"not connected to {active.name}: {active.link.last_error}")
        return problems

    def queue(self) -> QueueStatus:
        """Say what is held for the backend."""
        stats, bounds = self._spool.outbox.stats, self._config.spool
        return QueueStatus(
            events=stats.events,
            event_bytes=stats.event_bytes,
            states=stats.states,
            dead_letters=stats.dead_letters,
            oldest_event_at=stats.oldest_event_at,
            outage_budget=self._outage.seconds_left(
                bounds.max_events - stats.events, bounds.max_bytes - stats.event_bytes
            ),
            open_commands=self._spool.inbox.open_count,
            dropped=stats.dropped.copy(),
            unreported_losses=self._spool.losses.unreported,
            trouble=self._spool.trouble,
        )


def idle(environment: Environment, machine_id: str, failed: CommsError | None) -> Status:
    """Return the status of a manager that does not run."""
    return Status(
        running=False,
        connected=False,
        reachable=False,
        machine_id=machine_id,
        version=environment.version,
        backends=(),
        queue=QueueStatus(),
        problems=(str(failed),) if failed is not None else (),
    )
