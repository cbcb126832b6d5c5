"""
What was asked for, row by row, with whole managers against the reference backend over real sockets.

A class for each row of the mission; where a row has a test module of its own, the class shows that the whole works and
names that module.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.logger import LogLevel, formatEvent

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import (
    BreakerOpen,
    DeadlineExceeded,
    HTTPStatusError,
    InvalidMessage,
    NotRunning,
    QueueFull,
    UsageError,
)
from commsmgr.handlers import BuiltinHandler
from commsmgr.manager import Manager
from commsmgr.messages import Push, Result
from tests.loopback import Recorder, Recording, listen
from tests.world import (
    MACHINE,
    TOKEN,
    Runs,
    WorldTestCase,
    nothing_held,
    pause,
    quick,
    reactor,
    together,
    until,
)

V1, PLAIN = "commsmgr.v1", "plain"
BOTH = (V1, PLAIN)
NO_WEBSOCKET = config.WebSocket(enabled=False)
AT_ONCE = config.Delivery(http_fallback_after=0.0)


def free_port() -> int:
    """Return a port that nobody listens on, for a backend that goes away and comes back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MissionTestCase(WorldTestCase):
    """What the rows have in common."""

    async def connected(self, dialect: str = V1, **parameters: Any) -> tuple[ReferenceBackend, Manager]:
        """Return a backend and a manager that is registered with it; ``parameters`` are quick's and Manager's."""
        backend = await self.backend(dialects=[dialect])
        manager = self.make(backend, **parameters)
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        return backend, manager

    def make(self, backend: ReferenceBackend, **parameters: Any) -> Manager:
        """Return a manager for ``backend``."""
        mine = {name: parameters.pop(name) for name in ("handler", "on_push", "registry") if name in parameters}
        return self.manager(quick(backend, self.spool(), **parameters), **mine)


class AManagerWithConnectAndDisconnect(MissionTestCase):
    """A ``Manager`` with HTTP and WebSocket clients; ``New()``, ``Connect()``, ``Disconnect()``."""

    def test_the_main_job(self) -> Deferred[None]:
        """Registered, heartbeat, inventory, command, result, goodbye: in both dialects."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(dialect, handler=Runs())
            self.assertEqual("ok", (await manager.send_heartbeat()).status)
            await manager.send_inventory()
            await until(lambda: backend.ledger.inventory_of(MACHINE))
            result = await backend.when_result(backend.send_command(MACHINE, "echo", "", ("a",)))
            self.assertEqual(("success", "ran a"), (result.status, result.output))
            leaving = backend.when("disconnected")
            await manager.disconnect()
            self.assertEqual("closed with 1000", (await leaving).note)
            self.assertFalse(manager.status().running)

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_connect_waits_for_the_backend(self) -> None:
        """``connect()`` fires when a backend that was not there at first has registered the agent."""
        port = free_port()
        manager = self.manager(quick(f"http://127.0.0.1:{port}", self.spool()))
        connecting = manager.connect()
        await until(lambda: manager.status().problems)
        self.assertNoResult(connecting)
        await self.backend(listen=f"127.0.0.1:{port}")
        self.assertTrue((await connecting).connected)

    async def test_disconnect_ends_every_wait(self) -> None:
        """Whoever waits for a connection that is not wanted any more is told so, and so is whoever comes too late."""
        manager = self.manager(quick(f"http://127.0.0.1:{free_port()}", self.spool()))
        connecting = manager.connect()
        await manager.started()
        await manager.disconnect()
        with self.assertRaises(NotRunning):
            await connecting
        with self.assertRaises(NotRunning):
            await manager.send_heartbeat()
        with self.assertRaises(NotRunning):
            manager.commands()

    async def test_connect_may_be_cancelled(self) -> None:
        """Cancelling ``connect()`` stops the waiting and nothing else."""
        backend = await self.backend()
        manager = self.make(backend)
        connecting = manager.connect()
        connecting.cancel()
        with self.assertRaises(CancelledError):
            await connecting
        self.assertTrue((await manager.when_connected()).connected)


class ConfigurableHTTPClient(MissionTestCase):
    """Configurable HTTP client, ``sendHTTP()``, retry with backoff, timeout, authentication headers."""

    async def test_any_request(self) -> None:
        """``send_http`` sends what it is told to, with the token, the configured headers and an idempotency key."""

        def answer(recorder: Recorder) -> None:
            if b"\r\n\r\n" in recorder.received and recorder.received.endswith(b"}"):
                assert recorder.transport is not None
                recorder.transport.write(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}")

        server = Recording(answer)
        port = listen(self, server)
        manager = self.manager(
            quick(
                f"http://127.0.0.1:{port}/base",
                self.spool(),
                http=config.HTTP(headers={"X-Fleet": "blue"}),
                websocket=NO_WEBSOCKET,
            )
        )
        manager.startService()
        response = await manager.send_http("put", "/things/1?x=y", json={"a": 1}, headers={"X-One": "1"})
        self.assertEqual((201, b"{}"), (response.status, response.body))
        head, _, body = server.received.partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"PUT /base/things/1?x=y HTTP/1.1\r\n"), head)
        self.assertEqual(b'{"a":1}', body)
        for line in (b"authorization: bearer " + TOKEN.encode(), b"x-fleet: blue", b"x-one: 1", b"idempotency-key: "):
            self.assertIn(line, head.lower())

    async def test_retry(self) -> None:
        """Trouble of the backend is retried; one request, whatever the number of attempts, has one effect."""
        backend, manager = await self.connected()
        backend.faults.inject("crash", transport="http", stored=True, count=2)
        body = {"machine_id": MACHINE, "hostname": "h", "timestamp": ""}
        beats = []
        backend.subscribe(lambda event: beats.append(event) if event.kind == "heartbeat" else None)
        response = await manager.send_http("POST", "/heartbeat", json=body)
        self.assertEqual(200, response.status)
        self.assertEqual(1, len(beats))

    async def test_permanent_errors_are_not_retried(self) -> None:
        """A request that can never succeed is tried once."""
        backend, manager = await self.connected()
        refused: list[object] = []
        backend.subscribe(lambda event: refused.append(event) if event.kind == "refused" else None)
        with self.assertRaises(HTTPStatusError) as caught:
            await manager.send_http("POST", "/heartbeat", json={})
        self.assertEqual(400, caught.exception.status)
        self.assertEqual(1, len(refused))

    async def test_timeout_and_cancellation(self) -> None:
        """Each wait has an end: the caller's deadline, or the caller's change of mind."""
        backend, manager = await self.connected()
        backend.faults.inject("hang", transport="http")
        began = reactor.seconds()
        with self.assertRaises(DeadlineExceeded) as caught:
            await manager.send_http("POST", "/heartbeat", json={}, timeout=0.1)
        self.assertTrue(caught.exception.may_have_arrived)
        self.assertLess(reactor.seconds() - began, 0.5)
        sending = manager.send_heartbeat()
        await pause(0.02)
        sending.cancel()
        with self.assertRaises(CancelledError):
            await sending

    def test_compression(self) -> Deferred[None]:
        """With compression asked for, large bodies travel as gzip, and messages as the backend can take them."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(
                dialect, http=config.HTTP(compress=True), websocket=config.WebSocket(compress=True, register_wait=0.1)
            )
            data = {"software": {"installed_applications": ["the same again"] * 10_000}}
            await manager.send_inventory(data)
            command_id = backend.send_command(MACHINE, "ask")
            command = await manager.commands().get()
            await manager.send_result(command.success("x" * 100_000))
            self.assertEqual(100_000, len((await backend.when_result(command_id)).output))
            await until(lambda: nothing_held(manager))
            self.assertEqual(data, msgspec.json.decode(backend.ledger.inventory_of(MACHINE) or b"")["data"])

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_wrong_calls(self) -> None:
        """What cannot be sent is refused at the call, with an error that says why."""
        _, manager = await self.connected()
        for method, path in (("GET", "no-slash"), ("GET", "/a b"), ("GET", "/\r\nX: y"), ("G T", "/"), ("", "/")):
            with self.assertRaises(InvalidMessage):
                await manager.send_http(method, path)
        for wrong in ({"X-Bad": "a\r\nb"}, {"X Bad": "a"}):
            with self.assertRaises(UsageError):
                await manager.send_http("GET", "/", headers=wrong)
        with self.assertRaises(InvalidMessage):
            await manager.send_http("POST", "/", json=object())


class WebSocketWithReconnect(MissionTestCase):
    """WebSocket with reconnect, ``connectWebSocket()``, handling of messages, ping/pong, channel of commands."""

    async def test_keep_alive(self) -> None:
        """A quiet connection is kept by pings, and stays the same one."""
        websocket = config.WebSocket(register_wait=0.1, ping_interval=0.03, ping_timeout=0.2, receipt_timeout=0.1)
        backend, manager = await self.connected(websocket=websocket)
        lost = backend.when("disconnected")
        await pause(0.3)
        self.assertNoResult(lost)
        self.assertTrue(manager.status().connected)
        lost.addErrback(lambda failure: None).cancel()

    async def test_reconnect(self) -> None:
        """A connection that is lost is made anew, again and again."""
        backend, manager = await self.connected(handler=Runs())
        for _ in range(5):
            registered = backend.when("registered")
            backend.faults.inject("drop")
            await registered
        result = await backend.when_result(backend.send_command(MACHINE, "echo"))
        self.assertEqual("success", result.status)
        await until(lambda: nothing_held(manager))

    def test_channel(self) -> Deferred[None]:
        """Without a handler, commands are read from the channel: by ``get()`` and by ``async for``, in order."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(dialect)
            ids = [backend.send_command(MACHINE, "ask", "", (str(number),)) for number in range(3)]
            first = await manager.commands().get()
            await manager.send_result(first.success("0"))
            seen = [first.id]
            async for command in manager.commands():
                await manager.send_result(command.success(command.args[0]))
                seen.append(command.id)
                if len(seen) == 3:
                    break
            self.assertEqual(ids, seen)
            self.assertEqual(["0", "1", "2"], [(await backend.when_result(each)).output for each in ids])

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_every_message_type(self) -> None:
        """Questions are answered, and pushes reach the agent, whose handler may fail."""
        pushes: list[Push] = []

        def on_push(push: Push) -> None:
            pushes.append(push)
            raise RuntimeError("the agent's own trouble")

        backend, manager = await self.connected(PLAIN, on_push=on_push)
        backend.push({"type": "config_update", "id": "u-1", "data": {"level": 3}})
        backend.push({"type": "ping", "id": "p-1"})
        pong = await backend.when("message", lambda event: event.note == "pong")
        self.assertEqual("p-1", pong.id)
        self.assertEqual([("config_update", "u-1")], [(push.type, push.id) for push in pushes])
        self.assertEqual(3, msgspec.json.decode(pushes[0].payload)["data"]["level"])
        self.assertEqual(1, len(self.flushLoggedErrors(RuntimeError)))
        self.expected.add("push.failed")
        self.assertTrue(manager.status().connected)


class WhatIsSent(MissionTestCase):
    """``SendHeartbeat()``, ``SendInventory()``, ``SendResult()`` over WebSocket, ``CommandChannel()``."""

    async def test_heartbeat(self) -> None:
        """A heartbeat says who, how, and how delivery stands."""
        backend, manager = await self.connected(V1)
        backend.send_command(MACHINE, "ask")
        await until(lambda: manager.status().queue.open_commands == 1)
        await manager.send_heartbeat("busy")
        (row,) = backend.ledger.machines()
        beat = msgspec.json.decode(row.heartbeat or b"")
        self.assertEqual((MACHINE, "busy", 1), (beat["machine_id"], beat["status"], beat["pending_commands"]))
        self.assertEqual("healthy", beat["system_health"]["status"])
        self.assertEqual(0, beat["delivery"]["queued_events"])

    async def test_inventory(self) -> None:
        """An inventory travels with its checksum; what the backend has already does not travel again unless forced."""
        backend, manager = await self.connected()
        data = {"system": {"hostname": "h"}, "software": {"installed_applications": ["a"]}}
        arrived = backend.when("inventory")
        self.assertIsNotNone(await manager.send_inventory(data))
        await arrived
        await until(lambda: nothing_held(manager))
        sent = msgspec.json.decode(backend.ledger.inventory_of(MACHINE) or b"")
        self.assertEqual(data, sent["data"])
        self.assertEqual(hashlib.sha256(msgspec.json.encode(data)).hexdigest(), sent["checksum"])
        self.assertIsNone(await manager.send_inventory(data))
        self.assertIsNotNone(await manager.send_inventory(data, force=True))
        self.assertIsNotNone(await manager.send_inventory({"system": {}}))
        await until(lambda: nothing_held(manager))
        beat = await manager.send_heartbeat()
        self.assertEqual("ok", beat.status)
        with self.assertRaises(InvalidMessage):
            await manager.send_inventory(["no", "object"])  # type: ignore[arg-type]  # wrong on purpose

    def test_result_over_the_websocket(self) -> Deferred[None]:
        """Results go over the WebSocket, and a second result of one command is refused at the call."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(dialect)
            command_id = backend.send_command(MACHINE, "ask")
            command = await manager.commands().get()
            await manager.send_result(command.error("broken", output="half", exit_code=3))
            result = await backend.when_result(command_id)
            self.assertEqual(
                ("error", "broken", "half", 3), (result.status, result.error, result.output, result.exit_code)
            )
            self.assertEqual(["websocket"], [row.transport for row in backend.ledger.results()])
            with self.assertRaises(UsageError):
                await manager.send_result(command.success())
            with self.assertRaises(InvalidMessage):
                await manager.send_result(Result(command_id="x", status="no such status"))  # type: ignore[arg-type]

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_schedules(self) -> None:
        """Heartbeats and inventories go out by themselves."""
        backend = await self.backend()
        beats = backend.when("heartbeat")
        stock = backend.when("inventory")
        manager = self.make(
            backend,
            heartbeat=config.Heartbeat(interval=0.05, jitter=0.01),
            inventory=config.Inventory(interval=3600, jitter=0.01),
        )
        manager.startService()
        await gatherResults([beats, stock])
        await backend.when("heartbeat")


class ReconnectQueueAndFallback(MissionTestCase):
    """Automatic reconnect, detection of disconnection, a queue while disconnected, HTTP fallback for critical data."""

    def test_queue_while_disconnected(self) -> Deferred[None]:
        """What is accepted while every backend is away is delivered when one is back, in order, once."""

        async def story(dialect: str) -> None:
            listen_on = f"127.0.0.1:{free_port()}"
            path = f"{self.spool()}/backend.sqlite"
            backend = await self.backend(dialects=[dialect], listen=listen_on, path=path)
            runs = Runs()
            manager = self.make(backend, handler=runs)
            await manager.connect()
            await until(lambda: backend.connected(MACHINE))
            ids = [backend.send_command(MACHINE, "wait", "", (str(number),)) for number in range(4)]
            await until(lambda: runs.waiting == 4)
            await backend.stopService()
            await until(lambda: not manager.status().connected)
            runs.release()
            await until(lambda: manager.status().queue.events == 4)
            self.assertIsNotNone(manager.status().queue.oldest_event_at)
            await manager.send_inventory({"one": 1})
            await manager.send_inventory({"two": 2})
            self.assertEqual(1, manager.status().queue.states)
            await backend.startService()
            began = reactor.seconds()
            await until(lambda: nothing_held(manager))
            self.assertLess(reactor.seconds() - began, 1.0)
            self.assert_once_and_in_order(backend, runs, ids)
            self.assertIn(b"two", backend.ledger.inventory_of(MACHINE) or b"")

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    def test_http_fallback_and_back(self) -> Deferred[None]:
        """When no WebSocket can be had results go over HTTP, and over the WebSocket again as soon as there is one."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(
                dialect, handler=(runs := Runs()), delivery=config.Delivery(http_fallback_after=0.1)
            )

            async def results(count: int) -> None:
                await until(lambda: len(backend.ledger.results()) == count)

            ids = [backend.send_command(MACHINE, kind) for kind in ("echo", "wait", "wait")]
            await results(1)
            await until(lambda: runs.waiting == 2)
            backend.faults.inject("status", transport="websocket", status=503)
            backend.faults.inject("drop", transport="websocket")
            lost_at = reactor.seconds()
            await until(lambda: not manager.status().connected)
            runs.release()
            await results(3)
            self.assertGreaterEqual(reactor.seconds() - lost_at, 0.1)
            await until(lambda: nothing_held(manager))
            self.assertTrue(manager.status().reachable)
            backend.faults.clear()
            await until(lambda: manager.status().connected and backend.connected(MACHINE))
            ids.append(backend.send_command(MACHINE, "echo"))
            await results(4)
            await until(lambda: nothing_held(manager))
            self.assertEqual(
                ["websocket", "http", "http", "websocket"], [row.transport for row in backend.ledger.results()]
            )
            self.assert_once_and_in_order(backend, runs, ids)

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_switching_while_results_flow(self) -> None:
        """The WebSocket comes and goes in the middle of the results: nothing is lost, doubled or out of order."""
        backend, manager = await self.connected(
            handler=(runs := Runs()), delivery=config.Delivery(http_fallback_after=0.02)
        )
        ids: list[str] = []
        for _ in range(4):
            for fault in ("refuse", "drop"):
                backend.faults.inject(fault, transport="websocket")  # type: ignore[arg-type]  # both are faults
            ids += [backend.send_command(MACHINE, "echo") for _ in range(10)]
            await manager.send_heartbeat()
            await pause(0.03)
            backend.faults.clear()
            ids += [backend.send_command(MACHINE, "echo") for _ in range(10)]
            await pause(0.02)
        await until(lambda: len(backend.ledger.results()) == len(ids) and nothing_held(manager))
        self.assert_once_and_in_order(backend, runs, ids)

    async def test_commands_over_http(self) -> None:
        """While no WebSocket can be had, commands come in the answers to heartbeats and are confirmed by the next."""
        backend = await self.backend()
        backend.faults.inject("html", transport="websocket")
        runs = Runs()
        manager = self.make(backend, handler=runs, delivery=AT_ONCE)
        manager.startService()
        await manager.send_heartbeat()
        ids = [backend.send_command(MACHINE, "wait") for _ in range(3)]
        await manager.send_heartbeat()
        await until(lambda: runs.waiting == 3)
        self.assertEqual(3, len(backend.ledger.pending(MACHINE)))
        # The same ones come again, since nothing has confirmed them so far; they are known by their ids.
        await manager.send_heartbeat()
        self.assertEqual([], backend.ledger.pending(MACHINE))
        await manager.send_heartbeat()
        runs.release()
        await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))
        self.assert_once_and_in_order(backend, runs, ids)

    async def test_http_only(self) -> None:
        """With ``websocket.enabled = false`` everything goes over HTTP; connected means an answered heartbeat."""
        backend = await self.backend()
        upgrades = backend.when("registered")
        runs = Runs()
        manager = self.make(
            backend,
            handler=runs,
            websocket=NO_WEBSOCKET,
            delivery=AT_ONCE,
            heartbeat=config.Heartbeat(interval=0.05, jitter=0),
        )
        status = await manager.connect()
        self.assertTrue(status.connected)
        ids = [backend.send_command(MACHINE, "echo") for _ in range(3)]
        await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))
        await until(lambda: not backend.ledger.pending(MACHINE))
        self.assert_once_and_in_order(backend, runs, ids)
        self.assertNoResult(upgrades)
        upgrades.addErrback(lambda failure: None).cancel()

    async def test_http_only_without_schedule(self) -> None:
        """Any heartbeat that is answered connects, not only those of the schedule."""
        backend = await self.backend()
        manager = self.make(backend, websocket=NO_WEBSOCKET)
        connecting = manager.connect()
        await manager.send_heartbeat()
        self.assertTrue((await connecting).connected)


class TokensTLSAndSanitising(MissionTestCase):
    """Bearer token, validation of TLS certificates, security headers, sanitising: see test_security for all of it."""

    async def test_token_on_both_transports(self) -> None:
        """A backend that checks the token everywhere lets the agent in."""
        backend = await self.backend(check_token_on_upgrade=True, dialects=[PLAIN])
        manager = self.make(backend)
        await manager.connect()
        self.assertEqual("ok", (await manager.send_heartbeat()).status)

    async def test_output_that_is_no_text(self) -> None:
        """What a command printed arrives whatever it was: control characters, and what is no Unicode."""
        backend, manager = await self.connected()
        command_id = backend.send_command(MACHINE, "ask")
        command = await manager.commands().get()
        await manager.send_result(command.success("a\x00b\x1b[31m\ud800 \U0001f600\r\n"))
        result = await backend.when_result(command_id)
        self.assertEqual("a\x00b\x1b[31m\ufffd \U0001f600\r\n", result.output)


class MetricsAndStatus(MissionTestCase):
    """Connection metrics, message counters, request latency, connectivity status."""

    def page(self) -> str:
        """Return the address of the status page that was started last."""
        return f"http://{self.logged('site.started')[-1]['authority']}"

    async def metrics(self) -> Callable[..., float]:
        """Scrape; return a function that gives a sample's value by its name and labels, 0 when there is none."""
        status, text = await self.fetch(f"{self.page()}/metrics")
        self.assertEqual(200, status)
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return lambda name, **labels: samples.get((f"commsmgr_{name}", frozenset(labels.items())), 0.0)

    async def test_metrics_move_with_the_story(self) -> None:
        """Each number that an operator watches follows what happens."""
        backend, manager = await self.connected(
            handler=(runs := Runs()), observe=config.Observe(listen="127.0.0.1:0"), delivery=AT_ONCE
        )
        before = await self.metrics()
        self.assertEqual(1, before("connected", backend="main"))
        self.assertEqual(1, before("connections_total", backend="main", dialect=V1))
        await manager.send_heartbeat()
        await manager.send_inventory({"a": 1})
        backend.send_command(MACHINE, "wait")
        await until(lambda: runs.waiting and backend.ledger.inventory_of(MACHINE))
        backend.faults.inject("refuse")
        backend.faults.inject("drop")
        await until(lambda: not manager.status().connected)
        runs.release()
        await until(lambda: manager.status().queue.events)
        away = await self.metrics()
        self.assertEqual(0, away("connected", backend="main"))
        self.assertEqual(1, away("queue_events"))
        self.assertGreater(away("queue_bytes"), 100)
        backend.faults.clear()
        await until(lambda: nothing_held(manager) and manager.status().connected)
        after = await self.metrics()
        self.assertEqual(2, after("connections_total", backend="main", dialect=V1))
        self.assertEqual(1, after("request_seconds_count", route="/heartbeat", outcome="2xx"))
        self.assertEqual(1, after("messages_total", kind="heartbeat", direction="out", outcome="acked"))
        self.assertEqual(1, after("messages_total", kind="command_result", direction="out", outcome="acked"))
        self.assertEqual(1, after("messages_total", kind="command", direction="in", outcome="accepted"))
        self.assertEqual(0, after("queue_events"))
        self.assertEqual(1, after("command_seconds_count", status="success"))
        self.assertLess(after("seconds_since_receipt", backend="main"), 5)
        self.assertGreater(after("bytes_total", direction="out", transport="http"), 100)

    async def test_health(self) -> None:
        """Alive from the start to the stop; ready only while a backend can be reached; and it says why not."""
        listen_on = f"127.0.0.1:{free_port()}"
        manager = self.manager(
            quick(
                f"http://{listen_on}",
                self.spool(),
                observe=config.Observe(listen="127.0.0.1:0"),
                heartbeat=config.Heartbeat(interval=0.05, jitter=0),
                http=config.HTTP(attempts=1),
            )
        )
        manager.startService()
        await manager.started()
        page = self.page()
        self.assertEqual(200, (await self.fetch(f"{page}/healthz"))[0])
        status, why = await self.fetch(f"{page}/readyz")
        self.assertEqual(503, status)
        self.assertIn("not connected", why)
        backend = await self.backend(listen=listen_on)
        await manager.when_connected()
        status, text = await self.fetch(f"{page}/readyz")
        self.assertEqual(200, status)
        self.assertIn("connected to main (commsmgr.v1", text)
        status, document = await self.fetch(f"{page}/status")
        self.assertEqual(200, status)
        self.assertEqual("Registered", msgspec.json.decode(document)["backends"][0]["link"]["type"])
        await backend.stopService()
        await until(lambda: not manager.status().reachable)
        self.assertEqual(503, (await self.fetch(f"{page}/readyz"))[0])
        self.assertEqual(200, (await self.fetch(f"{page}/healthz"))[0])


class LimitsBreakerAndSeveralBackends(MissionTestCase):
    """Deadlines, circuit breaker, a bounded queue, logs that debug the network, several backends."""

    async def test_breaker(self) -> None:
        """A backend that fails again and again is left alone, and is probed after a while."""
        backend = await self.backend()
        manager = self.make(
            backend,
            websocket=NO_WEBSOCKET,
            http=config.HTTP(attempts=1),
            breaker=config.Breaker(failures=2, open_for=0.1),
        )
        manager.startService()
        backend.faults.inject("status", status=500, transport="http")
        for _ in range(2):
            with self.assertRaises(HTTPStatusError):
                await manager.send_heartbeat()
        with self.assertRaises(BreakerOpen) as caught:
            await manager.send_heartbeat()
        self.assertGreater(caught.exception.retry_in, 0)
        self.assertEqual("open", manager.status().backends[0].breaker)
        backend.faults.clear()
        await pause(0.13)
        self.assertEqual("ok", (await manager.send_heartbeat()).status)
        self.assertEqual("closed", manager.status().backends[0].breaker)
        for _ in range(4):
            with self.assertRaises(HTTPStatusError):
                await manager.send_http("POST", "/heartbeat", json={})
        self.assertEqual("closed", manager.status().backends[0].breaker, "a caller's errors do not count")

    async def test_queue_full(self) -> None:
        """At the bound the submitter hears of it at once, and nothing that was accepted gives way."""
        manager = self.manager(
            quick(
                f"http://127.0.0.1:{free_port()}",
                "unused",
                spool=config.Spool(path=self.spool(), durability="normal", max_events=5),
            )
        )
        manager.startService()
        for number in range(5):
            await manager.send_result(Result(command_id=f"c-{number}"))
        with self.assertRaises(QueueFull):
            await manager.send_result(Result(command_id="c-6"))
        self.assertEqual(5, manager.status().queue.events)

    def test_intake_stops_before_the_queue_is_full(self) -> Deferred[None]:
        """No more commands are taken than there is room for results."""

        async def story(dialect: str) -> None:
            backend, manager = await self.connected(
                dialect, spool=config.Spool(path=self.spool(), durability="normal", max_events=10)
            )
            for number in range(12):
                backend.send_command(MACHINE, "ask", "", (str(number),))
            if dialect == V1:
                await until(lambda: [each.kind for each in backend.event_log.recent].count("nacked") == 4)
            else:
                await until(lambda: len(backend.ledger.results()) == 4)
                self.assertEqual(
                    {"rejected"}, {msgspec.json.decode(row.body)["status"] for row in backend.ledger.results()}
                )
            self.assertEqual(8, manager.status().queue.open_commands)

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_failover_and_back(self) -> None:
        """The second backend takes over from the first, with what is in flight, and gives back when that is proven."""
        listen_on = f"127.0.0.1:{free_port()}"
        first = await self.backend(listen=listen_on)
        second = await self.backend()
        runs = Runs()
        manager = self.make(
            first,
            handler=runs,
            backends=tuple(
                config.Backend(url=each.url, websocket_url=each.websocket_url, name=name)
                for name, each in (("first", first), ("second", second))
            ),
            breaker=config.Breaker(failures=2, open_for=0.1),
            reconnect=config.Reconnect(base=0.02, cap=0.1, return_after=0.2),
            heartbeat=config.Heartbeat(interval=0.05, jitter=0),
            http=config.HTTP(attempts=2),
        )
        await manager.connect()
        await until(lambda: first.connected(MACHINE))
        self.assertEqual("success", (await first.when_result(first.send_command(MACHINE, "echo"))).status)
        for backend in (first, second):
            backend.ledger.add_command("own", MACHINE, b"{}", "taken")
        await until(lambda: nothing_held(manager))
        first.faults.inject("no_ack")
        own = await manager.send_result(Result(command_id="own"))
        await until(lambda: len(first.ledger.results("own")) == 1)
        await first.stopService()
        await until(lambda: second.connected(MACHINE))
        first.faults.clear()
        # What was in flight to the first had no receipt.
        await until(lambda: [row.id for row in second.ledger.results("own")] == [own])
        self.assertEqual("success", (await second.when_result(second.send_command(MACHINE, "echo"))).status)
        self.assertEqual([False, True], [each.active for each in manager.status().backends])
        await first.startService()
        await until(lambda: first.connected(MACHINE))
        await until(lambda: not second.connected(MACHINE))
        self.assertEqual("success", (await first.when_result(first.send_command(MACHINE, "echo"))).status)
        self.assertEqual([True, False], [each.active for each in manager.status().backends])
        await until(lambda: nothing_held(manager))

    async def test_all_backends_down_and_up_again(self) -> None:
        """With no backend at all the agent goes on trying, and takes whichever comes back."""
        places = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        manager = self.manager(
            quick(
                "http://unused",
                self.spool(),
                backends=tuple(config.Backend(url=f"http://{place}", name=place[-5:]) for place in places),
                breaker=config.Breaker(failures=2, open_for=0.1),
                heartbeat=config.Heartbeat(interval=0.05, jitter=0),
            )
        )
        manager.startService()
        await until(lambda: all(each.breaker != "closed" for each in manager.status().backends))
        message_id = await manager.send_result(Result(command_id="made-while-all-were-down"))
        self.assertTrue(message_id)
        await self.backend(listen=places[1])
        began = reactor.seconds()
        await manager.when_connected()
        self.assertLess(reactor.seconds() - began, 2.0)
        await until(lambda: manager.status().queue.dead_letters == 1)  # nobody there had asked for that one

    async def test_goaway(self) -> None:
        """Told to go, the agent finishes what is in flight, leaves, and is back when it was told to be."""
        backend, manager = await self.connected(handler=(runs := Runs()))
        ids = [backend.send_command(MACHINE, "echo") for _ in range(20)]
        registered = backend.when("registered")
        left = backend.when("disconnected")
        await until(lambda: len(runs.commands) > 3)
        self.assertEqual(1, backend.goaway(reconnect_after=0.15, window=0.1))
        self.assertEqual("closed with 1000", (await left).note)
        left_at = reactor.seconds()
        await registered
        self.assertTrue(0.14 <= reactor.seconds() - left_at <= 0.6)
        await until(lambda: len(backend.ledger.results()) == 20 and nothing_held(manager))
        self.assert_once_and_in_order(backend, runs, ids)

    async def test_settings(self) -> None:
        """The backend sets intervals within bounds, for as long as the session lives."""
        backend, manager = await self.connected(heartbeat=config.Heartbeat(interval=0.04, jitter=0))
        beats: list[object] = []
        backend.subscribe(lambda event: beats.append(event) if event.kind == "heartbeat" else None)
        await until(lambda: len(beats) > 1)
        backend.push({"type": "settings", "data": {"heartbeat_interval": 0.0001}})
        await until(lambda: self.logged("link.invalid"))
        self.assertTrue(manager.status().connected)
        backend.push_settings(heartbeat_interval=600)
        await pause(0.06)
        beats.clear()
        await pause(0.15)
        self.assertEqual([], beats)
        backend.faults.inject("drop")
        await until(lambda: len(beats) > 1)

    def test_duplicates(self) -> Deferred[None]:
        """A command that comes again is not run again: its original result is sent again, across a restart too."""

        async def story(dialect: str) -> None:
            backend = await self.backend(dialects=[dialect])
            runs = Runs()
            settings = quick(backend, self.spool())
            manager = self.manager(settings, handler=runs)

            async def again(count: int) -> None:
                await manager.connect()
                await until(lambda: backend.connected(MACHINE))
                backend.send_command(MACHINE, "echo", "", ("one",), id="same")
                await until(
                    lambda: backend.ledger.results("same")[:1] and backend.ledger.results("same")[0].copies == count
                )
                await until(lambda: nothing_held(manager))

            await again(1)
            await again(2)
            await manager.disconnect()
            await again(3)
            self.assertEqual(1, len(runs.commands))
            other = backend.send_command(MACHINE, "echo", "", ("two",), id="same")
            if dialect == PLAIN:
                # Plain backends make ids of milliseconds: another content is another command.
                await until(lambda: len(backend.ledger.results("same")) == 2)
                self.assertEqual([("one",), ("two",)], [command.args for command in runs.commands])
            else:
                await until(lambda: backend.ledger.results(other)[0].copies == 4)
                self.assertEqual(1, len(runs.commands))

        return Deferred.fromCoroutine(together(*map(story, BOTH)))

    async def test_a_backend_with_quirks(self) -> None:
        """Colliding ids, HTML errors, a large frame first, a registration that an old socket takes away."""
        backend = await self.backend(dialects=[PLAIN], quirks=True)
        runs = Runs()
        manager = self.make(backend, handler=runs)
        await manager.connect()
        for _ in range(3):
            await until(lambda: backend.connected(MACHINE) and manager.status().connected)
            before = len(backend.ledger.results())
            for number in range(4):
                backend.send_command(MACHINE, "echo", "", (str(number),))
            await until(lambda before=before: len(backend.ledger.results()) == before + 4)
            await until(lambda: nothing_held(manager))
            registered = backend.when("registered")
            backend.faults.inject("drop")
            await registered
        self.assertEqual(12, len(runs.commands))
        with self.assertRaises(HTTPStatusError) as caught:
            await manager.send_http("POST", "/heartbeat", json={})
        self.assertIn(b"<html>", caught.exception.body)

    async def test_logs_that_debug_the_network(self) -> None:
        """At debug level: attempts, timings and waits; each message's lines bear its id."""
        backend, manager = await self.connected(handler=Runs(), observe=config.Observe(log_level="debug"))
        backend.faults.inject("status", transport="http", status=503, count=1)
        await manager.send_heartbeat()
        command_id = backend.send_command(MACHINE, "echo")
        await backend.when_result(command_id)
        await until(lambda: self.logged("delivery.acknowledged"))
        (retry,) = self.logged("http.retry")
        self.assertEqual(LogLevel.debug, retry["log_level"])
        self.assertIn("attempt 2 of", formatEvent(retry))
        lines = [event.get("event") for event in self.logged() if event.get("message_id") == command_id]
        self.assertEqual(["command.received", "command.finished"], lines)
        acknowledged = self.logged("delivery.acknowledged")[-1]
        self.assertEqual(backend.ledger.results()[0].id, acknowledged["message_id"])


class TheFamilysFigures(MissionTestCase):
    """Start under 2 s; the built-in handlers. (Idle CPU and throughput: see benchmarks.)"""

    async def test_start(self) -> None:
        """From nothing to registered in well under two seconds."""
        began = reactor.seconds()
        await self.connected()
        self.assertLess(reactor.seconds() - began, 2.0)

    async def test_builtin_handlers(self) -> None:
        """What commsmgr runs itself: ping, echo, uptime, status; all else is rejected."""
        backend = await self.backend()
        manager = self.make(
            backend, handler=BuiltinHandler(status=lambda: manager.status(), uptime=lambda: reactor.seconds())
        )
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        outputs = {
            kind: await backend.when_result(backend.send_command(MACHINE, kind, "hello"))
            for kind in ("ping", "echo", "uptime", "status", "reboot")
        }
        self.assertEqual("pong", outputs["ping"].output)
        self.assertEqual("hello", outputs["echo"].output)
        self.assertGreater(float(outputs["uptime"].output), 0)
        self.assertTrue(msgspec.json.decode(outputs["status"].output)["connected"])
        self.assertEqual("rejected", outputs["reboot"].status)
