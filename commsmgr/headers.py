"""
What may stand in a header field and in a bearer token, wherever they come from: settings, files, or whoever calls.

It is decided here alone. A line break let through would begin a field, or a request, of somebody else's making. No
answer of this module quotes a value: it may be secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Final

MAX_TOKEN: Final = 16384
"""Longest bearer token taken, in characters: servers and proxies refuse longer header fields anyway."""

# A second one of these would be a way to smuggle requests, or to leak the token around its rules (RFC 9110 sections 7.2
# and 8.6, RFC 9112 section 6, RFC 6455 section 4.1, RFC 6750 section 2.1).
RESERVED: Final = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "idempotency-key",
        "keep-alive",
        "origin",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Set by commsmgr itself, or never: what frames a message, what says who the agent is, and what would change both."""
_RESERVED_PREFIX: Final = "sec-websocket-"

_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # token of RFC 9110 section 5.6.2
_VALUE: Final = re.compile(r"[!-~]([\t -~]*[!-~])?|")
# The standard's characters (b64token) are fewer, but tokens with other visible ones are in use. What matters is that
# nothing can end the field or the value.
_TOKEN: Final = re.compile(r"[!-~]+")
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f]")


def mistakes(headers: Mapping[str, str], *, own: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """
    Yield the names of fields that cannot be sent, each with what is wrong (RFC 9110 sections 5.1 and 5.5).

    :param own: names in lower case that the caller may set although they are :data:`RESERVED`.
    """
    seen: set[str] = set()
    for name, value in headers.items():
        lower = name.lower()
        if not _NAME.fullmatch(name):
            yield name, "not a valid name of a header field (RFC 9110 section 5.1)"
        elif (lower in RESERVED or lower.startswith(_RESERVED_PREFIX)) and lower not in own:
            yield name, "is set by commsmgr itself" + "; the token belongs in [auth]" * (lower == "authorization")
        elif not _VALUE.fullmatch(value):
            yield name, "the value may hold printable ASCII only, without blanks at its ends (RFC 9110 section 5.5)"
        elif lower in seen:
            yield name, "is given twice: names of header fields are the same in upper and lower case"
        seen.add(lower)


def mistake(headers: Mapping[str, str], *, own: Set[str] = frozenset()) -> str:
    """Return the first of the :func:`mistakes` as a sentence, empty when there is none."""
    if not headers:
        return ""
    return next((f"header field {name!r}: {wrong}" for name, wrong in mistakes(headers, own=own)), "")


def token_mistake(token: str) -> str:
    """
    Return what is wrong with ``token`` in an Authorization field (RFC 6750 section 2.1), empty when nothing is.

    The sentence lacks its subject, such as "the token".
    """
    if not token:
        return "is empty"
    if len(token) > MAX_TOKEN:
        return f"is longer than {MAX_TOKEN} characters"
    if CONTROL_CHARACTERS.search(token):
        return "contains control characters (such as CR or LF)"
    if not _TOKEN.fullmatch(token):
        return "contains blanks or characters outside ASCII"
    return ""
