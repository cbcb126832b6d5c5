"""Receipts by ping and pong, against a peer that answers all, the latest, or nothing."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.session.barrier import Barrier

bounded = settings(deadline=None, max_examples=200, database=None, suppress_health_check=[HealthCheck.too_slow])


def ping(payload: bytes | None) -> bytes:
    """Return the payload, which must be there."""
    assert payload is not None
    return payload


class BarrierTests(SynchronousTestCase):
    """When a ping is due, and what its pong proves."""

    def setUp(self) -> None:
        self.barrier = Barrier(b"nonce", every_messages=3, every_bytes=100)

    def test_batch_by_count(self) -> None:
        """The ping is due with the message that fills the batch, and its pong receipts the batch in order."""
        self.assertIsNone(self.barrier.sent("7", 1))
        self.assertIsNone(self.barrier.sent("8", 1))
        payload = ping(self.barrier.sent("9", 1))
        self.assertIsNone(self.barrier.sent("10", 1))
        self.assertEqual(self.barrier.pong(payload), ["7", "8", "9"])

    def test_batch_by_bytes(self) -> None:
        """Few large messages fill a batch as well, and the next batch starts from nothing."""
        self.assertIsNone(self.barrier.sent("1", 99))
        self.assertIsNotNone(self.barrier.sent("2", 1))
        self.assertIsNone(self.barrier.sent("3", 99))

    def test_flush(self) -> None:
        """When there is nothing more to send, what was sent gets its ping; when nothing was, there is none."""
        self.assertIsNone(self.barrier.flush())
        self.barrier.sent("1", 1)
        payload = ping(self.barrier.flush())
        self.assertIsNone(self.barrier.flush())
        self.assertEqual(self.barrier.pong(payload), ["1"])

    def test_probe_is_a_barrier(self) -> None:
        """A keep-alive ping receipts what was sent before it, and a pong for it counts even if that was nothing."""
        self.barrier.sent("1", 1)
        first, second = self.barrier.probe(), self.barrier.probe()
        self.assertEqual(self.barrier.pong(first), ["1"])
        self.assertEqual(self.barrier.pong(second), [])

    def test_pongs_are_cumulative(self) -> None:
        """A peer may answer only the latest ping: that receipts all before it, and a late pong for those is a stray."""
        payloads = []
        for name in ("1", "2", "3"):
            self.barrier.sent(name, 1)
            payloads.append(ping(self.barrier.flush()))
        self.barrier.sent("4", 1)
        self.assertEqual(self.barrier.pong(payloads[1]), ["1", "2"])
        self.assertIsNone(self.barrier.pong(payloads[0]))
        self.assertIsNone(self.barrier.pong(payloads[1]))
        self.assertEqual(self.barrier.pong(payloads[2]), ["3"])

    def test_strays(self) -> None:
        """Pongs that nobody asked for prove nothing: empty, cut, foreign, of another connection, from the future."""
        payload = self.barrier.probe()
        other = Barrier(b"other").probe()
        future = payload[:-1] + b"\x02"
        for stray in (b"", payload[:-1], payload + b"\0", b"\0" + payload, b"x" * 125, other, future, payload[5:]):
            self.assertIsNone(self.barrier.pong(stray), stray)
        self.assertEqual(self.barrier.pong(payload), [])

    def test_oldest_unanswered(self) -> None:
        """It stands still while nothing is receipted, moves with every receipt, and is None when all is."""
        self.assertIsNone(self.barrier.oldest_unanswered)
        first, second = self.barrier.probe(), self.barrier.probe()
        oldest = self.barrier.oldest_unanswered
        self.barrier.probe()
        self.barrier.pong(b"stray")
        self.assertEqual(self.barrier.oldest_unanswered, oldest)
        self.barrier.pong(first)
        self.assertNotIn(self.barrier.oldest_unanswered, (oldest, None))
        self.barrier.pong(second)
        self.barrier.pong(self.barrier.probe())
        self.assertIsNone(self.barrier.oldest_unanswered)

    def test_fits_a_control_frame(self) -> None:
        """The payload is never above the 125 bytes of a control frame; a nonce that would not fit is refused."""
        self.assertEqual(len(Barrier(b"n" * 117).probe()), 125)
        self.assertRaises(ValueError, Barrier, b"n" * 118)
        self.assertRaises(ValueError, Barrier, b"")

    @bounded
    @given(
        st.lists(
            st.tuples(st.just("sent"), st.integers(0, 60))
            | st.tuples(st.sampled_from(["flush", "probe"]), st.none())
            | st.tuples(st.just("pong"), st.integers(0, 8)),
            max_size=60,
        )
    )
    def test_against_a_model(self, steps: list[tuple[str, int | None]]) -> None:
        """A message is receipted once, in order, and only by a pong for a ping that was sent after it."""
        barrier = Barrier(b"nonce", every_messages=3, every_bytes=100)
        sent: list[str] = []
        pings: list[tuple[bytes, int]] = []  # the payload, and how many messages were sent before it
        receipted: list[str] = []
        answered = -1
        for step, argument in steps:
            payload = None
            if step == "sent":
                sent.append(str(len(sent)))
                payload = barrier.sent(sent[-1], argument or 0)
            elif step == "flush":
                payload = barrier.flush()
                self.assertEqual(payload is None, len(sent) == (pings[-1][1] if pings else 0))
            elif step == "probe":
                payload = barrier.probe()
            elif argument is not None and argument < len(pings):
                answer = barrier.pong(pings[argument][0])
                if argument <= answered:
                    self.assertIsNone(answer)
                else:
                    receipted += answer or []
                    answered = argument
                    self.assertEqual(receipted, sent[: pings[argument][1]])
            if payload is not None:
                self.assertNotIn(payload, [known for known, _ in pings])
                pings.append((payload, len(sent)))
            self.assertEqual(barrier.oldest_unanswered is None, answered == len(pings) - 1)
            self.assertLess(len(sent) - (pings[-1][1] if pings else 0), 3)
