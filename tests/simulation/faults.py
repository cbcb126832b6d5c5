"""
What goes wrong, when, for how long: drawn from the seed before anything runs, so that a plan can be read and replayed.

Each kind of fault is a generator: what stands before its ``yield`` begins the fault, what stands after it ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from tests.simulation.backend import Front
from tests.simulation.process import Process
from tests.simulation.setting import BACKEND, FRONTS, Setting

if TYPE_CHECKING:
    from tests.simulation.scenario import World

Details: TypeAlias = dict[str, Any]


class Fault(Struct, frozen=True):
    """
    One fault of a plan.

    :ivar at: virtual seconds, as is ``seconds``, which is how long it lasts.
    :ivar target: a host, or the two ends of a path with ``/`` between them.
    """

    at: float
    seconds: float
    kind: str
    target: str
    details: Details

    def __str__(self) -> str:
        details = " ".join(f"{name}={value}" for name, value in self.details.items())
        return f"{self.at:8.3f} +{self.seconds:6.3f}  {self.kind:<12} {self.target} {details}".rstrip()


@dataclass(frozen=True)
class Kind:
    """How a kind of fault strikes, how often, where, for how long, and with which further details."""

    strike: Callable[[World, Fault], Iterator[None]]
    weight: float
    where: Callable[[Setting], tuple[str, ...]]
    longest: float
    details: Callable[[Random], Details]


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    weight: float,
    where: Callable[[Setting], tuple[str, ...]],
    longest: float = 0.0,
    details: Callable[[Random], Details] = lambda random: {},
) -> Callable[[Callable[[World, Fault], Iterator[None]]], Callable[[World, Fault], Iterator[None]]]:
    """Give a generator its place among the kinds."""

    def add(strike: Callable[[World, Fault], Iterator[None]]) -> Callable[[World, Fault], Iterator[None]]:
        KINDS[name] = Kind(strike, weight, where, longest, details)
        return strike

    return add


def plan(setting: Setting, random: Random) -> list[Fault]:
    """Return the faults of a seed, in order."""
    possible = {name: kind for name, kind in KINDS.items() if kind.where(setting)}
    weights = [kind.weight for kind in possible.values()]
    faults = []
    at = random.uniform(1.0, 6.0)
    while at < setting.seconds:
        (name,) = random.choices(list(possible), weights)
        chosen = possible[name]
        seconds = min(random.uniform(0.1, 1.0) * chosen.longest, setting.seconds - at)
        faults.append(Fault(at, seconds, name, random.choice(chosen.where(setting)), chosen.details(random)))
        at += random.expovariate(1 / 5.0)
    if random.random() < 0.12:
        # So that attempts are as far apart as they ever get when it is over.
        faults.append(Fault(setting.seconds - 0.5, random.uniform(60.0, 120.0), "all-down", "everything", {}))
    return faults


# -- where ------------------------------------------------------------------------------------------------------------


def _agents(setting: Setting) -> tuple[str, ...]:
    return setting.agents


def _backend(setting: Setting) -> tuple[str, ...]:
    return (BACKEND,)


def _v1_backend(setting: Setting) -> tuple[str, ...]:
    return (BACKEND,) if setting.dialect == "v1" else ()


def _fronts(setting: Setting) -> tuple[str, ...]:
    return FRONTS if setting.fronts else ()


def _servers(setting: Setting) -> tuple[str, ...]:
    return FRONTS if setting.fronts else (BACKEND,)


def _paths(setting: Setting) -> tuple[str, ...]:
    """Return the paths that something may happen on: those of the agents, and those behind the fronts."""
    paths = tuple(f"{agent}/{server}" for agent in setting.agents for server in _servers(setting))
    return paths + tuple(f"{front}/{BACKEND}" for front in _fronts(setting))


def _everything(setting: Setting) -> tuple[str, ...]:
    return ("everything",)


# -- the network ------------------------------------------------------------------------------------------------------


@kind("cut", 4, _paths)
def cut(world: World, fault: Fault) -> Iterator[None]:
    """Every connection is reset."""
    world.path(fault.target).cut()
    yield


@kind("blackhole", 4, _paths, 25.0)
def blackhole(world: World, fault: Fault) -> Iterator[None]:
    """Nothing arrives, and nobody says so."""
    world.path(fault.target).blackhole()
    yield
    world.path(fault.target).heal()


@kind("one-way", 4, _paths, 20.0, lambda random: {"end": random.randrange(2)})
def one_way(world: World, fault: Fault) -> Iterator[None]:
    """Nothing arrives at one of the two ends."""
    world.path(fault.target).blackhole(toward=fault.target.split("/")[fault.details["end"]])
    yield
    world.path(fault.target).heal()


@kind("refused", 3, _paths, 20.0)
def refused(world: World, fault: Fault) -> Iterator[None]:
    """Connections are reset, and new ones refused."""
    path = world.path(fault.target)
    path.refuse()
    path.cut()
    yield
    path.heal()


@kind(
    "slow",
    3,
    _paths,
    20.0,
    lambda random: {"latency": round(random.uniform(0.1, 1.5), 3), "bandwidth": random.choice((None, 4000, 40_000))},
)
def slow(world: World, fault: Fault) -> Iterator[None]:
    """The way is long and narrow."""
    path = world.path(fault.target)
    path.latency = path.jitter = fault.details["latency"]
    path.bandwidth = fault.details["bandwidth"]
    yield
    world.as_usual(fault.target)


@kind("no-name", 2, _servers, 20.0)
def no_name(world: World, fault: Fault) -> Iterator[None]:
    """The name does not resolve, and what is connected is cut, so that it matters."""
    address = world.network.names.pop(f"{fault.target}.example", "")
    world.cut_all(fault.target)
    yield
    if address:
        world.network.names[f"{fault.target}.example"] = address


@kind("no-answer", 2, _servers, 20.0)
def no_answer(world: World, fault: Fault) -> Iterator[None]:
    """Nobody answers for the name, and what is connected is cut."""
    world.network.hang_names.add(f"{fault.target}.example")
    world.cut_all(fault.target)
    yield
    world.network.hang_names.discard(f"{fault.target}.example")


@kind("all-down", 1.5, _everything, 30.0)
def all_down(world: World, fault: Fault) -> Iterator[None]:
    """No server can be reached by anybody, while the agents have much to say."""
    for pair in _paths(world.setting):
        world.path(pair).refuse()
        world.path(pair).cut()
    for agent in world.agents:
        world.flood(agent, 60)
    yield
    for pair in _paths(world.setting):
        world.path(pair).heal()


# -- death and life ---------------------------------------------------------------------------------------------------


def _again(world: World, process: Process) -> None:
    if not process.alive:
        process.start()


def _everyone(setting: Setting) -> tuple[str, ...]:
    # Agents die more often: what is proven is theirs.
    return (*setting.agents, *setting.agents, BACKEND)


@kind("kill", 5, _everyone, 8.0, lambda random: {"power": random.random() < 0.5})
def kill(world: World, fault: Fault) -> Iterator[None]:
    """The process dies, or its machine."""
    process = world.process(fault.target)
    process.kill(power=world.power(process, fault.details["power"]))
    yield
    _again(world, process)


@kind(
    "crash",
    10,
    _everyone,
    12.0,
    lambda random: {"operations": int(random.expovariate(1 / 12)) + 1, "power": random.random() < 0.5},
)
def crash(world: World, fault: Fault) -> Iterator[None]:
    """The process dies in the middle of its work on the disk."""
    process = world.process(fault.target)
    process.crash_in(fault.details["operations"], power=world.power(process, fault.details["power"]))
    yield
    process.crash_in(0, power=False)
    _again(world, process)


@kind("last-words", 4, _everyone, 8.0, lambda random: {"packets": random.randrange(1, 12)})
def last_words(world: World, fault: Fault) -> Iterator[None]:
    """The process dies just after it has sent something."""
    process = world.process(fault.target)
    world.after_sending(process, fault.details["packets"], process.kill)
    yield
    world.after_sending(process, 0, process.kill)
    _again(world, process)


@kind("stop", 4, _everyone, 12.0)
def stop(world: World, fault: Fault) -> Iterator[None]:
    """The process stops in good order, whatever it is busy with, and starts again."""
    process = world.process(fault.target)
    process.stop()
    yield
    _again(world, process)


@kind("front-down", 2, _fronts, 15.0)
def front_down(world: World, fault: Fault) -> Iterator[None]:
    """A reverse proxy dies."""
    process = world.process(fault.target)
    process.kill()
    yield
    _again(world, process)


# -- disk, clock, token -----------------------------------------------------------------------------------------------


@kind("disk-full", 3, _agents, 15.0, lambda random: {"room": random.choice((0, 8 << 10, 40 << 10))})
def disk_full(world: World, fault: Fault) -> Iterator[None]:
    """The agent's disk fills up."""
    disk = world.process(fault.target).disk
    disk.capacity = world.used(disk) + fault.details["room"]
    yield
    disk.capacity = None


@kind(
    "disk-fails",
    4,
    _agents,
    10.0,
    lambda random: {"what": random.choice(("sync", "write", "read", "any")), "share": random.choice((0.3, 1.0))},
)
def disk_fails(world: World, fault: Fault) -> Iterator[None]:
    """One kind of operation on the agent's disk fails, or any, always or now and then."""
    process = world.process(fault.target)
    process.fail(fault.details["what"], fault.details["share"])
    yield
    process.fail("")


@kind("clock-step", 3, _agents, 0.0, lambda random: {"by": random.choice((-7200, -3, 3, 120, 3600))})
def clock_step(world: World, fault: Fault) -> Iterator[None]:
    """The agent's wall clock is set."""
    world.agent(fault.target).step += fault.details["by"]
    yield


@kind("rotation", 2, _everything, 6.0)
def rotation(world: World, fault: Fault) -> Iterator[None]:
    """The backend wants another token; the agents get it later."""
    token = f"token-{fault.at:.3f}"
    world.set_backend_token(token)
    yield
    world.token = token


# -- a backend or a proxy that misbehaves -----------------------------------------------------------------------------


def _misbehaviour(random: Random) -> Details:
    status = random.choice((400, 401, 403, 404, 429, 500, 502, 503, 503, 302))
    transport = random.choice(("both", "http", "websocket"))
    return random.choice(
        (
            {"fault": "refuse"},
            {"fault": "hang", "transport": transport},
            {"fault": "drop"},
            {"fault": "drop", "after": random.randrange(1, 6)},
            {"fault": "slow", "transport": transport, "delay": round(random.uniform(0.2, 7.0), 2)},
            {"fault": "status", "transport": transport, "status": status, "retry_after": random.choice((None, 2, 30))},
            {"fault": "html", "transport": transport},
            {"fault": "no_ack"},
            {"fault": "nack", "retry_after": random.choice((None, 0.2, 3.0)), "count": random.randrange(1, 4)},
            {"fault": "nack", "retry_after": None, "count": random.randrange(1, 4)},
            {
                "fault": "status",
                "transport": "http",
                "status": random.choice((400, 413)),
                "count": random.randrange(1, 9),
            },
            {"fault": "crash", "stored": random.random() < 0.5, "count": random.randrange(1, 4)},
            {"fault": "crash", "stored": random.random() < 0.5, "count": random.randrange(1, 4)},
            {"fault": "close", "code": random.choice((1000, 1001, 1008, 1011, 1012, 1013, 4401, 4429))},
            {"fault": "silent", "count": random.randrange(1, 3)},
            {"fault": "malformed", "form": random.choice(("garbage", "binary", "unknown", "deep", "utf8", "bits"))},
            {"fault": "blackhole", "direction": random.choice(("in", "out", "both"))},
        )
    )


@kind("misbehave", 14, _backend, 12.0, _misbehaviour)
def misbehave(world: World, fault: Fault) -> Iterator[None]:
    """The backend does what its own list of faults offers."""
    settings = dict(fault.details)
    name = settings.pop("fault")
    if world.backend.alive:
        world.backend.service.faults.inject(name, **settings)
    yield
    if world.backend.alive:
        world.backend.service.faults.clear(name)


@kind("goaway", 2, _v1_backend, 0.0, lambda random: {"after": random.uniform(0, 5), "window": random.uniform(0, 4)})
def goaway(world: World, fault: Fault) -> Iterator[None]:
    """The backend asks its agents to leave and return."""
    if world.backend.alive and world.backend.service.running:
        world.backend.service.goaway(fault.details["after"], fault.details["window"])
    yield


@kind("no-upgrade", 4, _fronts, 30.0, lambda random: {"mood": random.choice(("refuse", "cut"))})
def no_upgrade(world: World, fault: Fault) -> Iterator[None]:
    """A proxy lets no WebSocket live, and HTTP works."""
    front = world.process(fault.target)
    assert isinstance(front, Front)
    front.mood = fault.details["mood"]
    if front.alive:
        front.cut()
    yield
    front.mood = "good"


# -- a plan at work ---------------------------------------------------------------------------------------------------


class Mischief:
    """
    Carries a plan out.

    :ivar under_way: faults that have begun and not ended.
    """

    def __init__(self, world: World, faults: list[Fault]) -> None:
        self._world = world
        self.under_way: dict[int, Iterator[None]] = {}

        for number, fault in enumerate(faults):
            world.clock.callLater(fault.at, self._begin, number, fault)

    def _begin(self, number: int, fault: Fault) -> None:
        self._world.history.note("world", "fault", fault.kind, number=number, on=fault.target, **_plain(fault.details))
        strike = KINDS[fault.kind].strike(self._world, fault)
        next(strike)
        self.under_way[number] = strike
        self._world.clock.callLater(fault.seconds, self._end, number, fault.kind)

    def _end(self, number: int, kind: str) -> None:
        self._world.history.note("world", "over", kind, number=number)
        next(self.under_way.pop(number), None)


def _plain(details: Details) -> Details:
    return {name: str(value) if value is None else value for name, value in details.items()}
