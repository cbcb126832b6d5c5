"""Whatever a peer says: nothing but a message or a named mistake comes of it, and the conversation goes on."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any, ClassVar, get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config, messages
from commsmgr.backend.plain import LooseResult, Undecodable
from commsmgr.backend.plain import decode as decode_body
from commsmgr.errors import PeerViolation
from commsmgr.messages import FromAgent, FromBackend, HeartbeatAnswer, LossReport, LossRow, Push
from commsmgr.observe.metrics import Metrics
from commsmgr.session.conversation import Invalid, Registered
from commsmgr.session.wire import Decoder, Malformed, decode_old_result, encode
from tests import test_heartbeats
from tests.link_kit import LinkBench, Recorder, conversation, entry, pass_time
from tests.strategies import INBOUND, Payloads, broken, encoded, hostile, payloads, repeatable, valid
from tests.test_heartbeats import answer

UNIONS: dict[str, Any] = {"agent": FromBackend, "backend": FromAgent}

ANSWERED = get_args(FromBackend)


@cache
def decoder(union: Any, max_bytes: int = 1 << 20) -> Decoder[Any]:
    """Return a decoder."""
    return Decoder(union, max_bytes=max_bytes, max_depth=10)


def says(said: Any, meant: Any) -> bool:
    """Whether a message, or a part of one, has everything that is in ``meant``; it may have defaults beside."""
    if isinstance(said, msgspec.Raw):
        return says(json.loads(bytes(said)), meant)
    if isinstance(said, msgspec.Struct) and isinstance(meant, dict):
        tag = said.__struct_config__.tag_field
        return all(says(said.__struct_config__.tag if key == tag else getattr(said, key), meant[key]) for key in meant)
    if isinstance(said, list) and isinstance(meant, list):
        return len(said) == len(meant) and all(map(says, said, meant))
    return bool(said == meant)


class StrategyTests(SynchronousTestCase):
    """The strategies are what they say."""

    def test_every_type(self) -> None:
        """Every message type has a strategy, on both sides, and its good values fit while its broken ones do not."""
        for kinds in INBOUND.values():
            for kind in kinds:
                self.both(kind)

    def both(self, kind: type) -> None:
        @repeatable(12)
        @given(valid(kind), broken(kind))
        def fits(good: Any, bad: Any) -> None:
            msgspec.json.decode(encoded(good), type=kind)
            self.assertRaises(msgspec.ValidationError, msgspec.json.decode, encoded(bad), type=kind)

        fits()

    def test_none_is_missing(self) -> None:
        """Every type that bears a tag is among those that one side or the other takes."""
        tagged = {
            kind
            for kind in vars(messages).values()
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None
        }
        self.assertGreater(len(tagged), 10)
        self.assertEqual(tagged - {kind for kinds in INBOUND.values() for kind in kinds}, set())

    def test_a_new_type(self) -> None:
        """A type that nobody has thought of has a strategy by itself."""

        part = msgspec.defstruct(
            "Part", [("size", messages.Percent | None, None), ("words", dict[str, list[int]], {}), ("flag", bool, True)]
        )
        self.both(msgspec.defstruct("Fresh", [("part", part), ("id", messages.Id)], tag="fresh"))


class DecoderTests(SynchronousTestCase):
    """Payloads, one by one."""

    def test_nothing_else(self) -> None:
        """A payload is a message, a push, or Malformed with a reason and a detail that can be logged; nothing else."""
        for side, union in UNIONS.items():
            self.taken_or_malformed(union, payloads(*INBOUND[side]))

    def taken_or_malformed(self, union: Any, sent: Payloads) -> None:
        @repeatable(200)
        @given(sent, st.booleans())
        def holds(payload: bytes, is_text: bool) -> None:
            try:
                message = decoder(union).decode(payload, is_text)
            except Malformed as error:
                self.assertRegex(error.reason, "^[a-z0-9-]+$")
                self.assertTrue(error.detail.isprintable() and len(error.detail) <= 300)
            else:
                self.assertTrue(is_text)
                self.assertIsInstance(message, (Push, *get_args(union)))

        holds()

    def test_valid(self) -> None:
        """A valid message decodes to what it says, and so does what is written of it."""
        for union in UNIONS.values():
            self.kept(union)

    def kept(self, union: Any) -> None:
        @repeatable(100)
        @given(st.one_of(*map(valid, get_args(union))))
        def holds(sent: Any) -> None:
            message = decoder(union).decode(encoded(sent), True)
            self.assertTrue(says(message, sent), (message, sent))
            self.assertEqual(decoder(union).decode(encode(message), True), message)

        holds()

    def test_broken(self) -> None:
        """A message with one wrong value is refused, whatever the value."""
        for union in UNIONS.values():
            self.refused(union)

    def refused(self, union: Any) -> None:
        @repeatable(120)
        @given(st.one_of(*map(broken, get_args(union))))
        def holds(sent: Any) -> None:
            self.assertRaises(Malformed, decoder(union).decode, encoded(sent), True)

        holds()

    @repeatable(120)
    @given(payloads(*INBOUND["backend"]))
    def test_bodies(self, payload: bytes) -> None:
        """A body that the reference backend is posted is what it should be, or Undecodable; nothing else."""
        for kind in (messages.Heartbeat, messages.Inventory, LooseResult):
            try:
                self.assertIsInstance(decode_body(payload, kind), kind)
            except Undecodable as error:
                self.assertTrue(str(error))
        decode_old_result(payload)


class HeartbeatAnswerTests(SynchronousTestCase):
    """Answers to a heartbeat."""

    def fixture(self) -> test_heartbeats.HeartbeatTests:
        fixture = test_heartbeats.HeartbeatTests("test_content")
        fixture.setUp()
        return fixture

    @repeatable(100)
    @given(payloads(HeartbeatAnswer))
    def test_nothing_else(self, body: bytes) -> None:
        """An answer is understood or a PeerViolation, and its commands are taken one by one."""
        fixture = self.fixture()
        waiting = fixture.send()
        fixture.requests.waiting[-1].callback(answer(body))
        outcomes: list[Any] = []
        waiting.addBoth(outcomes.append)
        (outcome,) = outcomes
        if not isinstance(outcome, HeartbeatAnswer):
            self.assertIsInstance(outcome.value, PeerViolation)
            self.assertEqual(fixture.commands, [])
        else:
            self.assertLessEqual(len(fixture.commands), len(outcome.commands))

    @repeatable(80)
    @given(
        valid(HeartbeatAnswer),
        st.lists(valid(messages.CommandEnvelope) | broken(messages.CommandEnvelope) | st.integers(), max_size=3),
    )
    def test_commands_among_others(self, sent: dict[str, Any], more: list[Any]) -> None:
        """A command that is wrong does not take the others with it."""
        good = sent.get("commands", [])
        taken = self.fixture()
        taken.answered(encoded({**sent, "commands": [*good, *more]}))
        fits = [each for each in more if self.fits(each)]
        self.assertEqual([command.id for command in taken.commands], [each["id"] for each in good + fits])

    def fits(self, command: Any) -> bool:
        try:
            msgspec.convert(command, messages.CommandEnvelope)
        except msgspec.ValidationError:
            return False
        return True


class ConversationTests(SynchronousTestCase):
    """A conversation, in both dialects."""

    @repeatable(100)
    @given(st.booleans(), st.lists(st.tuples(payloads(*ANSWERED), st.booleans()), max_size=12))
    def test_any_sequence(self, v1: bool, sent: list[tuple[bytes, bool]]) -> None:
        """Whatever comes in whatever order, it registers at most once, and what is wrong has a name."""
        talk = conversation(v1)
        talk.open()
        events = [event for payload, is_text in sent for event in talk.receive(payload, is_text)]
        self.assertLessEqual(sum(isinstance(event, Registered) for event in events), 1)
        for event in events:
            if isinstance(event, Invalid):
                self.assertTrue(event.reason and event.detail.isprintable())


class LinkModel:
    """
    One link, a backend that says anything, and time; and what is known of them from outside.

    :ivar sent: the numbers of the results that were sent.
    :ivar stored: the commands that are in the inbox.
    :ivar after_end: how many events there were when the connection ended; None before.
    """

    WINDOW: ClassVar[tuple[int, int]] = (5, 60)

    def __init__(self, case: SynchronousTestCase, v1: bool) -> None:
        self.case = case
        self.v1 = v1
        self.clock = Clock()
        self.clock.advance(1000)
        self.recorder = Recorder()
        self.sent: list[int] = []
        self.stored: set[str] = set()
        self.after_end: int | None = None
        messages_bound, bytes_bound = self.WINDOW
        self.bench = LinkBench(
            self.clock,
            v1=v1,
            settings=config.WebSocket(window_messages=messages_bound, window_bytes=bytes_bound),
            metrics=Metrics(CollectorRegistry(), seconds=self.clock.seconds),
            events=self.recorder.events,
        )
        self.link, self.connection = self.bench.link, self.bench.connection

    @property
    def settled(self) -> list[int]:
        """The numbers of the results of which the backend has said what became of them."""
        found: list[int] = []
        for what, *rest in self.recorder.log:
            found += rest[0] if what == "receipts" else [rest[0]] if what == "refused" else []
        return found

    # -- what happens -----------------------------------------------------------------------------------------------

    def told(self, payload: bytes, is_text: bool = True) -> None:
        """The backend sends a message."""
        self.link.heard()
        self.link.received(payload, is_text)

    def registered(self) -> None:
        """The backend answers the registration."""
        self.bench.register()

    def answered(self, which: int, refused: bool) -> None:
        """The backend speaks of a result, mostly of one in flight, now and then of one that is not, or not any more."""
        settled = self.settled
        candidates = [*(number for number in self.sent if number not in settled), *settled[-1:], 99]
        number = candidates[which % len(candidates)]
        if refused:
            self.bench.nack(f"e{number}")
        else:
            self.bench.ack(f"e{number}", f"e{number}", "stranger")

    def answered_losses(self, which: int, refused: bool) -> None:
        """The backend speaks of a loss receipt, the latest one or another."""
        receipts = [message["id"] for message in self.connection.texts("loss_receipt")]
        if receipts:
            said = receipts[-1 - which % len(receipts)]
            (self.bench.nack if refused else self.bench.ack)(said)

    def ponged(self, which: int) -> None:
        """The backend answers a ping, not always the last one. A connection that is gone hands on no more pongs."""
        pings = self.connection.pings()
        if pings and self.after_end is None:
            self.bench.pong(pings[-1 - which % len(pings)])

    def ponged_nonsense(self, payload: bytes) -> None:
        """The backend sends a pong that nobody asked for."""
        if self.after_end is None:
            self.bench.pong(payload)

    def sends(self, sizes: list[int]) -> None:
        """The agent has results."""
        for size in sizes:
            if self.link.sendable and self.link.admits(size + 8):
                self.sent.append(len(self.sent))
                self.link.send([entry(self.sent[-1], b'{"a":"%s"}' % (b"x" * size))], "now")

    def stores(self, which: int) -> None:
        """A command is in the inbox."""
        commands = [rest[0] for what, *rest in self.recorder.log if what == "command"]
        if commands:
            chosen = commands[-1 - which % len(commands)]
            self.stored.add(chosen)
            self.link.acknowledge(chosen)

    def refuses(self, which: int) -> None:
        """There is no room for a command."""
        self.link.refuse(f"c{which}", "full", "no room", 1.0)

    def reports_losses(self, which: int) -> None:
        """The agent has given something up."""
        row = LossRow(reason="expired", kind="inventory", count=1, first_at="a", last_at="b")
        self.link.report_losses(LossReport(id=f"loss-{which}", losses=[row]))

    def waits(self, seconds: float) -> None:
        """Time passes."""
        pass_time(self.clock, seconds)

    def drains(self) -> None:
        """The agent is about to stop."""
        self.link.drain()

    def ends(self) -> None:
        """The connection is gone."""
        if self.after_end is None:
            self.connection.is_open = False
            expected = self.link.in_flight
            self.case.assertEqual(self.link.ended(), expected, "in flight at the end")
            self.after_end = len(self.recorder.log)

    # -- what is true all the time ----------------------------------------------------------------------------------

    def check(self) -> None:
        """See that the promises are kept."""
        if self.connection.killed:
            # As the connection does: it is gone a moment after it was told to go.
            self.ends()
        case, settled = self.case, self.settled
        case.assertEqual(len(settled), len(set(settled)), "a receipt came twice")
        case.assertLessEqual(set(settled), set(self.sent), "a receipt for what was not sent")
        room = self.link.room
        case.assertTrue(0 <= room[0] <= self.WINDOW[0] and 0 <= room[1] <= self.WINDOW[1], room)
        if self.after_end is None:
            case.assertEqual(self.link.in_flight, len(self.sent) - len(settled), "what is in flight was sent")
            case.assertLessEqual(self.link.in_flight, self.WINDOW[0], "more is in flight than allowed")
        else:
            case.assertEqual(self.recorder.log[self.after_end :], [], "events after the end")
        acked = {each for message in self.connection.texts("ack") for each in message["ids"]}
        case.assertLessEqual(acked, self.stored, "a command was acknowledged that is not stored")
        if not self.v1:
            words = self.connection.texts("ack") + self.connection.texts("nack")
            case.assertEqual(words, [], "words that the plain dialect does not have")


def step(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Return a strategy for one step of a model."""
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


FEW = st.integers(0, 6)
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4)

STEPS = st.one_of(
    step("told", payload=payloads(*ANSWERED)),
    step("told", payload=payloads(*ANSWERED), is_text=st.booleans()),
    step("told", payload=FEW.map(lambda number: encoded({"type": "command", "id": f"c{number}", "data": {}}))),
    step("registered"),
    step("answered", which=FEW, refused=st.booleans()),
    step("answered", which=st.just(0), refused=st.just(False)),
    step("answered_losses", which=FEW, refused=st.booleans()),
    step("ponged", which=FEW),
    step("ponged", which=st.just(0)),
    step("ponged_nonsense", payload=st.binary(max_size=20)),
    step("sends", sizes=SIZES),
    step("sends", sizes=SIZES),
    step("stores", which=FEW),
    step("refuses", which=FEW),
    step("reports_losses", which=FEW),
    step("waits", seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0])),
)

LAST = st.one_of(step("ends"), step("drains"), step("waits", seconds=st.just(90.0)))


class LinkTests(SynchronousTestCase):
    """A whole link on a virtual clock."""

    def play(self, v1: bool) -> Counter[str]:
        """Play many conversations; return what came of them, how often."""
        seen: Counter[str] = Counter()
        errors: list[str] = []

        def observe(event: LogEvent) -> None:
            if event["log_level"] >= LogLevel.error:
                errors.append(formatEvent(event))

        @repeatable(80)
        @given(st.integers(0, 7), st.lists(STEPS, min_size=10, max_size=30), LAST, st.lists(STEPS, max_size=5))
        def holds(luck: int, steps: list[Any], last: Any, more: list[Any]) -> None:
            model = LinkModel(self, v1)
            # Most of what can go wrong does so when results may be sent.
            beginning = [("registered", {}), ("sends", {"sizes": [0, 0]})] if luck < 7 else []
            for name, arguments in [*beginning, *steps, last, *more, ("ends", {})]:
                getattr(model, name)(**arguments)
                model.check()
            self.assertEqual(model.clock.getDelayedCalls(), [], "timers are left")
            self.assertEqual(errors, [], "logged as errors")
            seen.update(what for what, *_ in model.recorder.log)
            seen.update(message["type"] for what, message in model.connection.wire if what == "text")
            seen["killed"] += len(model.connection.killed)

        globalLogPublisher.addObserver(observe)
        try:
            holds()
        finally:
            globalLogPublisher.removeObserver(observe)
        return seen

    def test_v1(self) -> None:
        """A commsmgr.v1 link outlives any backend: nothing is settled twice, acked unstored, or heard after the end."""
        seen = self.play(True)
        # Without these, the promises would have been kept for want of an occasion.
        for what in ("registered", "command", "receipts", "refused", "losses-acked", "ack", "nack", "pong", "killed"):
            self.assertGreater(seen[what], 0, seen)

    def test_plain(self) -> None:
        """So does a plain one."""
        seen = self.play(False)
        for what in ("registered", "command", "receipts", "pushed", "pong", "killed"):
            self.assertGreater(seen[what], 0, seen)


class HostileTests(SynchronousTestCase):
    """The hostile strategy is hostile."""

    def test_reaches_every_reason(self) -> None:
        """Every reason for refusing a text is reached by what it makes."""
        reasons: set[str] = set()

        @repeatable(400)
        @given(hostile(*get_args(FromBackend)))
        def notes(payload: bytes) -> None:
            try:
                decoder(FromBackend, 65536).decode(payload, True)
            except Malformed as error:
                reasons.add(error.reason)

        notes()
        wanted = {"oversized", "not-utf8", "not-json", "too-deep", "not-object", "no-type", "bad-fields"}
        self.assertEqual(wanted - reasons, set())
