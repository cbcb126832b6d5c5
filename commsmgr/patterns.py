"""
Regular expressions that an operator set, applied to text that anybody may have written, without hanging the agent.

Python's matcher backtracks, cannot be interrupted, and keeps every other thread from running meanwhile. So there are
three bounds. An expression whose time can double with each character is refused when the configuration is read. A long
text is matched in windows, so that the others, which can be quadratic or cubic, meet a bounded length. And when the
windows of one text have taken too long together, the rest of it is withheld: rather too little said than a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from re import _parser as parser  # type: ignore[attr-defined]  # the only one who knows what is in an expression
from typing import Any

MARK = "[redacted]"

WINDOW = 4096
"""Characters that an expression sees at once. Two windows share half of it: a match of up to that length is found."""

PATIENCE = 1.0
"""Seconds of processor time for one expression on one text."""

_MANY = 16


def mistake(pattern: str) -> str:
    """Return what is wrong with an expression for our purpose, empty when nothing is."""
    try:
        compiled = re.compile(pattern)
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression: {error}"
    if compiled.search(""):
        return "matches even the empty string, so it would replace everything"
    if _explodes(parsed):
        return (
            "two repeats within or beside each other, more than one `.*`, or repeated alternatives that begin alike "
            "can take for ever on some texts; make the first or inner one possessive: `(?:a++b)+`, `[^=]*+=.*`"
        )
    return ""


_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT)
_FINAL = (parser.POSSESSIVE_REPEAT, parser.ATOMIC_GROUP)


def _explodes(parsed: Any) -> bool:
    everything = list(_everything(parsed))
    if sum(op in _REPEATS and _is_any(argument) for op, argument in everything) > 1:
        return True
    if any(op in _REPEATS and argument[1] > _MANY and _varies(argument[2]) for op, argument in everything):
        return True
    sequences = [parsed, *(part for op, argument in everything for part in _parts(argument))]
    for sequence in sequences:
        flat = list(_flat(sequence))
        for one, other in pairwise(flat):
            if _is_long(*one) and _is_long(*other) and _characters(one[1][2]) & _characters(other[1][2]):
                return True
    return False


def _characters(parsed: Any) -> set[str]:
    """Return which of some characters an expression matches; all, where that is not plain to see."""
    if len(parsed) != 1:
        return _SAMPLE
    op, argument = parsed[0]
    parts = argument if op is parser.IN else [(op, argument)]
    found: set[str] = set()
    for kind, what in parts:
        if kind is parser.LITERAL:
            found.add(chr(what))
        elif kind is parser.RANGE:
            found.update(map(chr, range(what[0], min(what[1], 255) + 1)))
        elif kind is parser.CATEGORY and str(what) in _CATEGORIES:
            found.update(_CATEGORIES[str(what)])
        elif kind is not parser.NEGATE:
            return _SAMPLE
    return _SAMPLE - found if parts[0][0] is parser.NEGATE else found


_SAMPLE = set(map(chr, range(256)))
_CATEGORIES = {
    f"CATEGORY_{name}": set(re.findall(expression, "".join(map(chr, range(256)))))
    for name, expression in (
        ("DIGIT", r"\d"), ("NOT_DIGIT", r"\D"), ("SPACE", r"\s"), ("NOT_SPACE", r"\S"),
        ("WORD", r"\w"), ("NOT_WORD", r"\W"),
    )
}  # fmt: skip


def _is_long(op: Any, argument: Any) -> bool:
    """Whether it is repeated so often, and so variably, that it matters in how many ways."""
    return op in _REPEATS and argument[1] > _MANY and argument[0] != argument[1]


def _is_any(argument: Any) -> bool:
    return argument[1] > _MANY and any(op is parser.ANY for op, _ in argument[2])


def _varies(parsed: Any) -> bool:
    """Whether it can match one text in several ways."""
    for op, argument in parsed:
        if op in _FINAL:
            continue
        if op in _REPEATS and argument[0] != argument[1]:
            return True
        if op is parser.BRANCH:
            first = [part[0] if len(part) else None for part in argument[1]]
            plain = all(one is not None and one[0] is parser.LITERAL for one in first)
            if not plain or len(set(map(str, first))) < len(first):
                return True
        if any(_varies(part) for part in _parts(argument)):
            return True
    return False


def _everything(parsed: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each element of an expression and of the expressions within."""
    for op, argument in parsed:
        yield op, argument
        for part in _parts(argument):
            yield from _everything(part)


def _flat(parsed: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the elements that follow each other, as if there were no groups."""
    for op, argument in parsed:
        if op is parser.SUBPATTERN:
            yield from _flat(argument[3])
        else:
            yield op, argument


def _parts(argument: Any) -> Iterator[Any]:
    """Yield the expressions directly within one element of an expression."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _parts(part)


class Pattern:
    """
    One expression.

    :param seconds: tells processor time.
    """

    def __init__(self, pattern: str, seconds: Callable[[], float]) -> None:
        self._compiled = re.compile(pattern)
        self._seconds = seconds

    def __call__(self, text: str) -> str:
        """Return ``text`` with a mark in place of what matches."""
        spans, end = self._spans(text)
        if not spans and end == len(text):
            return text
        pieces, last = [], 0
        for begin, until in sorted(spans):
            if until > last:
                if begin >= last:  # not where it continues the one before
                    pieces += [text[last:begin], MARK]
                last = until
        pieces.append(text[last : max(end, last)])
        if max(end, last) < len(text):
            pieces.append(f"[redacted: {len(text) - max(end, last)} characters, as a pattern took too long]")
        return "".join(pieces)

    def _spans(self, text: str) -> tuple[list[tuple[int, int]], int]:
        """Return where to put marks, and up to where it was looked."""
        spans: list[tuple[int, int]] = []
        began = self._seconds() if len(text) > WINDOW else 0.0
        start = 0
        while True:
            end = min(start + WINDOW, len(text))
            for match in self._compiled.finditer(text, start, end):
                begin, until = match.span()
                if begin < until and not _marked(text, begin, until):
                    if until == end:
                        until = self._end(text, begin, end)
                    spans.append((begin, until))
            if end == len(text) or self._seconds() - began > PATIENCE:
                return spans, end
            start += WINDOW // 2

    def _end(self, text: str, begin: int, end: int) -> int:
        """Return where a match really ends that had come to the end of its window."""
        further = min(end + WINDOW, len(text))
        match = self._compiled.match(text, begin, further)
        until = max(match.end(), end) if match else end
        if until < further:
            return until
        word = _WORD.match(text, until)
        return word.end() if word else until


def _marked(text: str, begin: int, until: int) -> bool:
    """Whether this is part of a mark that is there already."""
    at = text.find(MARK, max(until - len(MARK), 0), begin + len(MARK))
    return at != -1 and at <= begin and until <= at + len(MARK) and until - begin < len(MARK)


_WORD = re.compile(r"[^\s\"'<>]*+")
