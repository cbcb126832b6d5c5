"""Commands in: stored, then acknowledged, then offered, and never more than there is room for."""

from __future__ import annotations

import msgspec
from twisted.internet.defer import Deferred, fail
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import SpoolWriteFailed
from commsmgr.intake import ASKING, REFUSED_FOR
from commsmgr.messages import CommandData, Result
from commsmgr.spool import Duplicate, Lane, Opened, StoredCommand
from tests.command_kit import CommandWorld, Source, arrived


class Order(SynchronousTestCase):
    """The order is the promise."""

    def setUp(self) -> None:
        self.world = CommandWorld()
        self.source = Source()

    def test_stored_then_acknowledged_then_offered(self) -> None:
        """Neither the backend nor the agent hears of a command before its commit, the agent not before its mark."""
        world = self.world
        order: list[str] = []
        store = world.spool.inbox.offered
        self.patch(
            self.source, "acknowledge", lambda name: order.append(f"acked {name}, {world.spool.inbox.open_count}")
        )
        self.patch(
            world.channel, "_mark_offered", lambda keys: store(keys).addCallback(lambda _: order.append("marked"))
        )
        offered = world.channel.get()
        offered.addCallback(lambda command: order.append("seen") or command)
        world.intake.arrived(self.source, arrived("c", args=["a"], options={"x": [1]}))
        self.assertEqual((order, world.spool.inbox.open_count), ([], 0))
        world.run()
        self.assertEqual(order, ["acked c, 1", "marked", "seen"])
        command = self.successResultOf(offered)
        self.assertEqual((command.id, command.type, command.args, command.options), ("c", "run", ("a",), {"x": [1]}))
        self.assertFalse(command.redelivered)
        ((stored, whole),) = world.get(world.spool.inbox.unfinished())
        self.assertEqual((stored.key, stored.offered, whole), (command.key, True, True))
        self.assertEqual(world.counted("command", "accepted"), 1)

    def test_acknowledged_before_it_is_in_the_channel(self) -> None:
        """The acknowledgement goes out although the agent's mark fails afterwards; the command is not lost."""
        world = self.world
        waiting = world.channel.get()
        marks: list[Deferred[None]] = []
        self.patch(world.channel, "_mark_offered", lambda keys: marks.append(Deferred()) or marks[-1])
        world.intake.arrived(self.source, arrived("c"))
        world.run()
        self.assertEqual(self.source.acked, ["c"])
        marks[0].errback(SpoolWriteFailed())
        self.failureResultOf(waiting, SpoolWriteFailed)
        self.assertEqual(len(world.channel), 1)

    def test_not_stored(self) -> None:
        """What could not be stored is neither acknowledged nor offered; the backend is told to send it again."""
        self.patch(self.world.spool.inbox, "accept", lambda **_: fail(SpoolWriteFailed()))
        self.world.intake.arrived(self.source, arrived("c"))
        self.world.run()
        self.assertEqual((self.source.acked, len(self.world.channel)), ([], 0))
        self.assertEqual(self.source.refused, [("c", "busy", 5.0)])
        self.assertEqual(self.world.counted("command", "refused"), 1)

    def test_known_cannot_be_asked(self) -> None:
        """When the spool answers nothing at all the command is refused."""
        self.world.get(self.world.spool.close())
        self.world.intake.arrived(self.source, arrived("c"))
        self.assertEqual([refused[0] for refused in self.source.refused], ["c"])

    def test_duplicate_whose_storing_fails(self) -> None:
        """On a failing disk a command that is known already is still a duplicate."""
        self.world.intake.arrived(self.source, arrived("c"))
        self.world.run()
        self.patch(self.world.spool.inbox, "accept", lambda **_: fail(SpoolWriteFailed()))
        self.world.intake.arrived(self.source, arrived("c"))
        self.world.run()
        self.assertEqual((self.source.acked, self.source.refused), (["c", "c"], []))

    def test_timeouts_are_bounded(self) -> None:
        """A command that names no timeout gets the default one, a longer one than allowed is cut."""
        world = CommandWorld(default_timeout=7.0, max_timeout=50.0)
        for name, timeout in (("none", 0.0), ("own", 20.0), ("long", 60.0)):
            world.intake.arrived(self.source, arrived(name, timeout=timeout))
        world.run()
        timeouts = [world.get(world.channel.get()).timeout for _ in range(3)]
        self.assertEqual(timeouts, [7.0, 20.0, 50.0])


class Duplicates(SynchronousTestCase):
    """A command that comes again is acknowledged and not offered again."""

    def setUp(self) -> None:
        self.world = CommandWorld(spool={"max_bytes": 4096})
        self.source = Source()

    def take(self, id: str) -> int:
        self.world.intake.arrived(self.source, arrived(id))
        key: int = self.world.get(self.world.channel.get()).key
        return key

    def test_unfinished(self) -> None:
        """One that runs is acknowledged; nothing else happens."""
        self.take("c")
        self.world.intake.arrived(self.source, arrived("c"))
        self.world.run()
        self.assertEqual((self.source.acked, len(self.world.channel), self.world.said), (["c", "c"], 0, []))
        self.assertEqual(self.world.counted("command", "duplicate"), 1)

    def test_finished(self) -> None:
        """Of a finished one the original result is sent again."""
        seq = self.world.complete(self.take("c"), "c")
        self.world.get(self.world.spool.outbox.forget([seq]))
        self.world.sent()
        self.world.intake.arrived(self.source, arrived("c"))
        self.world.run()
        self.assertEqual((self.source.acked, self.world.sent(), self.world.said), (["c", "c"], ["r-c"], []))

    def _forgotten(self, status: str) -> None:
        seq = self.world.complete(self.take("old"), "old", b"x" * 900, status)
        self.world.get(self.world.spool.outbox.forget([seq]))
        self.world.complete(self.take("new"), "new", b"x" * 900)
        self.world.intake.arrived(self.source, arrived("old"))
        self.world.run()

    def test_result_not_kept(self) -> None:
        """When the original is no longer remembered, the backend gets a short one with the stored status."""
        self._forgotten("success")
        (short,) = self.world.said
        self.assertEqual((short.command_id, short.status, short.output, short.exit_code), ("old", "success", "", 0))
        self.assertIn("no longer kept", short.error)
        self.assertEqual((self.source.acked[-1], self.world.reported), ("old", []))

    def test_result_of_a_failure_not_kept(self) -> None:
        """The short result of a command that failed has no exit code of success."""
        self._forgotten("timeout")
        (short,) = self.world.said
        self.assertEqual((short.status, short.exit_code), ("timeout", 1))

    def test_inbox_known(self) -> None:
        """Asking the inbox stores nothing, and tells unknown, unfinished and finished ones apart."""
        inbox = self.world.spool.inbox
        self.assertIsNone(self.world.get(inbox.known("c", "d")))
        self.assertEqual(inbox.open_count, 0)
        self.world.intake.arrived(self.source, arrived("c", "d"))
        key = self.world.get(self.world.channel.get()).key
        self.assertEqual(self.world.get(inbox.known("c", "d")), Duplicate(key, False))
        self.assertIsNone(self.world.get(inbox.known("c", "other content")))
        seq = self.world.complete(key, "c")
        self.world.get(self.world.spool.outbox.forget([seq]))
        self.world.sent()
        self.assertEqual(self.world.get(inbox.known("c", "d")), Duplicate(key, True, "success", "r-c"))
        self.assertEqual(self.world.sent(), ["r-c"])


class Room(SynchronousTestCase):
    """No more commands than the spool could store results for."""

    def test_burst_in_one_turn(self) -> None:
        """Commands that are still being committed count: a burst does not overshoot commands.max_pending."""
        world, source = CommandWorld(max_pending=3), Source()
        for number in range(5):
            world.intake.arrived(source, arrived(f"c{number}"))
        world.run()
        self.assertEqual(source.acked, ["c0", "c1", "c2"])
        self.assertEqual(source.refused, [("c3", "busy", 5.0), ("c4", "busy", 5.0)])
        self.assertEqual(world.spool.inbox.open_count, 3)

    def test_room_comes_back(self) -> None:
        """A result makes room for the next command; a failed accept takes none."""
        world, source = CommandWorld(max_pending=1), Source()
        inbox, accept = world.spool.inbox, world.spool.inbox.accept
        self.patch(inbox, "accept", lambda **_: fail(SpoolWriteFailed()))
        world.intake.arrived(source, arrived("failed"))
        world.run()
        self.patch(inbox, "accept", accept)
        world.intake.arrived(source, arrived("first"))
        key = world.get(world.channel.get()).key
        world.intake.arrived(source, arrived("second"))
        world.run()
        world.complete(key, "first")
        world.intake.arrived(source, arrived("third"))
        world.run()
        self.assertEqual(source.acked, ["first", "third"])

    def test_event_bounds(self) -> None:
        """It stops at four fifths of the events, those that open commands will become included."""
        world, source = CommandWorld(spool={"max_events": 10}), Source()
        for number in range(4):
            world.intake.arrived(source, arrived(f"a{number}"))
            world.complete(world.get(world.channel.get()).key, f"a{number}")
        for number in range(5):
            world.intake.arrived(source, arrived(f"b{number}"))
            world.run()
        self.assertEqual([refused[0] for refused in source.refused], ["b4"])

    def test_byte_bounds(self) -> None:
        """It stops at four fifths of the bytes of events."""
        world, source = CommandWorld(spool={"max_bytes": 1024}), Source()
        world.intake.arrived(source, arrived("a"))
        world.complete(world.get(world.channel.get()).key, "a", b"x" * 820)
        world.intake.arrived(source, arrived("b"))
        world.run()
        self.assertEqual([refused[0] for refused in source.refused], ["b"])

    def test_rate(self) -> None:
        """Beyond commands.max_rate commands are refused until time has passed, in either dialect's words."""
        for can_refuse in (True, False):
            world, source = CommandWorld(max_rate=2), Source(can_refuse=can_refuse)
            for number in range(25):
                world.intake.arrived(source, arrived(f"a{number}"))
            world.run()
            self.assertEqual(source.acked, [f"a{number}" for number in range(20)])
            refused = [f"a{number}" for number in range(20, 25)]
            self.assertEqual([refusal[0] for refusal in source.refused], refused if can_refuse else [])
            self.assertEqual([result.command_id for result in world.said], [] if can_refuse else refused)
            self.assertEqual({result.status for result in world.said}, set() if can_refuse else {"rejected"})
            world.clock.advance(REFUSED_FOR)
            for number in range(20, 40):
                world.intake.arrived(source, arrived(f"a{number}"))
            world.run()
            self.assertEqual(source.acked, [f"a{number}" for number in range(30)])

    def test_rate_of_duplicates(self) -> None:
        """What is known already costs nothing, and is acknowledged beyond the rate too."""
        world, source = CommandWorld(max_rate=1), Source()
        for turn in range(5):
            for _ in range(8):
                world.intake.arrived(source, arrived("same"))
            world.run()
            self.assertEqual(len(source.acked), 8 * (turn + 1))
        for number in range(10):
            world.intake.arrived(source, arrived(f"c{number}"))
        world.intake.arrived(source, arrived("same"))
        world.run()
        self.assertEqual(len(source.acked), 40 + 9 + 1)
        self.assertEqual([refusal[0] for refusal in source.refused], ["c9"])

    def test_no_rate(self) -> None:
        """With 0 there is no such limit."""
        world, source = CommandWorld(max_rate=0, max_pending=20_000), Source()
        for number in range(11_000):
            world.intake.arrived(source, arrived(f"c{number}"))
        world.run()
        self.assertEqual(len(source.acked), 11_000)

    def test_a_duplicate_needs_no_room(self) -> None:
        """A command that is known is acknowledged, room or no room."""
        for can_refuse in (True, False):
            world, source = CommandWorld(max_pending=1), Source(can_refuse=can_refuse)
            for _ in range(2):
                world.intake.arrived(source, arrived("c"))
                world.run()
            self.assertEqual((source.acked, source.refused, world.said), (["c", "c"], [], []))

    def test_plain_backend(self) -> None:
        """A dialect without a word of refusal gets a result, which closes no command of the same id."""
        world, source = CommandWorld(max_pending=1), Source(can_refuse=False)
        world.intake.arrived(source, arrived("same", "one"))
        world.run()
        world.intake.arrived(source, arrived("same", "two"))
        world.run()
        (result,) = world.said
        self.assertEqual((result.command_id, result.status, result.key), ("same", "rejected", None))
        self.assertEqual((world.reported, world.spool.inbox.open_count), ([], 1))

    def _refused_at(self, events: int, body: bytes = b"{}", **spool: int) -> int:
        """Return how many refusals a plain backend is told of with so many events in the outbox."""
        world, source = CommandWorld(spool=spool), Source(can_refuse=False)
        for number in range(events):
            world.get(world.spool.outbox.put(lane=Lane.EVENT, kind="command_result", id=f"e{number}", body=body))
        world.intake.arrived(source, arrived("c"))
        world.run()
        self.assertEqual((source.acked, world.counted("command", "refused")), ([], 1))
        return len(world.said)

    def test_plain_backend_and_a_finished_one(self) -> None:
        """A finished command whose result finds no room is not said to be rejected: it was not."""
        for can_refuse in (True, False):
            world, source = CommandWorld(spool={"max_bytes": 1024}), Source(can_refuse=can_refuse)
            world.intake.arrived(source, arrived("c"))
            world.run()
            key = world.get(world.channel.get()).key
            world.get(world.spool.outbox.forget([world.complete(key, "c", b"x" * 200)]))
            world.get(world.spool.outbox.put(lane=Lane.EVENT, kind="command_result", id="e", body=b"x" * 900))
            world.intake.arrived(source, arrived("c"))
            world.run()
            self.assertEqual((source.acked, len(source.refused), world.said), (["c"], int(can_refuse), []))

    def test_plain_backend_when_nearly_full(self) -> None:
        """From nine tenths of a bound on not even the refusal takes the room that results need."""
        self.assertEqual([self._refused_at(events, max_events=20) for events in (16, 17, 18, 20)], [1, 1, 0, 0])
        sizes = (900, 921, 922, 1024)
        self.assertEqual([self._refused_at(1, b"x" * size, max_bytes=1024) for size in sizes], [1, 1, 0, 0])

    def test_plain_backend_burst(self) -> None:
        """Refusals that are still being committed count: a burst does not take what results need either."""
        world, source = CommandWorld(spool={"max_events": 20}, max_pending=1), Source(can_refuse=False)
        outbox = world.spool.outbox

        def say(result: Result) -> None:
            outbox.put(lane=Lane.EVENT, kind="command_result", id=result.command_id, body=b"{}")

        self.patch(world.intake, "_say", say)
        for number in range(50):
            world.intake.arrived(source, arrived(f"c{number}"))
        world.run()
        self.assertEqual((source.acked, outbox.stats.events, world.counted("command", "refused")), (["c0"], 18, 49))

    def test_a_source_that_can_refuse_when_full(self) -> None:
        """A refusal that takes no room is given however full the spool is."""
        world, source = CommandWorld(spool={"max_events": 1}), Source()
        world.get(world.spool.outbox.put(lane=Lane.EVENT, kind="command_result", id="e", body=b"{}"))
        world.intake.arrived(source, arrived("c"))
        world.run()
        self.assertEqual((source.refused, world.said), ([("c", "busy", 5.0)], []))

    def test_flood(self) -> None:
        """A flood of commands that are not taken is one line in the log for each ten seconds, and counted."""
        world, source = CommandWorld(max_pending=1), Source()
        lines: list[LogEvent] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        for number in range(51):
            world.intake.arrived(source, arrived(f"c{number}"))
        world.run()
        world.clock.advance(10)
        world.intake.arrived(source, arrived("later"))
        world.run()
        refusals = [line for line in lines if line.get("event") == "command.refused"]
        self.assertEqual([(line["message_id"], line["suppressed"]) for line in refusals], [("c1", 0), ("later", 49)])
        self.assertEqual((len(source.refused), world.counted("command", "refused")), (51, 51))

    def test_flood_asks_little(self) -> None:
        """Of a flood the inbox is asked about some commands at once only; a plain backend hears nothing of the rest."""
        for can_refuse, heard in ((True, ASKING + 50), (False, ASKING)):
            world, source = CommandWorld(max_pending=1), Source(can_refuse=can_refuse)
            world.intake.arrived(source, arrived("c"))
            world.run()
            asked: list[str] = []
            known = world.spool.inbox.known
            self.patch(world.spool.inbox, "known", lambda *args, f=known, a=asked: a.append(args[0]) or f(*args))
            for number in range(ASKING + 50):
                world.intake.arrived(source, arrived(f"c{number}"))
            world.run()
            self.assertEqual((len(asked), len(source.refused) + len(world.said)), (ASKING, heard))
            world.intake.arrived(source, arrived("c"))
            world.run()
            self.assertEqual(source.acked, ["c", "c"], "once the flood is over duplicates are known again")

    def test_flood_of_duplicates(self) -> None:
        """A command that comes again and again is one line in the log for each ten seconds."""
        world, source = CommandWorld(), Source()
        lines: list[LogEvent] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)
        for _ in range(50):
            world.intake.arrived(source, arrived("c"))
        world.run()
        self.assertEqual(len([line for line in lines if line.get("event") == "command.duplicate"]), 1)
        self.assertEqual(world.counted("command", "duplicate"), 49)


def stored(key: int, body: bytes | None = None, type: str = "run") -> StoredCommand:
    """Return a command as it is found at the start."""
    body = msgspec.json.encode(CommandData(type=type)) if body is None else body
    return StoredCommand(key, f"c{key}", "", body, True, 1.0)


class Recovery(SynchronousTestCase):
    """What the last process left open is settled at the start."""

    def setUp(self) -> None:
        self.world = CommandWorld(safe_to_repeat=("again",))

    def recover(self, interrupted: list[StoredCommand], waiting: list[StoredCommand]) -> None:
        self.world.intake.recover(Opened(None, tuple(interrupted), tuple(waiting)))

    def test_interrupted(self) -> None:
        """One that the agent may have begun is reported as interrupted, under its key, and not offered."""
        self.recover([stored(5)], [])
        (result,) = self.world.reported
        self.assertEqual((result.command_id, result.key, result.status), ("c5", 5, "interrupted"))
        self.assertEqual((len(self.world.channel), self.world.said), (0, []))

    def test_safe_to_repeat(self) -> None:
        """A type that is safe to repeat is offered again and says so; what was never offered says nothing."""
        self.recover([stored(5, type="again")], [stored(6)])
        commands = [self.world.get(self.world.channel.get()) for _ in range(2)]
        self.assertEqual([(c.key, c.redelivered) for c in commands], [(5, True), (6, False)])
        self.assertEqual(self.world.reported, [])

    def test_damaged(self) -> None:
        """Of a damaged row nothing but its id is left: it is reported, even if commands without type may repeat."""
        self.world = CommandWorld(safe_to_repeat=("",))
        self.recover([stored(5, b"")], [])
        self.assertEqual([result.status for result in self.world.reported], ["interrupted"])
        self.assertEqual(len(self.world.channel), 0)
