"""A bearer token (RFC 6750) as a value that shows itself to nobody, and what can be known of its end."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from dataclasses import dataclass, field
from math import isfinite

import msgspec

from commsmgr.errors import TokenError
from commsmgr.headers import token_mistake


@dataclass(frozen=True, slots=True)
class Token:
    """
    A token, and when it ends. Its ``repr`` does not show it.

    :ivar value: what stands behind ``Bearer``; empty: no Authorization header is sent.
    :ivar expires_at: seconds since the epoch; None when nobody says.
    """

    value: str = field(repr=False)
    expires_at: float | None = None


def check_token(token: str) -> str:
    """
    Return ``token`` if it can stand in an Authorization header: visible ASCII without blanks.

    :raise TokenError: it cannot; the error does not show it.
    """
    if wrong := token_mistake(token):
        raise TokenError(f"the token {wrong}")
    return token


def as_token(given: object) -> Token:
    """
    Return what a provider gave as a token that says when it ends: by the provider's word, or else by its own.

    :raise TokenError: it is neither a :class:`Token` nor a string, or the moment it names is none.
    """
    if isinstance(given, str):
        return Token(given, expiry(given))
    if not isinstance(given, Token):
        raise TokenError(f"the token provider gave {type(given).__name__}, not str or Token")
    if not isinstance(given.value, str):
        raise TokenError(f"the token provider gave a Token of {type(given.value).__name__}, not of str")
    if given.expires_at is None:
        return Token(given.value, expiry(given.value))
    if not isinstance(given.expires_at, int | float) or not isfinite(given.expires_at):
        raise TokenError("the token provider gave a Token whose expires_at is no number of seconds since the epoch")
    return given


class _Claims(msgspec.Struct):
    exp: float | None = None


def expiry(token: str) -> float | None:
    """
    Return when a JSON Web Token says that it expires (``exp``, RFC 7519 section 4.1.4), as seconds since the epoch.

    Nothing is verified: this is for telling an operator, and for fetching a newer one in time.

    :return: None for anything that is not such a token; never raises.
    """
    try:
        _, payload, _ = token.split(".")
        return msgspec.json.decode(urlsafe_b64decode(payload + "=="), type=_Claims).exp
    except Exception:
        # Whatever is in there, it is the backend's business and not ours.
        return None
