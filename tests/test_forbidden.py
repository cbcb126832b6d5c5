"""What no code of ours may do with what it is given: unpickle it, evaluate it, hand it to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).resolve().parent.parent

MODULES = frozenset(
    ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib", "code")
)  # fmt: skip
"""Whoever can read with these has run what was written; ``code`` is an interpreter."""

BUILTINS = frozenset(("eval", "exec", "compile", "__import__"))

CALLS = frozenset((
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "pty.spawn", "tempfile.mktemp", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "timeit.timeit",
    "twisted.persisted.sob.load", "twisted.spread.jelly.unjelly", "twisted.python.reflect.namedAny",
))  # fmt: skip

IMPORTERS = frozenset(("importlib.import_module", "__import__"))


def names(tree: ast.Module) -> dict[str, str]:
    """Return what each name that is imported stands for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(node: ast.expr, known: dict[str, str]) -> str:
    """Return the full name of what ``node`` is, as far as it is one."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{called(node.value, known)}.{node.attr}"
    return "?"


def forbidden(source: str) -> Iterator[str]:
    """Yield what ``source`` does that it must not, with the line."""
    tree = ast.parse(source)
    known = names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in MODULES:
                    yield f"line {node.lineno}: imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield f"line {node.lineno}: imports {node.module}"
        elif isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            yield f"line {node.lineno}: names {node.id}"  # called, or passed on under another name
        elif isinstance(node, ast.Attribute | ast.Name) and called(node, known) in CALLS:
            yield f"line {node.lineno}: names {called(node, known)}"
        elif isinstance(node, ast.Call):
            if any(word.arg == "shell" and not is_false(word.value) for word in node.keywords):
                yield f"line {node.lineno}: uses a shell"
            given = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if called(node.func, known) in IMPORTERS and given and given[0].partition(".")[0] in MODULES:
                yield f"line {node.lineno}: imports {given[0]}"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


class Package(SynchronousTestCase):
    def test_nothing_forbidden(self) -> None:
        """Neither the package nor the plugin does any of it."""
        paths = [*(ROOT / "commsmgr").rglob("*.py"), *(ROOT / "twisted").rglob("*.py"), ROOT / "setup.py"]
        self.assertGreater(len(paths), 100)
        self.assertIn(ROOT / "twisted" / "plugins" / "commsmgr_plugin.py", paths)
        for path in paths:
            self.assertEqual([], list(forbidden(path.read_text("utf-8"))), path)


class Planted(SynchronousTestCase):
    """The rule finds what it is there for, and nothing else."""

    def test_found(self) -> None:
        """Each way to say it."""
        for source in (
            "import pickle",
            "import pickle as p\np.loads(x)",
            "from pickle import loads",
            "def f():\n    import marshal",
            "import shelve, os",
            "import dill.source",
            "import importlib\nimportlib.import_module('pickle')",
            "from importlib import import_module as load\nload('marshal')",
            "__import__('pickle')",
            "eval(x)",
            "exec(x)",
            "compile(x, 'y', 'exec')",
            "run = eval\nrun(x)",
            "list(map(eval, x))",
            "import builtins\nbuiltins.exec(x)",
            "from builtins import eval as e\ne(x)",
            "import os\nos.system(x)",
            "from os import system\nsystem(x)",
            "import os as o\no.popen(x)",
            "import subprocess\nsubprocess.run(x, shell=True)",
            "from subprocess import Popen\nPopen(x, shell=yes)",
            "import subprocess\nsubprocess.getoutput(x)",
            "import asyncio\nasyncio.create_subprocess_shell(x)",
            "import yaml\nyaml.load(x)",
            "from yaml import unsafe_load\nunsafe_load(x)",
            "import tempfile\ntempfile.mktemp()",
            "from twisted.spread.jelly import unjelly\nunjelly(x)",
        ):
            self.assertTrue(list(forbidden(source)), source)

    def test_allowed(self) -> None:
        """What only looks like it."""
        for source in (
            "import re\nre.compile(x)",
            "db.execute(x)",
            "model.eval()",
            "import subprocess\nsubprocess.run([x], shell=False)",
            "reactor.spawnProcess(p, x, [x])",
            "import yaml\nyaml.safe_load(x)",
            "import importlib\nimportlib.import_module('psutil')",
            "'eval(x)'",
            "from commsmgr.errors import code\ncode",
        ):
            self.assertEqual([], list(forbidden(source)), source)
