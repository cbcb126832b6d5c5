"""What fuzzing has found, and what it has kept: every input is taken as promised, today too."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.transport import guarded
from tests.fuzz import envelopes, frames
from tests.fuzz.kit import Broken, Client, Input, nothing_wrong, promise
from tests.fuzz.targets import FINDINGS, TARGETS, findings, load, replay
from tests.websocket_kit import TEXT, RecordingHandler, close_frame, frame

ROOT = Path(__file__).resolve().parent.parent


class ReplayTests(SynchronousTestCase):
    """The inputs, without atheris."""

    def test_findings(self) -> None:
        """No input that is kept breaks a promise."""
        for name, path in findings():
            try:
                replay(name, path.read_bytes())
            except Exception as error:
                raise AssertionError(f"{path.relative_to(ROOT)} broke a promise") from error

    def test_each_target_has_some(self) -> None:
        """There are inputs for each target and for nothing else, none of them large, each with a name that says why."""
        kept = Counter(name for name, _ in findings())
        self.assertEqual(set(kept), set(TARGETS))
        self.assertGreaterEqual(min(kept.values()), 3)
        for _, path in findings():
            self.assertLess(path.stat().st_size, 8192, path)
            self.assertRegex(path.name, "^[a-z0-9-]+$")
            self.assertNotRegex(path.name, "^(crash|timeout|oom|leak)-", "name it after what it showed")

    def test_seeds(self) -> None:
        """Each target has inputs to begin with, always the same, and keeps its promises with every one of them."""
        for name in TARGETS:
            target = load(name)
            seeds = list(target.seeds())
            self.assertGreater(len(seeds), 5)
            self.assertEqual(seeds, list(target.seeds()), name)
            self.assertTrue(target.TOKENS)
            self.assertTrue(target.INSTRUMENT)
            for seed in seeds[::3]:
                target.one(seed)


class AlarmTests(SynchronousTestCase):
    """Broken promises are noticed."""

    def test_a_message_too_few(self) -> None:
        """A client whose messages get lost is not what the RFC says."""
        self.patch(RecordingHandler, "websocket_received", lambda self, connection, payload, is_text: None)
        error = self.assertRaises(Broken, frames.one, b"\x00\x00" + frame(TEXT, b"hello"))
        self.assertIn("other messages than were sent", str(error))

    def test_a_close_unheard(self) -> None:
        """Neither is one that does not hear the end."""
        self.patch(guarded.GuardedProtocol, "onCloseFrame", lambda self, code, reason: None)
        self.assertRaises(Broken, frames.one, b"\x00\x00" + close_frame(1000))

    def test_an_exception(self) -> None:
        """What autobahn raises is logged, and that is enough."""

        def fails(self: object) -> None:
            raise KeyError("bug")

        self.patch(guarded.BareProtocol, "consumeData", fails)
        self.assertRaises(Broken, frames.one, b"\x00\x00" + frame(TEXT, b"hello"))
        self.assertTrue(self.flushLoggedErrors(KeyError))

    def test_a_decoder_that_raises(self) -> None:
        """Anything but Malformed escapes."""

        def fails(*_: object) -> None:
            raise KeyError("bug")

        self.patch(envelopes, "decode_old_result", fails)
        self.assertRaises(KeyError, envelopes.one, b"\x00\x00{}")

    def test_an_unawaited_failure(self) -> None:
        """A Deferred whose failure nobody takes is found when it is collected."""
        from twisted.internet.defer import fail

        def forgets() -> None:
            with nothing_wrong(unawaited=True):
                fail(KeyError("forgotten"))

        self.assertRaises(Broken, forgets)
        self.assertTrue(self.flushLoggedErrors(KeyError))

    def test_promise(self) -> None:
        """A promise that is kept says nothing; one that is not says the facts."""
        promise(True, "fine")
        self.assertIn("no: 7", str(self.assertRaises(Broken, promise, 0, "no", 7)))


class KitTests(SynchronousTestCase):
    """What the targets stand on."""

    def test_packets(self) -> None:
        """However it is cut, all of it comes, in order; the same data is always cut the same way."""
        rest = bytes(range(200))
        for cut in range(6):
            given = Input(bytes([cut, 9]) + rest)
            packets = list(given.packets(given.rest))
            self.assertEqual((b"".join(packets), given.flags), (rest, 9))
            self.assertEqual(packets, list(given.packets(given.rest)))
            self.assertEqual(len(packets) == 1, cut == 0)
        self.assertEqual(list(Input(b"").packets(Input(b"").rest)), [])

    def test_a_client_that_does_nothing(self) -> None:
        """A client to which nothing happens stops cleanly."""
        client = Client()
        self.assertIn("stopped", str(client.finish()))

    def test_command_line(self) -> None:
        """``--replay`` says of an input whether the promises are kept; a target that does not exist is refused."""
        name, path = next(findings())
        for arguments, status, words in (
            (["--replay", str(path)], 0, "all promises were kept"),
            (["nonsense"], 2, "no such target"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", *arguments],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertIn(words, done.stdout + done.stderr)
        self.assertIn(name, TARGETS)
        self.assertTrue(FINDINGS.is_dir())
