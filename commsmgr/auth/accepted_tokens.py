"""
The file that keeps, over a restart, which tokens were accepted last (``auth.accepted_token_file``).

It is as secret as a token file: made with mode 0600 and put in its place whole, and not read when it is a symbolic
link, somebody else's, or open to others. Nothing depends on it: one that cannot be used is told of, and the agent goes
on.

A token is kept for the place that has accepted it, not for its name alone: when a name of the configuration comes to
stand for another place, that one is shown no token that was meant for the first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from commsmgr.bearer import Token, check_token
from commsmgr.errors import TokenError
from commsmgr.policy.tokens import Route

_LARGEST = 8 << 20


class _Entry(msgspec.Struct):
    backend: str
    transport: str
    token: str
    expires_at: float | None = None
    place: str = ""


class AcceptedTokens:
    """
    Reads and writes the file.

    :param in_thread: does the writing, as a disk may take its time; one write at a time.
    :param places: where each backend is, by its name.
    """

    _log = Logger()

    def __init__(
        self, path: str, in_thread: Callable[[Callable[[], None]], Deferred[None]], places: Mapping[str, str]
    ) -> None:
        self._path = path
        self._in_thread = in_thread
        self._places = places
        self._wanted: dict[Route, Token] | None = None
        self._writing: Deferred[None] | None = None

    def __repr__(self) -> str:
        return f"<AcceptedTokens {self._path!r}>"

    def load(self) -> dict[Route, Token]:
        """
        Return what was kept for backends that are where they were: nothing when there is no file, or none that can be
        used, which is logged.
        """
        try:
            entries = msgspec.json.decode(_read(self._path), type=list[_Entry])
            return {
                Route(entry.backend, entry.transport): Token(check_token(entry.token), entry.expires_at)
                for entry in entries
                if entry.place == self._places.get(entry.backend)
            }
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._complain("not read", error.strerror or type(error).__name__)
        except (msgspec.MsgspecError, ValueError, RecursionError, TokenError):
            # Not the reason, which may quote.
            self._complain("not read", "it is damaged")
        return {}

    def keep(self, kept: dict[Route, Token]) -> None:
        """Write ``kept`` instead of what was there, soon; with nothing to keep there is no file."""
        self._wanted = kept
        if self._writing is None:
            self._writing = Deferred()
            Deferred.fromCoroutine(self._write(self._writing))

    async def written(self) -> None:
        """Wait until the file holds what it should, or could not be written."""
        if self._writing is not None:
            done: Deferred[None] = Deferred()

            def over(outcome: Any) -> Any:
                done.callback(None)
                return outcome

            self._writing.addBoth(over)
            await done

    async def _write(self, writing: Deferred[None]) -> None:
        while self._wanted is not None:
            kept, self._wanted = self._wanted, None
            try:
                entries = [
                    _Entry(*route, token.value, token.expires_at, self._places[route.backend])
                    for route, token in kept.items()
                ]
                await self._in_thread(partial(_replace, self._path, entries))
            except Exception as error:
                self._complain("not written", getattr(error, "strerror", None) or type(error).__name__)
        self._writing = None
        writing.callback(None)

    def _complain(self, what: str, reason: str) -> None:
        self._log.warn(
            "the file of accepted tokens {path!r} was {what}: {reason}",
            event="token.accepted-file-unusable",
            path=self._path,
            what=what,
            reason=reason,
        )


def _read(path: str) -> bytes:
    """Return what is in the file; raises OSError when it is not ours alone."""
    # NONBLOCK: a pipe would keep us waiting for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "it is no regular file")
        if status.st_uid != os.geteuid():
            raise OSError(None, "it belongs to another user")
        if status.st_mode & 0o077:
            raise OSError(None, "others than its owner may use it; its mode should be 0600")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(_LARGEST)
    finally:
        os.close(descriptor)


def _replace(path: str, entries: list[_Entry]) -> None:
    if not entries:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := os.lstat(path).st_mode) and not stat.S_ISLNK(mode):
            # For root even /dev/null could be replaced.
            raise OSError(None, "something that is no file is in its place")
    new = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(new)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(entries))
        file.flush()
        os.fsync(descriptor)
    os.replace(new, path)
