"""What systemd is told: by a service on a virtual clock, and by real agents to a real socket."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from pathlib import Path
from threading import Event
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import systemd
from commsmgr.errors import SpoolUnusable
from commsmgr.status import QueueStatus, Status
from commsmgr.systemd import LOOK_EVERY, SystemdNotify, watchdog
from tests.processes import PATIENCE, ProcessTestCase, pause
from tests.world import WorldTestCase, quick

WATCHDOG = 30.0


class Listener:
    """The socket that systemd would have."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """Return the lines that have come since the last time."""
        new = []
        while True:
            try:
                datagram = self.socket.recv(65536)
            except BlockingIOError:
                break
            new += datagram.decode().split("\n")
        self.heard += new
        return new

    async def line(self, pattern: str) -> str:
        """Wait for a line that has not been asked for yet."""
        wanted = re.compile(pattern)
        for _ in range(int(PATIENCE / 0.02)):
            self.listen()
            for line in self.heard:
                if wanted.fullmatch(line):
                    del self.heard[: self.heard.index(line) + 1]
                    return line
            await pause(0.02)
        raise AssertionError(f"no line {pattern!r} in {self.heard}")

    def close(self) -> None:
        self.socket.close()


class FakeManager:
    """Starts, answers and changes its status when it is told to."""

    def __init__(self) -> None:
        self.start: Deferred[None] = Deferred()
        self.proofs: list[Deferred[None]] = []
        self.answers = True
        self.trouble = ""

    def started(self) -> Deferred[None]:
        return self.start

    def alive(self) -> Deferred[None]:
        if self.answers:
            return succeed(None)
        self.proofs.append(Deferred())
        return self.proofs[-1]

    def status(self) -> Status:
        return Status(
            running=True,
            connected=False,
            reachable=False,
            machine_id="m",
            version="1",
            backends=(),
            queue=QueueStatus(trouble=self.trouble),
        )


class Service(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.mkdtemp(prefix="commsmgr-test-")
        self.address = f"{directory}/notify"
        self.addCleanup(os.rmdir, directory)
        self.listener = Listener(self.address)
        self.addCleanup(os.unlink, self.address)
        self.addCleanup(self.listener.close)
        self.clock = Clock()
        self.patch(systemd, "steady", lambda clock: clock)
        self.manager = FakeManager()
        self.warnings: list[Any] = []
        observe = lambda event: self.warnings.append(event) if event.get("event") == "systemd.notify-failed" else None  # noqa: E731
        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)

    def begin(self, **environ: str) -> SystemdNotify:
        given = {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": f"{WATCHDOG * 1e6:.0f}", **environ}
        service = SystemdNotify(self.manager, reactor=self.clock, environ=given)
        service.startService()
        self.addCleanup(lambda: service.stopService() if service.running else None)
        return service

    def told(self, prefix: str) -> list[str]:
        return [line for line in self.listener.listen() if line.startswith(prefix)]

    def test_ready(self) -> None:
        """Readiness is said once, when the start is complete; until then more time is asked for, again and again."""
        self.begin()
        for _ in range(100):
            heard = self.listener.listen()
            self.assertIn("EXTEND_TIMEOUT_USEC=60000000", heard)
            self.assertNotIn("READY=1", heard)
            self.clock.advance(LOOK_EVERY)
        self.listener.listen()
        self.manager.start.callback(None)
        self.assertEqual(["READY=1"], self.listener.listen())
        for _ in range(10):
            self.clock.advance(LOOK_EVERY)
            self.assertEqual(set(), set(self.listener.listen()) - {"WATCHDOG=1"})

    def test_start_fails(self) -> None:
        """A start that fails is never called ready."""
        self.manager.start = fail(SpoolUnusable("no"))
        self.begin()
        self.clock.pump([LOOK_EVERY] * 10)
        self.assertEqual([], self.told("READY"))

    def test_status(self) -> None:
        """The sentence of /readyz is said when it has changed, and at most once in five seconds."""
        self.begin()
        self.assertEqual(["STATUS=not connected: no backend is configured"], self.told("STATUS"))
        self.clock.pump([1.0] * 60)
        self.assertEqual([], self.told("STATUS"))
        changes = 0
        for second in range(60):
            self.manager.trouble = f"trouble\n number {second}"
            self.clock.advance(1.0)
            told = self.told("STATUS")
            changes += len(told)
            for line in told:
                self.assertIn("trouble", line)
                self.assertIn(f"number {second}", line, "one line, and the latest")
        self.assertEqual(12, changes)

    def test_watchdog(self) -> None:
        """A sign of life comes within every half of the time, as long as the writer answers, and then not at all."""
        self.begin()
        self.assertEqual(["WATCHDOG=1"], self.told("WATCHDOG"))
        for _ in range(10):
            self.clock.advance(WATCHDOG / 2)
            self.assertEqual(["WATCHDOG=1"], self.told("WATCHDOG"))
        self.manager.answers = False
        self.clock.pump([WATCHDOG / 2] * 20)
        self.assertEqual([], self.told("WATCHDOG"))
        self.assertEqual(1, len(self.manager.proofs), "it is asked once, however long it takes")
        self.manager.answers = True
        self.manager.proofs.pop().callback(None)
        self.assertEqual(["WATCHDOG=1"], self.told("WATCHDOG"))
        self.clock.advance(WATCHDOG / 2)
        self.assertEqual(["WATCHDOG=1"], self.told("WATCHDOG"))

    def test_stop(self) -> None:
        """The stop is said at its beginning, and nothing after that, also when the writer answers late."""
        self.manager.answers = False
        service = self.begin()
        self.listener.listen()
        service.stopService()
        self.assertEqual(["STOPPING=1", "STATUS=stopping"], self.listener.listen())
        self.manager.start.callback(None)
        self.assertEqual([], self.clock.getDelayedCalls())
        self.assertEqual([], self.listener.listen())
        service.startService()
        self.assertIn("EXTEND_TIMEOUT_USEC=60000000", self.listener.listen())

    def test_nobody(self) -> None:
        """Without systemd nothing is opened, asked or waited for."""
        service = self.begin(NOTIFY_SOCKET="")
        self.assertEqual([], self.clock.getDelayedCalls())
        service.stopService()
        self.assertEqual([], self.listener.listen())

    def test_no_watchdog(self) -> None:
        """Without WatchdogSec= no sign of life is sent."""
        self.begin(WATCHDOG_USEC="")
        self.clock.pump([LOOK_EVERY] * 100)
        self.assertEqual([], self.told("WATCHDOG"))

    def test_watchdog_of_whom(self) -> None:
        """The time is that of this process, if it is a number at all."""
        for usec, pid, seconds in (
            ("30000000", "", 30.0),
            ("30000000", "7", 30.0),
            ("30000000", "8", 0.0),
            ("", "", 0.0),
            ("0", "", 0.0),
            ("-1", "", 0.0),
            ("many", "", 0.0),
            ("١", "", 0.0),
        ):
            self.assertEqual(seconds, watchdog({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}, 7), (usec, pid))

    def test_nobody_listens(self) -> None:
        """What cannot be sent harms nothing, is logged once, and is said as soon as somebody listens."""
        away = f"{self.address}-away"
        for address in (away, "relative", "@", "vsock:2:1234", "/" + "x" * 200, "/\0"):
            self.warnings.clear()
            service = self.begin(NOTIFY_SOCKET=address)
            self.clock.pump([LOOK_EVERY] * 10)
            self.assertEqual(1, len(self.warnings), address)
            service.stopService()
        self.begin(NOTIFY_SOCKET=away)
        self.manager.start.callback(None)
        self.clock.pump([LOOK_EVERY] * 3)
        late = Listener(away)
        self.addCleanup(os.unlink, away)
        self.addCleanup(late.close)
        self.clock.advance(LOOK_EVERY)
        heard = late.listen()
        self.assertIn("READY=1", heard)
        self.assertIn("WATCHDOG=1", heard)
        self.assertIn("STATUS=not connected: no backend is configured", heard)

    def test_nobody_reads(self) -> None:
        """A socket that is full blocks nothing: what was lost is said again when there is room."""
        service = self.begin()
        for number in range(10_000):
            if not service._say(f"X={number}"):
                break
        else:
            self.fail("the socket took everything")
        self.manager.start.callback(None)
        self.listener.listen()
        self.clock.advance(LOOK_EVERY)
        self.assertIn("READY=1", self.listener.listen())


class Alive(WorldTestCase):
    """What a whole manager gives for a sign of life."""

    async def test_writer(self) -> None:
        """It comes from the spool's writer: one that is stuck does not answer, and answers when it goes on."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.spool()))
        await manager.alive()  # before the start there is nothing to be proven
        await manager.connect()
        await manager.alive()
        stuck = Event()
        self.addCleanup(stuck.set)
        assert manager._run is not None
        held = manager._run.spool._store._executor(stuck.wait)
        waiting = manager.alive()
        cancelled = manager.alive()
        cancelled.addErrback(lambda failure: None).cancel()
        for _ in range(10):
            await pause(0.01)
        self.assertFalse(waiting.called)
        stuck.set()
        await waiting
        await held
        await manager.disconnect()
        await manager.alive()


class Process(ProcessTestCase):
    """``twistd commsmgr`` as systemd would run it."""

    timeout = 90

    async def test_life(self) -> None:
        """Ready when it has started though no backend is there, then connected, lost, signs of life, and the stop."""
        address = f"@{self.directory}/notify"
        listener = Listener(address)
        self.addCleanup(listener.close)
        backend, url = await self.backend()
        port = url.rpartition(":")[2]
        await backend.end(signal.SIGKILL)
        agent = self.twistd(
            "-n",
            "commsmgr",
            "--config",
            self.configuration(url),
            NOTIFY_SOCKET=address,
            WATCHDOG_USEC="1000000",
        )
        await listener.line("READY=1")
        await listener.line("STATUS=not connected: main .*")
        await listener.line("WATCHDOG=1")
        backend, _ = await self.backend(listen=f"127.0.0.1:{port}")
        await listener.line(r"STATUS=connected to main \(commsmgr.v1, without TLS\) since .*")
        await backend.end(signal.SIGKILL)
        await listener.line("STATUS=not connected: main .*")
        await listener.line("WATCHDOG=1")
        await listener.line("WATCHDOG=1")
        agent.send(signal.SIGTERM)
        await listener.line("STOPPING=1")
        self.assertEqual(-signal.SIGTERM, await agent.wait(), agent.text)
        listener.listen()
        self.assertEqual(["STATUS=stopping"], listener.heard, "nothing after that")
        self.assertNotIn("Traceback", agent.text)

    async def test_stopped(self) -> None:
        """A process that does not go on gives no sign of life; when it goes on it does."""
        listener = Listener(f"{self.directory}/notify")
        self.addCleanup(listener.close)
        agent = self.twistd(
            "-n",
            "commsmgr",
            "--config",
            self.configuration("http://127.0.0.1:9"),
            NOTIFY_SOCKET=f"{self.directory}/notify",
            WATCHDOG_USEC="200000",
            WATCHDOG_PID="",
        )
        await listener.line("READY=1")
        await listener.line("WATCHDOG=1")
        agent.send(signal.SIGSTOP)
        while ") T " not in Path(f"/proc/{agent.transport.pid}/stat").read_text():
            await pause(0.01)
        listener.listen()
        await pause(1.0)
        self.assertEqual([], listener.listen())
        agent.send(signal.SIGCONT)
        await listener.line("WATCHDOG=1")
        await agent.end()

    async def test_waits_for_its_disk(self) -> None:
        """A start that cannot go on says why, asks for time, and is not called ready until it has started."""
        listener = Listener(f"@{self.directory}/notify")
        self.addCleanup(listener.close)
        spool = self.directory / "spool"
        spool.mkdir(mode=0o700)
        agent = self.python(
            Path(__file__).with_name("waiting_agent.py"),
            self.configuration("http://127.0.0.1:9"),
            NOTIFY_SOCKET=f"@{self.directory}/notify",
        )
        await listener.line("STATUS=not connected: the manager waits for its spool.*disk full.*")
        self.assertNotIn("READY=1", listener.heard)
        await listener.line("EXTEND_TIMEOUT_USEC=60000000")
        agent.send(signal.SIGUSR1)
        await listener.line("READY=1")
        await agent.end()
