"""The reference backend in a process that can die, and the reverse proxies that may stand in front of it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ClientFactory, Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from commsmgr.backend import BackendEvent, ReferenceBackend
from commsmgr.backend.ledger import Ledger
from commsmgr.backend.switchboard import DIALECT_PLAIN, DIALECT_V1, MachineNotConnected
from commsmgr.errors import NotRunning
from commsmgr.messages import JSONObject, LossReport, ResultBody
from tests.simulation.agent import EPOCH, reports, tag_of
from tests.simulation.process import Process
from tests.simulation.setting import BACKEND, PORT
from tests.simulation.witness import number_of

if TYPE_CHECKING:
    from tests.simulation.scenario import World


NO_LONGER_KEPT = "its output is no longer kept"
"""What an agent says of a command whose result it has forgotten."""


class Backend(Process):
    """
    The one backend of a world.

    :ivar service: while it runs.
    """

    service: ReferenceBackend

    def __init__(self, world: World) -> None:
        super().__init__(world, BACKEND)
        self._inventories: dict[str, list[int]] = {}
        self._tells = world.setting.dialect == "v1"

    def boot(self) -> None:
        """Start the reference backend."""
        world = self.world
        self.service = service = ReferenceBackend(
            self.reactor,
            wall=lambda: EPOCH + world.clock.seconds(),
            random=self.random("ids"),
            listen=f"0.0.0.0:{PORT}",
            token=world.backend_token,
            path=f"{self.directory}/ledger.db",
            dialects=(DIALECT_V1,) if world.setting.dialect == "v1" else (DIALECT_PLAIN,),
            quirks=world.setting.dialect == "quirks",
        )
        service.subscribe(self._happened)
        world.history.note(self.name, "starting")
        # Only its own death may keep it from starting.
        service.startService().addErrback(lambda failure: failure if self.alive else None)
        self._find(service.ledger)
        for agent in world.setting.agents:
            if service.ledger.command(reports(agent)) is None:
                service.ledger.add_command(reports(agent), agent, b"{}", "taken")

    def end(self) -> Deferred[None]:
        return self.service.stopService()

    def remains(self) -> object:
        return self.service

    # -- what it is told, and tells ---------------------------------------------------------------------------------

    def give(self, agent: str, type: str, tag: str, *, certain: bool = False, **options: Any) -> None:
        """
        Give an agent a command.

        :param certain: whether nothing can keep it from arriving, though the backend itself would forget it.
        """
        if not self.alive:
            return
        service = self.service
        name = service._new_id()
        try:
            service.send_command(agent, type, args=[tag], options=options, id=name)
        except (MachineNotConnected, NotRunning):
            return
        except sqlite3.Error:
            # Its disk has died under it, and so has the backend: whether it holds the command nobody knows.
            assert not self.alive
        held = (certain or self.world.setting.dialect == "v1") and self.alive
        self.world.history.note(self.name, "gave", tag, id=name, agent=agent, type=type, held=held)

    def give_again(self, agent: str, id: str) -> bool:
        """Send a command that was given before once more; return whether the agent can be reached."""
        if not self.connected(agent):
            return False
        command = self.service.ledger.command(id)
        sent = command is not None and self.service.push(command.envelope, agent) > 0
        if sent:
            self.world.history.note(self.name, "sent-again", id)
        return sent

    def has_nothing_for(self, agent: str) -> bool:
        """Whether the agent has taken every command that the backend keeps for it."""
        return self.alive and self.service.running and not self.service.ledger.pending(agent, 1)

    def has_latest_of(self, agent: str) -> bool:
        """Whether it has the agent's latest inventory, if it lets the agent know which one it has."""
        came = self._inventories.get(agent, [0])
        return not self._tells or came[-1] == max(came)

    def connected(self, agent: str) -> bool:
        """Whether the agent is registered here."""
        return self.alive and self.service.running and bool(self.service.connected(agent))

    def _find(self, ledger: Ledger) -> None:
        """Note what was committed in the very moment of the last death, so that nobody was told."""
        history = self.world.history
        noted = {record.subject for record in history.all("stored")}
        for row in ledger.results():
            if row.id not in noted:
                body = msgspec.json.decode(row.body, type=ResultBody)
                self._stored(row.id, body.command_id, body.output, body.status, body.error, row.transport, again=False)
        told = {record.facts["id"] for record in history.all("losses")}
        for agent in self.world.setting.agents:
            for receipt in reversed(ledger.loss_receipts(agent)):
                if receipt.id not in told:
                    report = msgspec.json.decode(receipt.body, type=LossReport)
                    self._lost(agent, report.id, [msgspec.to_builtins(row) for row in report.losses])
            held = ledger.inventory_of(agent)
            if held is not None and self._inventories.get(agent, [])[-1:] != [number_of(held)]:
                self._stocked(agent, held)

    def _stored(
        self, id: str, command: str, output: str, status: str, error: str, transport: str, *, again: bool
    ) -> None:
        self.world.history.note(
            self.name,
            "stored",
            id,
            command=command,
            tag=tag_of(output),
            status=status,
            digest=self.world.arrived[id],
            short=NO_LONGER_KEPT in error,
            by=transport,
            again=again,
        )

    def _lost(self, agent: str, id: str, losses: list[JSONObject]) -> None:
        for row in losses:
            facts = {name: row[name] for name in ("reason", "kind", "count")}
            self.world.history.note(self.name, "losses", agent, id=id, **facts)

    def _stocked(self, agent: str, inventory: bytes) -> None:
        number = number_of(inventory)
        self._inventories.setdefault(agent, []).append(number)
        self.world.history.note(self.name, "inventory", agent, number=number, told=self._tells)

    def _happened(self, event: BackendEvent) -> None:
        if not self.alive:
            return
        history, detail = self.world.history, event.detail
        if event.kind in ("result", "duplicate"):
            command, output, status, error = (detail[name] for name in ("command_id", "output", "status", "error"))
            again = event.kind == "duplicate"
            self._stored(event.id, command, output, status, error, event.transport, again=again)
        elif event.kind == "inventory":
            self._stocked(event.machine_id, self.service.ledger.inventory_of(event.machine_id) or b"")
        elif event.kind == "losses":
            self._lost(event.machine_id, event.id, detail["losses"])
        elif event.kind != "command":
            history.note(self.name, event.kind, event.id or event.machine_id)


class Front(Process):
    """
    A reverse proxy in front of the backend.

    :ivar mood: ``refuse`` answers upgrades with 403, ``cut`` ends WebSockets after :attr:`patience` seconds.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.mood: Literal["good", "refuse", "cut"] = "good"
        self.patience = 3.0
        self._port: Any = None
        self._relays: dict[_Relay, None] = {}

    def boot(self) -> None:
        """Listen."""
        factory = Factory()
        factory.noisy = False
        factory.buildProtocol = lambda address: _Relay(self, self._relays)  # type: ignore[method-assign]
        self._relays = {}
        self._port = self.reactor.listenTCP(PORT, factory)

    def end(self) -> Deferred[None]:
        stopped = maybeDeferred(self._port.stopListening)
        self.cut()
        return stopped

    def cut(self) -> None:
        """End every connection."""
        for relay in list(self._relays):
            relay.cut()

    def remains(self) -> object:
        return self._relays


class _Relay(Protocol):
    """One connection of a client, and the one to the backend that belongs to it."""

    transport: Any

    def __init__(self, front: Front, all: dict[_Relay, None]) -> None:
        self._front = front
        self._all = all
        self._to_backend: Any = None
        self._kept: list[bytes] | None = []
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        self._all[self] = None
        address = self._front.world.network.address(BACKEND)
        self._connector = self._front.reactor.connectTCP(address, PORT, _ToBackend(self), timeout=5)

    def dataReceived(self, data: bytes) -> None:
        front = self._front
        if front.mood != "good" and b"\r\nupgrade: websocket" in data.lower():
            if front.mood == "refuse":
                self.transport.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.transport.loseConnection()
                return
            self._timer = front.reactor.callLater(front.patience, self.cut)
        if self._kept is None:
            self._to_backend.transport.write(data)
        else:
            self._kept.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._all.pop(self, None)
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._to_backend is not None:
            self._to_backend.transport.loseConnection()
        else:
            self._connector.disconnect()

    def cut(self) -> None:
        """End both connections."""
        self.transport.abortConnection()

    def reached(self, backend: Protocol) -> None:
        """The backend is there."""
        self._to_backend = backend
        kept, self._kept = self._kept, None
        backend.transport.registerProducer(self.transport, True)  # type: ignore[union-attr]
        self.transport.registerProducer(backend.transport, True)
        backend.transport.writeSequence(kept or [])  # type: ignore[union-attr]

    def not_reached(self) -> None:
        """There is no backend."""
        self.transport.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.transport.loseConnection()

    def backend_lost(self) -> None:
        """The backend has ended the connection."""
        self.transport.unregisterProducer()
        self.transport.loseConnection()


class _ToBackend(ClientFactory):  # type: ignore[type-arg]  # generic in its stubs only
    noisy = False

    def __init__(self, relay: _Relay) -> None:
        self.relay = relay

    def buildProtocol(self, address: object) -> Protocol:
        return _FromBackend(self.relay)

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self.relay.not_reached()


class _FromBackend(Protocol):
    transport: Any

    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def connectionMade(self) -> None:
        self._relay.reached(self)

    def dataReceived(self, data: bytes) -> None:
        self._relay.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._relay.backend_lost()
