"""
How the programs begin, quickly, and end: by a signal, which counts once, or with exit code 1 when their start fails.

Stopped by SIGTERM or SIGINT, ``twistd`` stops all services and then ends by that very signal, which is 143 or 130 to a
shell and a clean end to a supervisor.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.internet.error import ReactorNotRunning


@contextmanager
def loading() -> Iterator[None]:
    """
    Import a program's modules without looking for garbage among them, of which there is next to none.

    The collector would run more than a hundred times, over ever more objects: a tenth of the whole start. What was
    loaded stays as long as the process does, so it is not looked at later either (:func:`gc.freeze`).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def fail(reactor: Any) -> None:
    """
    Stop all services, then end with exit code 1: a supervisor should see that the start failed, and try again.

    Works before the reactor runs, too.
    """
    # twistd exits with 0 whatever happens after the start; atexit is what remains after its last clean-up.
    atexit.register(os._exit, 1)

    def stop() -> None:
        with suppress(ReactorNotRunning):  # it stops already
            reactor.stop()

    reactor.callWhenRunning(stop)


def stop_once(reactor: Any) -> None:
    """
    Let only the first SIGTERM or SIGINT reach Twisted, whose handler logs a traceback when the stop has begun already.

    The stop has a deadline; who cannot wait for that has SIGKILL. ``timeout`` and Ctrl-C in a shell's pipeline do send
    two signals for one.
    """
    # Twisted installs its handlers when the reactor begins to run.
    reactor.callWhenRunning(_wrap_handlers)


def _wrap_handlers() -> None:
    wanted = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def first(number: int, frame: Any) -> None:
        for other in wanted:
            signal.signal(other, lambda *_: None)  # SIG_IGN would have Python complain of one that is under way
        handler = wanted[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    for number, handler in wanted.items():
        if callable(handler):
            signal.signal(number, first)
