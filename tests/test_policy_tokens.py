"""Which token is shown to whom: acceptance, refusal, and going back to an earlier one. Pure."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.bearer import Token
from commsmgr.policy.tokens import FREE, REFUSED_SPREAD, Held, Route, TokenTable

HTTP, WEBSOCKET = Route("one", "http"), Route("one", "websocket")
OTHER = Route("two", "http")
OLD, NEW, NEWER = Token("old", 1000.0), Token("new"), Token("newer")
DELAY = 60.0


class TokenTableTests(SynchronousTestCase):
    """The table with times of its own."""

    def setUp(self) -> None:
        self.table = TokenTable(refused_delay=DELAY, random=Random(5))
        self.now = 5000.0
        self.wall = 500.0

    def choose(self, newest: Token | None, route: Route = HTTP) -> Token | Held:
        return self.table.choose(route, newest, now=self.now, wall=self.wall)

    def refuse(self, token: Token, route: Route = HTTP) -> float:
        return self.table.refused(route, token, self.now)

    def accept_old_refuse_new(self) -> float:
        """Come to where the new token is refused, and the old one stands in."""
        self.choose(OLD)
        self.table.accepted(HTTP, OLD)
        self.choose(NEW)
        return self.refuse(NEW)

    def assert_held(self, wait: float, route: Route = HTTP) -> None:
        """Nothing is shown, and the newest is again in ``wait`` seconds."""
        held = self.choose(NEW, route)
        assert isinstance(held, Held)
        self.assertAlmostEqual(wait, held.seconds)

    def test_newest(self) -> None:
        """What was not refused is shown, whether it was accepted or not, and even if it seems to have expired."""
        self.wall = 2000.0
        for token in (OLD, NEW, OLD):
            self.assertEqual(self.choose(token), token)
        self.table.accepted(HTTP, OLD)
        self.assertEqual(self.choose(NEW), NEW)
        self.assertEqual((self.table.refusing, self.table.standing_in), ([], []))

    def test_held(self) -> None:
        """A refused token is not shown for its wait, from half of the delay to one and a half, and then again."""
        waits = []
        for _ in range(200):
            self.choose(NEW)
            wait = self.refuse(NEW)
            waits.append(wait)
            self.assert_held(wait)
            self.now += wait - 0.001
            self.assertIsInstance(self.choose(NEW), Held)
            self.now += 0.002
            self.assertEqual(self.choose(NEW), NEW)
        self.assertTrue(DELAY * 0.5 <= min(waits) < DELAY * 0.55 and DELAY * 1.45 < max(waits) <= DELAY * 1.5)
        self.assertEqual(self.table.refusing, [HTTP])

    def test_clock_steps_back(self) -> None:
        """A step of the clock does not hold a token back for longer."""
        self.choose(NEW)
        self.refuse(NEW)
        self.now -= 1000.0
        self.assertEqual(self.choose(NEW), NEW)

    def test_back_to_the_earlier_one(self) -> None:
        """A new token that is refused gives way to the one accepted before, and is tried again after its wait."""
        wait = self.accept_old_refuse_new()
        self.assertEqual(self.choose(NEW), OLD)
        self.assertEqual((self.table.refusing, self.table.standing_in), ([HTTP], [HTTP]))
        self.table.accepted(HTTP, OLD)
        self.assertEqual(self.table.kept(), {HTTP: OLD})
        self.now += wait
        self.assertEqual(self.choose(NEW), NEW)
        self.assertTrue(self.table.accepted(HTTP, NEW))
        self.assertEqual((self.table.refusing, self.table.standing_in), ([], []))
        self.assertEqual(self.table.kept(), {HTTP: NEW})

    def test_yet_another(self) -> None:
        """Whatever the provider gives that was not refused is shown at once."""
        self.accept_old_refuse_new()
        self.assertEqual(self.choose(NEWER), NEWER)
        self.assertEqual((self.table.refusing, self.table.standing_in), ([], []))
        self.refuse(NEWER)
        self.assertEqual(self.choose(NEWER), OLD)

    def test_the_earlier_one_ends(self) -> None:
        """One that has expired, or was refused itself, does not stand in, and is not kept."""
        wait = self.accept_old_refuse_new()
        self.wall = 999.0
        self.assertEqual(self.choose(NEW), OLD)
        self.wall = 1000.0
        self.assert_held(wait)
        self.assertEqual(self.table.standing_in, [])
        self.wall = 500.0
        self.refuse(OLD)
        self.assert_held(wait)
        self.assertEqual(self.table.kept(), {})

    def test_provider_without_a_token(self) -> None:
        """While the provider gives none the accepted one goes on, and without one there is nothing to show."""
        self.assertEqual(self.choose(None), Held(0.0))
        self.choose(OLD)
        self.table.accepted(HTTP, OLD)
        self.assertEqual(self.choose(None), OLD)
        self.assertEqual((self.table.refusing, self.table.standing_in), ([], [HTTP]))

    def test_routes(self) -> None:
        """A refusal is one route's affair; what one transport accepted may stand in on the other, not elsewhere."""
        wait = self.accept_old_refuse_new()
        for route in (WEBSOCKET, OTHER):
            self.assertEqual(self.choose(NEW, route), NEW)
        self.refuse(NEW, WEBSOCKET)
        self.assertEqual(self.choose(NEW, WEBSOCKET), OLD)
        self.refuse(NEW, OTHER)
        self.assertIsInstance(self.choose(NEW, OTHER), Held)
        self.refuse(OLD, WEBSOCKET)
        self.assertIsInstance(self.choose(NEW, WEBSOCKET), Held)
        self.assertEqual(self.choose(NEW), OLD)
        self.now += wait
        self.assertEqual(self.choose(NEW), NEW)

    def test_a_websocket_that_checks_nothing(self) -> None:
        """A plain backend registers anybody: that displaces nothing on HTTP, where the token is checked."""
        self.accept_old_refuse_new()
        self.choose(NEW, WEBSOCKET)
        self.table.accepted(WEBSOCKET, NEW)
        self.assertEqual(self.choose(NEW), OLD)
        self.assertEqual(self.table.kept(), {HTTP: OLD, WEBSOCKET: NEW})

    def test_taken_by_the_other_transport(self) -> None:
        """
        A WebSocket that was opened with the earlier token stays open with it; when the backend takes the newest over
        HTTP there is nothing to complain of. Where nothing works it is still refused.
        """
        for stands_in in (True, False):
            self.setUp()
            if stands_in:
                self.table.remember({WEBSOCKET: OLD})
            self.choose(NEW, WEBSOCKET)
            self.refuse(NEW, WEBSOCKET)
            self.choose(NEW, WEBSOCKET)
            self.assertEqual(self.table.refusing, [WEBSOCKET])
            self.choose(NEW)
            self.table.accepted(HTTP, NEW)
            self.assertEqual(self.table.refusing, [] if stands_in else [WEBSOCKET])
            self.assertEqual(self.table.standing_in, [WEBSOCKET] if stands_in else [])

    def test_late_answers(self) -> None:
        """An answer to what was sent with the old token does not displace the new one, whichever way it goes."""
        self.choose(OLD)
        self.choose(NEW)
        self.assertTrue(self.table.accepted(HTTP, OLD))
        self.assertTrue(self.table.accepted(HTTP, NEW))
        self.assertFalse(self.table.accepted(HTTP, OLD))
        self.refuse(OLD)
        self.assertEqual((self.choose(NEW), self.table.refusing), (NEW, []))
        self.assertEqual(self.table.kept(), {HTTP: NEW})

    def test_no_token(self) -> None:
        """To be without a token may be refused like one, and is nothing to keep."""
        nothing = Token("")
        self.assertEqual(self.choose(nothing), nothing)
        self.assertFalse(self.table.accepted(HTTP, nothing))
        self.assertEqual(self.table.kept(), {})
        self.refuse(nothing)
        self.assertIsInstance(self.choose(nothing), Held)

    def test_remembered(self) -> None:
        """What an earlier run has kept stands in."""
        self.table.remember({HTTP: OLD})
        self.assertEqual(self.choose(NEW), NEW)
        self.refuse(NEW)
        self.assertEqual(self.choose(NEW), OLD)

    def test_many_in_a_row(self) -> None:
        """A new token for every refusal is no way around it: after a few each one waits, until one is accepted."""
        for turn in range(2):
            for number in range(FREE):
                token = Token(f"t{turn}-{number}")
                self.assertEqual(self.choose(token), token)
                wait = self.refuse(token)
            for number in range(5):
                shown = self.choose(Token(f"u{number}"))
                self.assertTrue(shown == NEW if turn else isinstance(shown, Held), shown)
                self.now += wait / 5 + 0.001
            self.assertEqual(self.choose(NEW), NEW)
            self.table.accepted(HTTP, NEW)

    def test_many_in_a_row_beside_one_that_works(self) -> None:
        """The accepted one goes on meanwhile, standing in or given by the provider."""
        self.accept_old_refuse_new()
        for number in range(FREE):
            self.choose(Token(f"t{number}"))
            self.refuse(Token(f"t{number}"))
            self.assertEqual(self.choose(Token(f"t{number}")), OLD)
            self.table.accepted(HTTP, OLD)
        self.assertEqual(self.choose(NEWER), OLD)
        self.assertEqual(self.table.standing_in, [HTTP])
        self.assertEqual(self.choose(OLD), OLD)
        self.assertEqual(self.table.standing_in, [])

    def test_bounded(self) -> None:
        """However many tokens a provider gives and a backend refuses, no more than a few are remembered."""
        for number in range(1000):
            self.refuse(Token(f"t{number}"))
        self.assertLess(len(self.table._records[HTTP].held_until), 20)


TOKENS = [Token(name, expires) for name, expires in (("a", None), ("b", 40.0), ("c", 90.0))]


class AnyOrderTests(SynchronousTestCase):
    """Whatever happens in whatever order."""

    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from([HTTP, WEBSOCKET]),
                st.sampled_from([*TOKENS, None]),
                st.sampled_from(["accepted", "refused", "no answer"]),
                st.floats(0.0, 40.0),
            ),
            max_size=40,
        )
    )
    @settings(deadline=None, max_examples=300, database=None)
    def test_promises(self, steps: list[tuple[Route, Token | None, str, float]]) -> None:
        """
        No token is shown on a route within half the delay of its refusal there; the newest goes first when it may; and
        while an accepted one is neither refused nor expired there is always something to show.
        """
        delay = 20.0
        table = TokenTable(refused_delay=delay, random=Random(1))
        now = 0.0
        refused: dict[tuple[Route, str], float] = {}
        works: dict[Route, Token] = {}
        for route, newest, outcome, passes in steps:
            now += passes
            chosen = table.choose(route, newest, now=now, wall=now)
            earlier = works.get(route)
            if isinstance(chosen, Held):
                assert earlier is None or (earlier.expires_at or 1e9) <= now
                assert chosen.seconds <= REFUSED_SPREAD * delay
                continue
            assert now - refused.get((route, chosen.value), -1e9) >= delay / 2
            if newest is not None and chosen != newest:
                latest = max(at for (where, _), at in refused.items() if where == route)
                assert now - refused.get((route, newest.value), latest) < REFUSED_SPREAD * delay
            if chosen != newest:
                assert (chosen.expires_at or 1e9) > now
            if outcome == "accepted":
                table.accepted(route, chosen)
                works[route] = chosen
            elif outcome == "refused":
                table.refused(route, chosen, now)
                refused[route, chosen.value] = now
                if works.get(route) == chosen:
                    del works[route]
            for backend in {route.backend for route, *_ in steps}:
                assert table.stands(backend) == (
                    any(each.backend == backend for each in table.refusing),
                    any(each.backend == backend for each in table.standing_in),
                )
