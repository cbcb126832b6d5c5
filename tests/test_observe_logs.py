"""Log lines: readable, parseable, without secrets, and not to be forged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO, StringIO, TextIOWrapper
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from commsmgr.observe.logs import make_observer
from commsmgr.redact import MARK, Redactor

WHEN = 1_795_348_800.1239  # 2026-11-22T12:00:00.123Z
Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")
TOKEN = "very-secret-token"


class Hostile:
    """Raises however it is shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Shown:
    """Shows itself as whatever it was given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def failed(text: str) -> Failure:
    try:
        raise ValueError(text)
    except ValueError:
        return Failure()


def write(format: Format, *events: dict[Any, Any], redactor: Redactor | None = None) -> str:
    """Return what an observer at level debug writes of ``events``."""
    stream = StringIO()
    observer = make_observer(stream, format=format, level="debug", redactor=redactor or Redactor())
    for event in events:
        observer(event)
    return stream.getvalue()


def event(**fields: Any) -> dict[str, Any]:
    return {
        "log_time": WHEN,
        "log_level": LogLevel.info,
        "log_namespace": "commsmgr.link",
        "log_format": "registered with {backend}",
        "event": "link.registered",
        "backend": "primary",
        **fields,
    }


class TextTests(SynchronousTestCase):
    """Lines for people."""

    def test_line(self) -> None:
        """A line has time, level, name, correlation and message."""
        self.assertEqual(
            write("text", event(message_id="0190-1", attempts=3)),
            "2026-11-22T12:00:00.123Z info  link.registered  backend=primary  message_id=0190-1  "
            "registered with primary\n",
        )

    def test_other_software(self) -> None:
        """Events of others are named by their namespace; without a level they count as info."""
        foreign = {"log_namespace": "twisted.web", "log_format": "starting"}
        self.assertEqual(write("text", foreign), "- info  twisted.web  starting\n")
        self.assertEqual(write("text", {}), "- info  -  \n")

    def test_traceback(self) -> None:
        """A failure's traceback follows in indented lines, which even an error's text cannot leave."""
        lines = write(
            "text", event(log_failure=failed("a\n2026-11-22T12:00:00.123Z info  x  y"), log_level=LogLevel.critical)
        ).splitlines()
        self.assertIn(" critical link.registered ", lines[0])
        self.assertEqual({line[:6] for line in lines[1:]}, {"    | "})
        self.assertEqual(lines[-1], "    | 2026-11-22T12:00:00.123Z info  x  y")

    def test_long_traceback(self) -> None:
        """Of an endless recursion the end is kept, and what is left out is counted."""

        def deeper(depth: int) -> None:
            if not depth:
                raise ValueError("bottom")
            deeper(depth - 1)

        try:
            deeper(200)
        except ValueError:
            lines = write("text", event(log_failure=Failure())).splitlines()
        self.assertEqual(len(lines), 102)
        self.assertRegex(lines[1], r"\| \(\d+ lines left out\)$")
        self.assertIn("bottom", lines[-1])

    def test_words(self) -> None:
        """A field with blanks in it is quoted, so that it cannot pass for two."""
        self.assertIn('  backend="a  message_id=b"  ', write("text", event(backend="a  message_id=b")))
        self.assertIn('  backend=""  ', write("text", event(backend="")))

    def test_long_message(self) -> None:
        """An endless message is cut, and says how much is missing."""
        line = write("text", event(log_format="{x}", x="y" * 10_000))
        self.assertIn("yy… (1808 more characters)\n", line)

    def test_encodings(self) -> None:
        """Any text can be written to a stream of any encoding."""
        for encoding, shown in (("ascii", rb"na\xefve"), ("utf-8", "naïve".encode()), ("latin-1", b"na\xefve")):
            raw = BytesIO()
            stream = TextIOWrapper(raw, encoding=encoding, errors="strict")
            make_observer(stream, format="text", level="info", redactor=Redactor())(event(log_format="naïve ☃"))
            self.assertIn(shown, raw.getvalue())

    def test_with_logger(self) -> None:
        """It works under a real Logger, with its formats and its failures."""
        stream = StringIO()
        observer = make_observer(stream, format="text", level="info", redactor=Redactor())
        verifyObject(ILogObserver, observer)
        log = Logger("commsmgr.test", observer=observer)
        log.info("{count} of {path!r}", event="x.y", count=2, path="a\nb")
        log.failure("went wrong", failed("reason"), event="x.failed")
        lines = stream.getvalue().splitlines()
        self.assertTrue(lines[0].endswith(r"Z info  x.y  2 of 'a\nb'"), lines[0])
        self.assertTrue(lines[1].endswith("Z critical x.failed  went wrong"), lines[1])
        self.assertEqual(lines[-1], "    | builtins.ValueError: reason")


class JSONTests(SynchronousTestCase):
    """Lines for collectors."""

    def test_object(self) -> None:
        """A line is one object, with the fields of the event beside the fixed ones."""
        line = write("json", event(message_id="0190-1", attempts=3, rate=0.5, ok=True, none=None, ids=["a"]))
        self.assertEqual(
            json.loads(line),
            {
                "time": "2026-11-22T12:00:00.123Z",
                "level": "info",
                "namespace": "commsmgr.link",
                "event": "link.registered",
                "message": "registered with primary",
                "backend": "primary",
                "message_id": "0190-1",
                "attempts": 3,
                "rate": 0.5,
                "ok": True,
                "none": None,
                "ids": "['a']",
            },
        )

    def test_traceback(self) -> None:
        """A traceback is a field."""
        record = json.loads(write("json", event(log_failure=failed("reason"))))
        self.assertTrue(record["traceback"].startswith("Traceback "))
        self.assertTrue(record["traceback"].endswith("builtins.ValueError: reason"))

    def test_fixed_fields_win(self) -> None:
        """A field of an event cannot pass for one of the fixed ones."""
        forged = event(level="critical", namespace="x", traceback="t", log_failure=failed("r"))
        record = json.loads(write("json", forged))
        self.assertEqual((record["level"], record["namespace"]), ("info", "commsmgr.link"))
        self.assertIn("ValueError", record["traceback"])

    def test_strange_values(self) -> None:
        """What JSON cannot bear becomes text."""
        record = json.loads(
            write("json", event(nan=float("nan"), big=1 << 5000, raw=b"\xff", low="\ud800", small=-1e-7, huge=10**30))
        )
        self.assertEqual((record["nan"], record["raw"], record["huge"]), ("nan", r"b'\xff'", str(10**30)))
        self.assertIsInstance(record["big"], str)
        self.assertEqual(float(record["small"]), -1e-7)

    def test_one_line_of_ascii(self) -> None:
        """No separator, escape sequence or delete character reaches a terminal or a naive reader of lines."""
        line = write("json", event(x="\u2028\x85\x1b[31m\x7f\n"))
        self.assertTrue(line[:-1].isascii() and line[:-1].isprintable())


class LevelTests(SynchronousTestCase):
    """The level filter."""

    def test_filter(self) -> None:
        """What is below the level is not written, what is at it or above is."""
        stream = StringIO()
        observer = make_observer(stream, format="text", level="warn", redactor=Redactor())
        for level in LogLevel.iterconstants():
            observer(event(log_level=level, log_format=level.name, event="e", backend="b"))
        self.assertEqual([line.split()[-1] for line in stream.getvalue().splitlines()], ["warn", "error", "critical"])


class SecretTests(SynchronousTestCase):
    """What must not be read by anybody."""

    def test_parts_of_the_event(self) -> None:
        """A secret is replaced in the message, in fields, in names of fields and in tracebacks."""
        redactor = Redactor()
        redactor.secret(TOKEN)
        secretive = event(
            log_format="sent {x}", x=TOKEN, log_failure=failed(TOKEN), y=[TOKEN], message_id=TOKEN, **{TOKEN: 1}
        )
        for form in FORMATS:
            line = write(form, secretive, redactor=redactor)
            self.assertIn(f"sent {MARK}", line)
            self.assertNotIn(TOKEN, line)

    def test_fields_by_name(self) -> None:
        """A field that is named like a secret never shows its value, whatever it is."""
        record = json.loads(write("json", event(access_token="abc", password=17)))
        self.assertEqual((record["access_token"], record["password"]), (MARK, MARK))

    def test_forms(self) -> None:
        """What merely looks like a secret is replaced in a traceback, and an operator's patterns in names, too."""
        revealing = event(log_failure=failed("password=hunter2"), **{"card-1234": 1})
        line = write("json", revealing, redactor=Redactor([r"\d{4}"]))
        self.assertNotIn("hunter2", line)
        self.assertNotIn("1234", line)

    def test_number(self) -> None:
        """A secret that is a number is one all the same."""
        redactor = Redactor()
        redactor.secret("12345678")
        self.assertEqual(json.loads(write("json", event(pin=12345678), redactor=redactor))["pin"], MARK)

    def test_cut(self) -> None:
        """A secret is recognised before the text that bears it is cut short."""
        redactor = Redactor()
        redactor.secret(TOKEN)
        self.assertNotIn("very", write("json", event(x="y" * (8192 - 8) + TOKEN), redactor=redactor))

    def test_across_values(self) -> None:
        """A secret that comes about where values meet is replaced; a collector gets an object even then."""
        cases: tuple[tuple[Format, str, str | None], ...] = (
            ("text", "link.registered  backend", f"2026-11-22T12:00:00.123Z info  {MARK}=primary"),
            ("json", '"link.registered", "message"', "{}"),
            ("json", 'primary", "x": "y', None),
        )
        for form, secret, left in cases:
            redactor = Redactor()
            redactor.secret(secret)
            line = write(form, event(x="y"), redactor=redactor)
            self.assertNotIn(secret, line)
            if left is not None:
                self.assertTrue(line.startswith(left), line)
            if form == "json":
                self.assertIsInstance(json.loads(line), dict)


class RobustTests(SynchronousTestCase):
    """An observer never raises."""

    def test_hostile_values(self) -> None:
        """What cannot be shown is logged as such, and does no harm."""
        for form in FORMATS:
            for strange in (
                event(log_format="{x}", x=Hostile()),
                event(backend=Hostile(), event=Hostile()),
                event(log_time="noon", log_level="loud", log_namespace=7),
                event(log_time=float("inf"), log_failure="none", log_format=3),
                event(log_format="{missing} {"),
                {1: 2, None: 3, "log_format": b"\xff"},
            ):
                self.assertEqual(write(form, strange).count("\n"), 1)

    def test_failure_without_traceback(self) -> None:
        """A failure that cannot be shown is said to be so."""
        failure = failed("x")
        failure.getTraceback = Hostile().__repr__  # type: ignore[assignment]  # a broken one is the point
        self.assertIn("(no traceback: RuntimeError)", write("text", event(log_failure=failure)))

    def test_broken_renderer(self) -> None:
        """When even the record cannot be made, there is a line that says so."""

        class Broken(Redactor):
            def __call__(self, text: str) -> str:
                raise RecursionError("deep")

        self.assertEqual(
            write("text", event(), redactor=Broken()),
            "- error log.failed  an event could not be written: RecursionError\n",
        )
        self.assertEqual(json.loads(write("json", event(), redactor=Broken()))["event"], "log.failed")

    def test_broken_stream(self) -> None:
        """A full disk or a closed stream is not the agent's end."""

        class Full(StringIO):
            def write(self, text: str) -> int:
                raise OSError(28, "No space left on device")

        closed = StringIO()
        closed.close()
        for stream in (Full(), closed):
            make_observer(stream, format="text", level="info", redactor=Redactor())(event())


secrets = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF), min_size=8, max_size=30).filter(
    lambda text: len(text.strip()) >= 8 and "[" not in text and "]" not in text and text.strip() not in MARK
)
names = st.sampled_from(
    ["backend", "message_id", "event", "x", "token", "level", "log_format", "log_namespace", "time"]
)


def leaves(value: object) -> Iterator[str]:
    """Yield every name and every text in a decoded JSON object."""
    assert isinstance(value, dict)
    for name, field in value.items():
        yield name
        yield str(field)


class PropertyTests(SynchronousTestCase):
    """Whatever the event."""

    @settings(deadline=None)
    @given(st.data(), st.sampled_from(FORMATS), secrets)
    def test_no_secret_shows(self, data: st.DataObject, format: Format, secret: str) -> None:
        """A remembered secret never appears in the output, neither as it is written nor as it is decoded."""
        piece = st.one_of(st.text(max_size=10), st.just(secret))
        texts = st.lists(piece, max_size=4).map("".join)
        values = st.one_of(
            texts,
            texts.map(Shown),
            texts.map(lambda text: [text, {text: 1}]),
            texts.map(str.encode),
            st.floats(),
            st.integers(),
            st.none(),
            texts.map(failed),
        )
        fields = data.draw(st.dictionaries(st.one_of(names, texts), values, max_size=6))
        if data.draw(st.booleans()):
            fields["log_failure"] = failed(data.draw(texts))
        made: dict[Any, Any] = {**event(), **fields}
        redactor = Redactor()
        redactor.secret(secret)
        output = write(format, made, redactor=redactor)
        self.assertNotIn(secret.strip(), output)
        if format == "json":
            for text in leaves(json.loads(output)):
                self.assertNotIn(secret.strip(), text)

    @settings(deadline=None)
    @given(st.dictionaries(names, st.text(), max_size=6), st.text())
    def test_no_line_is_forged(self, fields: dict[str, str], reason: str) -> None:
        """One event is one line; in text only lines of a traceback follow, and these can be told by their beginning."""
        made = {**event(), **fields, "log_failure": failed(reason)}
        self.assertEqual(len(write("json", made).splitlines()), 1)
        first, *others = write("text", made).splitlines()
        self.assertTrue(first.startswith("2026-11-22T12:00:00.123Z info  "))
        self.assertEqual({line[:6] for line in others}, {"    | "})
