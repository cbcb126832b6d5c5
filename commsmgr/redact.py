"""
Keeps secrets out of everything that a person may read, and makes foreign text safe to print on one line.

Two nets, because each has holes. What is known to be a secret (the bearer token, each time it is renewed) is replaced
wherever it shows, in the spellings that quoting and escaping give it. What merely looks like one is recognised by the
form around it: an Authorization field, ``password=…``, a URL with a password, and the patterns an operator sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

from commsmgr.errors import ConfigError

MARK = "[redacted]"
_KEPT = 16
_SHORTEST = 8

# What peers and commands print goes through these expressions, so each of them is linear: no unbounded repeat may
# begin at every character, and where two repeats meet, either they share no character or the first is possessive.
_VALUE = (
    r"(?!\[redacted\])(?:"
    r'b?"(?:[^"\\]|\\.)*"?'  # a quoted string, even one that was cut off
    r"|b?'(?:[^'\\]|\\.)*'?"
    r'|\\"(?:[^"\\]|\\[^"])*(?:\\")?'  # the same inside a JSON string
    r"|[^\s,;&\"'\\)\]}]+)"
)
_OPENING = r"(?:[\s(\"'\\]|\[(?!redacted\])|b[\"'])"
# Words that follow "bearer" in sentences and in WWW-Authenticate (RFC 6750 section 3) and are no credentials.
_PROSE = r"(?:tokens?|credentials?|auth\w*|scheme|realm|scope|error\w*|is|was|and|or|for|from|in|of)\b"


def _form(expression: str) -> re.Pattern[str]:
    return re.compile(expression, re.IGNORECASE | re.ASCII | re.DOTALL)


def _assignment(name: str, *, bare_colon: bool) -> re.Pattern[str]:
    """``name=value`` and ``"name": value``; ``name: value`` only where that is not prose ("auth.token: must be …")."""
    bare = rf"|{name}\s{{0,3}}:" if bare_colon else ""
    # A comma only as in a pair of strings, a header's name and its value.
    quoted = r"\\?[\"']\s{0,3}(?::|,(?=\s{0,3}b?\\?[\"']))"
    return _form(rf"((?:{name}\\?[\"']?\s{{0,3}}=(?!=)|{name}{quoted}{bare})\s{{0,3}}+){_VALUE}")


# A word without which the expression need not be tried (in lower case), the expression, the replacement.
_FORMS = (
    ("://", _form(r"(://[^/?#\s:@]*:)[^/?#\s@]+@"), rf"\1{MARK}@"),
    (
        "authorization",
        _form(
            rf"(authorization(?:\\?[\"']\s{{0,3}},|\\?[\"']?\s{{0,3}}[:=]){_OPENING}{{0,8}}+)(?!\[redacted\])"
            r"(?:digest\s[^\r\n]*|(?:(?:bearer|basic|negotiate|ntlm|token)\s{1,3})?+[^\s\"'\\)\]},;]+)"
        ),
        rf"\1{MARK}",
    ),
    ("bearer", _form(rf"\b(bearer\s{{1,3}}+)(?!\[redacted\]|{_PROSE})[^\s\"'\\)\]}},;]+"), rf"\1{MARK}"),
    ("pass", _assignment("pass(?:word|wd|phrase)", bare_colon=True), rf"\1{MARK}"),
    ("pwd", _assignment("pwd", bare_colon=True), rf"\1{MARK}"),
    ("key", _assignment("(?:api|private|secret|access)[_-]?key", bare_colon=True), rf"\1{MARK}"),
    ("token", _assignment("token", bare_colon=False), rf"\1{MARK}"),
    ("secret", _assignment("secret", bare_colon=False), rf"\1{MARK}"),
    ("credential", _assignment("credentials?", bare_colon=False), rf"\1{MARK}"),
)
_SENSITIVE = _form(
    r"(?:authorization|pass(?:word|wd|phrase)|pwd|(?:api|private|secret|access)[_-]?key|token|secret|credentials?)\Z"
)


class Redactor:
    """
    Replaces secrets by ``[redacted]``. Applying it twice changes nothing more.

    :param patterns: regular expressions (``observe.redact``); the whole of what one matches is replaced.
    :raise ConfigError: one of them is not a regular expression.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._patterns: list[re.Pattern[str]] = []
        for index, pattern in enumerate(patterns):
            try:
                self._patterns.append(re.compile(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"not a regular expression: {error}", key=f"observe.redact[{index}]") from None
        self._secrets: dict[str, frozenset[str]] = {}
        self._needles: tuple[str, ...] = ()

    def secret(self, value: str) -> None:
        """
        Remember ``value`` as a secret. The latest 16 are kept: those of a token that is being replaced, with room.

        Values shorter than 8 characters are ignored: they would be replaced in the middle of ordinary words, and the
        form around them still hides them where they travel. So are values that are part of the mark itself.
        """
        value = value.strip()
        if len(value) < _SHORTEST or value in MARK:
            return
        spellings = self._secrets.pop(value, None)
        self._secrets[value] = spellings or _spellings(value)
        if spellings is None:
            while len(self._secrets) > _KEPT:
                del self._secrets[next(iter(self._secrets))]
            # Longest first: one secret may be part of another.
            self._needles = tuple(sorted(set().union(*self._secrets.values()), key=len, reverse=True))

    def hide(self, text: str) -> str:
        """Return ``text`` without the remembered secrets, and otherwise as it is."""
        for needle in self._needles:
            if needle in text:
                text = text.replace(needle, MARK)
        return text

    def __call__(self, text: str) -> str:
        """Return ``text`` without remembered secrets, what looks like one, and what a pattern matches."""
        text = self.hide(text)
        lowered = text.lower()
        for word, form, replacement in _FORMS:
            if word in lowered:
                text = form.sub(replacement, text)
        for pattern in self._patterns:
            text = pattern.sub(_mark, text)
        return text


def _spellings(value: str) -> frozenset[str]:
    """Return ``value`` as it looks plain, in a repr, in JSON, and percent-encoded in a URL."""
    try:
        encoded = quote(value, safe="")
    except UnicodeEncodeError:  # a lone surrogate, which no URL can bear
        encoded = value
    return frozenset((value, repr(value)[1:-1], json.dumps(value)[1:-1], encoded))


def _mark(match: re.Match[str]) -> str:
    # A pattern that also matches nothing must not put a mark between all characters.
    return MARK if match.group() else ""


def sensitive(name: str) -> bool:
    """Whether a field of this name (``access_token``, ``password``) holds a secret: its value is never shown."""
    return _SENSITIVE.search(name) is not None


def clip(text: str, limit: int) -> str:
    """Return at most ``limit`` characters of ``text``; when some are left out, a note at the end says how many."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def single_line(text: str, limit: int = 8192) -> str:
    """
    Return ``text`` as one printable line, so that whoever wrote it can forge no line and steer no terminal.

    Each character that is not printable (control characters, line separators, changes of writing direction, lone
    surrogates) is shown as an escape such as ``\\n``, ``\\x1b`` or ``\\u2028``.

    :param limit: characters of ``text`` that are kept; what is left out is counted at the end.
    """
    text = clip(text, limit)
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
