"""
What the machine is and how it is, for inventories and heartbeats.

:class:`StandardSource` needs the standard library alone and reads Linux's ``/proc`` and ``/sys`` as far as they are
there. What cannot be read is left empty: a part that fails costs neither the other parts nor the message. No command
line and no environment is told: they hold secrets.

Methods may block for a while and are called in threads, one after the other or at once.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import struct
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar, cast

from twisted.logger import Logger

from commsmgr.machine import read_text
from commsmgr.messages import JSONObject, SystemHealth

WARNING_PERCENT: Final = 80.0
CRITICAL_PERCENT: Final = 95.0

SYSTEM_DISK: Final = os.path.abspath(os.sep)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_SIOCGIFADDR: Final = 0x8915  # netdevice(7)
_IFF_UP: Final = 1

_T = TypeVar("_T")


class Usage(Protocol):
    """What :func:`shutil.disk_usage` returns, in bytes."""

    @property
    def total(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def free(self) -> int: ...


class StandardSource:
    """
    The machine as far as the standard library and Linux's ``/proc`` and ``/sys`` tell.

    :param root: where ``proc``, ``sys``, ``etc`` and the package databases are found.
    :param disk_usage: as :func:`shutil.disk_usage`.
    """

    _log = Logger()

    def __init__(self, root: str | Path = "/", *, disk_usage: Callable[[str], Usage] = shutil.disk_usage) -> None:
        self._root = Path(root)
        self._disk_usage = disk_usage
        # The last reading and what came of it: (idle, total, percent).
        self._cpu: tuple[float, float, float] | None = None

    def inventory(self) -> JSONObject:
        """Return the ``data`` object of an inventory message. Sizes are in bytes, times in seconds."""
        uname = platform.uname()
        data = {
            "system": {
                "hostname": socket.gethostname(),
                "platform": uname.system.lower(),
                "architecture": uname.machine,
                "os_version": self._part(self._os_version) or uname.version,
                "uptime": int(self._part(self._uptime) or 0),
            },
            "hardware": {
                "cpu": {
                    "model": self._part(self._cpu_model) or uname.machine,
                    "cores": os.cpu_count() or 0,
                    "usage": self._cpu_percent() or 0.0,
                },
                "memory": self._memory_entry(),
                "disk": self._part(self._disks) or [],
            },
            "software": {
                "installed_applications": self._part(self._applications) or [],
                "running_processes": self._part(self._processes) or [],
                "running_services": self._part(self._services) or [],
            },
            "network": {"interfaces": self._part(self._interfaces) or []},
        }
        return cast(JSONObject, _unicode(data))

    def health(self) -> SystemHealth:
        """
        Return how busy the processors have been since the last look, and how full memory and system disk are.

        The worst of the three decides: ``warning`` from 80 %, ``critical`` from 95 %, ``unknown`` if none can be had.
        """
        memory = self._part(self._memory)
        cpu, disk = self._cpu_percent(), self._part(self._system_disk)
        known = [value for value in (cpu, disk, memory and _percent(memory[1], memory[0])) if value is not None]
        return SystemHealth(
            cpu_usage_percent=cpu or 0.0,
            memory_usage_percent=_percent(memory[1], memory[0]) if memory else 0.0,
            disk_usage_percent=disk or 0.0,
            status=_status(max(known, default=None)),
        )

    def _part(self, read: Callable[[], _T]) -> _T | None:
        """Return what ``read`` gives, None when it fails."""
        try:
            return read()
        except Exception as error:
            # Any exception: what the kernel, a container or psutil come up with next must not cost the heartbeat.
            self._log.debug(
                "cannot read {part}: {reason}", event="source.part-failed", part=read.__name__.strip("_"), reason=error
            )
            return None

    def _cpu_percent(self) -> float | None:
        """Return how busy the processors were since the last call, 0 in the first one, None if nobody knows."""
        times = self._part(self._cpu_times)
        if times is None:
            return None
        idle, total = times
        before = self._cpu
        if before is None:
            percent = 0.0
        elif total <= before[1]:
            # Two looks within one tick of the kernel's clock: there is nothing to divide.
            percent = before[2]
        else:
            percent = 100.0 - _percent(idle - before[0], total - before[1])
        self._cpu = idle, total, percent
        return round(percent, 1)

    def _memory_entry(self) -> JSONObject:
        total, used = self._part(self._memory) or (0, 0)
        return {"total": total, "used": used, "used_percent": _percent(used, total)}

    def _disks(self) -> list[JSONObject]:
        found: dict[str, JSONObject] = {}
        for device, mountpoint in self._mounts():
            try:
                usage = self._disk_usage(mountpoint)
            except OSError:
                # An empty drive, or not for us to see.
                continue
            if usage.total:
                entry = {
                    "device": device,
                    "mountpoint": mountpoint,
                    "size": usage.total,
                    "used": usage.used,
                    "used_percent": _percent(usage.used, usage.used + usage.free),
                }
                # A device mounted twice is told once, where it was mounted first.
                found.setdefault(device, entry)
        return list(found.values())

    def _system_disk(self) -> float:
        usage = self._disk_usage(SYSTEM_DISK)
        # What only root may use is neither used nor free, as df has it.
        return _percent(usage.used, usage.used + usage.free)

    # What psutil reads otherwise (commsmgr.psutil_source)

    def _uptime(self) -> float:
        return float(self._text("proc/uptime").split()[0])

    def _cpu_times(self) -> tuple[float, float]:
        """Return the time spent idle and the time altogether since the start, in any unit (proc_stat(5))."""
        # user nice system idle iowait irq softirq steal; the guests' time after them is part of user's already.
        times = [float(field) for field in self._text("proc/stat").split("\n", 1)[0].split()[1:9]]
        return times[3] + times[4], sum(times)

    def _memory(self) -> tuple[int, int]:
        """Return total and used memory in bytes; what the kernel would give back at once is not used."""
        fields = dict(line.split(":") for line in self._text("proc/meminfo").splitlines())
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return total, total - available

    def _mounts(self) -> Iterable[tuple[str, str]]:
        """Return devices and where they are mounted: the system disk and local ones, but no images (loop devices)."""
        mounts = [line.split()[:2] for line in self._text("proc/mounts").splitlines()]
        return [
            (device, _OCTAL.sub(lambda match: chr(int(match[1], 8)), mountpoint))
            for device, mountpoint in mounts
            if mountpoint == "/" or (device.startswith("/dev/") and not device.startswith("/dev/loop"))
        ] or [("", SYSTEM_DISK)]

    def _processes(self) -> list[JSONObject]:
        found = []
        for directory in self._root.glob("proc/[0-9]*"):
            try:
                # Whether there is a command line, not what it says: kernel threads have none.
                if (directory / "cmdline").read_bytes():
                    found.append({"pid": int(directory.name), "name": read_text(directory / "comm").strip()})
            except OSError:
                # It has ended since.
                continue
        return sorted(found, key=itemgetter("pid"))

    def _interfaces(self) -> list[JSONObject]:
        addresses: dict[str, list[str]] = {}
        for fields in map(str.split, self._text("proc/net/if_inet6").splitlines()):
            addresses.setdefault(fields[5], []).append(str(IPv6Address(int(fields[0], 16))))
        found = []
        for directory in sorted(self._root.glob("sys/class/net/*/")):
            name = directory.name
            found.append(
                {
                    "name": name,
                    "mac": self._text(f"sys/class/net/{name}/address").strip(),
                    "up": bool(int(self._text(f"sys/class/net/{name}/flags") or "0", 16) & _IFF_UP),
                    "addresses": _ipv4(name) + sorted(addresses.get(name, [])),
                }
            )
        return found

    # What both read the same way

    def _text(self, name: str) -> str:
        return read_text(self._root / name)

    def _os_version(self) -> str:
        """Return the name that the distribution gives itself (os-release(5))."""
        found = re.search(r"^PRETTY_NAME=[\"']?(.*?)[\"']?$", self._text("etc/os-release"), re.MULTILINE)
        return found[1] if found else ""

    def _cpu_model(self) -> str:
        found = re.search(r"^model name\s*: (.*)$", self._text("proc/cpuinfo"), re.MULTILINE)
        return found[1].strip() if found else ""

    def _applications(self) -> list[JSONObject]:
        """Return what Debian's or Alpine's packages say is installed; other systems keep no readable list."""
        found = []
        databases = (("var/lib/dpkg/status", "Package", "Version"), ("lib/apk/db/installed", "P", "V"))
        for database, name, version in databases:
            for paragraph in self._text(database).split("\n\n"):
                fields = dict(re.findall(r"^([\w-]+): ?(.*)$", paragraph, re.MULTILINE))
                if name in fields and fields.get("Status", " installed").endswith(" installed"):
                    found.append({"name": fields[name], "version": fields.get(version, "")})
        return sorted(found, key=itemgetter("name"))

    def _services(self) -> list[JSONObject]:
        """Return the services of systemd that have a control group, and so a process."""
        slices = ("sys/fs/cgroup/system.slice", "sys/fs/cgroup/systemd/system.slice")
        names = {path.stem for where in slices for path in self._root.glob(f"{where}/*.service")}
        return [{"name": name, "status": "running"} for name in sorted(names)]


def _unicode(value: Any) -> Any:
    """Return ``value`` with question marks for the bytes in names of the file system that are not UTF-8."""
    if isinstance(value, dict):
        return {key: _unicode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unicode(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _percent(part: float, whole: float) -> float:
    return round(min(100.0, max(0.0, 100.0 * part / whole)), 1) if whole > 0 else 0.0


def _status(worst: float | None) -> Literal["healthy", "warning", "critical", "unknown"]:
    if worst is None:
        return "unknown"
    if worst >= CRITICAL_PERCENT:
        return "critical"
    return "warning" if worst >= WARNING_PERCENT else "healthy"


def _ipv4(interface: str) -> list[str]:
    """Return the interface's IPv4 address, of which the kernel tells the first one only (netdevice(7))."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except (ImportError, OSError):
        return []
    return [socket.inet_ntoa(answer[20:24])]
