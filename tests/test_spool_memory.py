"""The spool's rules on a clock of our own: no thread, no file, the same code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.errors import AlreadyCompleted, InvalidMessage, NotRunning, QueueFull, SpoolError
from commsmgr.spool import RESULT_KIND, Accepted, Duplicate, Lane, Opened, Spool
from commsmgr.spool import books as books_module
from commsmgr.spool import inbox as inbox_module
from commsmgr.spool import reader as reader_module
from commsmgr.spool.executor import InlineExecutor
from commsmgr.spool.outbox_jobs import Ask
from commsmgr.spool.records import Entry, Page
from tests.command_kit import latest_event


class Gate(InlineExecutor):
    """As a thread does it, whose work is done before the reactor hears of it: while shut, nothing is told."""

    shut = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._untold: list[tuple[Deferred[Any], Any]] = []

    def __call__(self, work: Callable[[], Any], /) -> Deferred[Any]:
        return super().__call__(work).addBoth(self._pass)

    def open(self) -> None:
        self.shut = False
        untold, self._untold = self._untold, []
        for deferred, result in untold:
            deferred.callback(result)

    def _pass(self, result: Any) -> Any:
        if not self.shut:
            return result
        self._untold.append((Deferred(), result))
        return self._untold[-1][0]


class World:
    """A spool in memory, on a clock."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.gate = Gate(self.clock)
        self.spool = Spool(
            config.Spool(durability="memory", **options),
            reactor=self.clock,
            wall=self.clock.seconds,
            executor=self.gate,
        )
        self.outbox = self.spool.outbox
        self.inbox = self.spool.inbox
        self.events = self.outbox.reader(Lane.EVENT)
        self.states = self.outbox.reader(Lane.STATE)

    def open(self) -> Opened:
        return self.get(self.spool.open())

    def run(self) -> None:
        while self.clock.getDelayedCalls():
            self.clock.advance(0)

    def get(self, waiting: Deferred[Any]) -> Any:
        results: list[Any] = []
        waiting.addBoth(results.append)
        self.run()
        if hasattr(results[0], "raiseException"):
            results[0].raiseException()
        return results[0]

    def event(self, id: str, body: bytes = b"{}", **options: Any) -> Deferred[int]:
        return self.outbox.put(lane=Lane.EVENT, kind="note", id=id, body=body, **options)

    def state(self, key: str, id: str, body: bytes = b"{}", **options: Any) -> Deferred[int]:
        return self.outbox.put(lane=Lane.STATE, kind="inventory", id=id, body=body, key=key, **options)

    def taken(self, count: int = 100, size: int = 1 << 20) -> list[str]:
        return [entry.id for entry in self.events.take(count, size)]


class OutboxTests(SynchronousTestCase):
    """Submission, order, receipts, bounds."""

    def world(self, **options: Any) -> World:
        world = World(**options)
        world.open()
        return world

    def test_order_and_receipt(self) -> None:
        """Events come out in the order of acceptance, and a receipt removes what it names."""
        world = self.world()
        waiting = [world.event(f"e{n}") for n in range(5)]
        seqs = [world.get(each) for each in waiting]
        self.assertEqual(seqs, sorted(seqs))
        self.assertEqual(world.taken(), ["e0", "e1", "e2", "e3", "e4"])
        world.get(world.outbox.forget(seqs[1:3]))
        self.assertEqual((world.outbox.stats.events, world.outbox.stats.event_bytes), (3, 6))
        world.events.rewind()
        world.run()
        self.assertEqual(world.taken(), ["e0", "e3", "e4"])

    def test_nothing_is_told_before_the_commit(self) -> None:
        """Neither the submitter nor the reader hears of an event before the turn in which it is committed."""
        world = self.world()
        ready: list[int] = []
        world.events.on_ready = lambda: ready.append(1)
        waiting = world.event("a")
        self.assertNoResult(waiting)
        self.assertEqual((world.taken(), ready), ([], []))
        world.run()
        self.successResultOf(waiting)
        self.assertEqual((ready, world.taken()), ([1], ["a"]))

    def test_changes_are_announced_once_a_batch(self) -> None:
        """Listeners hear once of a hundred events that were committed together."""
        world = self.world()
        calls: list[str] = []
        world.outbox.on_change = lambda: calls.append("change")
        world.events.on_ready = lambda: calls.append("ready")
        for n in range(100):
            world.event(f"e{n}")
        world.run()
        self.assertEqual(sorted(calls), ["change", "ready"])

    def test_a_failing_listener_is_logged(self) -> None:
        """An exception in a listener stops neither the other listeners nor the Deferreds."""
        world = self.world()
        ready: list[int] = []
        world.outbox.on_change = lambda: 1 // 0
        world.events.on_ready = lambda: ready.append(1)
        world.get(world.event("a"))
        self.assertEqual(ready, [1])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_bound_by_count_includes_what_is_being_committed(self) -> None:
        """The event over the bound is refused at once, although nothing is committed yet."""
        world = self.world(max_events=2)
        first, second = world.event("a"), world.event("b")
        self.failureResultOf(world.event("c"), QueueFull)
        self.failureResultOf(
            world.inbox.complete(key=None, command_id="x", status="success", result_id="r", body=b""), QueueFull
        )
        world.run()
        seq = self.successResultOf(first)
        self.successResultOf(second)
        self.failureResultOf(world.event("d"), QueueFull)
        world.get(world.outbox.forget([seq]))
        world.get(world.event("e"))

    def test_bound_by_bytes(self) -> None:
        """Bytes of bodies are bounded, to the byte."""
        world = self.world(max_bytes=1024)
        world.get(world.event("a", b"x" * 1000))
        self.failureResultOf(world.event("b", b"x" * 25), QueueFull)
        world.get(world.event("c", b"x" * 24))
        self.assertEqual(world.outbox.stats.event_bytes, 1024)

    def test_states_do_not_count_as_events(self) -> None:
        """A full event lane takes state, of a bounded number of keys."""
        world = self.world(max_events=1)
        world.get(world.event("a"))
        self.patch(books_module, "MAX_STATES", 1)
        world.get(world.state("inventory", "s1"))
        self.assertRaises(QueueFull, world.get, world.state("other", "s2"))
        world.get(world.state("inventory", "s3"))
        self.assertEqual((world.outbox.stats.events, world.outbox.stats.states), (1, 1))

    def test_newer_state_replaces_unsent(self) -> None:
        """Only the latest state of a key is handed out."""
        world = self.world()
        world.get(world.state("a", "a1"))
        world.get(world.state("b", "b1"))
        world.get(world.state("a", "a2"))
        self.assertEqual([entry.id for entry in world.states.take(10, 1000)], ["b1", "a2"])

    def test_receipt_of_replaced_state_spares_the_newer(self) -> None:
        """A state that was in flight when a newer one came does not take that one with it."""
        world = self.world()
        old = world.get(world.state("a", "a1"))
        self.assertEqual([entry.seq for entry in world.states.take(10, 1000)], [old])
        world.get(world.state("a", "a2"))
        world.get(world.outbox.forget([old]))
        self.assertEqual([entry.id for entry in world.states.take(10, 1000)], ["a2"])
        self.assertEqual(world.outbox.stats.states, 1)

    def test_key_and_lane_must_fit(self) -> None:
        """A state without a key and an event with one are mistakes of the caller."""
        world = self.world()
        self.failureResultOf(world.event("a", key="k"), InvalidMessage)
        self.failureResultOf(world.state("", "a"), InvalidMessage)

    def test_poison_fails_alone(self) -> None:
        """What SQLite cannot store fails with a typed error; its neighbours in the batch are accepted."""
        world = self.world()
        first, bad, last = world.event("a"), world.event("\ud800"), world.event("b")
        world.run()
        self.successResultOf(first)
        self.failureResultOf(bad, SpoolError)
        self.successResultOf(last)
        self.assertEqual(world.taken(), ["a", "b"])
        self.assertEqual(world.outbox.stats.events, 2)

    def test_not_running(self) -> None:
        """Before open() and after close() everything is refused, and reserves nothing."""
        world = World(max_events=1)
        self.failureResultOf(world.event("a"), NotRunning)
        world.open()
        last = world.event("b")
        world.get(world.spool.close())
        self.successResultOf(last)
        self.failureResultOf(world.outbox.forget([1]), NotRunning)
        self.assertEqual(world.taken(), [])
        world.events.rewind()
        world.get(world.spool.close())
        self.assertEqual(world.clock.getDelayedCalls(), [])

    def test_cancelled_submission_is_still_accepted(self) -> None:
        """Cancelling stops the waiting, not the submission."""
        world = self.world()
        waiting = world.event("a")
        waiting.addErrback(lambda failure: None)
        waiting.cancel()
        world.run()
        self.assertEqual(world.taken(), ["a"])

    def test_expiry(self) -> None:
        """What is over its time becomes a dead letter, by its own limit and by the operator's, and is counted."""
        world = self.world(max_age=100)
        world.get(world.event("ttl", ttl=5))
        world.get(world.event("plain"))
        world.get(world.state("k", "state", ttl=5))
        self.assertEqual(world.get(world.outbox.expire()), 0)
        world.clock.advance(5)
        self.assertEqual(world.get(world.outbox.expire()), 2)
        world.clock.advance(95)
        world.get(world.event("young"))
        self.assertEqual(world.get(world.outbox.expire()), 1)
        self.assertEqual(world.outbox.stats.dropped, {"expired": 2, "over-age": 1})
        letters = world.get(world.outbox.dead_letters(10))
        self.assertEqual((letters[0].id, letters[0].reason), ("plain", "over-age"))
        self.assertEqual((world.taken(), world.states.take(9, 9)), (["young"], []))
        self.assertEqual(world.outbox.stats.states, 0)

    def test_expiry_of_damaged_rows(self) -> None:
        """A time that is none is damage, and stops nobody behind it; a kind that is no text does neither."""
        world = self.world(max_age=100)
        for n in range(5):
            world.get(world.event(f"e{n}"))
        books = world.spool._store._writer._books
        assert books is not None
        for column, wrong, seq in (("accepted_at", b"\xff", 2), ("accepted_at", b"x", 3), ("kind", b"\xff", 4)):
            books.flush().execute(f"UPDATE entry SET {column} = CAST(? AS TEXT) WHERE seq = ?", (wrong, seq))
        world.clock.advance(100)
        world.get(world.event("young"))
        self.assertEqual(world.get(world.outbox.expire()), 5)
        self.assertEqual(world.outbox.stats.dropped, {"over-age": 3, "damaged": 2})
        self.assertEqual((world.taken(), world.get(world.outbox.expire())), (["young"], 0))

    def test_expiry_in_slices(self) -> None:
        """More than a slice is expired by one call."""
        world = self.world(max_age=10)
        for n in range(1100):
            world.event(f"e{n}", ttl=1 if n % 2 else None)
        world.run()
        world.clock.advance(20)
        self.assertEqual(world.get(world.outbox.expire()), 1100)

    def test_expiry_spares_what_is_in_flight(self) -> None:
        """An event whose receipt may be on its way is not given up; after a rewind it is."""
        world = self.world(max_age=10)
        world.get(world.event("a", ttl=1))
        world.get(world.event("b"))
        world.taken()
        world.clock.advance(20)
        self.assertEqual(world.get(world.outbox.expire()), 0)
        world.events.rewind()
        world.run()
        self.assertEqual(world.get(world.outbox.expire()), 2)

    def test_dead_letters_are_bounded(self) -> None:
        """The oldest dead letters give way by count and by bytes, and the count of losses goes on."""
        world = self.world(max_dead_letters=2, max_bytes=4096)
        for n in range(4):
            world.get(world.outbox.bury(world.get(world.event(f"e{n}")), f"rejected: text {n}"))
        letters = world.get(world.outbox.dead_letters(10))
        self.assertEqual([letter.id for letter in letters], ["e3", "e2"])
        self.assertEqual(letters[0].reason, "rejected: text 3")
        self.assertEqual(world.outbox.stats.dropped, {"rejected": 4})
        world.get(world.outbox.bury(world.get(world.event("big", b"x" * 1024)), "rejected"))
        self.assertEqual([letter.id for letter in world.get(world.outbox.dead_letters(10))], ["big"])
        world.get(world.outbox.bury(world.get(world.event("bigger", b"x" * 1025)), "rejected"))
        self.assertEqual([letter.id for letter in world.get(world.outbox.dead_letters(10))], ["big"])
        world.get(world.outbox.bury(12345, "unknown"))
        self.assertEqual(world.outbox.stats.dropped, {"rejected": 6})

    def test_oldest_event(self) -> None:
        """The age of the oldest event is always known."""
        world = self.world()
        self.assertIsNone(world.outbox.stats.oldest_event_at)
        seq = world.get(world.event("a"))
        world.clock.advance(7)
        world.get(world.event("b"))
        self.assertEqual(world.outbox.stats.oldest_event_at, 1000.0)
        world.get(world.outbox.forget([seq]))
        self.assertEqual(world.outbox.stats.oldest_event_at, 1007.0)
        world.get(world.outbox.forget([seq + 1]))
        self.assertIsNone(world.outbox.stats.oldest_event_at)
        world.clock.advance(1)
        later = [world.event(name) for name in "cd"]
        self.assertEqual((world.get(later[1]), world.outbox.stats.oldest_event_at), (seq + 3, 1008.0))
        world.get(world.outbox.bury(seq + 2, "rejected"))
        self.assertEqual(world.outbox.stats.oldest_event_at, 1008.0)

    def test_one_batch_sees_itself(self) -> None:
        """Whatever a job reads or removes includes what the jobs before it in the batch have added, however many."""
        for count in (1, 9, 10, 11, 25):
            world = self.world()
            added = [world.event(f"e{n}", b"xy") for n in range(count)]
            if count % 2:
                buried = world.outbox.bury(count, "rejected")
                forgotten = world.outbox.forget(range(1, count))
            else:
                forgotten = world.outbox.forget(range(1, count))
                buried = world.outbox.bury(count, "rejected")
            last = world.event("last", b"xyz")
            world.run()
            self.assertEqual([world.get(each) for each in added], list(range(1, count + 1)))
            self.assertEqual([world.get(each) for each in (buried, forgotten, last)], [None, None, count + 1])
            world.events.rewind()
            world.run()
            self.assertEqual([entry.id for entry in world.events.take(100, 1000)], ["last"])
            stats = world.outbox.stats
            self.assertEqual((stats.events, stats.event_bytes, stats.dead_letters), (1, 3, 1))
            self.assertEqual([letter.id for letter in world.get(world.outbox.dead_letters(2))], [f"e{count - 1}"])

    def test_receipts_with_gaps(self) -> None:
        """Receipts may come in any order, twice, and for what is not there: just these entries go, and are counted."""
        world = self.world()
        for n in range(1, 13):
            world.event(f"e{n}", b"x" * n)
        world.run()
        world.get(world.outbox.forget([2, 3, 4, 9, 8, 4, 12, 13, 14, 6]))
        world.get(world.outbox.forget([3, 5, 6]))
        self.assertEqual([entry.id for entry in world.events.take(100, 1000)], ["e1", "e7", "e10", "e11"])
        self.assertEqual((world.outbox.stats.events, world.outbox.stats.event_bytes), (4, 29))


class ReaderTests(SynchronousTestCase):
    """Bounded memory, backlog, rewinding at awkward moments."""

    def test_take_within_bounds(self) -> None:
        """Bytes bound a take, save for its first entry, whose size can be asked for."""
        world = World()
        world.open()
        for size in (10, 20, 30):
            world.event(f"e{size}", b"x" * size)
        world.run()
        self.assertEqual(world.events.peek_size(), 10)
        self.assertEqual(world.taken(9, 29), ["e10"])
        self.assertEqual(world.taken(9, 1), ["e20"])
        self.assertEqual(world.taken(0, 100), [])
        self.assertEqual(world.taken(9, 30), ["e30"])
        self.assertIsNone(world.events.peek_size())

    def test_backlog_in_order_and_bounded(self) -> None:
        """A backlog far larger than the memory comes out whole and in order, while more is being put."""
        self.patch(reader_module, "MAX_ENTRIES", 20)
        self.patch(books_module, "PAGE_ROWS", 8)
        world = World()
        world.open()
        put, got = 0, []
        for turn in range(400):
            for _ in range(7 if turn < 60 else 0):
                world.event(f"{put}")
                put += 1
            world.clock.advance(0)
            self.assertLessEqual(len(world.events._ahead), 28)
            got += world.taken(3)
        self.assertEqual(got, [str(n) for n in range(put)])

    def test_page_ends_by_bytes(self) -> None:
        """A page of large bodies is short, and the rest follows."""
        self.patch(books_module, "PAGE_BYTES", 100)
        world = World()
        world.open()
        for n in range(5):
            world.event(str(n), b"x" * 60)
        world.run()
        world.events.rewind()
        world.run()
        got = world.taken()
        world.run()
        self.assertEqual(got + world.taken(), ["0", "1", "2", "3", "4"])

    def test_rewind_with_receipts_on_their_way(self) -> None:
        """What is receipted before or after the rewind, committed or not, does not come again."""
        world = World()
        world.open()
        seqs = [world.get(world.event(str(n))) for n in range(6)]
        world.taken()
        world.outbox.forget(seqs[0:1])
        world.events.rewind()
        world.outbox.forget(seqs[2:3])
        world.event("6")
        world.run()
        world.outbox.forget(seqs[4:5])
        self.assertEqual(world.taken(), ["1", "3", "5", "6"])

    def test_rewind_while_a_page_is_under_way(self) -> None:
        """A page of the backlog that was asked for before a rewind does not come before the oldest entries."""
        self.patch(reader_module, "MAX_ENTRIES", 4)
        self.patch(books_module, "PAGE_ROWS", 2)
        world = World()
        world.open()
        for n in range(8):
            world.event(str(n))
        world.run()
        world.events.rewind()
        world.run()
        self.assertEqual(world.taken(2), ["0", "1"])
        world.events.rewind()
        world.run()
        self.assertEqual(world.taken(2), ["0", "1"])

    def test_rewind_at_the_beginning(self) -> None:
        """A rewind before anything was seen asks for no page, but for one that could not be read."""
        asked: list[int] = []
        reader = reader_module.Reader(Lane.EVENT, lambda lane, after, generation: asked.append(generation), set())
        reader.rewind()
        self.assertEqual(asked, [])
        reader.start()
        reader.rewind()
        reader.paged(asked[-1], Page([], 0, True, []))
        reader.rewind()
        self.assertEqual(len(asked), 1)
        reader.lost_track()
        reader.unpaged(asked[-1])
        reader.rewind()
        self.assertEqual(len(asked), 3)
        entry = Entry(1, Lane.EVENT, "k", "id", b"", 0.0, None)
        reader.paged(asked[-1], Page([entry], 1, True, []))
        reader.rewind()
        self.assertEqual(len(asked), 4)

    def test_two_rewinds(self) -> None:
        """The page of an earlier rewind is not mistaken for that of a later one."""
        world = World()
        world.open()
        for n in range(3):
            world.event(str(n))
        world.run()
        world.events.rewind()
        world.events.rewind()
        world.run()
        self.assertEqual(world.taken(), ["0", "1", "2"])
        self.assertEqual(world.taken(), [])

    def test_unreadable_page(self) -> None:
        """A lane whose page could not be read goes on with the next commit, though nobody took anything."""
        world = World()
        world.open()
        world.get(world.event("0"))
        reader = world.events
        world.taken()
        reader.rewind()
        generation = reader._generation
        world.run()
        world.taken()
        reader.unpaged(generation)
        self.assertIsNone(reader.peek_size())
        world.get(world.event("1"))
        world.run()
        self.assertEqual(world.taken(), ["1"])


class InboxTests(SynchronousTestCase):
    """No command twice, none forgotten, one result each."""

    def setUp(self) -> None:
        self.world = World(max_bytes=4096, remember_commands=60)
        self.world.open()
        self.inbox = self.world.inbox

    def accept(self, id: str, digest: str = "d", body: bytes = b"run") -> Accepted | Duplicate:
        return self.world.get(self.inbox.accept(id=id, digest=digest, body=body))

    def complete(self, key: int | None, id: str, result: str, body: bytes = b"done") -> int:
        completing = self.inbox.complete(key=key, command_id=id, status="success", result_id=result, body=body)
        self.assertEqual(self.world.get(completing), result)
        return self.world.get(latest_event(self.world.spool))

    def key(self, id: str, digest: str = "d") -> int:
        answer = self.accept(id, digest)
        assert isinstance(answer, Accepted)
        return answer.command.key

    def test_duplicate_before_the_result(self) -> None:
        """The same command is known again; another one with the same id is not the same."""
        key = self.key("c")
        self.assertEqual(self.accept("c"), Duplicate(key, False))
        self.assertNotEqual(self.key("c", "other"), key)
        self.assertEqual(self.inbox.open_count, 2)

    def test_one_command_by_two_ways(self) -> None:
        """Where either delivery has no digest, the id alone says that it is the same command."""
        plain = self.key("c", "digest")
        self.assertEqual(self.accept("c", ""), Duplicate(plain, False))
        v1 = self.key("d", "")
        self.assertEqual(self.accept("d", "digest"), Duplicate(v1, False))

    def test_result_and_completion(self) -> None:
        """A result is an event of the outbox; the command is finished and takes no second one."""
        key = self.key("c")
        self.world.get(self.inbox.offered([key]))
        self.complete(key, "c", "r")
        self.assertEqual(self.inbox.open_count, 0)
        (entry,) = self.world.events.take(9, 999)
        self.assertEqual((entry.kind, entry.id, entry.body), (RESULT_KIND, "r", b"done"))
        self.assertRaises(AlreadyCompleted, self.complete, key, "c", "r2")
        self.assertRaises(AlreadyCompleted, self.complete, None, "c", "r2")
        self.assertEqual(self.world.outbox.stats.events, 1)

    def test_result_by_id_takes_the_oldest(self) -> None:
        """Without a key the oldest unfinished command of that id gets the result."""
        first, second = self.key("c", "1"), self.key("c", "2")
        self.complete(None, "c", "r1")
        self.assertRaises(AlreadyCompleted, self.complete, first, "c", "r2")
        self.complete(second, "c", "r2")

    def test_result_of_unknown_command(self) -> None:
        """An agent may report on a command that it got elsewhere, with and without a key."""
        self.complete(None, "elsewhere", "r1")
        self.complete(99, "elsewhere", "r2")
        self.assertEqual(self.world.taken(), ["r1", "r2"])
        self.assertEqual(self.inbox.open_count, 0)

    def test_duplicate_of_finished(self) -> None:
        """The original result is sent again, once, with its id and body."""
        key = self.key("c")
        seq = self.complete(key, "c", "r")
        finished = Duplicate(key, True, "success", "r")
        self.assertEqual(self.accept("c"), finished)
        self.assertEqual(self.world.taken(), ["r"])
        self.world.get(self.world.outbox.forget([seq]))
        self.assertEqual(self.accept("c"), finished)
        self.assertEqual(self.accept("c"), finished)
        (entry,) = self.world.events.take(9, 999)
        self.assertEqual((entry.id, entry.body, entry.kind), ("r", b"done", RESULT_KIND))
        self.assertGreater(entry.seq, seq)

    def test_duplicate_of_finished_without_room(self) -> None:
        """At the outbox's bounds the original result is not put there again, for several in one batch either."""
        self.world = World(max_events=3)
        self.world.open()
        self.inbox = self.world.inbox
        for name in ("c", "d"):
            self.world.get(self.world.outbox.forget([self.complete(self.key(name), name, f"r-{name}")]))
        waiting = [self.world.get(self.world.event(f"e{n}")) for n in range(2)]
        answers = [self.inbox.known(name, "d") for name in ("c", "d")]
        self.world.run()
        self.assertEqual(self.successResultOf(answers[0]).result_id, "r-c")
        self.failureResultOf(answers[1], QueueFull)
        self.assertRaises(QueueFull, self.accept, "d")
        self.assertEqual(self.world.outbox.stats.events, 3)
        self.world.get(self.world.outbox.forget(waiting[:1]))
        self.assertEqual(self.accept("d").result_id, "r-d")

    def test_remembered_bodies_are_bounded(self) -> None:
        """The oldest remembered results give way; their duplicates are still known, with the status."""
        keys = [self.key(f"c{n}") for n in range(3)]
        for n, key in enumerate(keys):
            self.world.get(self.world.outbox.forget([self.complete(key, f"c{n}", f"r{n}", b"x" * 400)]))
        self.assertEqual(self.accept("c0"), Duplicate(keys[0], True, "success", "r0", result_missing=True))
        self.assertEqual(self.accept("c2"), Duplicate(keys[2], True, "success", "r2"))
        self.assertEqual(self.world.taken(), ["r2"])

    def test_no_room_beside_a_repeated_result(self) -> None:
        """What was let in before the reactor heard of a repeated result is refused when that has taken the room."""
        self.world = World(max_events=2)
        self.world.open()
        self.inbox = self.world.inbox
        self.world.get(self.world.outbox.forget([self.complete(self.key("c"), "c", "r")]))
        other = self.key("other")
        self.world.gate.shut = True
        again = self.inbox.known("c", "d")
        self.world.run()
        event, more = self.world.event("e0"), self.world.event("e1")
        self.world.gate.open()
        self.world.run()
        self.assertEqual(self.successResultOf(again).result_id, "r")
        seq = self.successResultOf(event)
        self.failureResultOf(more, QueueFull)
        self.assertEqual(self.world.outbox.stats.events, 2)
        # The same for a result, whose command is not finished by it.
        self.world.get(self.world.outbox.forget([1, 2, seq]))
        self.world.gate.shut = True
        again = self.inbox.known("c", "d")
        self.world.run()
        event = self.world.event("e2")
        result = self.inbox.complete(key=other, command_id="other", status="success", result_id="r2", body=b"")
        self.world.gate.open()
        self.world.run()
        self.successResultOf(again)
        seq = self.successResultOf(event)
        self.failureResultOf(result, QueueFull)
        self.assertEqual((self.world.outbox.stats.events, self.inbox.open_count), (2, 1))
        self.world.get(self.world.outbox.forget([seq]))
        self.complete(other, "other", "r2")

    def test_result_too_large_to_be_remembered(self) -> None:
        """A result that is larger than all that may be remembered does not push out the others."""
        small, large = self.key("small"), self.key("large")
        self.world.get(self.world.outbox.forget([self.complete(small, "small", "r1")]))
        self.world.get(self.world.outbox.forget([self.complete(large, "large", "r2", b"x" * 1025)]))
        self.assertEqual(self.accept("large"), Duplicate(large, True, "success", "r2", result_missing=True))
        self.assertEqual(self.accept("small"), Duplicate(small, True, "success", "r1"))

    def test_wrong_total_of_remembered_bodies(self) -> None:
        """A total that a flipped bit has made too great costs what is remembered; then it is right again."""
        self.complete(self.key("before"), "before", "r1")
        books = self.world.spool._store._writer._books
        assert books is not None
        books.counter.remembered_bytes += 1 << 40
        self.complete(self.key("then"), "then", "r2")
        self.assertEqual(books.counter.remembered_bytes, 0)
        after = self.key("after")
        self.world.get(self.world.outbox.forget([self.complete(after, "after", "r3")]))
        self.assertEqual(books.counter.remembered_bytes, len(b"done"))
        self.assertEqual(self.accept("after"), Duplicate(after, True, "success", "r3"))

    def test_forget_finished(self) -> None:
        """Finished commands are forgotten after their time, but not while the result still waits."""
        sent, waiting = self.key("sent"), self.key("waiting")
        seq = self.complete(sent, "sent", "r1")
        self.complete(waiting, "waiting", "r2")
        unfinished = self.key("unfinished")
        self.world.get(self.world.outbox.forget([seq]))
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 0)
        self.world.clock.advance(60)
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 1)
        self.assertIsInstance(self.accept("sent"), Accepted)
        self.assertEqual(self.accept("waiting"), Duplicate(waiting, True, "success", "r2"))
        self.assertEqual(self.accept("unfinished"), Duplicate(unfinished, False))

    def test_nothing_to_forget(self) -> None:
        """A spool in memory in which nothing was finished is not looked into."""
        batches: list[int] = []
        store = self.world.spool._store
        batch = store._batch
        self.patch(store, "_batch", lambda: (batches.append(1), batch())[1])
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 0)
        self.assertEqual(batches, [])
        self.complete(self.key("a"), "a", "r")
        del batches[:]
        self.world.get(self.inbox.forget_finished())
        self.assertEqual(len(batches), 2)

    def test_finished_commands_are_bounded(self) -> None:
        """Those finished first are forgotten beyond the bound, in slices, but not while their results wait."""
        self.patch(inbox_module, "MAX_FINISHED", 3)
        self.patch(inbox_module, "SLICE", 2)
        seqs = []
        for n in range(9):
            seqs.append(self.complete(self.key(f"c{n}"), f"c{n}", f"r{n}"))
            self.world.clock.advance(1)
        unfinished = self.key("unfinished")
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 0)
        self.world.get(self.world.outbox.forget(seqs[1:]))
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 6)
        self.assertEqual(self.world.get(self.inbox.forget_finished()), 0)
        known = [self.world.get(self.inbox.known(f"c{n}", "d")) is not None for n in range(9)]
        self.assertEqual(known, [True] + [False] * 6 + [True] * 2)
        self.assertEqual(self.accept("unfinished"), Duplicate(unfinished, False))
        books = self.world.spool._store._writer._books
        assert books is not None
        self.assertEqual(books.counter.remembered_bytes, 3 * len(b"done"))


class Model(RuleBasedStateMachine):
    """Outbox and inbox against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(max_events=30)
        self.world.open()
        self.held: list[tuple[int, str]] = []  # what the outbox holds, in order
        self.ahead: list[tuple[int, str]] = []  # what a take would bring
        self.flying: list[int] = []
        self.commands: dict[str, list[Any]] = {}  # id: [key, result id or None, its seq]
        self.number = 0

    def name(self) -> str:
        self.number += 1
        return f"m{self.number}"

    def appended(self, seq: int, name: str) -> None:
        self.held.append((seq, name))
        self.ahead.append((seq, name))

    @rule(count=st.integers(1, 8))
    def put(self, count: int) -> None:
        room = 30 - len(self.held)
        waiting = [(name := self.name(), self.world.event(name)) for _ in range(count)]
        for position, (name, deferred) in enumerate(waiting):
            if position < room:
                self.appended(self.world.get(deferred), name)
            else:
                try:
                    self.world.get(deferred)
                except QueueFull:
                    continue
                raise AssertionError("over the bound")

    @rule(count=st.integers(1, 10))
    def take(self, count: int) -> None:
        self.world.run()
        got = [(entry.seq, entry.id) for entry in self.world.events.take(count, 1 << 20)]
        assert got == self.ahead[:count], (got, self.ahead)
        del self.ahead[:count]
        self.flying += [seq for seq, _ in got]

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), at_once=st.booleans())
    def receipt(self, data: st.DataObject, at_once: bool) -> None:
        gone = set(data.draw(st.lists(st.sampled_from(self.flying), min_size=1, unique=True)))
        waiting = self.world.outbox.forget(gone)
        self.held = [each for each in self.held if each[0] not in gone]
        self.ahead = [each for each in self.ahead if each[0] not in gone]
        self.flying = [seq for seq in self.flying if seq not in gone]
        if at_once:
            self.world.get(waiting)

    @rule()
    def rewind(self) -> None:
        self.world.events.rewind()
        self.ahead = list(self.held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def bury(self, data: st.DataObject) -> None:
        seq, name = data.draw(st.sampled_from(self.held))
        self.world.get(self.world.outbox.bury(seq, "rejected"))
        self.held.remove((seq, name))
        self.ahead = [each for each in self.ahead if each[0] != seq]
        self.flying = [each for each in self.flying if each != seq]

    @rule(number=st.integers(0, 4))
    def command(self, number: int) -> None:
        name = f"c{number}"
        accepting = self.world.inbox.accept(id=name, digest="d", body=b"")
        if name not in self.commands:
            answer = self.world.get(accepting)
            assert isinstance(answer, Accepted)
            self.commands[name] = [answer.command.key, None, 0]
            return
        key, result, seq = self.commands[name]
        repeated = result is not None and all(held != seq for held, _ in self.held)
        if repeated and len(self.held) == 30:
            try:
                self.world.get(accepting)
            except QueueFull:
                return
            raise AssertionError("over the bound")
        answer = self.world.get(accepting)
        assert isinstance(answer, Duplicate)
        assert (answer.key, answer.finished, answer.result_id) == (key, result is not None, result or "")
        if repeated:
            self.repeated(name)

    @precondition(lambda self: any(result for _, result, _ in self.commands.values()))
    @rule(count=st.integers(1, 30))
    def put_beside_repeats(self, count: int) -> None:
        """Duplicates of all that is finished, and events that come before the reactor hears of what those did."""
        finished = [name for name, (_, result, _) in self.commands.items() if result is not None]
        self.world.gate.shut = True
        asked = [self.world.inbox.known(name, "d") for name in finished]
        self.world.run()
        names = [self.name() for _ in range(count)]
        waiting = [self.world.event(name) for name in names]
        self.world.gate.open()
        for name, deferred in zip(finished, asked, strict=True):
            if any(held == self.commands[name][2] for held, _ in self.held):
                assert self.world.get(deferred).finished
            elif self.had_room(deferred):
                self.repeated(name)
        for name, deferred in zip(names, waiting, strict=True):
            if seq := self.had_room(deferred):
                self.appended(seq, name)

    def had_room(self, waiting: Deferred[Any]) -> Any:
        """Return what came of this, None when it had no room, which it has exactly if there is any."""
        answer = None
        with contextlib.suppress(QueueFull):
            answer = self.world.get(waiting)
        assert (answer is not None) == (len(self.held) < 30)
        return answer

    def repeated(self, name: str) -> None:
        """The result of this command was put into the outbox again."""
        known = self.commands[name]
        books = self.world.spool._store._writer._books
        assert books is not None
        (known[2],) = books.flush().execute("SELECT seq FROM entry WHERE id = ?", (known[1],)).fetchone()
        self.appended(known[2], known[1])

    @precondition(lambda self: self.commands and len(self.held) < 30)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.commands)))
        known = self.commands[name]
        result = self.name()
        waiting = self.world.inbox.complete(
            key=known[0], command_id=name, status="success", result_id=result, body=b"{}"
        )
        if known[1] is None:
            known[1], known[2] = self.world.get(waiting), self.world.get(latest_event(self.world.spool))
            self.appended(known[2], result)
        else:
            try:
                self.world.get(waiting)
            except AlreadyCompleted:
                return
            raise AssertionError("two results")

    @invariant()
    def totals(self) -> None:
        self.world.run()
        assert self.world.outbox.stats.events == len(self.held)
        assert self.world.inbox.open_count == sum(result is None for _, result, _ in self.commands.values())
        rows = self.world.get(
            self.world.outbox._store.submit(
                Ask(lambda books: books.flush().execute("SELECT seq, id FROM entry ORDER BY seq").fetchall())
            )
        )
        assert rows == self.held, (rows, self.held)


class ModelTests(SynchronousTestCase):
    """The model under Hypothesis."""

    def test_model(self) -> None:
        """Whatever the order of calls, the spool does what plain lists would do."""
        case = Model.TestCase
        case.settings = settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        case("runTest").debug()
