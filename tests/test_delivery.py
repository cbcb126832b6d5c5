"""The outbox on its way to the backend, on a virtual clock: both transports, a real spool in memory, every refusal."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.delivery import REFUSALS, Delivery
from commsmgr.errors import ConnectFailed, ConnectionEnded, DeadlineExceeded, SpoolWriteFailed, TokenError
from commsmgr.openlink import LinkEvents
from commsmgr.spool import Entry, Lane, Spool
from commsmgr.transport.http import HTTPResponse
from tests.link_kit import HANG, House, LinkBench, answer, pass_time

FALLBACK = 30.0


class World:
    """A spool, delivery out of it, and a backend at both transports."""

    def __init__(self, *, v1: bool = True, window: int = 1000, **sections: Any) -> None:
        sections.setdefault("reconnect", config.Reconnect(base=1.0, cap=8.0, retry_after_cap=100.0))
        sections.setdefault("breaker", config.Breaker(failures=1000))
        sections.setdefault(
            "websocket", config.WebSocket(window_messages=window, ping_interval=3000, ping_timeout=3000)
        )
        self.house = House(**sections)
        self.clock = self.house.clock
        self.http = self.house.http["one"]
        self.v1 = v1
        self.spool = Spool(config.Spool(durability="memory"), reactor=self.clock, wall=self.clock.seconds)
        self.outbox = self.spool.outbox
        self.by_http: list[tuple[str, int]] = []
        self.delivery = Delivery(
            outbox=self.outbox,
            requests=self.house.requests,
            whole=self.house.config,
            clock=self.clock,
            random=self.house.random,
            timestamp=lambda: "now",
            metrics=self.house.metrics,
            on_receipt=self._receipted,
        )
        self.events = LinkEvents(
            registered=self.delivery.link_registered,
            ended=self.delivery.link_ended,
            receipts=self.delivery.receipts,
            refused=self.delivery.refused,
            command=lambda link, command: None,
            pushed=lambda push: None,
            settings=lambda settings: None,
        )
        self.spool.open()
        self.run()
        self.delivery.start()
        self.run()

    def _receipted(self, entry: Entry, response: HTTPResponse) -> None:
        self.by_http.append((entry.id, response.status))

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass."""
        pass_time(self.clock, seconds)

    def put(self, *ids: str, body: bytes = b"{}") -> None:
        """Accept results."""
        for each in ids:
            self.outbox.put(lane=Lane.EVENT, kind="command_result", id=each, body=body)
        self.run()

    def put_state(self, id: str, key: str = "inventory") -> None:
        """Accept an inventory."""
        self.outbox.put(lane=Lane.STATE, kind="inventory", id=id, body=b"{}", key=key)
        self.run()

    def link(self) -> LinkBench:
        """A link registers."""
        bench = LinkBench(
            self.clock, v1=self.v1, settings=self.house.config.websocket, metrics=self.house.metrics, events=self.events
        )
        bench.register()
        self.run()
        return bench

    def lose(self, bench: LinkBench) -> None:
        """A link ends, as :class:`commsmgr.link.Link` reports it."""
        bench.connection.is_open = False
        bench.link.ended()
        self.delivery.link_ended(bench.link)
        self.run()

    def ack(self, bench: LinkBench, *ids: str) -> None:
        bench.ack(*ids)
        self.run()

    def posted(self) -> list[str]:
        """Return the ids of the results sent over HTTP."""
        return [call.headers["Idempotency-Key"] for call in self.http.calls if call.path == "/commands/result"]

    def held(self) -> int:
        return self.outbox.stats.events

    def dead(self) -> list[tuple[str, str]]:
        """Return ids and reasons of the dead letters, the oldest first."""
        found: list[Any] = []
        self.outbox.dead_letters(100).addCallback(found.extend)
        self.run()
        return [(letter.id, letter.reason) for letter in reversed(found)]

    def stop(self) -> None:
        Deferred.fromCoroutine(self.delivery.stop())


class _DeliveryTests(SynchronousTestCase):
    def world(self, **parameters: Any) -> World:
        world = World(**parameters)
        self.addCleanup(world.stop)
        return world


class OverWebSocketTests(_DeliveryTests):
    """Results over a link."""

    def test_sent_and_forgotten(self) -> None:
        """A result goes over the link as soon as there is one, and leaves the outbox with its ack."""
        world = self.world()
        world.put("a", "b")
        bench = world.link()
        self.assertEqual((bench.connection.results(), world.held()), (["a", "b"], 2))
        world.ack(bench, "a", "b")
        self.assertEqual((world.held(), world.http.calls), (0, []))
        self.assertEqual(
            world.house.count("messages_total", kind="command_result", direction="out", outcome="acked"), 2
        )

    def test_as_they_come(self) -> None:
        """What is accepted while the link is up goes at once, in order."""
        world = self.world()
        bench = world.link()
        for each in "abc":
            world.put(each)
        self.assertEqual(bench.connection.results(), ["a", "b", "c"])

    def test_plain(self) -> None:
        """At a plain backend the barrier is the receipt."""
        world = self.world(v1=False)
        bench = world.link()
        world.put("a", "b")
        bench.pong()
        world.run()
        self.assertEqual(world.held(), 0)

    def test_window(self) -> None:
        """No more is in flight than the window admits; each receipt lets the next ones follow, in order."""
        world = self.world(window=2)
        world.put(*"abcde")
        bench = world.link()
        self.assertEqual(bench.connection.results(), ["a", "b"])
        world.ack(bench, "a")
        self.assertEqual(bench.connection.results(), ["a", "b", "c"])
        world.ack(bench, "b", "c")
        self.assertEqual(bench.connection.results(), ["a", "b", "c", "d", "e"])

    def test_window_bytes(self) -> None:
        """A result larger than the whole window passes alone."""
        world = self.world(websocket=config.WebSocket(window_bytes=10, ping_interval=3000))
        world.put("a", body=b'"' + b"x" * 100 + b'"')
        world.put("b")
        bench = world.link()
        self.assertEqual(bench.connection.results(), ["a"])
        world.ack(bench, "a")
        self.assertEqual(bench.connection.results(), ["a", "b"])

    def test_rewind(self) -> None:
        """What had no receipt when the link was lost goes over the next one, same ids, same bytes, same order."""
        world = self.world(window=3)
        world.put(*"abcd")
        first = world.link()
        world.ack(first, "b")
        self.assertEqual(first.connection.results(), ["a", "b", "c", "d"])
        before = {message["id"]: message["data"] for message in first.connection.texts("command_result")}
        world.lose(first)
        second = world.link()
        self.assertEqual(second.connection.results(), ["a", "c", "d"])
        for message in second.connection.texts("command_result"):
            self.assertEqual(message["data"], before[message["id"]])

    def test_receipt_after_the_loss(self) -> None:
        """A receipt that is processed just before the loss counts: what it names does not go again."""
        world = self.world()
        world.put("a", "b")
        first = world.link()
        first.ack("a")
        world.lose(first)
        self.assertEqual(world.link().connection.results(), ["b"])

    def test_a_link_that_is_not_ours(self) -> None:
        """The end of another link than the one in use changes nothing."""
        world = self.world()
        bench = world.link()
        world.put("a")
        other = LinkBench(
            world.clock,
            v1=True,
            settings=world.house.config.websocket,
            metrics=world.house.metrics,
            events=world.events,
        )
        world.delivery.link_ended(other.link)
        world.put("b")
        self.assertEqual(bench.connection.results(), ["a", "b"])

    def test_draining(self) -> None:
        """A link that drains takes nothing new; that waits for the next way."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.link.drain()
        world.put("b")
        self.assertEqual(bench.connection.results(), ["a"])
        world.lose(bench)
        self.assertEqual(world.link().connection.results(), ["a", "b"])

    def test_a_connection_that_takes_nothing(self) -> None:
        """What was handed to a closing connection goes again over the next one."""
        world = self.world()
        bench = world.link()
        bench.connection.is_open = False
        world.put("a")
        world.lose(bench)
        self.assertEqual(world.link().connection.results(), ["a"])

    def test_debug(self) -> None:
        """At debug level each receipt is logged with its time; otherwise nothing is noted."""
        for level, expected in (("debug", [2000.0]), ("info", [])):
            events: list[Any] = []
            globalLogPublisher.addObserver(events.append)
            self.addCleanup(globalLogPublisher.removeObserver, events.append)
            world = self.world(observe=config.Observe(log_level=level))
            bench = world.link()
            world.put("a")
            world.run(2)
            world.ack(bench, "a")
            found = [event["milliseconds"] for event in events if event.get("event") == "delivery.acknowledged"]
            self.assertEqual(found, expected)


class RefusalTests(_DeliveryTests):
    """Nacks."""

    def test_for_good(self) -> None:
        """Without a time the entry becomes a dead letter with its reason, and the others go on."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        bench.nack("a")
        world.put("c")
        self.assertEqual(world.dead(), [("a", "nack busy: no")])
        world.ack(bench, "b", "c")
        self.assertEqual((world.held(), bench.connection.results()), (0, ["a", "b", "c"]))
        self.assertEqual(world.house.count("dropped_total", reason="refused"), 1)

    def test_later(self) -> None:
        """With a time the lane pauses for that long, then goes again from that entry, in order."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        bench.nack("a", retry_after=20)
        world.ack(bench, "b")
        world.put("c")
        world.run(19.9)
        self.assertEqual(bench.connection.results(), ["a", "b"])
        world.run(0.2)
        self.assertEqual(bench.connection.results(), ["a", "b", "a", "c"])
        self.assertEqual(world.dead(), [])

    def test_in_flight_is_not_doubled(self) -> None:
        """What is still in flight when one entry was refused is not sent a second time on the same link."""
        world = self.world()
        bench = world.link()
        world.put("a", "b", "c")
        bench.nack("a", retry_after=5)
        world.run(6)
        self.assertEqual(bench.connection.results(), ["a", "b", "c", "a"])
        world.ack(bench, "a", "b", "c")
        self.assertEqual(world.held(), 0)

    def test_refused_behind_what_is_in_flight(self) -> None:
        """An entry that is put off goes again although all before it are in flight, in a window with one place."""
        world = self.world(window=2)
        bench = world.link()
        world.put("a", "b", "c")
        bench.nack("b", retry_after=5)
        world.run(6)
        self.assertEqual(bench.connection.results(), ["a", "b", "b"])
        world.ack(bench, "a", "b")
        self.assertEqual(bench.connection.results(), ["a", "b", "b", "c"])

    def test_a_whole_window_refused(self) -> None:
        """A backend that puts off everything in flight gets all of it again, in order, and the disk is read once."""
        world = self.world()
        bench = world.link()
        ids = [f"e{n:02}" for n in range(50)]
        world.put(*ids)
        reader = world.outbox.reader(Lane.EVENT)
        rewinds: list[int] = []
        rewind = reader.rewind
        self.patch(reader, "rewind", lambda: (rewinds.append(1), rewind())[1])
        for each in ids:
            bench.nack(each, retry_after=5)
        world.run(6)
        self.assertEqual(bench.connection.results(), ids + ids)
        self.assertEqual(len(rewinds), 1)

    def test_cap(self) -> None:
        """A backend cannot stop the lane for longer than retry_after_cap."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.nack("a", retry_after=100_000)
        world.run(100)
        self.assertEqual(bench.connection.results(), ["a", "a"])

    def test_at_once(self) -> None:
        """A time of 0 is no pause."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        bench.nack("a", retry_after=0)
        world.run()
        self.assertEqual(bench.connection.results(), ["a", "b", "a"])

    def test_too_often(self) -> None:
        """An entry that is put off for the twentieth time is a dead letter, and lets the others by."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        world.ack(bench, "b")
        world.put("c")
        for number in range(REFUSALS):
            self.assertEqual(world.dead(), [], number)
            bench.nack("a", retry_after=5)
            world.run(6)
        self.assertEqual([letter[0] for letter in world.dead()], ["a"])
        self.assertEqual(bench.connection.results().count("a"), REFUSALS)

    def test_a_receipt_begins_anew(self) -> None:
        """Refusals are counted per entry."""
        world = self.world()
        bench = world.link()
        for each in "ab":
            world.put(each)
            for _ in range(REFUSALS - 1):
                bench.nack(each, retry_after=1)
                world.run(2)
            world.ack(bench, each)
        self.assertEqual((world.dead(), world.held()), ([], 0))

    def test_a_new_link_ends_the_pause(self) -> None:
        """The pause was the old link's; a new one begins at once."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.nack("a", retry_after=90)
        world.run()
        world.lose(bench)
        self.assertEqual(world.link().connection.results(), ["a"])

    def test_refused_while_put_back(self) -> None:
        """An entry that is refused for good is not sent again although the lane was just rewound."""
        world = self.world()
        bench = world.link()
        world.put("a", "b", "c")
        bench.nack("a", retry_after=0)
        bench.nack("b")
        world.run()
        self.assertEqual(bench.connection.results(), ["a", "b", "c", "a"])
        self.assertEqual(world.dead(), [("b", "nack busy: no")])


class FallbackTests(_DeliveryTests):
    """From WebSocket to HTTP and back."""

    def test_after_the_wait(self) -> None:
        """Without a link results go over HTTP after http_fallback_after, one at a time, in order."""
        world = self.world()
        world.put("a", "b", "c")
        world.run(FALLBACK - 0.1)
        self.assertEqual(world.posted(), [])
        world.run(0.1)
        self.assertEqual((world.posted(), world.held()), (["a", "b", "c"], 0))
        self.assertEqual(world.by_http, [("a", 200), ("b", 200), ("c", 200)])
        world.put("d")
        self.assertEqual(world.posted(), ["a", "b", "c", "d"])

    def test_without_websocket(self) -> None:
        """When WebSockets are switched off there is nothing to wait for."""
        world = self.world(websocket=config.WebSocket(enabled=False))
        world.put("a")
        self.assertEqual(world.posted(), ["a"])

    def test_body(self) -> None:
        """The stored bytes are the bytes sent, to the path of results."""
        world = self.world()
        world.put("a", body=b'{"x": 1}')
        world.run(FALLBACK)
        self.assertEqual((world.http.calls[0].body, world.http.calls[0].path), (b'{"x": 1}', "/commands/result"))

    def test_a_link_within_the_wait(self) -> None:
        """A link that comes up before then takes the results; HTTP is not used."""
        world = self.world()
        world.put("a")
        world.run(FALLBACK - 1)
        self.assertEqual(world.link().connection.results(), ["a"])
        world.run(FALLBACK)
        self.assertEqual(world.posted(), [])

    def test_after_a_lost_link(self) -> None:
        """The wait begins with the loss of a link that delivered; what it had in flight goes over HTTP then."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        world.ack(bench, "a")
        world.run(100)
        world.lose(bench)
        world.run(FALLBACK - 0.1)
        self.assertEqual(world.posted(), [])
        world.run(0.1)
        self.assertEqual((world.posted(), world.held()), (["b"], 0))

    def test_an_exchange_under_way(self) -> None:
        """A link that registers during an exchange waits for its end: no overlap, no loss, no reordering."""
        for outcome, expected in ((200, ["b", "c"]), (503, ["a", "b", "c"]), (400, ["b", "c"])):
            world = self.world()
            exchange: Deferred[HTTPResponse] = Deferred()
            world.http.script = [exchange]
            world.put("a", "b")
            world.run(FALLBACK)
            bench = world.link()
            world.put("c")
            self.assertEqual(bench.connection.results(), [])
            exchange.callback(answer(outcome))
            world.run()
            self.assertEqual((bench.connection.results(), world.posted()), (expected, ["a"]))
            world.ack(bench, *expected)
            self.assertEqual(world.held(), 0)

    def test_a_link_that_comes_and_goes_during_an_exchange(self) -> None:
        """Such a link changes nothing for the exchange or for what follows."""
        world = self.world()
        exchange: Deferred[HTTPResponse] = Deferred()
        world.http.script = [exchange]
        world.put("a", "b")
        world.run(FALLBACK)
        world.lose(world.link())
        self.assertEqual(world.posted(), ["a"])
        exchange.callback(answer(200))
        world.run(1)
        self.assertEqual((world.posted(), world.held()), (["a", "b"], 0))

    def test_flapping(self) -> None:
        """Links that come and go without delivering do not put off the fallback."""
        world = self.world()
        world.put("a", "b")
        for _ in range(10):
            bench = world.link()
            world.run(2)
            world.lose(bench)
            world.run(2)
        self.assertEqual((world.posted(), world.held()), (["a", "b"], 0))

    def test_a_link_that_delivers_now_and_then(self) -> None:
        """A link that delivered something was a way, and so was a long one with nothing to deliver."""
        for deliver in (True, False):
            world = self.world()
            for _ in range(3):
                bench = world.link()
                if deliver:
                    world.put("a")
                    world.ack(bench, "a")
                else:
                    world.run(FALLBACK)
                world.lose(bench)
                world.put("b")
                world.run(FALLBACK - 1)
                self.assertEqual(world.posted(), [])
                bench = world.link()
                world.ack(bench, "b")
                world.lose(bench)

    def test_a_link_during_the_backoff(self) -> None:
        """A link that comes up while HTTP backs off does not wait for the end of that."""
        world = self.world()
        world.http.default = answer(503, {"retry-after": "90"})
        world.put("a")
        world.run(FALLBACK + 1)
        self.assertEqual(world.posted(), ["a"])
        self.assertEqual(world.link().connection.results(), ["a"])


class OverHTTPTests(_DeliveryTests):
    """Verdicts over HTTP."""

    def fallen_back(self, *ids: str, outcome: Any = 200, **parameters: Any) -> World:
        """Return a world that delivers over HTTP, with these results just posted."""
        world = self.world(**parameters)
        world.run(FALLBACK)
        world.http.default = outcome
        world.put(*ids)
        return world

    def test_refused_for_good(self) -> None:
        """A 4xx that judges the entry makes a dead letter of it; the next one follows at once."""
        for status in (400, 404, 413, 422):
            world = self.fallen_back()
            world.http.script = [status, 200]
            world.put("a", "b")
            self.assertEqual((world.dead(), world.held()), ([("a", f"HTTP {status}")], 0))
            self.assertEqual(world.posted(), ["a", "b"])

    def test_kept(self) -> None:
        """What says nothing about the entry keeps it: it goes again, first, later, and never in a hot loop."""
        for outcome in (
            302,
            408,
            429,
            500,
            501,
            503,
            505,
            ConnectFailed("no"),
            ConnectionEnded("no", may_have_arrived=True),
            DeadlineExceeded("no"),
            answer(200, {"content-type": "text/html"}, b"<html>"),
            answer(302, {"content-type": "text/html"}, b"<html>"),
        ):
            world = self.fallen_back("a", "b", outcome=outcome)
            world.run(60)
            self.assertEqual((set(world.posted()), world.held(), world.dead()), ({"a"}, 2, []), outcome)
            self.assertLess(len(world.posted()), 30, outcome)
            world.http.default = 200
            world.run(200)
            self.assertEqual(world.held(), 0, outcome)
            self.assertEqual(world.posted()[-2:], ["a", "b"])

    def test_backs_off(self) -> None:
        """Waits grow up to the cap, and begin anew after a success."""
        world = self.fallen_back("a", outcome=503)
        world.run(600)
        settled = len(world.http.calls)
        world.run(600)
        self.assertTrue(100 < len(world.http.calls) - settled < 250, len(world.http.calls) - settled)
        self.assertLess(settled, 260)
        world.http.default = 200
        world.run(8)
        world.http.calls.clear()
        world.http.script = [503]
        world.put("b")
        world.run(1)
        self.assertEqual(world.posted(), ["b", "b"])

    def test_hanging(self) -> None:
        """An exchange without an answer ends with http.timeout and is repeated with the same id."""
        world = self.fallen_back("a", outcome=HANG)
        world.run(29)
        self.assertEqual(world.posted(), ["a"])
        world.run(3)
        self.assertEqual(world.posted(), ["a", "a"])

    def test_refused_token(self) -> None:
        """After a second 401 the slow path: no more than two exchanges per refused_delay."""
        world = self.fallen_back("a", outcome=401, auth=config.Auth(refused_delay=60))
        self.assertEqual([call.token for call in world.http.calls], ["t0", "t1"])
        for _ in range(10):
            world.http.calls.clear()
            world.run(60)
            self.assertLessEqual(len(world.http.calls), 2)
        self.assertEqual((world.held(), world.dead()), (1, []))
        world.http.default = 200
        world.run(70)
        self.assertEqual(world.held(), 0)

    def test_retry_after(self) -> None:
        """Retry-After is the least wait."""
        world = self.fallen_back("a", outcome=answer(503, {"retry-after": "50"}))
        world.run(49.9)
        self.assertEqual(len(world.http.calls), 1)
        world.run(1.2)
        self.assertEqual(len(world.http.calls), 2)

    def test_breaker_open(self) -> None:
        """While every backend is left alone nothing is sent, and not long after that it is."""
        world = self.fallen_back(breaker=config.Breaker(failures=1, open_for=40.0))
        world.house.trip("one")
        left = world.house.breaker.retry_in()
        world.put("a")
        world.run(left - 0.1)
        self.assertEqual(world.http.calls, [])
        world.run(1.2)
        self.assertEqual((world.posted(), world.held()), (["a"], 0))

    def test_no_token(self) -> None:
        """A provider that fails, by whatever error, stops nothing for good."""
        for error in (TokenError("no file"), ZeroDivisionError()):
            world = self.fallen_back()
            world.house.token.outcome = error
            world.put("a")
            world.run(20)
            self.assertEqual(world.http.calls, [])
            world.house.token.outcome = None
            world.run(10)
            self.assertEqual(world.held(), 0)
        self.flushLoggedErrors(ZeroDivisionError)


class StateTests(_DeliveryTests):
    """The state lane."""

    def test_always_over_http(self) -> None:
        """An inventory goes over HTTP at once, whether there is a link or not."""
        world = self.world()
        world.put_state("i1")
        bench = world.link()
        world.put_state("i2")
        paths = [(call.path, call.headers["Idempotency-Key"]) for call in world.http.calls]
        self.assertEqual(paths, [("/inventory", "i1"), ("/inventory", "i2")])
        self.assertEqual((bench.connection.results(), world.outbox.stats.states), ([], 0))
        self.assertEqual(world.by_http, [("i1", 200), ("i2", 200)])

    def test_the_latest_wins(self) -> None:
        """One that was replaced while it could not be sent is not sent any more."""
        world = self.world()
        world.http.script = [503]
        world.put_state("i1")
        world.put_state("i2")
        world.run(20)
        self.assertEqual([call.headers["Idempotency-Key"] for call in world.http.calls], ["i1", "i2"])

    def test_replaced_during_the_exchange(self) -> None:
        """The receipt of the older one does not take the newer one away."""
        world = self.world()
        exchange: Deferred[HTTPResponse] = Deferred()
        world.http.script = [exchange]
        world.put_state("i1")
        world.put_state("i2")
        exchange.callback(answer(200))
        world.run()
        self.assertEqual([call.headers["Idempotency-Key"] for call in world.http.calls], ["i1", "i2"])
        self.assertEqual(world.outbox.stats.states, 0)

    def test_lanes_do_not_wait_for_each_other(self) -> None:
        """A backend that refuses inventories still gets results, and the other way round."""
        world = self.world()
        world.http.default = answer(503, {"retry-after": "100"})
        world.put_state("i1")
        world.put("a")
        bench = world.link()
        self.assertEqual(bench.connection.results(), ["a"])
        world.ack(bench, "a")
        self.assertEqual((world.held(), world.outbox.stats.states), (0, 1))


class FlushTests(_DeliveryTests):
    """The last moments."""

    def flush(self, world: World, deadline: float) -> Deferred[None]:
        return Deferred.fromCoroutine(world.delivery.flush(deadline))

    def test_empty(self) -> None:
        """With nothing to send, or no link to send it over, there is nothing to wait for."""
        world = self.world()
        world.put("a")
        self.successResultOf(self.flush(world, 5))
        bench = world.link()
        world.ack(bench, "a")
        self.successResultOf(self.flush(world, 5))

    def test_until_the_last_receipt(self) -> None:
        """It ends as soon as the lane is empty, be it by receipts or by refusals."""
        for refuse in (False, True):
            world = self.world()
            bench = world.link()
            world.put("a", "b")
            waiting = self.flush(world, 5)
            world.ack(bench, "a")
            world.run(1)
            self.assertNoResult(waiting)
            (bench.nack if refuse else bench.ack)("b")
            world.run(0)
            self.successResultOf(waiting)

    def test_deadline(self) -> None:
        """It ends with its time."""
        world = self.world()
        world.link()
        world.put("a")
        waiting = self.flush(world, 5)
        world.run(4.9)
        self.assertNoResult(waiting)
        world.run(0.1)
        self.successResultOf(waiting)
        self.successResultOf(self.flush(world, 0))

    def test_the_link_ends(self) -> None:
        """It ends with the link."""
        world = self.world()
        bench = world.link()
        world.put("a")
        waiting = self.flush(world, 5)
        world.lose(bench)
        self.successResultOf(waiting)


class StopTests(_DeliveryTests):
    """The end, and defects."""

    def test_stop(self) -> None:
        """After the stop nothing is sent, an exchange is cancelled, no timer is left, the entry is kept."""
        for prepare in (lambda world: None, lambda world: world.run(FALLBACK), lambda world: world.link()):
            world = self.world()
            world.http.default = HANG
            prepare(world)
            world.put("a")
            sent = len(world.http.calls)
            world.stop()
            world.put("b")
            world.run(1000) if sent else world.run()
            self.assertEqual((len(world.http.calls), world.http.cancelled, world.held()), (sent, sent, 2))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_timers(self) -> None:
        """A stop leaves no timer on the clock."""
        world = self.world()
        world.put("a")
        world.stop()
        world.run()
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def test_a_receipt_after_the_stop(self) -> None:
        """A receipt that comes in the last moment still counts."""
        world = self.world()
        bench = world.link()
        world.put("a")
        world.stop()
        world.ack(bench, "a")
        self.assertEqual(world.held(), 0)

    def test_a_listener_with_a_defect(self) -> None:
        """A defect in who hears of receipts is logged, and delivery goes on."""
        world = self.world()
        self.patch(world.delivery, "_on_receipt", lambda entry, response: 1 / 0)
        world.put_state("i1")
        world.put_state("i2", key="other")
        self.assertEqual(world.outbox.stats.states, 0)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_a_defect(self) -> None:
        """A defect in a loop itself is logged: silence would be worse."""
        world = self.world()
        world.outbox.put(lane=Lane.EVENT, kind="unheard-of", id="x", body=b"{}")
        world.run(FALLBACK)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_a_failing_spool(self) -> None:
        """A spool that cannot take a receipt or a refusal stops nothing."""
        world = self.world()
        bench = world.link()
        world.put("a", "b", "c")
        self.patch(world.outbox, "forget", lambda seqs: fail(SpoolWriteFailed("full")))
        self.patch(world.outbox, "bury", lambda seq, reason: fail(SpoolWriteFailed("full")))
        bench.ack("a")
        bench.nack("b")
        world.put("d")
        self.assertEqual(bench.connection.results(), ["a", "b", "c", "d"])


STEPS = ("put", "up", "down", "ack", "nack", "wait", "answer", "fail")
"""What can happen to delivery."""


class AnyOrderTests(SynchronousTestCase):
    """Whatever happens in whatever order: nothing is lost, nothing overlaps, first sendings are in order."""

    @given(steps=st.lists(st.sampled_from(STEPS), max_size=40), v1=st.booleans())
    @settings(deadline=None, max_examples=120, database=None)
    def test_nothing_is_lost(self, steps: list[str], v1: bool) -> None:
        """Every accepted result is at the backend in the end, in order of its first arrival, by one way at a time."""
        world = World(v1=v1, window=3)
        self.addCleanup(world.stop)
        arrived: list[str] = []
        last_ping: list[bytes] = []
        accepted = 0
        bench: LinkBench | None = None
        exchange: Deferred[HTTPResponse] | None = None

        def look() -> None:
            """Note what came, and that nothing came over the link while an exchange was under way."""
            nonlocal exchange
            if bench is not None:
                fresh = bench.connection.results()
                pings = bench.connection.pings()
                last_ping[:] = pings[-1:] or last_ping
                bench.connection.take()
                assert not (fresh and exchange is not None and not exchange.called), "two ways at once"
                arrived.extend(fresh)

        def pending() -> Deferred[HTTPResponse]:
            nonlocal exchange
            exchange = Deferred()
            return exchange

        world.http.default = None
        real = world.http.exchange

        def observed(*args: Any, **kwargs: Any) -> Deferred[HTTPResponse]:
            world.http.default = pending()
            arrived.append(kwargs["headers"]["Idempotency-Key"])
            return real(*args, **kwargs)

        world.http.exchange = observed  # type: ignore[method-assign]  # to see the moment of each exchange
        for step in steps:
            unanswered = exchange is not None and not exchange.called
            match step:
                case "put":
                    accepted += 1
                    world.put(f"e{accepted:03}")
                case "up" if bench is None:
                    bench = world.link()
                case "down" if bench is not None:
                    look()
                    world.lose(bench)
                    bench = None
                case "ack" if bench is not None:
                    look()
                    self.receipt(world, bench, arrived, last_ping)
                case "nack" if bench is not None and v1 and arrived:
                    look()
                    bench.nack(arrived[-1], retry_after=2)
                    world.run()
                case "wait":
                    world.run(20)
                case "answer" | "fail" if unanswered:
                    assert exchange is not None
                    exchange.callback(answer(200 if step == "answer" else 503))
                    world.run()
            look()
        if exchange is not None and not exchange.called:
            exchange.callback(answer(503))
        if bench is None:
            bench = world.link()
        for _ in range(accepted + 5):
            world.run(100)
            look()
            self.receipt(world, bench, arrived, last_ping)
        assert world.held() == 0
        expected = [f"e{n + 1:03}" for n in range(accepted)]
        assert list(dict.fromkeys(arrived)) == expected, arrived

    def receipt(self, world: World, bench: LinkBench, arrived: list[str], pings: list[bytes]) -> None:
        """The backend has what came so far."""
        if world.v1:
            bench.ack(*dict.fromkeys(arrived))
        elif pings:
            bench.pong(pings[-1])
        world.run()
