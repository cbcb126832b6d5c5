"""
Regular expressions that an operator set, applied to text that anybody may have written, without hanging the agent.

Python's matcher backtracks, cannot be interrupted, and keeps every other thread from running meanwhile. So there are
three bounds. An expression whose time can double with each character, or that can be tried in very many ways, is
refused when the configuration is read. A long text is matched in windows, so that the others, which can be quadratic,
meet a bounded length. And when the windows of one text have taken too long together, the rest of it is withheld:
rather too little said than a secret. The forms that need no such care, being built in, are in
:mod:`~commsmgr.redact`, which applies both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from math import log2
from re import _parser as parser  # type: ignore[attr-defined]  # the only one who knows what is in an expression
from typing import Any, NamedTuple

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
    if _explodes(parsed) or _ways(parsed, set(), bool(_IGNORECASE.search(pattern))).bits > _BITS:
        return (
            "repeats within or beside each other, more than one `.*`, or repeated alternatives that begin alike "
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
    partly: set[str] = set()
    for kind, what in parts:
        if kind in (parser.LITERAL, parser.RANGE):
            first, last = (what, what) if kind is parser.LITERAL else what
            found.update(map(chr, range(first, min(last + 1, _TOLD))))
            partly |= _marks(first, last) if last >= _TOLD else set()
        elif kind is parser.CATEGORY and str(what) in _categories():
            found.update(_categories()[str(what)])
        elif kind is not parser.NEGATE:
            return _SAMPLE
    return _SAMPLE - found if parts[0][0] is parser.NEGATE else found | partly


_TOLD = 256
_LETTER, _BLANK, _DIGIT = "\u0100", "\u2003", "\u0661"
_ABOVE = {_LETTER, _BLANK, _DIGIT}
"""They stand for all the characters above those that are told apart."""

_SAMPLE = {*map(chr, range(_TOLD)), *_ABOVE}


def _marks(first: int, last: int) -> set[str]:
    """Return what stands for the characters from ``first`` to ``last``."""
    if last - first > 4096:
        return _ABOVE
    those = map(chr, range(max(first, _TOLD), last + 1))
    return {_BLANK if one.isspace() else _DIGIT if one.isdecimal() else _LETTER for one in those}


@cache
def _categories() -> dict[str, set[str]]:
    """Return which of those characters each class has. Not made before an operator sets an expression: few do."""
    expressions = {
        "DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S",
        "WORD": r"\w", "NOT_WORD": r"\W|\u0100",
    }  # fmt: skip
    sample = "".join(_SAMPLE)
    return {f"CATEGORY_{name}": set(re.findall(expression, sample)) for name, expression in expressions.items()}


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


# What follows is an estimate of how many ways there are to try at one place, as a power of two. It begins at the end: a
# repeat whose next character tells it where to stop has one way, as has what nothing follows.

_BITS = 16.0
"""For all repeats together. One that nothing bounds takes the 12 of a window, so that there can be one but not two."""

_IGNORECASE = re.compile(r"\(\?[a-zA-Z]*i")


class _Ways(NamedTuple):
    """How many ways there are, in bits, and with which characters they can begin."""

    bits: float
    first: set[str]


def _ways(sequence: Any, after: set[str], fold: bool) -> _Ways:
    """
    Estimate the ways of a sequence.

    :param after: the characters that can come next.
    :param fold: whether upper and lower case are the same.
    """
    bits = 0.0
    for op, argument in reversed(list(sequence)):
        one = _ways_of(op, argument, after, fold)
        bits, after = bits + one.bits, one.first
    return _Ways(bits, after)


def _ways_of(op: Any, argument: Any, after: set[str], fold: bool) -> _Ways:
    if op in _REPEATS:
        least, most, body = argument
        return _ways_of_repeat(least, most, body, after, fold)
    if op in _FINAL:
        # What it has matched is not tried otherwise.
        body = argument if op is parser.ATOMIC_GROUP else argument[2]
        inner = _ways(body, set(), fold)
        optional = op is parser.POSSESSIVE_REPEAT and argument[0] == 0
        return _Ways(inner.bits, _ways(body, after, fold).first | (after if optional else set()))
    if op is parser.SUBPATTERN:
        return _ways(argument[3], after, fold)
    if op is parser.BRANCH:
        each = [_ways(part, after, fold) for part in argument[1]]
        first = set().union(*(one.first for one in each))
        alike = sum(len(one.first) for one in each) > len(first)
        return _Ways(max(one.bits for one in each) + (log2(len(each)) if alike else 0.0), first)
    if op in (parser.LITERAL, parser.NOT_LITERAL, parser.IN, parser.ANY):
        found = _characters([(op, argument)])
        if fold:
            found = {case for one in found for case in (one, one.upper(), one.lower())}
            found |= {_LETTER} if any(map(str.isalpha, found)) else set()
        return _Ways(0.0, found)
    # Whatever this is, it can fail at any character; a reference to a group also compares as many as there are.
    reference = log2(WINDOW) if op is parser.GROUPREF else 0.0
    return _Ways(reference + sum(_ways(part, set(), fold).bits for part in _parts(argument)), _SAMPLE)


def _ways_of_repeat(least: int, most: int, body: Any, after: set[str], fold: bool) -> _Ways:
    begin = _ways(body, set(), fold).first
    inner = _ways(body, after | begin if most > 1 else after, fold)
    rounds = min(most, WINDOW)
    bits = inner.bits * rounds
    if least < most and begin & after:
        bits += log2(max(rounds - least + 1, 1))
    return _Ways(bits, inner.first | after if least == 0 else inner.first)


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
