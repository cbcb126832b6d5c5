"""Configuration: every mistake is named with file, key and what was expected, and no secret is ever repeated."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Mapping
from typing import Annotated

import msgspec
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config, reference, settings
from commsmgr.config import TLS, Auth, Backend, Config
from commsmgr.errors import ConfigError

BACKENDS = '[[backends]]\nurl = "https://backend.example/api"\n'
SECRET = "s3cr3t-t0ken"


class Case(SynchronousTestCase):
    """Helpers of all cases here."""

    def read(self, text: str, environ: Mapping[str, str] | None = None) -> Config:
        return settings.from_toml(text, source="agent.toml", environ=environ or {})

    def refused(self, text: str, environ: Mapping[str, str] | None = None) -> ConfigError:
        """Read ``text``, which must be refused, without the secret being repeated."""
        error = self.assertRaises(ConfigError, self.read, text, environ)
        self.assertNotIn(SECRET, str(error) + repr(error))
        return error

    def lines(self, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
        return str(self.refused(text, environ)).splitlines()

    def file(self, content: bytes | str) -> str:
        path = os.path.join(self.mktemp())
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return os.path.abspath(path)


class Reading(Case):
    """Files and text that are right."""

    def test_smallest(self) -> None:
        """One backend's URL is a whole configuration; everything else has its default."""
        self.assertEqual(self.read(BACKENDS), Config(backends=(Backend(url="https://backend.example/api"),)))

    def test_every_section(self) -> None:
        """Values arrive in the section and with the type that they were written for."""
        read = self.read(
            BACKENDS + '[http]\ntimeout = 7\nheaders = {X-Site = "a b"}\n[commands]\nsafe_to_repeat = ["ping"]'
        )
        self.assertEqual(read.http.timeout, 7.0)
        self.assertIs(type(read.http.timeout), float)
        self.assertEqual(read.http.headers, {"X-Site": "a b"})
        self.assertEqual(read.commands.safe_to_repeat, ("ping",))

    def test_load(self) -> None:
        """A file is read as UTF-8, and its name is the source of mistakes."""
        path = self.file(BACKENDS)
        self.assertEqual(settings.load(path, {}).backends[0].url, "https://backend.example/api")
        wrong = self.file("nonsense = 1\n" + BACKENDS)
        self.assertEqual(self.assertRaises(ConfigError, settings.load, wrong, {}).source, wrong)

    def test_unreadable(self) -> None:
        """A file that is missing, a directory, or not text is refused with the reason."""
        for path, reason in (
            ("/nowhere/agent.toml", "No such file"),
            (tempfile.gettempdir(), "directory"),
            (self.file(b"\xff\xfe"), "not UTF-8"),
        ):
            error = self.assertRaises(ConfigError, settings.load, path, {})
            self.assertTrue(str(error).startswith(f"{path}: cannot be read: "), str(error))
            self.assertIn(reason, str(error))

    def test_syntax(self) -> None:
        """A syntax error names the line; nothing that TOML cannot hold escapes as another exception."""
        self.assertIn("line 2", str(self.refused("[http]\ntimeout 3\n")))
        for text in ("a = " + "9" * 5000, "a = " + "[" * 100_000, 'a = "\x00"'):
            self.assertIn("not valid TOML", str(self.refused(text)))


class Shape(Case):
    """Values against types."""

    def one(self, text: str, key: str, *parts: str) -> None:
        """Exactly one mistake, at ``key``, and its sentence has all of ``parts``."""
        error = self.refused(text)
        self.assertEqual((error.source, error.key, error.others), ("agent.toml", key, ()), str(error))
        self.assertTrue(str(error).startswith(f"agent.toml: {key}: "), str(error))
        for part in parts:
            self.assertIn(part, str(error))

    def test_unknown_key(self) -> None:
        """An unknown key is answered with the nearest valid one, the table it belongs in, or those that are valid."""
        self.one("intervall = 1\n" + BACKENDS, "intervall", "unknown key", "valid here: backends, machine_id")
        self.one(BACKENDS + "[heartbeat]\nintervall = 1", "heartbeat.intervall", "did you mean interval?")
        self.one(BACKENDS + "[spool]\nMAX-BYTES = 1", "spool.MAX-BYTES", "did you mean max_bytes?")
        self.one(BACKENDS + "token_file = 1", "backends[0].token_file", "it belongs in [auth]")
        self.one(BACKENDS + '["a b\\n"]', '"a b\\n"', "unknown key")

    def test_missing(self) -> None:
        """What must be given is asked for, with its meaning."""
        self.one("", "backends", "missing", "a list of tables")
        self.one('[[backends]]\nname = "a"', "backends[0].url", "missing", "base URL")
        self.one("backends = []", "backends", "at least 1", "found 0")

    def test_wrong_type(self) -> None:
        """A value of another type is quoted beside what was expected."""
        self.one(
            BACKENDS + '[http]\ntimeout = "30s"', "http.timeout", "a number of seconds above 0", 'the string "30s"'
        )
        self.one(BACKENDS + "[http]\nattempts = 2.5", "http.attempts", "a whole number from 1 to 100", "found 2.5")
        self.one(BACKENDS + "[http]\nattempts = true", "http.attempts", "found true")
        self.one(BACKENDS + "[http]\ncompress = 2026-01-01", "http.compress", "true or false", "a date")
        self.one(BACKENDS + "[commands]\nsafe_to_repeat = [1]", "commands.safe_to_repeat", "a list of strings")
        self.one(BACKENDS + "[http.headers]\nA = 1", "http.headers", "a table of strings", "a table")
        self.one("http = 3\n" + BACKENDS, "http", "expected a table", "found 3")
        self.one("[backends]\nurl = 'https://a'", "backends", "written [[backends]]", "found a table")
        self.one(BACKENDS + "[spool]\npath = []", "spool.path", "a string", "found a list")

    def test_out_of_range(self) -> None:
        """A number out of its range, infinity and not-a-number are refused with the range in words."""
        for value in ("0", "-1", "3601", "nan", "inf", "-inf", "1e400"):
            self.one(BACKENDS + f"[http]\ntimeout = {value}", "http.timeout", "above 0 and at most 3600 (1 h)")
        self.one(BACKENDS + "[http]\nmax_response_bytes = 0", "http.max_response_bytes", "bytes from 1 to", "1 TiB")

    def test_choices(self) -> None:
        """A value that is not one of the choices is answered with the choices."""
        self.one(BACKENDS + '[tls]\nminimum_version = "1.1"', "tls.minimum_version", '"1.2" or "1.3"', '"1.1"')
        self.one(BACKENDS + "[tls]\nminimum_version = 1.2", "tls.minimum_version", "found 1.2")

    def test_patterns(self) -> None:
        """A pattern is checked, and a trailing newline does not slip past its end."""
        self.one(BACKENDS + 'name = "a b"', "backends[0].name", "a string matching")
        self.one(BACKENDS + 'name = "a\\n"', "backends[0].name")
        self.one('machine_id = "a\\r"\n' + BACKENDS, "machine_id")
        self.one('agent_version = "1\\u0000"\n' + BACKENDS, "agent_version", "control characters")

    def test_all_at_once(self) -> None:
        """All mistakes are reported together, a line each, and each is there as an error of its own."""
        error = self.refused("[http]\ntimeout = 0\nattempts = 0\n[auht]")
        self.assertEqual(
            [error.key, *(other.key for other in error.others)], ["http.timeout", "http.attempts", "auht", "backends"]
        )
        lines = str(error).splitlines()
        self.assertEqual(len(lines), 4)
        self.assertTrue(all(line.startswith("agent.toml: ") for line in lines))

    def test_no_number_option_takes_nan(self) -> None:
        """Not-a-number passes careless comparisons: no option with a range accepts it."""
        for section in reference.sections():
            for option in section.options:
                if option.expected.startswith("a number"):
                    table = f"[{section.name}]\n" if section.name else ""
                    self.assertRaises(ConfigError, self.read, f"{table}{option.name} = nan\n{BACKENDS}")

    def test_secrets_are_not_quoted(self) -> None:
        """A wrong value where a secret may stand is described, never quoted."""
        self.one(f'{BACKENDS}[auth]\ntoken = ["{SECRET}"]', "auth.token", "found a list")
        self.one(f"{BACKENDS}[auth]\ntoken = 12345678", "auth.token", "found a number")
        self.one(f'{BACKENDS}[http]\nheaders = "{SECRET}"', "http.headers", "found a string")
        self.assertNotIn("12345678", str(self.refused(f"{BACKENDS}[auth]\ntoken = 12345678")))


class Urls(Case):
    """Rules for the addresses of backends."""

    def test_bad_url(self) -> None:
        """A URL that cannot be used is refused with the reason, one with a password without quoting it."""
        for url, part in (
            ("backend.example", "http:// or https://"),
            ("ftp://backend.example", "found ftp"),
            ("https://", "no host"),
            ("https://backend.example:0", "port"),
            (f"https://user:{SECRET}@backend.example", "[auth]"),
            (f"https://user:x@backend.example:{SECRET}", "[auth]"),
            ("https://backend.example/#a", "fragment"),
            ("https://backend.example/a b", "blanks"),
        ):
            error = self.refused(f'[[backends]]\nurl = "{url}"')
            self.assertEqual(error.key, "backends[0].url")
            self.assertIn(part, str(error))
        error = self.refused(BACKENDS + 'websocket_url = "https://backend.example/ws"')
        self.assertEqual(error.key, "backends[0].websocket_url")
        self.assertIn("ws:// or wss://", str(error))

    def test_token_in_the_clear(self) -> None:
        """No source of a token goes with plain http or ws to another machine, unless that is allowed explicitly."""
        clear = '[[backends]]\nurl = "http://backend.example"\n'
        mixed = '[[backends]]\nurl = "http://127.0.0.1:1"\nwebsocket_url = "ws://backend.example/ws"\n'
        file = self.file(SECRET)
        for text, key in ((clear, "backends[0].url"), (mixed, "backends[0].websocket_url")):
            for auth, environ in (
                (f'[auth]\ntoken = "{SECRET}"', {}),
                (f'[auth]\ntoken_file = "{file}"', {}),
                ('[auth]\ntoken_env = "T"', {"T": SECRET}),
                ("", {"COMMSMGR_TOKEN": SECRET}),
                ("", {"COMMSMGR_TOKEN_FILE": file}),
            ):
                error = self.refused(text + auth, environ)
                self.assertEqual((error.key, error.others), (key, ()))
                self.assertIn("unencrypted to backend.example", str(error))
                self.read(f"{text}insecure = true\n{auth}", environ)
            self.read(text)
        config_ = Config(backends=(Backend(url="http://backend.example"),))
        self.assertRaises(ConfigError, settings.check, config_, token_provider=True)
        settings.check(config_)

    def test_loopback_needs_no_permission(self) -> None:
        """On the same machine a token may travel in the clear."""
        for host in ("127.0.0.1:1", "localhost", "[::1]:80"):
            self.read(f'[[backends]]\nurl = "http://{host}"\n[auth]\ntoken = "{SECRET}"')

    def test_weaker_websocket(self) -> None:
        """A WebSocket without TLS beside HTTP with TLS is taken for a slip, even without a token."""
        text = BACKENDS + 'websocket_url = "ws://backend.example/ws"\n'
        error = self.refused(text)
        self.assertEqual((error.key, error.others), ("backends[0].websocket_url", ()))
        self.assertIn("wss://", str(error))
        self.read(text + "insecure = true")
        self.read(BACKENDS + 'websocket_url = "ws://localhost/ws"\n')

    def test_names_differ(self) -> None:
        """Two backends with one name, given or derived, would share their metrics."""
        error = self.refused(BACKENDS + BACKENDS.replace("/api", "/other"))
        self.assertEqual(error.key, "backends[1].name")
        self.assertIn('"backend.example:443" is also the name of backends[0]', str(error))
        self.read(BACKENDS + BACKENDS.replace("/api", '/other"\nname = "b'))

    def test_derived(self) -> None:
        """Targets and names follow from the settings of a backend."""
        backend = Backend(url="https://backend.example/api/?a=b")
        self.assertEqual(settings.http_target(backend).join("/heartbeat"), "https://backend.example/api/heartbeat?a=b")
        self.assertEqual(settings.websocket_target(backend).join(""), "wss://backend.example/api/ws?a=b")
        self.assertEqual(settings.backend_name(backend), "backend.example:443")
        plain = Backend(url="http://[::1]:8080", websocket_url="wss://other.example/x", name="one")
        self.assertEqual(settings.websocket_target(plain).join(""), "wss://other.example/x")
        self.assertEqual(settings.websocket_target(Backend(url=plain.url)).join(""), "ws://[::1]:8080/ws")
        self.assertEqual(settings.backend_name(plain), "one")
        self.assertEqual(settings.backend_name(Backend(url=plain.url)), "[::1]:8080")


class Tokens(Case):
    """Where the token comes from, and what it may be."""

    def test_bad_tokens(self) -> None:
        """From whatever source, a token that would break or smuggle headers is refused and not quoted."""
        for value, part in (
            ("", "empty"),
            (SECRET + "\r\nX: y", "control characters"),
            (SECRET + "\x00", "control characters"),
            (SECRET + " b", "blanks"),
            (SECRET + "é", "outside ASCII"),
            (SECRET * 2000, "longer"),
        ):
            path = self.file(value)
            for auth, environ, source, key in (
                (f"[auth]\ntoken = {reference.toml(value)}", {}, "agent.toml", "auth.token"),
                (f'[auth]\ntoken_file = "{path}"', {}, "agent.toml", "auth.token_file"),
                ('[auth]\ntoken_env = "T"', {"T": value}, "agent.toml", "auth.token_env"),
                ("", {"COMMSMGR_TOKEN": value}, "environment", "COMMSMGR_TOKEN"),
                ("", {"COMMSMGR_TOKEN_FILE": path}, "environment", "COMMSMGR_TOKEN_FILE"),
            ):
                error = self.refused(BACKENDS + auth, environ)
                self.assertEqual((error.source, error.key, error.others), (source, key, ()), str(error))
                self.assertIn(part, str(error))

    def test_file_ends_with_newline(self) -> None:
        """Line breaks at the end of the file, which editors add, are no part of the token."""
        path = self.file(f"{SECRET}\r\n")
        self.assertEqual(self.read(f'{BACKENDS}[auth]\ntoken_file = "{path}"').auth.token_file, path)

    def test_missing_source(self) -> None:
        """A file that cannot be read or a missing variable is named, but not if it may be the token itself."""
        self.assertIn(
            "/nowhere/token cannot be read: No such",
            str(self.refused(f'{BACKENDS}[auth]\ntoken_file = "/nowhere/token"')),
        )
        self.assertIn("NO_TOKEN is not in", str(self.refused(f'{BACKENDS}[auth]\ntoken_env = "NO_TOKEN"')))
        self.refused(f'{BACKENDS}[auth]\ntoken_file = "{SECRET}"')
        self.refused(f'{BACKENDS}[auth]\ntoken_env = "{SECRET}"')

    def test_one_source(self) -> None:
        """Two sources are one too many, also when one of them is code."""
        error = self.refused(f'{BACKENDS}[auth]\ntoken = "{SECRET}"\ntoken_env = "T"', {"T": SECRET})
        self.assertIn("expected one source of the token, found 2: auth.token, auth.token_env", str(error))
        given = Config(backends=(Backend(url="https://a"),), auth=Auth(token=SECRET))
        self.assertIn(
            "a token provider", str(self.assertRaises(ConfigError, settings.check, given, token_provider=True))
        )
        error = self.refused(BACKENDS, {"COMMSMGR_TOKEN": SECRET, "COMMSMGR_TOKEN_FILE": "/x"})
        self.assertEqual(error.source, "environment")

    def test_environment(self) -> None:
        """The environment gives the token when the file names none, and the result holds only where to find it."""
        read = self.read(BACKENDS, {"COMMSMGR_TOKEN": SECRET})
        self.assertEqual(read.auth, Auth(token_env="COMMSMGR_TOKEN"))
        self.assertNotIn(SECRET, repr(read))
        path = self.file(SECRET)
        self.assertEqual(self.read(BACKENDS, {"COMMSMGR_TOKEN_FILE": path}).auth, Auth(token_file=path))
        named = self.read(f'{BACKENDS}[auth]\ntoken = "{SECRET}"', {"COMMSMGR_TOKEN": "other"})
        self.assertEqual(named.auth, Auth(token=SECRET))

    def test_empty_variable(self) -> None:
        """A variable that is set and empty is a failed substitution, not the wish to have no token."""
        for name in ("COMMSMGR_TOKEN", "COMMSMGR_TOKEN_FILE"):
            error = self.refused(BACKENDS, {name: ""})
            self.assertEqual((error.source, error.key), ("environment", name))
            self.assertIn("empty", str(error))
        for name in ("token", "token_file", "token_env", "token_credential"):
            self.assertIn(f"auth.{name}: is empty", str(self.refused(f'{BACKENDS}[auth]\n{name} = ""')))
        command = f"{BACKENDS}[auth]\ntoken_command = []"
        self.assertIn("auth.token_command: is empty", str(self.refused(command, {"COMMSMGR_TOKEN": SECRET})))

    def test_credential(self) -> None:
        """A credential of systemd's is looked for where systemd puts it; each way to miss it is told."""
        directory = os.path.abspath(self.mktemp())
        os.mkdir(directory)
        for name, content in (("good", SECRET), ("bad", f"{SECRET} and more")):
            with open(os.path.join(directory, name), "w") as file:
                file.write(content)
        environ = {"CREDENTIALS_DIRECTORY": directory}
        text = BACKENDS + '[auth]\ntoken_credential = "{}"'
        self.assertEqual("good", self.read(text.format("good"), environ).auth.token_credential)
        for name, variables, words in (
            ("good", {}, "has no CREDENTIALS_DIRECTORY"),
            ("good", {"CREDENTIALS_DIRECTORY": ""}, "not started by systemd"),
            (SECRET, environ, "LoadCredential="),
            ("bad", environ, f"the token in {directory}/bad contains blanks"),
            (f"../{SECRET}", environ, "without a directory"),
            ("..", environ, "without a directory"),
        ):
            error = self.refused(text.format(name), variables)
            self.assertEqual("auth.token_credential", error.key)
            self.assertIn(words, str(error))

    def test_command(self) -> None:
        """A command is a list whose first word can be run; what follows may be secret."""
        for command in ('["/bin/sh", "-c", "x"]', '["sh"]'):
            self.read(f"{BACKENDS}[auth]\ntoken_command = {command}")
        for command, words in (
            (f'["/nowhere/program", "{SECRET}"]', "/nowhere/program is no program"),
            (f'["{SECRET} and more"]', "its first word is no program"),
            ('["/etc/passwd"]', "can be run here"),
            (f'["sh", "{SECRET}\\n"]', "control characters"),
            (f'"sh -c {SECRET}"', "expected a list"),
        ):
            error = self.refused(f"{BACKENDS}[auth]\ntoken_command = {command}")
            self.assertEqual("auth.token_command", error.key)
            self.assertIn(words, str(error))

    def test_accepted_token_file(self) -> None:
        """It may lie beside the spool, which need not be there yet, but takes no other file's place."""
        directory = os.path.abspath(self.mktemp())
        token = self.file(SECRET)
        password = self.file("of-the-proxy")
        proxy = f'[proxy]\nurl = "http://proxy.example:1"\nusername = "u"\npassword_file = "{password}"\n'
        spool = f'{proxy}[spool]\npath = "{directory}"\n[auth]\ntoken_file = "{token}"\naccepted_token_file = '
        for path in (f"{directory}/accepted", os.path.abspath(self.mktemp())):
            self.assertEqual(path, self.read(f'{BACKENDS}{spool}"{path}"').auth.accepted_token_file)
        for path, words in (
            (f"{directory}/spool.db", "the spool's own files"),
            ("/nowhere/accepted", "/nowhere is no directory"),
            (token, "a file of its own"),
            (os.path.dirname(token), "a file of its own"),
            ("/dev/null", "a file of its own"),
            (password, "a file of its own"),
        ):
            error = self.refused(f'{BACKENDS}{spool}"{path}"')
            self.assertEqual("auth.accepted_token_file", error.key)
            self.assertIn(words, str(error))

    def test_accepted_tokens_in_the_configuration(self) -> None:
        """The file of the configuration itself is not written over."""
        path = os.path.abspath(self.mktemp())
        with open(path, "w") as file:
            file.write(f'{BACKENDS}[auth]\ntoken = "{SECRET}"\naccepted_token_file = "{path}"\n')
        error = self.assertRaises(ConfigError, settings.load, path, {})
        self.assertEqual("auth.accepted_token_file", error.key)

    def test_accepted_tokens_without_a_token(self) -> None:
        """Who gives no token any more does not have one shown that an earlier configuration has left in a file."""
        text = f'[auth]\naccepted_token_file = "{os.path.abspath(self.mktemp())}"\n'
        error = self.refused(f"{BACKENDS}{text}")
        self.assertEqual("auth.accepted_token_file", error.key)
        self.assertIn("without a token", str(error))
        self.assertTrue(self.read(f"{BACKENDS}{text}", {"COMMSMGR_TOKEN": SECRET}).auth.accepted_token_file)


class OtherRules(Case):
    """TLS files, header fields, ranges, what is observed."""

    def test_tls_files(self) -> None:
        """Files that TLS needs must be readable, and go together."""
        path = self.file("PEM")
        self.read(f'{BACKENDS}[tls]\nca_file = "{path}"\ncertificate = "{path}"\nkey = "{path}"\nca_exclusive = true')
        for name in ("ca_file", "certificate", "key"):
            good = {"certificate": path, "key": path}
            lines = "".join(f'{option} = "{value}"\n' for option, value in {**good, name: "/nowhere"}.items())
            error = self.refused(f"{BACKENDS}[tls]\n{lines}")
            self.assertIn(f"tls.{name}: /nowhere cannot be read: No such file", str(error))
        for text, sentence in (
            (f'key = "{path}"', "tls.key: is of no use without tls.certificate"),
            (f'certificate = "{path}"', "tls.certificate: is of no use without tls.key"),
            ("ca_exclusive = true", "tls.ca_exclusive: without tls.ca_file"),
        ):
            self.assertIn(sentence, str(self.refused(f"{BACKENDS}[tls]\n{text}")))

    def test_pins(self) -> None:
        """A pin is one that curl takes too: another digest, another length or what no encoder makes is a mistake."""
        good, other = f"sha256//{'A' * 43}=", f"sha256//{'B' * 42}A="
        self.assertEqual(self.read(f'{BACKENDS}[tls]\npins = ["{good}", "{other}"]').tls.pins, (good, other))
        for wrong in (
            "",
            "A" * 43 + "=",
            f"sha1//{'A' * 27}=",
            f"sha256//{'A' * 43}",
            f"sha256//{'A' * 42}==",
            f"sha256//{'A' * 42}B=",  # bits are set that belong to no byte
            f"sha256//{'A' * 42}-=",
            f"{good};{other}",
            "sha256//" + "00" * 32,
        ):
            error = self.refused(f'{BACKENDS}[tls]\npins = ["{other}", "{wrong}"]')
            self.assertIn("tls.pins[1]: expected sha256// and a SHA-256 in base64, found", str(error))
        error = self.refused(f'{BACKENDS}[tls]\npins = ["{good}", "{other}", "{good}"]')
        self.assertIn("tls.pins[2]: is the same as tls.pins[0]", str(error))

    def test_files_that_are_none(self) -> None:
        """A pipe, on which the check would wait for ever, a device or a directory is not taken for a file."""
        pipe = os.path.abspath(self.mktemp())
        os.mkfifo(pipe)
        good = self.file("PEM")
        for path in (pipe, "/dev/null", os.path.dirname(pipe)):
            # The test ends, if need be, when somebody writes.
            writer = threading.Timer(5, lambda path=path: os.close(os.open(path, os.O_RDWR)))
            writer.start()
            for section, name in (("auth", "token_file"), ("tls", "ca_file"), ("tls", "certificate"), ("tls", "key")):
                keys = {"certificate": good, "key": good} if section == "tls" else {}
                lines = "".join(f'{option} = "{value}"\n' for option, value in {**keys, name: path}.items())
                error = self.refused(f"{BACKENDS}[{section}]\n{lines}")
                self.assertIn(f"{section}.{name}: {path} cannot be read: it is no regular file", str(error))
            writer.cancel()
            writer.join()

    def test_files_that_cannot_be(self) -> None:
        """Half a surrogate pair is in no file's name, and is told with the option."""
        sections = {
            "auth.token_file": {"auth": config.Auth(token_file="/tmp/\ud800")},
            "tls.ca_file": {"tls": config.TLS(ca_file="/tmp/\ud800")},
            "proxy.password_file": {"proxy": config.Proxy(url="http://p", username="u", password_file="/tmp/\ud800")},
        }
        for option, section in sections.items():
            backends = (config.Backend(url="https://h"),)
            error = self.assertRaises(ConfigError, settings.check, config.Config(backends=backends, **section))
            self.assertIn(option, str(error))
            self.assertIn("a file cannot have such a name", str(error))
            str(error).encode()

    def test_configuration_from_a_pipe(self) -> None:
        """The configuration itself may come through a pipe, for it is read once."""
        readable, writable = os.pipe()
        self.addCleanup(os.close, readable)
        os.write(writable, BACKENDS.encode())
        os.close(writable)
        self.assertEqual(1, len(settings.load(f"/dev/fd/{readable}", {}).backends))

    def test_headers(self) -> None:
        """Header fields that would be smuggled in, or that the transports set, are refused without their values."""
        for name, value, part in (
            ("X-A", f"{SECRET}\\r\\nB: c", "ASCII"),
            ("X-A", f" {SECRET}", "blanks at its ends"),
            ("X-A", f"{SECRET}é", "ASCII"),
            ("X A", SECRET, "not a valid name"),
            ("", SECRET, "not a valid name"),
            ("X\\r\\nA", SECRET, "not a valid name"),
            ("authorization", SECRET, "belongs in [auth]"),
            ("HOST", SECRET, "set by commsmgr itself"),
            ("Content-Length", SECRET, "set by commsmgr itself"),
            ("Sec-WebSocket-Key", SECRET, "set by commsmgr itself"),
        ):
            error = self.refused(f'{BACKENDS}[http.headers]\n"{name}" = "{value}"')
            self.assertTrue(error.key.startswith("http.headers."), error.key)
            self.assertIn(part, str(error))
        self.assertIn("given twice", str(self.refused(f'{BACKENDS}[http.headers]\nX-A = "1"\nx-a = "2"')))
        self.read(f'{BACKENDS}[http.headers]\nX-A = ""\nX-B = "a b"')

    def test_ranges_between_options(self) -> None:
        """A lower bound above its upper bound is nonsense."""
        self.assertIn(
            "reconnect.base: expected at most reconnect.cap, which is 5, found 10",
            str(self.refused(BACKENDS + "[reconnect]\nbase = 10\ncap = 5")),
        )
        self.read(BACKENDS + "[reconnect]\nbase = 5\ncap = 5")
        self.assertIn("commands.default_timeout", str(self.refused(BACKENDS + "[commands]\nmax_timeout = 1")))
        self.assertIn("spool.path: is empty", str(self.refused(BACKENDS + '[spool]\npath = ""')))
        self.read(BACKENDS + '[spool]\npath = ""\ndurability = "memory"')

    def test_listen(self) -> None:
        """An address to listen on is host and port."""
        for good, pair in (
            ("127.0.0.1:0", ("127.0.0.1", 0)),
            ("[::1]:9464", ("::1", 9464)),
            ("localhost:65535", ("localhost", 65535)),
        ):
            self.assertEqual(settings.listen_address(good), pair)
            self.read(f'{BACKENDS}[observe]\nlisten = "{good}"')
        for bad in (
            "9464",
            ":9464",
            "localhost",
            "localhost:",
            "::1:9464",
            "[localhost]:1",
            "a:b",
            "a:65536",
            "a:-1",
            "a:١",
        ):
            error = self.refused(f'{BACKENDS}[observe]\nlisten = "{bad}"')
            self.assertEqual(error.key, "observe.listen")

    def test_listen_on_a_name(self) -> None:
        """A name is no address to listen on, which is said here and not by the start, however public it is to be."""
        for name in ("agent.example", "*", "1.2.3.400"):
            for public in ("true", "false"):
                error = self.refused(f'{BACKENDS}[observe]\nlisten = "{name}:9464"\npublic = {public}\n')
                self.assertIn("expected an IP address or localhost", str(error))

    def test_published(self) -> None:
        """The status page is on loopback, unless it is said in so many words that all may see it."""
        for address in ("0.0.0.0", "[::]", "192.0.2.7", "[2001:db8::1]", "[::ffff:192.0.2.7]"):
            text = f'{BACKENDS}[observe]\nlisten = "{address}:9464"\n'
            error = self.refused(text)
            self.assertEqual((error.key, error.others), ("observe.listen", ()))
            self.assertIn("is not loopback", str(error))
            self.assertIn("observe.public = true", str(error))
            self.read(f"{text}public = true\n")
        for address in ("127.0.0.1", "127.8.9.10", "localhost", "[::1]", "[::ffff:127.0.0.1]"):
            self.read(f'{BACKENDS}[observe]\nlisten = "{address}:9464"\n')

    def test_redact(self) -> None:
        """A pattern that is none, or that would replace everything, is refused with its place."""
        error = self.refused(BACKENDS + '[redaction]\npatterns = ["a+", "(", "x*", "(a+)+$"]')
        keys = [f"redaction.patterns[{index}]" for index in (1, 2, 3)]
        self.assertEqual([error.key, *(other.key for other in error.others)], keys)
        self.assertIn("not a regular expression", str(error))
        self.assertIn("empty string", str(error.others[0]))
        self.assertIn("for ever", str(error.others[1]))
        self.read(BACKENDS + '[redaction]\npatterns = ["\\\\d+\\t"]')

    def test_redacted_keys(self) -> None:
        """A name of a secret must have a word in it, or it would be found everywhere or nowhere."""
        error = self.refused(BACKENDS + '[redaction]\nkeys = ["pin", "--"]')
        self.assertEqual((error.key, error.others), ("redaction.keys[1]", ()))


class FromCode(Case):
    """Structs that code built, which msgspec does not check by itself."""

    def check(self, **values: object) -> Config:
        return settings.check(Config(**{"backends": (Backend(url="https://a"),), **values}), environ={})  # type: ignore[arg-type]  # wrong on purpose

    def test_normal_form(self) -> None:
        """Lists become tuples and whole numbers seconds, as if they had come from a file."""
        checked = self.check(backends=[Backend(url="https://a")], http=config.HTTP(timeout=3))
        self.assertIsInstance(checked.backends, tuple)
        self.assertIs(type(checked.http.timeout), float)
        self.assertEqual(settings.check(checked), checked)

    def test_mistakes(self) -> None:
        """The same mistakes are found as in a file, and named as code's."""
        for values, key in (
            ({"backends": ()}, "backends"),
            ({"backends": (Backend(url=3),)}, "backends[0].url"),  # type: ignore[arg-type]  # wrong on purpose
            ({"backends": None}, "backends"),
            ({"http": None}, "http"),
            ({"http": object()}, "http"),
            ({"http": config.HTTP(timeout=-1)}, "http.timeout"),
            ({"http": config.HTTP(timeout=b"1")}, "http.timeout"),  # type: ignore[arg-type]  # wrong on purpose
            ({"auth": Auth(token=SECRET.encode())}, "auth.token"),  # type: ignore[arg-type]  # wrong on purpose
            ({"auth": Auth(token_env="T")}, "auth.token_env"),
            ({"tls": TLS(ca_exclusive=True)}, "tls.ca_exclusive"),
            # Half a surrogate pair, which the environment may hand out for what is not UTF-8.
            ({"observe": config.Observe(log_level="\udcff")}, "observe.log_level"),  # type: ignore[arg-type]  # wrong on purpose
            ({"backends": (Backend(url="https://\udcff"),)}, "backends[0].url"),
        ):
            error = self.assertRaises(ConfigError, self.check, **values)
            self.assertEqual((error.source, error.key), ("code", key), str(error))
            self.assertNotIn(SECRET, str(error))

    def test_not_a_config(self) -> None:
        """Anything but a Config is a mistake too."""
        self.assertRaises(ConfigError, settings.check, "https://a")


class Reference(Case):
    """The reference and the example say what the structs say."""

    def test_example_is_valid(self) -> None:
        """The example can be used as it is, and changes nothing but what it must."""
        self.assertEqual(self.read(reference.example()), self.read(BACKENDS))

    def test_example_shows_the_defaults(self) -> None:
        """Every option is in the example, and uncommenting them all gives the defaults."""
        text = re.sub(r"^#(?=[a-z_]+ = )", "", reference.example(), flags=re.MULTILINE)
        # A source of tokens that is written and empty is a mistake.
        text = re.sub(r'^token(_\w+)? = (""|\[\])$', "", text, flags=re.MULTILINE)
        self.assertEqual(self.read(text), self.read(BACKENDS))
        for section in reference.sections():
            for option in section.options:
                self.assertIn(f"\n#{option.name} = " if option.default else f"\n{option.name} = ", reference.example())

    def test_reference_is_complete(self) -> None:
        """Every option of every section is in the reference with its default, range and meaning."""
        text = reference.reference()
        count = 0
        for field in reference.fields(Config):
            for option in reference.fields(field.table) if field.table else [field]:
                count += 1
                self.assertIn(f"   * - ``{option.name}``", text)
                self.assertTrue(option.meaning, f"{option.name} has no description")
        self.assertEqual(count, text.count("   * - ``"))
        self.assertIn("a number of seconds above 0 and at most 3600 (1 h)\n     - ``30.0``\n", text)
        self.assertIn("``8388608`` (8 MiB)", text)
        self.assertIn("     - *required*", text)

        class Uneven(msgspec.Struct):
            wait: Annotated[float, msgspec.Meta(extra_json_schema={"unit": "s"})] = 90.0

        self.assertIn("     - ``90.0``\n", reference.reference(Uneven))

    def test_markup(self) -> None:
        """What means something to reStructuredText does not, in the reference."""

        class Inner(msgspec.Struct):
            """Two * three, ``literal`` and `code`, a|b, x_."""

        self.assertIn("Two \\* three, ``literal`` and ``code``, a\\|b, x\\_.", reference.reference(Inner))

    def test_toml(self) -> None:
        """Defaults are written as TOML reads them."""
        for value in (True, 1, 1.0, 0.25, 'a"\n\\', ["a", "b"], {"a b": "c"}, 1e-07):
            written = reference.toml(value)
            self.assertEqual(__import__("tomllib").loads(f"a = {written}")["a"], value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PATHS = [(s.name, o.name) for s in reference.sections() for o in s.options]


class Hostile(Case):
    """No value whatever gives anything but a configuration or a ConfigError."""

    @hypothesis_settings(max_examples=300, deadline=None, database=None)
    @given(st.sampled_from(PATHS), VALUES)
    def test_any_value_anywhere(self, path: tuple[str, str], value: object) -> None:
        """Any value at any option is accepted or refused in words; what was accepted is accepted again."""
        section, name = path
        tables: dict[str, object] = {"backends": [{"url": "https://a"}]}
        if section == "backends":
            tables["backends"] = [{"url": "https://a", name: value}]
        elif section:
            tables[section] = {name: value}
        else:
            tables[name] = value
        try:
            parsed = settings._convert(tables, "agent.toml")
            checked = settings.check(parsed, environ={})
        except ConfigError as error:
            self.assertTrue(str(error).startswith(("agent.toml: ", "code: ")))
        else:
            self.assertEqual(settings.check(checked, environ={}), checked)
