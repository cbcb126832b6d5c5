"""The reference backend's console and control API: what they do, and whom they refuse."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.backend.api import _is_loopback
from tests.backend_kit import Answer, BackendTestCase
from tests.test_backend_websocket import Raw

JSON = {"Content_Type": "application/json"}


class ConsoleTests(BackendTestCase):
    async def test_files(self) -> None:
        """The page and its parts are served with a policy that allows nothing from elsewhere."""
        await self.start(token="s3cret")
        for path, kind in (("/", "text/html"), ("/console.css", "text/css"), ("/console.js", "text/javascript")):
            answer = await self.call("GET", path)
            self.assertEqual((200, f"{kind}; charset=utf-8"), (answer.status, answer.headers["content-type"]))
            self.assertIn("default-src 'none'", answer.headers["content-security-policy"])
            self.assertNotIn(b"http://", answer.body.replace(b"http://www.w3.org/2000/svg", b""))
            self.assertNotIn(b"https://", answer.body)
            self.assertNotIn(b"innerHTML", answer.body)

    async def test_out_of_reach_of_faults(self) -> None:
        """Whatever the fault, the console and its API go on working."""
        backend = await self.start()
        for kind in ("refuse", "hang", "html", "blackhole", "status", "slow", "crash", "malformed"):
            backend.faults.inject(kind)
        backend.faults.inject("drop", after=1)
        self.assertEqual(200, (await self.call("GET", "/")).status)
        self.assertEqual(9, len((await self.call("GET", "/api/state")).json["faults"]))
        self.assertEqual([], (await self.call("DELETE", "/api/faults")).json["faults"])


class APITests(BackendTestCase):
    async def api(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return await self.call(method, f"/api/{path}", body, **({**JSON, **headers} if body is not None else headers))

    async def test_state(self) -> None:
        """The state names the agents and how they are, and holds no token."""
        await self.start(token="s3cret")
        await self.register("m-1", token="s3cret")
        await self.register("m-2", ())
        await self.post("/heartbeat", {"machine_id": "m-3", "hostname": "h"}, Authorization="Bearer s3cret")
        answer = await self.api("GET", "state")
        self.assertNotIn(b"s3cret", answer.body)
        self.assertTrue(answer.json["token_required"])
        self.assertEqual(
            [("m-1", True, "commsmgr.v1"), ("m-2", True, "plain"), ("m-3", False, "")],
            [(agent["machine_id"], agent["connected"], agent["dialect"]) for agent in answer.json["agents"]],
        )
        self.assertEqual("h", answer.json["agents"][2]["heartbeat"]["hostname"])

    async def test_commands(self) -> None:
        """A command is given, and its state and result can be looked at."""
        await self.start()
        agent = await self.register()
        given = await self.api("POST", "commands", {"machine_id": "m-1", "type": "echo", "args": ["a"]})
        self.assertEqual(201, given.status)
        command = await agent.get("command")
        self.assertEqual((given.json["id"], ["a"]), (command["id"], command["data"]["args"]))
        path = f"commands/{command['id']}"
        self.assertEqual(("pending", None), ((state := (await self.api("GET", path)).json)["state"], state["result"]))
        agent.result(command["id"], output="out")
        await agent.get("ack")
        self.assertEqual(
            ("done", "out"), ((state := (await self.api("GET", path)).json)["state"], state["result"]["output"])
        )
        self.assertEqual(404, (await self.api("GET", "commands/none")).status)
        self.assertEqual(409, (await self.api("POST", "commands", {"machine_id": "nobody", "type": "x"})).status)
        for wrong in ({"type": "x"}, {"machine_id": "m-1", "timeout": -1}, b"nonsense", b"[" * 100_000):
            self.assertEqual(400, (await self.api("POST", "commands", wrong)).status)
        self.assertEqual(413, (await self.api("POST", "commands", b" " * ((1 << 20) + 1))).status)

    async def test_faults(self) -> None:
        """Faults begin and end."""
        backend = await self.start()
        answer = await self.api("POST", "faults", {"kind": "status", "status": 429, "count": 3})
        self.assertEqual([("status", 3)], [(one["fault"]["kind"], one["left"]) for one in answer.json["faults"]])
        await self.api("POST", "faults", {"kind": "hang", "seconds": 60})
        await self.api("DELETE", "faults/status")
        self.assertEqual(["hang"], [active.fault.kind for active in backend.faults.active])
        await self.api("DELETE", "faults")
        self.assertEqual((), backend.faults.active)
        self.assertEqual(400, (await self.api("POST", "faults", {"kind": "melt"})).status)

    async def test_goaway_and_settings(self) -> None:
        """Both reach the agents."""
        await self.start()
        agent = await self.register()
        self.assertEqual(1, (await self.api("POST", "goaway", {"window": 9})).json["agents"])
        self.assertEqual(9, (await agent.get("goaway"))["data"]["window"])
        self.assertEqual(1, (await self.api("POST", "settings", {"heartbeat_interval": 2})).json["agents"])
        self.assertEqual(2, (await agent.get("settings"))["data"]["heartbeat_interval"])

    async def test_refused(self) -> None:
        """Other sites, other names for this machine, and forms are refused; so are methods that do nothing."""
        backend = await self.start()
        hang = {"kind": "hang"}
        own = f"http://127.0.0.1:{backend.port}"
        self.assertEqual(403, (await self.api("POST", "faults", hang, Origin="http://evil.example")).status)
        self.assertEqual(403, (await self.api("DELETE", "faults", Origin="null")).status)
        self.assertEqual(415, (await self.api("POST", "faults", hang, Content_Type="text/plain")).status)
        self.assertEqual(405, (await self.api("DELETE", "state")).status)
        self.assertEqual((), backend.faults.active)
        self.assertEqual(200, (await self.api("POST", "faults", hang, Origin=own)).status)

    async def raw(self, request: bytes, wanted: bytes) -> bytes:
        """Send a request as it is; return what came up to ``wanted``."""
        raw = await TCP4ClientEndpoint(reactor, "127.0.0.1", self.backend.port).connect(Factory.forProtocol(Raw))
        raw.wanted = wanted
        raw.transport.write(request)
        received: bytes = await raw.first
        raw.transport.abortConnection()
        await raw.gone
        return received

    async def test_rebinding(self) -> None:
        """A Host header that does not name this machine is refused, on the stream too."""
        await self.start()
        for path in (b"state", b"stream"):
            request = b"GET /api/%b HTTP/1.1\r\nHost: evil.example:80\r\n\r\n" % path
            self.assertIn(b" 403 ", await self.raw(request, b"Host header"))

    async def test_stream(self) -> None:
        """The stream begins with the recent events that the client lacks and goes on with new ones."""
        backend = await self.start()
        for number in range(3):
            await self.post("/heartbeat", {"machine_id": f"m-{number}"})
        head = b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
        received = await self.raw(head % b"Last-Event-ID: 1\r\n", b'"m-2"')
        self.assertNotIn(b'"m-0"', received)
        self.assertIn(b"id: 2\ndata: {", received)
        self.assertIn(b'"m-0"', await self.raw(head % b"Last-Event-ID: 99\r\n", b'"m-2"'))
        self.assertIn(b'"m-0"', await self.raw(head % b"", b'"m-2"'))
        while backend.event_log._observers:
            await self.pause(0.01)
        backend.subscribe(lambda event: None)
        raw = await TCP4ClientEndpoint(reactor, "127.0.0.1", backend.port).connect(Factory.forProtocol(Raw))
        raw.wanted = b'"m-9"'
        raw.transport.write(head % b"Last-Event-ID: 3\r\n")
        while len(backend.event_log._observers) < 2:
            await self.pause(0.01)
        await self.post("/heartbeat", {"machine_id": "m-9"})
        await raw.first
        await backend.stopService()
        await raw.gone


class NameTests(SynchronousTestCase):
    def test_loopback(self) -> None:
        """Only the loopback's own names and addresses are this machine."""
        for name in ("localhost", "127.0.0.1", "127.9.9.9", "[::1]", "LOCALHOST"):
            self.assertTrue(_is_loopback(name), name)
        for name in ("", "10.0.0.1", "localhost.evil.example", "[fe80::1]", "0.0.0.0"):
            self.assertFalse(_is_loopback(name), name)
