"""URLs of backends and addresses to listen on, taken apart once and checked (RFC 3986, RFC 6455 section 3)."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from hyperlink import URL
from msgspec import Struct

from commsmgr.config import Backend

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class Target(Struct, frozen=True):
    """
    Where to connect, and what to ask for there.

    :ivar host: a name or an IP address literal, an IPv6 one without brackets.
    :ivar path: begins with a slash, already percent-encoded, with the query if there is one.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        return self.scheme in ("https", "wss")

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine by its very name."""
        return is_loopback(self.host)

    @property
    def authority(self) -> str:
        """Host and port as they stand in a Host header (RFC 9110 section 7.2)."""
        return bracketed(self.host) if self.port == _PORTS[self.scheme] else self.host_and_port

    @property
    def host_and_port(self) -> str:
        """The same with the port in any case."""
        return f"{bracketed(self.host)}:{self.port}"

    def join(self, path: str) -> str:
        """Return the whole URL of ``path`` (which begins with a slash) below this one."""
        return f"{self.scheme}://{self.authority}{self.below(path)}"

    def below(self, path: str) -> str:
        """Return the same as a request line has it (origin form, RFC 9112 section 3.2.1)."""
        base, _, query = self.path.partition("?")
        return base.rstrip("/") + path + (f"?{query}" if query else "")


def bracketed(host: str) -> str:
    """Return ``host`` as a URL has it: an IPv6 literal in brackets (RFC 3986 section 3.2.2)."""
    return f"[{host}]" if ":" in host else host


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """
    Return whether ``host`` is this machine by its very name; one that merely resolves to it does not count.

    :param host: a name or an IP address literal without brackets; an IPv4 one may look as "::" shows it.
    """
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return host.rstrip(".").lower() == "localhost"
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


@lru_cache(maxsize=256)  # a manager takes the same few apart a dozen times, and a fleet of them the same few altogether
def parse(url: str, schemes: tuple[str, ...]) -> Target:
    """
    Take ``url`` apart.

    :raise ValueError: it says what is wrong: another scheme than ``schemes``, no host, user information, a fragment,
        blanks or control characters.
    """
    if any(character <= " " or character == "\x7f" for character in url):
        raise ValueError("a URL has no blanks or control characters")
    if any("\ud800" <= character <= "\udfff" for character in url):
        # No text: bytes that are not UTF-8, as the system's interfaces hand them out. hyperlink breaks over them.
        raise ValueError("a URL is text, and this is not UTF-8")
    scheme, colon, rest = url.partition(":")
    try:
        # A scheme means the same in capitals (RFC 3986 section 3.1), but not to hyperlink.
        parsed = URL.from_text(scheme.lower() + colon + rest)
        host = parsed.host
        # hyperlink cannot turn an IPv6 literal into a URI's host, and there is nothing to turn.
        parsed = parsed.replace(host="literal").to_uri() if ":" in host else parsed.to_uri()
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a URL: {error}") from None
    if parsed.scheme not in schemes:
        raise ValueError(
            f"expected {' or '.join(f'{scheme}://' for scheme in schemes)}, found {parsed.scheme or 'none'}"
        )
    host = host if ":" in host else parsed.host
    if not host:
        raise ValueError("the URL has no host")
    if parsed.userinfo:
        raise ValueError("user and password in the URL are not supported: use [auth]")
    if parsed.fragment:
        raise ValueError("a fragment (#…) has no meaning here")
    port = parsed.port
    if port is None or not 0 < port < 65536:
        raise ValueError("the port must be between 1 and 65535")
    path = "/" + "/".join(parsed.path).lstrip("/")
    query = "&".join(name if value is None else f"{name}={value}" for name, value in parsed.query)
    return Target(parsed.scheme, host, port, path + (f"?{query}" if query else ""))


def http_target(backend: Backend) -> Target:
    """
    Return where the HTTP interface of ``backend`` is.

    :raise ValueError: the URL is wrong; never after :func:`commsmgr.settings.check`.
    """
    return parse(backend.url, ("http", "https"))


def websocket_target(backend: Backend) -> Target:
    """
    Return where the WebSocket of ``backend`` is: as set, or else the base URL with ``/ws`` appended.

    :raise ValueError: the URL is wrong; never after :func:`commsmgr.settings.check`.
    """
    url = backend.websocket_url or "ws" + http_target(backend).join("/ws").removeprefix("http")
    return parse(url, ("ws", "wss"))


def backend_name(backend: Backend) -> str:
    """
    Return what ``backend`` is called in logs and metrics: its name, or else host and port.

    :raise ValueError: there is no name and the URL is wrong; never after :func:`commsmgr.settings.check`.
    """
    if backend.name:
        return backend.name
    return http_target(backend).host_and_port


def listen_address(listen: str) -> tuple[str, int]:
    """
    Take the value of ``observe.listen`` apart: ``localhost`` or an IP address (an IPv6 one without brackets), and port.

    :raise ValueError: it says what was expected.
    """
    host, colon, port = listen.rpartition(":")
    literal = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if literal else host
    if not colon or not host or (":" in host) is not literal or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
        raise ValueError("expected host:port, such as 127.0.0.1:9464 or [::1]:9464")
    if int(port) > 65535:
        raise ValueError("the port must be between 0 and 65535")
    if host != "localhost":
        try:
            ip_address(host)
        except ValueError:
            raise ValueError("expected an IP address or localhost, and a port") from None
    return host, int(port)
