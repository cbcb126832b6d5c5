"""
The console: one page, its style and its script, served as they are from the package.

The page loads nothing from elsewhere and its script writes what agents sent as text only; the Content-Security-Policy
makes sure of the first and would stop what the second missed.
"""

from __future__ import annotations

from importlib.resources import files

from twisted.web.resource import Resource
from twisted.web.server import Request

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PATHS = ("/", "/console.css", "/console.js")


class ConsoleFile(Resource):
    """One of the console's files."""

    isLeaf = True

    def __init__(self, name: str, content_type: str) -> None:
        super().__init__()
        self._content = files("commsmgr.backend").joinpath(name).read_bytes()
        self._content_type = content_type

    def render_GET(self, request: Request) -> bytes:
        request.setHeader("Content-Type", self._content_type)
        request.setHeader("Content-Security-Policy", _POLICY)
        request.setHeader("X-Content-Type-Options", "nosniff")
        request.setHeader("Referrer-Policy", "no-referrer")
        request.setHeader("Cache-Control", "no-cache")
        return self._content


def add_console(root: Resource) -> None:
    """Put the console's files below ``root``."""
    root.putChild(b"", ConsoleFile("console.html", "text/html; charset=utf-8"))
    root.putChild(b"console.css", ConsoleFile("console.css", "text/css; charset=utf-8"))
    root.putChild(b"console.js", ConsoleFile("console.js", "text/javascript; charset=utf-8"))
