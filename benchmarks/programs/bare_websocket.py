"""``python -m benchmarks.programs.bare_websocket PORT``: autobahn alone, connected, with a ping every 30 seconds."""

from __future__ import annotations

import sys
from typing import Any

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from twisted.internet import reactor as installed
from twisted.internet.endpoints import HostnameEndpoint

reactor: Any = installed


class Client(WebSocketClientProtocol):  # type: ignore[misc]  # autobahn has no types
    """Says when it is connected, and nothing more."""

    def onOpen(self) -> None:
        print("connected", flush=True)

    def onClose(self, clean: bool, code: int, reason: str) -> None:
        reactor.stop()


def main() -> None:
    """Stay connected."""
    port = int(sys.argv[1])
    factory = WebSocketClientFactory(f"ws://127.0.0.1:{port}/ws?machine_id=bare", reactor=reactor)
    factory.protocol = Client
    factory.setProtocolOptions(autoPingInterval=30, autoPingTimeout=10)
    HostnameEndpoint(reactor, "127.0.0.1", port).connect(factory)
    reactor.run()


if __name__ == "__main__":
    main()
