"""Whatever a peer says: nothing but a message or a named mistake comes of it, and the conversation goes on."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, ClassVar, get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
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
from tests import test_reports
from tests.link_kit import LinkBench, Recorder, conversation, entry, pass_time
from tests.strategies import INBOUND, Payloads, broken, encoded, hostile, payloads, repeatable, valid
from tests.test_reports import answer

UNIONS: dict[str, Any] = {"agent": FromBackend, "backend": FromAgent}

ANSWERED = get_args(FromBackend)


@cache
def decoder(union: Any, max_bytes: int = 1 << 20) -> Decoder[Any]:
    """Return a decoder."""
    return Decoder(union, max_bytes=max_bytes, max_depth=10)


def says(said: Any, meant: Any) -> bool:
    """Whether everything in ``meant`` is in ``said`` too; it may have defaults beside."""
    if isinstance(meant, dict) and isinstance(said, dict):
        return all(key in said and says(said[key], value) for key, value in meant.items())
    if isinstance(meant, list) and isinstance(said, list):
        return len(meant) == len(said) and all(map(says, said, meant))
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
            self.assertTrue(says(json.loads(encode(message)), sent), (message, sent))
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

    def fixture(self) -> test_reports.HeartbeatTests:
        fixture = test_reports.HeartbeatTests("test_content")
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


class LinkMachine(RuleBasedStateMachine):
    """
    One link, a backend that says anything, and time.

    The model is what is in flight by what was sent and what was said of it.
    """

    v1: ClassVar[bool]
    window: ClassVar[tuple[int, int]] = (5, 60)

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[LogEvent] = []
        globalLogPublisher.addObserver(self._observe)
        self.clock = Clock()
        self.clock.advance(1000)
        self.recorder = Recorder()
        self.sent: list[int] = []
        self.stored: set[str] = set()
        self.after_end: int | None = None

    def _observe(self, event: LogEvent) -> None:
        if event["log_level"] >= LogLevel.error:
            self.errors.append(event)

    @initialize()
    def opens(self) -> None:
        messages_bound, bytes_bound = self.window
        self.bench = LinkBench(
            self.clock,
            v1=self.v1,
            settings=config.WebSocket(window_messages=messages_bound, window_bytes=bytes_bound),
            metrics=Metrics(CollectorRegistry(), seconds=self.clock.seconds),
            events=self.recorder.events,
        )
        self.link, self.connection = self.bench.link, self.bench.connection

    @property
    def settled(self) -> list[int]:
        found: list[int] = []
        for what, *rest in self.recorder.log:
            found += rest[0] if what == "receipts" else [rest[0]] if what == "refused" else []
        return found

    @rule(payload=payloads(*ANSWERED), is_text=st.integers(0, 9).map(bool))
    def is_told(self, payload: bytes, is_text: bool) -> None:
        self.link.heard()
        self.link.received(payload, is_text)

    @rule()
    def is_registered(self) -> None:
        self.bench.register()

    @rule(number=st.integers(0, 30), refused=st.booleans(), twice=st.booleans())
    def is_answered(self, number: int, refused: bool, twice: bool) -> None:
        for _ in range(1 + twice):
            if refused:
                self.bench.nack(f"e{number}")
            else:
                self.bench.ack(f"e{number}", f"e{number}", "stranger")

    @rule(which=st.integers(0, 3))
    def pongs(self, which: int) -> None:
        if pings := self.connection.pings():
            self.bench.pong(pings[-1 - which % len(pings)])

    @rule(payload=st.binary(max_size=20))
    def pongs_nonsense(self, payload: bytes) -> None:
        self.link.heard()
        self.link.pong(payload)

    @precondition(lambda self: self.link.sendable)
    @rule(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4))
    def sends(self, sizes: list[int]) -> None:
        for size in sizes:
            if self.link.sendable and self.link.admits(size + 8):
                self.sent.append(len(self.sent))
                self.link.send([entry(self.sent[-1], b'{"a":"%s"}' % (b"x" * size))], "now")

    @rule(number=st.integers(0, 3))
    def stores(self, number: int) -> None:
        commands = [rest[0] for what, *rest in self.recorder.log if what == "command"]
        if commands:
            chosen = commands[-1 - number % len(commands)]
            self.stored.add(chosen)
            self.link.acknowledge(chosen)

    @rule(number=st.integers(0, 3))
    def reports_losses(self, number: int) -> None:
        row = LossRow(reason="expired", kind="inventory", count=1, first_at="a", last_at="b")
        self.link.report_losses(LossReport(id=f"loss-{number}", losses=[row]))

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0, 70.0]))
    def waits(self, seconds: float) -> None:
        pass_time(self.clock, seconds)

    @rule()
    def drains(self) -> None:
        self.link.drain()

    @precondition(lambda self: self.after_end is None)
    @rule()
    def is_cut(self) -> None:
        self._end()

    def _end(self) -> None:
        self.connection.is_open = False
        expected = self.link.in_flight
        assert self.link.ended() == expected
        self.after_end = len(self.recorder.log)

    @invariant()
    def ends_when_killed(self) -> None:
        # As the connection does: it is gone a moment after it was told to go.
        if hasattr(self, "link") and self.connection.killed and self.after_end is None:
            self._end()

    @invariant()
    def keeps_its_promises(self) -> None:
        if not hasattr(self, "link"):
            return
        assert not self.errors, [formatEvent(event) for event in self.errors]
        settled = self.settled
        assert len(settled) == len(set(settled)), "a receipt came twice"
        assert set(settled) <= set(self.sent), "a receipt for what was not sent"
        room = self.link.room
        assert 0 <= room[0] <= self.window[0], room
        assert 0 <= room[1] <= self.window[1], room
        if self.after_end is None:
            assert self.link.in_flight == len(self.sent) - len(settled), "what is in flight is not what was sent"
            assert self.link.in_flight <= self.window[0], "more is in flight than allowed"
        else:
            assert len(self.recorder.log) == self.after_end, "events after the end"
        acked = {each for message in self.connection.texts("ack") for each in message["ids"]}
        assert acked <= self.stored, "a command was acknowledged that is not stored"
        if not self.v1:
            assert not acked and not self.connection.texts("nack"), "a word that the plain dialect does not have"

    def teardown(self) -> None:
        try:
            if hasattr(self, "link"):
                if self.after_end is None:
                    self._end()
                assert not self.clock.getDelayedCalls(), self.clock.getDelayedCalls()
        finally:
            globalLogPublisher.removeObserver(self._observe)


class LinkTests(SynchronousTestCase):
    """A whole link on a virtual clock."""

    def machine(self, v1: bool) -> None:
        machine = type("Machine", (LinkMachine,), {"v1": v1})
        run_state_machine_as_test(machine, settings=repeatable(40))

    def test_v1(self) -> None:
        """A commsmgr.v1 link outlives any backend: nothing is settled twice, acked unstored, or heard after the end."""
        self.machine(True)

    def test_plain(self) -> None:
        """So does a plain one."""
        self.machine(False)


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
