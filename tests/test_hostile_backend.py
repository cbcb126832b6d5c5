"""A whole manager and a server that means harm, seed by seed: no error in the log, nothing left, and it comes back."""

from __future__ import annotations

import gc
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any, get_args

import msgspec
from prometheus_client import CollectorRegistry
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.manager import Manager
from commsmgr.messages import FromBackend, HeartbeatAnswer, Result
from tests.fuzz import answers
from tests.simulation.clock import VirtualClock
from tests.simulation.network import Network
from tests.simulation.process import Disks
from tests.simulation.reactor import ProcessReactor
from tests.strategies import examples, payloads
from tests.websocket_kit import BINARY, CLOSE, PING, PONG, TEXT, accept, close_frame, frame
from tests.world import StillMachine

SEEDS = range(8)
HOSTILE = 60.0
"""Virtual seconds in which the server does its worst."""

BACK = 120.0
"""Virtual seconds after which everything has to be well again: every pause is capped below."""

LONGEST = 4000
"""Bytes of what the server says at once: a network that is simulated packet by packet is slow."""

PORT = 8080
EXPECTED = frozenset(("command.failed",))


@cache
def sayings() -> dict[str, list[bytes]]:
    """Return what the server has to say, by where; always the same."""
    sent = {
        "messages": examples(payloads(*get_args(FromBackend)), 200),
        "bodies": examples(payloads(HeartbeatAnswer), 100),
        "answers": [seed[2:] for seed in answers.seeds()],
    }
    return {where: [each for each in said if len(each) <= LONGEST] for where, said in sent.items()}


class Server(Protocol):
    """One connection."""

    transport: Any

    def __init__(self, town: Town) -> None:
        self._town = town
        self._random = town.random
        self._data = b""
        self._websocket = False

    def dataReceived(self, data: bytes) -> None:
        """Something came."""
        self._data += data
        if self._websocket:
            self._heard()
            return
        head, blank, rest = self._data.partition(b"\r\n\r\n")
        length = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
        if not blank or len(rest) < length:
            return
        self._data = rest[length:]
        if b"\r\nupgrade: websocket" in head.lower():
            self._upgrade(head)
        elif self._town.hostile:
            self._misbehave_http()
        else:
            body = b"{}"
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It is over."""
        self._town.servers.pop(self, None)
        self.transport = None

    def _upgrade(self, head: bytes) -> None:
        protocol = "Sec-WebSocket-Protocol: commsmgr.v1"
        if not self._town.hostile:
            self._websocket = True
            self.transport.write(accept(head, protocol) + self._text({"type": "registration_ack"}))
        elif self._random.random() < 0.3:
            self._town.did["refused upgrade"] += 1
            self.transport.write(self._random.choice(sayings()["answers"]))
        else:
            self._websocket = True
            self._town.did["upgrade"] += 1
            self.transport.write(accept(head, *[protocol] * self._random.randrange(2)))
            if self._random.random() < 0.8:
                self.transport.write(self._text({"type": "registration_ack"}))
            self._misbehave()

    def _heard(self) -> None:
        """Answer what the agent sends: every result and every ping when good, now and then when not."""
        while len(self._data) >= 6:
            length, at = self._data[1] & 0x7F, 2
            if length >= 126:
                width = 2 if length == 126 else 8
                length, at = int.from_bytes(self._data[2 : 2 + width], "big"), 2 + width
            end = at + 4 + length
            if len(self._data) < end:
                return
            opcode, mask = self._data[0] & 0x0F, self._data[at : at + 4]
            payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(self._data[at + 4 : end]))
            self._data = self._data[end:]
            if self._town.hostile and self._random.random() < 0.3:
                continue
            self._answer(opcode, payload)

    def _answer(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.transport.write(frame(PONG, payload))
        elif opcode == CLOSE:
            self.transport.write(frame(CLOSE, payload))
            self.transport.loseConnection()
        elif opcode == TEXT:
            # Whatever the agent sends is right, also to the worst of servers.
            said = msgspec.json.decode(payload)
            if said["type"] in ("command_result", "loss_receipt"):
                self.transport.write(self._text({"type": "ack", "ids": [said["id"]]}))

    def _text(self, message: object) -> bytes:
        return frame(TEXT, msgspec.json.encode(message))

    def _misbehave_http(self) -> None:
        self._town.did["answer"] += 1
        if self._random.random() < 0.5:
            body = self._random.choice(sayings()["bodies"])
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            self.transport.write(self._random.choice(sayings()["answers"]))
        if self._random.random() < 0.3:
            self.transport.loseConnection()

    def _misbehave(self) -> None:
        if self.transport is None or not self._town.hostile:
            return
        self._do_harm()
        self._town.clock.callLater(self._random.expovariate(4.0), self._misbehave)

    def _do_harm(self) -> None:
        random = self._random
        message = random.choice(sayings()["messages"])
        kind = random.choices(
            ("messages", "fragments", "controls", "binary", "frame", "bytes", "half", "close", "cut"),
            (30, 6, 6, 2, 1, 1, 1, 1, 1),
        )[0]
        self._town.did[kind] += 1
        match kind:
            case "messages":
                self.transport.write(b"".join(frame(TEXT, message) for _ in range(random.choice((1, 1, 3, 50)))))
            case "fragments":
                at = random.randrange(len(message) + 1)
                ping = frame(PING, random.randbytes(3))
                self.transport.write(frame(TEXT, message[:at], fin=False) + ping + frame(0, message[at:]))
            case "controls":
                data = random.randbytes(random.randrange(126))
                self.transport.write(frame(random.choice((PING, PONG)), data) * random.choice((1, 20)))
            case "binary":
                self.transport.write(frame(BINARY, message))
            case "frame":
                self.transport.write(frame(random.randrange(16), message[:200], rsv=random.randrange(8)))
            case "bytes":
                self.transport.write(random.randbytes(random.randrange(1, 200)))
            case "half":
                self.transport.write(frame(TEXT, message)[: 1 + random.randrange(len(message) + 1)])
            case "close":
                self.transport.write(close_frame(random.choice((None, 1000, 1001, 1005, 1013, 4001)), b""))
            case "cut":
                random.choice((self.transport.abortConnection, self.transport.loseConnection))()


class Town:
    """
    The server's side.

    :ivar hostile: whether it means harm.
    :ivar did: what it did, how often.
    """

    def __init__(self, clock: VirtualClock, reactor: ProcessReactor, random: Random) -> None:
        self.clock = clock
        self.random = random
        self.hostile = True
        self.did: Counter[str] = Counter()
        self.servers: dict[Server, None] = {}
        factory = Factory()
        factory.noisy = False
        factory.buildProtocol = self._serve  # type: ignore[method-assign]
        reactor.listenTCP(PORT, factory)

    def _serve(self, address: object) -> Server:
        server = Server(self)
        self.servers[server] = None
        return server

    def repent(self) -> None:
        """Be good from now on; what was said cannot be unsaid, so what is open is closed."""
        self.hostile = False
        for server in list(self.servers):
            if server.transport is not None:
                server.transport.abortConnection()


def settings(directory: str) -> config.Config:
    """Return a configuration in which every pause is short."""
    return config.Config(
        backends=(config.Backend(url=f"http://backend.example:{PORT}", name="main", insecure=True),),
        machine_id="machine-1",
        auth=config.Auth(refused_delay=2.0),
        http=config.HTTP(timeout=5.0, attempts=2, max_response_bytes=65536),
        websocket=config.WebSocket(
            connect_timeout=5.0,
            register_timeout=3.0,
            register_wait=1.0,
            ping_interval=5.0,
            ping_timeout=3.0,
            receipt_timeout=8.0,
            max_message_bytes=65536,
        ),
        reconnect=config.Reconnect(base=0.2, cap=2.0, retry_after_cap=5.0),
        breaker=config.Breaker(failures=5, open_for=2.0),
        spool=config.Spool(path=directory, durability="normal", max_events=500),
        delivery=config.Delivery(http_fallback_after=5.0),
        commands=config.Commands(max_pending=50, default_timeout=5.0, max_timeout=10.0),
        heartbeat=config.Heartbeat(interval=4.0, jitter=1.0),
        inventory=config.Inventory(interval=60.0, jitter=5.0),
        stop_deadline=5.0,
    )


class HostileBackendTests(SynchronousTestCase):
    """Each seed is a world of its own, and the same each time."""

    def setUp(self) -> None:
        self.errors: list[str] = []
        globalLogPublisher.addObserver(self._observe)
        self.addCleanup(globalLogPublisher.removeObserver, self._observe)

    def _observe(self, event: LogEvent) -> None:
        if event["log_level"] >= LogLevel.error and event.get("event") not in EXPECTED:
            failure = event.get("log_failure")
            self.errors.append(formatEvent(event) + ("" if failure is None else f": {failure.getTraceback()}"))

    def test_outlives_it(self) -> None:
        """Nothing is logged as an error whatever the server does; when it does no harm any more, all is delivered."""
        did: Counter[str] = Counter()
        for seed in SEEDS:
            did += self.play(seed)
        # A test in which no harm was done would say nothing.
        kinds = {"upgrade", "refused upgrade", "answer", "messages", "fragments", "controls", "frame", "bytes", "half"}
        self.assertEqual(kinds - set(did), set(), did)

    def play(self, seed: int) -> Counter[str]:
        """Play one seed to its end; return what the server did."""
        directory = tempfile.mkdtemp(prefix="commsmgr-hostile-")
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        clock = VirtualClock()
        network = Network(clock, Random(f"{seed}/network"), lambda *_: None)
        reactor, far = (ProcessReactor(clock, network, name, Random(f"{seed}/{name}")) for name in ("agent", "backend"))
        network.names["backend.example"] = network.address("backend")
        town = Town(clock, far, Random(f"{seed}/town"))
        manager = Manager(
            settings(directory),
            reactor=reactor,
            registry=CollectorRegistry(),
            handler=lambda command: command.success("done"),
            machine=StillMachine(),
            wall=lambda: 1_800_000_000.0 + clock.seconds(),
            random=Random(f"{seed}/manager"),
            executor=Disks(reactor, Random(f"{seed}/disks")),
        )
        manager.startService()

        def report() -> None:
            if manager.running and town.hostile:
                manager.send_result(Result(command_id="by-itself")).addErrback(lambda failure: None)
                reactor.callLater(2.0, report)

        reactor.callLater(1.0, report)
        clock.run_until(HOSTILE)
        self.right(seed, clock)
        town.repent()
        settled = self.soon(clock, lambda: self.well(manager))
        self.assertTrue(settled, f"seed {seed}: not well again: {manager.status()}")
        stopped: list[object] = []
        manager.stopService().addBoth(stopped.append)
        self.assertTrue(self.soon(clock, lambda: bool(stopped)), f"seed {seed}: does not stop")
        clock.run_until(clock.seconds() + 2.0)
        self.right(seed, clock)
        self.assertEqual(reactor.leftovers(), [], f"seed {seed}")
        gc.collect()
        self.right(seed, clock)
        return town.did

    def right(self, seed: int, clock: VirtualClock) -> None:
        """Nothing has gone wrong so far."""
        self.assertEqual(self.errors, [], f"seed {seed}: logged as errors")
        self.assertEqual([str(failure) for failure in clock.failures], [], f"seed {seed}: escaped")

    @staticmethod
    def soon(clock: VirtualClock, condition: Callable[[], bool]) -> bool:
        """Let time pass until something is so; return whether that came to be."""
        return clock.run_while(lambda: not condition(), BACK)

    @staticmethod
    def well(manager: Manager) -> bool:
        """Whether the agent is registered, and everything that it had to say is said."""
        status = manager.status()
        return status.connected and not (status.queue.events or status.queue.open_commands)
