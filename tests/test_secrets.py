"""
The token is in nothing that an agent writes or shows. Whole processes with ``log_level = "debug"``, the token from each
source, through refusals, rotations, failures of TLS and crashes that have the token in their text; then everything is
searched for every token there was, in every spelling.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote, quote_plus

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import CallableToken, Config, Manager, Token
from commsmgr.auth.providers import FileToken, StaticToken
from commsmgr.auth.token_command import TokenCommand
from commsmgr.backend.service import ReferenceBackend
from commsmgr.config import HTTP, Auth, Backend
from commsmgr.errors import ConfigError
from commsmgr.settings import from_toml
from tests.certificates import self_signed
from tests.loopback import Recording, listen
from tests.processes import ProcessTestCase, Program, pause, reactor, together

CARELESS = Path(__file__).parent / "careless_agent.py"
MACHINE = "m-1"

# With characters that JSON, URLs and reprs write in another way.
TOKENS = tuple(f"s3cr3t/Tok+en\"of'the\\tests%number={number}==" for number in range(3))


def spellings(token: str) -> Iterator[tuple[str, bytes]]:
    """Yield how a token may look, each with a name."""
    escaped = json.dumps(token)[1:-1]
    yield "plain", token.encode()
    yield "repr", repr(token)[1:-1].encode()
    yield "JSON", escaped.encode()
    yield "JSON in JSON", json.dumps(escaped)[1:-1].encode()
    ways = {"percent": quote(token, safe=""), "percent but for slashes": quote(token), "form": quote_plus(token)}
    for name, text in ways.items():
        yield name, text.encode()
        yield f"{name}, lower case", text.replace("%2F", "%2f").replace("%2B", "%2b").replace("%5C", "%5c").encode()
    yield "hexadecimal", token.encode().hex().encode()
    for name, encode in (("base64", b64encode), ("base64 for URLs", urlsafe_b64encode)):
        # Wherever it begins in what was encoded: the characters that depend on its neighbours are left out.
        for before in range(3):
            first = (0, 2, 3)[before]
            yield f"{name} at {before}", encode(b" " * before + token.encode())[first:-4]


def found(places: Mapping[str, bytes], tokens: tuple[str, ...] = TOKENS) -> list[str]:
    """Return in which of ``places`` there is a token, and how it is spelt."""
    return [
        f"{place}: token {number}, {name}"
        for number, token in enumerate(tokens)
        for name, spelling in spellings(token)
        for place, content in places.items()
        if spelling in content
    ]


class SearchTests(SynchronousTestCase):
    """The search finds what it is there for."""

    def test_every_spelling(self) -> None:
        """A token is found in each spelling, wherever it stands, and what only resembles one is not."""
        token = TOKENS[1]
        for leak in (
            token, repr(token), json.dumps({"a": token}), json.dumps(json.dumps(token)), quote(token, safe=""),
            f"/x?{quote_plus(token)}", quote(token), token.encode().hex(), b64encode(token.encode()).decode(),
            *(b64encode(f"{lead}Bearer {token} and more".encode()).decode() for lead in ("", "x", "xx")),
            urlsafe_b64encode(token.encode()).decode(),
        ):  # fmt: skip
            (first, *_) = found({"log": b"", "page": f"before {leak} after".encode()})
            self.assertIn("page: token", first, leak)
        self.assertEqual([], found({"log": b"s3cr3t/Tok+en [redacted]"}))


class EverythingAnAgentWrites(ProcessTestCase):
    """One agent for each source of the token."""

    timeout = 90

    async def running(
        self, name: str, auth: dict[str, Any], **environment: str
    ) -> tuple[Program, ReferenceBackend, Path]:
        """Start an agent in a directory of its own, whose first backend is an impostor; wait until it is connected."""
        impostor = listen(self, Recording(), tls=self_signed(names=["localhost"]).server_context())
        backend = ReferenceBackend(
            reactor, token=TOKENS[0], check_token_on_upgrade=True, wall=time.time, random=Random(1)
        )
        await backend.startService()
        self.addCleanup(backend.stopService)
        home = self.directory / name
        home.mkdir()
        (home / "spool").mkdir(mode=0o700)
        config = self.configuration(
            f"https://localhost:{impostor}",
            name=f"{name}.toml",
            spool={"path": str(home / "spool")},
            auth={"refused_delay": 1.0, **auth},
            breaker={"failures": 1, "open_for": 0.1},
            reconnect={"base": 0.05, "cap": 0.2},
            http={"attempts": 2},
            observe={
                "listen": "127.0.0.1:0",
                "log_level": "debug",
                "log_format": "json" if name in ("file", "command") else "text",
            },
        )
        with open(config, "a") as file:
            file.write(f'\n[[backends]]\nurl = "{backend.url}"\nname = "good"\n')
        arguments = ("-n", f"--pidfile={home}/agent.pid", f"--logfile={home}/agent.log", f"--rundir={home}")
        program = self.start(
            sys.executable, str(CARELESS), *arguments, "commsmgr", "--config", config,
            CARELESS_TOKEN=str(self.directory / "secrets" / f"{name}.told"), **environment,
        )  # fmt: skip
        while not backend.connected(MACHINE):
            assert program.code is None, program.text
            await pause(0.02)
        return program, backend, home

    async def story(self, name: str) -> None:
        secrets = self.directory / "secrets"
        source, told, answer = secrets / name, secrets / f"{name}.told", secrets / f"{name}.answer"

        def set_token(token: str) -> None:
            told.write_text(token)
            for path, content in ((source, token), (answer, json.dumps({"access_token": token, "expires_in": 3}))):
                path.with_suffix(".new").write_text(content)
                path.with_suffix(".new").replace(path)

        set_token(TOKENS[0])
        kept = {"accepted_token_file": str(secrets / f"{name}.accepted")}
        ways: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
            "file": ({"token_file": str(source), **kept}, {}),
            "environment": ({"token_env": "TOKEN_OF_THE_AGENT"}, {"TOKEN_OF_THE_AGENT": TOKENS[0]}),
            "credential": ({"token_credential": name}, {"CREDENTIALS_DIRECTORY": str(secrets)}),
            "command": ({"token_command": ["/bin/sh", "-c", f"cat {answer}; cat {answer} >&2"], **kept}, {}),
        }
        auth, environment = ways[name]
        program, backend, home = await self.running(name, auth, **environment)
        command_id = backend.send_command(MACHINE, "crash")
        self.assertEqual("error", (await self.result(backend.url, command_id))["status"])
        if name in ("file", "credential"):
            # Refused, and gone back from; then taken.
            set_token(TOKENS[1])
            await self.until_logged(home, "token.earlier")
            backend.token = TOKENS[1]
            backend.close_websocket(MACHINE, 4401)
            await self.until_logged(home, "token.refused", 2)
        elif name == "command":
            # It fails with the token in what it prints.
            answer.write_text(f"{TOKENS[1]} and more")
            told.write_text(TOKENS[0])
            await self.until_logged(home, "token.renewal-failed")
        backend.token = TOKENS[2]
        backend.close_websocket(MACHINE, 4401)
        # Over the old connection it could be given a command before it knows the new token, and that this is one.
        while backend.connected(MACHINE):
            await pause(0.02)
        await self.until_logged(home, "token.refused")
        if name != "environment":
            set_token(TOKENS[2])
            while not backend.connected(MACHINE):
                await pause(0.02)
            await self.result(backend.url, backend.send_command(MACHINE, "crash"))
        places = await self.pages(home)
        places["command line"] = Path(f"/proc/{program.transport.pid}/cmdline").read_bytes()  # type: ignore[union-attr]  # it runs
        places |= self.files(home, "while it runs")
        self.assertIn(f"{home}/spool/spool.db-wal (while it runs)", places)
        await program.end(signal.SIGTERM)
        places |= self.files(home, "afterwards")
        with closing(sqlite3.connect(home / "spool" / "spool.db")) as db:
            places["spool, row by row"] = "\n".join(db.iterdump()).encode()
        places["standard output and error"] = program.text.encode()
        log = places[f"{home}/agent.log (afterwards)"]
        for event in (b"cannot reach the vault", b"self-signed", b"token.refused", b"http.exchange", b"Traceback"):
            self.assertTrue(event in log, f"{event!r} is not in the log of {name}")
        self.assertEqual([], found(places))

    async def until_logged(self, home: Path, event: str, count: int = 1) -> None:
        """Wait for so many lines with this in them."""
        for _ in range(1000):
            if (home / "agent.log").read_text().count(event) >= count:
                return
            await pause(0.02)
        raise AssertionError(f"{event} is not {count} times in\n" + (home / "agent.log").read_text()[-3000:])

    async def pages(self, home: Path) -> dict[str, bytes]:
        """Return every page."""
        log = (home / "agent.log").read_text()
        address = log.split("site.started", 1)[1].split("127.0.0.1:", 1)[1]
        port = int("".join(character if character.isdigit() else " " for character in address[:6]).split()[0])
        paths = ("", "metrics", "status", "readyz", "healthz", "nowhere")
        pages = {f"/{path}": (await self.fetch(f"http://127.0.0.1:{port}/{path}"))[1] for path in paths}
        self.assertIn(b"commsmgr_token_refused", pages["/metrics"])
        self.assertIn(b'"auth"', pages["/status"])
        return pages

    def files(self, home: Path, when: str) -> dict[str, bytes]:
        """Return the files below ``home``, and their names."""
        paths = [path for path in home.rglob("*") if path.is_file()]
        files = {f"{path} ({when})": path.read_bytes() for path in paths}
        return files | {f"names ({when})": "\n".join(files).encode()}

    def setUp(self) -> None:
        super().setUp()
        (self.directory / "secrets").mkdir(mode=0o700)

    async def test_file_and_environment(self) -> None:
        """From a file that is rotated, and from the environment, which cannot change."""
        await together(self.story("file"), self.story("environment"))

    async def test_credential_and_command(self) -> None:
        """From a credential of systemd's, and from a command that writes the token to its standard error as well."""
        await together(self.story("credential"), self.story("command"))

    async def test_mistakes_in_the_configuration(self) -> None:
        """A token in the wrong place is refused without being shown."""
        token = TOKENS[0]
        quoted, encoded = json.dumps(token), quote(token, safe="")
        backends = '[[backends]]\nurl = "https://backend.example"\n'
        mistakes = (
            f"[[backends]]\nurl = {json.dumps(f'http://user:{token}@proxy.example:3128')}\n",
            f"[[backends]]\nurl = {json.dumps(f'socks5://{token}')}\n",
            f'{backends}websocket_url = "wss://{encoded}@backend.example"\n',
            f"{backends}[auth]\ntoken = {json.dumps(token + ' ')}\n",
            f"{backends}[auth]\ntoken = [{quoted}]\n",
            f"{backends}[auth]\ntoken_env = {quoted}\n",
            f"{backends}[auth]\ntoken_credential = {quoted}\n",
            f"{backends}[auth]\ntoken_command = {quoted}\n",
            f"{backends}[auth]\ntoken_command = [{quoted}]\n",
            f"{backends}[auth]\ntoken_command = ['/nowhere/program', {quoted}]\n",
            f"{backends}[auth]\ntoken = {quoted[:-1]}\n",
            f"{backends}[auth]\ntoken_file = {quoted}\n",
            f"{backends}[auth]\ntoken_file = {json.dumps('/' + token)}\n",
            f"{backends}[auth]\ntoken_command = [{json.dumps('/bin/program?token=' + token)}]\n",
            f"{backends}[tls]\ncertificate = {quoted}\nkey = {quoted}\n",
            f"{backends}[tls]\nca_file = {quoted}\n",
            f'{backends}[proxy]\nurl = "http://p.example:1"\nusername = "u"\npassword_file = {quoted}\n',
            f"{backends}[proxy]\nno_proxy = [{json.dumps(f'http://user:{token}@proxy.example')}]\n",
            f"{backends}[http.headers]\nX-Key = {json.dumps(token + chr(7))}\n",
            f"{backends}[http.headers]\nAuthorization = {quoted}\n",
        )
        for text in mistakes:
            with self.assertRaises(ConfigError, msg=text) as caught:
                from_toml(text, source="agent.toml", environ={})
            self.assertEqual([], found({text: f"{caught.exception} {caught.exception!r}".encode()}))
        path = self.directory / "wrong.toml"
        path.write_text(mistakes[0] + f"[auth]\ntoken = {json.dumps(token + ' ')}\n")
        program = self.twistd("commsmgr", "--config", str(path), "--check")
        self.assertEqual(1, await program.wait())
        self.assertIn("backends[0].url", program.text)
        self.assertEqual([], found({"output": program.text.encode()}))


class ReprTests(SynchronousTestCase):
    """What a debugger, a traceback or a careless log line would show."""

    def test_reprs(self) -> None:
        """No configuration, manager, provider or error shows a token, nor headers or arguments of a command."""
        token = TOKENS[0]
        auth = Auth(token=token)
        config = Config(
            backends=(Backend(url="http://127.0.0.1:9"),), auth=auth, http=HTTP(headers={"X-Key": "s3cr3t-of-a-header"})
        )
        file = Path(self.mktemp())
        file.write_text(token)
        manager = Manager(config, reactor=reactor)
        with_command = Auth(token_command=("/bin/sh", "-c", token))
        things: list[object] = [
            auth, config, config.http, with_command, manager, vars(manager), manager.status(), manager._environment,
            StaticToken(token), FileToken(file), CallableToken(lambda: token), Token(token), [Token(token, 1.0)],
            TokenCommand(with_command.token_command, reactor=reactor, wall=time.time),
            Config(backends=config.backends, auth=with_command),
        ]  # fmt: skip
        shown = {f"{type(thing).__name__} {index}": f"{thing!r} {thing}".encode() for index, thing in enumerate(things)}
        self.assertEqual([], found(shown))
        self.assertEqual([], found(shown, ("s3cr3t-of-a-header",)))
        self.assertIn("token=...", repr(auth))
        self.assertIn("token=''", repr(Auth()))
