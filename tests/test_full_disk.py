"""A disk that is really full: a file system of some MiB, mounted for a process of its own."""

from __future__ import annotations

import sys

from tests.processes import ROOT, ProcessTestCase, reactor


class FullDisk(ProcessTestCase):
    """Runs :mod:`tests.full_disk`."""

    timeout = 90

    async def test_all(self) -> None:
        """Every story of that module ends well; what went wrong is in the message."""
        disk = self.directory / "disk"
        disk.mkdir()
        program = self.start(
            sys.executable, "-m", "tests.full_disk", str(disk), str(self.directory / "trial"), cwd=ROOT
        )
        await program.ended.addTimeout(self.timeout - 10, reactor)
        self.assertEqual(0, program.code, program.text)
        self.assertRegex(program.text, r"PASSED \(successes=\d+\)")
