"""Header fields that come from outside: the configuration, or whoever calls (RFC 9110 section 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(r"[!-~]+(?:[ \t]+[!-~]+)*|")

RESERVED: Final = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Set by commsmgr itself, or never: what frames a message, what says who the agent is, and what would change both."""


def mistake(headers: Mapping[str, str]) -> str:
    """
    Return what is wrong with ``headers``, empty when nothing is.

    A name must be a token, a value visible ASCII with inner blanks: CR and LF would begin another field. Values are not
    quoted in the answer, they may be secret.
    """
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            return f"{name!r} cannot be the name of a header field"
        if name.lower() in RESERVED or name.lower().startswith("sec-websocket-"):
            return f"{name} cannot be set: commsmgr sets it itself, or it must not be sent"
        if not _VALUE.fullmatch(value):
            return f"the value of {name} has other characters than printable ASCII"
    return ""


def token_mistake(token: str) -> str:
    """Return why ``token`` cannot stand in an Authorization field (RFC 6750 section 2.1), empty when it can."""
    return "" if re.fullmatch(r"[!-~]*", token) else "the token has blanks or other characters than printable ASCII"
