"""
Messages of 256 bytes over WebSocket, both ways.

What commsmgr does on top of the libraries that it is measured against, say the modules ``websocket_commsmgr`` and
``websocket_manager`` of the contenders.
"""

from __future__ import annotations

from typing import Any

from benchmarks.measure import Benchmark, Contender, Server, Target

PEER = {"peer": Server(("websocket_peer",))}
SENDS = {"operations": 20_000}
RECEIVES = {"operations": 20_000}
TRIPS = {"operations": 2_000}


def _contender(name: str, run: str, arguments: dict[str, Any], **more: Any) -> Contender:
    return Contender(name, run, arguments | more, server="peer")


BENCHMARKS = (
    Benchmark(
        name="websocket-send",
        title="one message sent, none of them stored",
        reference="autobahn, encoded before",
        servers=PEER,
        contenders=(
            _contender("autobahn, encoded before", "websocket_autobahn:sends", SENDS, encode=False),
            _contender("autobahn + json.dumps", "websocket_autobahn:sends", SENDS, encode=True),
            _contender(
                "commsmgr, connection, encoded before, singly", "websocket_commsmgr:connection_sends", SENDS, batch=1
            ),
            _contender(
                "commsmgr, connection, encoded before, by 100", "websocket_commsmgr:connection_sends", SENDS, batch=100
            ),
            _contender("commsmgr, session, with receipts", "websocket_commsmgr:session_sends", SENDS),
            _contender(
                "commsmgr, session, results checked and redacted",
                "websocket_commsmgr:session_sends",
                SENDS,
                results=True,
            ),
            _contender("websockets, encoded before", "websocket_asyncio:sends", SENDS, library="websockets"),
            _contender("aiohttp, encoded before", "websocket_asyncio:sends", SENDS, library="aiohttp"),
            _contender("picows, encoded before", "websocket_asyncio:picows_sends", SENDS),
        ),
        targets=(
            Target("commsmgr, session, with receipts", "cpu", "autobahn, encoded before", at_most=0.5),
            Target("commsmgr, session, results checked and redacted", "cpu", "autobahn, encoded before", at_most=1.0),
            Target("commsmgr, connection, encoded before, singly", "cpu", "autobahn, encoded before", at_most=0.5),
        ),
    ),
    Benchmark(
        name="websocket-receive",
        title="one command received, parsed and handed on",
        reference="autobahn + json.loads",
        servers=PEER,
        contenders=(
            _contender("autobahn, not parsed", "websocket_autobahn:receives", RECEIVES, decode=False),
            _contender("autobahn + json.loads", "websocket_autobahn:receives", RECEIVES, decode=True),
            _contender("commsmgr, session", "websocket_commsmgr:session_receives", RECEIVES),
            _contender("commsmgr, session, plain backend", "websocket_commsmgr:session_receives", RECEIVES, v1=False),
            _contender("commsmgr, manager, pushes", "websocket_manager:takes_pushes", RECEIVES),
            _contender(
                "commsmgr, manager, inbox in memory",
                "websocket_manager:takes_commands",
                {"operations": 5_000},
            ),
            _contender("websockets + json.loads", "websocket_asyncio:receives", RECEIVES, library="websockets"),
            _contender("aiohttp + json.loads", "websocket_asyncio:receives", RECEIVES, library="aiohttp"),
            _contender("picows + json.loads", "websocket_asyncio:picows_receives", RECEIVES),
        ),
        targets=(Target("commsmgr, session", "cpu", "autobahn + json.loads", at_most=0.25),),
    ),
    Benchmark(
        name="websocket-round-trip",
        title="one message sent and its answer received",
        reference="autobahn, encoded before",
        metrics=("p50", "cpu"),
        servers=PEER,
        contenders=(
            _contender("autobahn, encoded before", "websocket_autobahn:round_trips", TRIPS, as_json=False),
            _contender("autobahn + json", "websocket_autobahn:round_trips", TRIPS, as_json=True),
            _contender("commsmgr, session", "websocket_commsmgr:session_round_trips", TRIPS),
            _contender("websockets, encoded before", "websocket_asyncio:round_trips", TRIPS, library="websockets"),
            _contender("aiohttp, encoded before", "websocket_asyncio:round_trips", TRIPS, library="aiohttp"),
        ),
        targets=(Target("commsmgr, session", "p50", "autobahn, encoded before", at_most=1.4),),
    ),
    Benchmark(
        name="websocket-receipts",
        title="one result with its receipt by barrier from a plain backend",
        reference="commsmgr, session",
        metrics=("cpu", "rate"),
        servers=PEER,
        contenders=(
            _contender("commsmgr, session", "websocket_commsmgr:session_sends", SENDS),
            _contender("commsmgr, manager, spool in memory", "websocket_manager:sends", {"operations": 5_000}),
        ),
        # As they were set before there was anything to measure. By now they are far off and warn of nothing: that is
        # the part of the guard.
        targets=(
            Target("commsmgr, session", "cpu", at_most=14),
            Target("commsmgr, session", "rate", at_least=60_000),
        ),
    ),
)
