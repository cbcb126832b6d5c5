"""The reference backend, on a port of its own choice."""

from __future__ import annotations

import json
import time
from random import Random
from typing import Any
from urllib.parse import urlsplit

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred

from commsmgr.backend import ReferenceBackend

reactor: Any = installed


async def main() -> None:
    """Say where it listens; serve until the process is ended."""
    backend = ReferenceBackend(reactor, wall=time.time, random=Random(1))
    await backend.startService()
    print(json.dumps({"port": urlsplit(backend.url).port}), flush=True)


if __name__ == "__main__":
    Deferred.fromCoroutine(main())
    reactor.run()
