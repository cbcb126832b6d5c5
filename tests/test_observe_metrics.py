"""Metrics: what is counted, what Prometheus is shown, and what cannot grow without bound."""

from __future__ import annotations

from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import errors
from commsmgr.errors import ConfigError
from commsmgr.observe.metrics import Metrics, reason_label
from commsmgr.status import QueueStatus


class MetricsCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"commsmgr_{name}", labels)


class LinkTests(MetricsCase):
    """Backends, links, tokens and certificates."""

    def test_registered_and_ended(self) -> None:
        """A link that registers and ends shows in the gauge, and is counted with its dialect and its cause."""
        self.metrics.link_registered("primary", "plain")
        self.assertEqual(self.value("connected", backend="primary"), 1)
        self.assertEqual(self.value("connections_total", backend="primary", dialect="plain"), 1)
        self.metrics.link_ended("primary", "peer-silent")
        self.metrics.link_ended("primary", "peer-silent")
        self.assertEqual(self.value("connected", backend="primary"), 0)
        self.assertEqual(self.value("reconnects_total", backend="primary", reason="peer-silent"), 2)

    def test_wanted_end(self) -> None:
        """An end that the manager wanted is no reconnect."""
        self.metrics.link_registered("primary", "plain")
        self.metrics.link_ended("primary", None)
        self.assertEqual(self.value("connected", backend="primary"), 0)
        self.assertNotIn(b"commsmgr_reconnects_total{", generate_latest(self.registry))

    def test_configured(self) -> None:
        """Configured backends are there from the first scrape on, and naming them again resets nothing."""
        self.metrics.configured(["a", "b"])
        self.assertEqual(self.value("connected", backend="b"), 0)
        self.assertEqual(self.value("breaker_state", backend="b"), 0)
        self.assertEqual(self.value("seconds_since_receipt", backend="b"), inf)
        self.metrics.link_registered("a", "plain")
        self.metrics.configured(["a"])
        self.assertEqual(self.value("connected", backend="a"), 1)

    def test_receipt(self) -> None:
        """The age of the last receipt grows until the next one; a clock that steps back makes it 0, not negative."""
        self.metrics.receipt("a")
        self.clock.advance(7)
        self.assertEqual(self.value("seconds_since_receipt", backend="a"), 7)
        self.metrics.receipt("a")
        self.clock.rightNow -= 100
        self.assertEqual(self.value("seconds_since_receipt", backend="a"), 0)

    def test_breaker(self) -> None:
        """The states of the breaker are 0, 1 and 2."""
        for state, number in (("open", 2), ("half_open", 1), ("closed", 0)):
            self.metrics.breaker("a", state)
            self.assertEqual(self.value("breaker_state", backend="a"), number)

    def test_expiries(self) -> None:
        """Expiries are timestamps; a token that names none has no series."""
        self.metrics.token_expires(5000.0)
        self.metrics.certificate_expires("a", 6000.0)
        self.assertEqual(self.value("token_expiry_timestamp_seconds"), 5000)
        self.assertEqual(self.value("certificate_expiry_timestamp_seconds", backend="a"), 6000)
        self.metrics.token_expires(None)
        self.metrics.token_expires(None)
        self.assertIsNone(self.value("token_expiry_timestamp_seconds"))


class MessageTests(MetricsCase):
    """Messages, bytes and durations."""

    def test_messages(self) -> None:
        """Messages are counted singly or by the batch; kinds that a peer made up count as other."""
        self.metrics.message("command_result", "out", "acked")
        self.metrics.message("command_result", "out", "acked", 10)
        self.metrics.message("made-up-1", "in", "ok")
        self.metrics.message("made-up-2", "in", "ok")
        self.assertEqual(self.value("messages_total", kind="command_result", direction="out", outcome="acked"), 11)
        self.assertEqual(self.value("messages_total", kind="other", direction="in", outcome="ok"), 2)

    def test_simple_counters(self) -> None:
        """Bytes and invalid messages are summed by their labels."""
        self.metrics.traffic("out", "http", 100)
        self.metrics.traffic("out", "http", 50)
        self.metrics.invalid("not-json")
        self.assertEqual(self.value("bytes_total", direction="out", transport="http"), 150)
        self.assertEqual(self.value("invalid_messages_total", reason="not-json"), 1)

    def test_exchange(self) -> None:
        """Durations fall into cumulative buckets, a bound belongs to its bucket, and unknown routes count as other."""
        for seconds in (0.005, 0.03, 100.0):
            self.metrics.exchange("/heartbeat", "ok", seconds)
        self.metrics.exchange("/made/up", "http-404", 1.0)
        labels = {"route": "/heartbeat", "outcome": "ok"}
        self.assertEqual(self.value("request_seconds_bucket", le="0.005", **labels), 1)
        self.assertEqual(self.value("request_seconds_bucket", le="0.05", **labels), 2)
        self.assertEqual(self.value("request_seconds_bucket", le="60.0", **labels), 2)
        self.assertEqual(self.value("request_seconds_bucket", le="+Inf", **labels), 3)
        self.assertEqual(self.value("request_seconds_count", **labels), 3)
        self.assertAlmostEqual(self.value("request_seconds_sum", **labels) or 0, 100.035)
        self.assertEqual(self.value("request_seconds_count", route="other", outcome="http-404"), 1)

    def test_command(self) -> None:
        """Commands are timed by the status of their result."""
        self.metrics.command_finished("timeout", 300.0)
        self.assertEqual(self.value("command_seconds_bucket", le="300.0", status="timeout"), 1)
        self.assertEqual(self.value("command_seconds_bucket", le="60.0", status="timeout"), 0)

    def test_series_are_bounded(self) -> None:
        """A label that turns out unbounded fills no memory: from 500 series on everything new counts as other."""
        for number in range(600):
            self.metrics.invalid(f"reason-{number}")
            self.metrics.exchange("/heartbeat", f"outcome-{number}", 1.0)
        self.assertEqual(self.value("invalid_messages_total", reason="reason-0"), 1)
        self.assertEqual(self.value("invalid_messages_total", reason="other"), 100)
        self.assertEqual(self.value("request_seconds_count", route="other", outcome="other"), 100)
        self.metrics.invalid("reason-0")
        self.assertEqual(self.value("invalid_messages_total", reason="reason-0"), 2)


class QueueTests(MetricsCase):
    """What is asked at the scrape."""

    def test_watch(self) -> None:
        """The queue is asked at each scrape and nothing of it is remembered."""
        held = QueueStatus(
            events=3, event_bytes=400, dead_letters=2, oldest_event_at=990.0, outage_budget=77.0, open_commands=1,
            dropped={"expired": 3, "refused": 1},
        )  # fmt: skip
        self.metrics.watch(lambda: held)
        for name, value in (
            ("queue_events", 3),
            ("queue_bytes", 400),
            ("queue_oldest_seconds", 10),
            ("dead_letters", 2),
            ("open_commands", 1),
            ("outage_budget_seconds", 77),
        ):
            self.assertEqual(self.value(name), value, name)
        self.assertEqual([self.value("dropped_total", reason=reason) for reason in ("expired", "refused")], [3, 1])
        held = QueueStatus(oldest_event_at=2000.0)
        self.assertEqual(self.value("queue_events"), 0)
        self.assertEqual(self.value("queue_oldest_seconds"), 0)
        self.assertEqual(self.value("outage_budget_seconds"), inf)

    def test_spool_ok(self) -> None:
        """An alert sees that the spool is in trouble, and that it is over."""
        for trouble, value in (("", 1), ("damaged", 0), ("", 1)):
            held = QueueStatus(trouble=trouble)
            self.metrics.watch(lambda held=held: held)
            self.assertEqual(self.value("spool_ok"), value)

    def test_unwatched(self) -> None:
        """Before there is a queue, it is shown as empty."""
        self.assertEqual(self.value("queue_events"), 0)
        self.assertEqual(self.value("queue_oldest_seconds"), 0)
        self.assertNotIn(b"commsmgr_dropped_total{", generate_latest(self.registry))


class RegistryTests(MetricsCase):
    """How it lives with registries."""

    def test_two_on_one(self) -> None:
        """A second manager on the same registry is refused, and told what to do."""
        error = self.assertRaises(ConfigError, Metrics, self.registry, seconds=self.clock.seconds)
        self.assertIn("give each manager its own CollectorRegistry", str(error))

    def test_two_registries(self) -> None:
        """Two managers with a registry each count apart."""
        other = CollectorRegistry()
        Metrics(other, seconds=self.clock.seconds).invalid("not-json")
        self.assertIsNone(self.value("invalid_messages_total", reason="not-json"))
        self.assertEqual(other.get_sample_value("commsmgr_invalid_messages_total", {"reason": "not-json"}), 1)

    def test_remove(self) -> None:
        """After removal the registry is empty, and takes the next instance; removing twice harms nobody."""
        self.metrics.remove()
        self.metrics.remove()
        self.assertEqual(generate_latest(self.registry), b"")
        again = Metrics(self.registry, seconds=self.clock.seconds)
        self.metrics.remove()
        again.receipt("a")
        self.assertEqual(self.value("seconds_since_receipt", backend="a"), 0)

    def test_exposition(self) -> None:
        """What is shown parses, has prefix and help everywhere, and names counters as Prometheus does."""
        self.metrics.configured(["a"])
        self.metrics.message("command_result", "out", "acked")
        self.metrics.exchange("/heartbeat", "ok", 1.0)
        families = list(text_string_to_metric_families(generate_latest(self.registry).decode()))
        self.assertEqual(len(families), 23)
        for family in families:
            self.assertTrue(family.name.startswith("commsmgr_"), family.name)
            self.assertTrue(family.documentation.endswith("."), family.name)
            for sample in family.samples:
                self.assertEqual(sample.name.endswith("_total"), family.type == "counter")


class ReasonTests(SynchronousTestCase):
    """Labels of errors."""

    def test_labels(self) -> None:
        """Each error has a label; statuses and codes that the peer chooses are grouped."""
        for error, label in (
            (None, "ok"),
            (errors.HTTPStatusError(status=401), "http-401"),
            (errors.HTTPStatusError(status=418), "http-4xx"),
            (errors.ConnectFailed(), "connect-failed"),
            (errors.ProxyRefused(status=407), "proxy-refused"),
            (errors.UpgradeRefused(status=503), "upgrade-503"),
            (errors.UpgradeRefused(status=302), "upgrade-3xx"),
            (errors.UpgradeRefused(status=0), "upgrade-other"),
            (errors.UpgradeRefused(status=999), "upgrade-other"),
            (errors.ClosedByPeer(code=1008), "close-1008"),
            (errors.ClosedByPeer(code=4401), "close-4xxx"),
            (errors.ClosedByPeer(code=65535), "close-other"),
            (errors.PeerSilent(), "peer-silent"),
            (errors.ConnectionEnded(), "connection-ended"),
            (errors.TLSFailed(), "tls-failed"),
            (errors.PeerViolation(), "peer-violation"),
            (errors.RateExceeded(), "rate-exceeded"),
            (errors.TransportError(), "transport"),
            (errors.QueueFull(), "queue-full"),
            (errors.SpoolLocked(), "spool"),
            (errors.NotRunning(), "usage"),
            (errors.DeadlineExceeded(), "deadline"),
            (CancelledError(), "cancelled"),
            (ValueError(), "error"),
        ):
            self.assertEqual(reason_label(error), label)

    def test_every_error_has_one(self) -> None:
        """No class of the tree is without a label of its own or of a parent."""

        def below(kind: type[errors.CommsError]) -> list[type[errors.CommsError]]:
            return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

        for kind in below(errors.CommsError):
            if kind is not errors.CommsError and kind.__module__ == errors.__name__:
                made = errors.HTTPStatusError(status=200) if kind is errors.HTTPStatusError else kind("fact")
                self.assertNotEqual(reason_label(made), "error", kind)
