"""A Sphinx extension: ``benchmark-results``, the tables of the last run of the benchmarks that was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks import report

KEPT = Path(__file__).resolve().parent.parent / "benchmarks.json"


class BenchmarkResults(SphinxDirective):
    """Shows each benchmark: its contenders, the figures, the ratios, and what became of its targets."""

    def run(self) -> list[nodes.Node]:
        """Return a table for each benchmark."""
        self.env.note_dependency(str(KEPT))
        text = "\n\n".join(report.restructured(result) for result in report.read_json(KEPT))
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("benchmark-results", BenchmarkResults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
