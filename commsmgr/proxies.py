"""
Which proxy a connection goes through: ``[proxy]``, or else what the environment says, as curl and most others read it.

One pure function decides, for each target by itself: a backend whose WebSocket is ``ws://`` and whose HTTP is
``https://`` may have two answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from msgspec import Struct

from commsmgr import config
from commsmgr.errors import ConfigError
from commsmgr.headers import CONTROL_CHARACTERS
from commsmgr.noproxy import bypasses
from commsmgr.urls import Target, parse

VARIABLES: Final = frozenset(
    ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
)
"""What is looked at in the environment; lower case comes first, and an empty value is none."""

MAX_PASSWORD: Final = 1024
"""Longest password, in bytes."""

_URL: Final = re.compile(r"(?:([^:/?#@]*)://)?(?:([^/?#]*)@)?(.*)", re.DOTALL)
_BETWEEN_ENTRIES: Final = re.compile(r"[,\s]+")


class Proxy(Struct, frozen=True):
    """
    A proxy.

    :ivar target: its scheme (``https`` for TLS to the proxy itself), host and port.
    :ivar origin: what named it, such as ``proxy.url`` or ``https_proxy``.
    :ivar password: from the environment; it never shows.
    :ivar password_file: from the settings, to be read for each connection.
    """

    target: Target
    origin: str
    username: str = ""
    password: str = ""
    password_file: str = ""

    @property
    def url(self) -> str:
        """Scheme, host and port, for those who read logs."""
        return f"{self.target.scheme}://{self.target.host_and_port}"

    def __repr__(self) -> str:
        return f"<Proxy {self.url} from {self.origin}>"


def choose(settings: config.Proxy, environ: Mapping[str, str], target: Target) -> Proxy | None:
    """
    Return the proxy for connections to ``target``, or None where they go directly.

    :raise ConfigError: what names the proxy cannot be used; it says which setting or variable, and never its value.
    """
    if bypasses(settings.no_proxy, target.host, target.port):
        return None
    if settings.url:
        return configured(settings)
    name = _variable(environ, target.secure) if settings.environment else ""
    if not name:
        return None
    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if bypasses(tuple(filter(None, _BETWEEN_ENTRIES.split(exceptions))), target.host, target.port):
        return None
    return _from_variable(name, environ[name])


def credential_mistake(username: str, password: str) -> str:
    """Return what is wrong with these in Basic authentication (RFC 7617 section 2), empty when nothing is."""
    if ":" in username:
        return "the user's name may not contain a colon"
    if CONTROL_CHARACTERS.search(username) or CONTROL_CHARACTERS.search(password):
        return "user and password may not contain control characters (such as a line break)"
    return ""


def configured(settings: config.Proxy) -> Proxy:
    """
    Return the proxy that ``proxy.url``, which is not empty, names, whoever is to be reached through it.

    :raise ConfigError: it cannot be used.
    """
    if "@" in settings.url:
        raise ConfigError("user and password belong in proxy.username and proxy.password_file", key="proxy.url")
    return Proxy(
        target=_parsed("proxy.url", settings.url),
        origin="proxy.url",
        username=settings.username,
        password_file=settings.password_file,
    )


def _variable(environ: Mapping[str, str], secure: bool) -> str:
    """Return the variable that names the proxy, empty when none does."""
    names = ["https_proxy", "HTTPS_PROXY"] if secure else ["http_proxy", "HTTP_PROXY"]
    # Beneath a web server (CGI) whoever makes a request sets HTTP_PROXY, by a header field Proxy: "httpoxy".
    if "REQUEST_METHOD" in environ and "HTTP_PROXY" in names:
        names.remove("HTTP_PROXY")
    return next((name for name in (*names, "all_proxy", "ALL_PROXY") if environ.get(name)), "")


def _from_variable(name: str, value: str) -> Proxy:
    match = _URL.fullmatch(value)
    assert match is not None
    scheme, userinfo, rest = match[1], match[2] or "", match[3]
    if "@" in rest:
        raise _unusable(name, "is no URL; a slash in a password has to be written as %2F")
    username, _, password = userinfo.partition(":")
    try:
        username, password = (unquote(part, errors="strict") for part in (username, password))
    except UnicodeDecodeError:
        raise _unusable(name, "user and password have to be UTF-8") from None
    if wrong := credential_mistake(username, password):
        raise _unusable(name, wrong)
    return Proxy(
        target=_parsed(name, f"http://{rest}" if scheme is None else f"{scheme}://{rest}"),
        origin=name,
        username=username,
        password=password,
    )


def _parsed(key: str, url: str) -> Target:
    if url.lower().startswith("socks"):
        raise _unusable(key, "SOCKS is not supported; expected http:// or https://")
    try:
        target = parse(url, ("http", "https"))
    except ValueError as error:
        raise _unusable(key, str(error)) from None
    if target.path != "/":
        raise _unusable(key, "a proxy's URL ends with its port")
    return target


def _unusable(key: str, fact: str) -> ConfigError:
    return ConfigError(fact, key=key, source="environment" if key in VARIABLES else "code")
