"""How Sphinx builds the documentation."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from commsmgr._version import __version__  # noqa: E402 - the path must be set first

project = "commsmgr"
author = "commsmgr maintainers"
copyright = "2026, commsmgr maintainers"  # noqa: A001 - Sphinx wants this name
version = release = __version__

extensions = ["configuration", "events", "metrics", "protocol", "speed", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "_ext", "examples"]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"commsmgr {release}"
