"""URLs of backends, taken apart once and checked (RFC 3986, RFC 6455 section 3)."""

from __future__ import annotations

from ipaddress import ip_address

from hyperlink import URL
from msgspec import Struct

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
        """Whether the host is this machine by its very name; a name that merely resolves to it does not count."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host.rstrip(".").lower() == "localhost"

    @property
    def authority(self) -> str:
        """Host and port as they stand in a Host header (RFC 9110 section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def join(self, path: str) -> str:
        """Return the whole URL of ``path`` (which begins with a slash) below this one."""
        base, _, query = self.path.partition("?")
        return f"{self.scheme}://{self.authority}{base.rstrip('/')}{path}" + (f"?{query}" if query else "")


def parse(url: str, schemes: tuple[str, ...]) -> Target:
    """
    Take ``url`` apart.

    :raise ValueError: it says what is wrong: another scheme than ``schemes``, no host, user information, a fragment,
        blanks or control characters.
    """
    if any(character <= " " or character == "\x7f" for character in url):
        raise ValueError("a URL has no blanks or control characters")
    try:
        parsed = URL.from_text(url)
        host = parsed.host
        # hyperlink cannot turn an IPv6 literal into a URI's host, and there is nothing to turn.
        parsed = parsed.replace(host="literal").to_uri() if ":" in host else parsed.to_uri()
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a URL: {error}") from None
    if parsed.scheme not in schemes:
        raise ValueError(f"expected {' or '.join(f'{scheme}://' for scheme in schemes)}, found {parsed.scheme or 'none'}")
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
