"""A Sphinx extension: ``metrics-reference``, made from what the collector shows."""

from __future__ import annotations

from typing import Any

from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from prometheus_client import CollectorRegistry
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from commsmgr import reference
from commsmgr.observe.metrics import Metrics


class MetricsReference(SphinxDirective):
    """Shows every metric with its type, labels and meaning."""

    def run(self) -> list[nodes.Node]:
        """Return a table."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 36 10 18 36", ""]
        lines += ["   * - Metric", "     - Type", "     - Labels", "     - Meaning"]
        for family in Metrics(CollectorRegistry(), seconds=lambda: 0.0).collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(f"``{label}``" for label in getattr(family, "_labelnames", ()))
            lines += [f"   * - ``{name}``", f"     - {family.type}", f"     - {labels}"]
            lines += [f"     - {reference.rst(family.documentation)}"]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("metrics-reference", MetricsReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
