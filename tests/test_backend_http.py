"""The reference backend's HTTP calls, on the loopback."""

from __future__ import annotations

import gzip
import hashlib
from typing import Any

import msgspec

from tests.backend_kit import V1, BackendTestCase


def inventory(data: bytes = b'{"system": {"hostname":"h"}}', checksum: str = "") -> bytes:
    checksum = checksum or hashlib.sha256(data).hexdigest()
    return b'{"type":"inventory","machine_id":"m-1","timestamp":"","checksum":"%b","data":%b}' % (
        checksum.encode(),
        data,
    )


def result(command_id: str, id: str = "r-1", **fields: Any) -> dict[str, Any]:
    return {"id": id, "command_id": command_id, "status": "success", "output": "fine", **fields}


class HeartbeatTests(BackendTestCase):
    async def test_accepted(self) -> None:
        """A heartbeat is answered as a plain backend does, without the fields of commsmgr.v1."""
        backend = await self.start()
        seen = backend.when("heartbeat")
        answer = await self.post("/heartbeat", {"machine_id": "m-1", "status": "online"})
        self.assertEqual(200, answer.status)
        self.assertEqual({"status", "timestamp", "message"}, set(answer.json))
        self.assertEqual(("m-1", "online"), ((await seen).machine_id, (await seen).note))

    async def test_without_machine_id(self) -> None:
        """A heartbeat without machine_id is answered with 400."""
        await self.start()
        for body in ({}, {"machine_id": ""}, {"machine_id": 7}, b"nonsense", b"\xff", b"[" * 100_000):
            self.assertEqual(400, (await self.post("/heartbeat", body)).status)

    async def test_commands_without_websocket(self) -> None:
        """An agent of commsmgr.v1 without WebSocket gets its commands in heartbeat answers until it confirms them."""
        backend = await self.start()
        first = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": []})
        self.assertNotIn("commands", first.json)
        ids = [backend.send_command("m-1", "ping"), backend.send_command("m-1", "echo", args=["a"], timeout=3)]
        for _ in range(2):
            again = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": []})
            self.assertEqual(ids, [command["id"] for command in again.json["commands"]])
        self.assertEqual(
            {"type": "echo", "args": ["a"], "timeout": 3},
            again.json["commands"][1]["data"],
        )
        acked = backend.when("acked")
        last = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": [ids[0], "stranger"]})
        self.assertEqual([ids[1]], [command["id"] for command in last.json["commands"]])
        self.assertEqual(ids[0], (await acked).id)

    async def test_commands_with_websocket(self) -> None:
        """While there is a WebSocket, heartbeat answers carry no commands."""
        backend = await self.start()
        await self.register()
        backend.send_command("m-1", "ping")
        answer = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": []})
        self.assertNotIn("commands", answer.json)

    async def test_plain_only(self) -> None:
        """A backend that speaks only plain ignores acked_commands."""
        backend = await self.start(dialects=("plain",))
        await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": []})
        self.assertEqual("", backend.ledger.dialect_of("m-1"))

    async def test_other_methods(self) -> None:
        """Anything but POST is refused, HEAD without a body, and nothing is logged as a fault of ours."""
        await self.start()
        for path in ("/heartbeat", "/inventory", "/commands/result"):
            for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"):
                answer = await self.call(method, path)
                self.assertEqual((405, "POST"), (answer.status, answer.headers.get("allow")), f"{method} {path}")
                self.assertEqual(method == "HEAD", answer.body == b"")
        self.assertEqual([], self.flushLoggedErrors())


class InventoryTests(BackendTestCase):
    async def test_checksum(self) -> None:
        """The checksum is that of the bytes of data as they were sent, blanks included, and is echoed."""
        backend = await self.start()
        answer = await self.post("/inventory", inventory())
        self.assertEqual(200, answer.status)
        self.assertEqual(
            {"status": "ok", "checksum_received": hashlib.sha256(b'{"system": {"hostname":"h"}}').hexdigest()},
            answer.json,
        )
        self.assertEqual(inventory(), backend.ledger.inventory_of("m-1"))

    async def test_held(self) -> None:
        """A heartbeat of commsmgr.v1 is told which inventory the backend has, or that it has none; no other is."""
        await self.start()
        data = b'{"a":1}'
        held = []
        for _ in range(2):
            beat = await self.post("/heartbeat", {"machine_id": "m-1", "acked_commands": []})
            plain = await self.post("/heartbeat", {"machine_id": "m-1"})
            self.assertNotIn("inventory_checksum", plain.json)
            held.append(beat.json["inventory_checksum"])
            await self.post("/inventory", inventory(data))
        self.assertEqual(["", hashlib.sha256(data).hexdigest()], held)

    async def test_refused(self) -> None:
        """A wrong checksum or a missing machine_id is answered with 400, and nothing is stored."""
        backend = await self.start()
        self.assertEqual(400, (await self.post("/inventory", inventory(checksum="0" * 64))).status)
        self.assertEqual(400, (await self.post("/inventory", {"data": {}})).status)
        self.assertIsNone(backend.ledger.inventory_of("m-1"))


class ResultTests(BackendTestCase):
    async def command(self) -> str:
        """Start a backend that knows one command."""
        backend = await self.start()
        backend.ledger.seen("m-1", V1)
        return backend.send_command("m-1", "ping")

    async def test_stored(self) -> None:
        """A result reaches whoever waits for it, then and afterwards."""
        given = await self.command()
        waiting = self.backend.when_result(given)
        answer = await self.post("/commands/result", result(given, execution_time_ms=12))
        self.assertEqual((200, "stored"), (answer.status, answer.json["message"]))
        self.assertEqual(("fine", 12), ((await waiting).output, (await waiting).execution_time_ms))
        self.assertEqual("r-1", (await self.backend.when_result(given)).id)
        self.assertEqual("done", self.backend.ledger.command(given).state)

    async def test_duplicate(self) -> None:
        """The same result again is answered with 200 and changes nothing."""
        given = await self.command()
        await self.post("/commands/result", result(given))
        again = self.backend.when("duplicate")
        answer = await self.post("/commands/result", result(given, output="other"))
        self.assertEqual((200, "duplicate"), (answer.status, answer.json["message"]))
        await again
        (row,) = self.backend.ledger.results(given)
        self.assertEqual(2, row.copies)
        self.assertIn(b"fine", row.body)

    async def test_refused(self) -> None:
        """404 when the command is not known, 400 without any id or with a status that does not exist."""
        given = await self.command()
        self.assertEqual(404, (await self.post("/commands/result", result("unknown"))).status)
        self.assertEqual(400, (await self.post("/commands/result", {"status": "success"})).status)
        self.assertEqual(400, (await self.post("/commands/result", result(given, status="splendid"))).status)
        self.assertEqual([], self.backend.ledger.results())

    async def test_cancelled(self) -> None:
        """Who no longer wants the result is not called."""
        given = await self.command()
        waiting = self.backend.when_result(given)
        waiting.addErrback(lambda _: None)
        waiting.cancel()
        self.assertEqual(200, (await self.post("/commands/result", result(given))).status)

    async def test_idempotency_key(self) -> None:
        """A repeated key gets the same answer without doing it again; with another body it gets 422."""
        given = await self.command()
        first = await self.post("/commands/result", result(given), Idempotency_Key="k-1")
        again = await self.post("/commands/result", result(given), Idempotency_Key="k-1")
        self.assertEqual(first.body, again.body)
        self.assertEqual(1, self.backend.ledger.results(given)[0].copies)
        other = await self.post("/commands/result", result(given, output="x"), Idempotency_Key="k-1")
        self.assertEqual(422, other.status)
        elsewhere = await self.post("/heartbeat", {"machine_id": "m-1"}, Idempotency_Key="k-1")
        self.assertEqual(200, elsewhere.status)

    async def test_errors_are_not_remembered(self) -> None:
        """A key whose request failed can succeed later, and the failed one left nothing behind."""
        given = await self.command()
        failed = await self.post("/commands/result", result("later"), Idempotency_Key="k-1")
        self.assertEqual(404, failed.status)
        self.backend.send_command("m-1", "ping", id="later")
        self.assertEqual(200, (await self.post("/commands/result", result("later"), Idempotency_Key="k-1")).status)
        self.assertEqual([], self.backend.ledger.results(given))


class RequestTests(BackendTestCase):
    async def test_token(self) -> None:
        """Without the right bearer token every call is answered with 401; a token may change while running."""
        backend = await self.start(token="s3cret")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            answer = await self.post("/heartbeat", {"machine_id": "m-1"}, **headers)
            self.assertEqual((401, "Bearer"), (answer.status, answer.headers["www-authenticate"]))
        self.assertEqual(
            200, (await self.post("/heartbeat", {"machine_id": "m-1"}, Authorization="Bearer s3cret")).status
        )
        backend.token = "newer"
        self.assertEqual(
            401, (await self.post("/heartbeat", {"machine_id": "m-1"}, Authorization="Bearer s3cret")).status
        )

    async def test_gzip(self) -> None:
        """A gzip body is taken; one that is broken, cut short or of another encoding is refused."""
        await self.start()
        body = gzip.compress(inventory())
        self.assertEqual(200, (await self.post("/inventory", body, Content_Encoding="gzip")).status)
        self.assertEqual(400, (await self.post("/inventory", body[:-12], Content_Encoding="gzip")).status)
        self.assertEqual(400, (await self.post("/inventory", inventory(), Content_Encoding="gzip")).status)
        self.assertEqual(415, (await self.post("/inventory", body, Content_Encoding="br")).status)

    async def test_too_large(self) -> None:
        """A body over the limit is answered with 413, before and after decompression."""
        await self.start(max_body_bytes=10_000)
        large = b" " * 10_001
        self.assertEqual(413, (await self.post("/inventory", large)).status)
        self.assertEqual(413, (await self.post("/inventory", b" " * 3_000_000)).status)
        self.assertEqual(413, (await self.post("/inventory", gzip.compress(large), Content_Encoding="gzip")).status)
        self.assertEqual(400, (await self.post("/inventory", b" " * 10_000)).status)

    async def test_large_inventory(self) -> None:
        """Tens of megabytes pass."""
        await self.start()
        data = msgspec.json.encode({"software": ["x" * 1000] * 20_000})
        self.assertEqual(200, (await self.post("/inventory", inventory(data))).status)

    async def test_quirky_errors(self) -> None:
        """With quirks, errors are HTML."""
        await self.start(quirks=True)
        answer = await self.post("/heartbeat", {})
        self.assertEqual((400, "text/html"), (answer.status, answer.headers["content-type"]))

    async def test_unknown_path(self) -> None:
        """Other paths are answered with 404."""
        await self.start()
        self.assertEqual(404, (await self.post("/nothing", {})).status)
