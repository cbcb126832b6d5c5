"""What kind of world a seed makes: which dialect, how many agents, how much room, how long."""

from __future__ import annotations

from random import Random
from typing import Literal, TypeAlias

from msgspec import Struct

from commsmgr import config

Dialect: TypeAlias = Literal["v1", "plain", "quirks"]

BACKEND = "backend"
FRONTS = ("front-1", "front-2")
PORT = 8080

IN_FLIGHT = 16
PENDING = 60
CONCURRENCY = 3
REPEATABLE = "repeat"
"""The type of commands that agents declare safe to repeat."""


class Setting(Struct, frozen=True):
    """
    What stays the same while a world exists.

    :ivar agents: names, each a host, a process and a machine_id.
    :ivar dialect: what the backend speaks; ``quirks`` is plain as the worse backends speak it.
    :ivar websocket: whether agents use WebSockets at all.
    :ivar fronts: whether the backend is reached through two reverse proxies, the agents' two backends.
    :ivar reader: whether agents read commands() instead of having a handler.
    :ivar max_events: bound on events in the spool.
    :ivar seconds: how long faults go on.
    :ivar max_bytes: bound on the bytes of events in the spool.
    """

    agents: tuple[str, ...]
    dialect: Dialect
    websocket: bool
    fronts: bool
    reader: bool
    durability: Literal["full", "normal"]
    max_events: int
    seconds: float
    max_bytes: int

    @classmethod
    def draw(cls, random: Random) -> Setting:
        """Return the setting of a seed."""
        dialect: Dialect = random.choices(("v1", "plain", "quirks"), (6, 2, 1))[0]
        return cls(
            agents=("agent-1", "agent-2") if random.random() < 0.2 else ("agent-1",),
            dialect=dialect,
            # A plain backend has no way for commands but the WebSocket.
            websocket=dialect != "v1" or random.random() < 0.85,
            fronts=random.random() < 0.35,
            reader=random.random() < 0.25,
            durability="normal" if random.random() < 0.15 else "full",
            max_events=25 if random.random() < 0.25 else 5000,
            seconds=random.uniform(50.0, 100.0),
            # A quarter of it is for dead letters, of which each one must fit.
            max_bytes=100_000 if random.random() < 0.2 else 64 << 20,
        )

    def __str__(self) -> str:
        fields = (f"{name}={getattr(self, name)}" for name in self.__struct_fields__)
        return " ".join(fields).replace("'", "")


def agent_config(setting: Setting, machine: str, directory: str) -> config.Config:
    """Return the configuration of one agent: every wait is short, so that much happens in little time."""
    hosts = FRONTS if setting.fronts else (BACKEND,)
    return config.Config(
        backends=tuple(
            config.Backend(
                url=f"http://{host}.example:{PORT}",
                websocket_url=f"ws://{host}.example:{PORT}/ws",
                name=host,
                insecure=True,
            )
            for host in hosts
        ),
        machine_id=machine,
        auth=config.Auth(refused_delay=4.0),
        http=config.HTTP(timeout=6.0, attempts=2),
        websocket=config.WebSocket(
            enabled=setting.websocket,
            connect_timeout=5.0,
            register_timeout=3.0,
            register_wait=2.0,
            ping_interval=5.0,
            ping_timeout=3.0,
            receipt_timeout=8.0,
            stable_after=5.0,
            max_message_bytes=1 << 20,
            window_messages=IN_FLIGHT,
            window_bytes=128 << 10,
        ),
        reconnect=config.Reconnect(base=0.5, cap=6.0, return_after=20.0, retry_after_cap=6.0),
        breaker=config.Breaker(failures=4, open_for=3.0),
        spool=config.Spool(
            path=directory,
            durability=setting.durability,
            max_events=setting.max_events,
            max_bytes=setting.max_bytes,
        ),
        delivery=config.Delivery(http_fallback_after=6.0),
        commands=config.Commands(
            concurrency=CONCURRENCY,
            max_pending=PENDING,
            default_timeout=8.0,
            max_timeout=20.0,
            safe_to_repeat=(REPEATABLE,),
        ),
        heartbeat=config.Heartbeat(interval=8.0, jitter=2.0),
        inventory=config.Inventory(interval=60.0, jitter=20.0),
        stop_deadline=6.0,
    )


def promised(settings: config.Config) -> float:
    """
    Return in how many seconds an agent is in touch again once nothing is in its way.

    It may have to find out that its connection is dead, wait as long as the last refusal or the breaker asked for, and
    try again; with several backends it may have to go round once.
    """
    websocket, pace = settings.websocket, settings.reconnect
    notice = websocket.ping_interval + max(2 * websocket.ping_timeout, websocket.receipt_timeout)
    pause = max(pace.cap, 1.5 * settings.auth.refused_delay, 1.2 * pace.retry_after_cap + pace.cap)
    attempt = websocket.connect_timeout + websocket.register_timeout
    if not websocket.enabled:
        pause = max(pause, 1.2 * settings.breaker.open_for) + settings.heartbeat.interval
        attempt = settings.http.attempts * settings.http.timeout
    return notice + len(settings.backends) * (pause + attempt)
