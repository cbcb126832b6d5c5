"""A whole world for tests: the reference backend and a whole manager, on real loopback sockets and a real spool."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.trial.unittest import TestCase

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.manager import Manager
from commsmgr.messages import JSONObject, SystemHealth

MACHINE = "machine-1"
TOKEN = "secret-token-of-the-tests"

reactor: Any = installed


class StillMachine:
    """A machine that is always the same."""

    def __init__(self) -> None:
        self.data: JSONObject = {"system": {"hostname": "still"}}

    def inventory(self) -> JSONObject:
        return self.data

    def health(self) -> SystemHealth:
        return SystemHealth(cpu_usage_percent=1.0, status="healthy")


def quick(backend: ReferenceBackend | str, directory: str, **changes: Any) -> config.Config:
    """
    Return a configuration with short waits and no schedules.

    :param changes: sections by name, each replacing the default one.
    """
    url = backend if isinstance(backend, str) else backend.url
    websocket_url = "" if isinstance(backend, str) else backend.websocket_url
    base = config.Config(
        backends=(config.Backend(url=url, websocket_url=websocket_url, name="main"),),
        machine_id=MACHINE,
        auth=config.Auth(token=TOKEN, refused_delay=1.0),
        reconnect=config.Reconnect(base=0.02, cap=0.1),
        breaker=config.Breaker(failures=1000, open_for=0.1),
        websocket=config.WebSocket(
            connect_timeout=5.0, register_wait=0.1, register_timeout=2.0, ping_interval=5.0, stable_after=0.0
        ),
        heartbeat=config.Heartbeat(interval=0),
        inventory=config.Inventory(interval=0),
        spool=config.Spool(path=directory, durability="normal"),
        stop_deadline=3.0,
    )
    return msgspec.structs.replace(base, **changes)


class WorldTestCase(TestCase):
    """Makes backends and managers, and sees that they are gone at the end."""

    timeout = 30

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="commsmgr-test-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)

    async def backend(self, **parameters: Any) -> ReferenceBackend:
        """Return a backend that listens."""
        parameters.setdefault("token", TOKEN)
        backend = ReferenceBackend(reactor, wall=time.time, random=Random(1), **parameters)
        self.addCleanup(lambda: backend.stopService() if backend.running else None)
        await backend.startService()
        return backend

    def manager(self, settings: config.Config, **parameters: Any) -> Manager:
        """Return a manager that is not started yet."""
        parameters.setdefault("machine", StillMachine())
        manager = Manager(settings, reactor=reactor, random=Random(2), **parameters)
        self.addCleanup(manager.stopService)
        return manager


def until(condition: Callable[[], object], clock: IReactorTime = reactor, *, every: float = 0.005) -> Deferred[None]:
    """Fire as soon as ``condition`` is true; for what cannot be waited for otherwise. The test's timeout bounds it."""
    done: Deferred[None] = Deferred(lambda _: call[0].cancel())

    def look() -> None:
        if condition():
            done.callback(None)
        else:
            call[0] = clock.callLater(every, look)

    call = [clock.callLater(0, look)]
    return done
