"""
Requests that a web page in a browser makes of a local page, and which of them are let in. Pure.

An open port on loopback is out of reach for other machines, but not for pages of theirs in a browser on this one. Such
a page has two ways, and each leaves a trace that no script can forge or leave out:

- It asks for ``http://127.0.0.1:PORT``. The browser does send that, a form's POST and a WebSocket too, and keeps only
  the answer from the page. But it says in Origin whose page asks (Fetch Standard, section 3.2; RFC 6455 section 4.1),
  and in Sec-Fetch-Site (Fetch Metadata, section 2.3) for requests that have no Origin, such as that of an image.
  Another port of this machine is another origin as well, which Sec-Fetch-Site calls ``same-site``.
- It makes its own name resolve to 127.0.0.1 (DNS rebinding). To the browser that is the page's own origin, and the
  answer can be read. But then Host holds that name, and not one of loopback.

What is no browser (Prometheus, curl, an agent) sends neither Origin nor Sec-Fetch-Site.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from commsmgr.urls import is_loopback

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[]*))(?::[0-9]*)?", re.ASCII)

_WELCOME = ("same-origin", "none")
"""Sec-Fetch-Site of a page's own requests, and of an address that somebody has typed."""


def names_loopback(host: str) -> bool:
    """Return whether the value of a Host field (RFC 9110 section 7.2) is loopback by its very name or address."""
    match = _HOST.fullmatch(host.strip())
    return match is not None and is_loopback(match[1] or match[2])


def is_foreign(own: str, origins: Sequence[str], sites: Sequence[str]) -> bool:
    """
    Return whether somebody else's page has made a request.

    :param own: the origin that was asked: scheme, ``://`` and the value of Host.
    :param origins: the values of Origin. ``null``, which is what a sandboxed frame sends, is somebody else's.
    :param sites: the values of Sec-Fetch-Site.
    """
    return any(origin.strip().lower() != own.strip().lower() for origin in origins) or any(
        site.strip().lower() not in _WELCOME for site in sites
    )
