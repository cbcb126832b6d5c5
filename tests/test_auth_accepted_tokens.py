"""The file that keeps accepted tokens: what is read, what is not, and how it is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.auth.accepted_tokens import AcceptedTokens
from commsmgr.bearer import Token
from commsmgr.policy.tokens import Route

HTTP, WEBSOCKET = Route("main", "http"), Route("main", "websocket")
PLACES = {"main": "https://main.example wss://main.example", "a": "https://a.example wss://a.example"}
KEPT = {HTTP: Token("s3cr3t-one", 7.5), WEBSOCKET: Token("s3cr3t-two")}


class AcceptedTokensTests(SynchronousTestCase):
    """One file."""

    def setUp(self) -> None:
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        self.path = directory / "accepted"
        self.file = AcceptedTokens(str(self.path), maybeDeferred, PLACES)
        self.logged: list[str] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: LogEvent) -> None:
        if event.get("event") == "token.accepted-file-unusable":
            self.logged.append(formatEvent(event))

    def complaint(self) -> str:
        """Return the one line that was logged."""
        (line,) = self.logged
        self.logged.clear()
        self.assertNotIn("s3cr3t", line)
        return line

    def test_round_trip(self) -> None:
        """What was kept is there after a restart, in a file that nobody else may read, and nothing lies beside it."""
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.file.keep(KEPT)
        self.assertEqual(AcceptedTokens(str(self.path), maybeDeferred, PLACES).load(), KEPT)
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.assertEqual(os.listdir(self.path.parent), ["accepted"])
        self.assertNotIn("s3cr3t", repr(self.file))

    def test_another_place(self) -> None:
        """A backend that has got the name of another one, or its own by another scheme, is not shown what was kept."""
        self.file.keep(KEPT)
        for place in ("https://other.example wss://other.example", "http://main.example ws://main.example"):
            self.assertEqual(AcceptedTokens(str(self.path), maybeDeferred, {"main": place}).load(), {}, place)
        self.assertEqual(AcceptedTokens(str(self.path), maybeDeferred, {"renamed": PLACES["main"]}).load(), {})
        self.assertEqual(self.logged, [])
        self.assertEqual(self.file.load(), KEPT)

    def test_nothing(self) -> None:
        """No file is no mistake, and with nothing to keep there is none."""
        self.assertEqual(self.file.load(), {})
        self.file.keep(KEPT)
        self.file.keep({})
        self.assertFalse(self.path.exists())
        self.file.keep({})
        self.assertEqual(self.logged, [])

    def test_not_ours(self) -> None:
        """A symbolic link, a pipe, a directory, a file for others, or somebody else's is not read, and told of."""

        def link() -> None:
            real = self.path.with_name("real")
            self.path.rename(real)
            self.path.symlink_to(real)

        def pipe() -> None:
            self.path.unlink()
            os.mkfifo(self.path, 0o600)

        def directory() -> None:
            self.path.unlink()
            self.path.mkdir(0o700)

        cases: dict[str, Callable[[], object]] = {
            "symbolic link": link,
            "regular file": pipe,
            "no regular file": directory,
            "should be 0600": lambda: self.path.chmod(0o640),
            "its mode": lambda: self.path.chmod(0o604),
            "others": lambda: self.path.chmod(0o602),
        }
        for words, change in cases.items():
            self.setUp()
            self.file.keep(KEPT)
            change()
            self.assertEqual(self.file.load(), {}, words)
            self.assertIn(words, self.complaint())
        self.setUp()
        self.file.keep(KEPT)
        self.patch(os, "geteuid", lambda: 12345)
        self.assertEqual(self.file.load(), {})
        self.assertIn("another user", self.complaint())

    def test_damaged(self) -> None:
        """Whatever else is in there is told of without being quoted."""
        for content in (
            b"", b"s3cr3t", b"{}", b"[1]", b'[{"backend":"s3cr3t"}]', b"\xff", b"[" * 100_000,
            b'[{"backend":"a","transport":"http","token":"s3cr3t\\nX: 1","place":"https://a.example wss://a.example"}]',
            b'[{"backend":"a","transport":"http","token":"s3cr3t","expires_at":"soon"}]',
        ):  # fmt: skip
            self.path.write_bytes(content)
            self.path.chmod(0o600)
            self.assertEqual(self.file.load(), {})
            self.assertIn("damaged", self.complaint())

    def test_written_over(self) -> None:
        """What lies in the way is replaced, not followed: neither the file nor a left-over of an earlier write."""
        victim = self.path.with_name("victim")
        victim.write_text("mine")
        self.path.symlink_to(victim)
        Path(f"{self.path}.new").symlink_to(victim)
        self.file.keep(KEPT)
        self.assertEqual((victim.read_text(), self.path.is_symlink()), ("mine", False))
        self.assertEqual(self.file.load(), KEPT)

    def test_no_file_in_its_place(self) -> None:
        """What is no file, such as a device, is left where it is, for the superuser could replace that too."""
        os.mkfifo(self.path)
        self.file.keep(KEPT)
        self.assertIn("not written: something that is no file", self.complaint())
        self.assertTrue(stat.S_ISFIFO(self.path.lstat().st_mode))
        self.assertEqual(os.listdir(self.path.parent), ["accepted"])

    def test_cannot_be_written(self) -> None:
        """A directory that is gone is told of, and the next write is tried again."""
        self.path.parent.rmdir()
        self.file.keep(KEPT)
        self.assertIn("not written: No such file", self.complaint())
        self.path.parent.mkdir()
        self.file.keep(KEPT)
        self.assertEqual(self.file.load(), KEPT)

    def test_one_write_at_a_time(self) -> None:
        """While a write is under way the latest of what follows waits, and whoever wants to know when all is done."""
        pending: list[tuple[Callable[[], None], Deferred[None]]] = []

        def in_thread(write: Callable[[], None]) -> Deferred[None]:
            pending.append((write, done := Deferred()))
            return done

        file = AcceptedTokens(str(self.path), in_thread, PLACES)
        self.successResultOf(Deferred.fromCoroutine(file.written()))
        for value in ("a", "b", "c"):
            file.keep({HTTP: Token(value)})
        written = [Deferred.fromCoroutine(file.written()) for _ in range(2)]
        for count in (1, 2):
            self.assertEqual(len(pending), count)
            for each in written:
                self.assertNoResult(each)
            write, done = pending[-1]
            write()
            done.callback(None)
        for each in written:
            self.successResultOf(each)
        self.assertEqual(file.load(), {HTTP: Token("c")})
        self.assertEqual(len(pending), 2)
