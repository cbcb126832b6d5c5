"""The keep-alive on a clock that may jump, with a peer that may be gone."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.session.keepalive import Dead, KeepAlive, SendPing, Wait

bounded = settings(deadline=None, max_examples=200, database=None, suppress_health_check=[HealthCheck.too_slow])

INTERVAL, TIMEOUT, PONG_TIMEOUT = 20.0, 10.0, 60.0


class World:
    """
    A keep-alive with its owner, a link and a peer, on a timer that counts real seconds and a clock that may lie.

    :ivar clock: how much the clock is ahead of the real time.
    :ivar answers: whether pongs come back, ``delay`` after the ping.
    :ivar talks: how often data comes by itself, 0 for never.
    """

    def __init__(self, *, answers: bool = True, talks: float = 0.0, delay: float = 0.5, ahead: float = 1e9) -> None:
        self.real = 0.0
        self.ahead = ahead
        self.answers, self.talks, self.delay = answers, talks, delay
        self.keepalive = KeepAlive(INTERVAL, TIMEOUT, self.now, pong_timeout=PONG_TIMEOUT)
        self.pings: list[float] = []
        self.pong_at: float | None = None
        self.talk_at = talks or None
        self.dead: str | None = None
        self.waits: list[float] = []
        self.check()

    @property
    def now(self) -> float:
        return self.real + self.ahead

    def ping(self) -> None:
        self.keepalive.pinged(self.now)
        self.pings.append(self.real)
        if self.answers and self.pong_at is None:
            self.pong_at = self.real + self.delay

    def check(self) -> None:
        action = self.keepalive.check(self.now)
        if isinstance(action, SendPing):
            self.ping()
            action = self.keepalive.check(self.now)
        if isinstance(action, Dead):
            self.dead = action.reason
        else:
            assert isinstance(action, Wait), "one ping at a time"
            self.waits.append(action.seconds)
            self.timer_at = self.real + action.seconds

    def run(self, seconds: float) -> None:
        """Let real time pass, or less if the peer is declared dead before."""
        end = self.real + seconds
        while self.dead is None:
            events = [at for at in (self.timer_at, self.pong_at, self.talk_at) if at is not None]
            if min(events) > end:
                self.real = end
                return
            self.real = max(self.real, min(events))
            if self.pong_at == min(events):
                self.pong_at = None
                self.keepalive.ponged(self.now)
            elif self.talk_at == min(events):
                self.talk_at += self.talks
                self.keepalive.heard(self.now)
            else:
                self.check()

    def step(self, seconds: float) -> None:
        """The clock jumps; timers by the wall clock that are due by it fire, others keep their real time."""
        self.ahead += seconds
        if seconds > 0:
            self.timer_at = max(self.real, self.timer_at - seconds)

    def sleep(self, seconds: float) -> None:
        """The machine sleeps: no time passes for it, yet the clock has gone on when it wakes."""
        self.step(seconds)


class KeepAliveTests(SynchronousTestCase):
    """When to ping, when to give up."""

    def test_idle_peer_is_pinged(self) -> None:
        """A peer that is quiet and answers lives for ever at one ping an interval."""
        world = World(delay=0.0)
        world.run(1000)
        self.assertIsNone(world.dead)
        self.assertEqual(world.pings, [20.0 * n for n in range(1, 51)])

    def test_talking_peer_is_left_alone(self) -> None:
        """Where data comes a ping is sent only as often as the other direction has to be proven."""
        world = World(talks=5.0)
        world.run(600)
        self.assertIsNone(world.dead)
        self.assertEqual(world.pings[0], 60.0)
        self.assertLessEqual(len(world.pings), 10)

    def test_blackhole(self) -> None:
        """When nothing comes any more the peer is dead after the interval and the timeout, to the moment."""
        world = World(talks=3.0)
        world.run(100)
        world.answers, world.talk_at = False, None
        last_heard = 99.0
        world.run(1000)
        self.assertEqual((world.dead, world.real), ("silent", last_heard + INTERVAL + TIMEOUT))
        self.assertEqual(world.pings[-1], last_heard + INTERVAL)

    def test_one_way_loss(self) -> None:
        """Data comes and no ping is ever answered: dead within twice the pong timeout."""
        world = World(talks=3.0)
        world.run(100)
        world.answers = False
        world.run(1000)
        self.assertEqual(world.dead, "no-pong")
        self.assertLessEqual(world.real, 100 + 2 * PONG_TIMEOUT)

    def test_other_pings_count(self) -> None:
        """A barrier's ping needs a pong like any other, and more of them do not put the end off."""
        world = World(talks=3.0, answers=False)
        for _ in range(20):
            world.run(5)
            if world.dead is None:
                world.ping()
        self.assertEqual((world.dead, world.real), ("no-pong", 5 + PONG_TIMEOUT))

    def test_barrier_ping_into_silence(self) -> None:
        """A ping that is unanswered when silence begins is the question already; the answer has the usual time."""
        world = World(answers=False)
        world.run(15)
        world.ping()
        world.run(1000)
        self.assertEqual((world.dead, world.real, world.pings), ("silent", INTERVAL + TIMEOUT, [15.0]))

    def test_late_barrier_ping(self) -> None:
        """However late in the silence a ping was sent, it gets the whole timeout."""
        keepalive = KeepAlive(INTERVAL, TIMEOUT, 0.0, pong_timeout=PONG_TIMEOUT)
        self.assertEqual(keepalive.check(0.0), Wait(20.0))
        self.assertEqual(keepalive.check(20.5), SendPing())
        keepalive.pinged(20.5)
        self.assertEqual(keepalive.check(20.5), Wait(2.5))
        for now in (23.0, 25.5, 28.0):
            self.assertEqual(keepalive.check(now), Wait(2.5))
        self.assertEqual(keepalive.check(30.5), Dead("silent"))

    def test_sleeping_laptop(self) -> None:
        """After a night's sleep, at whatever point it began, the peer gets a ping and the whole timeout."""
        for asleep_at in (5.0, 20.0, 20.1, 29.9):
            world = World(answers=False)
            world.run(asleep_at)
            world.sleep(8 * 3600)
            woken = world.real
            world.run(1000)
            self.assertEqual((world.dead, world.pings[-1], world.real), ("silent", woken, woken + TIMEOUT), asleep_at)

    def test_sleeping_laptop_with_a_living_peer(self) -> None:
        """If the connection survived the sleep, so does the conversation."""
        world = World(delay=9.0)
        world.run(20.1)
        world.sleep(8 * 3600)
        world.run(1000)
        self.assertIsNone(world.dead)

    def test_waking_up_to_data(self) -> None:
        """Data that was waiting when the machine woke proves one direction; the other is asked for afresh."""
        world = World(answers=False)
        world.run(21)
        world.sleep(8 * 3600)
        world.keepalive.heard(world.now)
        world.talk_at, world.talks = world.real, 3.0
        woken = world.real
        world.run(1000)
        self.assertEqual((world.dead, world.pings[-1], world.real), ("no-pong", woken, woken + PONG_TIMEOUT))

    def test_clock_set_back(self) -> None:
        """A clock that jumps back a year makes no wait longer, and a gone peer is still found gone."""
        for at in (5.0, 25.0):
            world = World(answers=False)
            world.run(at)
            world.step(-365 * 86400)
            world.run(1000)
            self.assertEqual(world.dead, "silent")
            self.assertLessEqual(world.real, at + INTERVAL + TIMEOUT)
            self.assertLessEqual(max(world.waits), INTERVAL)

    def test_stalled_process(self) -> None:
        """A process that could not run for a while does not blame the peer, whose pong may be waiting to be read."""
        keepalive = KeepAlive(INTERVAL, TIMEOUT, 0.0, pong_timeout=PONG_TIMEOUT)
        keepalive.check(0.0)
        self.assertEqual(keepalive.check(20.0), SendPing())
        keepalive.pinged(20.0)
        self.assertEqual(keepalive.check(20.0), Wait(2.5))
        self.assertEqual(keepalive.check(31.0), SendPing())
        keepalive.pinged(31.0)
        self.assertEqual(keepalive.check(31.0), Wait(2.5))

    def test_owner_that_waits_for_the_answer(self) -> None:
        """An owner that checks again only after the whole timeout still learns that the peer is dead."""
        keepalive = KeepAlive(INTERVAL, TIMEOUT, 0.0, pong_timeout=PONG_TIMEOUT)
        keepalive.check(0.0)
        self.assertEqual(keepalive.check(20.0), SendPing())
        keepalive.pinged(20.0)
        self.assertEqual(keepalive.check(30.5), Dead("silent"))

    def test_least_wait(self) -> None:
        """A rest too small to move a clock is no wait: the owner would spin."""
        keepalive = KeepAlive(INTERVAL, TIMEOUT, 0.0, pong_timeout=PONG_TIMEOUT)
        keepalive.check(0.0)
        self.assertEqual(keepalive.check(20.0 - 1e-14), Wait(0.001))
        self.assertEqual(keepalive.check(20.0), SendPing())

    def test_noted_before_the_clock_went_back(self) -> None:
        """Whatever was noted last, a ping or data, a time before it shows that the clock went back."""
        for noted in (KeepAlive.pinged, KeepAlive.heard):
            keepalive = KeepAlive(INTERVAL, TIMEOUT, 0.0, pong_timeout=PONG_TIMEOUT)
            keepalive.check(0.0)
            noted(keepalive, 15.0)
            self.assertEqual(keepalive.check(14.0), SendPing())

    def test_small_timeouts_bear_a_busy_process(self) -> None:
        """With a timeout far below a second, checks that come a little late still end a dead link."""
        keepalive = KeepAlive(0.2, 0.1, 0.0, pong_timeout=1.0)
        keepalive.check(0.0)
        self.assertEqual(keepalive.check(0.7), SendPing())
        keepalive.pinged(0.7)
        keepalive.check(0.7)
        self.assertEqual(keepalive.check(1.3), Dead("silent"))

    @bounded
    @given(
        ahead=st.sampled_from([0.0, 1e9]),
        delay=st.floats(0, TIMEOUT / 4),
        talks=st.sampled_from([0.0, 3.0, 25.0]),
        steps=st.lists(st.tuples(st.floats(40, 200), st.floats(-1e6, 1e6) | st.floats(-12, 12)), max_size=8),
    )
    def test_a_living_peer_is_never_dead(
        self, ahead: float, delay: float, talks: float, steps: list[tuple[float, float]]
    ) -> None:
        """However the clock jumps: who answers within a quarter of the timeout lives, and waits stay in bounds."""
        world = World(delay=delay, talks=talks, ahead=ahead)
        for seconds, step in steps:
            world.run(seconds)
            world.step(step)
        world.run(200)
        self.assertIsNone(world.dead)
        # A clock of a thousand million seconds has steps of 1e-7 of them, by which a wait can come out longer.
        self.assertTrue(all(0.001 <= wait <= INTERVAL + 1e-6 for wait in world.waits))

    @bounded
    @given(
        talks=st.sampled_from([0.0, 3.0]),
        steps=st.lists(st.tuples(st.floats(0, 30), st.floats(-1e6, 1e6) | st.floats(-12, 12)), max_size=8),
    )
    def test_a_gone_peer_is_found(self, talks: float, steps: list[tuple[float, float]]) -> None:
        """However the clock jumps: once it runs steadily, a peer that never answers is found out in bounded time."""
        world = World(answers=False, talks=talks)
        for seconds, step in steps:
            world.run(seconds)
            if world.dead is None:
                world.step(step)
        steady = world.real
        world.run(1000)
        self.assertIsNotNone(world.dead)
        bound = INTERVAL + (INTERVAL + TIMEOUT if talks == 0 else 2 * PONG_TIMEOUT)
        self.assertLessEqual(world.real, steady + bound)
