"""A python-socketio server that remembers the ids of what it is sent, and acknowledges each event."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import socketio
from aiohttp import web


async def main() -> None:
    """Serve until the process is ended."""
    server = socketio.AsyncServer(async_mode="aiohttp")
    application = web.Application()
    server.attach(application)
    seen: set[str] = set()

    @server.event  # type: ignore[untyped-decorator]
    async def result(sid: str, data: dict[str, Any]) -> bool:
        seen.add(data["id"])
        return True

    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
