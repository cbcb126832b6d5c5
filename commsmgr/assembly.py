"""
Puts one run of a manager together: which part knows which, and the order in which they start and stop.

The way of a result: :class:`~commsmgr.reporting.Reporting` -> outbox -> :class:`~commsmgr.delivery.Delivery` -> link or
HTTP -> receipt -> outbox. The way of a command: link or heartbeat -> :class:`~commsmgr.intake.Intake` -> inbox ->
channel -> agent.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from commsmgr._version import __version__
from commsmgr.backends import Backends, Line
from commsmgr.channel import CommandChannel
from commsmgr.config import Backend
from commsmgr.delivery import Delivery
from commsmgr.environment import Environment, authorization, token_provider
from commsmgr.heartbeats import Heartbeats
from commsmgr.ids import IdSource
from commsmgr.intake import Intake
from commsmgr.inventories import Inventories
from commsmgr.link import Link
from commsmgr.loss_reports import LossReports
from commsmgr.machine import Identity, machine_id
from commsmgr.messages import HeartbeatAnswer, Push
from commsmgr.observe.metrics import Metrics
from commsmgr.observe.site import StatusSite
from commsmgr.openlink import LinkEvents, OpenLink
from commsmgr.overview import Overview
from commsmgr.policy.breaker import Breaker
from commsmgr.psutil_source import default_source
from commsmgr.reporting import Reporting
from commsmgr.requests import Requests
from commsmgr.runner import CommandRunner
from commsmgr.schedules import Periodic
from commsmgr.service import OrderedService, Step
from commsmgr.session.conversation import Conversation, SettingsArrived
from commsmgr.session.wire import decoder
from commsmgr.spool import PatientOpening, Spool
from commsmgr.transport.http import HTTPClient
from commsmgr.transport.peer import TLSFacts
from commsmgr.transport.websocket import native_acceleration_active
from commsmgr.urls import Target, backend_name, http_target, websocket_target

T = TypeVar("T")

HOUSEKEEPING = 30.0
"""Seconds between two looks for what has expired."""


class Run:
    """
    One run of a manager, from a start to the stop.

    :param on_connected: called each time a backend has proven that it can be talked to.
    """

    log = Logger()

    def __init__(self, environment: Environment, *, on_connected: Callable[[], None]) -> None:
        self._environment = env = environment
        self._config = config = env.config
        self._on_connected = on_connected
        reactor = env.reactor
        self.new_id = IdSource(env.wall, env.random)
        self._identity = Identity(machine_id(config.machine_id), socket.gethostname(), env.version)
        provider = token_provider(env)
        self.metrics = Metrics(env.registry, seconds=env.wall)
        self._authorization = authorization(env, provider, self.metrics, self._in_thread)
        self.spool = Spool(config.spool, reactor=reactor, wall=env.wall, executor=env.executor)
        self.opening = PatientOpening(self.spool, reactor)
        self.channel = CommandChannel(self.spool.inbox.offered)
        self.reporting = Reporting(
            self.spool,
            new_id=self.new_id,
            timestamp=env.timestamp,
            settings=config.delivery,
            redact=env.redactor.document,
            in_thread=self._in_thread,
            accepted=lambda count, size: self.overview.accepted(count, size),
            clock=reactor,
            metrics=self.metrics,
        )
        self.intake = Intake(
            spool=self.spool,
            channel=self.channel,
            whole=config,
            metrics=self.metrics,
            report=lambda result: self.reporting.aside(self.reporting.insist(result), result),
            say=lambda result: self.reporting.aside(self.reporting.say(result), result),
            clock=reactor,
        )
        self.losses = LossReports(self.spool.losses, config, new_id=self.new_id, clock=reactor, metrics=self.metrics)
        self.spool.inbox.on_completed = self.reporting.accepted
        self.spool.on_resurfaced = self.intake.recover
        self._decoder = decoder(config)
        self._targets: dict[Target, str] = {}
        self._user_agent = f"commsmgr/{__version__}"
        self._dialer = env.dialer(self._user_agent, self._tls_established)
        events = LinkEvents(
            registered=self._link_registered,
            ended=self._link_ended,
            receipts=self._link_receipts,
            refused=lambda link, seq, refusal: self.delivery.refused(link, seq, refusal),
            command=self.intake.arrived,
            pushed=self._pushed,
            settings=self._settings_arrived,
            losses_acked=self.losses.acked,
            losses_refused=self.losses.refused,
        )
        self.backends = Backends(
            [self._line(backend, events) for backend in config.backends],
            whole=config,
            clock=reactor,
            metrics=self.metrics,
        )
        self.metrics.configured(line.name for line in self.backends.lines)
        self.overview = Overview(env, self.backends, self.spool, self._authorization, self._identity.machine_id)
        self.requests = Requests(
            self.backends, config, self._authorization, clock=reactor, wall=env.wall, random=env.random
        )
        self._build_schedules()
        self.delivery = Delivery(
            outbox=self.spool.outbox,
            requests=self.requests,
            whole=config,
            clock=reactor,
            random=env.random,
            timestamp=env.timestamp,
            redact=env.redactor,
            metrics=self.metrics,
            on_receipt=self._http_receipt,
        )
        self.runner = (
            None
            if env.handler is None
            else CommandRunner(
                self.channel,
                env.handler,
                concurrency=config.commands.concurrency,
                report=self.reporting.insist,
                clock=reactor,
                metrics=self.metrics,
            )
        )
        listen = config.observe.listen
        self.site = (
            StatusSite(listen, reactor=reactor, registry=env.registry, status=lambda: self.overview.status(None))
            if listen and env.registry is not None
            else None
        )
        self.metrics.watch(self.overview.queue)
        self.service = OrderedService(self._steps(), stop_deadline=config.stop_deadline, clock=reactor)

    def _line(self, backend: Backend, events: LinkEvents) -> Line:
        env, config = self._environment, self._config
        name, target = backend_name(backend), http_target(backend)
        self._targets |= {target: name, websocket_target(backend): name}
        breaker = Breaker(config.breaker, env.reactor.seconds, env.random)
        link = Link(
            backend,
            config,
            reactor=env.reactor,
            wall=env.wall,
            random=env.random,
            dialer=self._dialer,
            authorization=self._authorization,
            metrics=self.metrics,
            conversation=self._conversation,
            events=events,
            redact=env.redactor,
            user_agent=self._user_agent,
        )
        http = HTTPClient(
            env.reactor,
            self._dialer,
            config.http,
            on_exchange=lambda exchange: self._exchanged(name, exchange),
            user_agent=self._user_agent,
        )
        return Line(name=name, http_target=target, breaker=breaker, http=http, link=link)

    def _build_schedules(self) -> None:
        env, config = self._environment, self._config
        machine = default_source() if env.machine is None else env.machine
        self.inventories = Inventories(
            identity=self._identity,
            machine=machine,
            outbox=self.spool.outbox,
            whole=config,
            redactor=env.redactor,
            in_thread=self._in_thread,
            wall=env.wall,
            timestamp=env.timestamp,
            new_id=self.new_id,
            metrics=self.metrics,
        )
        self.heartbeats = Heartbeats(
            identity=self._identity,
            machine=machine,
            whole=config,
            redact=env.redactor,
            requests=self.requests,
            in_thread=self._in_thread,
            seconds=env.reactor.seconds,
            wall=env.wall,
            timestamp=env.timestamp,
            new_id=self.new_id,
            queue=self.overview.queue,
            activity=lambda: (len(self.channel), 0 if self.runner is None else self.runner.running),
            inventories=self.inventories,
            on_command=self.intake.arrived,
            losses=self.losses,
            metrics=self.metrics,
        )

        def periodic(name: str, action: Callable[[], Any], interval: float, jitter: float) -> Periodic:
            return Periodic(name, action, interval=interval, jitter=jitter, clock=env.reactor, random=env.random)

        beat, stock = config.heartbeat, config.inventory
        self._heartbeat = periodic("heartbeat", self.beat, beat.interval, beat.jitter)
        self._inventory = periodic("inventory", self.inventories.send, stock.interval, stock.jitter)
        self._housekeeping = periodic("housekeeping", self._keep_house, HOUSEKEEPING, HOUSEKEEPING)

    def _steps(self) -> list[Step]:
        """What starts after what, and so what stops before what."""

        async def nothing(_: float) -> None:
            pass

        async def stop_runner(share: float) -> None:
            self.channel.close()
            if self.runner is not None:
                await self.runner.stop(share)

        async def stop_delivery(share: float) -> None:
            await self.delivery.flush(share)
            await self.delivery.stop()

        async def stop_backends(share: float) -> None:
            # The agent's own requests first: one that waits out a Retry-After would outlive the manager.
            self.requests.stop()
            await self.backends.stop(share)

        def start_site() -> None:
            if self.site is not None:
                self.site.startService()

        async def stop_observe(_: float) -> None:
            self.metrics.remove()
            if self.site is not None:
                await self.site.stopService()

        return [
            Step("observe", start_site, stop_observe, share=1.0),
            Step("transport", self._check_transport, nothing),
            Step("spool", self._open_spool, self._close_spool, share=1.0),
            Step("tokens", self._authorization.start, self._authorization.stop),
            Step("backends", self.backends.start, stop_backends, share=0.7),
            Step("delivery", self.delivery.start, stop_delivery, share=0.4),
            Step("commands", self.runner.start if self.runner else lambda: None, stop_runner, share=0.4),
            *(
                Step(schedule.name, schedule.start, schedule.stop)
                for schedule in (self._housekeeping, self._inventory, self._heartbeat)
            ),
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # What the manager asks of a run

    async def when_open(self, call: Callable[[Run], Any]) -> Any:
        """Do ``call`` as soon as the spool is open: a manager that has just been started already takes messages."""
        if not self.overview.running:
            await self.opening.wait()
        return await call(self)

    def stop(self) -> Deferred[None]:
        """Stop all parts in order; a start that waits for the spool's disk gives up."""
        stopped = self.service.stopService()
        self.opening.stop()
        return stopped

    async def beat(self, status: str = "online", *, deadline: float | None = None) -> HeartbeatAnswer:
        """Send a heartbeat; without WebSockets its answer is what shows that there is a backend."""
        answer = await self.heartbeats.send(status, deadline=deadline)
        if not self._config.websocket.enabled:
            self._on_connected()
        return answer

    # -----------------------------------------------------------------------------------------------------------------
    # Where lines meet

    def _check_transport(self) -> None:
        if not native_acceleration_active():
            self.log.warn(
                "autobahn runs without its native code (NVX): masking large messages, and checking those that come in "
                "pieces, costs many times more; install a wheel that has it",
                event="websocket.slow",
            )
        self._dialer.prepare(self._targets)

    async def _open_spool(self) -> None:
        opened = await self.opening.open()
        if opened is None or not self.service.running:
            # Stopped meanwhile, on a disk that hung perhaps so long ago that nobody waits for the spool any more.
            await self.spool.close()
            return
        self.overview.opened = opened
        self.overview.running = True
        self.intake.recover(opened)
        self.opening.let_in()

    async def _close_spool(self, _: float) -> None:
        self.overview.running = False
        self.reporting.stop()
        await self.spool.close()

    def _link_registered(self, link: OpenLink) -> None:
        self.backends.receipt(link.backend, self._environment.wall())
        self.delivery.link_registered(link)
        self.losses.link_registered(link)
        self._on_connected()

    def _link_ended(self, link: OpenLink) -> None:
        self.delivery.link_ended(link)
        self.losses.link_ended(link)
        self._heartbeat.set_interval(None)
        self._inventory.set_interval(None)

    def _link_receipts(self, link: OpenLink, seqs: Any) -> None:
        self.backends.receipt(link.backend, self._environment.wall())
        self.delivery.receipts(link, seqs)

    def _settings_arrived(self, settings: SettingsArrived) -> None:
        self._heartbeat.set_interval(settings.heartbeat_interval)
        self._inventory.set_interval(settings.inventory_interval)

    def _pushed(self, push: Push) -> None:
        handler = self._environment.on_push
        if handler is None:
            return
        try:
            handler(push)
        except Exception:
            self.log.failure("the handler of pushes failed on a {type}", event="push.failed", type=push.type)

    def _http_receipt(self, entry: Any, response: Any) -> None:
        if entry.kind == "inventory":
            self.inventories.delivered(entry, response)

    async def _keep_house(self) -> None:
        self._authorization.look()
        # Both at once, so that one that fails does not keep the other from being done.
        chores: list[Deferred[Any]] = [self.spool.outbox.expire(), self.spool.inbox.forget_finished()]
        for done, result in await DeferredList(chores, consumeErrors=True):
            if not done:
                result.raiseException()

    def _conversation(self, v1: bool) -> Conversation:
        return Conversation(
            machine_id=self._identity.machine_id,
            hostname=self._identity.hostname,
            agent_version=self._identity.agent_version,
            v1=v1,
            decoder=self._decoder,
            new_id=self.new_id,
            timestamp=self._environment.timestamp,
        )

    def _in_thread(self, function: Callable[[], T]) -> Deferred[T]:
        reactor = self._environment.reactor
        return deferToThreadPool(reactor, reactor.getThreadPool(), function)

    def _tls_established(self, target: Target, facts: TLSFacts) -> None:
        self.metrics.certificate_expires(self._targets[target], facts.not_after)

    def _exchanged(self, name: str, exchange: Any) -> None:
        if self._config.observe.log_level == "debug":
            self.log.debug(
                "{method} {route} at {backend}: {outcome} after {milliseconds:.1f} ms, {bytes_out} bytes out, "
                "{bytes_in} in",
                event="http.exchange",
                backend=name,
                method=exchange.method,
                route=exchange.route,
                outcome=exchange.outcome,
                milliseconds=exchange.seconds * 1000,
                bytes_out=exchange.bytes_out,
                bytes_in=exchange.bytes_in,
            )
        self.metrics.exchange(exchange.route, exchange.outcome, exchange.seconds)
        self.metrics.traffic("out", "http", exchange.bytes_out)
        self.metrics.traffic("in", "http", exchange.bytes_in)
