"""
Which hosts no proxy is asked for: the entries of ``proxy.no_proxy`` and of the environment's ``NO_PROXY``.

No standard says what such a list means. Here it is what curl makes of it, and what Go adds: ports, ``*`` anywhere in
the list, and ``*.example.com``. An entry is one of

=========================  ============================================================================================
entry                      matches
=========================  ============================================================================================
``*``                      every host
``example.com``            that host and all below it; so do ``.example.com`` and ``*.example.com``
``192.0.2.7``, ``fd00::1`` that address; an IPv6 one may stand in brackets
``10.0.0.0/8``             the addresses of that network
any of these, and ``:443`` the same, at that port only; an IPv6 address needs its brackets then
=========================  ============================================================================================

Upper and lower case are the same, and a dot at the end does not count. Names are compared as they are written: none is
looked up to see whether its address is in a network.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_IN_BRACKETS = re.compile(r"\[([^\[\]]*)\](?::([0-9]{1,5}))?", re.ASCII)
_WITH_PORT = re.compile(r"([^:]+):([0-9]{1,5})", re.ASCII)
_NAME = re.compile(r"(?:\*?\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?", re.ASCII)


@lru_cache(maxsize=256)  # a manager asks for each target several times, and a fleet of them for the same few
def bypasses(entries: tuple[str, ...], host: str, port: int) -> bool:
    """
    Say whether one of ``entries`` keeps ``host`` from being reached through a proxy.

    :param host: a name or an IP address literal, an IPv6 one without brackets.
    """
    host = _plain(host)
    address = _address(host)
    return any(_matches(entry, host, address, port) for entry in entries)


def mistake(entry: str) -> str:
    """Return what is wrong with an entry that can never match, empty when nothing is."""
    pattern, _ = _split(entry)
    if pattern == "*" or _network(pattern) is not None or _NAME.fullmatch(pattern):
        return ""
    return "expected a host name, an IP address, a network such as 10.0.0.0/8, or *, each perhaps with :port"


def _matches(entry: str, host: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
    pattern, only_port = _split(entry)
    if only_port not in (None, port):
        return False
    if pattern == "*":
        return True
    if address is not None:
        # Not by its digits: 10.1.2.3 is not below 2.3.
        network = _network(pattern)
        return network is not None and address in network
    name = pattern.removeprefix("*").removeprefix(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _split(entry: str) -> tuple[str, int | None]:
    """Take the port off an entry."""
    if match := _IN_BRACKETS.fullmatch(entry) or _WITH_PORT.fullmatch(entry):
        return _plain(match[1]), int(match[2]) if match[2] else None
    return _plain(entry), None


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


@lru_cache(maxsize=256)
def _network(pattern: str):  # type: ignore[no-untyped-def]  # of either version; ipaddress has no name for both
    try:
        return ip_network(pattern, strict=False)
    except ValueError:
        return None
