"""A Sphinx extension: ``events-reference``, made from the log calls in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import commsmgr

LEVELS = {"debug": "debug", "info": "info", "warn": "warn", "error": "error", "critical": "critical"}
# What Logger.failure and failuresHandled log has this level.
TRACEBACK = "critical"

PACKAGE = Path(commsmgr.__file__).parent


def events(package: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, level and text of each event that the agent logs; the reference backend is another program."""
    for path in sorted(package.rglob("*.py")):
        if "backend" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            name = named.get("event")
            if not (isinstance(name, ast.Constant) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            yield str(name.value), LEVELS.get(node.func.attr, TRACEBACK), str(node.args[0].value)


class EventsReference(SphinxDirective):
    """Shows every event's name, level and text."""

    def run(self) -> list[nodes.Node]:
        """Return a table."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 28 12 60", ""]
        lines += ["   * - Event", "     - Level", "     - Text"]
        for name, level, text in sorted(set(events(PACKAGE))):
            lines += [f"   * - ``{name}``", f"     - {level}", f"     - ``{text}``"]
        for path in PACKAGE.rglob("*.py"):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("events-reference", EventsReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
