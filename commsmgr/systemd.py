"""
Tells systemd how the service is (``Type=notify``, ``WatchdogSec=``), in the way of sd_notify(3): by datagrams to the
socket that ``NOTIFY_SOCKET`` names. Without that variable nothing is done. No error of it is an error of the agent.

What is said, and what it means:

- ``READY=1`` when the manager has started: the spool is open and every part has begun. Not when it is connected: a
  backend that is away is no reason for systemd to end the agent, or to keep back what comes after it.
- ``EXTEND_TIMEOUT_USEC`` until then, as long as the reactor goes round: a start may wait for its disk for hours, or
  take over a large damaged spool, and who ends it would only have it begin again.
- ``STATUS`` is the sentence of ``/readyz``, when it has changed, but not more often than it is looked at.
- ``WATCHDOG=1`` in every half of ``WATCHDOG_USEC``, if the reactor has turned and the spool's writer has answered
  (:meth:`~commsmgr.manager.Manager.alive`). A reactor that is blocked and a disk that hangs let the time run out. A
  disk that is full or fails does not: its writer answers and tries again, and a new process could do no more.
- ``STOPPING=1`` when the orderly stop begins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from commsmgr.clock import steady
from commsmgr.observe.health import explain
from commsmgr.status import Status

LOOK_EVERY = 5.0
"""Seconds between two looks at the status."""

LONGER = 60.0
"""Seconds that a start asks for at each look."""

AGAIN_AFTER = 1.0
"""Seconds after which a sign of life that could not be sent is tried again."""


class Watched(Protocol):
    """What is asked of a manager."""

    def started(self) -> Deferred[None]: ...

    def alive(self) -> Deferred[None]: ...

    def status(self) -> Status: ...


class _Phase(Enum):
    STARTING = auto()
    STARTED = auto()  # but systemd has not been told
    READY = auto()


class SystemdNotify(Service):
    """
    Speaks to systemd while it runs. Give it the manager's own parent, after the manager: then it starts after that, and
    says that the stop begins before it does.

    :param reactor: for time alone (:mod:`commsmgr.clock`).
    :param environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are looked up, at the start.
    """

    log = Logger()

    def __init__(self, manager: Watched, *, reactor: Any, environ: Mapping[str, str] = os.environ) -> None:
        self._manager = manager
        self._clock: IReactorTime = steady(reactor)
        self._environ = environ
        self._address = ""
        self._socket: socket.socket | None = None
        self._failed = False
        self._phase = _Phase.STARTING
        self._status = ""
        self._calls: dict[str, IDelayedCall] = {}
        self._proof: Deferred[None] | None = None

    def startService(self) -> None:
        """Begin to speak, if there is somebody who listens."""
        super().startService()
        address = self._environ.get("NOTIFY_SOCKET", "")
        if not address:
            return
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._failed, self._phase, self._status = False, _Phase.STARTING, ""
        # What keeps it from starting is for others to deal with; here it only never becomes ready.
        self._manager.started().addCallbacks(self._started, lambda failure: None)
        self._look()
        half = watchdog(self._environ, os.getpid()) / 2
        if half:
            self._prove(half)

    def stopService(self) -> None:
        """Say that the stop has begun, and no more."""
        super().stopService()
        if self._socket is None:
            return
        self._say("STOPPING=1", "STATUS=stopping")
        for call in self._calls.values():
            if call.active():
                call.cancel()
        self._calls.clear()
        if self._proof is not None:
            self._proof.cancel()
        self._socket.close()
        self._socket = None

    # -- how it is

    def _started(self, _: None) -> None:
        if self._phase is _Phase.STARTING:
            self._phase = _Phase.STARTED
            self._tell()

    def _look(self) -> None:
        self._later("look", LOOK_EVERY, self._look)
        self._tell()

    def _tell(self) -> None:
        """Say what has not been said yet."""
        status = explain(self._manager.status())
        lines = [f"STATUS={status}"] if status != self._status else []
        if self._phase is _Phase.STARTING:
            lines.append(f"EXTEND_TIMEOUT_USEC={LONGER * 1e6:.0f}")
        elif self._phase is _Phase.STARTED:
            lines.append("READY=1")
        if lines and self._say(*lines):
            self._status = status
            if self._phase is _Phase.STARTED:
                self._phase = _Phase.READY

    # -- whether it lives

    def _prove(self, half: float) -> None:
        self._proof = self._manager.alive()
        self._proof.addCallbacks(self._proven, lambda failure: None, callbackArgs=(half,))

    def _proven(self, _: None, half: float) -> None:
        self._proof = None
        if self._socket is not None:
            sent = self._say("WATCHDOG=1")
            self._later("watchdog", half if sent else min(half, AGAIN_AFTER), self._prove, half)

    # -- the wire

    def _later(self, name: str, seconds: float, call: Any, *arguments: Any) -> None:
        self._calls[name] = self._clock.callLater(seconds, call, *arguments)

    def _say(self, *lines: str) -> bool:
        """Send ``lines`` in one datagram; return whether that could be done."""
        assert self._socket is not None
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except (OSError, ValueError) as error:  # the latter of an address that can be none
            if not self._failed:
                self.log.warn(
                    "systemd cannot be told at {address}: {error}",
                    event="systemd.notify-failed",
                    address=self._environ.get("NOTIFY_SOCKET", ""),
                    error=str(error),
                )
            self._failed = True
            return False
        self._failed = False
        return True


def watchdog(environ: Mapping[str, str], process: int) -> float:
    """
    Return the seconds within which ``process`` has to show that it lives; 0: it need not (sd_watchdog_enabled(3)).
    """
    text, whose = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (text.isascii() and text.isdecimal()) or (whose and whose != str(process)):
        return 0.0
    return int(text[:18]) / 1e6
