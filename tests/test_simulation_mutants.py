"""
The mutants fit the source: each edit still applies, and what comes out is Python. One is judged, for the judge's sake.

``python -m tests.simulation.mutants`` judges them all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.mutants import MUTANTS, ROOT, Mutant, apply, judge


class MutantTests(SynchronousTestCase):
    """A mutant that no longer fits would pass for one that was caught."""

    def setUp(self) -> None:
        self.package = Path(self.mktemp())
        shutil.copytree(ROOT / "commsmgr", self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def test_every_edit_fits(self) -> None:
        """Each mutant's edit is made in exactly one place, and leaves a module that can be compiled."""
        for mutant in MUTANTS:
            path = self.package / mutant.module
            original = path.read_text("utf-8")
            apply(mutant, self.package)
            self.assertNotEqual(path.read_text("utf-8"), original, mutant.name)
            compile(path.read_text("utf-8"), str(path), "exec")
            path.write_text(original, "utf-8")

    def test_names_differ(self) -> None:
        """Each mutant can be asked for by its name."""
        self.assertEqual(len({mutant.name for mutant in MUTANTS}), len(MUTANTS))

    def test_misfit(self) -> None:
        """An edit whose place is gone is an error, not a mutant like the original."""
        stale = Mutant("stale", "nothing", "ids.py", "this is not in there", "", ())
        with self.assertRaisesRegex(ValueError, "0 times in ids.py"):
            apply(stale, self.package)


class JudgeTests(SynchronousTestCase):
    """What is wrong is caught, and what is not is not."""

    timeout = 300

    def test_caught(self) -> None:
        """A result that is forgotten without a receipt is lost within a few seeds."""
        (mutant,) = (each for each in MUTANTS if each.name == "forget-on-send")
        verdict = judge(mutant, 12)
        self.assertTrue(verdict.caught, verdict.output[-5000:])

    def test_survives(self) -> None:
        """An edit that changes nothing is caught by nobody, nor is one that cannot even run."""
        for after, seeds in (("# The same as ever.\n    def take(", 2), ("def (", 0)):
            mutant = Mutant("harmless", "nothing", "spool/reader.py", "def take(", after, ("accepted_is_delivered",))
            verdict = judge(mutant, 2)
            self.assertEqual((verdict.caught, verdict.seeds), (False, seeds), verdict.output[-5000:])
