"""A Sphinx extension: ``benchmark-summary`` and ``benchmark-results``, from the last run that was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks import report, summary

KEPT = Path(__file__).resolve().parent.parent / "benchmarks.json"


class BenchmarkSummary(SphinxDirective):
    """Shows some figures that stand for the rest."""

    def run(self) -> list[nodes.Node]:
        """Return a table."""
        self.env.note_dependency(str(KEPT))
        return self.parse_text_to_nodes(summary.restructured(report.read_json(KEPT).results))


class BenchmarkResults(SphinxDirective):
    """Shows each benchmark: its contenders, the figures, the ratios, and what became of its targets."""

    def run(self) -> list[nodes.Node]:
        """Return what all was measured with, and a table for each benchmark."""
        self.env.note_dependency(str(KEPT))
        kept = report.read_json(KEPT)
        text = [report.measured_with(kept.machine), *map(report.restructured, kept.results)]
        return self.parse_text_to_nodes("\n\n".join(text))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("benchmark-summary", BenchmarkSummary)
    app.add_directive("benchmark-results", BenchmarkResults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
