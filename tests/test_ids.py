"""Ids: UUIDv7, never twice, never backwards."""

from __future__ import annotations

from random import Random
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.ids import IdSource


class IdTests(SynchronousTestCase):
    """RFC 9562 section 5.7."""

    def setUp(self) -> None:
        self.now = 1_700_000_000.123
        self.new_id = IdSource(lambda: self.now, Random(1))

    def test_form(self) -> None:
        """An id is a UUID of version 7 and of the RFC's variant, whose first 48 bits are the milliseconds."""
        text = self.new_id()
        uuid = UUID(text)
        self.assertEqual((str(uuid), len(text)), (text, 36))
        self.assertEqual((uuid.version, uuid.variant), (7, "specified in RFC 4122"))
        self.assertEqual(uuid.int >> 80, 1_700_000_000_123)

    def test_order(self) -> None:
        """Ids sort by the order of making: within a millisecond, beyond 4096 of them, and when the clock steps back."""
        ids = [self.new_id() for _ in range(5000)]
        self.now += 0.001
        ids += [self.new_id() for _ in range(10)]
        self.now -= 3600
        ids += [self.new_id() for _ in range(10)]
        self.now += 7200
        ids.append(self.new_id())
        self.assertEqual(ids, sorted(set(ids)))
        self.assertTrue(all(UUID(text).version == 7 for text in ids))

    def test_clock_before_the_epoch(self) -> None:
        """A machine whose clock was never set makes ids all the same."""
        self.now = -5.0
        ids = [IdSource(lambda: self.now, Random(seed))() for seed in range(3)]
        self.assertEqual(len({UUID(text) for text in ids}), 3)

    def test_randomness(self) -> None:
        """The random bits come from what was passed in: the same seed makes the same ids, another one others."""
        again, other = IdSource(lambda: self.now, Random(1)), IdSource(lambda: self.now, Random(2))
        text = self.new_id()
        self.assertEqual(again(), text)
        self.assertNotEqual(other(), text)
