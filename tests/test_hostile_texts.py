"""What others wrote, in the log: no line but ours begins a line, nothing steers a terminal, JSON stays JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher, textFileLogObserver
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import Site

from commsmgr import config
from commsmgr.messages import Command, CommandEnvelope, FromBackend, HeartbeatAnswer, InventoryAnswer, Result
from commsmgr.observe.logs import make_observer
from commsmgr.redact import Redactor
from tests.world import MACHINE, WorldTestCase, quick, reactor, until

HOSTILE = (
    "x\n2026-01-01T00:00:00.000Z info  forged.line  forged\r2026 forged\x1b]0;owned\x07\x1b[2J\u2028forged\u202e\x00"
    '\n{"time":"x","event":"forged.line"}\n2026-01-01T00:00:00+0000 [forged#info] forged\n    | forged'
)


def texts(schema: Any) -> Iterator[tuple[str | int, ...]]:
    """Yield the path to each text in a message of a type."""
    info = schema
    if isinstance(info, msgspec.inspect.UnionType):
        for part in info.types:
            yield from texts(part)
    elif isinstance(info, msgspec.inspect.Metadata):
        yield from texts(info.type)
    elif isinstance(info, msgspec.inspect.StrType):
        yield ()
    elif isinstance(info, msgspec.inspect.DictType):
        yield ("key",)
    elif isinstance(info, msgspec.inspect.ListType):
        yield from ((0, *path) for path in texts(info.item_type))
    elif isinstance(info, msgspec.inspect.StructType):
        if info.tag_field:
            yield (info.tag_field,)
        for field in info.fields:
            yield from ((field.encode_name, *path) for path in texts(field.type))


def skeleton(info: msgspec.inspect.StructType) -> dict[str, Any]:
    """Return a message of a type with what it must have, and an id of something that there is."""
    message: dict[str, Any] = {"type": info.tag} if info.tag_field else {}
    for field in info.fields:
        if field.encode_name == "data":
            message["data"] = {}
        elif field.encode_name in ("id", "ids"):
            message[field.encode_name] = "r1" if field.encode_name == "id" else ["r1"]
    return message


def hostile_messages(*structs: Any) -> Iterator[bytes]:
    """Yield messages of each type, each with one hostile text; also with the text escaped in a key."""
    for struct in structs:
        info = msgspec.inspect.type_info(struct)
        assert isinstance(info, msgspec.inspect.StructType)
        for path in texts(info):
            message = skeleton(info)
            place: Any = message
            for step, following in pairwise(path):
                if isinstance(place, list):
                    place[:] = [None]
                elif step not in place or not isinstance(place[step], dict | list):
                    place[step] = [] if following == 0 else {}
                place = place[step]
            if isinstance(place, list):
                place[:] = [HOSTILE]
            else:
                place[path[-1]] = HOSTILE
            yield msgspec.json.encode(message)
        yield msgspec.json.encode(skeleton(info) | {HOSTILE: HOSTILE})


class Answers(Resource):
    """A backend over HTTP that answers what it is told."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.next: list[tuple[int, bytes, bytes]] = []

    def render(self, request: Request) -> bytes:
        status, reason, body = self.next.pop(0) if self.next else (200, b"OK", b"{}")
        request.setResponseCode(status, reason)
        request.setHeader(b"Content-Type", b"application/json")
        return body


class HostileTexts(WorldTestCase):
    """The whole log of a whole manager, in both of our forms, and in that of Twisted's own observer."""

    timeout = 30

    def setUp(self) -> None:
        super().setUp()
        self.text, self.lines, self.classic = io.StringIO(), io.StringIO(), io.StringIO()
        for observer in (
            make_observer(self.text, format="text", level="debug", redactor=Redactor()),
            make_observer(self.lines, format="json", level="debug", redactor=Redactor()),
            textFileLogObserver(self.classic),
        ):
            globalLogPublisher.addObserver(observer)
            self.addCleanup(globalLogPublisher.removeObserver, observer)

    def check(self, least: int, *, tracebacks: bool = False) -> None:
        """
        Look at every line.

        :param least: of how many lines of ours there must be more.
        :param tracebacks: whether Twisted's own observer had some to show, which are not ours to change.
        """
        text = self.text.getvalue()
        ours = r"^(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:debug|info |warn |error|critical) |    \| )"
        for line in text.removesuffix("\n").split("\n"):
            self.assertRegex(line, ours)
            self.assertTrue(line.isprintable(), ascii(line))
            self.assertNotRegex(line, r"^.{24} info  forged")
        for line in self.lines.getvalue().removesuffix("\n").split("\n"):
            record = json.loads(line)
            self.assertNotEqual(record["event"], "forged.line")
            self.assertTrue(line.isascii() and line.isprintable())
        self.assertGreater(text.count("\n"), least)
        if not tracebacks:
            for line in self.classic.getvalue().removesuffix("\n").split("\n"):
                if "commsmgr." in line.split("]")[0]:
                    self.assertTrue(line.isprintable(), ascii(line))
                self.assertFalse(line.startswith(("2026-01-01T00:00:00+0000 [forged", "{", "    | ")), line)

    async def settled(self) -> None:
        await deferLater(reactor, 0.005)

    async def test_websocket(self) -> None:
        """Every text of every message that a backend may send, in both dialects, ends no link and forges no line."""
        for dialect in ("auto", "plain"):
            backend = await self.backend()
            pushes: list[Any] = []
            settings = quick(backend, self.spool(), websocket=config.WebSocket(dialect=dialect, register_wait=0.1))
            manager = self.manager(settings, handler=self.quote, on_push=pushes.append)
            await manager.connect()
            await until(lambda backend=backend: backend.connected(MACHINE))
            link = backend._running.switchboard._connected[MACHINE]
            for message in hostile_messages(*FromBackend.__args__):
                if b'"goaway"' not in message:
                    link.deliver(message)
                    await self.settled()
            link.deliver(b'{"type":"goaway","data":{},' + json.dumps(HOSTILE).encode() + b":1}")
            await until(lambda: bool(self.logged("link.invalid")))
            await until(lambda: bool(self.logged("command.received")))
            await manager.disconnect()
        self.check(20, tracebacks=True)

    def quote(self, command: Command) -> Result:
        """Answer with hostile texts, or fail with one."""
        if command.type == "fail":
            raise RuntimeError(HOSTILE)
        return command.error(HOSTILE, output=HOSTILE)

    async def test_results(self) -> None:
        """What a command printed reaches the backend unchanged and no log; why a handler failed forges no line."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.spool()), handler=self.quote)
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        result = await backend.when_result(backend.send_command(MACHINE, "run", command=HOSTILE, args=[HOSTILE]))
        self.assertEqual((result.output, result.error), (HOSTILE, HOSTILE))
        self.check(3)
        self.assertNotIn("forged", self.text.getvalue() + self.lines.getvalue(), "commands and outputs are not logged")
        result = await backend.when_result(backend.send_command(MACHINE, "fail"))
        self.assertEqual(result.error, f"RuntimeError: {HOSTILE}")
        self.assertTrue(self.flushLoggedErrors(RuntimeError))
        self.expected.add("command.failed")
        self.check(5, tracebacks=True)

    async def test_close_reason(self) -> None:
        """The reason with which a backend closes is one line, in the log and in the status."""
        backend = await self.backend()
        manager = self.manager(quick(backend, self.spool()), handler=self.quote)
        await manager.connect()
        await until(lambda: backend.connected(MACHINE))
        backend._running.switchboard._connected[MACHINE]._close(4000, HOSTILE[:60])
        await until(lambda: bool(self.logged("link.ended")))
        self.assertIn("x\\n2026-01-01", str(self.logged("link.ended")[-1]["error"]))
        self.assertTrue(all(backend.last_error.isprintable() for backend in manager.status().backends))
        self.check(3)

    async def test_http(self) -> None:
        """So are statuses, pages and every text in the answers over HTTP."""
        answers = Answers()
        port = reactor.listenTCP(0, Site(answers), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        manager = self.manager(
            quick(
                f"http://127.0.0.1:{port.getHost().port}",
                self.spool(),
                http=config.HTTP(attempts=1),
                websocket=config.WebSocket(enabled=False),
            ),
            handler=self.quote,
        )
        manager.startService()
        one_line = HOSTILE.replace("\n", " ").replace("\r", " ").encode()
        refused = 0
        for answer in (
            *((200, b"OK", body) for body in hostile_messages(HeartbeatAnswer, InventoryAnswer, CommandEnvelope)),
            (200, b"OK", json.dumps({"commands": [{"type": "command", "id": HOSTILE}]}).encode()),
            (200, b"OK", HOSTILE.encode()),
            (200, one_line, b"<html>" + one_line),
            (503, one_line, HOSTILE.encode()),
            (400, one_line, HOSTILE.encode()),
        ):
            answers.next = [answer]
            try:
                await manager.send_heartbeat()
            except Exception as error:
                refused += 1
                self.assertTrue(str(error).isprintable(), ascii(str(error)))
        self.assertGreater(refused, 5)
        answers.next = [(200, b"OK", json.dumps({"checksum_received": "beef" + HOSTILE}).encode())]
        await manager.send_inventory({"a": HOSTILE})
        await until(lambda: manager.status().queue.states == 0)
        self.check(5)
