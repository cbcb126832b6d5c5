"""
The failure table, as far as it fits into one process: what the network and the backend can do to a whole manager.

Each test is a story, told in both dialects at once: results and commands flow, something goes wrong, more results are
made meanwhile, it is over; and then every result is with the backend once and in order, every command was run once,
nothing is left in the spool, and nothing was logged as an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Sequence
from itertools import cycle
from random import Random
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import PeerViolation
from commsmgr.messages import Result
from tests.world import MACHINE, Runs, WorldTestCase, nothing_held, pause, quick, reactor, together, until

V1, PLAIN = "commsmgr.v1", "plain"
BOTH = (V1, PLAIN)
WHILE = 0.08
"""Seconds that a fault lasts, unless the story says otherwise."""

WATCHFUL = config.WebSocket(
    connect_timeout=0.15,
    register_wait=0.05,
    register_timeout=0.15,
    ping_interval=0.1,
    ping_timeout=0.1,
    receipt_timeout=0.25,
    stable_after=0.0,
)
"""Notices within a quarter of a second whatever can be noticed."""


class Low(Random):
    """Draws low numbers, so that a wait is about as short as the rules allow."""

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) / 10


class Stories(WorldTestCase):
    """What all stories have in common."""

    timeout = 8

    def told(self, story: Coroutine[Deferred[Any], Any, Any]) -> Deferred[None]:
        """Run a story as a test."""
        return Deferred.fromCoroutine(story)

    async def in_both(self, **what: Any) -> None:
        """Tell the same story in both dialects, side by side."""
        await together(*(self.story(dialect, **what) for dialect in BOTH))

    async def story(
        self,
        dialect: str,
        *,
        fault: dict[str, Any],
        lasts: float = WHILE,
        within: float = 4.0,
        over_http: bool = False,
        random: Random | None = None,
        quirks: bool = False,
        **changes: Any,
    ) -> None:
        """
        Let results and commands flow, inject ``fault``, make more results, clear it after ``lasts`` seconds.

        :param within: seconds after the end of the fault until all is well again.
        :param over_http: WebSockets are refused until then, so that everything goes over HTTP.
        :param changes: sections of the configuration.
        """
        note = f"{dialect} {fault}"
        backend = await self.backend(dialects=[dialect], quirks=quirks)
        runs = Runs()
        changes = {
            "websocket": WATCHFUL,
            "http": config.HTTP(timeout=0.15),
            "delivery": config.Delivery(http_fallback_after=0.02 if over_http else 60.0),
        } | changes
        manager = self.manager(
            quick(backend, self.spool(), **changes), handler=runs, random=Random(3) if random is None else random
        )
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        ids = [self.give(backend, "echo", number) for number in range(3)]
        ids += [self.give(backend, "wait", number) for number in range(3)]
        await until(lambda: runs.waiting == 3)

        if over_http:
            backend.faults.inject("refuse", transport="websocket")
            backend.faults.inject("drop", transport="websocket")
        backend.faults.inject(**fault)
        runs.release()
        await manager.send_inventory({"system": {"made": "meanwhile"}})
        if dialect == V1:
            ids += [self.give(backend, "echo", number) for number in range(3, 6)]
        await pause(lasts)
        backend.faults.clear()

        began = reactor.seconds()
        await until(lambda: manager.status().connected and backend.connected(MACHINE))
        await until(lambda: len(backend.ledger.results()) == len(ids))
        ids += await self.proof(backend, runs)
        await until(lambda: nothing_held(manager))
        self.assertLess(reactor.seconds() - began, within, note)
        self.assert_once_and_in_order(backend, runs, ids, note)
        self.assertIn(b"meanwhile", backend.ledger.inventory_of(MACHINE) or b"", note)

    def give(self, backend: ReferenceBackend, kind: str, number: int) -> str:
        """Give the agent a command; return its id."""
        return backend.send_command(MACHINE, kind, "", (str(number),))

    async def proof(self, backend: ReferenceBackend, runs: Runs) -> list[str]:
        """
        Give commands until one of them is answered; return the ids of those that reached the agent.

        A plain backend drops what it has sent to a connection that is dying, and does not know it.
        """
        ids: list[str] = []
        while True:
            if backend.connected(MACHINE):
                ids.append(self.give(backend, "echo", 9))
                with contextlib.suppress(defer.TimeoutError):
                    await backend.when_result(ids[-1]).addTimeout(0.3, reactor)
                    break
            await pause(0.02)
        arrived = {command.id for command in runs.commands}
        return [each for each in ids if each in arrived]


class Connections(Stories):
    """What befalls connections."""

    def test_refused(self) -> Deferred[None]:
        """Connections are refused, and the open ones are cut."""
        return self.told(together(*(self.outage(dialect, ("refuse", "drop")) for dialect in BOTH)))

    async def outage(self, dialect: str, kinds: Sequence[str], **changes: Any) -> None:
        """The way to the backend is gone for a while, and comes back."""
        backend = await self.backend(dialects=[dialect])
        runs = Runs()
        manager = self.manager(quick(backend, self.spool(), **changes), handler=runs)
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        ids = [self.give(backend, "wait", number) for number in range(4)]
        await until(lambda: runs.waiting == 4)
        for kind in kinds:
            backend.faults.inject(kind)
        await until(lambda: not manager.status().connected)
        runs.release()
        await until(lambda: manager.status().queue.events == 4)
        backend.faults.clear()
        began = reactor.seconds()
        await until(lambda: len(backend.ledger.results()) == 4 and nothing_held(manager))
        self.assertLess(reactor.seconds() - began, 0.5)
        self.assert_once_and_in_order(backend, runs, ids)

    def test_reset(self) -> Deferred[None]:
        """Open connections are cut."""
        return self.told(self.in_both(fault={"kind": "drop"}))

    def test_dropped_after_each_message(self) -> Deferred[None]:
        """The backend cuts every connection as soon as it has said something: accepted and dropped at once."""
        return self.told(self.in_both(fault={"kind": "drop", "after": 1}))

    def test_dropped_after_some_messages(self) -> Deferred[None]:
        """Connections live long enough to register, and are cut by the first results."""
        return self.told(self.in_both(fault={"kind": "drop", "after": 2, "transport": "websocket"}))

    def test_hanging(self) -> Deferred[None]:
        """New connections are accepted and never answered: each attempt has its deadline."""
        return self.told(
            together(
                self.in_both(fault={"kind": "hang", "transport": "http"}),
                *(self.outage(dialect, ("hang", "drop"), websocket=WATCHFUL) for dialect in BOTH),
            )
        )

    def test_slow(self) -> Deferred[None]:
        """Answers come late, but within the deadlines."""
        return self.told(self.in_both(fault={"kind": "slow", "delay": 0.05}))

    def test_too_slow(self) -> Deferred[None]:
        """Answers come later than the deadlines allow."""
        return self.told(self.in_both(fault={"kind": "slow", "delay": 0.5}, lasts=0.2))

    def test_blackhole(self) -> Deferred[None]:
        """Connections stay open and nothing passes any more, in either direction or in one: the keep-alive notices."""
        return self.told(
            together(
                *(
                    self.story(dialect, fault={"kind": "blackhole", "direction": direction}, lasts=0.3)
                    for direction in ("both", "in", "out")
                    for dialect in BOTH
                )
            )
        )

    def test_short_blackhole(self) -> Deferred[None]:
        """What a short loss has held back arrives late, and nothing has to be sent again."""
        return self.told(self.in_both(fault={"kind": "blackhole"}, lasts=0.05))


class Upgrades(Stories):
    """WebSockets are refused, each in its way."""

    async def refused(self, dialect: str, *, within: float, **fault: Any) -> None:
        """The WebSocket is lost, and the next upgrades are refused for a while."""
        backend = await self.backend(dialects=[dialect])
        runs = Runs()
        manager = self.manager(quick(backend, self.spool()), handler=runs, random=Low())
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        ids = [self.give(backend, "wait", number) for number in range(3)]
        await until(lambda: runs.waiting == 3)
        backend.faults.inject(transport="websocket", **fault)
        backend.faults.inject("drop", transport="websocket")
        await until(lambda: any("upgrade was answered with" in problem for problem in manager.status().problems))
        self.assertTrue((await manager.send_heartbeat()).status)
        runs.release()
        backend.faults.clear()
        began = reactor.seconds()
        await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(manager))
        self.assertLess(reactor.seconds() - began, within, str(fault))
        self.assert_once_and_in_order(backend, runs, ids, str(fault))

    def _each(self, within: float, *faults: dict[str, Any]) -> Deferred[None]:
        return self.told(
            together(*(self.refused(dialect, within=within, **fault) for fault, dialect in zip(faults, cycle(BOTH))))
        )

    def test_trouble_of_the_backend(self) -> Deferred[None]:
        """500, 502 and 503 without Retry-After: the usual backoff."""
        return self._each(0.5, *({"kind": "status", "status": status} for status in (500, 502, 503)))

    def test_refused_for_what_we_are(self) -> Deferred[None]:
        """401, 403 and 404: slowly, but it goes on by itself when the backend has changed its mind."""
        return self._each(1.4, *({"kind": "status", "status": status} for status in (401, 403, 404)))

    def test_told_when_to_come_back(self) -> Deferred[None]:
        """429 and 503 with Retry-After: no attempt before that, and one soon after."""
        return self._each(1.6, *({"kind": "status", "status": status, "retry_after": 1} for status in (429, 503)))

    def test_captive_portal(self) -> Deferred[None]:
        """A web page instead of a WebSocket."""
        return self._each(0.5, {"kind": "html"}, {"kind": "html"})

    def test_redirect(self) -> Deferred[None]:
        """A redirect is no WebSocket, and is not followed."""
        return self._each(0.5, {"kind": "status", "status": 302})


class Backend(Stories):
    """What the backend itself does wrong."""

    def test_crash_before_it_stored(self) -> Deferred[None]:
        """The backend dies after it read, before it stored: the result is sent again."""
        return self.told(self.in_both(fault={"kind": "crash", "stored": False, "count": 2}))

    def test_crash_after_it_stored(self) -> Deferred[None]:
        """The backend dies after it stored, before it answered: the result comes twice and counts once."""
        return self.told(self.in_both(fault={"kind": "crash", "stored": True, "count": 2}))

    def test_no_acknowledgement(self) -> Deferred[None]:
        """Results are stored and never acknowledged: another connection is tried."""
        return self.told(self.story(V1, fault={"kind": "no_ack"}, lasts=0.4))

    def test_deferred_results(self) -> Deferred[None]:
        """Results are refused for now: they are sent again, in their order."""
        return self.told(self.story(V1, fault={"kind": "nack", "retry_after": 0.02}))

    def test_silent_registration(self) -> Deferred[None]:
        """Registrations are not answered: a plain backend may do that, a commsmgr.v1 one is tried anew."""

        async def story(dialect: str) -> None:
            backend = await self.backend(dialects=[dialect])
            backend.faults.inject("silent")
            runs = Runs()
            manager = self.manager(quick(backend, self.spool(), websocket=WATCHFUL), handler=runs)
            connecting = manager.connect()
            if dialect == V1:
                await until(lambda: self.logged("link.ended"))
                self.assertFalse(manager.status().connected)
                backend.faults.clear()
            await connecting
            await until(lambda: backend.connected(MACHINE))
            ids = [self.give(backend, "echo", 1)]
            await until(lambda: len(backend.ledger.results()) == 1 and nothing_held(manager))
            self.assert_once_and_in_order(backend, runs, ids)

        return self.told(together(*map(story, BOTH)))

    def _closed(self, *codes: int, **more: Any) -> Deferred[None]:
        """Tell the story of each code, in one dialect or the other."""
        stories = (
            self.story(dialect, fault={"kind": "close", "code": code}, lasts=0.05, **more)
            for code, dialect in zip(codes, cycle(BOTH))
        )
        return self.told(together(*stories))

    def test_closed(self) -> Deferred[None]:
        """Close codes that ask for nothing but another connection."""
        return self._closed(1000, 1001, 1002, 1009, 1012, 4000)

    def test_closed_with_a_code_that_does_not_exist(self) -> Deferred[None]:
        """Close codes that must not be on the wire."""
        return self._closed(0, 1005, 1006, 1015, 5000)

    def test_closed_in_trouble(self) -> Deferred[None]:
        """1011 and 1013: the backend is left alone a little longer."""
        return self._closed(1011, 1013)

    def test_closed_for_what_we_are(self) -> Deferred[None]:
        """1008 and 44xx: slowly, and then it goes on."""
        return self._closed(1008, 4401, 4403, random=Low())

    def test_closed_after_the_first_results(self) -> Deferred[None]:
        """Each connection is closed in the middle of the results."""
        return self.told(self.in_both(fault={"kind": "close", "code": 1001, "after": 2}))


class Malformed(Stories):
    """What no agent expects to get."""

    def _form(self, form: str, dialect: str) -> Deferred[None]:
        return self.told(self.story(dialect, fault={"kind": "malformed", "form": form, "transport": "websocket"}))

    def test_garbage(self) -> Deferred[None]:
        """Half a JSON document."""
        return self._form("garbage", V1)

    def test_oversized(self) -> Deferred[None]:
        """A message larger than websocket.max_message_bytes."""
        return self._form("oversized", PLAIN)

    def test_binary(self) -> Deferred[None]:
        """A binary message."""
        return self._form("binary", V1)

    def test_unknown(self) -> Deferred[None]:
        """A message of a type nobody knows."""
        return self._form("unknown", PLAIN)

    def test_deep(self) -> Deferred[None]:
        """A hundred thousand brackets."""
        return self._form("deep", V1)

    def test_not_unicode(self) -> Deferred[None]:
        """A text message that is not UTF-8."""
        return self._form("utf8", PLAIN)

    def test_reserved_bits(self) -> Deferred[None]:
        """A frame that RFC 6455 does not allow."""
        return self._form("bits", V1)

    def test_answers_over_http(self) -> Deferred[None]:
        """HTTP answers that are no JSON, too large, too deep; the heartbeat is not taken for answered."""

        async def story(form: str) -> None:
            backend = await self.backend()
            manager = self.manager(
                quick(backend, self.spool(), http=config.HTTP(attempts=1, max_response_bytes=1 << 20))
            )
            await manager.connect()
            backend.faults.inject("malformed", form=form, transport="http")
            with self.assertRaises(PeerViolation):
                await manager.send_heartbeat()
            backend.faults.clear()
            self.assertEqual((await manager.send_heartbeat()).status, "ok")

        return self.told(together(*map(story, ("garbage", "oversized", "binary", "deep", "utf8"))))


class OverHTTP(Stories):
    """Everything that can happen to HTTP while there is no WebSocket."""

    def _faults(self, *faults: dict[str, Any], **more: Any) -> Deferred[None]:
        """Tell the story of each fault, in one dialect or the other."""
        stories = (
            self.story(dialect, fault={"transport": "http", **fault}, over_http=True, **more)
            for fault, dialect in zip(faults, cycle(BOTH))
        )
        return self.told(together(*stories))

    def test_trouble(self) -> Deferred[None]:
        """500, 502, 503 and 429."""
        return self._faults(*({"kind": "status", "status": status} for status in (500, 502, 503, 429)))

    def test_told_when_to_come_back(self) -> Deferred[None]:
        """429 and 503 with Retry-After."""
        return self._faults(
            *({"kind": "status", "status": status, "retry_after": 1} for status in (429, 503)), random=Low()
        )

    def test_captive_portal(self) -> Deferred[None]:
        """A portal's page says 200 to everything, and is no receipt."""
        return self._faults({"kind": "html"}, {"kind": "html"})

    def test_no_answer(self) -> Deferred[None]:
        """Requests are accepted and not answered, or cut."""
        return self._faults({"kind": "hang"}, {"kind": "drop", "after": 1})

    def test_crash(self) -> Deferred[None]:
        """The backend dies with the request, before or after it has stored it."""
        return self._faults(
            {"kind": "crash", "stored": False, "count": 2}, {"kind": "crash", "stored": True, "count": 2}
        )

    def test_slow(self) -> Deferred[None]:
        """Answers come late, some of them too late."""
        return self._faults({"kind": "slow", "delay": 0.02}, {"kind": "slow", "delay": 0.5})

    def test_blackhole(self) -> Deferred[None]:
        """Nothing passes, in either direction or in one."""
        return self._faults({"kind": "blackhole"}, {"kind": "blackhole", "direction": "out"}, lasts=0.3)


class Refusals(Stories):
    """What the backend will never take."""

    def test_refused_for_good(self) -> Deferred[None]:
        """A nack without retry_after makes a dead letter, with its reason, and what comes after it is delivered."""

        async def story() -> None:
            backend = await self.backend(dialects=[V1])
            manager = self.manager(quick(backend, self.spool()))
            await manager.connect()
            await until(lambda: backend.connected(MACHINE))
            await manager.send_result(Result(command_id="nobody-asked"))
            await until(lambda: manager.status().queue.dead_letters == 1)
            (event,) = self.logged("delivery.refused")
            self.assertIn("unknown_command", event["reason"])
            command_id = backend.send_command(MACHINE, "ask")
            command = await manager.commands().get()
            await manager.send_result(command.success("yes"))
            self.assertEqual("yes", (await backend.when_result(command_id)).output)

        return self.told(story())

    def test_refused_for_good_over_http(self) -> Deferred[None]:
        """So does a 404 for the result of a command that the backend does not know."""

        async def story() -> None:
            backend = await self.backend()
            websocket = config.WebSocket(enabled=False)
            manager = self.manager(
                quick(backend, self.spool(), websocket=websocket, delivery=config.Delivery(http_fallback_after=0))
            )
            manager.startService()
            await manager.send_heartbeat()
            await manager.send_result(Result(command_id="nobody-asked"))
            await until(lambda: manager.status().queue.dead_letters == 1)
            (event,) = self.logged("delivery.refused")
            self.assertIn("404", event["reason"])

        return self.told(story())


class Stopped(Stories):
    """The agent is stopped while something is wrong: the way of SIGTERM, which comes when it likes."""

    def test_in_the_middle_of_each(self) -> Deferred[None]:
        """The stop keeps its deadline, and the next start delivers what this one could not."""
        faults: tuple[dict[str, Any], ...] = (
            {"kind": "refuse"},
            {"kind": "hang"},
            {"kind": "drop", "after": 1},
            {"kind": "slow", "delay": 5},
            {"kind": "status", "status": 503, "retry_after": 60},
            {"kind": "html"},
            {"kind": "no_ack"},
            {"kind": "nack", "retry_after": 60},
            {"kind": "crash"},
            {"kind": "close", "after": 1},
            {"kind": "silent"},
            {"kind": "malformed", "form": "oversized"},
            {"kind": "blackhole"},
            {"kind": "blackhole", "direction": "in"},
            {"kind": "blackhole", "direction": "out"},
        )
        return self.told(together(*(self.stopped(dialect, fault) for fault, dialect in zip(faults, cycle(BOTH)))))

    async def stopped(self, dialect: str, fault: dict[str, Any]) -> None:
        """Stop in the middle of ``fault``."""
        backend = await self.backend(dialects=[dialect])
        runs = Runs()
        settings = quick(backend, self.spool(), stop_deadline=2.0, http=config.HTTP(timeout=5.0))
        manager = self.manager(settings, handler=runs)
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        ids = [self.give(backend, "wait", number) for number in range(3)]
        await until(lambda: runs.waiting == 3)
        backend.faults.inject(**fault)
        runs.release()
        beat = manager.send_heartbeat().addBoth(lambda outcome: None)
        await manager.send_inventory({"a": 1})
        await pause(0.02)
        began = reactor.seconds()
        await manager.disconnect()
        self.assertLess(reactor.seconds() - began, 4.0, f"{dialect} {fault}")
        self.assertTrue(beat.called, "nobody is left waiting")
        backend.faults.clear()
        successor = self.manager(settings, handler=runs)
        await successor.connect()
        await until(lambda: len(backend.ledger.results()) == 3 and nothing_held(successor))
        self.assert_once_and_in_order(backend, runs, ids, f"{dialect} {fault}")
