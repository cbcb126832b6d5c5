"""
What happened in a simulated world, line by line: who did what, at which virtual moment.

The history is all that the oracles judge by, and what a person reads when one of them objects. It holds ids, names and
sizes, never what was sent, so it is the same text whenever the same seed runs.

The words that the oracles know:

=================  ========================================================================================
``gave``           the backend was given a command; ``held`` says whether it is durable there (commsmgr.v1)
``sent-again``     the backend has sent a command once more; ``gave-again``: in good weather, a finished one
``stored``         a result came and is durable at the backend; ``again`` if it was there before; ``short`` if it says
                   that its output is no longer kept
``declined``       a backend refused a message: for good, unless ``later``; ``fault`` if it was told to
``inventory``      an inventory is durable at the backend; ``told`` if the agent learns from heartbeats which one the
                   backend has (commsmgr.v1)
``started``        an agent's manager has started; ``stopped``: it has stopped in order
``died``           a process died; ``power`` says whether its machine did too
``ran``            an agent's handler was called with a command
``kept``           the spool has said that a result is durable; ``ttl`` in seconds, -1 without; ``key`` of the command
                   that it closes, 0 if it closes none
``accepted``       an agent was told that a result is durable
``known``          a command came again; ``missing`` if its result is not remembered any more
``handed``         an inventory was handed to the spool; ``stock``: the spool has said that it is durable
``losses``         a row of a receipt for messages that were given up is durable at the backend
``leftover``       something is still there of a process that has stopped in order
``complaint``      an error was logged, or an exception escaped
``healed``         all faults are over; ``within``: seconds in which every agent has to be in touch again
``in-touch``       an agent is registered, and its backend says so too; ``apart``: that is no longer so
``ending``         from here on everything is stopped
``settled``        nothing is waiting anywhere any more
=================  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from msgspec import Struct, field

Fact: TypeAlias = str | int | float | bool


class Record(Struct, frozen=True):
    """
    One line.

    :ivar at: virtual seconds.
    :ivar who: the process, or ``world``, or ``network``.
    :ivar what: a word.
    :ivar subject: the id or name of what it is about.
    """

    at: float
    who: str
    what: str
    subject: str
    facts: dict[str, Fact]

    def __str__(self) -> str:
        facts = " ".join(f"{name}={_shown(value)}" for name, value in self.facts.items())
        return f"{self.at:11.6f}  {self.who:<10} {self.what:<10} {self.subject} {facts}".rstrip()


class DeadLetter(Struct, frozen=True):
    """A message that an agent gave up, and why. The moments are those of the agent's own wall clock."""

    id: str
    kind: str
    command_id: str
    reason: str
    accepted_at: float
    died_at: float


class AgentEnd(Struct):
    """
    What was found of one agent at the end.

    :ivar waiting: ids of events in its outbox.
    :ivar states: ids of states in its outbox.
    :ivar open_commands: ids of commands in its inbox without a result.
    :ivar dead: its dead letters.
    :ivar losses: what it has counted as lost and no backend has acknowledged, by reason and kind.
    :ivar unreported: how many these are by its own account.
    :ivar totals: what its totals say, and what is true, by the total's name.
    :ivar highest: the most that was ever held, by what.
    :ivar bounds: what was configured as the most, by the same names.
    """

    waiting: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    open_commands: list[str] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    losses: dict[str, int] = field(default_factory=dict)
    unreported: int = 0
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)


class History:
    """
    All lines so far.

    :param seconds: the virtual clock.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self.records: list[Record] = []

    def note(self, who: str, what: str, subject: str = "", /, **facts: Fact) -> None:
        """Add a line."""
        self.records.append(Record(self._seconds(), who, what, subject, facts))

    def all(self, what: str, who: str | None = None) -> Iterator[Record]:
        """Return the lines with that word, in order, all or those of one process."""
        return (record for record in self.records if record.what == what and who in (None, record.who))

    def text(self, last: int | None = None) -> str:
        """Return all lines, or the last ones, as text."""
        return "\n".join(map(str, self.records if last is None else self.records[-last:]))


def _shown(value: Fact) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
