"""The benchmarks' own machinery: what is compared with what, turns, and what is said on mistakes."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import msgspec
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from benchmarks import guard, measure, report, summary
from benchmarks.__main__ import benchmarks
from benchmarks.contenders.growing import Grow, grown
from benchmarks.counted import WORK
from benchmarks.measure import Benchmark, Contender, Figure, Missing, Result, Server, Target
from benchmarks.sample import Sample, Watch, percentile

CONTENDERS = Path(measure.__file__).parent / "contenders"
SQLITE, RAW = "SQLite, one table, WAL, FULL", "append + fdatasync"
FLEET = ("commsmgr managers", "cpu", "autobahn connections")
CHEAP = (
    ("websocket-send", "commsmgr, session, results checked and redacted", "cpu", "autobahn, encoded before"),
    ("websocket-receive", "commsmgr, session", "cpu", "autobahn + json.loads"),
    ("websocket-round-trip", "commsmgr, session", "p50", "autobahn, encoded before"),
    ("http-singly", "commsmgr", "cpu", "treq"),
)
DURABLE, REDACTED = "commsmgr, durable", "commsmgr, session, results checked and redacted"
IN_SHORT = (
    ("takes less processor time than one of paho-mqtt's", ("results-20", DURABLE, "cpu", summary.PAHO), (0, 1)),
    ("a quarter of it or less", ("results-1000", DURABLE, "cpu", summary.PAHO), (0, 0.27)),
    ("nats-py is ahead with twenty", ("results-20", DURABLE, "cpu", summary.NATS), (1, 1.5)),
    ("and behind with a thousand", ("results-1000", DURABLE, "cpu", summary.NATS), (0, 1)),
    ("takes about 0.6 of what autobahn", ("websocket-send", REDACTED, "cpu", "autobahn, encoded before"), (0.45, 0.75)),
    ("about a quarter of", ("websocket-receive", "commsmgr, session", "cpu", "autobahn + json.loads"), (0.2, 0.3)),
    ("about what it takes treq", ("http-singly", "commsmgr", "cpu", "treq"), (0.8, 1.1)),
    ("about 0.4 of its rate", ("spool-singly", "commsmgr", "rate", RAW), (0.35, 0.47)),
    ("less than 0.3 by the hundred", ("spool-by-100", "commsmgr", "rate", RAW), (0, 0.3)),
)
"""What the page says first: words, the figure behind them, and between what it has to lie."""
KEPT = measure.ROOT / "docs" / "benchmarks.json"


def sample(cpu: float, wall: float = 1.0, **extra: float) -> Sample:
    """Return what a run of a million operations has yielded."""
    return Sample(1_000_000, cpu, wall, extra)


class Figures(SynchronousTestCase):
    """From samples to verdicts."""

    def setUp(self) -> None:
        ours, theirs = ([sample(cpu) for cpu in found] for found in ((2.0, 30.0, 4.0), (1.0, 10.0, 4.0)))
        self.samples = {"ours": ours, "theirs": theirs}

    def test_values(self) -> None:
        """Times are microseconds an operation, a rate is operations a second, the rest is as it was measured."""
        one = sample(2.0, 4.0, held=7.0)
        self.assertEqual([2.0, 4.0, 250_000.0, 7.0], [one.value(each) for each in ("cpu", "wall", "rate", "held")])
        self.assertEqual(3.5, one.value("held/cpu"))

    def test_grown(self) -> None:
        """Each change is measured on top of what is given, and tells its processor time, or its copies."""
        seen: list[dict[str, float]] = []

        async def measure(**given: float) -> Sample:
            seen.append(given)
            return sample(given["size"], held=7.0, copies=9.0)

        grow: Grow = {"large": {"size": 5.0}, "memory": {"size": 6.0, "traced": True}}
        found = self.successResultOf(Deferred.fromCoroutine(grown(measure, {"size": 2.0, "window": 1.0}, grow)))
        self.assertEqual((2.0, {"held": 7.0, "copies": 9.0, "large": 5.0, "memory": 9.0}), (found.cpu, found.extra))
        self.assertEqual([2.0, 5.0, 6.0], [given["size"] for given in seen])
        self.assertEqual([1.0] * 3, [given["window"] for given in seen])

    def test_median(self) -> None:
        """The figure is the median with its range."""
        self.assertEqual(Figure(4.0, 2.0, 30.0), measure.figure([2.0, 30.0, 4.0]))

    def test_ratios(self) -> None:
        """A ratio is taken within each round: a slow round for both is none for the ratio."""
        self.assertEqual(Figure(2.0, 1.0, 3.0), measure.ratios(self.samples, "cpu", "ours", "theirs"))

    def test_verdicts(self) -> None:
        """A target is reached when the median lies within its bounds."""
        for target, reached in (
            (Target("ours", "cpu", "theirs", at_most=2.0), True),
            (Target("ours", "cpu", "theirs", at_most=1.9), False),
            (Target("ours", "cpu", "theirs", at_least=2.1), False),
            (Target("ours", "cpu", at_most=4.0), True),
            (Target("ours", "cpu", at_most=3.9), False),
        ):
            self.assertEqual(reached, measure.verdict(self.samples, target).reached, target)

    def test_percentile(self) -> None:
        """By nearest rank."""
        self.assertEqual([50, 99, 99], [percentile(range(100), part) for part in (0.5, 0.99, 1.0)])

    def test_watch(self) -> None:
        """It measures what lies between start and stop."""
        watch = Watch()
        watch.start()
        found = watch.stop(2, held=1.0)
        self.assertEqual((2, {"held": 1.0}), (found.operations, found.extra))
        self.assertGreaterEqual(found.wall, 0.0)


class Running(SynchronousTestCase):
    """Contenders as processes."""

    def lacking(self) -> Contender:
        """Return a contender whose library is not installed, for this test at least."""
        hidden = Path(self.mktemp()).absolute()
        hidden.mkdir()
        (hidden / "diskcache.py").write_text("raise ModuleNotFoundError(\"No module named 'diskcache'\")")
        self.patch(measure, "environment", lambda: {**os.environ, "PYTHONPATH": f"{hidden}:{measure.ROOT}"})
        return self.contender("no package", "queues:diskcache", synchronous=1)

    def contender(self, name: str, run: str = "raw_log:run", **arguments: int) -> Contender:
        return Contender(name, run, {"operations": 20, "size": 10, "batch": 10, **arguments})

    def test_turns(self) -> None:
        """Each round runs every contender once, and another one is first each time."""
        said: list[str] = []
        benchmark = Benchmark("b", "t", (self.contender("one"), self.contender("two")), "one")
        result = measure.compare(benchmark, 2, said.append)
        self.assertEqual(["one", "two", "two", "one"], [line.split()[2].rstrip(":") for line in said])
        self.assertEqual(Figure(1.0, 1.0, 1.0), result.ratios["one"]["cpu"])
        self.assertEqual(2, result.rounds)

    def test_failure(self) -> None:
        """What a contender says when it fails is shown, and it never counts as measured."""
        error = self.assertRaises(RuntimeError, measure.run, self.contender("one", operations="x"), {})
        self.assertIn("TypeError", str(error))

    def test_missing(self) -> None:
        """A package or program that is not there is named, with how to get it."""
        error = self.assertRaises(Missing, measure.run, self.lacking(), {})
        self.assertIn("diskcache is not installed (pip install", str(error))
        with (
            self.assertRaises(Missing) as caught,
            measure.serving(Server(("commsmgr-is-not-there", "{port}"), package="some-package")),
        ):
            pass
        self.assertIn("apt-get install some-package", str(caught.exception))

    def test_mistaken_import(self) -> None:
        """A module of our own that is not found, or one whose absence was dealt with, is no package to install."""
        error = self.assertRaises(RuntimeError, measure.run, self.contender("one", "not_there:run"), {})
        self.assertIn("benchmarks.contenders.not_there", str(error))
        for line, package in (
            ("No module named 'nats'", "nats"),
            ("No module named 'nats.js'; 'nats' is not a package", "nats.js"),
            ("No module named 'commsmgr.nothing'", ""),
            ("No module named 'nats'\n\nDuring handling of the above exception\nValueError: x", ""),
        ):
            text = f"Traceback (most recent call last):\nModuleNotFoundError: {line}\n"
            self.assertEqual(package, measure.not_installed(text), line)

    def test_some_are_missing(self) -> None:
        """Where one contender cannot be measured the others are, and no target that concerns it is judged."""
        servers = {"there-is-none": Server(("commsmgr-is-not-there", "{port}"), package="some-package")}
        contenders = (
            self.contender("ours"),
            self.lacking(),
            Contender("no server", "raw_log:run", {}, server="there-is-none"),
        )
        targets = (Target("ours", "cpu", "no package"), Target("ours", "cpu", at_least=0.0))
        result = measure.compare(Benchmark("b", "t", contenders, "ours", servers=servers, targets=targets), 2)
        self.assertEqual(["ours"], list(result.figures))
        self.assertEqual({"no package", "no server"}, result.missing.keys())
        self.assertEqual([targets[1]], [each.target for each in result.verdicts])
        self.assertIn("  not measured: no server: commsmgr-is-not-there is not installed", report.table(result))
        with self.assertRaises(Missing):
            measure.compare(Benchmark("b", "t", contenders, "no package", servers=servers), 1)

    def test_server_ends(self) -> None:
        """A server that ends at once is no server."""
        with self.assertRaises(RuntimeError), measure.serving(Server(("false", "{port}"))):
            pass


class Known(SynchronousTestCase):
    """The benchmarks that there are."""

    def test_consistent(self) -> None:
        """References, targets, servers and functions that a benchmark names exist."""
        found = benchmarks()
        self.assertIn("spool-singly", found)
        for name, benchmark in found.items():
            self.assertEqual(name, benchmark.name)
            contenders = [each.name for each in benchmark.contenders]
            self.assertEqual(len(set(contenders)), len(contenders))
            named = {benchmark.reference, *(each.contender for each in benchmark.targets)}
            named |= {each.against for each in benchmark.targets if each.against}
            self.assertEqual(set(), named - set(contenders), name)
            for contender in benchmark.contenders:
                self.assertIn(contender.server, {"", *benchmark.servers}, name)
                module, _, function = contender.run.partition(":")
                # Not imported: what it needs is not installed for the tests.
                tree = ast.parse((CONTENDERS / f"{module}.py").read_text("utf-8"))
                defined = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
                self.assertIn(function, defined, contender.run)
            for server in benchmark.servers.values():
                if len(server.command) == 1:
                    self.assertTrue((CONTENDERS.parent / "servers" / f"{server.command[0]}.py").exists(), server)
                else:
                    self.assertTrue(server.package, server)


class Reports(SynchronousTestCase):
    """What is shown."""

    def setUp(self) -> None:
        figures = {"ours": {"cpu": Figure(2.0, 1.0, 3.0)}, "theirs": {"cpu": Figure(1.0, 0.5, 1234.0)}}
        target = Target("ours", "cpu", "theirs", at_most=1.5)
        least = Target("ours", "cpu", at_least=1.5)
        verdicts = [measure.Verdict(target, Figure(2.0, 1.0, 3.0), False)]
        verdicts.append(measure.Verdict(least, Figure(2.0, 1.0, 3.0), True))
        self.result = Result("name", "a title", "theirs", 3, figures, figures, verdicts)

    def test_table(self) -> None:
        """It has each contender with median, range and ratio, and each target with what became of it."""
        text = report.table(self.result)
        self.assertIn("name: a title\n  3 rounds, medians [least to most], ratios to theirs\n", text)
        self.assertIn("  theirs  us CPU 1 [0.5 to 1234]  x1.00 [0.50 to 1234.00]", text)
        self.assertIn("  NOT REACHED: ours to theirs, us CPU: 2, wanted at most 1.5", text)
        self.assertIn("  reached: ours, us CPU: 2, wanted at least 1.5", text)

    def test_restructured(self) -> None:
        """The page's table says the same; the reference's ratio is 1, and one round alone has no range."""
        self.assertIn("   * - ours\n     - 2 [1 to 3]\n     - x2.00 [1.00 to 3.00]\n", report.restructured(self.result))
        once = report.restructured(msgspec.structs.replace(self.result, rounds=1))
        self.assertIn("a title (1 round, ratios to theirs)", once)
        self.assertIn("   * - ours\n     - 2\n     - x2.00\n   * - theirs\n     - 1\n     - 1\n", once)
        alone = msgspec.structs.replace(self.result, figures={"theirs": {"cpu": Figure(1.0, 0.5, 2.0)}})
        self.assertIn("a title (3 rounds)", report.restructured(alone))
        self.assertIn("   * - theirs\n     - 1 [0.5 to 2]\n\n", report.restructured(alone))

    def test_json(self) -> None:
        """What was written is read back."""
        path = Path(self.mktemp())
        report.write_json([self.result], path)
        kept = report.read_json(path)
        self.assertEqual(([self.result], report.machine()), (kept.results, kept.machine))
        self.assertIn(f"twisted {kept.machine.versions['twisted']}", report.measured_with(kept.machine))


class Kept(SynchronousTestCase):
    """The figures that the documentation shows."""

    def setUp(self) -> None:
        self.results = report.read_json(KEPT).results

    def value(self, benchmark: str, contender: str, metric: str = "cpu", against: str = "") -> float:
        return summary.found(summary.Row("", benchmark, contender, metric, against), self.results)[0].median

    def test_summary(self) -> None:
        """Each row finds its figure: a ratio to the reference, one that a target names, or a figure by itself."""
        text = summary.restructured(self.results)
        self.assertEqual(len(summary.ROWS) + 1, text.count("   * - "))
        for row in summary.ROWS:
            self.assertIn(f" - {row.work}\n     - ", text)
            self.assertIn(f"     - {summary.MEASURES[row.metric]}\n     - {row.against}", text)
        self.assertNotIn("(one run)", text.partition("connected and idle")[0])
        self.assertIn("(one run)", text)
        figures = {"ours": {"cpu": Figure(2.0, 1.0, 3.0)}}
        ratios = {"ours": {"cpu": Figure(0.5, 0.4, 0.6)}}
        verdict = measure.Verdict(Target("ours", "cpu", "third"), Figure(7.0, 6.0, 8.0), True)
        self.results = [Result("b", "t", "theirs", 3, figures, ratios, [verdict])]
        self.assertEqual([2.0, 0.5, 7.0], [self.value("b", "ours", "cpu", each) for each in ("", "theirs", "third")])
        self.assertRaises(LookupError, self.value, "b", "ours", "cpu", "fourth")

    def test_sentences(self) -> None:
        """What sentences say in figures lies near what was kept."""
        few, many = (self.value(f"results-{window}", "commsmgr, durable") for window in (20, 1000))
        batch = "as much processor time as fifteen to twenty of them", 20 * (few - many) / many, 12, 23
        kept = "growth-websocket-copies"
        cheap = "To send, receive and check a message costs less than with the bare libraries"
        for page, words, found, least, most in (
            ("docs/speed.rst", *batch),
            ("docs/design.rst", *batch),
            ("docs/speed.rst", "gets 0.4 to 0.6", self.value("spool-by-100", SQLITE, "rate", RAW), 0.35, 0.65),
            ("docs/speed.rst", "about twice what a bare", self.value("fleet", *FLEET), 1.7, 2.3),
            ("docs/speed.rst", "five times as many bytes", self.value(kept, "commsmgr, in memory", "10_MB"), 4.5, 5.5),
            ("docs/speed.rst", "(autobahn: 3.5 times)", self.value(kept, "autobahn", "10_MB"), 3.3, 3.7),
            *(("docs/speed.rst", words, self.value(*row), *bounds) for words, row, bounds in IN_SHORT),
            *(("README.md", cheap, self.value(*each), 0, 1) for each in CHEAP),
        ):
            text = " ".join((measure.ROOT / page).read_text("utf-8").split())
            self.assertIn(words, text, page)
            self.assertTrue(least <= found <= most, (page, words, found))


class Guard(SynchronousTestCase):
    """The guard that counts instructions."""

    def test_log(self) -> None:
        """The count is read from what cachegrind says; without one there is no verdict."""
        self.assertEqual(2345023081, guard.instructions("==3== \n==3== I   refs:      2,345,023,081\n"))
        self.assertRaises(RuntimeError, guard.instructions, "==3== Killed\n")

    def test_judged(self) -> None:
        """Each kind of work has a bound, and one that is above it is too much."""
        self.assertEqual({f"{kind}/{side}" for kind in guard.MOST for side in ("bare", "commsmgr")}, set(WORK))
        counts = dict.fromkeys(WORK, 100.0)
        counts |= {f"{kind}/commsmgr": 100.0 * most for kind, most in guard.MOST.items()}
        self.assertTrue(guard.judge(counts)[1])
        lines, good = guard.judge({**counts, "http/commsmgr": 100.0 * guard.MOST["http"] + 1})
        self.assertFalse(good)
        self.assertEqual([kind == "http" for kind in guard.MOST], ["TOO MUCH" in line for line in lines])
