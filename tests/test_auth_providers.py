"""Tests for where the bearer token comes from."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.auth import providers
from commsmgr.auth.providers import CallableToken, FileToken, NoToken, StaticToken, from_config
from commsmgr.bearer import Token, check_token, expiry
from commsmgr.config import Auth
from commsmgr.errors import ConfigError, TokenError
from commsmgr.interfaces import TokenProvider

SECRET = "s3cr3t.T0KEN-value"

UNUSABLE = ("", " ", "a b", "a\r\nX: y", "a\n", "a\r", "a\0", "a\x7f", "tøken", "a\x85", "a\u2028", "\ta", "x" * 20000)


class CheckTokenTests(SynchronousTestCase):
    def test_usable(self) -> None:
        """Visible ASCII passes unchanged: b64token and the tokens that are not."""
        for token in (SECRET, "abc==", "a:b;c,d", "!~", "x" * 16384):
            self.assertEqual(check_token(token), token)

    def test_unusable(self) -> None:
        """Whatever could end the header or the value, or is no ASCII, is refused, without being shown."""
        for token in UNUSABLE:
            error = self.assertRaises(TokenError, check_token, token)
            if len(token) > 2:
                self.assertNotIn(token, str(error))


class FixedTests(SynchronousTestCase):
    def test_static(self) -> None:
        """A static token is itself, also after it was refused."""
        provider = StaticToken(SECRET)
        provider.refused(SECRET)
        self.assertEqual(self.successResultOf(provider.get()), SECRET)

    def test_static_is_checked(self) -> None:
        """A static token that cannot be sent is refused at once, not at the first request."""
        for token in UNUSABLE:
            self.assertRaises(TokenError, StaticToken, token)

    def test_none(self) -> None:
        """Without a token the empty string says that no header is sent."""
        provider = NoToken()
        provider.refused("")
        self.assertEqual(self.successResultOf(provider.get()), "")

    def test_reprs(self) -> None:
        """No provider shows its token."""
        path = Path(self.mktemp())
        path.write_text(SECRET)
        file = FileToken(path)
        self.successResultOf(file.get())
        providers: list[TokenProvider] = [StaticToken(SECRET), file, CallableToken(lambda: SECRET), NoToken()]
        for provider in providers:
            self.assertNotIn(SECRET, repr(provider) + str(provider))
        self.assertIn(str(path), repr(file))
        self.assertNotIn(SECRET, repr(Token(SECRET)) + str(Token(SECRET)))


class FileTokenTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.path.write_bytes(b"first\n")
        self.provider = FileToken(self.path)
        self.logged: list[LogEvent] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: LogEvent) -> None:
        if event.get("event") == "token.file-unusable":
            self.logged.append(event)

    def get(self) -> str:
        return self.successResultOf(self.provider.get())

    def reads(self) -> list[None]:
        """Return a list that grows by one with each reading of the file."""
        reads: list[None] = []
        self.patch(providers, "check_token", lambda token: reads.append(None) or check_token(token))
        return reads

    def test_line_breaks_are_stripped(self) -> None:
        """Editors and echo end a file with a line break, of either kind; it is not part of the token."""
        for content in (b"first", b"first\n", b"first\r\n", b"first\n\n"):
            self.path.write_bytes(content)
            self.assertEqual(FileToken(str(self.path)).get().result, "first")

    def test_unchanged_is_not_read_again(self) -> None:
        """A file that looks the same is read once."""
        reads = self.reads()
        self.assertEqual([self.get(), self.get(), self.get()], ["first"] * 3)
        self.assertEqual(len(reads), 1)

    def test_rewritten(self) -> None:
        """A file written anew gives the new token, by its size or by its time alone."""
        self.get()
        self.path.write_bytes(b"second\n")
        self.assertEqual(self.get(), "second")
        before = self.path.stat()
        self.path.write_bytes(b"third!\n")
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        self.assertEqual(self.get(), "third!")

    def test_replaced(self) -> None:
        """Another file in its place gives the new token, even with the same size and time."""
        self.get()
        other = Path(self.mktemp())
        other.write_bytes(b"other\n")
        before = self.path.stat()
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(self.path)
        self.assertEqual(self.get(), "other")

    def test_symlink_swapped(self) -> None:
        """Orchestrators swap a symbolic link: what it points to is what counts."""
        link = Path(self.mktemp())
        link.symlink_to(self.path.absolute())
        provider = FileToken(link)
        self.assertEqual(self.successResultOf(provider.get()), "first")
        target = Path(self.mktemp())
        target.write_bytes(b"moved\n")
        fresh = Path(self.mktemp())
        fresh.symlink_to(target.absolute())
        fresh.replace(link)
        self.assertEqual(self.successResultOf(provider.get()), "moved")

    def test_refused_is_read_again(self) -> None:
        """After a 401 the file is read even if it does not look changed."""
        self.get()
        before = self.path.stat()
        self.path.write_bytes(b"fresh\n")
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(self.get(), "first")
        self.provider.refused("first")
        self.assertEqual(self.get(), "fresh")

    def test_trouble_keeps_the_last_good(self) -> None:
        """While the file is missing, empty, garbage, huge or a directory the last good token stays; said once."""

        def directory() -> None:
            self.path.unlink()
            self.path.mkdir()

        self.get()
        troubles: tuple[Callable[[], object], ...] = (
            self.path.unlink,
            lambda: self.path.write_bytes(b""),
            lambda: self.path.write_bytes(b"\n"),
            lambda: self.path.write_bytes(b"half a \xff"),
            lambda: self.path.write_bytes(b"x" * 100_000),
            directory,
        )
        for trouble in troubles:
            trouble()
            self.assertEqual([self.get(), self.get()], ["first"] * 2)
        self.assertEqual(len(self.logged), 1)
        self.assertEqual(self.logged[0]["path"], str(self.path))

    def test_recovers(self) -> None:
        """When the file is good again it is used, and the next trouble is told again."""
        self.get()
        for good in (b"second\n", b"third\n"):
            self.path.unlink()
            self.get()
            self.path.write_bytes(good)
            self.assertEqual(self.get(), good.decode().strip())
        self.assertEqual(len(self.logged), 2)

    def test_back_unchanged(self) -> None:
        """The very file that was away for a moment is read again when it is back."""
        self.get()
        away = Path(self.mktemp())
        self.path.rename(away)
        self.get()
        away.rename(self.path)
        self.assertEqual(self.get(), "first")
        self.assertEqual(len(self.logged), 1)

    def test_never_good(self) -> None:
        """Without any good token the error names the file and what is wrong, and nothing of its content."""
        self.path.unlink()
        error = self.failureResultOf(self.provider.get(), TokenError).value
        self.assertIn(str(self.path), str(error))
        self.assertIn("No such file", str(error))
        self.path.write_bytes(SECRET.encode() + b" and more")
        error = self.failureResultOf(self.provider.get(), TokenError).value
        self.assertNotIn(SECRET, str(error))
        self.assertTrue(error.retryable)
        self.path.write_bytes(b"late\n")
        self.assertEqual(self.get(), "late")
        self.assertEqual(self.logged, [])

    def test_pipe(self) -> None:
        """A named pipe is refused instead of blocking the reactor until somebody writes."""
        self.path.unlink()
        os.mkfifo(self.path)
        error = self.failureResultOf(self.provider.get(), TokenError).value
        self.assertIn("regular file", str(error))


class CallableTokenTests(SynchronousTestCase):
    def test_str(self) -> None:
        """A plain function gives the token at once."""
        self.assertEqual(self.successResultOf(CallableToken(lambda: SECRET).get()).value, SECRET)

    def test_token(self) -> None:
        """A function that knows when the token ends says so; a Token's own end is not asked for then."""
        for given in (Token(SECRET, 7.0), Token(jwt(b'{"exp":99}'), 7.0)):
            for func in (lambda given=given: given, lambda given=given: succeed(given)):
                self.assertEqual(self.successResultOf(CallableToken(func).get()), given)
        self.assertEqual(self.successResultOf(CallableToken(lambda: jwt(b'{"exp":99}')).get()).expires_at, 99)
        self.assertEqual(self.successResultOf(CallableToken(lambda: Token(jwt(b'{"exp":99}'))).get()).expires_at, 99)

    def test_deferred(self) -> None:
        """A function may return a Deferred."""
        waiting: Deferred[str] = Deferred()
        token = CallableToken(lambda: waiting).get()
        self.assertNoResult(token)
        waiting.callback(SECRET)
        self.assertEqual(self.successResultOf(token), Token(SECRET))

    def test_coroutine(self) -> None:
        """A function may be a coroutine function."""

        async def func() -> str:
            return await succeed(SECRET)

        self.assertEqual(self.successResultOf(CallableToken(func).get()), Token(SECRET))

    def test_called_each_time(self) -> None:
        """Each token is asked for anew, so a refusal needs no further step."""
        tokens = iter(("one", "two"))
        provider = CallableToken(lambda: next(tokens))
        self.assertEqual(self.successResultOf(provider.get()).value, "one")
        provider.refused("one")
        self.assertEqual(self.successResultOf(provider.get()).value, "two")

    def test_raises(self) -> None:
        """An exception becomes a TokenError that names its type, but not its text, which could show a secret."""

        def func() -> str:
            raise LookupError(SECRET)

        error = self.failureResultOf(CallableToken(func).get(), TokenError).value
        self.assertIn("LookupError", str(error))
        self.assertNotIn(SECRET, str(error))

    def test_own_token_error(self) -> None:
        """A TokenError of the agent's own passes as it is."""
        mine = TokenError("vault is sealed")

        def func() -> str:
            raise mine

        self.assertIdentical(self.failureResultOf(CallableToken(func).get()).value, mine)

    def test_unusable(self) -> None:
        """What the callable gives is checked like any other token; an empty one does not mean none."""
        for token in UNUSABLE:
            self.failureResultOf(CallableToken(lambda token=token: token).get(), TokenError)
        for other in (None, 7, succeed(None), succeed(b"bytes"), Token(SECRET + "\n"), Token(b"x"), Token("x", "y")):
            self.failureResultOf(CallableToken(lambda other=other: other).get(), TokenError)

    def test_cancel(self) -> None:
        """Cancelling cancels what the callable is waiting for."""
        cancelled: list[object] = []
        waiting: Deferred[str] = Deferred(cancelled.append)
        token = CallableToken(lambda: waiting).get()
        token.cancel()
        self.assertEqual(cancelled, [waiting])
        self.failureResultOf(token, CancelledError)


def configured(auth: Auth, environ: dict[str, str]) -> Any:
    """Return the provider for ``auth``; one of commands gives the command's first word."""
    return from_config(auth, environ, command=lambda argv: StaticToken(argv[0]))


class FromConfigTests(SynchronousTestCase):
    def get(self, auth: Auth, environ: dict[str, str] | None = None) -> str:
        return self.successResultOf(configured(auth, environ or {}).get())

    def test_none(self) -> None:
        """Without any source no header is sent."""
        self.assertEqual(self.get(Auth()), "")

    def test_sources(self) -> None:
        """Each source gives its token."""
        path = Path(self.mktemp())
        path.write_text("from-file\n")
        self.assertEqual(self.get(Auth(token="direct")), "direct")
        self.assertEqual(self.get(Auth(token_file=str(path))), "from-file")
        self.assertEqual(self.get(Auth(token_env="TOKEN"), {"TOKEN": "from-env", "OTHER": "x"}), "from-env")
        self.assertEqual(self.get(Auth(token_command=("from-command", "x"))), "from-command")
        environ = {"CREDENTIALS_DIRECTORY": str(path.parent.absolute())}
        self.assertEqual(self.get(Auth(token_credential=path.name), environ), "from-file")

    def test_credential(self) -> None:
        """A credential of systemd's needs its directory, and a name that cannot leave it."""
        for name, environ in (
            ("token", {}),
            ("token", {"CREDENTIALS_DIRECTORY": "relative"}),
            ("../token", {"CREDENTIALS_DIRECTORY": "/run"}),
            ("..", {"CREDENTIALS_DIRECTORY": "/run"}),
        ):
            error = self.assertRaises(ConfigError, configured, Auth(token_credential=name), environ)
            self.assertEqual(error.key, "auth.token_credential")

    def test_missing_file(self) -> None:
        """A token file may come after the start, as everything else may."""
        self.failureResultOf(configured(Auth(token_file="/nonexistent/token"), {}).get(), TokenError)

    def test_missing_variable(self) -> None:
        """The environment cannot change: a missing variable is a mistake in the configuration, named with its key."""
        error = self.assertRaises(ConfigError, configured, Auth(token_env="TOKEN"), {})
        self.assertEqual(error.key, "auth.token_env")
        self.assertIn("TOKEN", str(error))

    def test_unusable(self) -> None:
        """A token that cannot be sent is a mistake in the configuration, named with its key and not shown."""
        error = self.assertRaises(ConfigError, configured, Auth(token=SECRET + "\n"), {})
        self.assertEqual(error.key, "auth.token")
        self.assertNotIn(SECRET, str(error))
        for value in ("", "a b"):
            error = self.assertRaises(ConfigError, configured, Auth(token_env="TOKEN"), {"TOKEN": value})
            self.assertEqual(error.key, "auth.token_env")

    def test_more_than_one(self) -> None:
        """Two sources are a mistake, named by their keys."""
        error = self.assertRaises(ConfigError, configured, Auth(token=SECRET, token_file="/x"), {})
        self.assertIn("token and token_file", str(error))
        self.assertNotIn(SECRET, str(error))


def jwt(payload: bytes) -> str:
    """Return an unsigned JSON Web Token with ``payload``."""
    return ".".join(urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"none"}', payload, b"sig"))


class ExpiryTests(SynchronousTestCase):
    def test_exp(self) -> None:
        """The claim is returned, whole or with a fraction, whatever the length of the padding."""
        for filling in range(4):
            payload = b'{"sub":"' + b"x" * filling + b'","exp":1700000000}'
            self.assertEqual(expiry(jwt(payload)), 1_700_000_000.0)
        self.assertEqual(expiry(jwt(b'{"exp":1.5}')), 1.5)

    def test_url_alphabet(self) -> None:
        """The payload is in the URL-safe alphabet of base64 (RFC 7515 section 2)."""
        token = jwt(b'{"sub":"???>>>~~~","exp":7}')
        self.assertTrue(set("-_") & set(token))
        self.assertEqual(expiry(token), 7.0)

    def test_anything_else(self) -> None:
        """What is no JSON Web Token, or has no such claim, expires nobody knows when; nothing is raised."""
        for token in (
            "", SECRET, "a.b.c", "..", "a.b.c.d", "a.é.c", jwt(b""), jwt(b"{}"), jwt(b"[]"), jwt(b'{"exp":null}'),
            jwt(b'{"exp":"soon"}'), jwt(b'{"exp":true}'), jwt(b'{"exp":1e999}'), jwt(b'{"exp":' + b"9" * 5000 + b"}"),
            jwt(b'{"x":' + b"[" * 100_000), jwt(b"\xff"),
        ):  # fmt: skip
            self.assertIsNone(expiry(token), token[:60])
