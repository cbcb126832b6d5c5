"""Loss receipts from the agent's side: one at a time, over each link once, until a backend has it."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config, loss_reports
from commsmgr.errors import SpoolWriteFailed
from commsmgr.loss_reports import LossReports
from commsmgr.observe.metrics import Metrics
from commsmgr.openlink import LinkEvents
from commsmgr.spool.lossbook import LossBook
from tests.link_kit import TIMESTAMP, LinkBench, pass_time
from tests.test_spool_losses import LossWorld

WHOLE = config.Config(
    backends=(config.Backend(url="http://one.example"),), reconnect=config.Reconnect(retry_after_cap=60.0)
)


class LossReportsTests(SynchronousTestCase):
    """Reports on real links over fake connections, and a real spool in memory."""

    def setUp(self) -> None:
        self.world = LossWorld()
        self.clock = self.world.clock
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, seconds=self.clock.seconds)
        self.ids = 0
        self.reports = LossReports(
            self.world.spool.losses, WHOLE, new_id=self.new_id, clock=self.clock, metrics=self.metrics
        )
        self.world.open()
        self.logged: list[LogEvent] = []
        globalLogPublisher.addObserver(self.logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.logged.append)

    def new_id(self) -> str:
        self.ids += 1
        return f"l{self.ids}"

    def link(self, *, v1: bool = True) -> LinkBench:
        """Return a link that is registered."""
        bench = LinkBench(
            self.clock,
            v1=v1,
            settings=config.WebSocket(ping_interval=0),
            metrics=self.metrics,
            events=LinkEvents(
                registered=self.reports.link_registered,
                ended=self.reports.link_ended,
                receipts=lambda link, seqs: None,
                refused=lambda link, seq, refusal: None,
                command=lambda link, command: None,
                pushed=lambda push: None,
                settings=lambda settings: None,
                losses_acked=self.reports.acked,
                losses_refused=self.reports.refused,
            ),
        )
        self.addCleanup(self.end, bench)
        bench.register()
        return bench

    def end(self, bench: LinkBench) -> None:
        bench.link.ended()
        self.reports.link_ended(bench.link)

    def lose(self, count: int = 1, reason: str = "refused: 404") -> None:
        self.world.lose(reason, count)

    def told(self, bench: LinkBench) -> list[tuple[str, list[tuple[str, int]]]]:
        """Return the receipts sent on a link: id, and reason and count of each row."""
        return [
            (message["id"], [(row["reason"], row["count"]) for row in message["data"]["losses"]])
            for message in bench.connection.texts("loss_receipt")
        ]

    def counted(self, outcome: str) -> float:
        labels = {"kind": "loss_receipt", "direction": "out", "outcome": outcome}
        return self.registry.get_sample_value("commsmgr_messages_total", labels) or 0.0

    def events(self, name: str) -> list[LogEvent]:
        return [event for event in self.logged if event.get("event") == name]

    def test_message(self) -> None:
        """A receipt says how many of which kind were lost, why, and from when to when."""
        bench = self.link()
        self.lose(1)
        self.assertEqual(
            bench.connection.texts("loss_receipt"),
            [
                {
                    "type": "loss_receipt",
                    "id": "l1",
                    "timestamp": TIMESTAMP,
                    "data": {
                        "losses": [
                            {
                                "reason": "refused",
                                "kind": "note",
                                "count": 1,
                                "first_at": "1970-01-01T00:16:40.000Z",
                                "last_at": "1970-01-01T00:16:40.000Z",
                            }
                        ]
                    },
                }
            ],
        )

    def test_nothing_lost(self) -> None:
        """Without losses nothing is sent, and no heartbeat has anything to tell."""
        bench = self.link()
        self.world.get(self.world.event("kept"))
        self.assertEqual((self.told(bench), self.reports.outstanding, self.ids), ([], None, 0))

    def test_one_at_a_time(self) -> None:
        """What is lost while a receipt is outstanding goes with the next one, all of it at once."""
        bench = self.link()
        self.lose()
        self.lose(5)
        self.lose(2, "expired")
        self.assertEqual(self.told(bench), [("l1", [("refused", 1)])])
        bench.ack("l1")
        self.world.run()
        self.assertEqual(self.told(bench)[1:], [("l2", [("expired", 2), ("refused", 5)])])
        bench.ack("l2")
        self.world.run()
        self.assertEqual((len(self.told(bench)), self.reports.outstanding), (2, None))
        self.assertEqual((self.counted("acked"), self.world.spool.losses.unreported), (2, 0))
        self.assertEqual([event["count"] for event in self.events("losses.reported")], [1, 7])

    def test_before_there_is_a_link(self) -> None:
        """What was lost without a link is told after the next registration, and until then in heartbeats."""
        self.lose(3)
        outstanding = self.reports.outstanding
        assert outstanding is not None
        self.assertEqual((outstanding.id, outstanding.losses[0].count), ("l1", 1))
        self.assertEqual(self.told(self.link()), [("l1", [("refused", 1)])])

    def test_every_link_once(self) -> None:
        """Without an ack the same receipt goes over the next link again, and over one link only once."""
        self.lose()
        benches = [self.link(), self.link()]
        for bench in benches:
            self.lose()
            self.assertEqual(self.told(bench), [("l1", [("refused", 1)])])
            self.assertEqual(bench.connection.killed, [])
            self.end(bench)
        self.reports.acked("l1")
        self.world.run()
        self.assertEqual(self.told(self.link()), [("l2", [("refused", 2)])])

    def test_old_link(self) -> None:
        """The end of an older link does not concern the one in use."""
        old, new = self.link(), self.link()
        self.end(old)
        self.lose()
        self.assertEqual((len(self.told(old)), len(self.told(new))), (0, 1))

    def test_plain(self) -> None:
        """A plain backend has no word for it: nothing is sent, and heartbeats go on telling."""
        bench = self.link(v1=False)
        self.lose()
        bench.say({"type": "ack", "ids": ["l1"]})
        self.assertEqual(self.told(bench), [])
        self.assertIsNotNone(self.reports.outstanding)

    def test_draining(self) -> None:
        """Nothing new is sent on a link that is being left."""
        bench = self.link()
        bench.link.drain()
        self.lose()
        self.assertEqual(self.told(bench), [])

    def test_by_heartbeat(self) -> None:
        """An acknowledgement counts whichever way it comes, once, and a late one of another receipt changes nothing."""
        bench = self.link()
        self.lose()
        self.reports.acked("")
        self.reports.acked("l0")
        self.assertEqual(self.world.spool.losses.unreported, 1)
        self.reports.acked("l1")
        self.reports.acked("l1")
        bench.ack("l1")
        self.world.run()
        self.assertEqual((self.reports.outstanding, self.counted("acked")), (None, 1))
        self.lose()
        self.assertEqual(self.told(bench)[1:], [("l2", [("refused", 1)])])

    def test_refused_for_good(self) -> None:
        """A nack without a time ends it, with a line in the log: no loop. What is lost later is told anew."""
        bench = self.link()
        self.lose()
        bench.nack("l1")
        self.world.run()
        self.assertEqual((self.reports.outstanding, self.counted("refused")), (None, 1))
        (event,) = self.events("losses.refused")
        self.assertEqual((event["count"], event["code"]), (1, "busy"))
        bench.nack("l1")
        pass_time(self.clock, 3600)
        self.assertEqual((len(self.told(bench)), self.world.spool.losses.unreported), (1, 0))
        self.lose()
        self.assertEqual(self.told(bench)[1:], [("l2", [("refused", 1)])])

    def test_later(self) -> None:
        """A nack with a time puts it off, within bounds on both sides."""
        bench = self.link()
        self.lose()
        for asked, waited in ((0, 0.5), (7, 7), (1e6, 60)):
            sent = len(self.told(bench))
            bench.nack("l1", retry_after=asked)
            bench.nack("l1", retry_after=asked)
            pass_time(self.clock, waited - 0.1)
            self.assertEqual(len(self.told(bench)), sent)
            pass_time(self.clock, 0.1)
            self.assertEqual(self.told(bench)[sent:], [("l1", [("refused", 1)])])
        self.assertEqual(self.counted("deferred"), 3)

    def test_later_than_the_link(self) -> None:
        """A link that ends takes the pause with it: the next one is told at once, and no timer is left."""
        bench = self.link()
        self.lose()
        bench.nack("l1", retry_after=30)
        self.end(bench)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(len(self.told(self.link())), 1)

    def test_acked_during_the_pause(self) -> None:
        """A receipt that a heartbeat brought meanwhile is not sent again; the next one waits for the pause's end."""
        bench = self.link()
        self.lose()
        bench.nack("l1", retry_after=30)
        self.reports.acked("l1")
        self.lose()
        self.assertEqual(len(self.told(bench)), 1)
        pass_time(self.clock, 30)
        self.assertEqual(self.told(bench)[1:], [("l2", [("refused", 1)])])

    def test_asked_once(self) -> None:
        """Losses that come while the spool makes a receipt do not make it make another."""
        waiting: list[Any] = [self.world.event(f"e{n}") for n in range(3)]
        for seq in [self.world.get(each) for each in waiting]:
            self.world.outbox.bury(seq, "refused")
        self.world.run()
        self.assertEqual(self.ids, 1)

    def test_closed_spool(self) -> None:
        """A spool that closes meanwhile is no failure; what was lost is told after the next start."""
        self.lose()
        closing = self.world.spool.close()
        self.reports.acked("l1")
        self.world.get(closing)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_closed_spool_on_a_failing_disk(self) -> None:
        """Nor is one whose disk does not take the last word."""
        self.lose()

        def fails(book: LossBook, id: str) -> int:
            raise SpoolWriteFailed("the disk fails")

        self.patch(LossBook, "forget", fails)
        self.reports.acked("l1")
        self.world.get(self.world.spool.close())
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_defect(self) -> None:
        """A defect is logged and stops nothing: the next loss tries again."""
        patch = self.patch(LossBook, "pending_report", lambda book, new_id, now: 1 // 0)
        self.lose()
        self.assertEqual(len(self.flushLoggedErrors()), 1)
        self.assertIsNone(self.reports.outstanding)
        patch.restore()
        self.lose()
        bench = self.link()
        self.assertEqual(self.told(bench), [("l2", [("refused", 2)])])

    def test_defect_of_ours(self) -> None:
        """So is one on the way from the spool to the link, with the event that says what it stops."""
        bench = self.link()
        patch = self.patch(loss_reports, "rfc3339", lambda at: 1 // 0)
        self.lose()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((len(self.events("losses.failed")), self.reports.outstanding), (1, None))
        patch.restore()
        self.lose()
        self.assertEqual(self.told(bench), [("l1", [("refused", 1)])])
        # After the ack too: what was lost meanwhile is told with the loss that comes next.
        patch = self.patch(self.reports, "_new_id", lambda: 1 // 0)
        self.reports.acked("l1")
        self.world.run()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(len(self.events("losses.failed")), 2)
        patch.restore()
        self.lose()
        self.assertEqual(self.told(bench)[1:], [("l3", [("refused", 2)])])
