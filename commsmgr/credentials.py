"""
Where the bearer token comes from (RFC 6750): a setting, an environment variable, a file that is rotated, or the
embedding agent's own callable.

A provider gives either a token that is safe to put into a header, or an empty string: then no Authorization header is
sent. No ``repr``, error or log line of this module shows a token.
"""

from __future__ import annotations

import os
import stat
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.logger import Logger

from commsmgr.config import Auth
from commsmgr.errors import ConfigError, TokenError
from commsmgr.headers import MAX_TOKEN, token_mistake
from commsmgr.interfaces import TokenProvider


def check_token(token: str) -> str:
    """
    Return ``token`` if it can stand in an Authorization header: visible ASCII without blanks.

    :raise TokenError: it cannot; the error does not show it.
    """
    if wrong := token_mistake(token):
        raise TokenError(f"the token {wrong}")
    return token


class NoToken:
    """Sends no Authorization header."""

    def get(self) -> Deferred[str]:
        """Return an empty string."""
        return succeed("")

    def refused(self, token: str) -> None:
        """Do nothing: there is no other token."""


class StaticToken:
    """
    A token that never changes.

    :raise TokenError: the token cannot stand in a header.
    """

    def __init__(self, token: str) -> None:
        self._token = check_token(token)

    def get(self) -> Deferred[str]:
        """Return the token."""
        return succeed(self._token)

    def refused(self, token: str) -> None:
        """Do nothing: there is no other token."""


class FileToken:
    """
    A token in a file that somebody else rotates, by writing it anew or by putting another file in its place.

    The file is looked at for every token and read when it has changed. While it is missing, empty, half written or
    unreadable the last good token stays in use, and this is logged once.

    :param path: the file; line breaks at its end do not belong to the token.
    """

    _log = Logger()

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._read_as: tuple[int, ...] | None = None
        self._token = ""
        self._complained = False

    def __repr__(self) -> str:
        return f"<FileToken {str(self._path)!r}>"

    def get(self) -> Deferred[str]:
        """
        Return the token.

        Errors: :class:`TokenError` when the file has never held a usable one.
        """
        try:
            self._refresh()
        except (OSError, TokenError) as error:
            # Whatever is wrong now may look unchanged when it is right again (a mode, say): read until it is good.
            self._read_as = None
            reason = error.fact if isinstance(error, TokenError) else error.strerror or type(error).__name__
            if not self._token:
                return fail(TokenError(f"token file {str(self._path)!r}: {reason}"))
            if not self._complained:
                self._log.warn(
                    "token file {path!r}: {reason}; staying with the last good token",
                    event="token.file-unusable",
                    path=str(self._path),
                    reason=reason,
                )
            self._complained = True
        else:
            self._complained = False
        return succeed(self._token)

    def refused(self, token: str) -> None:
        """Read the file again next time, even if it does not look changed."""
        self._read_as = None

    def _refresh(self) -> None:
        # Looked at before it is read: a change in between makes the next look differ, and the file is read once more.
        looks = self._looks()
        if looks == self._read_as:
            return
        with self._path.open("rb") as file:
            content = file.read(MAX_TOKEN + 3)
        self._token = check_token(content.decode("latin-1").rstrip("\r\n"))
        self._read_as = looks

    def _looks(self) -> tuple[int, ...]:
        """Return what changes when the file does."""
        status = os.stat(self._path)
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would block.
            raise TokenError("not a regular file")
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class CallableToken:
    """
    Tokens from the embedding agent.

    :param func: called for every token, so it should keep one for as long as it is good; returns the token, or a
        Deferred or coroutine of it.
    """

    def __init__(self, func: Callable[[], str | Awaitable[str]]) -> None:
        self._func = func

    def get(self) -> Deferred[str]:
        """
        Return the token that the callable gives.

        Cancelling cancels what the callable returned. Errors: :class:`TokenError` when the callable raises, or gives
        something that is no token; an exception's text is not passed on, as it could show a secret.
        """
        return Deferred.fromCoroutine(self._get())

    async def _get(self) -> str:
        try:
            given = self._func()
            token = given if isinstance(given, str) else await given
        except (TokenError, CancelledError):
            raise
        except Exception as error:
            raise TokenError(f"the token callable raised {type(error).__name__}") from None
        if not isinstance(token, str):
            raise TokenError(f"the token callable gave {type(token).__name__}, not str")
        return check_token(token)

    def refused(self, token: str) -> None:
        """Do nothing: the callable is called again anyway."""


def from_config(auth: Auth, environ: Mapping[str, str]) -> TokenProvider:
    """
    Return the provider that ``[auth]`` asks for.

    :param environ: where ``auth.token_env`` is looked up.
    :raise ConfigError: more than one source is given, or the token given here and now is missing or unusable.
    """
    given = [key for key in ("token", "token_file", "token_env") if getattr(auth, key)]
    if not given:
        return NoToken()
    if len(given) > 1:
        raise ConfigError(f"only one of {' and '.join(given)} can be used", key="auth")
    key = f"auth.{given[0]}"
    if auth.token_file:
        return FileToken(auth.token_file)
    if auth.token_env and auth.token_env not in environ:
        raise ConfigError(f"the environment has no {auth.token_env}", key=key)
    try:
        return StaticToken(auth.token or environ[auth.token_env])
    except TokenError as error:
        raise ConfigError(error.fact, key=key) from None


class _Claims(msgspec.Struct):
    exp: float | None = None


def expiry(token: str) -> float | None:
    """
    Return when a JSON Web Token says that it expires (``exp``, RFC 7519 section 4.1.4), as seconds since the epoch.

    Nothing is verified: this is for telling an operator, and for fetching a newer one in time.

    :return: None for anything that is not such a token; never raises.
    """
    try:
        _, payload, _ = token.split(".")
        return msgspec.json.decode(urlsafe_b64decode(payload + "=="), type=_Claims).exp
    except Exception:
        # Whatever is in there, it is the backend's business and not ours.
        return None
