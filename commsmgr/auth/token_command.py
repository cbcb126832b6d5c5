"""
A token from a program of the operator's: what it prints is the token.

The program is run without a shell, with the agent's environment and rights, and nothing to read. It prints either the
token alone or, as token endpoints answer (RFC 6749 section 5.1), a JSON object whose ``access_token`` is the token and
whose ``expires_in``, if it is there, is the number of seconds for which it is good; other members do not matter. What
it prints is not shown to anybody, and neither is what it writes to standard error, where some programs write what they
were doing, secrets and all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IReactorProcess
from twisted.internet.process import reapAllProcesses
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from commsmgr.bearer import Token, check_token, expiry
from commsmgr.errors import ConfigError, TokenError
from commsmgr.headers import MAX_TOKEN

MAX_OUTPUT = 4 * MAX_TOKEN
"""Bytes that the program may print; with more it is killed."""

REAP_EVERY = 0.05
"""Seconds between two looks for the exit status of a program that has closed its output."""

REAP_TRIES = 100
"""Looks after which the exit status is taken to be lost."""


class _Answer(msgspec.Struct):
    access_token: str
    expires_in: float | None = None


class TokenCommand:
    """
    Runs a program for each token.

    :param argv: the program, which is looked for in ``PATH`` when its name has no slash, and its arguments.
    :param reactor: the embedding program's; it need not handle SIGCHLD.
    :param wall: seconds since the epoch.
    :raise ConfigError: this reactor cannot start processes.
    """

    def __init__(self, argv: Sequence[str], *, reactor: Any, wall: Callable[[], float]) -> None:
        if not IReactorProcess.providedBy(reactor):
            raise ConfigError(
                f"the reactor of this program, {type(reactor).__name__}, cannot start processes; give the token by a "
                "file or a callable",
                key="auth.token_command",
            )
        self._argv = tuple(argv)
        self._reactor = reactor
        self._wall = wall

    def __repr__(self) -> str:
        return f"<TokenCommand {self._argv[0]!r}>"

    async def run(self) -> Token:
        """
        Run the program and return the token that it printed.

        Cancelling kills it; what it has started in turn is left alone.

        :raise TokenError: it could not be started, failed, or printed something else. The error has its exit status,
            and nothing of what it wrote.
        """
        name = os.path.basename(self._argv[0])
        program = _Program(self._reactor)
        began = self._wall()
        try:
            self._reactor.spawnProcess(program, self._argv[0], self._argv, env=None)
        except OSError as error:
            raise TokenError(f"{name} could not be started: {error.strerror or type(error).__name__}") from None
        try:
            reason = await program.ended
        except CancelledError:
            # Who stops the manager may end the process next, and should leave no other one behind.
            await program.gone
            raise
        if program.too_much:
            raise TokenError(f"{name} printed more than {MAX_OUTPUT} bytes")
        if (how := _ended(reason)) is not None:
            raise TokenError(
                f"{name} ended with {how}, and {program.errors} bytes on standard error, which are not shown: run it "
                "by hand, as the agent's user"
            )
        return _parsed(name, bytes(program.output), began)


def _ended(reason: BaseException | None) -> str | None:
    """Say how a program ended; None: well."""
    match reason:
        case ProcessDone():
            return None
        case ProcessTerminated(signal=int(number)):
            return f"signal {number}"
        case ProcessTerminated(exitCode=code):
            return f"exit status {code}"
    return "an exit status that could not be read, because this program has its own way with SIGCHLD"


def _parsed(name: str, output: bytes, began: float) -> Token:
    text = output.decode("latin-1").strip()
    if not text.startswith("{"):
        try:
            return Token(check_token(text), expiry(text))
        except TokenError as error:
            raise TokenError(f"{name} printed no token: {error.fact}") from None
    try:
        answer = msgspec.json.decode(output, type=_Answer)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # Not the reason, which may quote.
        raise TokenError(
            f"{name} printed JSON without what was expected: access_token, a string, and perhaps expires_in, a number"
        ) from None
    try:
        token = check_token(answer.access_token)
    except TokenError as error:
        raise TokenError(f"{name} printed an access_token that is none: {error.fact}") from None
    # From the beginning: a token is not good for longer because the program was slow.
    return Token(token, expiry(token) if answer.expires_in is None else began + answer.expires_in)


class _Program(ProcessProtocol):
    """
    A running program.

    :ivar ended: fires with why it ended, when it has and its output is read; cancelling kills it.
    :ivar gone: fires when it has ended, killed or not.
    :ivar errors: how many bytes it has written to standard error.
    """

    def __init__(self, reactor: Any) -> None:
        self.ended: Deferred[BaseException | None] = Deferred(lambda _: self._kill())
        self.gone: Deferred[None] = Deferred()
        self.output = bytearray()
        self.errors = 0
        self.too_much = False
        self._reactor = reactor
        self._open = {1, 2}
        self._looks = 0
        self._look: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """It has nothing to read."""
        assert self.transport is not None
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:
        """It has printed something."""
        self.output += data
        if len(self.output) > MAX_OUTPUT and not self.too_much:
            self.too_much = True
            self._kill()

    def errReceived(self, data: bytes) -> None:
        """It has complained."""
        self.errors += len(data)

    def childConnectionLost(self, childFD: int) -> None:
        """It has closed an output: it has ended, or is about to."""
        self._open.discard(childFD)
        if not self._open and self._look is None:
            self._reap()

    def _reap(self) -> None:
        # Twisted looks for the exit status when SIGCHLD comes, which an embedding program may keep for itself, and
        # once when the output is closed, which is a moment before the end.
        self._look = None
        if self._looks == REAP_TRIES:
            self._over(None)
            return
        self._looks += 1
        self._look = self._reactor.callLater(REAP_EVERY, self._reap)
        reapAllProcesses()

    def processEnded(self, reason: Failure) -> None:
        """It has ended, and all it printed was read."""
        self._over(reason.value)

    def _over(self, reason: BaseException | None) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._looks = REAP_TRIES
        if not self.gone.called:
            self.gone.callback(None)
        if not self.ended.called:
            self.ended.callback(reason)

    def _kill(self) -> None:
        assert self.transport is not None
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")
        # What it has started may hold its output open.
        self.transport.loseConnection()
