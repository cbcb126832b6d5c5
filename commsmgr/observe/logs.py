"""
Log lines for twistd: text for people, JSON for collectors, both safe to read and to parse.

Theory of operation: an event first becomes a flat record of plain values, each of them redacted while it still is what
it was (before anything is escaped or cut short, which would break a secret into pieces that no net catches). Then the
record becomes one line, or in text one line and indented ones for a traceback, in which nothing that came from outside
can begin a line. At last the whole is searched once more for remembered secrets, which may only have come about where
two values met. An observer never raises and never logs: a log line is not worth an agent.

Text: ``2026-11-22T14:00:00.123Z info  link.registered  backend=primary  registered with primary (commsmgr.v1)``.
JSON has ``time``, ``level``, ``namespace``, ``event``, ``message``, each field of the event under its own name, and
``traceback`` where there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TextIO, TypeAlias

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str
from zope.interface import implementer

from commsmgr.instants import rfc3339
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor, clip, single_line

_CORRELATION = ("backend", "message_id")
"""The fields that a text line shows by name, so that one can follow a message through the log."""

_LONGEST_VALUE = 8192
_TRACEBACK_LINES = 100
_TRACEBACK_PREFIX = "    | "
# What twisted.python.log adds for observers of its own, and what the record has under a name of its own.
_NOT_FIELDS = frozenset(("event", "message", "format", "time", "system", "isError", "failure", "why"))

_NUMBER = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]+)?(?:e[-+][0-9]+)?")  # not nan, and nothing endless

_Record: TypeAlias = dict[str, object]
_Level: TypeAlias = Any  # constantly's NamedConstant; that package publishes no types


def make_observer(
    stream: TextIO,
    *,
    format: Literal["text", "json"],
    level: Literal["debug", "info", "warn", "error"],
    redactor: Redactor,
) -> ILogObserver:
    """
    Return an observer that writes each event at or above ``level`` to ``stream`` and flushes it.

    It can be called from any thread: a line is one write.
    """
    return _LineObserver(stream, _json if format == "json" else _text, LogLevel.levelWithName(level), redactor)


@implementer(ILogObserver)
class _LineObserver:
    def __init__(self, stream: TextIO, render: Callable[[_Record], str], lowest: _Level, redactor: Redactor) -> None:
        self._stream = stream
        self._render = render
        self._lowest = lowest
        self._redactor = redactor

    def __call__(self, event: LogEvent) -> None:
        # Where the stream itself fails there is nobody left to tell.
        with suppress(Exception):
            if _level(event) >= self._lowest:
                self._stream.write(self._line(event) + "\n")
                self._stream.flush()

    def _line(self, event: LogEvent) -> str:
        try:
            line = self._render(_record(event, self._redactor))
        except Exception as error:
            why = f"an event could not be written: {type(error).__name__}"
            line = self._render({"time": "-", "level": "error", "event": "log.failed", "message": why})
        whole = self._redactor.hide(line)
        if whole != line and self._render is _json:
            # A secret stood across the borders of values; a collector must still get an object.
            try:
                json.loads(whole)
            except ValueError:
                whole = "{}"
        if whole.isascii():
            return whole
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return whole.encode(encoding, "backslashreplace").decode(encoding)


def _level(event: LogEvent) -> _Level:
    level = event.get("log_level")
    return level if level in _LEVELS else LogLevel.info


_LEVELS = tuple(LogLevel.iterconstants())


def _record(event: LogEvent, redactor: Redactor) -> _Record:
    """Return ``event`` as plain values under plain names, the fixed ones first; a field cannot replace those."""
    record: _Record = {
        "time": _time(event.get("log_time")),
        "level": _level(event).name,
        "namespace": _plain(event.get("log_namespace", "-"), redactor),
        "event": _plain(event.get("event", ""), redactor),
        "message": _plain(formatEvent(event), redactor),
    }
    for name, value in event.items():
        if not isinstance(name, str) or name.startswith("log_") or name in _NOT_FIELDS:
            continue
        record.setdefault(redactor(name), MARK if redactor.sensitive(name) else _plain(value, redactor))
    failure = event.get("log_failure")
    if isinstance(failure, Failure):
        record["traceback"] = _traceback(failure, redactor)
    return record


def _time(when: object) -> str:
    try:
        return rfc3339(when)
    except ValueError:
        return "-"


def _plain(value: object, redactor: Redactor) -> object:
    """Return a value that JSON has: numbers, truth values and None as they are, everything else as its text."""
    if value is None or isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else safe_str(value)
    redacted = redactor(text)
    if isinstance(value, int | float) and redacted == text and _NUMBER.fullmatch(text):
        return value
    return clip(redacted, _LONGEST_VALUE)


def _traceback(failure: Failure, redactor: Redactor) -> str:
    try:
        text = failure.getTraceback()
    except Exception as error:
        text = f"(no traceback: {type(error).__name__})"
    lines = redactor(text).rstrip("\n").split("\n")
    # The end says what happened; endless recursion fills the beginning.
    left_out = len(lines) - _TRACEBACK_LINES
    if left_out > 0:
        lines = [f"({left_out} lines left out)", *lines[left_out:]]
    return "\n".join(single_line(line, 1000) for line in lines)


def _text(record: _Record) -> str:
    line = [f"{record['time']} {record['level']:<5} {_word(record['event'] or record['namespace'])}"]
    line += [f"{name}={_word(record[name])}" for name in _CORRELATION if name in record]
    line.append(single_line(str(record["message"]), 2 * _LONGEST_VALUE))
    text = "  ".join(line)
    if "traceback" in record:
        text += "".join(f"\n{_TRACEBACK_PREFIX}{part}" for part in str(record["traceback"]).split("\n"))
    return text


def _word(value: object) -> str:
    """Return ``value`` as one word; one that has blanks or quotes in it is quoted."""
    word = single_line(str(value), 200)
    return json.dumps(word, ensure_ascii=False) if not word or any(mark in word for mark in ' "=') else word


def _json(record: _Record) -> str:
    # ASCII only: no line separator, no escape sequence and no lone surrogate reaches the collector as it is.
    return json.dumps(record, ensure_ascii=True).replace("\x7f", "\\u007f")
