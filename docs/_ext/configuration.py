"""A Sphinx extension: ``configuration-reference`` and ``configuration-example``, made from the structs."""

from __future__ import annotations

from typing import Any

from docutils import nodes  # type: ignore[import-untyped]  # publishes no types
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from commsmgr import config, reference


class ConfigurationReference(SphinxDirective):
    """Shows every option with its type, range, default and meaning."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each table of the configuration."""
        self.env.note_dependency(config.__file__)
        return self.parse_text_to_nodes(reference.reference(), allow_section_headings=True)


class ConfigurationExample(SphinxDirective):
    """Shows a complete configuration file."""

    def run(self) -> list[nodes.Node]:
        """Return the file as a block of TOML."""
        self.env.note_dependency(config.__file__)
        text = reference.example()
        block = nodes.literal_block(text, text)
        block["language"] = "toml"
        return [block]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("configuration-reference", ConfigurationReference)
    app.add_directive("configuration-example", ConfigurationExample)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
