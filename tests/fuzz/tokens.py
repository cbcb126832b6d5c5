"""A bearer token: what is read of a JSON Web Token, and whether it can stand in a header field."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Iterator
from math import isfinite

from commsmgr.bearer import check_token, expiry
from commsmgr.errors import TokenError
from tests.fuzz.kit import nothing_wrong, promise

INSTRUMENT = ("commsmgr.bearer", "commsmgr.headers")

TOKENS = (b".", b"eyJhbGciOiJub25lIn0.", b"eyJleHAiOjF9", b'{"exp":', b"1e999", b"-1", b"null", b"==", b"\r\n")


def one(data: bytes) -> None:
    """See that a token is usable or refused without being shown, and that its expiry is a time or unknown."""
    text = data.decode("latin-1")
    with nothing_wrong():
        _expiry(text)
        # As the middle part of a token, so that the claims are reached without base64 in the way.
        _expiry(f"e30.{urlsafe_b64encode(data).decode().rstrip('=')}.x")
        try:
            token = check_token(text)
        except TokenError as error:
            promise(len(text) < 16 or text not in str(error), "the token is shown", str(error))
        else:
            promise(token.isascii() and token.isprintable() and " " not in token, "no token", token)


def _expiry(token: str) -> None:
    when = expiry(token)
    promise(when is None or (isinstance(when, float) and isfinite(when)), "no time", when)


def seeds() -> Iterator[bytes]:
    """Yield tokens of all kinds, and claims."""
    for claims in (b'{"exp":1700000000}', b'{"exp":1.5e9,"sub":"a"}', b'{"exp":"1"}', b'{"exp":null}', b"[]", b"{}"):
        yield claims
        yield b"eyJhbGciOiJub25lIn0." + urlsafe_b64encode(claims).rstrip(b"=") + b".c2ln"
    yield from (b"plain-token_1", b"two words", b"line\r\nX-Evil: 1", b"\xe9", b"a" * 5000, b"", b"..", b"a.b.c.d")
