"""The reference backend's console and control API: what they do, and whom they refuse."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory

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
            self.assertEqual("same-origin", answer.headers["cross-origin-resource-policy"])
            self.assertEqual("DENY", answer.headers["x-frame-options"])
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


class OtherPagesTests(BackendTestCase):
    """
    What a web page of somebody else's can have a browser on this machine send, line by line.

    Nothing of it may change anything, or be answered with more than a refusal; the page's own requests still work.
    """

    AGENT = b'{"machine_id":"forged"}'
    ORDER = b'{"machine_id":"m-1","type":"echo"}'
    FAULT = b'{"kind":"hang"}'
    EVIL = "Origin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\n"
    REBOUND = "Origin: http://evil.example:{port}\r\nSec-Fetch-Site: same-origin\r\n"
    UPGRADE = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )

    async def send(self, line: str, headers: str, body: bytes = b"", host: str = "127.0.0.1:{port}") -> str:
        """Send one request; return the first line of the answer."""
        head = f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        raw = await TCP4ClientEndpoint(reactor, "127.0.0.1", self.backend.port).connect(Factory.forProtocol(Raw))
        raw.wanted = b"\r\n"
        raw.transport.write(head.replace("{port}", str(self.backend.port)).encode() + body)
        answer: bytes = await raw.first
        raw.transport.abortConnection()
        await raw.gone
        return answer.partition(b"\r\n")[0].decode()

    def unchanged(self, note: object) -> None:
        self.assertEqual((), self.backend.faults.active, note)
        self.assertEqual(["m-1"], [row.machine_id for row in self.backend.ledger.machines()], note)
        self.assertEqual([], self.backend.ledger.pending("m-1"), note)

    async def test_changes(self) -> None:
        """Forms, fetch() in every mode and rebound names change nothing at the API, the agents' calls or the socket."""
        await self.start()
        await self.register("m-1")
        changes = (
            ("POST /api/commands", self.ORDER),
            ("POST /api/faults", self.FAULT),
            ("DELETE /api/faults", b""),
            ("POST /api/goaway", b"{}"),
            ("POST /api/settings", b'{"heartbeat_interval":1}'),
            ("POST /heartbeat", self.AGENT),
            ("POST /inventory", self.AGENT),
            ("POST /commands/result", b'{"id":"r","command_id":"c","status":"success"}'),
        )
        own_host, rebound = "127.0.0.1:{port}", "evil.example:{port}"
        ways = (
            ("a form", own_host, f"{self.EVIL}Content-Type: text/plain\r\n"),
            ("an encoded form", own_host, f"{self.EVIL}Content-Type: application/x-www-form-urlencoded\r\n"),
            ("fetch in the mode no-cors", own_host, f"{self.EVIL}Content-Type: text/plain;charset=UTF-8\r\n"),
            ("fetch with CORS, though it asks first", own_host, f"{self.EVIL}Content-Type: application/json\r\n"),
            ("sendBeacon of a sandboxed frame", own_host, "Origin: null\r\nContent-Type: application/json\r\n"),
            ("another port", own_host, "Origin: http://127.0.0.1:1\r\nContent-Type: application/json\r\n"),
            ("a rebound name", rebound, f"{self.REBOUND}Content-Type: application/json\r\n"),
        )
        for line, body in changes:
            for way, host, headers in ways:
                answer = await self.send(line, headers, body, host)
                self.assertIn(" 403 ", answer, (line, way))
                self.unchanged((line, way))

    async def test_preflight(self) -> None:
        """Who asks by OPTIONS whether more is allowed is refused, and hears of no origin that is."""
        await self.start()
        wish = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n"
        for path in ("/api/commands", "/api/faults"):
            self.assertIn(" 403 ", await self.send(f"OPTIONS {path}", self.EVIL + wish))
            answer = await self.call("OPTIONS", path)
            self.assertEqual(405, answer.status)
            self.assertEqual([], [name for name in answer.headers if name.startswith("access-control-")])

    async def test_reading(self) -> None:
        """Images, scripts, frames and rebound names get nothing to see, the console's own files included."""
        await self.start()
        await self.register("m-1")
        watching = self.backend.event_log._observers.copy()
        for path in ("/", "/console.js", "/api/state", "/api/stream", "/api/commands/x"):
            for way, host, headers in (
                ("an image", "127.0.0.1:{port}", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: image\r\n"),
                ("a script", "localhost:{port}", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: script\r\n"),
                ("a frame", "127.0.0.1:{port}", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: iframe\r\n"),
                ("another port", "127.0.0.1:{port}", "Sec-Fetch-Site: same-site\r\n"),
                ("an EventSource", "127.0.0.1:{port}", self.EVIL),
                ("a rebound name", "evil.example:{port}", ""),
            ):
                self.assertIn(" 403 ", await self.send(f"GET {path}", headers, host=host), (path, way))
        self.assertEqual(watching, self.backend.event_log._observers, "nobody listens to the events")
        self.unchanged("reading")

    async def test_websocket(self) -> None:
        """A browser's WebSocket is refused whatever page opens it, with and without a rebound name."""
        await self.start()
        await self.register("m-1")
        for host, origin in (
            ("127.0.0.1:{port}", "http://evil.example"),
            ("127.0.0.1:{port}", "null"),
            ("evil.example:{port}", "http://evil.example:{port}"),
            ("127.0.0.1:{port}", "http://127.0.0.1:{port}"),
        ):
            for path in ("/ws", "/", "/api/stream"):
                answer = await self.send(f"GET {path}", f"{self.UPGRADE}Origin: {origin}\r\n", host=host)
                self.assertIn(" 403 ", answer, (host, origin, path))
        self.assertIn(" 101 ", await self.send("GET /ws", self.UPGRADE))
        self.unchanged("sockets")

    async def test_own(self) -> None:
        """The console's own script, an address that was typed, and curl are let in."""
        await self.start()
        await self.register("m-1")
        own = "Origin: http://127.0.0.1:{port}\r\nSec-Fetch-Site: same-origin\r\nContent-Type: application/json\r\n"
        self.assertIn(" 200 ", await self.send("GET /", "Sec-Fetch-Site: none\r\n"))
        self.assertIn(" 200 ", await self.send("GET /api/state", "Sec-Fetch-Site: same-origin\r\n"))
        self.assertIn(" 201 ", await self.send("POST /api/commands", own, self.ORDER))
        self.assertIn(" 200 ", await self.send("POST /api/faults", "Content-Type: application/json\r\n", self.FAULT))
        self.assertIn(" 200 ", await self.send("DELETE /api/faults", own))
