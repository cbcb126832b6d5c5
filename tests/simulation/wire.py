"""
TCP connections as the hosts' kernels keep them.

Theory of operation
-------------------
A connection is two sockets and two pipes, one in each direction. A pipe takes at most a window of bytes that are not
acknowledged, cuts them into segments at random, and lets each arrive after the path's delay, never before the one that
was sent earlier. Whether the path lets a segment pass is decided at the moment of its arrival, so a fault swallows what
is in the air, too. What is swallowed waits in the pipe, with everything behind it, and is sent again with growing
pauses; after two minutes without progress the sender's kernel gives up, as it does when only acknowledgements vanish.

A byte counts as acknowledged when the receiver has *read* it and the news of that came back: a receiver that pauses
fills the window, and its sender's buffer. Everything here belongs to the kernels and to the air between them. So what
was sent arrives although its sender was killed meanwhile, and what arrives at a socket nobody has any more is answered
with a reset.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Literal, Protocol

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IDelayedCall

from tests.simulation.clock import Owner

if TYPE_CHECKING:
    from tests.simulation.network import Network, Path

WINDOW = 65536
"""Bytes of a direction that are not acknowledged, at most."""

FIRST_RETRY = 0.2
LAST_RETRY = 30.0
GIVE_UP = 120.0
"""Seconds without an acknowledgement after which a kernel gives a connection up (ETIMEDOUT)."""

Kind = Literal["open", "data", "end", "reset"]


class SocketUser(Protocol):
    """The process's side of a socket."""

    @property
    def owner(self) -> Owner: ...

    def readable(self) -> None:
        """Bytes came, or the peer's end of them."""

    def writable(self) -> None:
        """There is room again for what was not accepted."""

    def broken(self) -> None:
        """The connection was reset or given up; the socket is not this user's any more."""


class Connection:
    """
    Two sockets, and the pipes between them.

    :param client: host and address of who opened it; ``server``: of the other one.
    """

    def __init__(
        self, network: Network, path: Path, client: tuple[str, IPv4Address], server: tuple[str, IPv4Address]
    ) -> None:
        self.network = network
        self.path = path
        self.gone = False
        self.client = Socket(self, *client)
        self.server = Socket(self, *server)
        self.client.out = Pipe(self, self.client, self.server)
        self.server.out = Pipe(self, self.server, self.client)
        self.used()

    def used(self) -> None:
        """A process uses one of the sockets."""
        self.path.connections[self] = None

    def unused(self) -> None:
        """A process has let go of its socket."""
        if self.client.user is None and self.server.user is None:
            self.path.connections.pop(self, None)

    def cut(self) -> None:
        """Reset both ends at this moment; what is on its way vanishes."""
        self.gone = True
        for socket in (self.client, self.server):
            socket.out.discard()
            socket.lost()


class Socket:
    """
    One end of a connection, in its host's kernel.

    :ivar user: who has it; None before a process accepted it and after it was closed.
    :ivar ended: whether the peer's end came.
    """

    out: Pipe

    def __init__(self, connection: Connection, host: str, address: IPv4Address) -> None:
        self.connection = connection
        self.host = host
        self.address = address
        self.user: SocketUser | None = None
        self.ended = False
        self._unread: list[bytes] = []

    # -- for its user -----------------------------------------------------------------------------------------------

    @property
    def peer(self) -> Socket:
        """The other end."""
        return self.out.target

    @property
    def pending(self) -> bool:
        """Whether there is something to read, be it the end."""
        return bool(self._unread) or self.ended

    def use(self, user: SocketUser) -> None:
        """Give the socket to a process."""
        self.user = user
        self.connection.used()

    def read(self) -> bytes:
        """Return what came; nothing may be there yet, or the end was reached."""
        data = b"".join(self._unread)
        self._unread.clear()
        if data:
            self.peer.out.consumed(len(data))
        return data

    def close(self) -> None:
        """Let go, as close(2): what was accepted is sent on; what came and was not read turns the end into a reset."""
        if self._release() is not None:
            if self._unread:
                self.out.reset()
            else:
                self.out.end()

    def abort(self) -> None:
        """Let go with a reset, as a kernel does for a process that was killed."""
        if self._release() is not None:
            self.out.reset()

    def vanish(self) -> None:
        """Let go without a word, for lack of power."""
        self._release()
        self.out.discard()

    def lost(self) -> None:
        """Take the socket from its user."""
        user = self._release()
        if user is not None:
            self.connection.network.clock.guard(user.owner, user.broken)

    def _release(self) -> SocketUser | None:
        user, self.user = self.user, None
        self.connection.unused()
        return user

    # -- for the network --------------------------------------------------------------------------------------------

    def arrived(self, kind: Kind, data: bytes) -> None:
        """Take a segment."""
        user = self.user
        if kind == "open":
            self.connection.network.accept(self)
        elif kind == "reset":
            self.out.discard()
            self.lost()
        elif user is None:
            # Closed, or from before the host started anew. An end that meets our own end is a farewell, no question.
            if kind == "data" or not self.out.ended:
                self.out.reset()
        else:
            if kind == "data":
                self._unread.append(data)
            else:
                self.ended = True
            self.connection.network.clock.guard(user.owner, user.readable)


class Pipe:
    """One direction of a connection."""

    def __init__(self, connection: Connection, source: Socket, target: Socket) -> None:
        self.source = source
        self.target = target
        self.ended = False
        self._connection = connection
        self._path = connection.path
        self._clock = connection.network.clock
        self._name = f"{source.host}:{source.address.port}>{target.host}:{target.address.port}"
        self._last_arrival = 0.0
        self._outstanding = 0
        self._wanted = False
        self._over = False
        # The numbers of the segment that is launched next, and of the one that the target waits for.
        self._launched = 0
        self._awaited = 0
        # What did not arrive, in order, and how many bytes did whose acknowledgement did not.
        self._lost: list[tuple[int, Kind, bytes]] = []
        self._unheard = 0
        self._timer: IDelayedCall | None = None
        self._since = 0.0
        self._wait = FIRST_RETRY

    # -- for the sending socket -------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many bytes would be accepted."""
        return WINDOW - self._outstanding

    def open(self) -> None:
        """The last step of the handshake: what makes the server accept."""
        self._launch_new("open", b"")

    def accept(self, data: bytes | memoryview) -> int:
        """Send as much as the window allows; return how many bytes. The user hears when there is room for the rest."""
        size = min(len(data), self.room)
        self._wanted = size < len(data)
        if size == 0 or self.ended or self._over:
            return size
        self._outstanding += size
        for piece in self._connection.network.pieces(bytes(data[:size])):
            self._launch_new("data", piece)
        self._note("sent", size)
        return size

    def end(self) -> None:
        """Nothing more will be sent."""
        if not self.ended and not self._over:
            self.ended = True
            self._launch_new("end", b"")
            self._note("ended")

    def reset(self) -> None:
        """Send a reset behind what is in the air; what would have to be sent again is forgotten."""
        self.discard()
        self._launch(-1, "reset", b"")
        self._note("reset")

    def discard(self) -> None:
        """Send nothing again."""
        self._over = True
        self._lost.clear()
        self._unheard = 0
        self._calm()

    # -- in the air -------------------------------------------------------------------------------------------------

    def _launch_new(self, kind: Kind, data: bytes) -> None:
        self._launch(self._launched, kind, data)
        self._launched += 1

    def _launch(self, number: int, kind: Kind, data: bytes) -> None:
        self._last_arrival = max(self._last_arrival, self._path.arrival(self.target.host, len(data)))
        self._clock.call_at(self._last_arrival, self._arrive, number, kind, data)

    def _arrive(self, number: int, kind: Kind, data: bytes) -> None:
        if self._connection.gone:
            return
        passes = self._path.passes(self.target.host)
        if kind == "reset":
            if passes:
                self.target.arrived(kind, data)
        elif passes and number == self._awaited:
            self._awaited += 1
            self._note("arrived" if kind == "data" else f"{kind} arrived", len(data))
            self.target.arrived(kind, data)
        else:
            self._note("lost", len(data))
            if not self._over:
                insort(self._lost, (number, kind, data))
                self._worry()

    def consumed(self, size: int) -> None:
        """The receiver has read ``size`` bytes: acknowledge them."""
        if not self._over:
            self._clock.call_at(self._clock.seconds() + self._path.latency, self._acknowledge, size)

    def _acknowledge(self, size: int) -> None:
        if self._over:
            return
        if not self._path.passes(self.source.host):
            self._unheard += size
            self._worry()
            return
        # It stands for everything before, too.
        self._outstanding -= size + self._unheard
        self._unheard = 0
        if not self._lost:
            self._calm()
        user = self.source.user
        if self._wanted and user is not None:
            self._wanted = False
            self._clock.guard(user.owner, user.writable)

    # -- again ------------------------------------------------------------------------------------------------------

    def _worry(self) -> None:
        if self._timer is None:
            self._since = self._clock.seconds()
            self._wait = FIRST_RETRY
            self._timer = self._clock.callLater(self._wait, self._again)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        left = self._since + GIVE_UP - self._clock.seconds()
        if left <= 0:
            self._note("timed out")
            self.discard()
            self.source.lost()
            return
        if self._path.passes(self.target.host):
            lost, self._lost = self._lost, []
            for segment in lost:
                self._launch(*segment)
            if self._unheard and self._path.passes(self.source.host):
                size, self._unheard = self._unheard, 0
                self._clock.call_at(self._clock.seconds() + 2 * self._path.latency, self._acknowledge, size)
        if self._lost or self._unheard:
            self._wait = min(2 * self._wait, LAST_RETRY)
            self._timer = self._clock.callLater(min(self._wait, left), self._again)

    def _note(self, kind: str, size: int = 0) -> None:
        self._connection.network.note(kind, self._name, size)
