"""What the backend wants of the agents: commands, now and then many at once, now and then one that was given before."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from tests.simulation.setting import REPEATABLE

if TYPE_CHECKING:
    from tests.simulation.scenario import World

EVERY = 1.6
"""Seconds between two occasions, on average."""


class Commander:
    """Gives commands for as long as the world is busy."""

    def __init__(self, world: World, random: Random) -> None:
        self._world = world
        self._random = random
        self._later()

    def _later(self) -> None:
        self._world.clock.callLater(self._random.expovariate(1 / EVERY), self._occasion)

    def _occasion(self) -> None:
        world, random = self._world, self._random
        if not world.busy:
            return
        agent = random.choice(world.setting.agents)
        chance = random.random()
        if chance < 0.08:
            for _ in range(random.randrange(5, 20)):
                self._give(agent)
        elif chance < 0.2:
            given = [record for record in world.history.all("gave") if record.facts["agent"] == agent]
            if given:
                world.backend.give_again(agent, str(random.choice(given).facts["id"]))
        else:
            self._give(agent)
        self._later()

    def _give(self, agent: str) -> None:
        random = self._random
        kind = random.choice(("quick", "quick", "slow", "fail", "self", "big", REPEATABLE))
        options: dict[str, Any] = {}
        if kind in ("slow", REPEATABLE, "self"):
            options["seconds"] = round(random.expovariate(1 / 2.0), 3)
        if kind == "big":
            options["size"] = random.randrange(20_000)
        if kind == "self" and random.random() < 0.3:
            options["ttl"] = round(random.uniform(1.0, 15.0), 3)
        self._world.backend.give(agent, kind, self._world.tag("command"), **options)
