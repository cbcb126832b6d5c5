"""
The network of a simulated world: hosts, their names, and the paths between them.

A host has one address for as long as the world exists, and is up from the first process that starts on it until the
power fails. Names are a matter of their own: a fault may take one away, or let it point elsewhere.

What happens is told to ``note`` as a kind, a name and a number of bytes, never with content: the same seed gives the
same notes in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Protocol

from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IDelayedCall

from tests.simulation.clock import Owner, VirtualClock
from tests.simulation.wire import GIVE_UP, Connection, Socket

LOOPBACK = "127.0.0.1"
ANYWHERE = "0.0.0.0"

_FIRST_EPHEMERAL = 40001


class Listener(Protocol):
    """Whoever listens on a port."""

    @property
    def owner(self) -> Owner: ...

    def accept(self, socket: Socket) -> None:
        """A peer has connected."""


class Dialling(Protocol):
    """Whoever wants a connection."""

    @property
    def owner(self) -> Owner: ...

    def established(self, socket: Socket) -> None:
        """Here it is."""

    def failed(self, reason: error.ConnectError) -> None:
        """There is none."""


class Path:
    """
    The way between two hosts, the same in both directions.

    :ivar latency: seconds from one host to the other.
    :ivar jitter: up to that many seconds more, at random; order on a connection is kept.
    :ivar bandwidth: bytes a second, in each direction, shared by all connections; None: no limit.
    :ivar connections: those that a process has in use, oldest first.
    """

    def __init__(self, network: Network, hosts: tuple[str, str]) -> None:
        local = hosts[0] == hosts[1]
        self.latency = 0.00005 if local else 0.01
        self.jitter = 0.00005 if local else 0.005
        self.bandwidth: float | None = None
        self.connections: dict[Connection, None] = {}
        self.refusing = False
        self._network = network
        self._hosts = hosts
        self._dark: tuple[str, ...] = ()
        self._busy = dict.fromkeys(hosts, 0.0)

    # -- faults -----------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset both ends of every connection now. New ones are possible."""
        for connection in list(self.connections):
            connection.cut()

    def blackhole(self, *, toward: str | None = None) -> None:
        """Swallow everything, or everything toward one of the two hosts, until :meth:`heal`."""
        assert toward is None or toward in self._hosts
        self._dark = self._hosts if toward is None else (*self._dark, toward)

    def refuse(self) -> None:
        """Refuse new connections, until :meth:`heal`."""
        self.refusing = True

    def heal(self) -> None:
        """Neither swallow nor refuse. Latency, jitter and bandwidth stay as they are."""
        self.refusing = False
        self._dark = ()

    # -- for what travels -------------------------------------------------------------------------------------------

    def passes(self, toward: str) -> bool:
        """Whether what arrives at this moment does arrive."""
        return toward not in self._dark and self._network.is_up(toward)

    def arrival(self, toward: str, size: int) -> float:
        """Return when ``size`` bytes will be there if they are sent now."""
        sent = self._network.clock.seconds()
        if self.bandwidth is not None:
            sent = max(sent, self._busy[toward]) + size / self.bandwidth
            self._busy[toward] = sent
        return sent + self.latency + self.jitter * self._network.random.random()


class Network:
    """
    The network.

    :param random: for jitter, and where segments are split.
    :param note: told what happens: kind, who, bytes.
    :ivar names: host names and their addresses; a name that is missing does not resolve.
    :ivar hang_names: names that are never answered for.
    :ivar lookup: seconds that an answer takes.
    """

    def __init__(self, clock: VirtualClock, random: Random, note: Callable[..., None]) -> None:
        self.clock = clock
        self.random = random
        self.note = note
        self.names: dict[str, str] = {}
        self.hang_names: set[str] = set()
        self.lookup = 0.002
        self._hosts: dict[str, str] = {}
        self._addresses: dict[str, str] = {}
        self._up: dict[str, bool] = {}
        self._paths: dict[tuple[str, str], Path] = {}
        self._listeners: dict[tuple[str, int], tuple[str, Listener]] = {}
        self._ephemeral: dict[str, int] = {}

    def path(self, a: str, b: str) -> Path:
        """Return the path between two hosts."""
        hosts = (a, b) if a <= b else (b, a)
        if hosts not in self._paths:
            self._paths[hosts] = Path(self, hosts)
        return self._paths[hosts]

    # -- hosts ------------------------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        """Return the address of ``host``, which has its name for a start: the one in :attr:`names`, or a new one."""
        if host not in self._addresses:
            number = len(self._addresses) + 1
            address = self.names.setdefault(host, f"10.0.{number // 250}.{number % 250}")
            self._addresses[host] = address
            self._hosts[address] = host
        return self._addresses[host]

    def host_of(self, address: str, seen_from: str) -> str:
        """Return which host ``address`` belongs to; one that is nobody's stands for a host that is always down."""
        return seen_from if address == LOOPBACK else self._hosts.get(address, address)

    def power(self, host: str, on: bool) -> None:
        """Switch a host on or off. Its sockets are for whoever runs there to let go of."""
        self.address(host)
        self._up[host] = on

    def is_up(self, host: str) -> bool:
        """Whether ``host`` has power."""
        return self._up.get(host, False)

    # -- ports ------------------------------------------------------------------------------------------------------

    def free_port(self, host: str) -> int:
        """Return a port that nobody used yet."""
        port = self._ephemeral.get(host, _FIRST_EPHEMERAL)
        while (host, port) in self._listeners:
            port += 1
        self._ephemeral[host] = port + 1
        return port

    def listen(self, host: str, interface: str, port: int, listener: Listener) -> None:
        """
        Let ``listener`` have the port.

        :raise error.CannotListenError: it is taken, or the interface is not the host's.
        """
        if interface not in (ANYWHERE, LOOPBACK, self.address(host)):
            raise error.CannotListenError(interface, port, OSError(99, "Cannot assign requested address"))
        if (host, port) in self._listeners:
            raise error.CannotListenError(interface, port, OSError(98, "Address already in use"))
        self._listeners[host, port] = (interface, listener)
        self.note("listening", f"{host}:{port}", 0)

    def close(self, host: str, port: int) -> None:
        """Nobody listens on the port any more."""
        del self._listeners[host, port]
        self.note("port closed", f"{host}:{port}", 0)

    def listener(self, host: str, address: str, port: int) -> Listener | None:
        """Return who listens on the port when it is asked for by ``address``."""
        interface, listener = self._listeners.get((host, port), ("", None))
        return listener if interface in (ANYWHERE, address) else None

    # -- connections ------------------------------------------------------------------------------------------------

    def dial(self, host: str, address: str, port: int, user: Dialling) -> Dial:
        """Try to connect; ``user`` hears what came of it."""
        return Dial(self, host, address, port, user)

    def accept(self, socket: Socket) -> None:
        """The handshake is complete: give the server's socket to whoever listens."""
        listener = self.listener(socket.host, socket.address.host, socket.address.port)
        if listener is None:
            socket.out.reset()
        else:
            self.clock.guard(listener.owner, listener.accept, socket)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield the segments that ``data`` travels in: often one, never more than three."""
        chance = self.random.random()
        cuts = 0 if chance < 0.6 else 1 if chance < 0.9 else 2
        while cuts and len(data) > 1:
            size = self.random.randrange(1, len(data))
            yield data[:size]
            data = data[size:]
            cuts -= 1
        yield data


class Dial:
    """One attempt to connect: the handshake, tried again with growing pauses while nobody answers."""

    def __init__(self, network: Network, host: str, address: str, port: int, user: Dialling) -> None:
        self._network = network
        self._clock = network.clock
        self._user: Dialling | None = user
        self.server = (network.host_of(address, host), IPv4Address("TCP", address, port))
        own = address if address == LOOPBACK else network.address(host)
        self.client = (host, IPv4Address("TCP", own, network.free_port(host)))
        self._path = network.path(host, self.server[0])
        self._name = f"{host}:{self.client[1].port}>{self.server[0]}:{port}"
        self._began = self._clock.seconds()
        self._wait = 1.0
        self._timer: IDelayedCall | None = None
        self._ask()

    def cancel(self) -> None:
        """Nobody wants the connection any more."""
        self._user = None
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def _ask(self) -> None:
        self._network.note("connecting", self._name, 0)
        self._clock.call_at(self._path.arrival(self.server[0], 0), self._asked)
        left = self._began + GIVE_UP - self._clock.seconds()
        if left > 0:
            self._timer = self._clock.callLater(min(self._wait, left), self._ask)
            self._wait *= 2
        else:
            self._fail(error.TCPTimedOutError(110, "Connection timed out"))

    def _asked(self) -> None:
        host, address = self.server
        if self._path.passes(host):
            there = self._network.listener(host, address.host, address.port) is not None and not self._path.refusing
            self._clock.call_at(self._path.arrival(self.client[0], 0), self._answered, there)

    def _answered(self, there: bool) -> None:
        user = self._user
        if user is None or not self._path.passes(self.client[0]):
            return
        if not there:
            self._network.note("refused", self._name, 0)
            self._fail(error.ConnectionRefusedError(111, "Connection refused"))
            return
        self.cancel()
        self._network.note("connected", self._name, 0)
        socket = Connection(self._network, self._path, self.client, self.server).client
        socket.out.open()
        self._clock.guard(user.owner, user.established, socket)

    def _fail(self, reason: error.ConnectError) -> None:
        user = self._user
        if user is not None:
            self.cancel()
            self._clock.guard(user.owner, user.failed, reason)
