"""One open link on a virtual clock: registration, receipts in both dialects, keep-alive, the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import answers, config
from commsmgr.answers import FRAME, MOST_IDS
from commsmgr.errors import PeerSilent
from commsmgr.messages import LossReport
from commsmgr.observe.metrics import Metrics
from tests.link_kit import MACHINE, FakeConnection, LinkBench, Recorder, counterparts, differences, entry, pass_time

ASK_FROM, MOST_UNREAD = answers.ASK_FROM // 8, answers.MOST_UNREAD // 8
COMMAND = {"type": "command", "id": "c1", "timestamp": "", "data": {"type": "echo", "command": "x"}}


def encoded(message: Any) -> bytes:
    """Return a message as it went over the wire."""
    return json.dumps(message, separators=(",", ":")).encode()


class FakesTests(SynchronousTestCase):
    """The fakes are what they stand for."""

    def test_signatures(self) -> None:
        """Each method of a fake has the parameters of the real one, and the real thing has each of them."""
        for fake, real in counterparts():
            self.assertEqual(differences(fake, real), [], real)


class _LinkTests(SynchronousTestCase):
    """A link at a backend that speaks one dialect."""

    v1 = True
    settings: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.registry = CollectorRegistry()
        self.recorder = Recorder()
        self.bench = self.open()
        self.link, self.connection = self.bench.link, self.bench.connection
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))
        self.addCleanup(self.link.ended)

    def open(self) -> LinkBench:
        return LinkBench(
            self.clock,
            v1=self.v1,
            settings=config.WebSocket(
                **{
                    "register_timeout": 10.0,
                    "register_wait": 3.0,
                    "ping_interval": 20.0,
                    "ping_timeout": 10.0,
                    "receipt_timeout": 60.0,
                    "window_messages": 4,
                    "window_bytes": 100,
                }
                | self.settings
            ),
            metrics=Metrics(self.registry, seconds=self.clock.seconds),
            events=self.recorder.events,
        )

    def registered(self) -> None:
        """Register, and forget what that took."""
        self.bench.register()
        self.connection.take()
        self.recorder.take()

    def send(self, *seqs: int, body: bytes = b'{"a":1}') -> None:
        self.link.send([entry(seq, body) for seq in seqs], "now")

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"commsmgr_{name}", labels) or 0.0

    def messages(self, kind: str, direction: str, outcome: str) -> float:
        return self.count("messages_total", kind=kind, direction=direction, outcome=outcome)


class RegistrationV1Tests(_LinkTests):
    """From open to registered, commsmgr.v1."""

    def test_first_message(self) -> None:
        """The registration is the first thing sent, at once, and results wait for its answer."""
        ((kind, message),) = self.connection.wire
        self.assertEqual((kind, message["type"], message["machine_id"]), ("text", "register", MACHINE))
        self.assertEqual((self.link.registered, self.link.sendable), (False, False))
        self.assertEqual(self.messages("register", "out", "ok"), 1)

    def test_answered(self) -> None:
        """The answer registers, once; a second one changes nothing, and no timer goes off later."""
        self.bench.register()
        self.bench.register()
        self.assertEqual(self.recorder.take(), [("registered",)])
        self.assertTrue(self.link.sendable)
        pass_time(self.clock, 15)
        self.assertEqual(self.connection.killed, [])

    def test_unanswered(self) -> None:
        """No answer within register_timeout ends the link, then and not before."""
        pass_time(self.clock, 9.9)
        self.assertEqual(self.connection.killed, [])
        pass_time(self.clock, 0.1)
        (error,) = self.connection.killed
        self.assertIsInstance(error, PeerSilent)
        self.assertTrue(str(error).endswith("within 10.0 s"), error)
        self.assertEqual(self.recorder.take(), [])

    def test_wrong_machine(self) -> None:
        """An answer for another machine is an invalid message, and does not register."""
        self.bench.say({"type": "registration_ack", "data": {"machine_id": "other"}})
        self.assertFalse(self.link.registered)
        self.assertEqual(self.count("invalid_messages_total", reason="wrong-machine"), 1)
        pass_time(self.clock, 10)
        (error,) = self.connection.killed
        self.assertIn("within 10.0 s; what came could not be used: wrong-machine: ", str(error))

    def test_ended_before_the_answer(self) -> None:
        """A link that ends while it registers leaves no timer behind."""
        self.assertEqual(self.link.ended(), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertFalse(self.link.sendable)

    def test_a_connection_that_takes_nothing(self) -> None:
        """A registration that could not be sent is counted as lost."""
        self.registry = CollectorRegistry()
        self.patch(FakeConnection, "send", lambda connection, payload: False)
        self.addCleanup(self.open().link.ended)
        self.assertEqual(self.messages("register", "out", "lost"), 1)


class RegistrationPlainTests(_LinkTests):
    """From open to registered, plain dialect."""

    v1 = False

    def test_answered(self) -> None:
        """The answer registers at once."""
        self.bench.register()
        self.assertEqual(self.recorder.take(), [("registered",)])
        pass_time(self.clock, 3)
        self.assertEqual(self.recorder.take(), [])

    def test_unanswered(self) -> None:
        """Silence is consent after register_wait, and a late answer changes nothing."""
        pass_time(self.clock, 2.9)
        self.assertEqual(self.recorder.take(), [])
        pass_time(self.clock, 0.1)
        self.assertEqual(self.recorder.take(), [("registered",)])
        self.bench.register()
        self.assertEqual(self.recorder.take(), [])
        self.assertEqual(self.connection.killed, [])


class MessagesTests(_LinkTests):
    """What comes in, commsmgr.v1."""

    def setUp(self) -> None:
        super().setUp()
        # As the real ones are to each other, and quicker to reach.
        self.patch(answers, "ASK_FROM", ASK_FROM)
        self.patch(answers, "MOST_UNREAD", MOST_UNREAD)

    def test_command(self) -> None:
        """A command goes to the intake and is not acknowledged by itself, even before the registration is answered."""
        self.bench.say(COMMAND)
        self.assertEqual(self.recorder.take(), [("command", "c1")])
        pass_time(self.clock)
        self.assertEqual(self.connection.texts("ack"), [])

    def test_acks_are_coalesced(self) -> None:
        """All commands acknowledged in one turn of the reactor share one ack; the next turn has its own."""
        self.registered()
        for command_id in ("c1", "c2", "c3"):
            self.link.acknowledge(command_id)
        self.assertEqual(self.connection.texts("ack"), [])
        pass_time(self.clock)
        self.link.acknowledge("c4")
        pass_time(self.clock)
        self.assertEqual([message["ids"] for message in self.connection.texts("ack")], [["c1", "c2", "c3"], ["c4"]])
        self.assertEqual(self.messages("ack", "out", "ok"), 2)

    def test_refuse(self) -> None:
        """A command that was not taken is answered with its reason, and when to try again."""
        self.registered()
        self.assertTrue(self.link.refuse("c1", "full", "later", 5.0))
        (message,) = self.connection.texts("nack")
        self.assertEqual((message["id"], message["data"]["code"], message["data"]["retry_after"]), ("c1", "full", 5.0))

    def test_after_the_end(self) -> None:
        """
        Nothing is said on a link that is gone, and a refusal counts as said: what is not acknowledged comes again, and
        would never be run if it were answered with a result.
        """
        self.registered()
        self.link.acknowledge("c1")
        self.link.ended()
        self.link.acknowledge("c2")
        self.assertTrue(self.link.refuse("c3", "full", "later", None))
        pass_time(self.clock, 1)
        self.assertEqual(self.connection.wire, [])

    def test_reply(self) -> None:
        """A ping by message is answered at once with its id."""
        self.bench.say({"type": "ping", "id": "p9"})
        self.assertEqual([message["id"] for message in self.connection.texts("pong")], ["p9"])

    def test_many_acks(self) -> None:
        """Of a multitude that is stored in one turn each ack takes so many, and none is forgotten or named twice."""
        self.registered()
        ids = [f"c{number}" for number in range(2 * MOST_IDS + 1)]
        for command_id in ids:
            self.link.acknowledge(command_id)
        pass_time(self.clock)
        acks = [message["ids"] for message in self.connection.texts("ack")]
        self.assertEqual([len(each) for each in acks], [MOST_IDS, MOST_IDS, 1])
        self.assertEqual([command_id for each in acks for command_id in each], ids)

    def ask(self) -> None:
        self.bench.say({"type": "ping", "id": "p" * 200})

    def acknowledge(self) -> None:
        for number in range(10):
            self.link.acknowledge(f"{number:0200}")
        pass_time(self.clock)

    def refuse(self) -> None:
        self.link.refuse("c1", "busy", "n" * 200, 5.0)

    def refuse_malformed(self) -> None:
        self.bench.say({"type": "command", "id": "c" * 200, "data": 5})

    def report(self) -> None:
        self.link.report_losses(LossReport(id="l" * 200, losses=[]))

    def written(self, ask: Callable[[], None]) -> tuple[int, list[bytes]]:
        """Make the link write; return what that weighs, and the pings among it."""
        ask()
        taken = self.connection.take()
        weight = sum(len(encoded(message)) + FRAME for kind, message in taken if kind == "text")
        return weight, [payload for kind, payload in taken if kind == "ping"]

    def test_a_peer_that_does_not_read(self) -> None:
        """Whatever it makes us write, one ping asks whether it reads, and so much unread ends the link, not less."""
        for answer in (self.ask, self.acknowledge, self.refuse, self.refuse_malformed, self.report):
            self.registry = CollectorRegistry()
            self.bench = self.open()
            self.link, self.connection = self.bench.link, self.bench.connection
            self.registered()
            unread = most = 0
            asked = []
            while not self.connection.killed:
                weight, pings = self.written(answer)
                most = max(most, weight)
                unread += weight
                self.assertLess(unread, 2 * MOST_UNREAD)
                asked += [unread] * len(pings)
            (at,) = asked
            self.assertTrue(ASK_FROM <= at < ASK_FROM + most, at)
            self.assertTrue(MOST_UNREAD - most < unread <= MOST_UNREAD, unread)
            (error,) = self.connection.killed
            self.assertIsInstance(error, PeerSilent)
            self.assertIn("does not read", str(error))
            self.link.ended()

    def test_a_peer_that_reads(self) -> None:
        """One that answers those pings may ask for as much as it likes, and is asked once for each so many bytes."""
        self.registered()
        total = count = 0
        while total < 2 * MOST_UNREAD:
            weight, pings = self.written(self.ask)
            total += weight
            count += len(pings)
            for ping in pings:
                self.bench.pong(ping)
        self.assertEqual(self.connection.killed, [])
        self.assertIn(count, range(30, 33))

    def test_what_a_pong_proves(self) -> None:
        """A pong proves that what went before its ping is read, and nothing of what went after it; strays nothing."""
        self.registered()
        pass_time(self.clock, 20)
        ((_, earlier),) = self.connection.take()
        pings: list[bytes] = []
        while not pings:
            _, pings = self.written(self.ask)
        self.bench.pong(b"stray")
        self.bench.pong(earlier)
        unread = 0
        while unread < MOST_UNREAD - 2 * ASK_FROM:
            weight, none = self.written(self.ask)
            self.assertEqual(none, [])
            unread += weight
        self.bench.pong(pings[0])
        weight, pings = self.written(self.ask)
        self.assertEqual(len(pings), 1)
        while not self.connection.killed:
            unread += weight
            weight, _ = self.written(self.ask)
        self.assertTrue(MOST_UNREAD - 1000 < unread <= MOST_UNREAD, unread)

    def test_a_peer_that_asks_little_and_never_reads(self) -> None:
        """In the end the keep-alive gives it up, though bytes come from it all the time."""
        self.registered()
        while not self.written(self.ask)[1]:
            pass
        for _ in range(61):
            pass_time(self.clock, 1)
            self.bench.say({"type": "ping", "id": "p"})
        self.assertIsInstance(self.connection.killed[0], PeerSilent)

    def test_push_and_settings(self) -> None:
        """A message of an unknown type goes to the agent, intervals go to the schedules."""
        self.registered()
        self.bench.say({"type": "config_update", "id": "x", "data": {}})
        self.bench.say({"type": "settings", "data": {"heartbeat_interval": 10}})
        self.assertEqual(self.recorder.take(), [("pushed", "config_update"), ("settings", 10.0)])
        self.assertEqual(self.messages("push", "in", "ok"), 1)

    def test_settings_before_the_registration(self) -> None:
        """Whoever has not registered us has no say over our intervals."""
        self.bench.say({"type": "settings", "data": {"heartbeat_interval": 10}})
        self.bench.register()
        self.assertEqual(self.recorder.take(), [("registered",)])

    def test_invalid(self) -> None:
        """What cannot be used is counted each time, logged once in a burst, and the link lives on."""
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        for _ in range(5):
            self.bench.say(b"not json")
        logged = [event for event in events if event.get("event") == "link.invalid"]
        self.assertEqual(len(logged), 1)
        self.assertEqual(self.count("invalid_messages_total", reason=logged[0]["reason"]), 5)
        self.assertEqual(self.connection.killed, [])

    def test_nothing_is_handled_after_the_end(self) -> None:
        """When what a message meant ended the link, what else it meant is not acted upon."""
        self.bench.on_registered = self.link.ended
        self.bench.register()
        self.bench.say(COMMAND)
        self.assertEqual(self.recorder.take(), [])

    def test_traffic(self) -> None:
        """Bytes are counted both ways."""
        self.registered()
        before = self.count("bytes_total", direction="in", transport="websocket")
        self.bench.say(b'{"type":"pong"}')
        self.assertEqual(self.count("bytes_total", direction="in", transport="websocket") - before, 15)
        out = self.count("bytes_total", direction="out", transport="websocket")
        self.send(1)
        self.assertGreater(self.count("bytes_total", direction="out", transport="websocket"), out)

    def test_goaway(self) -> None:
        """A goaway is told to the owner once, with its times."""
        self.registered()
        self.bench.goaway(5, 10)
        self.bench.goaway(6, 11)
        (notice,) = self.bench.going
        self.assertEqual((notice.reconnect_after, notice.window), (5, 10))


class ReceiptsV1Tests(_LinkTests):
    """Results and acks."""

    def setUp(self) -> None:
        super().setUp()
        self.registered()

    def test_sent_in_order_without_ping(self) -> None:
        """Results are sent as stored, in order; commsmgr.v1 needs no ping for a receipt."""
        self.send(1, 2)
        self.send(3)
        self.assertEqual(self.connection.results(), ["e1", "e2", "e3"])
        self.assertEqual(self.connection.pings(), [])
        message = self.connection.texts("command_result")[0]
        self.assertEqual((message["data"], message["timestamp"]), ({"a": 1}, "now"))
        self.assertEqual(self.link.in_flight, 3)

    def test_fresh(self) -> None:
        """No id is in flight twice, be it the same entry or another one: a receipt could not tell the two apart."""
        entries = [entry(seq, id=name) for seq, name in ((1, "e1"), (2, "e2"), (3, "e3"), (9, "e1"), (10, "e3"))]
        self.assertEqual([each.seq for each in self.link.fresh(entries)], [1, 2, 3])
        self.assertEqual(self.link.fresh(entries[:3]), entries[:3])
        self.send(1, 2)
        self.assertEqual([each.seq for each in self.link.fresh(entries)], [3])
        self.assertEqual([each.seq for each in self.link.fresh(entries[:3])], [3])
        self.bench.ack("e1")
        self.assertEqual([each.seq for each in self.link.fresh(entries)], [1, 3])

    def test_acks(self) -> None:
        """An ack is the receipt of what it names and of nothing else, and proves the backend."""
        self.send(1, 2, 3)
        self.bench.ack("e1", "e3")
        self.assertEqual(self.recorder.take(), [("receipts", [1, 3])])
        self.assertEqual(self.link.in_flight, 1)
        self.assertEqual(self.count("seconds_since_receipt", backend="one"), 0.0)
        self.assertEqual(self.messages("ack", "in", "stray"), 0)

    def test_stray_ack(self) -> None:
        """Ids that are not in flight are counted and give no receipt."""
        self.send(1)
        self.bench.ack("e1", "e1x")
        self.bench.ack("e1")
        self.assertEqual(self.recorder.take(), [("receipts", [1])])
        self.assertEqual(self.messages("ack", "in", "stray"), 2)

    def test_nack(self) -> None:
        """A nack takes its message out of flight and goes to the owner, with or without a time."""
        self.send(1, 2)
        self.bench.nack("e2", retry_after=7)
        self.bench.nack("e1")
        self.assertEqual(self.recorder.take(), [("refused", 2, "busy", 7.0), ("refused", 1, "busy", None)])
        self.assertEqual(self.link.in_flight, 0)

    def test_what_answers_us(self) -> None:
        """Receipts and refusals of what was sent do not count for the rate; a second one, and strays, do."""
        self.send(1, 2, 3, 4)
        self.bench.ack("e1", "e2")
        self.bench.ack("e3", "stray")
        self.bench.nack("e4")
        self.assertEqual(self.connection.answers, 3)
        self.bench.ack("e1", "e2")
        self.bench.nack("e4")
        self.bench.say({"type": "ping", "id": "p"})
        self.assertEqual(self.connection.answers, 3)

    def test_stray_nack(self) -> None:
        """A nack of what is not in flight is counted and nothing else."""
        self.bench.nack("e9")
        self.assertEqual(self.recorder.take(), [])
        self.assertEqual(self.messages("nack", "in", "stray"), 1)

    def test_loss_receipt(self) -> None:
        """A loss receipt takes no room in the window, and its answers go to whoever reports losses, not to the lane."""
        room = self.link.room
        self.link.report_losses(LossReport(id="l1", losses=[]))
        (message,) = self.connection.texts("loss_receipt")
        self.assertEqual((message["id"], message["data"], self.link.room), ("l1", {"losses": []}, room))
        self.assertEqual((self.link.in_flight, self.messages("loss_receipt", "out", "ok")), (0, 1))
        for _ in range(5):  # longer than receipt_timeout
            pass_time(self.clock, 15)
            self.link.heard()
        self.assertEqual(self.connection.killed, [], "no receipt is waited for")
        self.send(1)
        self.bench.nack("l1", retry_after=3)
        self.bench.ack("l1", "e1")
        self.assertEqual(
            self.recorder.take(), [("losses-refused", "l1", 3.0), ("losses-acked", "l1"), ("receipts", [1])]
        )
        self.assertEqual((self.messages("ack", "in", "stray"), self.messages("nack", "in", "stray")), (0, 0))

    def test_window(self) -> None:
        """The window bounds messages and bytes, a receipt makes room, and one large message passes alone."""
        self.assertTrue(self.link.admits(10_000))
        self.assertEqual(self.link.room, (4, 100))
        self.send(1, 2, body=b'"' + b"x" * 38 + b'"')
        self.assertEqual(self.link.room, (2, 20))
        self.assertEqual([self.link.admits(size) for size in (20, 21)], [True, False])
        self.bench.ack("e1")
        self.assertTrue(self.link.admits(21))
        self.send(3, 4, 5, body=b"1")
        self.assertEqual((self.link.room[0], self.link.admits(1)), (0, False))

    def test_the_end_returns_what_has_no_receipt(self) -> None:
        """What was in flight is counted at the end and never receipted afterwards."""
        self.send(1, 2)
        self.bench.ack("e1")
        self.recorder.take()
        self.assertEqual(self.link.ended(), 1)
        self.bench.ack("e2")
        self.assertEqual(self.recorder.take(), [])
        self.assertFalse(self.link.sendable)

    def test_stuck(self) -> None:
        """Results in flight without any receipt for receipt_timeout end the link, though the backend answers pings."""
        self.send(1)
        for _ in range(59):
            pass_time(self.clock, 1)
            self.bench.say({"type": "ping", "id": "p"})
        self.assertEqual(self.connection.killed, [])
        pass_time(self.clock, 1)
        (error,) = self.connection.killed
        self.assertIsInstance(error, PeerSilent)
        self.assertIn("1 results in flight", str(error))

    def test_progress_puts_the_bound_off(self) -> None:
        """Any receipt or refusal begins the time anew; so does sending into an empty window."""
        pass_time_alive(self, 300)
        self.send(1, 2, 3)
        pass_time_alive(self, 50)
        self.bench.ack("e1")
        pass_time_alive(self, 50)
        self.bench.nack("e2")
        pass_time_alive(self, 50)
        self.send(4)  # no progress: e3 has waited for 50 s of its 60
        self.assertEqual(self.connection.killed, [])
        pass_time_alive(self, 10)
        self.assertEqual(len(self.connection.killed), 1)


def pass_time_alive(test: Any, seconds: int) -> None:
    """Let time pass at a backend that says something every second."""
    for _ in range(seconds):
        pass_time(test.clock, 1)
        test.link.heard()
        if test.connection.pings():
            test.link.pong(test.connection.pings()[-1])


class ShortReceiptTimeoutTests(_LinkTests):
    """A receipt_timeout shorter than the keep-alive's interval."""

    settings: ClassVar[dict[str, Any]] = {"receipt_timeout": 5.0}

    def test_stuck_in_time(self) -> None:
        """The bound holds to the moment, whenever the keep-alive would have looked next."""
        self.registered()
        pass_time(self.clock, 1)
        self.send(1)
        pass_time(self.clock, 4.9)
        self.assertEqual(self.connection.killed, [])
        pass_time(self.clock, 0.2)
        self.assertEqual(len(self.connection.killed), 1)


class ReceiptsPlainTests(_LinkTests):
    """Results and barriers."""

    v1 = False

    def setUp(self) -> None:
        super().setUp()
        self.registered()

    def test_ping_follows_at_once(self) -> None:
        """On a quiet link one ping follows the messages, and its pong is their receipt."""
        self.send(1, 2)
        self.assertEqual([kind for kind, _ in self.connection.wire], ["text", "text", "ping"])
        self.bench.pong()
        self.assertEqual(self.recorder.take(), [("receipts", [1, 2])])
        self.assertEqual(self.link.in_flight, 0)

    def test_sent_while_a_ping_is_under_way(self) -> None:
        """What is sent meanwhile gets no ping of its own; the pong receipts the first batch and pings for the rest."""
        self.send(1)
        self.send(2)
        self.send(3)
        self.assertEqual(len(self.connection.pings()), 1)
        self.bench.pong()
        self.assertEqual(self.recorder.take(), [("receipts", [1])])
        self.assertEqual(len(self.connection.pings()), 2)
        self.bench.pong()
        self.assertEqual(self.recorder.take(), [("receipts", [2, 3])])
        self.assertEqual(len(self.connection.pings()), 2)

    def test_stray_pongs(self) -> None:
        """Pongs that answer no ping of this connection receipt nothing, nor does a second one."""
        self.send(1)
        ping = self.connection.pings()[0]
        for stray in (b"", b"nonce!", b"other!" + ping[6:], ping[:-1] + b"\x02"):
            self.bench.pong(stray)
        self.assertEqual((self.recorder.take(), self.connection.answers), ([], 0))
        self.bench.pong()
        self.bench.pong(ping)
        self.assertEqual(self.connection.answers, 1)
        self.assertEqual(self.recorder.take(), [("receipts", [1])])

    def test_acks_are_no_receipts(self) -> None:
        """In the plain dialect an ack is a message like any other."""
        self.send(1)
        self.bench.ack("e1")
        self.assertEqual(self.recorder.take(), [("pushed", "ack")])
        self.assertEqual(self.link.in_flight, 1)

    def test_nothing_to_say_to_commands(self) -> None:
        """Commands are neither acknowledged nor refused."""
        self.link.acknowledge("c1")
        self.assertFalse(self.link.refuse("c1", "full", "", None))
        pass_time(self.clock, 1)
        self.assertEqual(self.connection.wire, [])

    def test_keep_alive_pings_are_barriers(self) -> None:
        """A keep-alive ping receipts what was sent before it."""
        self.send(1)
        pings = self.connection.pings()
        self.send(2)
        pass_time(self.clock, 20)
        self.assertEqual(len(self.connection.pings()), 1)
        self.link.heard()
        self.bench.pong(pings[0])
        self.assertEqual(len(self.connection.pings()), 2)

    def test_no_pong(self) -> None:
        """Without the pong the link ends, for the keep-alive waits for the same ping."""
        self.send(1)
        pass_time(self.clock, 40)
        self.assertIsInstance(self.connection.killed[0], PeerSilent)
        self.assertEqual(self.recorder.take(), [])


class FullBatchTests(_LinkTests):
    """A busy plain link."""

    v1 = False
    settings: ClassVar[dict[str, Any]] = {"window_messages": 1000, "window_bytes": 1 << 20}

    def test_a_full_batch_does_not_wait(self) -> None:
        """A full batch gets its ping although another one is in the air; the last pong receipts everything."""
        self.registered()
        self.send(0)
        self.send(*range(1, 251))
        self.assertEqual(len(self.connection.pings()), 2)
        self.bench.pong()
        ((_, seqs),) = self.recorder.take()
        self.assertEqual(seqs, list(range(201)))
        self.bench.pong()
        ((_, seqs),) = self.recorder.take()
        self.assertEqual(seqs, list(range(201, 251)))


class KeepAliveTests(_LinkTests):
    """Whether the peer lives."""

    def setUp(self) -> None:
        super().setUp()
        self.registered()

    def test_ping_and_pong(self) -> None:
        """Silence is answered with a ping after ping_interval; a pong keeps the link for as long as you like."""
        pass_time(self.clock, 19.9)
        self.assertEqual(self.connection.pings(), [])
        pass_time(self.clock, 0.1)
        for _ in range(20):
            self.bench.pong()
            pass_time(self.clock, 20)
        self.assertGreater(len(self.connection.pings()), 15)
        self.assertEqual((self.connection.killed, self.recorder.take()), ([], []))

    def test_dead(self) -> None:
        """A peer that is silent for ping_timeout after the ping is given up."""
        pass_time(self.clock, 29.9)
        self.assertEqual(self.connection.killed, [])
        pass_time(self.clock, 0.2)
        self.assertIsInstance(self.connection.killed[0], PeerSilent)
        self.assertIn("silent", str(self.connection.killed[0]))

    def test_heard(self) -> None:
        """Any byte counts as life."""
        for _ in range(100):
            pass_time(self.clock, 5)
            self.link.heard()
            if self.connection.pings():
                self.bench.pong()
        self.assertEqual(self.connection.killed, [])

    def test_closing_is_left_to_the_connection(self) -> None:
        """A ping that cannot be sent any more kills nothing: whatever closes the connection has its reason and time."""
        self.connection.is_open = False
        pass_time(self.clock, 60)
        self.assertEqual(self.connection.killed, [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_killed_within_the_ping(self) -> None:
        """A link that ends while it pings sets no further timer."""
        self.patch(self.connection, "ping", lambda payload: bool(self.link.ended()) or True)
        pass_time(self.clock, 20)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class DrainTests(_LinkTests):
    """The end of a link."""

    def setUp(self) -> None:
        super().setUp()
        self.registered()

    def test_nothing_in_flight(self) -> None:
        """With nothing in flight it is drained at once, and takes nothing more."""
        self.assertEqual(self.successResultOf(self.link.drain()), 0)
        self.assertFalse(self.link.sendable)

    def test_receipts_are_waited_for(self) -> None:
        """It is drained with the last receipt, or refusal, for everybody who waits."""
        self.send(1, 2, 3)
        first, second = self.link.drain(), self.link.drain()
        self.bench.ack("e1", "e2")
        self.assertNoResult(first)
        self.bench.nack("e3")
        self.assertEqual((self.successResultOf(first), self.successResultOf(second)), (0, 0))

    def test_the_connection_ends(self) -> None:
        """When the connection ends first, it tells how many got no receipt."""
        self.send(1, 2)
        waiting = self.link.drain()
        self.link.ended()
        self.assertEqual(self.successResultOf(waiting), 2)
        self.assertEqual(self.successResultOf(self.link.drain()), 0)

    def test_cancelled(self) -> None:
        """Who gives up waiting hinders nobody else."""
        self.send(1)
        first, second = self.link.drain(), self.link.drain()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.bench.ack("e1")
        self.assertEqual(self.successResultOf(second), 0)

    def test_acks_go_out_first(self) -> None:
        """What was stored in this very turn is acknowledged before the goodbye, and once."""
        self.link.acknowledge("c1")
        self.link.drain()
        self.assertEqual([message["ids"] for message in self.connection.texts("ack")], [["c1"]])
        pass_time(self.clock, 1)
        self.link.drain()
        self.assertEqual(len(self.connection.texts("ack")), 1)

    def test_commands_are_acknowledged_while_draining(self) -> None:
        """A command that comes during the goodbye and is stored is acknowledged."""
        self.send(1)
        self.link.drain()
        self.link.acknowledge("c1")
        pass_time(self.clock)
        self.assertEqual(len(self.connection.texts("ack")), 1)

    def test_a_backend_that_gives_no_receipt(self) -> None:
        """Draining has the bound of everything in flight: receipt_timeout."""
        self.send(1)
        self.link.drain()
        pass_time_alive(self, 60)
        self.assertEqual(len(self.connection.killed), 1)

    def test_close(self) -> None:
        """The goodbye is a normal closure."""
        self.link.close()
        self.assertEqual(self.connection.closed, [1000])
