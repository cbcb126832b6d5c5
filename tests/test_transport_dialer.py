"""The way to a backend: names, addresses, deadline, cancellation, and the errors that come of them."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from commsmgr.config import TLS
from commsmgr.errors import ConnectFailed, DeadlineExceeded, TLSFailed
from commsmgr.transport.deadline import within
from commsmgr.transport.dialer import Dialer
from commsmgr.urls import Target
from tests.loopback import FixedResolver, ReactorWith, Recording, listen


class Client(Protocol):
    def __init__(self) -> None:
        self.lost: Deferred[None] = Deferred()

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(None)


def client_factory() -> Any:
    factory = Factory.forProtocol(Client)
    factory.noisy = False
    return factory


class WithinTests(SynchronousTestCase):
    """One deadline over a piece of work."""

    def test_success_leaves_no_timer(self) -> None:
        """Work that is done in time gives its result and leaves the clock empty."""
        clock = Clock()
        step: Deferred[str] = Deferred()

        async def work() -> str:
            return await step

        result = within(clock, 5, work(), ValueError)
        clock.advance(4)
        step.callback("done")
        self.assertEqual(self.successResultOf(result), "done")
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_failure_is_the_works_own(self) -> None:
        """Without an interruption the work's own error comes through."""
        clock = Clock()

        async def work() -> None:
            raise KeyError("own")

        self.failureResultOf(within(clock, 5, work(), ValueError), KeyError)
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_deadline_wins_over_the_works_words(self) -> None:
        """After the deadline the error is the deadline's, whatever the interrupted work says."""
        clock = Clock()

        async def work() -> None:
            try:
                await Deferred()
            except CancelledError:
                raise KeyError("a lookup failed") from None

        result = within(clock, 5, work(), lambda: DeadlineExceeded("too late"))
        clock.advance(4.9)
        self.assertNoResult(result)
        clock.advance(0.2)
        self.failureResultOf(result, DeadlineExceeded)

    def test_cancelling_gives_cancelled(self) -> None:
        """Cancelling is answered with CancelledError, and the timer is gone."""
        clock = Clock()

        async def work() -> None:
            try:
                await Deferred()
            except CancelledError:
                raise KeyError("a lookup failed") from None

        result = within(clock, 5, work(), ValueError)
        result.cancel()
        self.failureResultOf(result, CancelledError)
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_work_that_succeeds_while_being_cancelled(self) -> None:
        """What was won in spite of the interruption is not thrown away."""
        clock = Clock()

        async def work() -> str:
            with contextlib.suppress(CancelledError):
                await Deferred()
            return "all the same"

        result = within(clock, 5, work(), ValueError)
        result.cancel()
        self.assertEqual(self.successResultOf(result), "all the same")


class PlainTests(TestCase):
    """Without TLS."""

    timeout = 10

    async def _connected(self, dialer: Dialer, target: Target, server: Recording) -> None:
        protocol: Any = await dialer.endpoint(target, timeout=5).connect(client_factory())
        protocol.transport.write(b"hello")
        protocol.transport.loseConnection()
        await protocol.lost
        await server.connections[0].lost
        self.assertEqual(server.received, b"hello")

    async def test_connects_to_a_name(self) -> None:
        """A name is resolved by the reactor's resolver and connected to."""
        server, resolver = Recording(), FixedResolver(["127.0.0.1"])
        target = Target("http", "backend.example", listen(self, server), "/")
        await self._connected(Dialer(ReactorWith(resolver=resolver), TLS()), target, server)
        self.assertEqual(resolver.asked, ["backend.example"])

    async def test_connects_to_an_ipv6_literal(self) -> None:
        """An IPv6 address needs no brackets in a target."""
        server = Recording()
        target = Target("http", "::1", listen(self, server, interface="::1"), "/")
        await self._connected(Dialer(reactor, TLS()), target, server)

    async def test_second_address_is_tried(self) -> None:
        """An address that refuses does not keep us from the next one (RFC 8305)."""
        server = Recording()
        port = listen(self, server)
        dialer = Dialer(ReactorWith(resolver=FixedResolver(["127.0.0.2", "127.0.0.1"])), TLS())
        await self._connected(dialer, Target("http", "backend.example", port, "/"), server)

    async def test_refused(self) -> None:
        """A closed port is ConnectFailed, and the message names it."""
        port = reactor.listenTCP(0, client_factory(), interface="127.0.0.1")
        number = port.getHost().port
        await port.stopListening()
        connecting = Dialer(reactor, TLS()).endpoint(Target("http", "127.0.0.1", number, "/"), timeout=5)
        error = await self.assertFailure(connecting.connect(client_factory()), ConnectFailed)
        self.assertIn(f"127.0.0.1:{number}", str(error))
        self.assertIn("refused", str(error))
        self.assertFalse(error.may_have_arrived)

    async def test_unknown_name(self) -> None:
        """A name without addresses is ConnectFailed, and the message names it."""
        dialer = Dialer(ReactorWith(resolver=FixedResolver([])), TLS())
        connecting = dialer.endpoint(Target("https", "nowhere.example", 443, "/"), timeout=5)
        error = await self.assertFailure(connecting.connect(client_factory()), ConnectFailed)
        self.assertIn("nowhere.example has no address", str(error))

    def test_name_that_is_none(self) -> None:
        """A name that cannot be one fails like any other, not with an exception."""
        dialer = Dialer(ReactorWith(resolver=FixedResolver([])), TLS())
        connecting = dialer.endpoint(Target("http", "a" * 70 + ".example\udc80", 80, "/"), timeout=5)
        self.failureResultOf(connecting.connect(client_factory()), ConnectFailed)

    def test_factory_that_fails(self) -> None:
        """What goes wrong above the socket comes as ConnectFailed with the words of the cause."""
        with mock.patch("commsmgr.transport.layers.HostnameEndpoint", side_effect=RuntimeError()):
            connecting = Dialer(reactor, TLS()).endpoint(Target("http", "backend.example", 80, "/"), timeout=5)
            error = self.failureResultOf(connecting.connect(client_factory()), ConnectFailed).value
        self.assertIn("RuntimeError", str(error))

    def test_tls_files_that_cannot_be_used(self) -> None:
        """With unusable TLS files nothing is dialled, and the error names the file."""
        dialer = Dialer(ReactorWith(resolver=FixedResolver(["127.0.0.1"])), TLS(ca_file="/nonexistent/ca.pem"))
        connecting = dialer.endpoint(Target("https", "backend.example", 443, "/"), timeout=5)
        error = self.failureResultOf(connecting.connect(client_factory()), TLSFailed).value
        self.assertIn("/nonexistent/ca.pem", str(error))


class InterruptionTests(SynchronousTestCase):
    """Deadline and cancellation, on a clock of our own."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.target = Target("https", "slow.example", 443, "/")

    def _connecting(self) -> Deferred[Any]:
        dialer = Dialer(ReactorWith(clock=self.clock, resolver=FixedResolver(None)), TLS())
        return dialer.endpoint(self.target, timeout=20).connect(client_factory())

    def test_resolver_that_never_answers(self) -> None:
        """A hung name lookup costs the deadline and no more."""
        connecting = self._connecting()
        self.clock.advance(19.9)
        self.assertNoResult(connecting)
        self.clock.advance(0.2)
        error = self.failureResultOf(connecting, DeadlineExceeded).value
        self.assertIn("slow.example not reached within 20 s: still resolving", str(error))
        self.assertFalse(error.may_have_arrived)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_cancelled_while_resolving(self) -> None:
        """Cancelling is answered with CancelledError, not with a failed lookup."""
        connecting = self._connecting()
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        self.assertEqual(self.clock.getDelayedCalls(), [])
