"""The WebSocket to one backend on a virtual clock: tokens, failures, waits, goodbyes; and never two links at once."""

from __future__ import annotations

import json
from email.utils import formatdate
from itertools import pairwise
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectBindError, ConnectionDone, ConnectionLost

from commsmgr import config
from commsmgr.auth.authorization import Authorization
from commsmgr.backends import Backends, Line
from commsmgr.bearer import Token
from commsmgr.errors import TokenError
from commsmgr.link import Link
from commsmgr.observe.metrics import Metrics
from commsmgr.policy.breaker import Breaker
from commsmgr.session.conversation import GoingAway
from commsmgr.status import Connecting, Draining, Idle, Registered, Registering, Waiting
from commsmgr.urls import http_target
from tests.link_kit import MACHINE, TIMESTAMP, FakeHTTP, FakeToken, Recorder, authorized, conversation, entry, pass_time
from tests.websocket_kit import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    MemoryDialer,
    MemoryEndpoint,
    MemoryTestCase,
    accept,
    close_frame,
    frame,
    read_frames,
)

V1 = "Sec-WebSocket-Protocol: commsmgr.v1"
REGISTRATION_ACK = json.dumps(
    {"type": "registration_ack", "id": "x", "timestamp": TIMESTAMP, "data": {"machine_id": MACHINE}}
).encode()


def message(**fields: Any) -> bytes:
    """Return a text frame from the backend."""
    return frame(TEXT, json.dumps(fields).encode())


class Bench:
    """One link, and the backend at the other end of its in-memory transports."""

    def __init__(
        self,
        test: Any,
        name: str = "one",
        *,
        dialer: MemoryDialer | None = None,
        authorization: Authorization | None = None,
        **sections: Any,
    ) -> None:
        self.clock = test.clock
        self.dialer = MemoryDialer(self.clock) if dialer is None else dialer
        self.recorder = Recorder()
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        sections.setdefault("reconnect", config.Reconnect(base=1.0, cap=8.0, retry_after_cap=100.0))
        sections.setdefault("breaker", config.Breaker(failures=3, open_for=10.0))
        backend = config.Backend(url=f"http://{name}.example", name=name)
        self.config = config.Config(backends=(backend,), http=config.HTTP(headers={"X-Site": "7"}), **sections)
        self.random = Random(3)
        self.failed: list[int] = []
        self.token = FakeToken("t0", "t1")
        self.link = Link(
            backend,
            self.config,
            reactor=self.clock,
            wall=lambda: 5000.0 + self.clock.seconds(),
            random=self.random,
            dialer=self.dialer,  # type: ignore[arg-type]  # in-memory endpoints
            authorization=authorization
            or authorized(self.token, self.clock, self.metrics, self.random, self.config.auth),
            metrics=self.metrics,
            conversation=conversation,
            events=self.recorder.events,
            redact=lambda text: text.replace("t0", "***"),
            user_agent="agent/1",
        )
        self.line = Line(
            name=name,
            http_target=http_target(backend),
            breaker=Breaker(self.config.breaker, self.clock.seconds, self.random),
            http=FakeHTTP(self.clock),  # type: ignore[arg-type]  # a fake
            link=self.link,
        )
        self.link.on_failed = lambda: self.failed.append(self.link.failures)

    @property
    def endpoint(self) -> MemoryEndpoint:
        return self.dialer.endpoints[-1]

    @property
    def attempts(self) -> int:
        """How many connections were begun."""
        return len(self.dialer.endpoints)

    def feed(self, data: bytes) -> None:
        self.endpoint.transport.protocol.dataReceived(data)

    def sent(self) -> list[tuple[int, bytes]]:
        return read_frames(self.endpoint.transport.take())

    def upgrade(self, *fields: str) -> bytes:
        """Answer the upgrade; return the request."""
        request = self.endpoint.succeed().take()
        self.feed(accept(request, *fields))
        return request

    def register(self, *fields: str) -> None:
        """From an attempt that was begun to a registered link, commsmgr.v1 unless said."""
        self.upgrade(*(fields or (V1,)))
        self.feed(frame(TEXT, REGISTRATION_ACK))
        self.sent()

    def up(self) -> None:
        self.link.start()
        self.register()

    def refuse(self, status: str, *fields: str) -> None:
        """Answer the upgrade with something else."""
        self.endpoint.succeed().take()
        lines = [f"HTTP/1.1 {status}", "Content-Length: 0", *fields, "", ""]
        self.feed("\r\n".join(lines).encode())
        self.gone()

    def gone(self) -> None:
        """The backend ends the connection."""
        self.endpoint.transport.lose(ConnectionDone())
        pass_time(self.clock)

    def wait(self) -> float:
        """Return how long the next attempt is put off."""
        assert isinstance(self.link.state, Waiting), self.link.state
        return self.link.state.until - 5000.0 - self.clock.seconds()

    def stop(self, deadline: float = 4.0) -> Deferred[int]:
        return Deferred.fromCoroutine(self.link.stop(deadline))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"commsmgr_{name}", labels) or 0.0


class _LinkTests(MemoryTestCase):
    """A link on a clock, with a poisoned global reactor."""

    def setUp(self) -> None:
        super().setUp()
        self.clock.advance(1000)
        self.bench = Bench(self)

    def end(self, bench: Bench) -> None:
        """Stop, whatever the state, and see that nothing is left."""
        stopping = bench.stop(1.0)
        pass_time(self.clock, 20)
        self.successResultOf(stopping)
        self.assertEqual(bench.link.state, Idle())
        self.assert_clean()


class ConnectingTests(_LinkTests):
    """From start to registered."""

    def test_way_up(self) -> None:
        """Each step shows in the state; the registration is the first message, and the owner hears at the end."""
        bench = self.bench
        self.assertEqual(bench.link.state, Idle())
        bench.link.start()
        self.assertEqual(bench.link.state, Connecting(6000.0))
        request = bench.upgrade(V1).decode()
        for line in ("Authorization: Bearer t0", "X-Site: 7", "User-Agent: agent/1", V1):
            self.assertIn(line, request)
        self.assertEqual(bench.link.state, Registering(6000.0))
        ((opcode, payload),) = bench.sent()
        self.assertEqual((opcode, json.loads(payload)["type"]), (TEXT, "register"))
        self.assertEqual(bench.recorder.take(), [])
        bench.feed(frame(TEXT, REGISTRATION_ACK))
        self.assertEqual(bench.link.state, Registered(6000.0, "commsmgr.v1", ""))
        self.assertEqual(bench.recorder.take(), [("registered",)])
        self.assertEqual(bench.count("connected", backend="one"), 1)
        self.assertEqual(bench.count("connections_total", backend="one", dialect="commsmgr.v1"), 1)
        self.end(bench)

    def test_plain(self) -> None:
        """A backend that selects no subprotocol is a plain one; one that was configured so is not even offered it."""
        self.bench.link.start()
        self.bench.upgrade()
        pass_time(self.clock, 3)
        self.assertEqual(self.bench.link.state, Registered(6003.0, "plain", ""))
        self.end(self.bench)
        bench = Bench(self, websocket=config.WebSocket(dialect="plain"))
        bench.link.start()
        self.assertNotIn(b"Sec-WebSocket-Protocol", bench.upgrade())
        self.end(bench)

    def test_no_token(self) -> None:
        """Without a token there is no Authorization; a provider that fails is no failure of the backend's."""
        self.bench.token.outcome = succeed("")
        self.bench.link.start()
        self.assertNotIn(b"Authorization", self.bench.upgrade(V1))
        self.end(self.bench)
        bench = Bench(self)
        bench.token.outcome = TokenError("no file t0")
        bench.link.start()
        self.assertEqual((bench.attempts, bench.failed), (0, []))
        self.assertIsInstance(bench.link.state, Waiting)
        self.assertIn("***", bench.link.last_error)
        self.assertNotIn("t0", repr(bench.link.state))
        bench.token.outcome = None
        pass_time(self.clock, 1)
        bench.register()
        self.assertEqual(bench.link.last_error, "")
        self.end(bench)

    def test_unanswered(self) -> None:
        """A commsmgr.v1 backend that does not answer the registration has failed."""
        self.bench.link.start()
        self.bench.upgrade(V1)
        pass_time(self.clock, 10)
        self.assertIsInstance(self.bench.link.state, Waiting)
        self.assertEqual(self.bench.count("reconnects_total", backend="one", reason="peer-silent"), 1)
        self.assertEqual(self.bench.recorder.take(), [])
        self.end(self.bench)

    def test_carried(self) -> None:
        """Messages, pongs and bytes reach the open link."""
        bench = self.bench
        bench.link.start()
        bench.register("X-Plain: yes")
        assert bench.link.open is not None
        bench.link.open.send([entry(1)], "now")
        ping = next(payload for opcode, payload in bench.sent() if opcode == PING)
        bench.feed(frame(PONG, ping))
        bench.feed(message(type="command", id="c1", data={"type": "echo"}))
        self.assertEqual(bench.recorder.take(), [("registered",), ("receipts", [1]), ("command", "c1")])
        self.end(bench)

    def test_late_callbacks(self) -> None:
        """What a connection reports when its link is gone is nobody's."""
        connection: Any = object()
        self.bench.link.websocket_received(connection, b"{}", True)
        self.bench.link.websocket_pong(connection, b"")
        self.bench.link.websocket_heard(connection)
        self.assertEqual(self.bench.recorder.take(), [])


class EndingTests(_LinkTests):
    """Why it ended, and how long to wait."""

    def test_connect_failed(self) -> None:
        """A failed attempt is counted, told to operators, and waited after with full jitter."""
        self.bench.link.start()
        self.bench.endpoint.fail(ConnectBindError())
        self.assertTrue(0 <= self.bench.wait() <= 1)
        self.assertEqual(self.bench.count("reconnects_total", backend="one", reason="connect-failed"), 1)
        self.assertEqual(self.bench.link.state.attempts, 1)  # type: ignore[union-attr]  # Waiting, by wait()
        pass_time(self.clock, 1)
        self.assertEqual(self.bench.attempts, 2)
        self.end(self.bench)

    def test_failures_in_a_row(self) -> None:
        """What is the backend's fault is counted and told each time; a registration ends that."""
        bench = self.bench
        bench.link.start()
        for number, spoil in enumerate(
            (
                lambda: bench.endpoint.fail(ConnectBindError()),
                lambda: bench.refuse("503 Busy"),
                lambda: (bench.upgrade(V1), bench.gone()),
                lambda: (bench.upgrade(V1), pass_time(self.clock, 10)),
                lambda: pass_time(self.clock, 20),
            ),
            start=1,
        ):
            spoil()
            self.assertEqual((bench.link.failures, bench.failed), (number, list(range(1, number + 1))))
            pass_time(self.clock, bench.wait() + 0.001)
        bench.register()
        self.assertEqual((bench.link.failures, len(bench.failed)), (0, 5))
        bench.endpoint.transport.lose(ConnectionLost())
        self.assertEqual(bench.failed[5:], [1])
        self.end(bench)

    def test_the_state_is_told_first(self) -> None:
        """Who hears of a failure finds the link waiting, and what it had in flight returned."""
        bench = self.bench
        seen: list[Any] = []
        bench.link.on_failed = lambda: seen.append((type(bench.link.state), bench.link.open, bench.recorder.take()))
        bench.up()
        bench.endpoint.transport.lose(ConnectionLost())
        self.assertEqual(seen, [(Waiting, None, [("registered",), ("ended",)])])
        self.end(bench)

    def test_no_failures(self) -> None:
        """A refusal of us, a missing token, and a stop say nothing against the backend."""
        for status in ("403 No", "404 No", "429 Slowly"):
            self.bench.link.start(afresh=True)
            self.bench.refuse(status)
            self.end(self.bench)
        self.bench.token.outcome = fail(TokenError("no"))
        self.bench.link.start(afresh=True)
        self.end(self.bench)
        self.bench.token.outcome = None
        self.bench.link.start(afresh=True)
        self.bench.register()
        self.end(self.bench)
        self.assertEqual((self.bench.failed, self.bench.link.failures), ([], 0))

    def test_nobody_listens(self) -> None:
        """Failures are counted when nobody wants to hear of them, too."""
        self.bench.link.on_failed = None
        self.bench.link.start()
        self.bench.endpoint.fail(ConnectBindError())
        self.assertEqual(self.bench.link.failures, 1)
        self.end(self.bench)

    def test_the_wait_outlives_a_stop(self) -> None:
        """A link that is left and started again waits for the rest of the wait; afresh, it forgets all that."""
        bench = self.bench
        for afresh in (False, True):
            bench.link.start(afresh=True)
            bench.refuse("503 Busy", "Retry-After: 60")
            left = bench.wait()
            stopping = bench.stop()
            self.successResultOf(stopping)
            self.assertEqual(bench.link.state, Idle())
            self.clock.advance(20)
            attempts = bench.attempts
            bench.link.start(afresh=afresh)
            if not afresh:
                self.assertAlmostEqual(bench.wait(), left - 20)
                self.assertEqual((bench.link.failures, bench.link.state.attempts), (1, 1))  # type: ignore[union-attr]  # Waiting, by wait()
                self.assertIn("503", bench.link.state.reason)  # type: ignore[union-attr]  # as above
                pass_time(self.clock, left - 20.1)
                self.assertEqual(bench.attempts, attempts)
                pass_time(self.clock, 0.2)
            self.assertEqual(bench.attempts, attempts + 1)
            self.assertIsInstance(bench.link.state, Connecting)
            self.assertEqual(bench.link.failures, 0 if afresh else 1)
            bench.endpoint.fail(ConnectBindError())
            self.assertLessEqual(bench.wait(), 1 if afresh else 2)
            self.end(bench)

    def test_stop_while_the_wait_goes_on(self) -> None:
        """A stop during such a wait leaves nothing behind, and when the wait is over a start is a start."""
        bench = self.bench
        bench.link.start()
        bench.refuse("503 Busy", "Retry-After: 60")
        bench.stop()
        bench.link.start()
        bench.link.start()
        self.assertEqual(bench.attempts, 1)
        bench.stop()
        self.assert_clean()
        self.clock.advance(100)
        bench.link.start()
        self.assertEqual(bench.attempts, 2)
        self.end(bench)

    def test_a_clock_that_steps_back_during_the_wait(self) -> None:
        """A start after a step of the clock waits no longer than it would have waited anyway."""
        bench = self.bench
        bench.link.start()
        bench.refuse("503 Busy", "Retry-After: 60")
        left = bench.wait()
        self.successResultOf(bench.stop())
        self.clock.rightNow -= 500
        bench.link.start()
        self.assertAlmostEqual(bench.wait(), left)
        self.end(bench)

    def test_hanging_up_is_no_failure(self) -> None:
        """A backend that registers us and hangs up later never failed twice in a row; the waits grow anyway."""
        bench = self.bench
        bench.link.start()
        for number in range(8):
            bench.register()
            bench.gone()
            self.assertLessEqual(max(bench.failed), 1)
            self.assertTrue(0 <= bench.wait() <= min(8, 2**number))
            self.assertEqual(bench.recorder.take(), [("registered",), ("ended",)])
            pass_time(self.clock, 8)
        self.assertEqual(bench.count("connected", backend="one"), 0)
        self.end(bench)

    def test_lost_results_are_told(self) -> None:
        """The log says how many results had no receipt."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1), entry(2)], "now")
        bench.gone()
        self.assertIsNone(bench.link.open)
        self.end(bench)


class RefusedTokenTests(_LinkTests):
    """401, at the upgrade and by close code."""

    def test_upgrade(self) -> None:
        """A 401 is told to the provider with the token that was refused; the next attempt bears a fresh one, soon."""
        self.bench.link.start()
        self.bench.refuse("401 No")
        self.assertEqual(self.bench.token.refusals, ["t0"])
        self.assertLessEqual(self.bench.wait(), 1)
        pass_time(self.clock, 1)
        self.assertIn(b"Bearer t1", self.bench.upgrade(V1))
        self.end(self.bench)

    def test_accepted(self) -> None:
        """A token counts as accepted when the agent is registered, not when the upgrade went through unchecked."""
        table = self.bench.link._authorization._table
        self.bench.link.start()
        self.bench.upgrade(V1)
        self.assertEqual({}, table.kept())
        self.bench.feed(frame(TEXT, REGISTRATION_ACK))
        self.assertEqual({("one", "websocket"): Token("t0")}, table.kept())
        self.end(self.bench)

    def test_twice(self) -> None:
        """From the second refusal on the slow path: the token is shown about every refused_delay, and not between."""
        self.bench.link.start()
        self.bench.refuse("401 No")
        pass_time(self.clock, 1)
        shown = []
        while len(shown) < 6:
            shown.append(self.clock.seconds())
            attempts = self.bench.attempts
            self.bench.refuse("401 No")
            while self.bench.attempts == attempts:
                pass_time(self.clock, 1)
        waits = [after - before for before, after in pairwise(shown)]
        # The longest: that long it is held back, and then the wait for the next attempt.
        self.assertTrue(all(30 <= wait <= 90 + 8 + 1 for wait in waits), waits)
        # Another backend may take it, so each refusal counts, and no attempt that was not made.
        self.assertEqual(self.bench.failed, [1, 2, 3, 4, 5, 6, 7])
        self.end(self.bench)

    def test_close_code(self) -> None:
        """A backend that closes with 4401 has refused the token just the same."""
        self.bench.up()
        self.bench.feed(close_frame(4401, b"token revoked"))
        self.bench.gone()
        self.assertEqual(self.bench.token.refusals, ["t0"])
        pass_time(self.clock, 1)
        self.assertIn(b"Bearer t1", self.bench.upgrade(V1))
        self.end(self.bench)

    def test_other_refusals(self) -> None:
        """Other refusals say nothing about the token."""
        self.bench.link.start()
        self.bench.refuse("403 No")
        self.assertEqual(self.bench.token.refusals, [])
        self.assertTrue(30 <= self.bench.wait() <= 90)
        self.end(self.bench)

    def test_retry_after(self) -> None:
        """Retry-After is obeyed, as seconds and, by the clock that was passed in, as a date."""
        for as_date in (False, True):
            bench = Bench(self)
            value = formatdate(5000 + self.clock.seconds() + 40, usegmt=True) if as_date else "40"
            bench.link.start()
            bench.refuse("503 Busy", f"Retry-After: {value}")
            self.assertTrue(39 <= bench.wait() <= 40 * 1.2 + 1, bench.wait())
            self.end(bench)


class GoawayTests(_LinkTests):
    """A backend that leaves."""

    def goaway(self, bench: Bench, reconnect_after: float, window: float) -> None:
        bench.feed(message(type="goaway", data={"reconnect_after": reconnect_after, "window": window}))

    def test_drain_close_come_back(self) -> None:
        """What is in flight gets its receipts, then comes the close frame, then the agent within the window."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1)], "now")
        self.goaway(bench, 20, 30)
        self.assertIsInstance(bench.link.state, Draining)
        self.assertFalse(bench.link.open.sendable)
        self.assertNotIn(CLOSE, [opcode for opcode, _ in bench.sent()])
        bench.feed(message(type="ack", ids=["e1"]))
        self.assertEqual(bench.sent()[-1][0], CLOSE)
        bench.feed(close_frame(1000))
        bench.gone()
        self.assertEqual(bench.recorder.take(), [("registered",), ("receipts", [1]), ("ended",)])
        self.assertTrue(20 <= bench.wait() <= 50, bench.wait())
        pass_time(self.clock, 50)
        bench.register()
        bench.gone()
        self.assertLessEqual(bench.wait(), 8)
        self.end(bench)

    def test_spread(self) -> None:
        """Agents come back all over the window, none before it."""
        waits = []
        for seed in range(40):
            bench = Bench(self)
            bench.random.seed(seed)
            bench.up()
            self.goaway(bench, 10, 80)
            bench.gone()
            waits.append(bench.wait())
            self.end(bench)
        self.assertTrue(10 <= min(waits) < 25, min(waits))
        self.assertTrue(75 < max(waits) <= 90, max(waits))

    def test_cap(self) -> None:
        """A backend cannot send agents away for longer than retry_after_cap, twice at most with the spread."""
        self.bench.up()
        self.goaway(self.bench, 100_000, 100_000)
        self.bench.gone()
        self.assertTrue(100 <= self.bench.wait() <= 200)
        self.end(self.bench)

    def test_no_failure(self) -> None:
        """However the connection of a backend that leaves ends, that is no failure; the next one's end may be one."""
        bench = self.bench
        for lost, failures in ((True, []), (False, [1])):
            bench.up() if lost else bench.register()
            if lost:
                self.goaway(bench, 0, 0)
            bench.endpoint.transport.lose(ConnectionLost())
            self.assertEqual(bench.failed, failures)
            pass_time(self.clock, 8)
        self.end(bench)

    def test_no_receipts(self) -> None:
        """A backend that leaves and receipts nothing any more is left after a while, with what it did not receipt."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1)], "now")
        self.goaway(bench, 5, 0)
        for _ in range(29):
            pass_time(self.clock, 1)
            bench.feed(message(type="ping", id="p"))
        self.assertNotIn(CLOSE, [opcode for opcode, _ in bench.sent()])
        pass_time(self.clock, 1)
        self.assertEqual(bench.sent()[-1][0], CLOSE)
        bench.feed(close_frame(1000))
        bench.gone()
        self.assertEqual((bench.recorder.take(), bench.failed), ([("registered",), ("ended",)], []))
        self.end(bench)

    def test_not_after_a_stop(self) -> None:
        """The wait that a goaway asked for is over with the stop: a later start that fails waits as usual."""
        self.bench.up()
        self.goaway(self.bench, 90, 0)
        self.end(self.bench)
        self.bench.link.start()
        self.bench.endpoint.fail(ConnectBindError())
        self.assertEqual(self.bench.failed, [1])
        self.assertLess(self.bench.wait(), 9)
        self.end(self.bench)

    def test_before_the_registration(self) -> None:
        """A backend that leaves before it has answered the registration is left at once."""
        self.bench.link.start()
        self.bench.upgrade(V1)
        self.goaway(self.bench, 5, 0)
        self.assertEqual(self.bench.sent()[-1][0], CLOSE)
        self.bench.gone()
        self.assertGreaterEqual(self.bench.wait(), 5)
        self.end(self.bench)

    def test_without_a_link(self) -> None:
        """A notice that finds no link any more only sets the wait."""
        self.bench.link._going_away(GoingAway(5.0, 0.0))
        self.assertEqual(self.bench.link.state, Idle())


class StopTests(_LinkTests):
    """Goodbyes."""

    def test_goodbye(self) -> None:
        """Receipts first, then the closing handshake; then nothing is left and nothing was without a receipt."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1)], "now")
        bench.sent()
        stopping = bench.stop()
        self.assertIsInstance(bench.link.state, Draining)
        self.assertEqual(bench.sent(), [])
        bench.feed(message(type="ack", ids=["e1"]))
        self.assertEqual(bench.sent()[-1][0], CLOSE)
        bench.feed(close_frame(1000))
        bench.gone()
        self.assertEqual(self.successResultOf(stopping), 0)
        self.assertEqual(bench.link.state, Idle())
        self.assertEqual(bench.recorder.take()[-1], ("ended",))
        self.assertEqual(bench.link.last_error, "")
        self.assertEqual(bench.count("connected", backend="one"), 0)
        self.assert_clean()

    def test_no_receipts(self) -> None:
        """A backend that gives no receipts takes half of the time at most; it still gets its close frame."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1), entry(2)], "now")
        bench.sent()
        stopping = bench.stop(4.0)
        pass_time(self.clock, 1.9)
        self.assertEqual(bench.sent(), [])
        pass_time(self.clock, 0.1)
        self.assertEqual(bench.sent()[-1][0], CLOSE)
        pass_time(self.clock, 1.9)
        self.assertNoResult(stopping)
        pass_time(self.clock, 0.2)
        self.assertEqual(self.successResultOf(stopping), 2)
        self.assert_clean()

    def test_keep_alive_during_the_closing_handshake(self) -> None:
        """A keep-alive that falls into the closing handshake does not make a failure of the goodbye."""
        bench = self.bench
        bench.up()
        pass_time(self.clock, 19)
        stopping = bench.stop(10.0)
        pass_time(self.clock, 11)
        self.assertEqual(self.successResultOf(stopping), 0)
        self.assertEqual((bench.link.last_error, bench.link.state), ("", Idle()))
        self.assert_clean()

    def test_the_backend_ends_during_the_goodbye(self) -> None:
        """A connection that ends while it drains was left all the same: nothing has failed, nothing is waited for."""
        bench = self.bench
        bench.up()
        assert bench.link.open is not None
        bench.link.open.send([entry(1)], "now")
        stopping = bench.stop()
        bench.gone()
        self.assertEqual(self.successResultOf(stopping), 1)
        self.assertEqual((bench.link.last_error, bench.link.state), ("", Idle()))
        self.assertEqual(bench.recorder.take()[-1], ("ended",))
        self.assert_clean()

    def test_whenever(self) -> None:
        """A stop in any phase ends it, and a start afterwards begins anew."""
        phases: list[Any] = [
            lambda bench: None,
            lambda bench: bench.link.start(),
            lambda bench: (bench.link.start(), bench.endpoint.succeed()),
            lambda bench: (bench.link.start(), bench.upgrade(V1)),
            lambda bench: bench.up(),
            lambda bench: (bench.link.start(), bench.endpoint.fail(ConnectBindError())),
            lambda bench: (bench.up(), bench.feed(close_frame(1001))),
        ]
        for phase in phases:
            bench = Bench(self)
            phase(bench)
            self.end(bench)
            bench.link.start()
            bench.register()
            self.assertIsInstance(bench.link.state, Registered)
            self.end(bench)

    def test_registered_too_late(self) -> None:
        """A link that was stopped while it registered never counts as registered: nothing could be sent on it."""
        for field in (V1, "X-Plain: yes"):
            bench = Bench(self)
            bench.link.start()
            bench.upgrade(field)
            stopping = bench.stop(4.0)
            bench.feed(frame(TEXT, REGISTRATION_ACK))
            pass_time(self.clock, 3.5)
            self.assertEqual(bench.recorder.take(), [])
            self.assertNotIsInstance(bench.link.state, Registered)
            pass_time(self.clock, 1)
            self.successResultOf(stopping)
            self.assertEqual(bench.recorder.take(), [])
            self.end(bench)

    def test_start_during_the_goodbye(self) -> None:
        """Wanted again during the goodbye, it connects when the old connection is gone, and says so."""
        bench = self.bench
        bench.up()
        stopping = bench.stop()
        bench.link.start()
        self.assertEqual(bench.attempts, 1)
        bench.feed(close_frame(1000))
        bench.gone()
        self.successResultOf(stopping)
        self.assertEqual(bench.attempts, 2)
        self.assertIsInstance(bench.link.state, Connecting)
        bench.register()
        self.end(bench)


class MovingTests(_LinkTests):
    """Two backends with real links: a machine never has two connections, and never hurries from one to the other."""

    def setUp(self) -> None:
        super().setUp()
        self.one, self.two = Bench(self, "one"), Bench(self, "two")
        self.backends = Backends(
            [self.one.line, self.two.line],
            whole=config.Config(
                backends=(config.Backend(url="http://one.example"), config.Backend(url="http://two.example")),
                breaker=config.Breaker(failures=3),
            ),
            clock=self.clock,
            metrics=self.one.metrics,
        )
        self.backends.start()

    def live(self) -> int:
        """Count the connections that exist or are being made."""
        return sum(
            not (endpoint.transport.lost or endpoint.cancelled or endpoint.connecting.called)
            or (endpoint.transport.protocol is not None and not endpoint.transport.lost)
            for bench in (self.one, self.two)
            for endpoint in bench.dialer.endpoints
        )

    def never_two(self, seconds: float) -> None:
        """Let time pass, and see that there is one connection at most."""
        for _ in range(int(seconds * 10)):
            pass_time(self.clock, 0.1)
            self.assertLessEqual(self.live(), 1)

    def let_fail(self, bench: Bench) -> None:
        """Let the link of this backend fail until the other one is turned to."""
        while self.backends.active is bench.line:
            bench.endpoint.fail(ConnectBindError())
            if self.backends.active is bench.line:
                pass_time(self.clock, bench.wait() + 0.001)

    def answered(self, bench: Bench) -> None:
        """This backend answers a request over HTTP."""
        self.backends.answered(bench.line, works=True, receipt_at=1.0)

    def test_there_and_back(self) -> None:
        """Failures bring the other one at once, and it stays; proof brings the first one back, after the goodbye."""
        self.let_fail(self.one)
        self.assertEqual((self.one.attempts, self.two.attempts), (3, 1))
        self.assertEqual(self.one.link.state, Idle())
        self.two.register()
        self.never_two(10)
        self.assertEqual((self.one.attempts, self.two.attempts), (3, 1))
        self.clock.advance(300)
        self.two.register() if not isinstance(self.two.link.state, Registered) else None
        self.answered(self.one)
        self.assertEqual(self.one.attempts, 3)
        self.never_two(6)
        self.assertEqual((self.two.link.state, self.one.attempts), (Idle(), 4))
        self.one.register()
        self.assertEqual(self.live(), 1)

    def run_down(self, seconds: float) -> int:
        """Let every attempt at both fail at once; return how many there were."""
        before = self.one.attempts + self.two.attempts
        ends = self.clock.seconds() + seconds
        while self.clock.seconds() < ends:
            for _ in range(50):
                pending = [bench for bench in (self.one, self.two) if isinstance(bench.link.state, Connecting)]
                if not pending:
                    break
                self.assertEqual(len(pending), 1)
                pending[0].endpoint.fail(ConnectBindError())
            else:
                raise AssertionError("a hot loop")
            pass_time(self.clock, 0.1)
        return self.one.attempts + self.two.attempts - before

    def test_both_down(self) -> None:
        """When both are down both are tried, in turn, each at its own pace and no faster."""
        self.run_down(60)
        one, two = self.one.attempts, self.two.attempts
        minutes = [self.run_down(60) for _ in range(10)]
        # A single one would be tried about 15 times a minute with a cap of 8 s.
        self.assertLessEqual(max(minutes), 45, minutes)
        self.assertGreater(min(minutes), 5, minutes)
        self.assertGreater(min(self.one.attempts - one, self.two.attempts - two), 20)

    def test_one_comes_back(self) -> None:
        """When one answers over HTTP while the other's WebSocket fails, it is turned to at once, all afresh."""
        self.run_down(120)
        while self.backends.active is self.one.line:
            self.run_down(0.1)
        attempts = self.one.attempts
        self.answered(self.one)
        pass_time(self.clock)
        self.assertEqual((self.one.attempts, self.one.link.failures), (attempts + 1, 0))
        self.one.endpoint.fail(ConnectBindError())
        self.assertIs(self.backends.active, self.one.line)
        self.assertLessEqual(self.one.wait(), 1)

    def test_websockets_that_a_proxy_cuts(self) -> None:
        """While HTTP works, at both or at one, and no WebSocket does, requests that succeed do not make links hurry."""
        for working in (("one", "two"), ("two",), ("one",)):
            self.run_down(60)
            before = self.one.attempts + self.two.attempts
            for _ in range(1200):
                self.run_down(1)
                line = self.backends.for_request()
                works = line.name in working
                self.backends.answered(line, works=works, receipt_at=1.0 if works else None)
            attempts = self.one.attempts + self.two.attempts - before
            self.assertLessEqual(attempts / 20, 40, working)

    def test_stop_during_the_move(self) -> None:
        """A stop during the move ends everything within its deadline, and nothing is started."""
        self.leave()
        stopping = Deferred.fromCoroutine(self.backends.stop(2.0))
        pass_time(self.clock, 2.5)
        self.successResultOf(stopping)
        self.assertEqual((self.live(), self.one.attempts), (0, 3))
        pass_time(self.clock, 10)
        self.assert_clean()

    def test_start_after_a_stop_during_the_move(self) -> None:
        """Started again while the old connection says goodbye, there is still one at most."""
        self.leave()
        stopping = Deferred.fromCoroutine(self.backends.stop(2.0))
        self.backends.start()
        self.never_two(6)
        self.successResultOf(stopping)
        self.assertEqual(self.one.attempts, 4)

    def leave(self) -> None:
        """Begin to move from a registered link back to the preferred backend."""
        self.let_fail(self.one)
        self.two.register()
        self.backends.active.left_at = self.one.line.left_at = None
        self.answered(self.one)
        self.assertIs(self.backends.active, self.one.line)
