"""Tests for what is told about the machine."""

from __future__ import annotations

import builtins
import copy
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import skipUnless

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.interfaces import MachineSource
from commsmgr.machine import machine_id, stable_view
from commsmgr.psutil_source import PsutilSource, default_source
from commsmgr.sources import StandardSource

try:
    import psutil
except ImportError:
    psutil = None

Usage = namedtuple("Usage", "total used free")

FILES = {
    "proc/uptime": "12345.67 20000.00\n",
    "proc/stat": "cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 100 0 100 700 100 0 0 0 50 0\n",
    "proc/meminfo": "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\nHugePages_Total:  0\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Abacus 9\n\nprocessor\t: 1\nmodel name\t: Abacus 9\n",
    "proc/mounts": (
        "overlay / overlay rw 0 0\n"
        "proc /proc proc rw 0 0\n"
        "/dev/sda1 /data\\040disk ext4 rw 0 0\n"
        "/dev/sda1 /again ext4 rw 0 0\n"
        "/dev/loop3 /snap/x squashfs ro 0 0\n"
        "/dev/sr0 /media/empty iso9660 ro 0 0\n"
        "/dev/sdb1 /nothing ext4 ro 0 0\n"
    ),
    "proc/net/if_inet6": (
        "fe80000000000000020000fffe000001 02 40 20 80 fake0\n20010db8000000000000000000000001 02 40 00 80 fake0\n"
    ),
    "proc/1/cmdline": "/sbin/init\0--secret=1\0",
    "proc/1/comm": "init\n",
    "proc/20/cmdline": "worker\0",
    "proc/20/comm": "worker\n",
    "proc/3/cmdline": "",
    "proc/3/comm": "kworker/0:1\n",
    "proc/self/comm": "not a number\n",
    "sys/class/net/fake0/address": "02:00:00:00:00:01\n",
    "sys/class/net/fake0/flags": "0x1003\n",
    "sys/class/net/fake1/flags": "0x1002\n",
    "sys/class/net/bonding_masters": "a file, not an interface\n",
    "sys/fs/cgroup/system.slice/zeta.service/x": "",
    "sys/fs/cgroup/system.slice/alpha.service/x": "",
    "sys/fs/cgroup/system.slice/some.mount/x": "",
    "etc/os-release": 'NAME="Fake"\nPRETTY_NAME="Fake OS 1 (test)"\n',
    "var/lib/dpkg/status": (
        "Package: zlib\nStatus: install ok installed\nVersion: 1:2.3\nDescription: x\n long: text\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: bash\nStatus: install ok installed\nVersion: 5\n"
    ),
}


def disk_usage(path: str) -> Usage:
    """Stand in for the file systems of the mounts above."""
    if path == "/media/empty":
        raise OSError("no medium")
    data = Usage(500, 100, 400)
    return {"/": Usage(1000, 300, 600), "/data disk": data, "/again": data, "/nothing": Usage(0, 0, 0)}[path]


class SourceTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(self.mktemp()).absolute()
        self.root.mkdir()

    def write(self, files: dict[str, str]) -> None:
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def assertShape(self, data: dict[str, Any]) -> None:
        """Check that everything the wire asks for is there, of the right type, and can be sent."""
        shapes = {
            ("system",): {"hostname": str, "platform": str, "architecture": str, "os_version": str, "uptime": int},
            ("hardware", "cpu"): {"model": str, "cores": int, "usage": float},
            ("hardware", "memory"): {"total": int, "used": int, "used_percent": float},
            ("hardware",): {"cpu": dict, "memory": dict, "disk": list},
            ("software",): {"installed_applications": list, "running_processes": list, "running_services": list},
            ("network",): {"interfaces": list},
            (): {"system": dict, "hardware": dict, "software": dict, "network": dict},
        }
        for path, shape in shapes.items():
            part = data
            for key in path:
                part = part[key]
            self.assertEqual({key: type(value) for key, value in part.items()}, shape, path)
        for disk in data["hardware"]["disk"]:
            self.assertEqual(list(disk), ["device", "mountpoint", "size", "used", "used_percent"])
        msgspec.json.encode(data)


class StandardSourceTests(SourceTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.source = StandardSource(self.root, disk_usage=disk_usage)

    def test_inventory(self) -> None:
        """Everything that Linux tells is read."""
        self.write(FILES)
        data = self.source.inventory()
        self.assertShape(data)
        self.assertEqual(data["system"]["hostname"], socket.gethostname())
        self.assertEqual(data["system"]["os_version"], "Fake OS 1 (test)")
        self.assertEqual(data["system"]["uptime"], 12345)
        self.assertEqual(data["hardware"]["cpu"], {"model": "Abacus 9", "cores": os.cpu_count(), "usage": 0.0})
        self.assertEqual(data["hardware"]["memory"], {"total": 1024000, "used": 614400, "used_percent": 60.0})
        self.assertEqual(
            data["software"]["running_services"],
            [{"name": "alpha", "status": "running"}, {"name": "zeta", "status": "running"}],
        )

    def test_disks(self) -> None:
        """Local disks are told once each, by their real names; images, empty drives and pseudo ones are not."""
        self.write(FILES)
        self.assertEqual(
            self.source.inventory()["hardware"]["disk"],
            [
                {"device": "overlay", "mountpoint": "/", "size": 1000, "used": 300, "used_percent": 33.3},
                {"device": "/dev/sda1", "mountpoint": "/data disk", "size": 500, "used": 100, "used_percent": 20.0},
            ],
        )

    def test_applications(self) -> None:
        """Installed packages are told in the order of their names; removed ones with left-overs are not."""
        self.write(FILES)
        debian = [{"name": "bash", "version": "5"}, {"name": "zlib", "version": "1:2.3"}]
        self.assertEqual(self.source.inventory()["software"]["installed_applications"], debian)

    def test_applications_of_alpine(self) -> None:
        """Alpine's packages are read as well."""
        self.write({"lib/apk/db/installed": "C:Q1x=\nP:musl\nV:1.2\n\nP:busybox\nV:1.36\nF:bin\n\n"})
        alpine = [{"name": "busybox", "version": "1.36"}, {"name": "musl", "version": "1.2"}]
        self.assertEqual(self.source.inventory()["software"]["installed_applications"], alpine)

    def test_processes(self) -> None:
        """Processes are told in the order of their numbers, without kernel threads and without their arguments."""
        self.write(FILES)
        data = self.source.inventory()
        self.assertEqual(
            data["software"]["running_processes"], [{"pid": 1, "name": "init"}, {"pid": 20, "name": "worker"}]
        )
        self.assertNotIn("secret", repr(data))

    def test_process_that_ends(self) -> None:
        """A process that ends between two looks is left out, and nothing else with it."""
        self.write(FILES)
        (self.root / "proc/20/cmdline").unlink()
        self.assertEqual(self.source.inventory()["software"]["running_processes"], [{"pid": 1, "name": "init"}])

    def test_interfaces(self) -> None:
        """Interfaces are told with their addresses; whether one is up is the flag of the kernel."""
        self.write(FILES)
        self.assertEqual(
            self.source.inventory()["network"]["interfaces"],
            [
                {
                    "name": "fake0",
                    "mac": "02:00:00:00:00:01",
                    "up": True,
                    "addresses": ["2001:db8::1", "fe80::200:ff:fe00:1"],
                },
                {"name": "fake1", "mac": "", "up": False, "addresses": []},
            ],
        )

    def test_nothing_there(self) -> None:
        """On a system without any of the files all of the shape is there, empty."""
        data = self.source.inventory()
        self.assertShape(data)
        self.assertEqual(data["hardware"]["memory"], {"total": 0, "used": 0, "used_percent": 0.0})
        self.assertEqual(data["software"], {key: [] for key in data["software"]})
        self.assertEqual([disk["mountpoint"] for disk in data["hardware"]["disk"]], ["/"])

    def test_garbage_there(self) -> None:
        """Files with nonsense in them cost their own part only."""
        for nonsense in ("", "\n", "x", "a: b: c\n", "cpu one two\n", "\0" * 100, "MemTotal: 0 kB\nMemAvailable: 0 kB"):
            self.write(dict.fromkeys(FILES, nonsense))
            self.write({"etc/os-release": FILES["etc/os-release"]})
            data = self.source.inventory()
            self.assertShape(data)
            self.assertEqual(data["system"]["os_version"], "Fake OS 1 (test)")
            self.source.health()

    def test_names_that_are_not_unicode(self) -> None:
        """A name with bytes that are no UTF-8 does not make the inventory unsendable."""
        self.write(FILES)
        os.makedirs(os.fsencode(self.root) + b"/sys/fs/cgroup/system.slice/caf\xe9.service")
        (self.root / "proc/1/comm").write_bytes(b"in\xffit\n")
        data = self.source.inventory()
        self.assertShape(data)
        self.assertIn({"name": "caf?", "status": "running"}, data["software"]["running_services"])

    def test_cpu_usage(self) -> None:
        """Usage is what was not idle since the last look, waiting for disks being idle; 0 in the first look."""
        self.write(FILES)
        self.assertEqual(self.source.health().cpu_usage_percent, 0.0)
        self.write({"proc/stat": "cpu  110 5 110 750 125 0 0 0 55 0\n"})
        self.assertEqual(self.source.health().cpu_usage_percent, 25.0)
        self.write({"proc/stat": "cpu  210 5 110 750 125 0 0 0 55 0\n"})
        self.assertEqual(self.source.inventory()["hardware"]["cpu"]["usage"], 100.0)

    def test_cpu_usage_within_one_tick(self) -> None:
        """Two looks at once give the same number instead of a division by zero, and counters may go back."""
        self.test_cpu_usage()
        self.assertEqual(self.source.health().cpu_usage_percent, 100.0)
        self.write(FILES)
        self.assertEqual(self.source.health().cpu_usage_percent, 100.0)
        self.write({"proc/stat": "cpu  110 0 100 760 130 0 0 0 50 0\n"})
        self.assertEqual(self.source.health().cpu_usage_percent, 10.0)

    def test_health(self) -> None:
        """Memory, the system disk and the processors are told in percent; the worst decides the status."""
        self.write(FILES)
        health = self.source.health()
        self.assertEqual((health.memory_usage_percent, health.disk_usage_percent), (60.0, 33.3))
        self.assertEqual(health.status, "healthy")

    def test_thresholds(self) -> None:
        """80 % warns and 95 % is critical, wherever it is."""
        for used, status in (
            (799, "healthy"),
            (800, "warning"),
            (949, "warning"),
            (950, "critical"),
            (1000, "critical"),
        ):
            full = Usage(2000, used, 1000 - used)
            empty = Usage(2000, 0, 1000)
            self.write({"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 1000 kB\n"})
            self.assertEqual(StandardSource(self.root, disk_usage=lambda path, u=full: u).health().status, status)
            self.write({"proc/meminfo": f"MemTotal: 1000 kB\nMemAvailable: {1000 - used} kB\n"})
            self.assertEqual(StandardSource(self.root, disk_usage=lambda path, u=empty: u).health().status, status)
            source = StandardSource(self.root, disk_usage=lambda path, u=empty: u)
            self.write({"proc/stat": "cpu 0 0 0 0 0 0 0 0\n", "proc/meminfo": ""})
            source.health()
            self.write({"proc/stat": f"cpu {used} 0 0 {1000 - used} 0 0 0 0\n"})
            self.assertEqual(source.health().status, status)

    def test_unknown(self) -> None:
        """When nothing can be had the status says so, instead of claiming health."""

        def fails(path: str) -> Usage:
            raise OSError("no disk")

        health = StandardSource(self.root, disk_usage=fails).health()
        self.assertEqual(health.status, "unknown")
        self.assertEqual(health.disk_usage_percent, 0.0)

    def test_this_machine(self) -> None:
        """The real machine has the shape, too."""
        source: MachineSource = StandardSource()
        self.assertShape(source.inventory())
        self.assertNotEqual(source.health().status, "unknown")

    @skipUnless(os.path.exists("/sys/class/net/lo"), "needs Linux's loopback interface")
    def test_ipv4(self) -> None:
        """The loopback interface has its IPv4 address."""
        interfaces = {entry["name"]: entry for entry in StandardSource().inventory()["network"]["interfaces"]}
        self.assertIn("127.0.0.1", interfaces["lo"]["addresses"])
        self.assertTrue(interfaces["lo"]["up"])

    def test_no_ioctl(self) -> None:
        """On a system without fcntl there are no IPv4 addresses, and nothing fails."""
        self.write(FILES)
        real = builtins.__import__

        def without_fcntl(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "fcntl":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        self.patch(builtins, "__import__", without_fcntl)
        self.assertEqual(len(self.source.inventory()["network"]["interfaces"]), 2)


@skipUnless(psutil, "needs psutil")
class PsutilSourceTests(SourceTestCase):
    def test_this_machine(self) -> None:
        """psutil alone, with no file of Linux's within reach, fills the shape."""
        source: MachineSource = PsutilSource(self.root)
        data = source.inventory()
        self.assertShape(data)
        self.assertGreater(data["system"]["uptime"], 0)
        self.assertGreater(data["hardware"]["memory"]["total"], data["hardware"]["memory"]["used"])
        self.assertIn(os.getpid(), [process["pid"] for process in data["software"]["running_processes"]])
        self.assertNotEqual(source.health().status, "unknown")

    def fake(self, **functions: Any) -> PsutilSource:
        """Return a source whose psutil consists of ``functions``."""
        source = PsutilSource(self.root, disk_usage=disk_usage, seconds=lambda: 1100.9)
        source._psutil = SimpleNamespace(**functions)
        return source

    def test_uptime(self) -> None:
        """Uptime is the time since the start of the machine, never negative when the clock was set back."""
        self.assertEqual(self.fake(boot_time=lambda: 1000.0).inventory()["system"]["uptime"], 100)
        self.assertEqual(self.fake(boot_time=lambda: 2000.0).inventory()["system"]["uptime"], 0)

    def test_cpu(self) -> None:
        """The time of guests is part of the user's and must not count twice; not all systems know iowait."""
        Times = namedtuple("Times", "user idle iowait guest")
        Short = namedtuple("Short", "user idle")
        readings = iter((Times(0, 0, 0, 0), Times(25, 50, 25, 1000), Short(50, 150)))
        source = self.fake(cpu_times=lambda: next(readings))
        self.assertEqual([source.health().cpu_usage_percent for _ in range(3)], [0.0, 25.0, 25.0])

    def test_memory(self) -> None:
        """What is available is not used."""
        source = self.fake(virtual_memory=lambda: SimpleNamespace(total=1000, available=250))
        self.assertEqual(source.inventory()["hardware"]["memory"], {"total": 1000, "used": 750, "used_percent": 75.0})

    def test_disks(self) -> None:
        """Images are left out; where psutil sees no partition the system disk is told."""
        partitions = [SimpleNamespace(device="/dev/loop1", mountpoint="/snap/y")]
        source = self.fake(disk_partitions=lambda **_: partitions)
        self.assertEqual([disk["mountpoint"] for disk in source.inventory()["hardware"]["disk"]], ["/"])
        partitions.append(SimpleNamespace(device="/dev/sda1", mountpoint="/data disk"))
        self.assertEqual([disk["device"] for disk in source.inventory()["hardware"]["disk"]], ["/dev/sda1"])

    def test_processes(self) -> None:
        """Kernel threads are left out, processes that hide their command line are not, and arguments never show."""
        infos = [
            {"pid": 9, "name": "hidden", "cmdline": None},
            {"pid": 2, "name": "kthreadd", "cmdline": []},
            {"pid": 1, "name": "in\udcffit", "cmdline": ["init", "--secret"]},
        ]
        source = self.fake(process_iter=lambda attrs: [SimpleNamespace(info=info) for info in infos])
        data = source.inventory()
        self.assertShape(data)
        self.assertEqual(
            data["software"]["running_processes"], [{"pid": 1, "name": "in?it"}, {"pid": 9, "name": "hidden"}]
        )

    def test_interfaces(self) -> None:
        """Hardware addresses and others are told apart; scopes are dropped; an interface may have neither."""
        address = lambda family, text: SimpleNamespace(family=family, address=text)  # noqa: E731  # a row of a table
        source = self.fake(
            AF_LINK=17,
            net_if_stats=lambda: {"b0": SimpleNamespace(isup=True)},
            net_if_addrs=lambda: {
                "b0": [address(2, "192.0.2.1"), address(10, "fe80::1%b0"), address(17, "02:00:00:00:00:01")],
                "a0": [],
            },
        )
        self.assertEqual(
            source.inventory()["network"]["interfaces"],
            [
                {"name": "a0", "mac": "", "up": False, "addresses": []},
                {"name": "b0", "mac": "02:00:00:00:00:01", "up": True, "addresses": ["192.0.2.1", "fe80::1"]},
            ],
        )

    def test_everything_fails(self) -> None:
        """When psutil fails in every call the inventory is empty and the status unknown."""
        data = self.fake().inventory()
        self.assertShape(data)
        self.assertEqual(data["software"]["running_processes"], [])
        source = self.fake()
        self.patch(source, "_disk_usage", lambda path: shutil.disk_usage("/nonexistent"))
        self.assertEqual(source.health().status, "unknown")


class DefaultSourceTests(SynchronousTestCase):
    @skipUnless(psutil, "needs psutil")
    def test_with_psutil(self) -> None:
        """psutil is used where it is installed."""
        self.assertIsInstance(default_source(), PsutilSource)

    def test_without_psutil(self) -> None:
        """Without psutil the standard library does."""
        real = builtins.__import__

        def without_psutil(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "psutil":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        self.patch(builtins, "__import__", without_psutil)
        self.assertIs(type(default_source()), StandardSource)


class StableViewTests(SourceTestCase):
    def data(self, **changes: str) -> dict[str, Any]:
        """Return an inventory of the machine of these tests, with some files changed."""
        self.write({**FILES, **{name.replace("__", "/"): content for name, content in changes.items()}})
        return StandardSource(self.root, disk_usage=disk_usage).inventory()

    def test_volatile(self) -> None:
        """Time that passes, use that changes and processes that come again under another number are no news."""
        before = self.data()
        after = copy.deepcopy(before)
        after["system"]["uptime"] += 60
        after["hardware"]["cpu"]["usage"] = 99.5
        after["hardware"]["memory"].update(used=1, used_percent=0.1)
        after["hardware"]["disk"][0].update(used=1, used_percent=0.1)
        after["software"]["running_processes"] = [
            {"pid": 77, "name": "worker", "cpu": 3.5},
            {"pid": 78, "name": "worker"},
            {"pid": 1, "name": "init"},
        ]
        self.assertNotEqual(before, after)
        self.assertEqual(stable_view(before), stable_view(after))

    def test_news(self) -> None:
        """Everything else is news."""
        before = stable_view(self.data())
        for changes in (
            {"etc__os-release": "PRETTY_NAME=Other"},
            {"proc__meminfo": "MemTotal: 2000 kB\nMemAvailable: 400 kB\n"},
            {"proc__20__comm": "other"},
            {"var__lib__dpkg__status": FILES["var/lib/dpkg/status"].replace("1:2.3", "1:2.4")},
            {"sys__class__net__fake0__flags": "0x1002"},
            {"sys__fs__cgroup__system.slice__new.service__x": ""},
        ):
            self.assertNotEqual(stable_view(self.data(**changes)), before, changes)

    def test_unchanged(self) -> None:
        """What is passed in is not changed."""
        data = self.data()
        kept = copy.deepcopy(data)
        stable_view(data)
        self.assertEqual(data, kept)

    def test_foreign_shapes(self) -> None:
        """The inventory of an agent's own source may have any shape; only numbers under the known names go."""
        for data in (
            {},
            {"software": None},
            {"software": []},
            {"software": {"running_processes": None}},
            {"a": [1, [2]]},
        ):
            self.assertEqual(stable_view(data), data)
        self.assertEqual(stable_view({"usage": "by the sales team", "used": 1}), {"usage": "by the sales team"})
        self.assertEqual(
            stable_view({"software": {"running_processes": ["cron", {}, {"name": "x"}]}}),
            {"software": {"running_processes": ["", "x"]}},
        )


class MachineIdTests(SynchronousTestCase):
    def machine_id(self, content: str | None, configured: str = "", hostname: str = "host") -> str:
        path = Path(self.mktemp())
        if content is not None:
            path.write_text(content)
        return machine_id(configured, path=path, hostname=lambda: hostname)

    def test_configured(self) -> None:
        """What is configured wins."""
        self.assertEqual(self.machine_id("0" * 32, "mine"), "mine")

    def test_file(self) -> None:
        """Else it is the system's own id."""
        self.assertEqual(self.machine_id("0123456789abcdef" * 2 + "\n"), "0123456789abcdef" * 2)

    def test_host_name(self) -> None:
        """Without one, or while it is not set yet, it is the host name."""
        for content in (None, "", "uninitialized\n", "0123", "0123456789abcdef" * 3):
            self.assertEqual(self.machine_id(content), "host")

    def test_odd_host_names(self) -> None:
        """Whatever the host is called the id can travel: never empty, not too long, plain ASCII."""
        self.assertEqual(self.machine_id(None, hostname=""), "unknown")
        self.assertEqual(self.machine_id(None, hostname="hôte"), "h?te")
        self.assertEqual(len(self.machine_id(None, hostname="x" * 300)), 200)

    def test_this_machine(self) -> None:
        """This machine has one."""
        self.assertTrue(machine_id(""))
