"""What an agent's author may rely on: typed errors at the call, any order of starts and stops, the public names."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from twisted.application.service import Application, IService, IServiceCollection, MultiService
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.error import ConnectionRefusedError as Refused
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

import commsmgr
from commsmgr import assembly, config, reporting
from commsmgr.assembly import Run
from commsmgr.backend.service import ReferenceBackend
from commsmgr.backends import Backends
from commsmgr.errors import (
    AlreadyCompleted,
    CommsError,
    ConfigError,
    InvalidMessage,
    NotRunning,
    QueueFull,
    SpoolLocked,
    SpoolWriteFailed,
    TransportError,
    UsageError,
)
from commsmgr.manager import Manager
from commsmgr.messages import Command, Push, Result
from commsmgr.observe.health import ready
from commsmgr.session.conversation import SettingsArrived
from commsmgr.spool import Spool
from commsmgr.spool.ballast import Ballast
from commsmgr.spool.files import DATABASE
from commsmgr.status import Waiting
from commsmgr.transport.peer import TLSFacts
from commsmgr.urls import Target
from tests.world import MACHINE, Runs, WorldTestCase, nothing_held, quick, reactor, until

NOWHERE = "http://127.0.0.1:1"


class PublicNames(SynchronousTestCase):
    """The package's face."""

    def test_names(self) -> None:
        """These names are public; taking one away breaks agents, adding one is a promise."""
        self.assertEqual(
            sorted(commsmgr.__all__),
            [
                "CallableToken", "Command", "CommandChannel", "CommsError", "Config", "ConfigError",
                "DeadlineExceeded", "HTTPResponse", "Manager", "Push", "QueueFull", "Result", "Status",
                "SystemHealth", "Token", "TransportError", "__version__", "load",
            ],
        )  # fmt: skip
        for name in commsmgr.__all__:
            self.assertIsNotNone(getattr(commsmgr, name))

    def test_methods(self) -> None:
        """So are these methods of the manager."""
        own = {name for name in vars(Manager) if not name.startswith("_")}
        self.assertEqual(
            own - {"log", "startService", "stopService"},
            {
                "alive", "commands", "connect", "disconnect", "send_heartbeat", "send_http", "send_inventory",
                "send_result", "started", "status", "when_connected",
            },
        )  # fmt: skip


class NotStarted(SynchronousTestCase):
    """A manager that is only made: nothing is opened, every call says what is wrong."""

    def setUp(self) -> None:
        self.clock = Clock()
        settings = config.Config(backends=(config.Backend(url=NOWHERE),), machine_id="m", agent_version="9.9")
        self.manager = Manager(settings, reactor=self.clock)

    def test_not_running(self) -> None:
        """Every message is refused with NotRunning."""
        manager = self.manager
        for waiting in (
            manager.send_heartbeat(),
            manager.send_inventory({}),
            manager.send_result(Result(command_id="c")),
            manager.send_http("GET", "/x"),
        ):
            self.failureResultOf(waiting, NotRunning)
        self.assertRaises(NotRunning, manager.commands)

    def test_status(self) -> None:
        """The status can be had all the same."""
        status = self.manager.status()
        self.assertEqual(
            (status.running, status.connected, status.machine_id, status.version), (False, False, "m", "9.9")
        )
        self.assertEqual((status.backends, status.problems), ((), ()))
        msgspec.json.encode(status)

    def test_disconnect(self) -> None:
        """Stopping what was never started is done at once, and leaves nothing."""
        self.successResultOf(self.manager.disconnect())
        self.successResultOf(self.manager.disconnect())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_waiting_for_a_start(self) -> None:
        """Who waits for the start or the connection of a manager that is never started hears of its end."""
        waiting = [self.manager.when_connected(), self.manager.started()]
        for each in waiting:
            self.assertNoResult(each)
        self.manager.disconnect()
        for each in waiting:
            self.failureResultOf(each, NotRunning)

    def test_cancelled_waiting(self) -> None:
        """Cancelling the wait touches no other wait."""
        first, second = self.manager.when_connected(), self.manager.when_connected()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertNoResult(second)
        self.manager.disconnect()
        self.failureResultOf(second, NotRunning)

    def test_config_is_checked(self) -> None:
        """A wrong setting shows where the manager is made."""
        settings = config.Config(backends=(config.Backend(url="ftp://x"),))
        error = self.assertRaises(ConfigError, Manager, settings, reactor=self.clock)
        self.assertIn("backends[0].url", str(error))

    def test_http_arguments(self) -> None:
        """A request that cannot be sent is refused at the call, whether the manager runs or not."""
        for method, path in (
            ("GET", "x"), ("GET", ""), ("GET", "/a b"), ("GET", "/a\r\nb"), ("GET", "/é"), ("GET", "/\x7f"),
            ("GET", None), ("", "/"), ("GE T", "/"), ("GET\n", "/"), ("É", "/"), (7, "/"),
        ):  # fmt: skip
            wrong: Any = (method, path)
            self.failureResultOf(self.manager.send_http(*wrong), InvalidMessage)
        self.failureResultOf(self.manager.send_http("POST", "/", json={"a": object()}), InvalidMessage)
        self.failureResultOf(self.manager.send_http("POST", "/", json=float("nan")), InvalidMessage)
        misuses: list[dict[str, Any]] = [
            {"body": "text"},
            {"body": b"x", "json": {}},
            {"headers": 5},
            {"headers": {5: "x"}},
            {"headers": {"x": 5}},
            {"attempts": 0},
            {"attempts": "a"},
            {"idempotency_key": 5},
        ]
        for misuse in misuses:
            error = self.failureResultOf(self.manager.send_http("POST", "/", **misuse), InvalidMessage)
            self.assertIn(next(iter(misuse)), str(error.value))
        for status in ("", 5, None):
            self.failureResultOf(self.manager.send_heartbeat(status), InvalidMessage)  # type: ignore[arg-type]  # misuse


class Calls(WorldTestCase):
    """Calls of a running manager, with and without a backend."""

    async def test_invalid_messages(self) -> None:
        """What cannot be a message is refused at the call with InvalidMessage, and nothing is kept."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        nonsense: Any = ["no object"]
        deep: Any = {"a": object()}
        for waiting in (
            manager.send_inventory(nonsense),
            manager.send_inventory(deep),
            manager.send_result(nonsense),
            manager.send_result(Result(command_id="c", status=nonsense)),
            manager.send_result(Result(command_id="")),
            manager.send_heartbeat(deep),
        ):
            await self.assertFailure(waiting, InvalidMessage)
        self.assertTrue(nothing_held(manager))

    async def test_times(self) -> None:
        """A time that is no positive, finite number is refused at the call; nothing is sent and nothing kept."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        for wrong in (0, -1, -0.5, float("nan"), float("inf"), float("-inf"), True, "5", b"5", [5], 5j):
            seconds: Any = wrong
            for name, waiting in (
                ("ttl", manager.send_result(Result(command_id="c"), ttl=seconds)),
                ("timeout", manager.send_heartbeat(timeout=seconds)),
                ("timeout", manager.send_http("GET", "/", timeout=seconds)),
            ):
                error = self.failureResultOf(waiting, InvalidMessage).value
                self.assertIn(f"{name}: expected a number of seconds above 0, found {wrong!r}", str(error))
        self.assertTrue(nothing_held(manager))
        await manager.send_result(Result(command_id="c"), ttl=5)
        self.assertEqual(manager.status().queue.events, 1)

    async def test_right_after_the_start(self) -> None:
        """A message given before the spool is open is accepted as soon as it is; one result only for each command."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        self.assertFalse(manager.status().running)
        ids = [await manager.send_result(Result(command_id="elsewhere", output=str(n))) for n in range(2)]
        self.assertEqual(len(set(ids)), 2)
        self.assertEqual(manager.status().queue.events, 2)

    async def test_second_result(self) -> None:
        """A command takes one result."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        backend.send_command(MACHINE, "ask")
        command = await manager.commands().get()
        await manager.send_result(command.success())
        await self.assertFailure(manager.send_result(command.success()), AlreadyCompleted)

    async def test_http(self) -> None:
        """Any request goes to the backend with its token; a backend that is away is a typed error."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        response = await manager.send_http(
            "post", "/heartbeat", json={"machine_id": "m", "hostname": "h", "timestamp": "t"}
        )
        self.assertEqual(response.status, 200)
        await backend.stopService()
        await self.assertFailure(manager.send_http("GET", "/x", attempts=1, idempotency_key=""), TransportError)
        await self.assertFailure(manager.send_heartbeat(timeout=0.2), CommsError)

    async def test_when_connected(self) -> None:
        """It waits while there is no backend, fires at once when there is one; cancelling stops only the waiting."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        connecting = manager.connect()
        cancelled = manager.when_connected()
        cancelled.cancel()
        await self.assertFailure(cancelled, CancelledError)
        self.assertTrue((await connecting).connected)
        self.assertTrue(self.successResultOf(manager.when_connected()).connected)
        self.assertIsNone(self.successResultOf(manager.started()))

    async def test_without_websocket(self) -> None:
        """With HTTP only, the answer to a heartbeat is the connection, also to one sent by the agent."""
        backend = await self.backend()
        settings = quick(backend, self.directory, websocket=config.WebSocket(enabled=False))
        manager = self.manager(settings)
        connecting = manager.connect()
        await manager.started()
        self.assertNoResult(connecting)
        await manager.send_heartbeat()
        status = self.successResultOf(connecting)
        self.assertEqual((status.connected, status.reachable), (True, True))

    async def test_pushes(self) -> None:
        """Unknown messages reach the agent; what its handler does wrong is logged and changes nothing."""
        backend = await self.backend()
        pushes: list[Push] = []

        def take(push: Push) -> None:
            pushes.append(push)
            raise ValueError("the handler's own trouble")

        for handler in (take, None):
            manager = self.manager(quick(backend, self.spool()), on_push=handler)
            await manager.connect()
            run = manager._run
            assert run is not None
            run._pushed(Push(type="config_update", id="p", payload=b"{}"))
            await manager.disconnect()
        self.assertEqual([push.type for push in pushes], ["config_update"])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertEqual(len(self.logged("push.failed")), 1)
        self.events.clear()

    async def test_lost_backend_is_a_problem(self) -> None:
        """While no backend can be had the status says so, and why."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        self.assertEqual(manager.status().problems, ())
        await backend.stopService()
        await until(lambda: isinstance(manager.status().backends[0].link, Waiting))
        (problem,) = manager.status().problems
        self.assertIn("not connected to main", problem)


class Wiring(WorldTestCase):
    """What one part of a run tells another."""

    async def _connected(self, **changes: Any) -> tuple[Manager, Run]:
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory, **changes))
        await manager.connect()
        run = manager._run
        assert run is not None
        return manager, run

    async def test_inventory(self) -> None:
        """The backend's receipt of an inventory is known to the next heartbeat and the next inventory."""
        manager, run = await self._connected()
        self.assertIsNotNone(await manager.send_inventory())
        await until(lambda: manager.status().queue.states == 0 and run.inventories.last_accepted)
        self.assertIsNone(await manager.send_inventory())
        self.assertIsNotNone(await manager.send_inventory(force=True))

    async def test_overtaken_inventory(self) -> None:
        """An older inventory that arrives late does not stay the backend's latest although nothing changes."""
        manager, run = await self._connected()
        await manager.send_inventory({"a": 1})
        await until(lambda: manager.status().queue.states == 0 and run.inventories.last_accepted)
        await manager.send_heartbeat()
        self.assertIsNone(await manager.send_inventory({"a": 1}))
        late = sha256(b"{}").hexdigest()
        body = b'{"machine_id":"%b","checksum":"%b","data":{}}' % (MACHINE.encode(), late.encode())
        await manager.send_http("POST", "/inventory", body=body)
        await manager.send_heartbeat()
        self.assertIsNotNone(await manager.send_inventory({"a": 1}))

    async def test_intervals(self) -> None:
        """Intervals that the backend sets hold until the session ends."""
        settings = {"heartbeat": config.Heartbeat(interval=500.0), "inventory": config.Inventory(interval=600.0)}
        _, run = await self._connected(**settings)
        run._settings_arrived(SettingsArrived(100.0, 200.0))
        self.assertEqual((run._heartbeat._interval, run._inventory._interval), (100.0, 200.0))
        link = run.backends.active.link.open
        assert link is not None
        run._link_ended(link)
        self.assertEqual((run._heartbeat._interval, run._inventory._interval), (500.0, 600.0))

    async def test_housekeeping(self) -> None:
        """What has expired goes, and so do commands that were finished long ago."""
        now, registry = [time.time()], CollectorRegistry()
        settings = quick(NOWHERE, self.directory, spool=config.Spool(path=self.directory, remember_commands=60.0))
        manager = self.manager(settings, wall=lambda: now[0], registry=registry)
        manager.startService()
        await manager.send_result(Result(command_id="elsewhere"), ttl=5.0)
        now[0] += 6
        run = manager._run
        assert run is not None
        await run._keep_house()
        queue = manager.status().queue
        self.assertEqual((queue.events, queue.dead_letters, queue.dropped), (0, 1, {"expired": 1}))
        dropped = registry.get_sample_value("commsmgr_dropped_total", {"reason": "expired"})
        self.assertEqual(dropped, 1, "counted where it is scraped")
        # What was handed out is of its moment.
        queue.dropped.clear()
        self.assertEqual(manager.status().queue.dropped, {"expired": 1})

    async def test_housekeeping_that_fails(self) -> None:
        """A chore that cannot be done does not keep the other from being done, and is told of."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.send_result(Result(command_id="elsewhere"))
        run = manager._run
        assert run is not None
        forgotten: list[int] = []
        self.patch(run.spool.outbox, "expire", lambda: fail(SpoolWriteFailed("no")))
        self.patch(run.spool.inbox, "forget_finished", lambda: succeed(forgotten.append(1)))
        await self.assertFailure(Deferred.fromCoroutine(run._keep_house()), SpoolWriteFailed)
        self.assertEqual(forgotten, [1])

    async def test_status_page(self) -> None:
        """The page is there while the manager runs, and shows the same as status()."""
        manager, run = await self._connected(observe=config.Observe(listen="127.0.0.1:0"))
        assert run.site is not None
        url = f"http://127.0.0.1:{run.site.port}"
        self.assertEqual((await self.fetch(f"{url}/readyz"))[0], 200)
        code, page = await self.fetch(f"{url}/status")
        self.assertEqual((code, msgspec.json.decode(page)["machine_id"]), (200, MACHINE))
        await manager.disconnect()
        await self.assertFailure(Deferred.fromCoroutine(self.fetch(url)), Refused)

    async def test_certificates(self) -> None:
        """The expiry of a backend's certificate is shown for that backend, whichever transport saw it."""
        registry = CollectorRegistry()
        backends = (
            config.Backend(url="https://localhost:1", websocket_url="wss://ws.localhost:2/ws", name="main"),
            config.Backend(url="https://localhost:3", name="other"),
        )
        manager = self.manager(quick(NOWHERE, self.directory, backends=backends), registry=registry)
        manager.startService()
        run = manager._run
        assert run is not None
        for target, expiry in (
            (Target("https", "localhost", 1, "/"), 5e9),
            (Target("wss", "ws.localhost", 2, "/ws"), 6e9),
            (Target("https", "localhost", 3, "/"), 7e9),
        ):
            facts = TLSFacts(**dict.fromkeys(TLSFacts.__struct_fields__, 0) | {"not_after": expiry})
            run._tls_established(target, facts)
        name = "commsmgr_certificate_expiry_timestamp_seconds"
        self.assertEqual(registry.get_sample_value(name, {"backend": "main"}), 6e9)
        self.assertEqual(registry.get_sample_value(name, {"backend": "other"}), 7e9)

    async def test_slow_websockets(self) -> None:
        """Without autobahn's native code everything works, and the log says what it costs."""
        for native, lines in ((True, 0), (False, 1)):
            self.patch(assembly, "native_acceleration_active", lambda native=native: native)
            manager = self.manager(quick(NOWHERE, self.spool()))
            manager.startService()
            await manager.started()
            self.assertEqual(len(self.logged("websocket.slow")), lines)

    async def test_unreadable_inbox(self) -> None:
        """A spool whose commands cannot be read is closed again, and can be opened when they can."""
        spool = Spool(config.Spool(path=self.directory), reactor=reactor, wall=time.time)
        broken = self.patch(spool.inbox, "unfinished", lambda: fail(SpoolWriteFailed()))
        await self.assertFailure(spool.open(), SpoolWriteFailed)
        broken.restore()
        await spool.open()
        await spool.close()

    async def test_spool_set_aside(self) -> None:
        """A spool that could not be read is a problem that an operator sees."""
        (Path(self.directory) / DATABASE).write_bytes(b"no database" * 1000)
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.started()
        self.assertIn("was set aside as", manager.status().problems[0])
        self.events.clear()

    async def test_spool_in_trouble(self) -> None:
        """A spool that fails while running is a problem that an operator sees, and the manager is not ready."""
        manager = self.manager(quick(NOWHERE, self.directory))
        self.patch(Ballast, "restore", lambda ballast: False)
        manager.startService()
        await manager.started()
        status = manager.status()
        self.assertIn("that holds the spool is full", status.queue.trouble)
        self.assertIn(status.queue.trouble, status.problems)
        self.assertFalse(ready(status))
        self.events.clear()


class Life(WorldTestCase):
    """Starting and stopping in any order."""

    async def test_connect_twice(self) -> None:
        """A second connect() waits for the same connection; so does a start by a parent."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        first, second = manager.connect(), manager.connect()
        run = manager._run
        manager.startService()
        await first
        await second
        await manager.connect()
        self.assertIs(manager._run, run)
        self.assertEqual(len(list(manager)), 1)

    async def test_disconnect_twice(self) -> None:
        """Both calls wait for the one end."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        first, second = manager.disconnect(), manager.disconnect()
        await first
        await second
        self.assertEqual((manager._run, list(manager)), (None, []))
        await manager.disconnect()

    async def test_connect_while_stopping(self) -> None:
        """A start during the stop begins when the stop is over; what is called meanwhile is for the new run."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        old = manager._run
        stopping = manager.disconnect()
        connecting = manager.connect()
        self.assertNoResult(connecting)
        self.assertRaises(NotRunning, manager.commands)
        beating = manager.send_heartbeat()
        self.assertNoResult(beating)
        await stopping
        self.assertTrue((await connecting).connected)
        await beating
        self.assertIsNot(manager._run, old)

    async def test_results_while_stopping(self) -> None:
        """What commands have done until the spool closes is accepted; other things to send are refused at once."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.started()
        stopping = manager.disconnect()
        sending = manager.send_result(Result(command_id="done"))
        await self.assertFailure(manager.send_heartbeat(), NotRunning)
        self.assertTrue(await sending)
        await stopping
        await self.assertFailure(manager.send_result(Result(command_id="late")), NotRunning)
        manager.startService()
        await manager.started()
        self.assertEqual(manager.status().queue.events, 1)

    async def test_connect_and_disconnect_while_stopping(self) -> None:
        """The last word counts: a start that is taken back during the stop never happens."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.started()
        stopping = manager.disconnect()
        connecting = manager.connect()
        beating = manager.send_heartbeat()
        last = manager.disconnect()
        await self.assertFailure(connecting, NotRunning)
        await stopping
        await last
        await self.assertFailure(beating, NotRunning)
        self.assertEqual((manager._run, manager.status().running), (None, False))

    async def test_disconnect_while_starting(self) -> None:
        """A stop in the middle of the start ends it; whoever waits for something hears of it."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        started, sending = manager.started(), manager.send_inventory({"a": 1})
        stopping = manager.disconnect()
        await self.assertFailure(started, NotRunning)
        await stopping
        await sending.addErrback(lambda failure: failure.trap(NotRunning))
        self.assertNoResult(manager.started())
        self.assertEqual(manager.status().problems, ())
        manager.startService()
        await manager.started()

    async def test_connect_while_a_command_ends(self) -> None:
        """The link of a run that is stopping is no connection for whoever has started anew."""
        backend = await self.backend()
        running: list[Deferred[Result]] = []
        manager = self.manager(
            quick(backend, self.directory), handler=lambda command: running.append(Deferred()) or running[-1]
        )
        await manager.connect()
        backend.send_command(MACHINE, "one")
        await until(lambda: running)
        stopping = manager.disconnect()
        self.assertTrue(manager.status().connected)
        connecting = manager.connect()
        self.assertNoResult(connecting)
        running[0].callback(Result(command_id=""))
        await stopping
        self.assertTrue((await connecting).connected)

    async def test_disk_that_hangs(self) -> None:
        """A spool that is never opened keeps neither the stop nor a message's sender waiting for ever."""
        opening: Deferred[Any] = Deferred()
        self.patch(Spool, "open", lambda spool: opening)
        manager = self.manager(quick(NOWHERE, self.directory, stop_deadline=0.2))
        manager.startService()
        sending = manager.send_result(Result(command_id="c"))
        stopping = manager.disconnect()
        await self.assertFailure(sending, NotRunning)
        await stopping
        opening.errback(SpoolWriteFailed("at last"))
        self.assertEqual(manager.status().problems, ())

    async def test_disk_that_hung(self) -> None:
        """A spool that opens long after the stop gave up on it is closed again: the next start finds it free."""
        hung: Deferred[None] = Deferred()
        opened, close = Spool.open, Spool.close
        closed: Deferred[None] = Deferred()

        def close_it(spool: Spool) -> Deferred[None]:
            return close(spool).addCallback(lambda _: hung.called and closed.callback(None))

        patches = [
            self.patch(Spool, "open", lambda spool: hung.addCallback(lambda _: opened(spool))),
            self.patch(Spool, "close", close_it),
        ]
        manager = self.manager(quick(NOWHERE, self.directory, stop_deadline=0.1))
        manager.startService()
        await manager.disconnect()
        hung.callback(None)
        await closed
        self.assertFalse(manager.status().running)
        for patch in patches:
            patch.restore()
        manager.startService()
        await manager.started()
        self.assertTrue(manager.status().running)

    async def test_status_at_the_end(self) -> None:
        """From the moment at which the spool closes the status says that the manager does not run any more."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.started()
        seen: list[bool] = []
        close = Spool.close

        def closing(spool: Spool) -> Deferred[None]:
            seen.append(manager.status().running)
            return close(spool)

        self.patch(Spool, "close", closing)
        await manager.disconnect()
        self.assertEqual(seen, [False])

    async def test_start_that_fails_after_its_stop(self) -> None:
        """What went wrong in a start that was stopped is nothing to whoever has started anew."""
        opening: Deferred[Any] = Deferred()
        opened = Spool.open
        openings = iter([lambda spool: opening, opened])
        self.patch(Spool, "open", lambda spool: next(openings)(spool))
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        stopping = manager.disconnect()
        manager.startService()
        started = manager.started()
        opening.errback(SpoolWriteFailed("of the first start"))
        await stopping
        await started
        self.assertTrue(manager.status().running)

    async def test_again_when_told_of_the_end(self) -> None:
        """A callback of disconnect() may connect at once; there is one run."""
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.startService()
        await manager.started()
        await manager.disconnect().addCallback(lambda _: manager.startService())
        await manager.started()
        self.assertEqual(len(list(manager)), 1)

    async def test_under_a_parent(self) -> None:
        """A manager starts and stops with its parent, a MultiService or an Application."""
        application = Application("agent")
        for parent in (MultiService(), IServiceCollection(application)):
            manager = self.manager(quick(NOWHERE, self.spool()))
            manager.setServiceParent(parent)
            service = IService(parent)
            self.assertIs(parent.getServiceNamed("commsmgr"), manager)
            service.startService()
            await manager.started()
            self.assertTrue(manager.status().running)
            await service.stopService()
            self.assertFalse(manager.status().running)

    async def test_parent_that_runs(self) -> None:
        """Given to a parent that runs, it starts at once."""
        parent = MultiService()
        parent.startService()
        manager = self.manager(quick(NOWHERE, self.directory))
        manager.setServiceParent(parent)
        await manager.started()
        await parent.stopService()


class StartFailures(WorldTestCase):
    """What keeps a manager from starting reaches everybody who waits, and the status."""

    async def _fails(self, manager: Manager, error: type[Exception], words: str) -> None:
        connecting, started = manager.connect(), manager.started()
        sending = manager.send_result(Result(command_id="c"))
        for waiting in (connecting, started, sending):
            await self.assertFailure(waiting, error)
        for late in (manager.when_connected(), manager.started(), manager.send_heartbeat()):
            self.failureResultOf(late, error)
        (problem,) = manager.status().problems
        self.assertIn(words, problem)
        self.assertFalse(manager.status().running)
        (event,) = self.logged("manager.start-failed")
        self.assertEqual(event["log_level"], LogLevel.critical)
        self.events.clear()

    async def test_spool_locked(self) -> None:
        """Two managers on one spool: the second says so, and connect() tries again when the first is gone."""
        first, second = (self.manager(quick(NOWHERE, self.directory)) for _ in range(2))
        first.startService()
        await first.started()
        await self._fails(second, SpoolLocked, "one process per spool directory")
        await first.disconnect()
        connecting = second.connect().addErrback(lambda failure: failure.trap(NotRunning))
        await second.started()
        self.assertNoResult(connecting)
        self.assertEqual([p for p in second.status().problems if "spool" in p], [])

    async def test_port_in_use(self) -> None:
        """A port that somebody has is a mistake of the configuration; nothing stays open."""
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        manager = self.manager(quick(NOWHERE, self.directory, observe=config.Observe(listen=listen)))
        await self._fails(manager, ConfigError, listen)

    async def test_defect(self) -> None:
        """Anything else is wrapped into the tree of errors, and logged with its traceback."""
        manager = self.manager(quick(NOWHERE, self.directory))

        def broken(*_: object) -> None:
            raise ZeroDivisionError("defect")

        self.patch(Run, "_open_spool", broken)
        await self._fails(manager, CommsError, "ZeroDivisionError: defect")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    async def test_two_in_one_process(self) -> None:
        """Two managers with registries of their own share nothing; their metrics do not mix."""
        registries = [CollectorRegistry(), CollectorRegistry()]
        managers = [self.manager(quick(NOWHERE, self.spool()), registry=registry) for registry in registries]
        for manager in managers:
            manager.startService()
            await manager.started()
        await managers[0].send_result(Result(command_id="c"))
        held = [registry.get_sample_value("commsmgr_queue_events") for registry in registries]
        self.assertEqual(held, [1, 0])

    async def test_one_registry(self) -> None:
        """Two managers need two registries: the second one says so, and can start when the first has stopped."""
        registry = CollectorRegistry()
        first, second = (self.manager(quick(NOWHERE, self.spool()), registry=registry) for _ in range(2))
        first.startService()
        await first.started()
        await self._fails(second, ConfigError, "registry")
        await second.disconnect()
        await first.disconnect()
        second.startService()
        await second.started()

    async def test_failed_building_leaves_the_registry(self) -> None:
        """What goes wrong before anything is started keeps no registry: the next start finds it free."""
        name = "COMMSMGR_TEST_TOKEN"
        os.environ[name] = "token-of-this-test"
        self.addCleanup(os.environ.pop, name, None)
        manager = self.manager(quick(NOWHERE, self.directory, auth=config.Auth(token_env=name)))
        del os.environ[name]
        await self._fails(manager, ConfigError, name)
        await manager.disconnect()
        os.environ[name] = "token-of-this-test"
        manager.startService()
        await manager.started()


class Commands(WorldTestCase):
    """Commands that outlive a process, end to end."""

    async def test_interrupted_and_waiting(self) -> None:
        """A command that was offered is reported as interrupted by the next run, one that was not is offered by it."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        begun = backend.send_command(MACHINE, "one")
        await manager.commands().get()
        waiting = backend.send_command(MACHINE, "two")
        await until(lambda: manager.status().queue.open_commands == 2)
        await manager.disconnect()
        result = backend.when_result(begun)
        await manager.connect()
        command = await manager.commands().get()
        self.assertEqual((command.id, command.redelivered), (waiting, False))
        self.assertEqual((await result).status, "interrupted")

    async def test_iteration_ends(self) -> None:
        """``async for`` over the commands ends with the run."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        seen: list[Command] = []

        async def read() -> None:
            async for command in manager.commands():
                seen.append(command)
                await manager.send_result(command.success())

        reading = Deferred.fromCoroutine(read())
        await backend.when_result(backend.send_command(MACHINE, "one"))
        await manager.disconnect()
        self.successResultOf(reading)
        self.assertEqual([command.type for command in seen], ["one"])

    async def test_handler_or_reader(self) -> None:
        """Commands go to the handler or to readers: asking for the channel of a manager with a handler is a mistake."""
        manager = self.manager(quick(NOWHERE, self.directory), handler=lambda command: command.success())
        for _ in range(2):
            error = self.assertRaises(UsageError, manager.commands)
            self.assertIn("either a handler or readers", str(error))
            self.assertNotIsInstance(error, NotRunning)
            manager.startService()
            await manager.started()

    async def _interrupted_at_a_full_outbox(self) -> tuple[ReferenceBackend, Manager, str]:
        """Return a manager, stopped, with an offered command and no room for its result; the backend is away."""
        self.patch(reporting, "AGAIN", 0.02)
        backend = await self.backend()
        spool = config.Spool(path=self.directory, durability="normal", max_events=3)
        manager = self.manager(quick(backend, self.directory, spool=spool, stop_deadline=0.4))
        await manager.connect()
        command = backend.send_command(MACHINE, "one")
        await manager.commands().get()
        backend.faults.inject("refuse")
        backend.faults.inject("drop")
        await until(lambda: not manager.status().connected)
        for _ in range(3):
            await manager.send_result(Result(command_id="elsewhere"))
        await self.assertFailure(manager.send_result(Result(command_id="elsewhere")), QueueFull)
        await manager.disconnect()
        self.assertEqual(self.logged("command.interrupted"), [])
        return backend, manager, command

    def _attempts(self) -> list[str]:
        """Note from now on of which command a result was to be stored."""
        report, noted = reporting.Reporting.report, list[str]()

        def noting(self: reporting.Reporting, result: Result, **options: float) -> Awaitable[str]:
            noted.append(result.command_id)
            return report(self, result, **options)

        self.patch(reporting.Reporting, "report", noting)
        return noted

    async def test_interrupted_at_a_full_outbox(self) -> None:
        """Its result waits and is stored as soon as there is room, without another start."""
        backend, manager, command = await self._interrupted_at_a_full_outbox()
        attempts = self._attempts()
        manager.startService()
        await until(lambda: len(attempts) > 2)
        self.assertEqual((manager.status().queue.events, manager.status().queue.open_commands), (3, 1))
        backend.faults.clear()
        self.assertEqual((await backend.when_result(command)).status, "interrupted")
        await until(lambda: manager.status().queue.events == manager.status().queue.open_commands == 0)
        results = [result.command_id for result in backend.ledger.results()]
        self.assertEqual(results.count(command), 1)
        self.assertEqual(len(self.logged("command.interrupted")), 1)
        self.assertEqual(self.logged("command.not-reported"), [])

    async def test_stopped_while_an_interrupted_one_waits(self) -> None:
        """A stop meanwhile is not held up, and leaves it for the next start, which still knows the command."""
        backend, manager, command = await self._interrupted_at_a_full_outbox()
        for starts in (1, 2):
            manager.startService()
            await manager.started()
            self.assertEqual(len(self.logged("command.interrupted")), starts)
            self.assertEqual(manager.status().queue.open_commands, 1)
            await manager.disconnect()
        self.assertEqual(self.logged("command.not-reported"), [])
        self.assertIsNone(backend.result_of(command))
        backend.faults.clear()
        await manager.connect()
        self.assertEqual((await backend.when_result(command)).status, "interrupted")

    async def test_start_that_fails_while_an_interrupted_one_waits(self) -> None:
        """A start that fails behind the spool ends the insisting as well: nothing is left that runs."""
        _, manager, _ = await self._interrupted_at_a_full_outbox()
        self.patch(Backends, "start", lambda backends: 1 // 0)
        await self.assertFailure(manager.connect(), CommsError)
        self.assertEqual(len(self.logged("command.result-waits")), 1)
        self.assertEqual(self.logged("command.not-reported"), [])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.events.clear()

    async def test_no_room_on_a_plain_backend(self) -> None:
        """A plain backend gets a rejected result for what there is no room for; the command that runs stays open."""
        backend = await self.backend(dialects=["plain"])
        manager = self.manager(quick(backend, self.directory, commands=config.Commands(max_pending=1)))
        await manager.connect()
        first = backend.send_command(MACHINE, "one")
        command = await manager.commands().get()
        second = backend.send_command(MACHINE, "two")
        self.assertEqual((await backend.when_result(second)).status, "rejected")
        self.assertEqual(manager.status().queue.open_commands, 1)
        await manager.send_result(command.success("kept"))
        self.assertEqual((await backend.when_result(first)).output, "kept")

    async def test_what_is_said_closes_nothing(self) -> None:
        """A refusal with the id of a command that runs is sent, and leaves that one open for its own result."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        begun = backend.send_command(MACHINE, "one")
        command = await manager.commands().get()
        run = manager._run
        assert run is not None
        run.intake._say(Result(command_id=begun, status="rejected"))
        self.assertEqual((await backend.when_result(begun)).status, "rejected")
        await until(lambda: manager.status().queue.events == 0)
        self.assertEqual(manager.status().queue.open_commands, 1)
        await manager.send_result(command.success())

    async def test_handled_at_a_full_outbox(self) -> None:
        """What the handler returns waits for room and is stored once; the handler is not asked again."""
        self.patch(reporting, "AGAIN", 0.02)
        backend, runs = await self.backend(), Runs()
        spool = config.Spool(path=self.directory, durability="normal", max_events=3)
        manager = self.manager(quick(backend, self.directory, spool=spool), handler=runs)
        await manager.connect()
        command = backend.send_command(MACHINE, "wait")
        await until(lambda: runs.waiting)
        backend.faults.inject("refuse")
        backend.faults.inject("drop")
        await until(lambda: not manager.status().connected)
        for _ in range(3):
            await manager.send_result(Result(command_id="elsewhere"))
        runs.release()
        attempts = self._attempts()
        await until(lambda: len(attempts) > 2)
        backend.faults.clear()
        self.assertEqual((await backend.when_result(command)).status, "success")
        await until(lambda: manager.status().queue.events == manager.status().queue.open_commands == 0)
        self.assertEqual([result.command_id for result in backend.ledger.results()].count(command), 1)
        self.assertEqual(len(runs.commands), 1)

    async def test_what_cannot_be_reported_is_logged(self) -> None:
        """A result without a caller that the spool does not take is a line in the log."""
        manager = self.manager(quick(NOWHERE, self.directory, spool=config.Spool(durability="memory", max_events=1)))
        manager.startService()
        await manager.send_result(Result(command_id="c"))
        run = manager._run
        assert run is not None
        run.intake._say(Result(command_id="refused", status="rejected"))
        (event,) = self.logged("command.not-reported")
        self.assertEqual((event["status"], event["message_id"]), ("rejected", "refused"))
        self.assertEqual(manager.status().queue.events, 1)
