"""Who this machine is to the backend, and what of its inventory tells it from another one."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from msgspec import Struct

from commsmgr.messages import JSONObject

_MACHINE_ID: Final = re.compile(r"[0-9a-f]{32}")

# Numbers that change all the time and say nothing about what the machine is.
_VOLATILE: Final = frozenset({"uptime", "usage", "used", "used_percent"})


class Identity(Struct, frozen=True):
    """Who the agent is to its backend."""

    machine_id: str
    hostname: str
    agent_version: str


def machine_id(
    configured: str,
    *,
    path: Path = Path("/etc/machine-id"),
    hostname: Callable[[], str] = socket.gethostname,
) -> str:
    """
    Return who this agent is to the backend: what is configured, else the system's machine-id(5), else the host name.

    The name is the last resort: two machines may bear the same, and it may change.
    """
    if configured:
        return configured
    # Before its first boot is over a system may have "uninitialized" there.
    found = _MACHINE_ID.fullmatch(read_text(path).strip())
    if found:
        return found[0]
    return hostname().encode("ascii", "replace").decode()[:200] or "unknown"


def stable_view(data: JSONObject) -> JSONObject:
    """
    Return ``data`` without what changes all the time, for telling whether an inventory has news.

    Numbers called ``uptime``, ``usage``, ``used`` and ``used_percent`` are left out wherever they are; of the running
    processes the set of names stays. ``data`` is not changed.
    """
    view = cast(JSONObject, _without_volatile(data))
    software = view.get("software")
    if isinstance(software, dict) and isinstance(software.get("running_processes"), list):
        processes = [process for process in software["running_processes"] if isinstance(process, dict)]
        software["running_processes"] = sorted({str(process.get("name", "")) for process in processes})
    return view


def read_text(path: Path) -> str:
    """Return a file's content, nothing when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _VOLATILE or not isinstance(item, int | float)}
        return {key: _without_volatile(item) for key, item in kept.items()}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value
