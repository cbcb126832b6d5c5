"""
HTTP posts, each with a token and a JSON body, its answer read and checked, over persistent connections.

Each function makes ``operations`` posts of ``size`` bytes, ``concurrent`` at a time, each begun when another has ended;
``secure`` is for TLS with the server's issuer as the only one, ``grow`` for more than one way of these (see
:mod:`.growing`), ``traced`` for counting, instead of the time, the bytes of memory beyond what is sent, by the size of
one post (``copies``). The rest is the server's address.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from benchmarks.contenders.growing import Grow, grown
from benchmarks.sample import Sample, Watch
from benchmarks.servers.posts import ANSWER, TOKEN

WARM = 0.05
"""Part of the operations that is done before the measurement, on top."""

FIELDS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}

MOST = 1000
"""Connections that a pool may keep: as many as there ever are at a time."""


def url(port: int, tls_port: int, secure: bool) -> str:
    """Return the base URL."""
    return f"https://127.0.0.1:{tls_port}" if secure else f"http://127.0.0.1:{port}"


def document(size: int) -> bytes:
    """Return a JSON object of ``size`` bytes."""
    empty = {"machine_id": "bench", "status": "success", "output": ""}
    return json.dumps(empty | {"output": "x" * (size - len(json.dumps(empty)))}).encode()


def received(port: int) -> int:
    """Return how many posts the server has taken."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/count") as answer:
        return int(answer.read())


def check(status: int, body: bytes) -> None:
    """See that a post was taken."""
    if status != 200 or body != ANSWER:
        raise RuntimeError(f"{status}: {body[:200]!r}")


Post = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]


class Posting:
    """
    Repeats ``post`` in a closed loop.

    :param post: posts a body to a path.
    :param gather: waits for several awaitables.
    """

    def __init__(self, post: Post, gather: Callable[[list[Awaitable[None]]], Awaitable[Any]], port: int) -> None:
        self._post = post
        self._gather = gather
        self._port = port
        self._left = 0

    async def run(self, operations: int, size: int, concurrent: int, traced: bool = False) -> Sample:
        """
        Warm up, then measure.

        :param traced: whether memory is what is measured.
        """
        self._path, self._body = f"/posts/{size}", document(size)
        await self._repeat(max(int(operations * WARM), concurrent, 1), concurrent)
        before = received(self._port)
        if traced:
            tracemalloc.start()
        watch = Watch()
        watch.start()
        await self._repeat(operations, concurrent)
        sample = watch.stop(operations, copies=tracemalloc.get_traced_memory()[1] / size)
        tracemalloc.stop()
        if received(self._port) - before != operations:
            raise RuntimeError(f"the server has {received(self._port) - before} of {operations}")
        return sample

    async def _repeat(self, operations: int, concurrent: int) -> None:
        self._left = operations
        await self._gather([self._one() for _ in range(concurrent)])

    async def _one(self) -> None:
        while self._left > 0:
            self._left -= 1
            check(*await self._post(self._path, self._body))


def _on_reactor(main: Callable[[Any], Coroutine[Any, Any, Sample]]) -> Sample:
    """Run ``main`` on Twisted's reactor, with a log that shows warnings only."""
    import sys

    from twisted.logger import (
        FilteringLogObserver,
        LogLevel,
        LogLevelFilterPredicate,
        globalLogBeginner,
        textFileLogObserver,
    )

    from benchmarks.on_reactor import on_reactor

    quiet = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.warn)])
    globalLogBeginner.beginLoggingTo([quiet], redirectStandardIO=False)
    return on_reactor(main)


def _gather(work: list[Any]) -> Any:
    from twisted.internet.defer import Deferred, gatherResults

    return gatherResults([Deferred.fromCoroutine(each) for each in work], consumeErrors=True)


def commsmgr(
    operations: int,
    size: int,
    concurrent: int,
    *,
    port: int,
    tls_port: int,
    ca: str,
    secure: bool = False,
    grow: Grow | None = None,
    backends: int = 1,
    connections: int = 2,
) -> Sample:
    """
    ``Manager.send_http``, with all that it does by default: retries, breaker, deadline, limits, metrics.

    :param backends: how many are configured; the first of them is the one that works.
    :param connections: ``http.connections``.
    """
    from commsmgr import Manager, config

    others = (
        config.Backend(url=f"http://127.0.0.1:{number}/", name=f"spare-{number}") for number in range(1, backends)
    )
    # Neither a WebSocket nor anything that sends by itself: the posts are what is measured.
    whole = config.Config(
        backends=(config.Backend(url=url(port, tls_port, secure)), *others),
        http=config.HTTP(connections=connections),
        machine_id="bench",
        auth=config.Auth(token=TOKEN),
        tls=config.TLS(ca_file=ca, ca_exclusive=True) if secure else config.TLS(),
        websocket=config.WebSocket(enabled=False),
        heartbeat=config.Heartbeat(interval=0),
        inventory=config.Inventory(interval=0),
        spool=config.Spool(path="spool"),
    )
    given = {"operations": operations, "size": size, "concurrent": concurrent}

    async def main(reactor: Any) -> Sample:
        manager = Manager(whole, reactor=reactor)
        manager.startService()

        async def post(path: str, body: bytes) -> tuple[int, bytes]:
            answer = await manager.send_http("POST", path, body=body)
            return answer.status, answer.body

        try:
            return await grown(Posting(post, _gather, port).run, given, grow)
        finally:
            await manager.disconnect()

    return _on_reactor(main)


def _twisted_agent(reactor: Any, ca: str, secure: bool) -> Any:
    from twisted.internet.ssl import Certificate, trustRootFromCertificates
    from twisted.web.client import Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool

    pool = HTTPConnectionPool(reactor)
    pool.maxPersistentPerHost = MOST
    if not secure:
        return Agent(reactor, pool=pool), pool
    with open(ca, "rb") as file:
        trusted = trustRootFromCertificates([Certificate.loadPEM(file.read())])
    return Agent(reactor, BrowserLikePolicyForHTTPS(trusted), pool=pool), pool


def treq(
    operations: int,
    size: int,
    concurrent: int,
    *,
    port: int,
    tls_port: int,
    ca: str,
    secure: bool = False,
    grow: Grow | None = None,
) -> Sample:
    """treq's client over Twisted's agent and pool."""
    from treq.client import HTTPClient

    base = url(port, tls_port, secure)
    given = {"operations": operations, "size": size, "concurrent": concurrent}

    async def main(reactor: Any) -> Sample:
        agent, pool = _twisted_agent(reactor, ca, secure)
        client = HTTPClient(agent)

        async def post(path: str, body: bytes) -> tuple[int, bytes]:
            answer = await client.post(base + path, data=body, headers=FIELDS)
            return answer.code, await answer.content()

        try:
            return await grown(Posting(post, _gather, port).run, given, grow)
        finally:
            await pool.closeCachedConnections()

    return _on_reactor(main)


def agent(
    operations: int, size: int, concurrent: int, *, port: int, tls_port: int, ca: str, secure: bool = False
) -> Sample:
    """Twisted's agent."""
    from io import BytesIO

    from twisted.web.client import FileBodyProducer, readBody
    from twisted.web.http_headers import Headers

    base = url(port, tls_port, secure)

    async def main(reactor: Any) -> Sample:
        twisted, pool = _twisted_agent(reactor, ca, secure)

        async def post(path: str, body: bytes) -> tuple[int, bytes]:
            fields = Headers({"Content-Type": ["application/json"], "Authorization": [f"Bearer {TOKEN}"]})
            answer = await twisted.request(b"POST", (base + path).encode(), fields, FileBodyProducer(BytesIO(body)))
            return answer.code, await readBody(answer)

        try:
            return await Posting(post, _gather, port).run(operations, size, concurrent)
        finally:
            await pool.closeCachedConnections()

    return _on_reactor(main)


def aiohttp(operations: int, size: int, concurrent: int, *, port: int, tls_port: int, ca: str) -> Sample:
    """aiohttp's client, on asyncio."""
    import aiohttp

    base = url(port, tls_port, False)

    async def main() -> Sample:
        async with aiohttp.ClientSession() as session:

            async def post(path: str, body: bytes) -> tuple[int, bytes]:
                async with session.post(base + path, data=body, headers=FIELDS) as answer:
                    return answer.status, await answer.read()

            return await Posting(post, lambda work: asyncio.gather(*work), port).run(operations, size, concurrent)

    return asyncio.run(main())


def requests(operations: int, size: int, concurrent: int, *, port: int, tls_port: int, ca: str) -> Sample:
    """requests with a session; it blocks, so there is one at a time."""
    import requests

    base = url(port, tls_port, False)
    with requests.Session() as session:

        async def post(path: str, body: bytes) -> tuple[int, bytes]:
            answer = session.post(base + path, data=body, headers=FIELDS)
            return answer.status_code, answer.content

        return asyncio.run(Posting(post, lambda work: asyncio.gather(*work), port).run(operations, size, concurrent))
