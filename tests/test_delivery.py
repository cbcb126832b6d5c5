"""The outbox on its way to the backend, on a virtual clock: both transports, a real spool in memory, every refusal."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.delivery import RESTART, SHORTEST_PAUSE, Delivery
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
            redact=lambda text: text.replace("hunter2", "***"),
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
            losses_acked=lambda told: None,
            losses_refused=lambda refusal: None,
        )
        self.house.backends.receipt("one", self.clock.seconds())
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

    def link(self, backend: str = "one") -> LinkBench:
        """A link registers."""
        bench = LinkBench(
            self.clock,
            v1=self.v1,
            settings=self.house.config.websocket,
            metrics=self.house.metrics,
            events=self.events,
            backend=backend,
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
        self.assertEqual(world.dead(), [("a", "refused: busy no")])
        world.ack(bench, "b", "c")
        self.assertEqual((world.held(), bench.connection.results()), (0, ["a", "b", "c"]))
        self.assertEqual(world.outbox.stats.dropped, {"refused": 1})

    def test_secret_in_a_refusal(self) -> None:
        """What is kept of a backend's words with a dead letter has no secret, and is one line."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.nack("a", message="no\nhunter2")
        self.assertEqual(world.dead(), [("a", "refused: busy no\\n***")])

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
        """A time of 0, or hardly more, is a short pause: a busy backend must not be asked without end."""
        for retry_after in (0, SHORTEST_PAUSE / 2):
            world = self.world()
            bench = world.link()
            world.put("a", "b")
            bench.nack("a", retry_after=retry_after)
            world.run(SHORTEST_PAUSE - 0.1)
            self.assertEqual(bench.connection.results(), ["a", "b"])
            world.run(0.2)
            self.assertEqual(bench.connection.results(), ["a", "b", "a"])

    def test_the_longest_pause_counts(self) -> None:
        """Of several times that the backend asks for, the longest one holds."""
        world = self.world()
        bench = world.link()
        world.put("a", "b", "c")
        for each, retry_after in (("a", 5), ("b", 20), ("c", 1)):
            bench.nack(each, retry_after=retry_after)
        world.run(19.9)
        self.assertEqual(bench.connection.results(), ["a", "b", "c"])
        world.run(0.2)
        self.assertEqual(bench.connection.results(), ["a", "b", "c"] * 2)

    def test_busy_for_an_hour(self) -> None:
        """A window of 1000, all of it put off again and again for an hour: nothing is buried, and little is read."""
        world = self.world()
        bench = world.link()
        ids = [f"e{n:04}" for n in range(1000)]
        world.put(*ids)
        fetches: list[int] = []
        reader = world.outbox.reader(Lane.EVENT)
        real = reader._fetch

        def fetch(lane: Lane, after: int, generation: int) -> None:
            fetches.append(after)
            real(lane, after, generation)

        self.patch(reader, "_fetch", fetch)
        rounds = 0
        began = world.clock.seconds()
        while world.clock.seconds() < began + 3600:
            sent = bench.connection.results()
            bench.connection.take()
            if sent:
                rounds += 1
                self.assertEqual(sent, ids)
                # At first it does not say for how long, which would be 7200 rounds an hour and take a minute here.
                pause = 0 if rounds <= 20 else 90
                for each in sent:
                    bench.nack(each, retry_after=pause)
            world.run(SHORTEST_PAUSE if rounds <= 20 else 30)
        self.assertTrue(55 <= rounds <= 70, rounds)
        self.assertLessEqual(len(fetches), 3 * rounds)
        self.assertEqual((world.dead(), world.held()), ([], 1000))
        self.assertEqual(
            world.house.count("messages_total", kind="command_result", direction="out", outcome="deferred"),
            1000 * rounds,
        )
        world.run(90)
        self.assertEqual(bench.connection.results(), ids)
        world.ack(bench, *ids)
        self.assertEqual((world.dead(), world.held()), ([], 0))

    def test_one_is_put_off_for_ever(self) -> None:
        """An entry that is put off as often as it comes stays, and the others go by."""
        world = self.world()
        bench = world.link()
        world.put("a")
        for number in range(200):
            bench.nack("a", retry_after=1)
            world.put(f"b{number:03}")
            world.run(1.1)
            world.ack(bench, f"b{number:03}")
        self.assertEqual((world.dead(), world.held(), bench.connection.results().count("a")), ([], 1, 201))

    def test_the_pause_is_the_backend_s(self) -> None:
        """A new link to the same backend does not end the pause; one to another backend does."""
        for backend, at_once, later in (("one", [], ["a"]), ("two", ["a"], ["a"])):
            world = self.world()
            bench = world.link()
            world.put("a")
            bench.nack("a", retry_after=90)
            world.run()
            world.lose(bench)
            bench = world.link(backend)
            self.assertEqual(bench.connection.results(), at_once)
            world.run(90)
            self.assertEqual(bench.connection.results(), later)

    def test_the_pause_holds_over_http(self) -> None:
        """While the backend wants to be left alone nothing goes over HTTP either."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.nack("a", retry_after=90)
        world.lose(bench)
        world.run(89)
        self.assertEqual(world.posted(), [])
        world.run(2)
        self.assertEqual(world.posted(), ["a"])

    def test_refused_while_put_back(self) -> None:
        """An entry that is refused for good is not sent again although the lane was just rewound."""
        world = self.world()
        bench = world.link()
        world.put("a", "b", "c")
        bench.nack("a", retry_after=0)
        bench.nack("b")
        world.run(1)
        self.assertEqual(bench.connection.results(), ["a", "b", "c", "a"])
        self.assertEqual(world.dead(), [("b", "refused: busy no")])

    def test_long_words(self) -> None:
        """What the backend says at length is cut."""
        world = self.world()
        bench = world.link()
        world.put("a")
        bench.nack("a", message="m" * 1000)
        ((_, reason),) = world.dead()
        self.assertEqual(reason, ("refused: busy " + "m" * 1000)[:200])

    def test_warnings_are_few(self) -> None:
        """Of many refusals at once few are logged; the next one logged tells how many there were."""
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        world = self.world()
        bench = world.link()
        ids = [f"e{n:03}" for n in range(300)]
        world.put(*ids)
        for each in ids:
            bench.nack(each, message=f"no {each}")
        logged = [event for event in events if event.get("event") == "delivery.refused"]
        self.assertEqual([event["message_id"] for event in logged], ["e000"])
        self.assertEqual(len(world.dead()), 100)

    def test_never_now(self) -> None:
        """A backend that puts everything off, and at once asks for it again, is told of, and not with every round."""
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        world = self.world()
        bench = world.link()
        world.put("a")
        for _ in range(30):
            bench.nack("a", retry_after=0)
            world.run(SHORTEST_PAUSE)
        self.assertGreater(len(bench.connection.results()), 20)
        logged = [event for event in events if event.get("event") == "delivery.deferred"]
        self.assertEqual([(event["message_id"], event["backend"]) for event in logged], [("a", "one")] * 2)
        self.assertEqual((logged[0]["suppressed"], logged[0]["wait"]), (0, SHORTEST_PAUSE))
        self.assertGreater(logged[1]["suppressed"], 10)


class SameIdTests(_DeliveryTests):
    """One id under two numbers: a receipt could not tell the two apart, so they are never in flight together."""

    def test_behind_one_in_flight(self) -> None:
        """The second one waits for the first one's receipt, and goes then."""
        world = self.world()
        bench = world.link()
        world.put("a", "b")
        world.put("a")
        self.assertEqual(bench.connection.results(), ["a", "b"])
        world.ack(bench, "a", "b")
        self.assertEqual(bench.connection.results(), ["a", "b", "a"])
        world.ack(bench, "a")
        self.assertEqual(world.held(), 0)

    def test_taken_together(self) -> None:
        """Both waiting when the link comes: one goes, and all others; the second one follows."""
        for v1 in (True, False):
            world = self.world(v1=v1)
            world.put("a", "b", "a", "c")
            bench = world.link()
            self.assertEqual(bench.connection.results(), ["a", "b", "c"])
            if v1:
                world.ack(bench, "a", "b", "c")
            else:
                bench.pong()
                world.run()
            self.assertEqual(bench.connection.results(), ["a", "b", "c", "a"])
            if v1:
                world.ack(bench, "a")
            else:
                bench.pong()
                world.run()
            self.assertEqual(world.held(), 0)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_over_http(self) -> None:
        """One after the other, with the same key: the backend knows the second one as a repetition."""
        world = self.world()
        world.put("a", "a")
        world.run(FALLBACK)
        self.assertEqual((world.posted(), world.held()), (["a", "a"], 0))


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
        """Links that come and go without delivering do not put off the fallback, though an earlier one delivered."""
        world = self.world()
        bench = world.link()
        world.put("x")
        world.ack(bench, "x")
        world.lose(bench)
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
        """A 4xx that judges the entry makes a dead letter of it; the next one follows soon."""
        for status in (400, 404, 409, 410, 413, 414, 415, 422):
            world = self.fallen_back()
            world.http.script = [status, 200]
            world.put("a", "b")
            world.run(1)
            self.assertEqual((world.dead(), world.held()), ([("a", f"refused: HTTP {status}")], 0))
            self.assertEqual(world.posted(), ["a", "b"])
            self.assertEqual(world.outbox.stats.dropped, {"refused": 1})

    def test_kept(self) -> None:
        """What says nothing about the entry keeps it: it goes again, first, later, and never in a hot loop."""
        for outcome in (
            302,
            403,
            405,
            407,
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
            answer(404, {"content-type": "text/html"}, b"\n <!DOCTYPE html><title>not here</title>"),
            answer(404, {"content-type": "text/plain"}, b"<HTML>no such host</HTML>"),
            answer(400, {}, b"<?xml version='1.0'?><!DOCTYPE html>"),
        ):
            world = self.fallen_back("a", "b", outcome=outcome)
            world.run(60)
            self.assertEqual((set(world.posted()), world.held(), world.dead()), ({"a"}, 2, []), outcome)
            self.assertLess(len(world.posted()), 30, outcome)
            world.http.default = 200
            world.run(200)
            self.assertEqual(world.held(), 0, outcome)
            self.assertEqual(world.posted()[-2:], ["a", "b"])

    def test_a_proxy_for_an_hour(self) -> None:
        """A proxy or portal that answers everything costs time and nothing else."""
        page = {"content-type": "text/html"}
        for outcome in (answer(403, page, b"<html>"), answer(404, page, b"<html>"), 407, 302, answer(200, page)):
            world = self.fallen_back(*[f"e{n:03}" for n in range(100)], outcome=outcome)
            world.run(3600)
            self.assertEqual((world.dead(), world.held()), ([], 100), outcome)
            self.assertLess(len(world.http.calls), 1200)
            world.http.default = 200
            world.run(100)
            self.assertEqual((world.dead(), world.held()), ([], 0), outcome)

    def test_a_backend_that_refuses_everything(self) -> None:
        """Burials slow down to the pace of the backoff, so that somebody can step in; one that is taken ends that."""
        world = self.fallen_back(
            *[f"e{n:04}" for n in range(1000)],
            outcome=404,
            reconnect=config.Reconnect(base=1.0, cap=60.0),
        )
        world.run(60)
        self.assertTrue(3 <= world.outbox.stats.dead_letters <= 20, world.outbox.stats.dead_letters)
        before = world.outbox.stats.dead_letters
        world.run(3600)
        self.assertTrue(90 <= world.outbox.stats.dead_letters - before <= 160, world.outbox.stats.dead_letters)
        world.http.default = 200
        world.run(60)
        self.assertEqual(world.held(), 0)

    def test_an_unknown_kind(self) -> None:
        """What a newer version left in the spool is a dead letter, and lets the others by."""
        world = self.world()
        world.outbox.put(lane=Lane.EVENT, kind="unheard-of", id="x", body=b"{}")
        world.put("a")
        world.run(FALLBACK)
        self.assertEqual((world.dead(), world.posted()), ([("x", "unknown: no way for a unheard-of")], ["a"]))
        self.assertEqual(world.outbox.stats.dropped, {"unknown": 1})

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
        """A defect in a step is logged and does not end the lane: it goes on later, from its oldest entry."""
        world = self.world()
        world.put("a")
        bench = world.link()
        self.patch(bench.link, "send", lambda entries, timestamp: 1 / 0)
        world.put("b")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        del bench.link.send
        world.put("c")
        world.run(RESTART - 0.1)
        self.assertEqual(bench.connection.results(), ["a"])
        world.run(0.2)
        self.assertEqual(bench.connection.results(), ["a", "b", "c"])
        world.ack(bench, *"abc")
        self.assertEqual(world.held(), 0)

    def test_a_defect_in_one_lane(self) -> None:
        """The other lane does not notice; nor does a stop, which ends the wait."""
        world = self.world()
        broken = self.patch(world.http, "exchange", lambda *args, **kwargs: 1 / 0)
        world.put_state("i1")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        bench = world.link()
        world.put("a")
        self.assertEqual(bench.connection.results(), ["a"])
        broken.restore()
        world.run(RESTART + 0.1)
        self.assertEqual(world.outbox.stats.states, 0)
        self.patch(world.http, "exchange", lambda *args, **kwargs: 1 / 0)
        world.put_state("i2")
        world.stop()
        bench.link.ended()
        world.run()
        self.assertEqual(world.clock.getDelayedCalls(), [])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

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
