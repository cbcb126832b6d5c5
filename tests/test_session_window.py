"""The window of messages in flight, against a plain model."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.session.window import Window
from commsmgr.spool import Entry
from tests.link_kit import entry

bounded = settings(deadline=None, max_examples=200, database=None, suppress_health_check=[HealthCheck.too_slow])


def sized(seq: int, id: str, size: int) -> Entry:
    """Return a message of so many bytes."""
    return entry(seq, bytes(size), id=id)


class WindowTests(SynchronousTestCase):
    """What is admitted, and what a receipt settles."""

    def test_count_bounds(self) -> None:
        """No more messages than allowed are in flight, however small."""
        window = Window(2, 1000)
        window.add([sized(1, "a", 0)])
        self.assertTrue(window.admits(0))
        window.add([sized(2, "b", 0)])
        self.assertFalse(window.admits(0))

    def test_bytes_bound(self) -> None:
        """The bytes in flight may reach the bound and not pass it."""
        window = Window(10, 1000)
        window.add([sized(1, "a", 600)])
        self.assertTrue(window.admits(400))
        self.assertFalse(window.admits(401))
        self.assertEqual((len(window), window.bytes), (1, 600))

    def test_room(self) -> None:
        """The room is what the bounds leave, and nothing when a message larger than the window is in flight."""
        window = Window(2, 1000)
        self.assertEqual(window.room, (2, 1000))
        window.add([sized(1, "a", 600)])
        self.assertEqual(window.room, (1, 400))
        window.clear()
        window.add([sized(1, "a", 5000)])
        self.assertEqual(window.room, (1, 0))

    def test_empty_admits_anything(self) -> None:
        """A message larger than the window passes alone, or it would wait for ever; the next one waits for it."""
        window = Window(10, 1000)
        self.assertTrue(window.admits(5000))
        window.add([sized(1, "a", 5000)])
        self.assertFalse(window.admits(0))
        window.settle(["a"])
        self.assertTrue(window.admits(5000))

    def test_settle(self) -> None:
        """Receipts count once, in their order; ids that are not in flight are the caller's strays."""
        window = Window(10, 1000)
        for seq, name in ((1, "a"), (2, "b"), (3, "c")):
            window.add([sized(seq, name, 10)])
        self.assertEqual(window.settle(["c", "x", "a", "c"]), [3, 1])
        self.assertEqual(window.settle(["a"]), [])
        self.assertEqual((len(window), window.bytes, window.ids), (1, 10, {"b"}))

    def test_clear(self) -> None:
        """The end of the connection says how many went without a receipt, and what was in flight may be sent anew."""
        window = Window(10, 1000)
        window.add([sized(1, "a", 10)])
        window.add([sized(2, "b", 10)])
        self.assertEqual(window.clear(), 2)
        self.assertEqual((len(window), window.bytes, window.clear()), (0, 0, 0))
        window.add([sized(1, "a", 10)])
        self.assertEqual(window.settle(["a"]), [1])

    def test_in_flight_twice(self) -> None:
        """Sending what is in flight already is refused, and leaves the window as it was."""
        window = Window(10, 1000)
        window.add([sized(1, "a", 10)])
        self.assertRaises(ValueError, window.add, [sized(2, "b", 10), sized(3, "a", 10)])
        self.assertRaises(ValueError, window.add, [sized(2, "b", 10), sized(3, "b", 10)])
        self.assertEqual((len(window), window.bytes, window.ids), (1, 10, {"a"}))

    @bounded
    @given(
        st.lists(
            st.tuples(st.just("add"), st.integers(0, 60))
            | st.tuples(st.just("settle"), st.lists(st.integers(0, 20), max_size=5))
            | st.tuples(st.just("clear"), st.none()),
            max_size=40,
        )
    )
    def test_against_a_model(self, steps: list[tuple[str, object]]) -> None:
        """Whatever the order of sending and settling: the bounds hold and the books balance."""
        window, model, next_seq = Window(5, 100), dict[int, int](), 0
        for _, argument in steps:
            if isinstance(argument, int):
                admits = not model or (len(model) < 5 and sum(model.values()) + argument <= 100)
                self.assertEqual(window.admits(argument), admits)
                if admits:
                    window.add([sized(next_seq, f"id{next_seq}", argument)])
                    model[next_seq] = argument
                    next_seq += 1
            elif isinstance(argument, list):
                expected = [seq for seq in dict.fromkeys(argument) if model.pop(seq, None) is not None]
                self.assertEqual(window.settle(f"id{seq}" for seq in argument), expected)
            else:
                self.assertEqual(window.clear(), len(model))
                model.clear()
            self.assertEqual((len(window), window.bytes), (len(model), sum(model.values())))
            self.assertEqual(window.ids, {f"id{seq}" for seq in model})
