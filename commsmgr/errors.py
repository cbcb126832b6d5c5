"""
Everything that can go wrong, as one tree.

::

    CommsError
    ├── ConfigError              a setting is wrong; nothing was started
    ├── UsageError               the embedding agent called wrongly
    │   ├── InvalidMessage       what was passed cannot be a message
    │   ├── AlreadyCompleted     the command has a result already
    │   └── NotRunning           the manager is not started, or is stopping
    ├── SpoolError               the spool cannot keep or give back messages
    │   ├── QueueFull            a bound that the operator set is reached
    │   ├── SpoolLocked          another process has the spool
    │   ├── SpoolUnusable        spool.path is no place for a spool, or somebody else's
    │   └── SpoolWriteFailed     the disk is full or failing, or memory
    ├── TokenError               no usable bearer token could be had
    ├── DeadlineExceeded         the caller's time ran out
    └── TransportError           the way to a backend
        ├── ConnectFailed        no connection: name, route, port, proxy
        │   └── ProxyRefused     the proxy answered, and opened no way to the backend
        ├── TLSFailed            the peer could not be trusted, or the handshake broke
        ├── UpgradeRefused       HTTP answered, but not with a WebSocket
        ├── ConnectionEnded      an established connection is over
        │   ├── ClosedByPeer     with a close code
        │   └── PeerSilent       keep-alive or barrier unanswered
        ├── PeerViolation        what came is not what the protocol allows
        │   └── RateExceeded     it came too fast
        ├── BreakerOpen          not tried: the backend failed too often just now
        └── HTTPStatusError      an HTTP answer that is not a success

The docstring of each class is the sentence an operator reads first; ``advice`` says where to look, and ``retryable``
whether trying the same thing again can help.
"""

from __future__ import annotations

from typing import ClassVar, Final


def escaped(text: str) -> str:
    """Return ``text`` with an escape (``\\n``, ``\\x1b``, ``\\u2028``) for each character that is not printable."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class CommsError(Exception):
    """
    Something went wrong in the communications manager.

    :param fact: what happened, with the values that matter; never a secret.
    :ivar retryable: whether the same operation can succeed later without anybody changing anything.
    :ivar advice: what an operator should look at; empty where the fact says it all.
    """

    retryable: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def __init__(self, fact: str = "") -> None:
        super().__init__(fact)
        self.fact = fact or (type(self).__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        return f"{self.fact} ({self.advice})" if self.advice else self.fact


class ConfigError(CommsError):
    """
    The configuration is wrong.

    :param fact: what was expected and what was found; never the value of a secret.
    :param key: the path of the key, such as ``backends[0].url``; empty when it concerns the whole.
    :param source: the file's name, or ``environment``, or ``code``.
    :param others: further mistakes found at the same time; their sentences follow, a line each.
    :ivar mistake: the fact, without source and key.
    """

    def __init__(self, fact: str, *, key: str = "", source: str = "code", others: tuple[ConfigError, ...] = ()) -> None:
        sentence = ": ".join(part for part in (source, key, fact) if part)
        super().__init__("\n".join([sentence, *map(str, others)]))
        self.mistake = fact
        self.key = key
        self.source = source
        self.others = others


class UsageError(CommsError):
    """The manager was called in a way that can never work."""


class InvalidMessage(UsageError):
    """What was passed cannot be sent as a message."""


class AlreadyCompleted(UsageError):
    """The command has a result already; a second one was not accepted."""


class NotRunning(UsageError):
    """The manager is not running."""

    advice = "start the service first; a stopping manager accepts nothing more"


class SpoolError(CommsError):
    """The spool cannot do what was asked."""


class QueueFull(SpoolError):
    """The spool has reached the bound that was set for it."""

    retryable = True
    advice = "the backend has been away too long or is too slow: see the outage budget, or raise spool.max_*"


class SpoolLocked(SpoolError):
    """Another process has this spool."""

    advice = "one process per spool directory: stop the other one, or set another spool.path"


class SpoolUnusable(SpoolError):
    """The spool's directory cannot be used by this process."""

    advice = "spool.path has to be a directory, or a place for one, that belongs to this process's user"


class SpoolWriteFailed(SpoolError):
    """The spool's disk is full or failing, or there is no memory."""

    retryable = True
    advice = "look at the disk that holds spool.path, or at memory; no message is accepted that cannot be written"


class TokenError(CommsError):
    """No usable bearer token could be had."""

    retryable = True
    advice = "look at [auth], and at the file, variable, command or callable that gives the token"


class DeadlineExceeded(CommsError):
    """
    The time allowed for the operation ran out.

    :param may_have_arrived: whether the request had been handed to the network, so that the backend may have acted.
    """

    retryable = True

    def __init__(self, fact: str = "", *, may_have_arrived: bool = False) -> None:
        super().__init__(fact)
        self.may_have_arrived = may_have_arrived


class TransportError(CommsError):
    """
    The way to the backend failed.

    What is not printable in ``fact`` is escaped, for much of it is quoted from peers: whoever logs the error, in
    whatever form, writes one line that steers no terminal.

    :ivar may_have_arrived: whether what was being sent may have reached the backend all the same.
    """

    retryable = True

    def __init__(self, fact: str = "", *, may_have_arrived: bool = False) -> None:
        super().__init__(escaped(fact))
        self.may_have_arrived = may_have_arrived


class ConnectFailed(TransportError):
    """No connection to the backend could be made."""


class ProxyRefused(ConnectFailed):
    """
    The proxy opened no way to the backend (RFC 9110 section 9.3.6); nothing was sent to it.

    :param status: the HTTP status code that the proxy answered with, or 0 when its answer was no HTTP.
    :param retry_after: seconds the proxy asked to wait, or None.
    """

    advice = "this is the proxy's answer, not the backend's: look at [proxy] or the environment, and at the proxy's log"

    def __init__(self, fact: str = "", *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(fact)
        self.status = status
        self.retry_after = retry_after


TLS_CHECKS: Final = (
    # Of a certificate, by OpenSSL.
    "expired", "not-yet-valid", "issuer", "self-signed", "signature", "chain", "not-a-ca", "purpose",
    "name-constraints", "weak", "revoked",
    # Of a certificate, by commsmgr.
    "name", "no-name", "pin", "certificate",
    # Of the handshake.
    "version", "ciphers", "not-tls", "closed", "client-certificate", "handshake",
    # Of our own files.
    "files",
)  # fmt: skip
"""What :attr:`TLSFailed.check` may be. The words are stable; the operator's manual says what each means."""


class TLSFailed(TransportError):
    """
    The backend's TLS handshake or certificate was refused.

    What comes out of a certificate is printable, on one line and not long, whoever made it.

    :param check: which check was not passed: one of :data:`TLS_CHECKS`.
    :param host: the name or address that the backend had to prove to be.
    :param subject: of the certificate that did not pass, as an RFC 4514 string, like ``issuer``; empty when none was
        looked at.
    :param not_before: since when that certificate is valid, and with ``not_after`` until when, in seconds since the
        epoch; None when none was looked at.
    """

    advice = "nothing was sent; check the certificate, its name and dates, [tls], and this machine's clock"

    def __init__(
        self,
        fact: str = "",
        *,
        check: str = "handshake",
        host: str = "",
        subject: str = "",
        issuer: str = "",
        not_before: float | None = None,
        not_after: float | None = None,
    ) -> None:
        super().__init__(fact)
        self.check = check
        self.host = host
        self.subject = subject
        self.issuer = issuer
        self.not_before = not_before
        self.not_after = not_after

    def saying(self, fact: str) -> TLSFailed:
        """Return the same, said in other words."""
        return TLSFailed(
            fact,
            check=self.check,
            host=self.host,
            subject=self.subject,
            issuer=self.issuer,
            not_before=self.not_before,
            not_after=self.not_after,
        )


class UpgradeRefused(TransportError):
    """
    The backend answered the WebSocket upgrade with something else (RFC 6455 section 4.1).

    :param status: the HTTP status code, or 0 when the answer was no HTTP at all.
    :param retry_after: seconds the backend asked to wait, or None.
    """

    def __init__(self, fact: str = "", *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(fact)
        self.status = status
        self.retry_after = retry_after


class ConnectionEnded(TransportError):
    """An established connection is over."""


class ClosedByPeer(ConnectionEnded):
    """
    The backend closed the WebSocket (RFC 6455 section 7.4).

    :param code: the close code; 1005 when the frame bore none, 1006 when there was no close frame.
    """

    def __init__(self, fact: str = "", *, code: int = 1006) -> None:
        super().__init__(fact, may_have_arrived=True)
        self.code = code


class PeerSilent(ConnectionEnded):
    """The backend stopped answering on an open connection."""


class PeerViolation(TransportError):
    """The backend sent what the protocol or a limit of ours does not allow."""


class RateExceeded(PeerViolation):
    """The backend sends faster than the agent is to take it."""

    advice = "find out what the backend sends; if it is right, raise websocket.max_message_rate"


class BreakerOpen(TransportError):
    """
    The backend failed too often just now and is left alone for a while.

    :param retry_in: seconds until a probe is allowed.
    """

    def __init__(self, fact: str = "", *, retry_in: float = 0.0) -> None:
        super().__init__(fact)
        self.retry_in = retry_in


class HTTPStatusError(TransportError):
    """
    The backend answered with an HTTP status that is not a success (RFC 9110 section 15).

    :param status: the status code.
    :param body: the start of the answer's body, at most 1 KiB, for the log.
    :param retry_after: seconds the backend asked to wait, or None.
    """

    def __init__(self, fact: str = "", *, status: int, body: bytes = b"", retry_after: float | None = None) -> None:
        super().__init__(fact, may_have_arrived=True)
        self.status = status
        self.body = body
        self.retry_after = retry_after
