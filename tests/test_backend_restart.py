"""The reference backend's memory of ids survives its death, whichever way a result comes again."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from tests.backend_kit import BackendTestCase

MACHINE = "m-1"


class Restart(BackendTestCase):
    """The backend dies between the receipt of a result and its ack, and comes back with the same file."""

    async def start_again(self) -> None:
        """End the backend that was cut off, and start another one with its file."""
        await self.backend.stopService()
        await self.start(path=self.path)

    async def begin(self) -> str:
        """Start with a file, and give a command; return its id."""
        self.path = os.path.join(tempfile.mkdtemp(dir="."), "ledger.db")
        await self.start(path=self.path)
        agent = await self.register(MACHINE)
        command = self.backend.send_command(MACHINE, "say")
        await agent.get("command")
        agent.say(type="ack", ids=[command])
        await agent.round_trip()
        self.agent = agent
        return command

    def is_known(self, command: str) -> None:
        """The result is there once, came twice, and its command is done."""
        (row,) = self.backend.ledger.results()
        self.assertEqual((row.id, row.command_id, row.copies), ("r-1", command, 2))
        found = self.backend.ledger.command(command)
        assert found is not None
        self.assertEqual("done", found.state)
        self.assertEqual([], self.backend.ledger.pending(MACHINE))

    def body(self, command: str) -> dict[str, Any]:
        """Return the result as HTTP carries it."""
        return {"id": "r-1", "command_id": command, "status": "success", "output": "", "timestamp": ""}

    async def test_websocket_then_http(self) -> None:
        """It came over the WebSocket, and comes again over HTTP."""
        command = await self.begin()
        self.backend.faults.inject("crash", stored=True, count=1)
        self.agent.result(command, "r-1")
        await self.agent.closed
        self.assertEqual([], [each for each in self.agent.inbox if each["type"] == "ack"])
        await self.start_again()
        answer = await self.post("/commands/result", self.body(command), Idempotency_Key="r-1")
        self.assertEqual((answer.status, answer.json["message"]), (200, "duplicate"))
        self.is_known(command)

    async def test_http_then_websocket(self) -> None:
        """It came over HTTP, and comes again over the WebSocket, where it is acknowledged like any other."""
        command = await self.begin()
        self.backend.faults.inject("crash", stored=True, count=1, transport="http")
        with self.assertRaises(Exception):  # noqa: B017  # the connection was cut: treq has several names for that
            await self.post("/commands/result", self.body(command), Idempotency_Key="r-1")
        await self.start_again()
        agent = await self.register(MACHINE)
        agent.result(command, "r-1")
        self.assertEqual(["r-1"], (await agent.get("ack"))["ids"])
        self.is_known(command)

    async def test_websocket_twice(self) -> None:
        """It comes again over the WebSocket."""
        command = await self.begin()
        self.backend.faults.inject("crash", stored=True, count=1)
        self.agent.result(command, "r-1")
        await self.agent.closed
        await self.start_again()
        agent = await self.register(MACHINE)
        agent.result(command, "r-1")
        self.assertEqual(["r-1"], (await agent.get("ack"))["ids"])
        self.is_known(command)
