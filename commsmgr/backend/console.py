"""
The console: one page, its style and its script, served as they are from the package; and to whom, its API included.

The page loads nothing from elsewhere and its script writes what agents sent as text only; the Content-Security-Policy
makes sure of the first and would stop what the second missed.
"""

from __future__ import annotations

from importlib.resources import files

from twisted.web.http import FORBIDDEN
from twisted.web.resource import Resource
from twisted.web.server import Request

from commsmgr.browsers import is_foreign, names_loopback
from commsmgr.urls import is_loopback

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PATHS = ("/", "/console.css", "/console.js")


def stranger(request: Request) -> str:
    """Return why ``request`` is not one of this machine's user, or nothing."""
    if not is_loopback(getattr(request.getClientAddress(), "host", "")):
        return "the console and its API answer only to the machine that the backend runs on"
    hosts, origins, sites = (
        request.requestHeaders.getRawHeaders(name, []) for name in ("host", "origin", "sec-fetch-site")
    )
    if len(hosts) != 1 or not names_loopback(hosts[0]):
        return "the Host header does not name this machine"
    if is_foreign(f"{'https' if request.isSecure() else 'http'}://{hosts[0]}", origins, sites):
        return "requests of other pages are refused"
    return ""


def protect(request: Request) -> None:
    """Have a browser keep the answer to itself."""
    request.setHeader("Content-Security-Policy", _POLICY)
    request.setHeader("X-Content-Type-Options", "nosniff")
    request.setHeader("X-Frame-Options", "DENY")
    request.setHeader("Cross-Origin-Resource-Policy", "same-origin")
    request.setHeader("Referrer-Policy", "no-referrer")
    request.setHeader("Cache-Control", "no-store")


class ConsoleFile(Resource):
    """One of the console's files."""

    isLeaf = True

    def __init__(self, name: str, content_type: str) -> None:
        super().__init__()
        self._content = files("commsmgr.backend").joinpath(name).read_bytes()
        self._content_type = content_type

    def render_GET(self, request: Request) -> bytes:
        protect(request)
        if wrong := stranger(request):
            request.setResponseCode(FORBIDDEN)
            request.setHeader("Content-Type", "text/plain; charset=utf-8")
            return wrong.encode()
        request.setHeader("Content-Type", self._content_type)
        return self._content


def add_console(root: Resource) -> None:
    """Put the console's files below ``root``."""
    root.putChild(b"", ConsoleFile("console.html", "text/html; charset=utf-8"))
    root.putChild(b"console.css", ConsoleFile("console.css", "text/css; charset=utf-8"))
    root.putChild(b"console.js", ConsoleFile("console.js", "text/javascript; charset=utf-8"))
