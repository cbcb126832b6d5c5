"""Which backend is used: failover, failback by proof, one link at a time, start and stop in between."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import BreakerOpen
from tests.link_kit import House, pass_time


class _BackendsTests(SynchronousTestCase):
    """Two backends, running."""

    def setUp(self) -> None:
        self.build("one", "two")
        self.backends.start()
        self.house.take()

    def build(self, *names: str, **parameters: Any) -> None:
        parameters.setdefault("breaker", config.Breaker(failures=2, open_for=10.0))
        self.house = House(*names, **parameters)
        self.backends = self.house.backends
        self.links = self.house.links
        self.breakers = {line.name: line.breaker for line in self.house.lines}

    def probe(self, name: str) -> None:
        """Let the time of an open breaker pass, and the next request take its permit."""
        pass_time(self.house.clock, self.breakers[name].retry_in())
        self.assertEqual(self.backends.for_request().name, name)

    @property
    def active(self) -> str:
        return self.backends.active.name


class StartTests(_BackendsTests):
    """Before anything goes wrong."""

    def test_first(self) -> None:
        """The first backend of the list is used, by the link and by requests."""
        self.build("one", "two")
        self.backends.start()
        self.assertEqual((self.active, self.house.take()), ("one", ["start one"]))
        self.assertEqual(self.backends.for_request().name, "one")

    def test_without_websocket(self) -> None:
        """Without WebSockets no link is started or moved; requests fail over all the same."""
        self.build("one", "two", with_links=False)
        self.backends.start()
        self.house.trip("one")
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.assertEqual(self.backends.for_request().name, "two")

    def test_before_the_start(self) -> None:
        """A breaker that opens while nothing runs moves nothing."""
        self.build("one", "two")
        self.house.trip("one")
        self.assertEqual((self.active, self.house.take()), ("one", []))

    def test_receipt(self) -> None:
        """A receipt is noted at its backend only."""
        self.backends.receipt("two", 7.0)
        self.assertEqual(
            [(line.last_receipt, line.reachable) for line in self.house.lines], [(0.0, False), (7.0, True)]
        )

    def test_breaker_states_are_shown(self) -> None:
        """The metrics know each change of a breaker."""
        self.house.trip("two")
        self.assertEqual(self.house.count("breaker_state", backend="two"), 2)
        self.breakers["one"].failed()
        self.assertEqual(self.house.count("breaker_state", backend="one"), 0)


class FailoverTests(_BackendsTests):
    """There and back."""

    def test_failover(self) -> None:
        """When the breaker opens, the link moves: the old one has said goodbye before the new one starts."""
        goodbye = self.links["one"].goodbye = Deferred()
        self.house.trip("one")
        self.assertEqual((self.active, self.house.take()), ("two", ["stop one"]))
        goodbye.callback(0)
        self.assertEqual(self.house.take(), ["gone one", "start two"])

    def test_failback_by_proof(self) -> None:
        """The link comes back when a request's probe has succeeded, not when the time is merely over."""
        self.house.trip("one")
        self.house.take()
        pass_time(self.house.clock, 100)
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.probe("one")
        self.assertEqual((self.active, self.house.take()), ("two", []))
        self.breakers["one"].succeeded()
        self.assertEqual((self.active, self.house.take()), ("one", ["stop two", "gone two", "start one"]))

    def test_failed_probe(self) -> None:
        """A probe that fails, or says nothing, moves nothing."""
        self.house.trip("one")
        self.house.take()
        for report in ("failed", "released"):
            self.probe("one")
            getattr(self.breakers["one"], report)()
            self.assertEqual((self.active, self.house.take()), ("two", []))

    def test_one_probe(self) -> None:
        """While the preferred one's probe is out, other requests go to the one in use."""
        self.house.trip("one")
        self.probe("one")
        self.assertEqual(self.backends.for_request().name, "two")

    def test_a_lesser_one_fails(self) -> None:
        """What happens to a backend that is not in use moves nothing."""
        self.house.trip("two")
        self.assertEqual((self.active, self.house.take()), ("one", []))

    def test_all_down(self) -> None:
        """When none works nothing moves; requests are told how long the shortest wait is."""
        self.house.trip("two")
        pass_time(self.house.clock, 3)
        self.house.trip("one")
        self.assertEqual((self.active, self.house.take()), ("one", []))
        with self.assertRaises(BreakerOpen) as caught:
            self.backends.for_request()
        self.assertEqual(caught.exception.retry_in, self.breakers["two"].retry_in())
        self.assertLess(caught.exception.retry_in, self.breakers["one"].retry_in())

    def test_permit_free(self) -> None:
        """The link in use hears when its breaker closes, and only the one in use."""
        self.house.trip("two")
        pass_time(self.house.clock, 3)
        self.house.trip("one")
        self.probe("two")
        self.house.take()
        self.breakers["two"].succeeded()
        self.assertEqual(self.house.take(), ["stop one", "gone one", "start two"])

    def test_permit_of_the_only_one(self) -> None:
        """With a single backend nothing ever moves, and its link hears when the breaker closes."""
        self.build("one")
        self.backends.start()
        self.house.trip("one")
        self.probe("one")
        self.house.take()
        self.breakers["one"].succeeded()
        self.assertEqual(self.house.take(), ["free one"])


class DuringAMoveTests(_BackendsTests):
    """What happens while a goodbye takes its time."""

    def setUp(self) -> None:
        super().setUp()
        self.goodbye = self.links["one"].goodbye = Deferred()
        self.house.trip("one")
        self.house.take()

    def test_the_new_one_fails(self) -> None:
        """When the goal of the move fails meanwhile, and none works, the link waits there; no second move begins."""
        self.house.trip("two")
        self.assertEqual(self.house.take(), [])
        self.goodbye.callback(0)
        self.assertEqual((self.active, self.house.take()), ("two", ["gone one", "start two"]))

    def test_the_old_one_recovers(self) -> None:
        """When the old one has recovered meanwhile, the link goes back, in order and never with two at once."""
        self.probe("one")
        self.breakers["one"].succeeded()
        self.assertEqual(self.house.take(), [])
        self.links["one"].goodbye = None
        self.goodbye.callback(0)
        self.assertEqual(self.active, "one")
        self.assert_never_two(self.house.take())

    def assert_never_two(self, log: list[str]) -> None:
        """Between the start of a link and the next start of another one it is gone."""
        up: set[str] = set()
        for line in log:
            what, name = line.split()
            if what == "gone":
                up.discard(name)
            elif what == "start":
                self.assertEqual(up, set(), log)
                up.add(name)
        self.assertEqual(up, {self.active}, log)

    def test_changes_within_the_start(self) -> None:
        """A breaker that changes while the new link starts begins one further move at most."""
        self.links["two"].on_start = lambda: self.house.trip("two")
        self.links["two"].goodbye = later = Deferred()
        self.probe("one")
        self.breakers["one"].succeeded()
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
        stopping = Deferred.fromCoroutine(self.backends.stop(5.0))
        self.assertNoResult(stopping)
        self.goodbye.callback(0)
        second.callback(3)
        self.assertEqual(self.successResultOf(stopping), 3)
        log = self.house.take()
        self.assertEqual([line for line in log if line.startswith("start")], [])
        self.assertEqual([http.closed for http in self.house.http.values()], [1, 1])

    def test_stop_and_start(self) -> None:
        """Started again after that, the link goes to the backend that is active."""
        self.links["one"].goodbye = None
        self.successResultOf(Deferred.fromCoroutine(self.backends.stop(5.0)))
        self.goodbye.callback(0)
        self.house.take()
        self.backends.start()
        self.assertEqual(self.house.take(), ["start two"])

    def test_a_goodbye_that_fails(self) -> None:
        """A defect in the goodbye is logged, and the new link starts all the same: an agent must not be left alone."""
        self.goodbye.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((self.active, self.house.take()), ("two", ["start two"]))
        self.probe("one")
        self.links["one"].goodbye = None
        self.breakers["one"].succeeded()
        self.assertEqual(self.house.take(), ["stop two", "gone two", "start one"])


class StopTests(_BackendsTests):
    """The end."""

    def test_stop(self) -> None:
        """Every link is stopped and every connection closed; what had no receipt is added up."""
        for name, left in (("one", 2), ("two", 3)):
            self.links[name].goodbye = Deferred()
            self.links[name].goodbye.callback(left)
        self.assertEqual(self.successResultOf(Deferred.fromCoroutine(self.backends.stop(5.0))), 5)
        self.assertEqual(self.house.take(), ["stop one", "gone one", "stop two", "gone two"])
        self.assertEqual([http.closed for http in self.house.http.values()], [1, 1])

    def test_breakers_afterwards(self) -> None:
        """A breaker that changes after the stop moves nothing."""
        self.successResultOf(Deferred.fromCoroutine(self.backends.stop(5.0)))
        self.house.take()
        self.house.trip("one")
        self.assertEqual(self.house.take(), [])
