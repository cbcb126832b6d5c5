"""
A Sphinx extension: ``message-types`` shows messages and their fields, and the machines' documents go beside the pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import documents
from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from commsmgr import reference
from commsmgr.sanitise import REASONS


class MessageTypes(SphinxDirective):
    """``.. message-types:: GROUP`` shows the messages of a group, each with its fields."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section for each message."""
        lines: list[str] = []
        definitions = documents.schemas("#/$defs/")
        for name in documents.shown(self.arguments[0]):
            schema = definitions[name]
            tag = schema["properties"].get("type", {}).get("enum")
            lines += [f"**{name}**" + (f", type ``{tag[0]}``" if tag else ""), ""]
            lines += [reference.rst(schema["description"]), ""]
            lines += [".. list-table::", "   :header-rows: 1", "   :widths: 25 55 20", ""]
            lines += ["   * - Field", "     - Value", "     - Default"]
            for key, field in schema["properties"].items():
                required = key in schema.get("required", ())
                default = (
                    "*required*" if required else f"``{json.dumps(field['default'])}``" if "default" in field else ""
                )
                lines += [f"   * - ``{key}``", f"     - {documents.in_words(field)}", f"     - {default}"]
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines))


class MalformedReasons(SphinxDirective):
    """``.. malformed-reasons::`` shows why messages are refused."""

    def run(self) -> list[nodes.Node]:
        """Return a table."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 20 80", "", "   * - Reason", "     - Refused is"]
        for reason, meaning in REASONS.items():
            lines += [f"   * - ``{reason}``", f"     - {meaning}"]
        return self.parse_text_to_nodes("\n".join(lines))


def _write_documents(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        documents.write(Path(app.outdir) / "protocol")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("message-types", MessageTypes)
    app.add_directive("malformed-reasons", MalformedReasons)
    app.connect("build-finished", _write_documents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
