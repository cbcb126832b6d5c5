"""What a start loads: a module that is added to it must be worth its time, and is named here when it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).resolve().parent.parent

NOT_AT_START = {
    "argparse": "the command line of the tools",
    "commsmgr.backend": "the reference backend",
    "commsmgr.cli": "the command line of the tools",
    "commsmgr.demo": "the demo",
    "commsmgr.spooltool": "the tools for spools",
    "commsmgr.systemd_unit": "the tools",
    "pdb": "debugging",
    "pip": "packaging",
    "pkg_resources": "packaging",
    "requests": "another HTTP client",
    "setuptools": "packaging",
    "twisted.conch": "SSH",
    "twisted.trial": "tests",
    "twisted.web.resource": "the status page, which is off unless observe.listen is set",
    "twisted.web.server": "the status page",
    "unittest": "tests",
    "xml": "templates of pages",
}
"""What an agent with the default settings has no use for when it starts, and what it is for."""

SHARE = 0.4
"""
The most that commsmgr's own modules, and what they load beyond the libraries, may take of the whole import.

They took a quarter when this was set, by the least of three runs. The rest is margin for a busy machine.
"""

OWN_MODULES = 150
"""The most modules of its own that a start may load; 131 when this was set. Each costs about as much as a small class
hierarchy: a file to find, to read and to unpack."""

OTHERS = ("COVERAGE_", "PYTHONDONTWRITEBYTECODE")
"""Beginnings of variables that have a Python load more than it is told to, or compile at each start."""

TWISTD = "import twisted.application.app, twisted.internet.reactor, twisted.python.logfile, twisted.scripts.twistd\n"
LIBRARIES = f"{TWISTD}import benchmarks.programs.libraries, encodings.idna, tomllib\n"
"""What is there before commsmgr is: twistd, and the libraries that it is built upon."""


def run(code: str, *options: str) -> str:
    """Run ``code`` in a Python of its own from the repository's root; return what it wrote to both outputs."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(OTHERS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def loaded(code: str) -> set[str]:
    """Return the modules that ``code`` loads."""
    return set(run(f"{code}\nimport sys\nprint('loaded', *sys.modules)").rpartition("loaded ")[2].split())


def times(code: str) -> dict[str, int]:
    """Return the microseconds that each module that ``code`` loads took, without those that it loads itself."""
    found = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", run(code, "-X", "importtime"), re.MULTILINE)
    return {name: int(microseconds) for microseconds, name in found}


def shared(libraries: set[str]) -> tuple[float, dict[str, int]]:
    """Return which part of the import is commsmgr's, and what each module took that is not one of ``libraries``."""
    found = times(f"{LIBRARIES}import commsmgr.tap")
    added = {name: taken for name, taken in found.items() if name not in libraries}
    return sum(added.values()) / sum(found.values()), added


class Start(SynchronousTestCase):
    """``twistd commsmgr``, before its reactor turns."""

    def test_nothing_in_vain(self) -> None:
        """What an agent needs later or never is not loaded; what is loaded all the same is named, with who loads it."""
        found = loaded("import commsmgr.tap")
        wrong = {
            name: purpose
            for name, purpose in NOT_AT_START.items()
            if any(module == name or module.startswith(f"{name}.") for module in found)
        }
        told = "\n".join(f"  {name} ({purpose}): {loader(name)}" for name, purpose in wrong.items())
        self.assertEqual({}, wrong, f"loaded at every start:\n{told}")

    def test_own_modules(self) -> None:
        """The start does not load ever more modules of commsmgr's own."""
        own = sorted(name for name in loaded("import commsmgr.tap") if name.partition(".")[0] == "commsmgr")
        self.assertLessEqual(len(own), OWN_MODULES, f"all of them: {own}")

    def test_share(self) -> None:
        """What commsmgr adds to the libraries is a small part of the import; else the dearest modules are named."""
        libraries = loaded(LIBRARIES)
        # Whatever else the machine does comes on top, now here and now there: the least of some is the nearest.
        share, added = min((shared(libraries) for _ in range(3)), key=itemgetter(0))
        self.assertIn("commsmgr.tap", added)
        dearest = sorted(added.items(), key=lambda item: -item[1])[:10]
        told = "\n".join(f"  {taken} us: {name}" for name, taken in dearest)
        self.assertLessEqual(share, SHARE, f"{share:.0%} of the import is commsmgr's; most of it took\n{told}")

    def test_collector(self) -> None:
        """No garbage is looked for among modules while they are loaded, nor ever after; and then it is looked for."""
        code = (
            "import gc\n"
            "runs = []\n"
            "gc.callbacks.append(lambda phase, info: runs.append(info['generation']))\n"
            "import commsmgr.tap\n"
            "print(len(runs), gc.isenabled(), gc.get_freeze_count() > 10000)\n"
        )
        runs, enabled, frozen = run(code).split()
        # Before that come the modules of twistd itself, which is not there yet in this process.
        before = "import gc\nruns = []\ngc.callbacks.append(lambda phase, info: runs.append(1))\n"
        before += (
            "import msgspec, twisted.application.service, twisted.python.logfile, commsmgr.process\nprint(len(runs))"
        )
        self.assertLessEqual(int(runs), int(run(before)) + 10)
        self.assertEqual(("True", "True"), (enabled, frozen))

    def test_reference(self) -> None:
        """What the benchmark of the start is compared with loads nothing that an agent does not load."""
        extra = loaded(LIBRARIES) - loaded(f"{TWISTD}import commsmgr.tap, psutil")
        self.assertEqual({"benchmarks", "benchmarks.programs", "benchmarks.programs.libraries"}, extra)


def loader(module: str) -> str:
    """Return by way of what ``module`` is loaded: its name, and who imports whom up to the start."""
    code = (
        "import builtins, sys, traceback\n"
        f"wanted = {module!r}\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == wanted:\n"
        "            frames = [frame for frame in traceback.extract_stack() if 'importlib' not in frame.filename]\n"
        "            print(*(f'{frame.filename}:{frame.lineno}' for frame in frames[1:-1]), sep=' > ')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import commsmgr.tap\n"
    )
    return run(code).strip() or "by Python itself"
