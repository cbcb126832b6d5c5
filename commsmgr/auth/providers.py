"""
Where the bearer token comes from (RFC 6750): a setting, an environment variable, a file that is rotated, a credential
of systemd's, a command, or the embedding agent's own callable.

A provider gives either a token that is safe to put into a header, or an empty string: then no Authorization header is
sent. No ``repr``, error or log line of this module shows a token.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.logger import Logger

from commsmgr.bearer import Token, as_token, check_token
from commsmgr.config import Auth
from commsmgr.errors import ConfigError, TokenError
from commsmgr.headers import MAX_TOKEN
from commsmgr.interfaces import TokenProvider
from commsmgr.rules import TOKEN_SOURCES, credential_file

TokenCallable: TypeAlias = Callable[[], str | Token | Awaitable[str | Token]]


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

    The manager keeps one whose end is known until it is time for the next (:mod:`commsmgr.auth.renewal`), and calls for
    each use otherwise.

    :param func: returns the token, as a string or, if it knows when it ends, as a :class:`~commsmgr.bearer.Token`; or
        a Deferred or coroutine of it.
    """

    def __init__(self, func: TokenCallable) -> None:
        self._func = func

    def get(self) -> Deferred[Token]:
        """
        Return the token that the callable gives.

        Cancelling cancels what the callable returned. Errors: :class:`TokenError` when the callable raises, or gives
        something that is no token; an exception's text is not passed on, as it could show a secret.
        """
        return Deferred.fromCoroutine(self._get())

    async def _get(self) -> Token:
        try:
            given = self._func()
            token = given if isinstance(given, str | Token) else await given
        except (TokenError, CancelledError):
            raise
        except Exception as error:
            raise TokenError(f"the token callable raised {type(error).__name__}") from None
        token = as_token(token)
        check_token(token.value)
        return token

    def refused(self, token: str) -> None:
        """Do nothing: the callable is called again anyway."""


def from_config(
    auth: Auth, environ: Mapping[str, str], *, command: Callable[[Sequence[str]], TokenProvider]
) -> TokenProvider:
    """
    Return the provider that ``[auth]`` asks for.

    :param environ: where ``auth.token_env`` and ``CREDENTIALS_DIRECTORY`` are looked up.
    :param command: makes the provider for ``auth.token_command``.
    :raise ConfigError: more than one source is given, or the token given here and now is missing or unusable.
    """
    given = [key for key in TOKEN_SOURCES if getattr(auth, key)]
    if not given:
        return NoToken()
    if len(given) > 1:
        raise ConfigError(f"only one of {' and '.join(given)} can be used", key="auth")
    key = f"auth.{given[0]}"
    if auth.token_file:
        return FileToken(auth.token_file)
    if auth.token_credential:
        try:
            return FileToken(credential_file(auth.token_credential, environ))
        except ValueError as error:
            raise ConfigError(str(error), key=key) from None
    if auth.token_command:
        return command(auth.token_command)
    if auth.token_env and auth.token_env not in environ:
        raise ConfigError(f"the environment has no {auth.token_env}", key=key)
    try:
        return StaticToken(auth.token or environ[auth.token_env])
    except TokenError as error:
        raise ConfigError(error.fact, key=key) from None
