"""Health: alive, ready, and the sentence that says why not."""

from __future__ import annotations

from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.observe.health import explain, live, ready
from commsmgr.status import (
    BackendStatus,
    Connecting,
    Draining,
    Idle,
    LinkState,
    QueueStatus,
    Registered,
    Registering,
    Status,
    Waiting,
)

NOON = 1_795_348_800.0  # 2026-11-22T12:00:00Z


def backend(link: LinkState, name: str = "primary", **more: object) -> BackendStatus:
    fields: dict[str, object] = {"url": "https://b.example", "active": True, "breaker": "closed", **more}
    return BackendStatus(name=name, link=link, **fields)  # type: ignore[arg-type]  # the fields are the caller's


def status(*backends: BackendStatus, **more: object) -> Status:
    fields: dict[str, object] = {
        "running": True,
        "connected": False,
        "reachable": False,
        "machine_id": "m",
        "version": "1",
        "queue": QueueStatus(),
        **more,
    }
    return Status(backends=backends, **fields)  # type: ignore[arg-type]  # the fields are the caller's


class VerdictTests(SynchronousTestCase):
    """Yes or no."""

    def test_live(self) -> None:
        """A running manager is alive, whatever the backends do."""
        self.assertTrue(live(status()))
        self.assertFalse(live(status(running=False, connected=True, reachable=True)))

    def test_ready(self) -> None:
        """A manager is ready while it runs and a backend can be reached over either transport."""
        self.assertTrue(ready(status(connected=True)))
        self.assertTrue(ready(status(reachable=True)))
        self.assertFalse(ready(status()))
        self.assertFalse(ready(status(running=False, connected=True, reachable=True)))


class ExplainTests(SynchronousTestCase):
    """The paragraph."""

    def test_connected(self) -> None:
        """While connected it names backend, dialect, TLS and since when."""
        connected = status(backend(Registered(NOON, "commsmgr.v1", "TLSv1.3")), connected=True)
        self.assertEqual(explain(connected), "connected to primary (commsmgr.v1, TLSv1.3) since 2026-11-22T12:00:00Z")

    def test_active_first(self) -> None:
        """While two backends are registered the active one is named."""
        standby = backend(Registered(NOON, "plain"), "old", active=False)
        active = backend(Registered(NOON, "plain"), "new")
        self.assertEqual(
            explain(status(standby, active, connected=True)),
            "connected to new (plain, without TLS) since 2026-11-22T12:00:00Z",
        )

    def test_every_other_state(self) -> None:
        """While not connected it says of each backend how it stands and why."""
        for link, said in (
            (Idle(), "primary is not wanted now"),
            (
                Waiting("name not found.", NOON, 3),
                "primary failed after 3 attempts: name not found; the next one starts at 2026-11-22T12:00:00Z",
            ),
            (
                Waiting("refused", NOON, 1),
                "primary failed after 1 attempt: refused; the next one starts at 2026-11-22T12:00:00Z",
            ),
            (Connecting(NOON), "primary is being connected since 2026-11-22T12:00:00Z"),
            (Registering(NOON), "primary has not answered the registration sent at 2026-11-22T12:00:00Z"),
            (Draining(NOON), "primary is being left since 2026-11-22T12:00:00Z"),
            (
                Registered(NOON, "plain"),
                (
                    "primary is registered (plain, without TLS) since 2026-11-22T12:00:00Z, "
                    "but has not proven lately that it takes what is sent (never so far)"
                ),
            ),
        ):
            self.assertEqual(explain(status(backend(link))), f"not connected: {said}")

    def test_registered_without_proof(self) -> None:
        """A registered link that has gone quiet is not called connected, and its last proof is dated."""
        said = explain(status(backend(Registered(NOON, "plain"), last_receipt=NOON)))
        self.assertIn("not connected: primary is registered", said)
        self.assertTrue(said.endswith("(last at 2026-11-22T12:00:00Z)"))

    def test_several(self) -> None:
        """Several backends stand side by side, with breaker and last error."""
        self.assertEqual(
            explain(
                status(
                    backend(Waiting("refused", NOON, 2), breaker="half_open", last_error="refused"),
                    backend(Idle(), "second", last_error="HTTP 503"),
                    reachable=True,
                )
            ),
            "not connected, but reachable over HTTP: primary failed after 2 attempts: refused; the next one starts at "
            "2026-11-22T12:00:00Z, its circuit breaker is half-open; second is not wanted now, last error: HTTP 503",
        )

    def test_not_running(self) -> None:
        """A stopped manager says so, and says its problems."""
        self.assertEqual(
            explain(status(running=False, problems=("the spool is locked.", "no token"))),
            "not connected: the manager is not running. the spool is locked. no token",
        )

    def test_no_backend(self) -> None:
        """Without backends it says that."""
        self.assertEqual(explain(status()), "not connected: no backend is configured")

    def test_queue(self) -> None:
        """What waits is counted and dated, with the room that is left."""
        connected = status(backend(Registered(NOON, "plain")), connected=True)
        for queue, said in (
            (QueueStatus(events=1, event_bytes=5), "1 event waits (5 bytes)"),
            (
                QueueStatus(events=2, event_bytes=5, oldest_event_at=NOON, outage_budget=90.4, dead_letters=1),
                (
                    "2 events wait (5 bytes), the oldest since 2026-11-22T12:00:00Z; "
                    "at the present rate there is room for another 90 s. 1 dead letter"
                ),
            ),
            (QueueStatus(dead_letters=2), "2 dead letters"),
        ):
            self.assertEqual(explain(replace(connected, queue=queue)).partition("Z. ")[2], said)

    def test_spool_in_trouble(self) -> None:
        """A spool in trouble makes the manager unready, but not dead, and is said once."""
        queue = QueueStatus(trouble="the disk is gone")
        for problems in ((), ("the disk is gone",)):
            said = status(connected=True, queue=queue, problems=problems)
            self.assertFalse(ready(said))
            self.assertTrue(live(said))
            self.assertEqual(explain(said).count("the disk is gone"), 1)

    def test_foreign_text(self) -> None:
        """Text from outside stays on the line, and an impossible time breaks nothing."""
        said = explain(status(backend(Waiting("evil\nconnected to all", float("nan"), 1))))
        self.assertIn(r"evil\nconnected", said)
        self.assertTrue(said.endswith("starts at nan s"))
