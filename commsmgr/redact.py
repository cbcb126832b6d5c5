"""
Keeps secrets out of everything that a person may read, and makes foreign text safe to print on one line.

Two nets, because each has holes. What is known to be a secret (the bearer token, each time it is renewed) is replaced
wherever it shows, in the spellings that quoting and escaping give it. What merely looks like one is recognised by the
form around it: an Authorization field, a URL with a password, the value of a key whose name says so (``password=…``),
and the patterns an operator sets. The forms built in are here, each known to be linear; an operator's expression may
be anything, and :mod:`~commsmgr.patterns` judges and bounds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from time import thread_time
from typing import Any
from urllib.parse import quote

from commsmgr.config import Redaction
from commsmgr.errors import ConfigError, escaped
from commsmgr.patterns import MARK, Pattern, mistake

_KEPT = 16
_SHORTEST = 8
_NAMES_KEPT = 4096
_LONGEST_NAME_KEPT = 64
"""Characters; names come from outside, in texts of a MiB."""

# What peers and commands print goes through these expressions, so each of them is linear: no unbounded repeat may
# begin at every character, and where two repeats meet, either they share no character or the first is possessive.
_QUOTED = r'"(?:[^"\\]|\\.)*+"?'  # a string, even one that was cut off


def _bracketed(opening: str, closing: str) -> str:
    """Return an expression for a list or an object, with those within it, even one that was cut off."""
    inside = rf'[^{opening}{closing}"\\]|\\.|{_QUOTED}'
    return rf"{opening}(?:{inside}|{opening}(?:{inside})*+{closing})*+{closing}?"


_VALUE = (
    # Nothing, a truth value, an empty list and an empty object are no secrets.
    r"(?!\[redacted\]|(?:null|true|false)(?:[\s,}\]]|$)|\[\s{0,3}\]|\{\s{0,3}\})(?:"
    rf"(?:[b$]?{_QUOTED}|[b$]?'(?:[^'\\]|\\.)*+'?)++"  # several without a gap are one to a shell
    r'|\\"(?:[^"\\]|\\[^"])*(?:\\")?'  # the same inside a JSON string
    "|" + _bracketed(r"\[", r"\]") + "|" + _bracketed(r"\{", r"\}") + r"|[^\s,;&\"'\\)\]}]+)"
)
_OPENING = r"(?:[\s(\"'\\]|\[(?!redacted\])|b[\"'])"
# Words that follow "bearer" in sentences and in WWW-Authenticate (RFC 6750 section 3) and are no credentials.
_PROSE = r"(?:tokens?|credentials?|auth\w*|scheme|realm|scope|error\w*|is|was|and|or|for|from|in|of)\b"


@lru_cache(maxsize=256)
def _form(expression: str) -> re.Pattern[str]:
    """Compile an expression when it is first used: all of them took 30 ms of every start, and few are ever needed."""
    return re.compile(expression, re.IGNORECASE | re.ASCII | re.DOTALL)


def _assignment(name: str, *, bare_colon: bool) -> str:
    """
    ``name=value`` and ``"name": value``; ``name: value`` only where that is not prose ("auth.token: must be …"), as
    ``X-Auth-Token: value`` is not.
    """
    # Looked back from its end, so that each alternative begins with the name: that is what is searched for so fast.
    within = "" if bare_colon else f"(?<=[-_]{name})"
    bare = rf"|{name}{within}\s{{0,3}}:=?+"
    # A comma only as in a pair of strings, a header's name and its value; not before the next key of an object.
    quoted = r"\\?[\"']\s{0,3}(?::|,(?=\s{0,3}b?\\?[\"'])(?!\s{0,3}\\?\"[^\"\\]{0,100}\\?\"\s{0,3}:))"
    return rf"((?:{name}\\?[\"']?\s{{0,3}}=(?!=)>?+|{name}{quoted}{bare})\s{{0,3}}+){_VALUE}"


# A word without which the expression need not be tried (in lower case), the expression, the replacement.
_FORMS = (
    ("://", r"(://[^/?#\s:@]*:)[^/?#\s@]+@", rf"\1{MARK}@"),
    (
        "authorization",
        (
            rf"(authorization(?:\\?[\"']\s{{0,3}},|\\?[\"']?\s{{0,3}}[:=]){_OPENING}{{0,8}}+)(?!\[redacted\])"
            r"(?:digest\s[^\r\n]*|(?:(?:bearer|basic|negotiate|ntlm|token)\s{1,3})?+[^\s\"'\\)\]},;]+)"
        ),
        rf"\1{MARK}",
    ),
    ("bearer", rf"\b(bearer\s{{1,3}}+)(?!\[redacted\]|{_PROSE})[^\s\"'\\)\]}},;]+", rf"\1{MARK}"),
)
_BEARER = [form for form in _FORMS if form[0] == "bearer"]

# "token: must be printable" is prose, "password: hunter2" hardly ever.
_PROSE_NAMES = frozenset({"token", "secret", "credential", "credentials"})

_WORDS = re.compile(
    r"[A-Z]+(?![a-z])|[^\W\d_][^\W\d_A-Z]*|\d+"  # "APIKey", "apiKey", "api_key1"
)


def words(name: str) -> tuple[str, ...]:
    """Return the words that a name is made of, in lower case, however they are put together."""
    return tuple(word.lower() for word in _WORDS.findall(name))


@lru_cache(maxsize=16)
def _known(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    """Return names of secrets as they are compared, and the forms of texts with secrets, for all who have such keys."""
    forms = list(_FORMS)
    for key in keys:
        parts = words(key)
        if parts and parts != ("authorization",):
            name = "[_-]?".join(map(re.escape, parts))
            form = _assignment(name, bare_colon=len(parts) > 1 or parts[0] not in _PROSE_NAMES)
            forms.append((max(parts, key=len), form, rf"\1{MARK}"))
    return tuple(f" {' '.join(words(key))} " for key in keys), tuple(forms)


class Redactor:
    """
    Replaces secrets by ``[redacted]``. Applying it twice changes nothing more, but for patterns that look at what
    stands around a match.

    :param patterns: regular expressions (``redaction.patterns``); the whole of what one matches is replaced.
    :param keys: names of secrets (``redaction.keys``).
    :param seconds: tells processor time, which patterns may take only so much of.
    :raise ConfigError: one of the patterns cannot be used.
    """

    def __init__(
        self,
        patterns: Iterable[str] = (),
        keys: Iterable[str] = Redaction().keys,
        *,
        seconds: Callable[[], float] = thread_time,
    ) -> None:
        self._patterns: list[Pattern] = []
        for index, pattern in enumerate(patterns):
            if wrong := mistake(pattern):
                raise ConfigError(wrong, key=f"redaction.patterns[{index}]")
            self._patterns.append(Pattern(pattern, seconds))
        self._keys, self._forms = _known(tuple(keys))
        self._names: dict[str, bool] = {}
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
        # Each form but one has a sign that is found much faster than any word.
        forms = self._forms if "=" in text or ":" in text or '"' in text or "'" in text else _BEARER
        for word, form, replacement in forms:
            if word in lowered:
                text = _form(form).sub(replacement, text)
        return self._without_matches(text)

    def _without_matches(self, text: str) -> str:
        for pattern in self._patterns:
            text = pattern(text)
        return text

    def document(self, text: str) -> str:
        """
        Return ``text`` as by calling, but if all of it is one JSON object or array, what is returned is one too.

        Whoever reads the output of a command by a JSON parser goes on doing so. It is written anew only where there was
        a secret in it. Patterns see the whole as well, since they may be about keys; what they make of it is theirs.
        """
        if text.lstrip()[:1] not in ("{", "["):
            return self(text)
        try:
            value = json.loads(text, object_pairs_hook=_without_doubles)
            clean = self.data(value)
        except (ValueError, RecursionError):
            return self(text)
        if clean != value:
            text = json.dumps(clean, ensure_ascii=False, indent=2 if "\n" in text.strip() else None)
        return self._without_matches(self.hide(text))

    def sensitive(self, name: str) -> bool:
        """Whether a field of this name (``access_token``, ``dbPassword``) holds a secret: its value is never shown."""
        known = self._names.get(name)
        if known is None:
            spelled = f" {' '.join(words(name))} "
            known = any(key in spelled for key in self._keys)
            if len(name) <= _LONGEST_NAME_KEPT:
                if len(self._names) >= _NAMES_KEPT:
                    self._names.clear()
                self._names[name] = known
        return known

    def data(self, value: Any) -> Any:
        """
        Return a copy of what JSON can say without secrets: the values of sensitive keys, and those in any text.

        None, truth values and empty values stay, for they are no secret.
        """
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            found: dict[str, Any] = {}
            for key, part in value.items():
                shown, number = self(key), 1
                while shown in found:
                    number += 1
                    shown = f"{self(key)} ({number})"
                hidden = self.sensitive(key) and part and part is not True
                found[shown] = MARK if hidden else self.data(part)
            return found
        if isinstance(value, list):
            return [self.data(part) for part in value]
        return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Of a key that is there twice the parser would drop one unseen, and its secret stay."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _spellings(value: str) -> frozenset[str]:
    """Return ``value`` as it looks plain, in a repr, in JSON, and percent-encoded in a URL."""
    try:
        encoded = quote(value, safe="")
    except UnicodeEncodeError:  # a lone surrogate, which no URL can bear
        encoded = value
    return frozenset((value, repr(value)[1:-1], json.dumps(value)[1:-1], encoded))


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
    return escaped(clip(text, limit))
