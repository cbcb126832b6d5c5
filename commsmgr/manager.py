"""
The manager: what an agent's author holds in the hand.

A :class:`Manager` is a service. Give it a parent, or call :meth:`Manager.connect` and :meth:`Manager.disconnect`
yourself. Every start builds everything anew (:class:`~commsmgr.assembly.Run`), so that a manager can be stopped and
started again, and two of them never share anything.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from random import Random, SystemRandom
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from commsmgr import settings
from commsmgr.assembly import Run
from commsmgr.channel import CommandChannel
from commsmgr.clock import steady
from commsmgr.config import Config
from commsmgr.environment import Environment
from commsmgr.errors import CommsError, InvalidMessage, NotRunning, UsageError
from commsmgr.instants import Timestamps
from commsmgr.interfaces import CommandHandler, MachineSource, PushHandler, TokenProvider
from commsmgr.machine import machine_id
from commsmgr.messages import HeartbeatAnswer, JSONObject, Result
from commsmgr.outgoing import encode_data
from commsmgr.overview import idle
from commsmgr.redact import Redactor
from commsmgr.spool import Executor
from commsmgr.status import Status
from commsmgr.transport.http import HTTPResponse
from commsmgr.waiters import Waiters

_PATH = re.compile("/[!-~]*")
_RANDOM = SystemRandom()


class Manager(MultiService):
    """
    Talks to the backend, so that the agent need not.

    :param config: the settings; checked here, so that a mistake shows where it was made.
    :param reactor: the reactor of the embedding program; all but its time is used (:mod:`commsmgr.clock`).
    :param registry: where the metrics go, besides the page of ``observe.listen``. Two managers need two.
    :param handler: runs commands; without one, read them from :meth:`commands`.
    :param on_push: takes messages of types that commsmgr does not know.
    :param token: gives the bearer token, instead of ``[auth]``.
    :param machine: says what the machine is and how it is; psutil if it is installed, else the standard library.
    :param redactor: what the log's observers use, so that they learn of tokens; its own by default.
    :param wall: seconds since the epoch.
    :param random: for jitter and ids.
    :param executor: does what may block for the spool; a thread of its own by default.
    :param environ: where ``auth.token_env`` and, unless ``[proxy]`` says otherwise, proxies are looked up.
    :raise ConfigError: a setting is wrong; it names the key.
    """

    log = Logger()

    def __init__(
        self,
        config: Config,
        *,
        reactor: Any,
        registry: CollectorRegistry | None = None,
        handler: CommandHandler | None = None,
        on_push: PushHandler | None = None,
        token: TokenProvider | None = None,
        machine: MachineSource | None = None,
        redactor: Redactor | None = None,
        wall: Callable[[], float] = time.time,
        random: Random | None = None,
        executor: Executor | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__()
        self.setName("commsmgr")
        self._environment = Environment(
            config=settings.check(config, environ=environ, token_provider=token is not None),
            reactor=steady(reactor),
            registry=CollectorRegistry() if registry is None and config.observe.listen else registry,
            handler=handler,
            on_push=on_push,
            token=token,
            machine=machine,
            redactor=Redactor(config.redaction.patterns, config.redaction.keys) if redactor is None else redactor,
            wall=wall,
            timestamp=Timestamps(wall),
            random=_RANDOM if random is None else random,
            executor=executor,
            environ=environ,
        )
        self._run: Run | None = None
        self._is_stopping = False
        self._stopped: Waiters[None] = Waiters()
        self._connected: Waiters[Status] = Waiters()
        self._starting: Waiters[None] = Waiters()
        self._is_started = False
        self._failed: CommsError | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Life

    def startService(self) -> None:
        """Open the spool and begin to connect. What keeps it from starting goes to :meth:`connect` and the log."""
        if self.running:
            # By connect() and then by a parent, say.
            return
        Service.startService(self)
        if not self._is_stopping:
            self._begin()

    def _begin(self) -> None:
        self._failed = None
        try:
            run = self._run = Run(self._environment, on_connected=self._is_connected)
        except Exception:
            self._start_failed(Failure(), None)
            return
        # Also starts it, as this service runs.
        run.service.setServiceParent(self)
        run.service.started.addCallbacks(self._start_succeeded, self._start_failed, errbackArgs=(run,))

    def _start_succeeded(self, _: None) -> None:
        self._is_started = True
        self._starting.fire(None)

    def _start_failed(self, failure: Failure, run: Run | None) -> None:
        if self._is_stopping or run is not self._run:
            # Stopped while it was starting: everybody who waited has been told, and who waits now waits for the next.
            return
        error = failure.value
        if not isinstance(error, CommsError):
            self.log.failure("the manager could not start", failure, event="manager.start-failed")
            error = CommsError(f"the manager could not start: {type(error).__name__}: {error}")
        else:
            self.log.critical("the manager could not start: {error}", event="manager.start-failed", error=str(error))
        self._failed = error
        if run is not None:
            run.opening.refuse(error)
        self._starting.fail(error)
        self._connected.fail(error)

    def stopService(self) -> Deferred[None]:
        """
        Stop in order within ``stop_deadline``.

        :return: fires when everything has ended; what was accepted and not delivered is in the spool.
        """
        Service.stopService(self)
        self._is_started = False
        stopped = NotRunning("the manager was stopped")
        self._starting.fail(stopped)
        self._connected.fail(stopped)
        if self._run is None:
            return succeed(None)
        waiting = self._stopped.wait()
        if not self._is_stopping:
            self._is_stopping = True
            Deferred.fromCoroutine(self._end(self._run))
        return waiting

    async def _end(self, run: Run) -> None:
        await run.stop()
        run.opening.refuse(NotRunning("the manager was stopped"))
        run.service.disownServiceParent()
        self._run = None
        self._is_stopping = False
        if self.running:
            # Started again while it was stopping.
            self._begin()
        self._stopped.fire(None)

    def connect(self) -> Deferred[Status]:
        """
        Start, if that has not been done or has failed, and wait for a backend.

        :return: fires when the agent is registered with a backend (with ``websocket.enabled = false``: when a backend
            has answered a heartbeat). There is no deadline: attempts go on until :meth:`disconnect`. Cancelling stops
            the waiting, not the attempts.
        :raise SpoolError: the spool cannot be opened, and waiting cannot help; a full disk is waited for.
        :raise ConfigError: a file or address that the configuration names cannot be used.
        """
        if self.running and self._failed is not None:
            # What kept it from starting (another process on the spool, say) may be gone by now.
            self.stopService()
            self._failed = None
        if not self.running:
            self.startService()
        return self.when_connected()

    def disconnect(self) -> Deferred[None]:
        """Drain, say goodbye and stop, within ``stop_deadline``. :meth:`connect` works again afterwards."""
        return self.stopService()

    def when_connected(self) -> Deferred[Status]:
        """
        Fire with the status as soon as a backend is connected, at once if one is.

        A manager that has yet to be started is waited for; one that is stopped meanwhile fails with
        :class:`~commsmgr.errors.NotRunning`, one that cannot start with what kept it. Cancelling is harmless.
        """
        if self._failed is not None:
            return fail(self._failed)
        run = self._run
        # What still stops is no answer for whoever has started anew.
        if run is None or self._is_stopping or not run.overview.connected:
            return self._connected.wait()
        return succeed(self.status())

    def started(self) -> Deferred[None]:
        """Fire when the present start is complete, the spool open and every part begun; fails with what kept it."""
        if self._failed is not None:
            return fail(self._failed)
        if self._is_started:
            return succeed(None)
        return self._starting.wait()

    def alive(self) -> Deferred[None]:
        """
        Fire when the spool's writer has come round and the reactor has turned: a sign of life for a watchdog.

        A disk that hangs keeps it from firing; one that is full or fails does not, nor does a backend that is away.
        Without an open spool (while its disk is waited for, say) it fires at once. Cancelling is harmless.
        """
        return succeed(None) if self._run is None else self._run.spool.answer()

    def _is_connected(self) -> None:
        self._connected.fire(self.status())

    # -----------------------------------------------------------------------------------------------------------------
    # Out

    def send_heartbeat(self, status: str = "online", *, timeout: float | None = None) -> Deferred[HeartbeatAnswer]:
        """
        Send a heartbeat now, besides those of the schedule.

        :param status: how the agent is, in a word.
        :param timeout: seconds for all attempts together.
        :return: fires with the backend's answer. Cancelling gives up; nothing is kept of a heartbeat.
        :raise TransportError: it did not get through; also :class:`DeadlineExceeded`, :class:`TokenError`.
        :raise NotRunning: the manager is not started.
        """
        if wrong := _not_seconds(timeout):
            return fail(InvalidMessage(f"timeout: {wrong}"))
        if not isinstance(status, str) or not status:
            return fail(InvalidMessage(f"status: expected a word, found {status!r}"[:200]))
        return self._call(lambda run: run.beat(status, deadline=timeout))

    def send_inventory(self, data: JSONObject | None = None, *, force: bool = False) -> Deferred[str | None]:
        """
        Send an inventory; a newer one replaces an older one that is still waiting.

        :param data: the content; None to take stock of the machine now.
        :param force: send it even when the backend has just this content.
        :return: fires with the message's id as soon as it is durable, and with None when the backend has it already.
            Cancelling stops the waiting; the inventory may be sent all the same.
        :raise InvalidMessage: it is no JSON object, or too large.
        :raise SpoolError: it could not be kept.
        """
        return self._call(lambda run: run.inventories.send(data, force=force))

    def send_result(self, result: Result, *, ttl: float | None = None) -> Deferred[str]:
        """
        Send the result of a command. A manager that stops still takes it, as long as its spool is open.

        :param ttl: seconds after which the backend need not have it any more.
        :return: fires with the message's id as soon as the result is durable: from then on it is not lost. Cancelling
            stops the waiting; the result may be sent all the same.
        :raise InvalidMessage: a field is wrong, or the whole is too large.
        :raise QueueFull: the spool has reached a bound; the command stays open.
        :raise UsageError: the command has a result already.
        """
        if wrong := _not_seconds(ttl):
            return fail(InvalidMessage(f"ttl: {wrong}"))
        if (run := self._run) is not None and run.overview.running:
            # During the stop too: commands may finish, and what a handler has done must not be said to be interrupted.
            return run.reporting.report(result, ttl=ttl)
        return self._call(lambda run: run.reporting.report(result, ttl=ttl))

    def send_http(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        attempts: int | None = None,
        idempotency_key: str | None = None,
    ) -> Deferred[HTTPResponse]:
        """
        Send any request to the backend, with its token, retries and deadline.

        :param path: below the backend's base URL, beginning with a slash.
        :param json: encoded as the body; or pass ``body`` as bytes.
        :param timeout: seconds for all attempts together.
        :param attempts: how often to try; ``http.attempts`` by default, 1 for no retry.
        :param idempotency_key: the same in every attempt, so that the backend can tell a repetition; by default an id
            of its own for each call.
        :return: fires with a 2xx response. Cancelling aborts; the request may have arrived.
        :raise HTTPStatusError: any other status, at once where trying again cannot help.
        :raise InvalidMessage: the request cannot be sent as it is.
        :raise TransportError: no answer; also :class:`DeadlineExceeded`, :class:`TokenError`.
        """
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            return fail(InvalidMessage("a path begins with a slash and is percent-encoded ASCII"))
        if not isinstance(method, str) or not method.isalpha() or not method.isascii():
            return fail(InvalidMessage(f"not an HTTP method: {str(method)[:40]!r}"))
        if wrong := _not_seconds(timeout):
            return fail(InvalidMessage(f"timeout: {wrong}"))
        if wrong := _not_a_request(json, body, headers, attempts, idempotency_key):
            return fail(InvalidMessage(wrong))
        try:
            content = encode_data(json) if json is not None else bytes(body)
        except InvalidMessage as error:
            return fail(error)
        return self._call(
            lambda run: run.requests.send(
                method.upper(),
                path,
                body=content,
                headers=headers,
                idempotency_key=run.new_id() if idempotency_key is None else idempotency_key,
                deadline=timeout,
                attempts=attempts,
            )
        )

    # -----------------------------------------------------------------------------------------------------------------
    # In

    def commands(self) -> CommandChannel:
        """
        Return the channel of commands of this run, for an agent without a handler.

        :raise UsageError: there is a handler, which takes them all.
        :raise NotRunning: the manager is not started.
        """
        if self._environment.handler is not None:
            raise UsageError("the handler takes the commands: a manager has either a handler or readers of commands()")
        if self._run is None or not self.running or self._is_stopping:
            raise NotRunning()
        return self._run.channel

    def status(self) -> Status:
        """Say how things stand; needs no I/O and works in every state."""
        if self._run is not None:
            return self._run.overview.status(self._failed)
        return idle(self._environment, machine_id(self._environment.config.machine_id), self._failed)

    # -----------------------------------------------------------------------------------------------------------------
    # Inside

    def _call(self, call: Callable[[Run], Any]) -> Deferred[Any]:
        return Deferred.fromCoroutine(self._called(call))

    async def _called(self, call: Callable[[Run], Any]) -> Any:
        if self.running and self._is_stopping:
            # Started again while it was stopping: this is for the run to come.
            await self._stopped.wait()
        if not self.running:
            raise NotRunning()
        if self._failed is not None:
            raise self._failed
        assert self._run is not None
        return await self._run.when_open(call)


def _not_a_request(json: object, body: object, headers: object, attempts: object, idempotency_key: object) -> str:
    """Return what is wrong with these parameters of ``send_http``, or nothing."""
    if not isinstance(body, bytes | bytearray | memoryview):
        return f"body: expected bytes, found {type(body).__name__}"
    if json is not None and body:
        return "expected either json or body, found both"
    if headers is not None and not (
        isinstance(headers, Mapping) and all(isinstance(part, str) for item in headers.items() for part in item)
    ):
        return "headers: expected a mapping of strings to strings"
    if attempts is not None and not (isinstance(attempts, int) and attempts >= 1):
        return f"attempts: expected a whole number above 0, found {attempts!r}"[:200]
    if idempotency_key is not None and not isinstance(idempotency_key, str):
        return f"idempotency_key: expected a string, found {type(idempotency_key).__name__}"
    return ""


def _not_seconds(value: object) -> str:
    """Return why ``value`` is no time to wait, or nothing if it is one, or None."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")):
        return ""
    return f"expected a number of seconds above 0, found {value!r}"[:200]
