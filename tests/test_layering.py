"""The shape of the package: imports point one way, pure parts stay pure, modules stay small and say what they are."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

PACKAGE = Path(__file__).resolve().parent.parent / "commsmgr"
DESIGN = PACKAGE.parent / "docs" / "design.rst"
LONGEST = 400

# From the bottom to the top: a module or package may import what stands in a lower row. Within a row modules may import
# each other, packages (with a slash) may not.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "_version", "errors", "ids", "messages", "interfaces", "config", "headers", "patterns", "redact",
        "sanitise", "form", "outgoing", "urls", "status", "reference", "shape", "rules", "settings", "waiters",
        "noproxy", "proxies", "bearer", "clock", "process", "privileges", "lazy", "instants", "browsers",
    ),
    ("policy/", "session/"),
    ("spool/", "transport/", "machine", "sources", "psutil_source"),
    ("observe/", "spooltool/"),
    ("auth/",),
    (
        "liveness", "answers", "openlink", "link", "handlers", "backends", "requests", "posting", "delivery", "channel",
        "intake", "loss_reports", "results", "runner", "heartbeats", "inventories", "reporting", "schedules",
    ),
    ("environment", "overview", "assembly", "service", "manager", "__init__"),
    ("systemd", "systemd_unit"),
    ("tap", "demo", "cli", "__main__"),
)  # fmt: skip

# The reference backend is another program, which only shares the language.
BACKEND = "backend"
BACKEND_MAY_IMPORT = {unit.rstrip("/") for unit in LAYERS[0]} | {"session", BACKEND}
MAY_IMPORT_BACKEND = {"tap", "demo"}

PURE = ("policy", "session")
IMPURE = (
    "treq", "autobahn", "prometheus_client", "sqlite3", "socket", "asyncio", "threading", "time",
    "twisted.internet", "twisted.web", "twisted.application",
)  # fmt: skip
MAY_TOUCH_REACTOR = {"commsmgr.tap", "commsmgr.backend.tap"}

RANK = {unit.rstrip("/"): rank for rank, row in enumerate(LAYERS) for unit in row}
PACKAGES = {unit.rstrip("/") for row in LAYERS for unit in row if unit.endswith("/")}

Sources = Mapping[str, str]
"""Dotted module names and their source texts."""


@functools.cache
def parse(source: str) -> ast.Module:
    """Parse ``source``, each text once: the planted cases look at the whole package again and again."""
    return ast.parse(source)


@functools.cache
def read_package() -> dict[str, str]:
    """Return the sources of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


@functools.cache
def imports(source: str, *, everywhere: bool = True) -> tuple[str, ...]:
    """
    Return the full names of what is imported: of modules, and of names in them.

    What stands under ``if TYPE_CHECKING`` never runs and does not count.

    :param everywhere: also within functions.
    """
    found: list[str] = []
    nodes: list[ast.AST] = [parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not everywhere:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        nodes.extend(ast.iter_child_nodes(node))
    return tuple(found)


def unit(module: str) -> str:
    """Return the module or sub-package directly below commsmgr to which ``module`` belongs."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Say whether ``name`` is one of ``prefixes`` or below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def layering(sources: Sources) -> Iterator[str]:
    """Yield the imports that point the wrong way, and modules that have no place in the table."""
    units = {unit(module) for module in sources}
    for module, source in sources.items():
        here = unit(module)
        if here not in RANK and here != BACKEND:
            yield f"{module} has no layer: give it one"
            continue
        for name in imports(source):
            if not within(name, ("commsmgr",)):
                continue
            there = unit(name) if unit(name) in units else "__init__"
            if there == here:
                continue
            if here == BACKEND:
                allowed = there in BACKEND_MAY_IMPORT
            elif there == BACKEND:
                allowed = here in MAY_IMPORT_BACKEND
            elif there == "__init__":
                allowed = False  # the public names are for others; and importing them would be a circle
            else:
                lower = RANK.get(there, len(LAYERS)) < RANK[here]
                peers = RANK.get(there) == RANK[here] and not PACKAGES & {here, there}
                allowed = lower or peers
            if not allowed:
                yield f"{module} imports {name}"


def circles(sources: Sources) -> Iterator[str]:
    """Yield modules that take part in a circle of module-level imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = set(imports(source, everywhere=False))
        found = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = found & set(sources) - {module}
    while leaves := [module for module, found in graph.items() if not found & set(graph)]:
        for module in leaves:
            del graph[module]
    called = set().union(*graph.values()) if graph else set()
    yield from (
        f"{module} is in a circle with {sorted(graph[module] & set(graph))}" for module in graph if module in called
    )


def impurity(sources: Sources) -> Iterator[str]:
    """Yield what the pure packages import and must not."""
    for module, source in sources.items():
        if unit(module) in PURE:
            yield from (f"{module} imports {name}" for name in imports(source) if within(name, IMPURE))


def global_reactor(sources: Sources) -> Iterator[str]:
    """Yield modules that, merely imported, would install a reactor."""
    for module, source in sources.items():
        for name in imports(source, everywhere=False):
            if within(name, ("twisted.internet.reactor",)) and module not in MAY_TOUCH_REACTOR:
                yield f"{module} imports the global reactor"


def appearance(sources: Sources) -> Iterator[str]:
    """Yield modules without a docstring (an empty ``__init__`` needs none) and those that are too long."""
    for module, source in sources.items():
        if source.strip() and not ast.get_docstring(parse(source)):
            yield f"{module} has no docstring"
        if (lines := len(source.splitlines())) > LONGEST:
            yield f"{module} has {lines} lines: more than one role?"


def mapped(design: str) -> list[list[str]]:
    """Return the rows of the map in ``design``, the text of docs/design.rst, from the bottom to the top."""
    _, _, table = design.partition(".. list-table::")
    rows = re.findall(r"^   \* - (.+)$", table.partition("\n\nStart and stop\n")[0], re.MULTILINE)
    return [[name.rstrip("/") for name in re.findall("``([^`]+)``", row)] for row in rows]


def misplaced(sources: Sources, rows: list[list[str]]) -> Iterator[str]:
    """Yield what is not, or not once, on the map, and imports that point down on it."""
    names = [name for row in rows for name in row]
    units = {unit(module) for module in sources if not unit(module).startswith("_")}
    yield from (f"{name} is not on the map" for name in sorted(units - set(names)))
    yield from (f"{name} is on the map, and is no module" for name in sorted(set(names) - units))
    yield from (f"{name} is on the map twice" for name in sorted(set(names)) if names.count(name) > 1)
    place = {name: index for index, row in enumerate(rows) for name in row}
    for module, source in sources.items():
        here = place.get(unit(module), len(rows))
        yield from (
            f"{module} imports {name}, which stands below it"
            for name in imports(source)
            if within(name, ("commsmgr",)) and place.get(unit(name), 0) > here
        )


RULES = (layering, circles, impurity, global_reactor, appearance)


class Package(SynchronousTestCase):
    """The package keeps the rules."""

    def setUp(self) -> None:
        self.sources = read_package()

    def test_layering(self) -> None:
        """Imports point from the top of the table to its bottom."""
        self.assertEqual(list(layering(self.sources)), [])

    def test_circles(self) -> None:
        """No two modules need each other to be imported."""
        self.assertEqual(list(circles(self.sources)), [])

    def test_purity(self) -> None:
        """Policies and the conversation do no I/O and know no clock of their own."""
        self.assertEqual(list(impurity(self.sources)), [])

    def test_global_reactor(self) -> None:
        """Importing commsmgr installs no reactor: an embedding agent may still choose one."""
        self.assertEqual(list(global_reactor(self.sources)), [])

    def test_appearance(self) -> None:
        """Every module says what it is, and is short enough to have one role."""
        self.assertEqual(list(appearance(self.sources)), [])

    def test_map(self) -> None:
        """The map in the design document has every module once, and each below all that it imports."""
        self.assertEqual(list(misplaced(self.sources, mapped(DESIGN.read_text("utf-8")))), [])

    def test_something_was_read(self) -> None:
        """The rules were applied to the real package, not to nothing."""
        self.assertIn("commsmgr.errors", self.sources)
        self.assertIn("commsmgr.policy.backoff", self.sources)
        self.assertGreater(len(self.sources), 30)


class Planted(SynchronousTestCase):
    """Each rule finds what it is there for."""

    def found(self, module: str, source: str) -> list[str]:
        """Plant ``source`` in the package, as or in place of ``module``; return what the rules say of it."""
        text = source if source.startswith('"""') else f'"""Planted."""\n{source}\n'
        sources = {**read_package(), module: text}
        return [sentence for rule in RULES for sentence in rule(sources) if sentence.startswith(module)]

    def test_wrong_way(self) -> None:
        """An import upwards is found, whatever its form and wherever it stands."""
        for source in (
            "import commsmgr.delivery",
            "from commsmgr import delivery",
            "from commsmgr.delivery import Delivery",
            "def f():\n    from commsmgr.delivery import Delivery",
            "try:\n    import commsmgr.delivery as d\nexcept ImportError:\n    pass",
        ):
            (sentence,) = self.found("commsmgr.transport.planted", source)
            self.assertIn("commsmgr.transport.planted imports commsmgr.delivery", sentence)

    def test_between_packages(self) -> None:
        """Packages of one layer do not know each other; modules of one layer may."""
        self.assertEqual(len(self.found("commsmgr.spool.planted", "from commsmgr.transport import http")), 1)
        self.assertEqual(len(self.found("commsmgr.policy.planted", "from commsmgr.session.wire import encode")), 1)
        self.assertEqual(self.found("commsmgr.rules", "from commsmgr.errors import ConfigError"), [])

    def test_allowed(self) -> None:
        """Downwards is allowed, and so is what only a type checker reads."""
        source = "from typing import TYPE_CHECKING\nfrom commsmgr.errors import CommsError\n"
        source += "if TYPE_CHECKING:\n    from commsmgr.delivery import Delivery"
        self.assertEqual(self.found("commsmgr.transport.planted", source), [])

    def test_public_names(self) -> None:
        """Nothing inside imports the package's public names."""
        sentences = self.found("commsmgr.delivery", "from commsmgr import Manager")
        self.assertIn("commsmgr.delivery imports commsmgr.Manager", sentences)

    def test_backend(self) -> None:
        """The reference backend shares messages and session, nothing of the agent; the agent nothing of it."""
        self.assertEqual(self.found("commsmgr.backend.planted", "from commsmgr.session import wire"), [])
        self.assertEqual(len(self.found("commsmgr.backend.planted", "from commsmgr.transport import http")), 1)
        self.assertEqual(len(self.found("commsmgr.delivery", "from commsmgr.backend import events")), 1)

    def test_no_layer(self) -> None:
        """A new module must be given a place."""
        self.assertEqual(self.found("commsmgr.planted", ""), ["commsmgr.planted has no layer: give it one"])

    def test_circle(self) -> None:
        """A circle of imports is found, also through a third module."""
        sources = {
            "commsmgr.rules": "from commsmgr.shape import x",
            "commsmgr.shape": "from commsmgr import settings",
            "commsmgr.settings": "import commsmgr.rules",
            "commsmgr.urls": "from commsmgr import rules",
        }
        self.assertEqual(len(list(circles(sources))), 3)
        sources["commsmgr.settings"] = "def f():\n    import commsmgr.rules"
        self.assertEqual(list(circles(sources)), [])

    def test_impure(self) -> None:
        """Sockets, clocks and libraries that have them are found in policy and session."""
        for source in (
            "import time",
            "from twisted.internet.defer import Deferred",
            "import prometheus_client.core",
            "def f():\n    from treq import get",
        ):
            for package in PURE:
                self.assertEqual(len(self.found(f"commsmgr.{package}.planted", source)), 1, source)
        self.assertEqual(self.found("commsmgr.policy.planted", "from timeit import timeit"), [])

    def test_reactor(self) -> None:
        """The global reactor is found at module level, and allowed within a function."""
        for source in ("from twisted.internet import reactor", "import twisted.internet.reactor"):
            self.assertEqual(len(self.found("commsmgr.transport.planted", source)), 1)
        self.assertEqual(self.found("commsmgr.delivery", "def f():\n    from twisted.internet import reactor"), [])

    def test_appearance(self) -> None:
        """A missing docstring and a module of many roles are found."""
        self.assertEqual(list(appearance({"commsmgr.x": "a = 1"})), ["commsmgr.x has no docstring"])
        self.assertEqual(len(self.found("commsmgr.rules", '"""Long."""\n' + "a = 1\n" * LONGEST)), 1)

    def test_map(self) -> None:
        """On a map, a module that is missing, one too many, and an import that points down are found."""
        rows = mapped(".. list-table::\n\n   * - ``a``, ``b/``\n     - ``z``\n   * - ``c``, ``a``\n\nStart and stop\n")
        self.assertEqual(rows, [["a", "b"], ["c", "a"]])
        sources = {"commsmgr.b.x": "from commsmgr import c", "commsmgr.c": "import commsmgr.b.x", "commsmgr.d": ""}
        sentences = list(misplaced(sources, rows))
        self.assertEqual(len(sentences), 4, sentences)
        self.assertIn("d is not on the map", sentences)
        self.assertIn("commsmgr.b.x imports commsmgr.c, which stands below it", sentences)
