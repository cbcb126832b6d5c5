"""Moments as text."""

from __future__ import annotations

from datetime import UTC, datetime

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.instants import Timestamps, rfc3339, shown


class Clock(SynchronousTestCase):
    """The time now, told again and again."""

    def test_tells_the_time(self) -> None:
        """Each text is the moment's, to the millisecond, in whatever order moments come."""
        now = 0.0
        tell = Timestamps(lambda: now)
        for now, told in (
            (1_800_000_000.0, "2027-01-15T08:00:00.000Z"),
            (1_800_000_000.0625, "2027-01-15T08:00:00.062Z"),
            (1_800_000_000.9999, "2027-01-15T08:00:00.999Z"),
            (1_800_000_001.0, "2027-01-15T08:00:01.000Z"),
            (1_799_999_999.5, "2027-01-15T07:59:59.500Z"),
            (1_800_000_000.9999998, "2027-01-15T08:00:00.999Z"),
            (0.9999999, "1970-01-01T00:00:00.999Z"),
            (-0.25, "1969-12-31T23:59:59.750Z"),
            (-1e-20, "1969-12-31T23:59:59.999Z"),
            # Times 1000 this is a whole number, in floats.
            (1_900_983_196.9259999, "2030-03-29T02:53:16.925Z"),
        ):
            self.assertEqual(told, tell())
            self.assertEqual(told, rfc3339(now))
            self.assertEqual(told[:19] + "Z", shown(now))
            at = datetime.fromisoformat(told).astimezone(UTC).timestamp()
            self.assertLess(at - now, 1e-15)
            self.assertLessEqual(now - at, 0.001)

    def test_no_date(self) -> None:
        """A moment beyond all dates is an error, from one as from the other."""
        self.assertRaises(ValueError, Timestamps(lambda: 1e18))
        for moment in (1e18, -1e18, float("nan"), float("inf"), 10**400, "1" * 10, None, b""):
            self.assertRaises(ValueError, rfc3339, moment)
        for seconds in (1e18, float("nan"), float("-inf"), None):
            self.assertEqual(shown(seconds), f"{seconds} s")
