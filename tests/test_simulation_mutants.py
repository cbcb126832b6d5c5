"""The mutants fit the source: each edit still applies, and what comes out is Python. ``mutants`` itself judges them."""

from __future__ import annotations

import shutil
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.simulation.mutants import MUTANTS, ROOT, Mutant, apply


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
