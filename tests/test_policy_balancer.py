"""Tests for the choice of the backend."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.policy.balancer import Candidate, choose


def candidates(pattern: str) -> list[Candidate]:
    """Return candidates a, b, c …: an upper-case letter is available, a lower-case one is not."""
    return [Candidate(letter.lower(), letter.isupper()) for letter in pattern]


class ChooseTests(SynchronousTestCase):
    def test_table(self) -> None:
        """The first available one, else the current one, else the first."""
        for pattern, current, chosen in (
            ("ABC", None, "a"),
            ("ABC", "c", "a"),
            ("aBC", "a", "b"),
            ("aBC", "c", "b"),
            ("abC", "b", "c"),
            ("abc", "b", "b"),
            ("abc", None, "a"),
            ("abc", "gone", "a"),
            ("ABC", "gone", "a"),
            ("", None, None),
            ("", "gone", None),
        ):
            self.assertEqual(choose(candidates(pattern), current), chosen, (pattern, current))
