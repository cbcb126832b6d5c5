"""Metadata, plugin, and the first screen of the README: what a newcomer meets before any code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import _version

ROOT = Path(__file__).resolve().parent.parent
SCREEN = 24  # lines of a terminal

DEMO = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/twistd -n commsmgr --demo"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m twisted.trial tests"


def python(code: str) -> str:
    """Run ``code`` in a Python of its own, from the root of the repository; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def metadata() -> dict[str, Any]:
    """Return what ``setup.py`` passes to setuptools, which need not be installed for that."""
    given: dict[str, Any] = {}
    fake = type(sys)("setuptools")
    fake.setup = given.update  # type: ignore[attr-defined]  # a module made here
    fake.find_packages = lambda include: [  # type: ignore[attr-defined]  # a module made here
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in sorted(ROOT.glob("commsmgr/**/__init__.py"))
        if include == ["commsmgr", "commsmgr.*"]
    ]
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = fake
    try:
        source = (ROOT / "setup.py").read_text("utf-8")
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    finally:
        del sys.modules["setuptools"]
        if before is not None:
            sys.modules["setuptools"] = before
    return given


class Metadata(SynchronousTestCase):
    """``setup.py``."""

    def setUp(self) -> None:
        self.given = metadata()

    def test_version(self) -> None:
        """The version is said once, and the metadata, the module and the public name agree."""
        self.assertEqual(self.given["version"], _version.__version__)
        self.assertRegex(_version.__version__, r"^\d+\.\d+\.\d+")

    def test_packages(self) -> None:
        """Every package is listed, with the directory for plugins, and Twisted itself is not claimed."""
        directories = {path.parent for path in (ROOT / "commsmgr").rglob("*.py")}
        expected = {".".join(path.relative_to(ROOT).parts) for path in directories}
        self.assertEqual(set(self.given["packages"]), expected | {"twisted.plugins"})
        self.assertEqual(list((ROOT / "twisted").rglob("__init__.py")), [])

    def test_data(self) -> None:
        """Every file in the package that is not Python is in its package's data."""
        listed: set[Path] = set()
        for package, patterns in self.given["package_data"].items():
            for pattern in patterns:
                listed |= set((ROOT / package.replace(".", "/")).glob(pattern))
        # Beside compiled modules there may, for a moment, be one that another process is just writing.
        files = {path for path in (ROOT / "commsmgr").rglob("*") if path.is_file() and path.suffix != ".py"}
        files = {path for path in files if path.parent.name != "__pycache__"}
        self.assertEqual(files - listed, set())
        self.assertIn(ROOT / "commsmgr" / "py.typed", listed)

    def test_editable(self) -> None:
        """After the README's second command ``twistd`` still finds the plugin, from whatever directory."""
        self.assertEqual(self.given["options"], {"editable_wheel": {"mode": "compat"}})

    def test_requirements(self) -> None:
        """What the package imports is required by name, unless it comes with Twisted; nothing is required in vain."""
        with_twisted = {"zope", "constantly", "automat"}
        optional = {"psutil"}
        modules = {
            "service-identity": "service_identity",
            "prometheus-client": "prometheus_client",
            "pyopenssl": "OpenSSL",
        }
        required = {re.split(r"[\[<>=~]", line)[0] for line in self.given["install_requires"]}
        required = {modules.get(name, name) for name in required}
        imported = set()
        for path in (ROOT / "commsmgr").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
        foreign = imported - set(sys.stdlib_module_names) - {"commsmgr"} - with_twisted - optional
        self.assertEqual(foreign - required, set())
        self.assertEqual(required - foreign - {"treq"}, set())

    def test_tools_file_has_no_metadata(self) -> None:
        """``pyproject.toml`` names the build backend and configures tools; metadata is in one place."""
        with open(ROOT / "pyproject.toml", "rb") as file:
            self.assertEqual(set(tomllib.load(file)), {"build-system", "tool"})


class Plugin(SynchronousTestCase):
    """``twisted/plugins/commsmgr_plugin.py``."""

    def test_lazy(self) -> None:
        """Finding the plugin, which every ``twistd`` does, imports nothing of commsmgr and none of its libraries."""
        printed = python(
            "import sys\n"
            "from twisted.application.service import IServiceMaker\n"
            "from twisted.plugin import getPlugins\n"
            "import twisted.plugins.commsmgr_plugin\n"
            "heavy = ('commsmgr', 'treq', 'autobahn', 'msgspec', 'OpenSSL', 'twisted.internet.reactor')\n"
            "print([name for name in heavy if name in sys.modules])\n"
        )
        self.assertEqual(printed.strip(), "[]")

    def test_commands(self) -> None:
        """Both commands are offered, each with a sentence of its own and the module that makes its service."""
        printed = python(
            "from twisted.application.service import IServiceMaker\n"
            "from twisted.plugin import getPlugins\n"
            "for maker in getPlugins(IServiceMaker):\n"
            "    if 'commsmgr' in maker.tapname:\n"
            "        print(maker.tapname, maker.module, maker.description)\n"
        )
        lines = sorted(printed.splitlines())
        self.assertEqual(
            [line.split()[:2] for line in lines],
            [["commsmgr", "commsmgr.tap"], ["commsmgr-backend", "commsmgr.backend.tap"]],
        )
        self.assertEqual(len({line.split(maxsplit=2)[2] for line in lines}), 2)

    def test_modules(self) -> None:
        """The modules that the plugin names can be imported and have what ``twistd`` calls."""
        for module in ("commsmgr.tap", "commsmgr.backend.tap"):
            printed = python(f"import {module} as tap; print(tap.Options().getSynopsis(), callable(tap.makeService))")
            self.assertIn("True", printed)


class Readme(SynchronousTestCase):
    """The first screen."""

    def setUp(self) -> None:
        self.text = (ROOT / "README.md").read_text("utf-8")

    def test_two_commands(self) -> None:
        """The first screen shows exactly two commands, the demo and the tests, which need nothing before them."""
        commands = re.findall(r"^```sh\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.assertEqual([command.strip() for command in commands], [DEMO, TESTS])
        screen = "\n".join(self.text.splitlines()[:SCREEN])
        self.assertIn(DEMO, screen)
        self.assertIn(TESTS, screen)

    def test_example(self) -> None:
        """The embedding example is short, and runs with the names that it uses."""
        (example,) = re.findall(r"^```python\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.assertLessEqual(len([line for line in example.splitlines() if line.strip()]), 8)
        python("from twisted.application.service import Application\napplication = Application('agent')\n" + example)

    def test_configuration(self) -> None:
        """The example of a configuration has only keys that exist."""
        (example,) = re.findall(r"^```toml\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        from commsmgr.config import Config
        from commsmgr.shape import mismatches

        self.assertEqual(list(mismatches(tomllib.loads(example), Config)), [])

    def test_links(self) -> None:
        """What the README links to is there."""
        for target in re.findall(r"\]\(([^)]+)\)", self.text):
            self.assertTrue((ROOT / target).exists(), target)

    def test_tox_runs_the_same(self) -> None:
        """tox's default environment runs what the README's second command runs, with the same extra."""
        tox = (ROOT / "tox.ini").read_text("utf-8")
        self.assertIn("python -m twisted.trial {posargs:tests}", tox)
        self.assertIn("\nextras = test\n", tox)
        self.assertIn("\nenv_list = tests\n", tox)

    def test_ci_runs_the_line(self) -> None:
        """The check script takes its test line from the README, and can be started."""
        script = ROOT / ".ci" / "run"
        self.assertTrue(os.access(script, os.X_OK))
        text = script.read_text("utf-8")
        self.assertIn("README.md", text)
        self.assertNotIn("pip install -e '.[test]'", text)
