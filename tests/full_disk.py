"""
What happens on a disk that is really full. Run by test_full_disk in a process of its own, with a directory to mount on.

The process enters a mount namespace of its own and mounts a file system of some MiB there, so that it goes with the
process, whatever becomes of the tests. It takes root, as a mount does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, gatherResults
from twisted.scripts import trial

from commsmgr import config
from commsmgr.backend.service import ReferenceBackend
from commsmgr.errors import SpoolWriteFailed
from commsmgr.manager import Manager
from commsmgr.messages import Result
from commsmgr.observe.health import explain, live, ready
from commsmgr.spool import Accepted, Lane, Spool, ballast, files, patience
from commsmgr.spool import store as store_module
from tests.processes import ProcessTestCase
from tests.world import MACHINE, Runs, WorldTestCase, nothing_held, quick, until

SIZE = 32 << 20
DISK = "FULL_DISK_OF_THE_TEST"
NOWHERE = "http://127.0.0.1:9"
BODY = bytes(10_000)

_NEW_NAMESPACE, _PRIVATE, _RECURSIVE = 0x00020000, 1 << 18, 1 << 14

reactor: Any = installed


def mount(path: str, size: int) -> None:
    """Mount a file system of ``size`` bytes at ``path``, for this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        lambda: libc.unshare(_NEW_NAMESPACE),
        lambda: libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None),
        lambda: libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={size},mode=0700".encode()),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mount")


class Disk:
    """The file system, and a file on it that takes all the room there is."""

    def __init__(self) -> None:
        self.path = os.environ[DISK]
        self._filler = Path(self.path) / "filler"

    def fill(self) -> None:
        """Leave not a byte."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for size in (1 << 20, 4096):
            try:
                while os.write(descriptor, bytes(size)) == size:
                    pass
            except OSError:
                pass
        os.close(descriptor)

    def leave(self, size: int) -> None:
        """Give so many bytes back."""
        os.truncate(self._filler, self._filler.stat().st_size - size)

    def empty(self) -> None:
        """Give all back."""
        self._filler.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything."""
        self.empty()
        shutil.rmtree(self.spool, ignore_errors=True)

    @property
    def spool(self) -> str:
        return f"{self.path}/spool"


class OnFullDisk(WorldTestCase):
    """With short pauses; the spool's threads, files and fsyncs are the real ones."""

    timeout = 20

    def setUp(self) -> None:
        super().setUp()
        self.patch(patience, "FIRST_PAUSE", 0.05)
        self.patch(store_module, "RETRY_AFTER", 0.05)
        self.disk = Disk()
        self.addCleanup(self.disk.clear)

    def bare(self) -> Spool:
        spool = Spool(config.Spool(path=self.disk.spool), reactor=reactor, wall=time.time)
        self.addCleanup(spool.close)
        return spool

    async def put(self, spool: Spool, name: str) -> str:
        await spool.outbox.put(lane=Lane.EVENT, kind="note", id=name, body=BODY)
        return name

    async def held(self, spool: Spool) -> dict[str, int]:
        """What the event lane hands out, with numbers."""
        reader, got = spool.outbox.reader(Lane.EVENT), {}
        reader.rewind()
        while True:
            await spool.inbox.known("none", "")  # a turn through the writer
            entries = reader.take(1000, 1 << 30)
            if not entries:
                return got
            got |= {entry.id: entry.seq for entry in entries}

    async def until_refused(self, spool: Spool) -> list[str]:
        """Put events on a full disk until one is refused; return those that were accepted all the same."""
        told: list[str] = []
        while True:
            try:
                told.append(await self.put(spool, f"full{len(told)}"))
            except SpoolWriteFailed:
                return told


class SpoolOnAFullDisk(OnFullDisk):
    """The spool alone."""

    async def test_fills_up_and_recovers(self) -> None:
        """New events are refused, receipts and completions go on, nothing that was told is lost; then all goes on."""
        spool = self.bare()
        await spool.open()
        told = list(await gatherResults([Deferred.fromCoroutine(self.put(spool, f"e{n}")) for n in range(200)]))
        keys = []
        for n in range(3):
            answer = await spool.inbox.accept(id=f"c{n}", digest="d", body=b"")
            assert isinstance(answer, Accepted)
            keys.append(answer.command.key)
        self.disk.fill()
        told += await self.until_refused(spool)
        self.assertIn("full", spool.trouble)
        numbers = await self.held(spool)
        self.assertEqual(list(numbers), told)
        await spool.inbox.offered(keys)
        for n, key in enumerate(keys):
            await spool.inbox.complete(key=key, command_id=f"c{n}", status="success", result_id=f"r{n}", body=BODY)
            told.append(f"r{n}")
        forgotten = told[:50]
        for name in forgotten:
            await spool.outbox.forget([numbers[name]])
        told = told[50:]
        with self.assertRaises(SpoolWriteFailed):
            await self.put(spool, "refused")
        self.assertEqual(list(await self.held(spool)), told)
        self.disk.empty()
        told.append(await self.put(spool, "again"))
        self.assertEqual(spool.trouble, "")
        self.assertTrue(os.path.exists(f"{self.disk.spool}/{ballast.NAME}"))
        await spool.close()
        opened = await spool.open()
        self.assertEqual((opened.set_aside, opened.interrupted, opened.waiting), (None, (), ()))
        self.assertEqual(list(await self.held(spool)), told)

    async def test_start_with_what_the_run_before_has_left(self) -> None:
        """A full disk with a long log and a ballast on it: it opens, gives out what it has, and takes receipts."""
        spool = self.bare()
        await spool.open()
        told = [await self.put(spool, f"e{n}") for n in range(300)]
        kept = {name: Path(self.disk.spool, name).read_bytes() for name in (files.DATABASE, f"{files.DATABASE}-wal")}
        self.assertGreater(len(kept[f"{files.DATABASE}-wal"]), 2 << 20)
        await spool.close()
        for with_ballast in (True, False):
            self.disk.empty()
            for name, content in kept.items():
                Path(self.disk.spool, name).write_bytes(content)
            if not with_ballast:
                Path(self.disk.spool, ballast.NAME).unlink(missing_ok=True)
            self.disk.fill()
            if not with_ballast:  # then receipts need a little room elsewhere
                self.disk.leave(1 << 20)
            spool = self.bare()
            await spool.open()
            numbers = await self.held(spool)
            self.assertEqual(list(numbers), told)
            await spool.outbox.forget(list(numbers.values())[:100])
            await spool.close()
            await spool.open()
            self.assertEqual(list(await self.held(spool)), told[100:])
            with self.assertRaises(SpoolWriteFailed):
                while True:
                    await self.put(spool, "refused")
            await spool.close()

    async def test_salvage_without_room(self) -> None:
        """A torn spool that finds no room for the new one stays as it is, and is taken over when there is room."""
        spool = self.bare()
        await spool.open()
        told = [await self.put(spool, f"e{n}") for n in range(900)]
        await spool.close()
        files.mark(self.disk.spool, "by the test")
        before = Path(self.disk.spool, files.DATABASE).read_bytes()
        self.disk.fill()
        with self.assertRaises(SpoolWriteFailed):
            await spool.open()
        self.assertEqual(Path(self.disk.spool, files.DATABASE).read_bytes(), before)
        left = {name for name in os.listdir(self.disk.spool) if name.startswith(files.DATABASE)}
        self.assertEqual(left, {files.DATABASE})
        self.disk.empty()
        self.expected.add("spool.set-aside")
        opened = await spool.open()
        self.assertIsNotNone(opened.set_aside)
        self.assertEqual(list(await self.held(spool)), told)


class AgentOnAFullDisk(OnFullDisk):
    """Whole agents."""

    def agent(self, backend: ReferenceBackend | str, **parameters: Any) -> Manager:
        spool = config.Spool(path=self.disk.spool)
        return self.manager(quick(backend, self.disk.spool, spool=spool), **parameters)

    async def test_start(self) -> None:
        """A start without any room says why, refuses what it is given, and goes on by itself when there is room."""
        backend = await self.backend()
        self.disk.fill()
        manager = self.agent(backend, handler=Runs())
        connecting, sending = manager.connect(), manager.send_result(Result(command_id="c"))
        with self.assertRaises(SpoolWriteFailed):
            await sending
        with self.assertRaises(SpoolWriteFailed):
            await manager.send_result(Result(command_id="c"))
        await until(lambda: len(self.logged("spool.open-failed")) > 2)
        status = manager.status()
        self.assertIn("cannot be opened: database or disk is full", status.queue.trouble)
        self.assertIn(status.queue.trouble, status.problems)
        self.assertEqual((status.running, live(status), ready(status)), (False, True, False))
        self.assertIn("waits for its spool", explain(status))
        self.assertNoResult(connecting)
        self.disk.empty()
        self.assertTrue((await connecting).connected)
        self.assertEqual((manager.status().queue.trouble, manager.status().problems), ("", ()))
        self.assertTrue(ready(manager.status()))
        self.assertEqual("success", (await backend.when_result(backend.send_command(MACHINE, "echo"))).status)

    async def test_stop_while_it_waits(self) -> None:
        """A stop does not wait for the disk, nor for the next attempt; nor does who waits for the connection."""
        self.patch(patience, "FIRST_PAUSE", 30.0)
        self.disk.fill()
        manager = self.agent(NOWHERE)
        manager.startService()
        await until(lambda: self.logged("spool.open-failed"))
        began = time.monotonic()
        await manager.disconnect()
        self.assertLess(time.monotonic() - began, 1.0)
        self.assertEqual(manager.status().problems, ())
        self.disk.empty()
        manager.startService()
        await manager.started()

    async def test_fills_up_while_it_runs(self) -> None:
        """It stays connected, sends what it has and forgets what is acknowledged; commands come when there is room."""
        backend, runs = await self.backend(), Runs()
        manager = self.agent(backend, handler=runs)
        await manager.connect()
        held = backend.send_command(MACHINE, "wait")
        await until(lambda: runs.waiting == 1)
        self.disk.fill()
        refused = None
        while refused is None:  # until the ballast is gone
            try:
                await manager.send_inventory({"n": os.urandom(8).hex()}, force=True)
            except SpoolWriteFailed as error:
                refused = error
        self.assertIn("full", str(refused))
        self.assertFalse(ready(manager.status()))
        runs.release()
        self.assertEqual("success", (await backend.when_result(held)).status)
        late = backend.send_command(MACHINE, "echo", "", ("late",))
        await until(lambda: nothing_held(manager))
        self.assertTrue(manager.status().connected)
        self.disk.empty()
        self.assertEqual("ran late", (await backend.when_result(late)).output)
        await until(lambda: ready(manager.status()))
        self.assertEqual(1, [command.id for command in runs.commands].count(late))


class TwistdOnAFullDisk(ProcessTestCase):
    """The program that an operator starts."""

    async def test_start(self) -> None:
        """The process stays, says why, and goes on when there is room; a path that can never work ends it with 1."""
        disk = Disk()
        self.addCleanup(disk.clear)
        disk.fill()
        program = self.twistd("-n", "commsmgr", "--config", self.configuration(NOWHERE, spool={"path": disk.spool}))
        await program.line("the spool in .* cannot be opened: .*full.*trying again in 1 s")
        disk.empty()
        await program.line("127.0.0.1:9")
        self.assertIsNone(program.code)
        await program.end()
        wrong = self.configuration(NOWHERE, name="wrong.toml", spool={"path": "/dev/null"})
        other = self.twistd("-n", "commsmgr", "--config", wrong)
        self.assertEqual(1, await other.wait())
        self.assertIn("cannot be used", other.text)


if __name__ == "__main__":
    mount(sys.argv[1], SIZE)
    os.environ[DISK] = sys.argv[1]
    sys.argv = ["trial", f"--temp-directory={sys.argv[2]}", "tests.full_disk"]
    trial.run()
