"""An operator's regular expressions: which are refused, and that the others cannot hang the agent."""

from __future__ import annotations

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.patterns import MARK, PATIENCE, WINDOW, Pattern, mistake


def still() -> float:
    return 0.0


class MistakeTests(SynchronousTestCase):
    """Which expressions are taken."""

    def test_dangerous(self) -> None:
        """What can take for ever on some text is refused, and the sentence says what to do."""
        for pattern in (
            r"(a+)+$", r"(a|a)*b", r"(a|ab)+c", r"(\w+\s?)*x", r"(x+x+)+y", r"(.*)*q", r"((ab)*c*)*d",
            r"(a{1,3}){1,50}x", r"(?:a?){50}b", r"[^x]*\w+y", r"[a-f]+[e-z]+1",
            r"\w+\w+@", r"(\d+)(\d*)x", r".*a.*b", r"(?=(a+)+b)c", r"(a)?(?(1)(b+)+|c)d",
            r"(?:a{1,16}){1,16}b", r"(?:\w{1,15}\s?){1,16}!", r"(?:\d{1,3},?){1,12}kr", r"(.*?,){11}P",
            "a{0,16}" * 8 + "b", "a?" * 26 + "a" * 26, r"(?:a?){16}(?:a?){16}b", r"(?i)(?:Ab|aB)*c", r"(\w+)\1\1x",
            r"\w+a\w+b", r"\S+@\S+\.\S+", r"(?:[а-я]{1,15} ?){1,16}!", r"(?i:(?:[a-j]{1,9}[A-J]?){9})!",
            r"(?>(?:a{1,16}){1,16}b)", r"(?=(?:a{1,16}){1,16}b)c",
        ):  # fmt: skip
            self.assertIn("possessive", mistake(pattern), pattern)

    def test_harmless(self) -> None:
        """What operators write is taken, as are the same possessively."""
        for pattern in (
            r"eyJ[\w-]+\.[\w-]+\.[\w-]+", r"\b\d{13,16}\b", r"[\w.]+@[\w.]+\.\w+", r"patient=\d+", r"(?:foo|bar)+",
            r"(a|b)+c", r"([A-Z]{4}-?){4}", r"(?:\w++\s?+)*+x", r"(?>a+)+b", r"\w++\w+@", r"secret[^=]*+=.*",
            r"(?i)pin\s*[:=]\s*\d+", r"[a-f]+[0-9]+x", r"[^\s=]+\s*=x",
            r"(?:\d{1,3}\.){3}\d{1,3}", r"\d{1,3}(?:,\d{3})*", r"(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
            r"(?:\d[ -]*?){13,16}", r"-----BEGIN [A-Z ]+-----[^-]*+-----END", r".{0,9}key.{0,9}=.{0,9};",
            r"(?i)(?:bearer|basic)\s+[\w.=+/-]+", r"\+?\d{1,3}[ -]?\(?\d{2,4}\)?[ -]?\d{3,4}[ -]?\d{3,4}",
            r"(?:foo|far){1,9}", r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}",
            r"(?:[0-9a-f]{2}[:-]?){6}", r"\s+$", r"(?:a{1,16}){1,16}+b", r"[а-я]+\s*:\s*\d+x",
        ):  # fmt: skip
            self.assertEqual(mistake(pattern), "", pattern)

    def test_none(self) -> None:
        """What is no expression, or matches everywhere, is refused."""
        self.assertIn("not a regular expression", mistake("("))
        for pattern in ("x*", "", "a|"):
            self.assertIn("empty string", mistake(pattern))


class PatternTests(SynchronousTestCase):
    """What they do to texts."""

    def test_windows(self) -> None:
        """In a long text a match of up to half a window is found wherever it stands; a longer one goes whole."""
        pattern = Pattern(r"key-[a-f0-9]{64}-\w+", still)
        secret = "key-" + "0a" * 32 + "-" + "z" * 200
        for at in range(0, 3 * WINDOW, 97):
            text = "." * at + secret + "." * (3 * WINDOW)
            shown = pattern(text)
            self.assertEqual(shown, "." * at + MARK + "." * (3 * WINDOW), at)
        long = "key-" + "0a" * 32 + "-" + "z" * 5 * WINDOW
        self.assertEqual(pattern(f"{long} {'.' * WINDOW}"), f"{MARK} {'.' * WINDOW}")

    def test_patience(self) -> None:
        """When it takes too long the rest is withheld, and said to be."""
        clock = iter(range(1000))
        shown = Pattern("secret", lambda: next(clock) * PATIENCE * 0.6)("secret " + "x" * 10 * WINDOW)
        self.assertTrue(shown.startswith(f"{MARK} xxx"))
        left = re.search(r"x\[redacted: (\d+) characters, as a pattern took too long\]$", shown)
        assert left is not None
        self.assertGreater(int(left[1]), 7 * WINDOW)
        self.assertLess(len(shown), 3 * WINDOW)

    def test_bounded_time(self) -> None:
        """An expression that is quadratic on a megabyte made for it ends soon, where it would take hours."""
        pattern = Pattern(r"[\w.]+@[\w.]+\.\w+", time.thread_time)
        began = time.process_time()
        shown = pattern("a" * (1 << 20))
        self.assertLess(time.process_time() - began, 10 * PATIENCE)
        self.assertTrue(shown.startswith("a"))

    def test_bounded_time_for_a_window(self) -> None:
        """A text that is too short to be cut is through in seconds as well, though it is made for the expression."""
        for expression, text in ((r"\s+$", " " * WINDOW + "x"), (r"(?:a|ab)?(?:\w{0,9}){2}x\w+!", "a" * WINDOW)):
            self.assertEqual("", mistake(expression), expression)
            began = time.process_time()
            Pattern(expression, time.thread_time)(text)
            self.assertLess(time.process_time() - began, 10 * PATIENCE, expression)

    @settings(deadline=None)
    @given(st.text("ab1 \n", max_size=60), st.sampled_from([r"\d+", r"a\w*b", "redacted", "[a-z]+"]))
    def test_twice(self, text: str, expression: str) -> None:
        """Nothing that it matches is left, and doing it twice changes nothing."""
        pattern = Pattern(expression, still)
        once = pattern(text)
        self.assertEqual(pattern(once), once)
        for piece in once.split(MARK):
            if expression in (r"\d+", "[a-z]+"):
                self.assertIsNone(re.search(expression, piece))
