"""Which proxy a connection goes through: settings, environment, and what is wrong with either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import settings
from commsmgr.config import Backend, Config, Proxy
from commsmgr.errors import ConfigError
from commsmgr.proxies import choose
from commsmgr.tap import Options
from commsmgr.urls import Target

SECRET = "p4ss:w/rd%"
ENCODED = "p4ss%3Aw%2Frd%25"

HTTPS = Target("https", "backend.example", 443, "/api")
WSS = Target("wss", "backend.example", 443, "/api/ws")
HTTP = Target("http", "backend.example", 80, "/api")
WS = Target("ws", "backend.example", 80, "/api/ws")


def chosen(target: Target, environ: Mapping[str, str], **changes: Any) -> str:
    """Return the URL of the proxy, and what named it; empty for none."""
    proxy = choose(Proxy(**changes), environ, target)
    return "" if proxy is None else f"{proxy.url} {proxy.origin}"


class Environment(SynchronousTestCase):
    """Without ``proxy.url``."""

    def test_by_scheme(self) -> None:
        """https and wss go by HTTPS_PROXY, http and ws by HTTP_PROXY, and ALL_PROXY stands in for both."""
        for target in (HTTPS, WSS, HTTP, WS):
            ours, other = ("https", "http") if target.secure else ("http", "https")
            self.assertEqual(chosen(target, {}), "")
            self.assertEqual(chosen(target, {f"{other}_proxy": "http://p:1"}), "")
            for environ, expected in (
                ({f"{ours}_proxy": "http://p:1"}, f"http://p:1 {ours}_proxy"),
                ({f"{ours.upper()}_PROXY": "http://p:1"}, f"http://p:1 {ours.upper()}_PROXY"),
                ({"all_proxy": "http://p:1"}, "http://p:1 all_proxy"),
                ({"ALL_PROXY": "http://p:1"}, "http://p:1 ALL_PROXY"),
                ({"ALL_PROXY": "http://p:2", f"{ours}_proxy": "http://p:1"}, f"http://p:1 {ours}_proxy"),
                ({f"{ours.upper()}_PROXY": "http://p:2", f"{ours}_proxy": "http://p:1"}, f"http://p:1 {ours}_proxy"),
                ({f"{ours.upper()}_PROXY": "http://p:2", f"{ours}_proxy": ""}, f"http://p:2 {ours.upper()}_PROXY"),
            ):
                self.assertEqual(chosen(target, environ), expected, environ)

    def test_beneath_a_web_server(self) -> None:
        """Where REQUEST_METHOD is set, HTTP_PROXY may be what a client sent, and does not count; the others do."""
        cgi = {"REQUEST_METHOD": "GET", "HTTP_PROXY": "http://evil:1"}
        self.assertEqual(chosen(HTTP, cgi), "")
        self.assertEqual(chosen(HTTP, cgi | {"http_proxy": "http://p:1"}), "http://p:1 http_proxy")
        self.assertEqual(chosen(HTTPS, cgi | {"HTTPS_PROXY": "http://p:1"}), "http://p:1 HTTPS_PROXY")

    def test_exceptions(self) -> None:
        """NO_PROXY in either case excepts hosts, lower case first; ``proxy.no_proxy`` does so as well."""
        proxy = {"https_proxy": "http://p:1"}
        for environ in ({"no_proxy": "backend.example"}, {"NO_PROXY": "backend.example"}):
            self.assertEqual(chosen(HTTPS, proxy | environ), "")
        self.assertNotEqual(chosen(HTTPS, proxy | {"no_proxy": "other", "NO_PROXY": "backend.example"}), "")
        self.assertEqual(chosen(HTTPS, proxy | {"no_proxy": "", "NO_PROXY": "backend.example"}), "")
        self.assertEqual(chosen(HTTPS, proxy, no_proxy=("example",)), "")

    def test_this_machine(self) -> None:
        """Loopback is reached directly, unless the settings say otherwise."""
        for host in ("localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "::1"):
            target = Target("https", host, 443, "/")
            self.assertEqual(chosen(target, {"https_proxy": "http://p:1"}), "", host)
            self.assertEqual(chosen(target, {}, url="http://p:1"), "", host)
            self.assertNotEqual(chosen(target, {}, url="http://p:1", no_proxy=()), "", host)

    def test_forms(self) -> None:
        """A scheme may be missing, a slash at the end may be there, IPv6 has brackets, https means TLS to the proxy."""
        for value, url in (
            ("p.example:3128", "http://p.example:3128"),
            ("http://p.example", "http://p.example:80"),
            ("HTTPS://p.example/", "https://p.example:443"),
            ("http://[fd00::1]:3128/", "http://[fd00::1]:3128"),
            ("user:pw@p.example:3128", "http://p.example:3128"),
        ):
            self.assertEqual(chosen(HTTPS, {"https_proxy": value}), f"{url} https_proxy", value)

    def test_credentials(self) -> None:
        """User and password are percent-decoded, may contain an @, and show in no repr."""
        for value in (f"http://us%40er:{ENCODED}@p.example:3128", f"http://us@er:{ENCODED}@p.example:3128"):
            proxy = choose(Proxy(), {"https_proxy": value}, HTTPS)
            assert proxy is not None
            self.assertEqual((proxy.username, proxy.password), ("us@er", SECRET))
            for shown in (repr(proxy), str(proxy), f"{proxy}", proxy.url):
                self.assertNotIn("p4ss", shown)

    def test_unusable(self) -> None:
        """What cannot be used is a mistake of that variable, and its value is not repeated."""
        for value, words in (
            ("socks5://user:p4ss@p:1080", "SOCKS is not supported"),
            ("ftp://user:p4ss@p:1", "expected http:// or https://, found ftp"),
            ("http://user:p4ss@p:99999", "port"),
            ("http://user:p4ss/x@p:3128", "%2F"),
            ("http://user:p4ss@", "no host"),
            ("http://user:p4ss@p:3128/path", "ends with its port"),
            ("http://us%3Aer:p4ss@p:1", "colon"),
            ("http://user:p4ss%0d%0a@p:1", "control characters"),
            ("http://user:p4ss%ff@p:1", "UTF-8"),
        ):
            error = self.assertRaises(ConfigError, choose, Proxy(), {"HTTPS_PROXY": value}, HTTPS)
            self.assertEqual((error.key, error.source), ("HTTPS_PROXY", "environment"))
            self.assertIn(words, str(error))
            self.assertNotIn("p4ss", str(error))

    def test_not_looked_at(self) -> None:
        """With a proxy of its own, or with ``environment = false``, the environment says nothing."""
        self.assertEqual(chosen(HTTPS, {"https_proxy": "http://p:1"}, environment=False), "")
        environ = {"https_proxy": "garbage://", "no_proxy": "*"}
        self.assertEqual(chosen(HTTPS, environ, url="https://own.example:8443"), "https://own.example:8443 proxy.url")

    def test_unusable_but_not_used(self) -> None:
        """A value that concerns no backend of ours is nobody's mistake."""
        environ = {"https_proxy": "socks5://p", "http_proxy": "http://p:1", "no_proxy": "backend.example"}
        self.assertEqual(chosen(HTTPS, environ), "")


class Rules(SynchronousTestCase):
    """Mistakes are told at the start, with their keys."""

    def lines(self, text: str, environ: Mapping[str, str] | None = None, url: str = "https://b.example") -> list[str]:
        """Return what is said of a configuration."""
        text = f'[[backends]]\nurl = "{url}"\n{text}'
        error = self.assertRaises(ConfigError, settings.from_toml, text, source="agent.toml", environ=environ or {})
        return str(error).splitlines()

    def test_settings(self) -> None:
        """Each mistake in ``[proxy]`` is named with its key."""
        for text, expected in (
            ('url = "socks5://p:1"', "agent.toml: proxy.url: SOCKS is not supported; expected http:// or https://"),
            ('url = "p:1"', "agent.toml: proxy.url: expected http:// or https://, found p"),
            (
                'url = "http://u:p4ss@p:1"',
                "agent.toml: proxy.url: user and password belong in proxy.username and proxy.password_file",
            ),
            ('url = "http://p:1/x"', "agent.toml: proxy.url: a proxy's URL ends with its port"),
            ('username = "u"', "agent.toml: proxy.username: is of no use without proxy.url"),
            (
                'url = "http://p:1"\nusername = "u:v"',
                "agent.toml: proxy.username: the user's name may not contain a colon",
            ),
            (
                'url = "http://p:1"\nusername = "u"\npassword_file = "/nowhere/pw"',
                "agent.toml: proxy.password_file: /nowhere/pw cannot be read: No such file or directory",
            ),
            (
                'url = "http://p:1"\nusername = "u"\npassword_file = "p4ss"',
                "agent.toml: proxy.password_file: the file cannot be read: No such file or directory",
            ),
            (
                'no_proxy = ["a.example", "a b"]',
                (
                    "agent.toml: proxy.no_proxy[1]: expected a host name, an IP address, a network such as 10.0.0.0/8, "
                    'or *, each perhaps with :port, found "a b"'
                ),
            ),
        ):
            self.assertEqual(self.lines(f"[proxy]\n{text}"), [expected])

    def test_a_setting_that_is_not_needed(self) -> None:
        """A mistake in ``proxy.url`` is one while no backend needs a proxy, too: the next one may."""
        for url in ("socks5://p:1", "http://u:p4ss@p:1"):
            (line,) = self.lines(f'[proxy]\nurl = "{url}"', url="http://127.0.0.1:1")
            self.assertTrue(line.startswith("agent.toml: proxy.url: "), line)
            self.assertNotIn("p4ss", line)

    def test_password_file(self) -> None:
        """A password belongs to somebody, and its file is a file."""
        path = self.mktemp()
        with open(path, "w") as file:
            file.write("pw")
        self.assertEqual(
            self.lines(f'[proxy]\nurl = "http://p:1"\npassword_file = "{path}"'),
            ["agent.toml: proxy.password_file: is of no use without proxy.username"],
        )
        directory = os.path.dirname(os.path.abspath(path))
        self.assertEqual(
            self.lines(f'[proxy]\nurl = "http://p:1"\nusername = "u"\npassword_file = "{directory}"'),
            [f"agent.toml: proxy.password_file: {directory} cannot be read: it is no regular file"],
        )

    def test_relative_password_file(self) -> None:
        """twistd looks for the file where it was called, whatever directory the daemon changes to later."""
        name = self.mktemp()
        for path, text in (
            (name, "pw"),
            (
                f"{name}.toml",
                (
                    f'[[backends]]\nurl = "https://b.example"\n[proxy]\nurl = "http://p:1"\nusername = "u"\n'
                    f'password_file = "{name}"\n'
                ),
            ),
        ):
            with open(path, "w") as file:
                file.write(text)
        options = Options()
        options.parseOptions(["--config", f"{name}.toml"])
        self.assertEqual(options.config.proxy.password_file, os.path.abspath(name))

    def test_environment(self) -> None:
        """A variable that cannot be used is named, once, whatever the number of backends."""
        environ = {"HTTPS_PROXY": "socks5://user:p4ss@p:1080"}
        self.assertEqual(
            self.lines("", environ),
            ["environment: HTTPS_PROXY: SOCKS is not supported; expected http:// or https://"],
        )
        code = Config(backends=(Backend(url="https://b.example"),))
        error = self.assertRaises(ConfigError, settings.check, code, environ=environ)
        self.assertEqual((error.key, error.source), ("HTTPS_PROXY", "environment"))

    def test_backend_that_is_wrong(self) -> None:
        """A backend whose URL is wrong is told of by its own rule alone."""
        (line,) = self.lines("", {"https_proxy": "socks5://p"}, url="nonsense")
        self.assertIn("backends[0].url", line)
