"""What the tests of commands share: a spool in memory with a channel and an intake, on a virtual clock."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from commsmgr import config
from commsmgr.channel import CommandChannel
from commsmgr.intake import Intake
from commsmgr.messages import Command, CommandData, Result
from commsmgr.observe.metrics import Metrics
from commsmgr.session.conversation import CommandArrived
from commsmgr.spool import Lane, Opened, Spool
from commsmgr.spool.outbox_jobs import Ask

BACKEND = config.Backend(url="http://127.0.0.1:1")


def command(key: int = 1, id: str = "", *, timeout: float = 10.0, **fields: Any) -> Command:
    """Return a command as it is offered."""
    fields = {"type": "run", "command": "", "args": (), "options": {}} | fields
    return Command(id=id or f"c{key}", key=key, timeout=timeout, **fields)


def arrived(id: str, digest: str = "", **fields: Any) -> CommandArrived:
    """Return a command as it comes from a link."""
    return CommandArrived(id, digest, CommandData(**{"type": "run", **fields}))


def latest_event(spool: Spool) -> Deferred[int]:
    """Return the number that the last event was given."""
    return spool.outbox._store.submit(Ask(lambda books: books.counter.next_event - 1))


class Source:
    """A link that writes down what it is told to say."""

    def __init__(self, *, can_refuse: bool = True) -> None:
        self.can_refuse = can_refuse
        self.acked: list[str] = []
        self.refused: list[tuple[str, str, float | None]] = []

    def acknowledge(self, command_id: str) -> None:
        self.acked.append(command_id)

    def refuse(self, command_id: str, code: str, message: str, retry_after: float | None) -> bool:
        if self.can_refuse:
            self.refused.append((command_id, code, retry_after))
        return self.can_refuse


class CommandWorld:
    """A spool in memory with a channel and an intake."""

    def __init__(self, *, spool: dict[str, Any] | None = None, **commands: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.config = config.Config(
            backends=(BACKEND,),
            spool=config.Spool(durability="memory", **(spool or {})),
            commands=config.Commands(**commands),
        )
        self.spool = Spool(self.config.spool, reactor=self.clock, wall=self.clock.seconds)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        self.channel = CommandChannel(self.spool.inbox.offered)
        self.reported: list[Result] = []
        self.said: list[Result] = []
        self.intake = Intake(
            spool=self.spool,
            channel=self.channel,
            whole=self.config,
            metrics=self.metrics,
            report=self.reported.append,
            say=self.said.append,
            clock=self.clock,
        )
        self.opened: Opened = self.get(self.spool.open())

    def run(self) -> None:
        """Let everything happen that waits for no time to pass."""
        while any(call.getTime() <= self.clock.seconds() for call in self.clock.getDelayedCalls()):
            self.clock.advance(0)

    def get(self, waiting: Deferred[Any]) -> Any:
        """Return or raise what ``waiting`` fires with."""
        outcomes: list[Any] = []
        waiting.addBoth(outcomes.append)
        self.run()
        if isinstance(outcomes[0], Failure):
            outcomes[0].raiseException()
        return outcomes[0]

    def complete(self, key: int, id: str, body: bytes = b"{}", status: str = "success") -> int:
        """Finish a command; return its result's number."""
        self.get(self.spool.inbox.complete(key=key, command_id=id, status=status, result_id=f"r-{id}", body=body))
        seq: int = self.get(latest_event(self.spool))
        return seq

    def sent(self) -> list[str]:
        """Return the ids of the events that have come to be sent since the last call."""
        return [entry.id for entry in self.spool.outbox.reader(Lane.EVENT).take(1000, 1 << 20)]

    def counted(self, kind: str, outcome: str, direction: str = "in") -> float:
        """Return how often messages of ``kind`` had ``outcome``."""
        labels = {"kind": kind, "direction": direction, "outcome": outcome}
        return self.registry.get_sample_value("commsmgr_messages_total", labels) or 0.0
