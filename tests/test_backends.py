"""Which backend is used: failover, return by proof, rotation, one link at a time, start and stop in between."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import BreakerOpen
from tests.link_kit import House, pass_time

RETURN_AFTER = 300.0


class _BackendsTests(SynchronousTestCase):
    """Two backends, running."""

    names: tuple[str, ...] = ("one", "two")

    def setUp(self) -> None:
        self.build(*self.names)
        self.backends.start()
        self.house.take()

    def build(self, *names: str, **sections: Any) -> None:
        sections.setdefault("breaker", config.Breaker(failures=3, open_for=10.0))
        sections.setdefault("reconnect", config.Reconnect(return_after=RETURN_AFTER))
        self.house = House(*names, **sections)
        self.clock = self.house.clock
        self.backends = self.house.backends
        self.links = self.house.links
        self.lines = {line.name: line for line in self.house.lines}

    def answer(self, expected: str, *, works: bool = True, proof: bool = True) -> None:
        """The next request goes to this backend, and is answered."""
        line = self.backends.for_request()
        self.assertEqual(line.name, expected)
        self.backends.answered(line, works=works, receipt_at=7.0 if works and proof else None)

    def stop(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.backends.stop(5.0))

    @property
    def active(self) -> str:
        return self.backends.active.name


class StartTests(_BackendsTests):
    """Before anything goes wrong."""

    def test_first(self) -> None:
        """The first backend of the list is used, by the link and by requests."""
        self.build("one", "two")
        self.backends.start()
        self.assertEqual((self.active, self.house.take()), ("one", ["start one afresh"]))
        self.answer("one")

    def test_before_the_start(self) -> None:
        """A link that fails while nothing runs moves nothing."""
        self.build("one", "two")
        self.links["one"].fail(3)
        self.assertEqual((self.active, self.house.take()), ("one", []))

    def test_receipt(self) -> None:
        """A receipt is noted at its backend only, and shown."""
        self.backends.receipt("two", 7.0)
        self.assertEqual([line.last_receipt for line in self.house.lines], [0.0, 7.0])
        self.assertEqual(self.house.count("seconds_since_receipt", backend="two"), 0.0)

    def test_http_works(self) -> None:
        """The last exchange says whether HTTP works, whatever becomes of the WebSocket; a receipt is a 2xx."""
        line = self.lines["one"]
        self.answer("one", proof=False)
        self.assertEqual((line.http_works, line.last_receipt), (True, 0.0))
        self.links["one"].fail()
        self.assertTrue(line.http_works)
        self.answer("one")
        self.assertEqual((line.http_works, line.last_receipt), (True, 7.0))
        self.answer("one", works=False)
        self.assertFalse(line.http_works)

    def test_breaker_states_are_shown(self) -> None:
        """The metrics know each change of a breaker."""
        self.house.trip("two")
        self.assertEqual(self.house.count("breaker_state", backend="two"), 2)
        self.assertEqual(self.house.count("breaker_state", backend="one"), 0)


class HTTPTests(_BackendsTests):
    """Which backend the next request goes to."""

    def test_the_breaker_hears_of_every_exchange(self) -> None:
        """Failures in a row open it, and then the others take the requests; the link stays where it works."""
        for works in (False, False, True, False, False, False):
            self.answer("one", works=works)
        self.answer("two")
        self.assertEqual((self.active, self.house.take()), ("one", []))
        pass_time(self.clock, self.lines["one"].breaker.retry_in())
        self.answer("one")
        self.answer("one")

    def test_one_probe(self) -> None:
        """While a probe is out, other requests go to the next one."""
        self.house.trip("one")
        pass_time(self.clock, self.lines["one"].breaker.retry_in())
        self.assertEqual(self.backends.for_request().name, "one")
        self.assertEqual(self.backends.for_request().name, "two")

    def test_all_open(self) -> None:
        """When every backend is left alone the caller is told how long the shortest wait is."""
        self.house.trip("two")
        pass_time(self.clock, 3)
        self.house.trip("one")
        with self.assertRaises(BreakerOpen) as caught:
            self.backends.for_request()
        self.assertEqual(caught.exception.retry_in, self.lines["two"].breaker.retry_in())
        self.assertLess(caught.exception.retry_in, self.lines["one"].breaker.retry_in())

    def test_the_active_one_comes_first(self) -> None:
        """Requests follow the link to where it went."""
        self.links["one"].fail(3)
        self.answer("two")

    def test_nobody_is_asked_in_vain(self) -> None:
        """Who refuses the token comes last; and as soon as one takes the request the others are not asked."""
        asked: list[str] = []

        refusing: set[str] = set()

        def refuses(line: Any) -> bool:
            asked.append(line.name)
            return line.name in refusing

        for name, chosen, those in (
            ("", "one", ["one"]),
            ("one", "two", ["one", "two"]),
            ("two", "one", ["one", "two"]),
        ):
            refusing.add(name)
            asked.clear()
            self.assertEqual(self.backends.for_request(refuses).name, chosen)
            self.assertEqual(asked, those)

    def test_a_wall_of_failing_websockets_closes_no_way_for_http(self) -> None:
        """However often WebSockets fail, requests are not held back."""
        for _ in range(20):
            self.links[self.active].fail()
        self.answer(self.active)


class WithoutWebSocketTests(_BackendsTests):
    """``websocket.enabled = false``."""

    def setUp(self) -> None:
        self.build("one", "two", websocket=config.WebSocket(enabled=False))
        self.backends.start()

    def test_failover_and_return(self) -> None:
        """No link is ever touched; the one that answers counts as the active one; the first is preferred at once."""
        for _ in range(3):
            self.answer("one", works=False)
        self.assertEqual(self.active, "one")
        self.answer("two")
        self.assertEqual(self.active, "two")
        pass_time(self.clock, self.lines["one"].breaker.retry_in())
        self.answer("one", works=False)
        self.answer("two")
        pass_time(self.clock, self.lines["one"].breaker.retry_in())
        self.answer("one")
        self.assertEqual((self.active, self.house.take()), ("one", []))

    def test_stop(self) -> None:
        """A stop works all the same."""
        self.successResultOf(self.stop())
        self.assertEqual([http.closed for http in self.house.http.values()], [1, 1])


class AwayTests(_BackendsTests):
    """From a backend whose WebSocket fails to another one."""

    def test_after_breaker_failures(self) -> None:
        """The link moves after as many failures as it takes, though HTTP works there; the old one is gone first."""
        goodbye = self.links["one"].goodbye = Deferred()
        for _ in range(2):
            self.links["one"].fail()
            self.answer("one")
        self.assertEqual((self.active, self.house.take()), ("one", []))
        self.links["one"].fail()
        self.assertEqual((self.active, self.house.take()), ("two", ["stop one"]))
        goodbye.callback(0)
        self.assertEqual(self.house.take(), ["gone one", "start two"])

    def test_a_lesser_one_fails(self) -> None:
        """What a link that is being left still reports moves nothing."""
        self.links["two"].fail(5)
        self.assertEqual((self.active, self.house.take()), ("one", []))

    def test_a_single_backend(self) -> None:
        """With nowhere to go the link stays, and keeps its own pace."""
        self.build("one")
        self.backends.start()
        self.house.take()
        self.links["one"].fail(20)
        self.answer("one")
        self.assertEqual((self.active, self.house.take()), ("one", []))


class BackTests(_BackendsTests):
    """Return by proof."""

    def setUp(self) -> None:
        super().setUp()
        self.links["one"].fail(3)
        self.house.take()

    def test_by_proof(self) -> None:
        """Not before return_after, nor by mere time: the next request goes there first, and its success moves."""
        pass_time(self.clock, RETURN_AFTER - 1)
        self.answer("two")
        pass_time(self.clock, 1)
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.assertEqual(self.backends.for_request().name, "one")
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.backends.answered(self.lines["one"], works=True, receipt_at=7.0)
        self.assertEqual((self.active, self.house.take()), ("one", ["stop two", "gone two", "start one afresh"]))

    def test_no_proof(self) -> None:
        """An answer that is no 2xx, or none, moves nothing; a breaker that opened is respected."""
        pass_time(self.clock, RETURN_AFTER)
        self.answer("one", proof=False)
        for _ in range(3):
            self.answer("one", works=False)
        self.answer("two")
        self.assertEqual((self.active, self.house.take()), ("two", []))

    def test_a_late_answer(self) -> None:
        """What was sent before the move and is answered after it is no proof, so soon."""
        self.backends.answered(self.lines["one"], works=True, receipt_at=7.0)
        self.assertEqual((self.active, self.house.take()), ("two", []))

    def test_fails_again(self) -> None:
        """A backend that was returned to and fails again has to wait as long again."""
        pass_time(self.clock, RETURN_AFTER)
        self.answer("one")
        self.links["one"].fail(3)
        self.assertEqual(self.active, "two")
        pass_time(self.clock, RETURN_AFTER - 1)
        self.answer("two")
        pass_time(self.clock, 1)
        self.answer("one")

    def test_a_clock_that_steps_back(self) -> None:
        """The return is not put off by as much as the clock stepped back."""
        self.clock.rightNow -= 100_000
        self.answer("one")
        self.assertEqual(self.active, "one")

    def test_at_once(self) -> None:
        """return_after = 0: the next success is enough."""
        self.build("one", "two", reconnect=config.Reconnect(return_after=0))
        self.backends.start()
        self.links["one"].fail(3)
        self.answer("one")
        self.assertEqual(self.active, "one")


class NoneWorksTests(_BackendsTests):
    """All WebSockets fail."""

    names = ("one", "two", "three")

    def test_round_and_round(self) -> None:
        """Each in its turn; then, each failure counting, the one that was left longest ago, and its backoff goes on."""
        visited = [self.active]
        for _ in range(8):
            pass_time(self.clock, 5)
            self.links[self.active].fail(3 if self.links[self.active].failures == 0 else 1)
            visited.append(self.active)
        self.assertEqual(visited, ["one", "two", "three"] * 3)
        self.assertNotIn("afresh", " ".join(self.house.take()))

    def test_the_first_that_may(self) -> None:
        """One that was left long enough ago is taken before one that was left longest ago, in the list's order."""
        for name in ("one", "two", "three", "one"):
            self.assertEqual(self.active, name)
            pass_time(self.clock, 1)
            self.links[name].fail(3)
        self.assertEqual(self.active, "two")
        pass_time(self.clock, RETURN_AFTER)
        self.links["two"].fail()
        self.assertEqual(self.active, "one")

    def test_any_that_answers(self) -> None:
        """While the active one fails, whoever answers over HTTP is turned to at once, and its link begins afresh."""
        for name in ("one", "two", "three"):
            self.links[name].fail(3)
        self.assertEqual(self.active, "one")
        self.house.take()
        self.answer("one")
        self.assertEqual(self.active, "one")
        self.house.trip("one")
        self.answer("two", proof=False)
        self.assertEqual((self.active, self.house.take()), ("one", []))
        self.answer("two")
        self.assertEqual((self.active, self.house.take()), ("two", ["stop one", "gone one", "start two afresh"]))
        self.answer("two")
        self.assertEqual(self.house.take(), [])

    def test_afresh_now_and_then(self) -> None:
        """Where HTTP works and WebSockets do not, each answer moves the link, but the backoff begins anew seldom."""
        for name in ("one", "two", "three"):
            self.links[name].fail(3)
        for expected in ("start two afresh", "start two", "start two", "start two afresh"):
            self.backends.answered(self.lines["two"], works=True, receipt_at=1.0)
            self.assertEqual(self.house.take()[-1], expected)
            pass_time(self.clock, RETURN_AFTER / 3)
            self.links["two"].fail(3)
            self.assertEqual(self.active, "one")

    def test_one_failure_is_not_yet_not_working(self) -> None:
        """A lesser one that answers moves nothing while the active one has failed now and then only."""
        self.links["one"].fail(2)
        self.house.trip("one")
        self.answer("two")
        self.assertEqual((self.active, self.house.take()), ("one", []))


class DuringAMoveTests(_BackendsTests):
    """What happens while a goodbye takes its time."""

    def setUp(self) -> None:
        super().setUp()
        self.goodbye = self.links["one"].goodbye = Deferred()
        self.links["one"].fail(3)
        self.house.take()

    def test_one_move_at_a_time(self) -> None:
        """Whatever fails or answers meanwhile, no second move begins; later it does."""
        self.links["two"].fail(3)
        self.clock.advance(RETURN_AFTER)
        self.answer("one")
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.goodbye.callback(0)
        self.assertEqual((self.active, self.house.take()), ("two", ["gone one", "start two"]))
        self.links["one"].goodbye = None
        self.answer("one")
        self.assertEqual((self.active, self.house.take()), ("one", ["stop two", "gone two", "start one afresh"]))

    def test_failing_within_the_start(self) -> None:
        """A link that fails while it starts begins the next move, after the present one."""
        self.links["two"].on_start = lambda: self.links["two"].fail(3)
        self.links["two"].goodbye = later = Deferred()
        self.links["one"].goodbye = None
        self.goodbye.callback(0)
        self.assertEqual(self.house.take(), ["gone one", "start two", "stop two"])
        later.callback(0)
        self.assertEqual((self.active, self.house.take()), ("one", ["gone two", "start one"]))

    def test_stop(self) -> None:
        """A stop during a move starts nothing afterwards, and waits for the same goodbye."""
        # The same goodbye ends both waits, as the real link's does.
        second: Deferred[int] = Deferred()
        self.links["one"].goodbye = second
        stopping = self.stop()
        self.assertNoResult(stopping)
        self.goodbye.callback(0)
        second.callback(3)
        self.successResultOf(stopping)
        log = self.house.take()
        self.assertEqual([line for line in log if line.startswith("start")], [])
        self.assertEqual([http.closed for http in self.house.http.values()], [1, 1])

    def test_stop_and_start(self) -> None:
        """Started again after that, the link goes to the backend that is active."""
        self.links["one"].goodbye = None
        self.successResultOf(self.stop())
        self.goodbye.callback(0)
        self.house.take()
        self.backends.start()
        self.assertEqual(self.house.take(), ["start two afresh"])

    def test_start_before_the_goodbye_is_over(self) -> None:
        """Started again during the goodbye, the link is started by its end, and once."""
        self.links["one"].goodbye = None
        self.successResultOf(self.stop())
        self.house.take()
        self.backends.start()
        self.goodbye.callback(0)
        self.assertEqual(self.house.take(), ["gone one", "start two"])

    def test_a_goodbye_that_fails(self) -> None:
        """A defect in the goodbye is logged, and the new link starts all the same: an agent must not be left alone."""
        self.goodbye.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((self.active, self.house.take()), ("two", ["start two"]))
        self.links["one"].goodbye = None
        self.links["two"].fail(3)
        self.assertEqual((self.active, self.house.take()), ("one", ["stop two", "gone two", "start one"]))


class StopTests(_BackendsTests):
    """The end."""

    def test_stop(self) -> None:
        """Every link is stopped and every connection closed."""
        self.successResultOf(self.stop())
        self.assertEqual(self.house.take(), ["stop one", "gone one", "stop two", "gone two"])
        self.assertEqual([http.closed for http in self.house.http.values()], [1, 1])

    def test_one_deadline(self) -> None:
        """The goodbyes share the deadline; the last one gets some time in any case."""
        deadlines: list[float] = []

        def stop(name: str) -> Any:
            async def stopping(deadline: float) -> int:
                deadlines.append(deadline)
                self.clock.advance(10)
                return 0

            return stopping

        for name, link in self.links.items():
            self.patch(link, "stop", stop(name))
        self.successResultOf(self.stop())
        self.assertEqual(deadlines, [5.0, 0.1])

    def test_afterwards(self) -> None:
        """What fails or answers after the stop moves nothing."""
        self.successResultOf(self.stop())
        self.house.take()
        self.links["one"].fail(3)
        self.backends.answered(self.lines["two"], works=True, receipt_at=1.0)
        self.assertEqual((self.active, self.house.take()), ("one", []))
