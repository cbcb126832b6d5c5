"""Results with a receipt: what a durable one costs the agent, beside what others ask for one that is not durable."""

from __future__ import annotations

from benchmarks.measure import Benchmark, Contender, Server, Target

SERVERS = {
    "commsmgr.v1": Server(("v1_backend",)),
    "mosquitto": Server(("mosquitto", "-p", "{port}"), package="mosquitto"),
    "nats-server": Server(
        ("nats-server", "-a", "127.0.0.1", "-p", "{port}", "-js", "-sd", "{directory}"), package="nats-server"
    ),
    "python-socketio": Server(("socketio_server",)),
}


def _benchmark(window: int, operations: int, at_most: float) -> Benchmark:
    full, paho, nats = "commsmgr, durable", "paho-mqtt QoS 1", "nats-py JetStream"
    arguments = {"operations": operations, "window": window}
    return Benchmark(
        name=f"results-{window}",
        title=f"a result of 230 bytes with its receipt, {window} at a time",
        reference=paho,
        metrics=("cpu", "wall"),
        servers=SERVERS,
        contenders=(
            Contender(full, "results:commsmgr", {**arguments, "durability": "full"}, "commsmgr.v1"),
            Contender("commsmgr, in memory", "results:commsmgr", {**arguments, "durability": "memory"}, "commsmgr.v1"),
            Contender(paho, "results:paho", arguments, "mosquitto"),
            Contender(nats, "results:nats", arguments, "nats-server"),
            Contender("nats-py publish_async", "results:nats_async", arguments, "nats-server"),
            Contender("python-socketio", "results:socketio", arguments, "python-socketio"),
        ),
        targets=(
            Target(full, "cpu", paho, at_most=at_most),
            Target(full, "cpu", nats, at_most=1.0),
            Target(full, "cpu", "nats-py publish_async", at_most=1.0),
        ),
    )


BENCHMARKS = (_benchmark(20, 3_000, 1.0), _benchmark(1000, 6_000, 0.25))
