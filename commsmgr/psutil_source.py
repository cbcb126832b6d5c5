"""What the machine is and how it is, as psutil sees it, on any system that psutil knows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path

from commsmgr.interfaces import MachineSource
from commsmgr.messages import JSONObject
from commsmgr.sources import SYSTEM_DISK, StandardSource, Usage


class PsutilSource(StandardSource):
    """
    The machine as psutil sees it; needs psutil.

    :param seconds: the time as seconds since the epoch.
    """

    def __init__(
        self,
        root: str | Path = "/",
        *,
        disk_usage: Callable[[str], Usage] = shutil.disk_usage,
        seconds: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(root, disk_usage=disk_usage)
        import psutil

        self._psutil = psutil
        self._seconds = seconds

    def _uptime(self) -> float:
        return max(0.0, self._seconds() - float(self._psutil.boot_time()))

    def _cpu_times(self) -> tuple[float, float]:
        # Not cpu_percent(): that remembers the last call of each thread, and ours comes from any thread of a pool.
        times = self._psutil.cpu_times()
        fields = {name: value for name, value in times._asdict().items() if not name.startswith("guest")}
        return fields["idle"] + fields.get("iowait", 0.0), sum(fields.values())

    def _memory(self) -> tuple[int, int]:
        memory = self._psutil.virtual_memory()
        return memory.total, memory.total - memory.available

    def _mounts(self) -> Iterable[tuple[str, str]]:
        partitions = [(part.device, part.mountpoint) for part in self._psutil.disk_partitions(all=False)]
        local = [part for part in partitions if not part[0].startswith("/dev/loop")]
        return local or [("", SYSTEM_DISK)]

    def _processes(self) -> list[JSONObject]:
        infos = (process.info for process in self._psutil.process_iter(["pid", "name", "cmdline"]))
        return sorted(
            ({"pid": info["pid"], "name": info["name"]} for info in infos if info["cmdline"] != []),
            key=itemgetter("pid"),
        )

    def _interfaces(self) -> list[JSONObject]:
        stats = self._psutil.net_if_stats()
        found = []
        for name, addresses in sorted(self._psutil.net_if_addrs().items()):
            macs = [address.address for address in addresses if address.family == self._psutil.AF_LINK]
            # A scoped address such as fe80::1%eth0 repeats the interface's name.
            others = [address.address.split("%")[0] for address in addresses if address.family != self._psutil.AF_LINK]
            up = name in stats and stats[name].isup
            found.append({"name": name, "mac": macs[0] if macs else "", "up": up, "addresses": others})
        return found


def default_source() -> MachineSource:
    """Return a source that asks psutil if it is installed, or else one that needs the standard library alone."""
    try:
        return PsutilSource()
    except ImportError:
        return StandardSource()
