"""Runs a contender on Twisted's reactor, which a process can run only once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from benchmarks.sample import Sample

reactor: Any = installed


def on_reactor(main: Callable[[Any], Coroutine[Deferred[Any], Any, Sample]]) -> Sample:
    """
    Run ``main``, which is given the reactor, to its end.

    :return: its sample; what it raises is raised.
    """
    outcome: list[Sample | Failure] = []

    def begin() -> None:
        Deferred.fromCoroutine(main(reactor)).addBoth(outcome.append).addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    (found,) = outcome
    if isinstance(found, Failure):
        found.raiseException()
    return found
