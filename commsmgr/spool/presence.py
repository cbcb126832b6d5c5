"""
Sees that the spool's files are still where they were opened.

A file that is removed or replaced under a running agent goes on to exist for whoever has it open, and with it all that
is written to it, until the agent stops. Nothing fails by itself; it only was all for nothing.
"""

from __future__ import annotations

import errno
import os


class Presence:
    """
    Belongs to the writer. Costs two calls of ``stat`` a batch.

    :param path: the database's.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._database: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None

    def opened(self) -> None:
        """From now on these files are meant, whichever were before."""
        self._database, self._log = _identity(self._path), None

    def closed(self) -> None:
        """The log may be folded in and removed, for the next connection to make another one."""
        self._log = None

    def missing(self) -> str:
        """
        Return what is wrong, in a sentence for operators, or nothing.

        Only to be asked while a connection is open: between two of them the log may go and come.
        """
        if _identity(self._path) != self._database:
            return _sentence(self._path)
        # There is none before the first transaction.
        log = _identity(path := f"{self._path}-wal")
        if self._log is not None and log != self._log:
            return _sentence(path)
        self._log = log
        return ""

    def require(self) -> None:
        """
        See that a new connection would find the database that the last one had.

        :raise FileNotFoundError: it would not, but make an empty spool of its own, and nobody would notice.
        """
        if _identity(self._path) != self._database:
            raise FileNotFoundError(errno.ENOENT, _sentence(self._path))


def _sentence(path: str) -> str:
    return (
        f"{path} was removed or replaced under the running agent: nothing new is taken, what was taken is delivered as"
        " long as the agent runs, and lost when it stops; restart it to begin a new spool"
    )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)  # a link in its place is another file, wherever it leads
    except OSError:
        return None
    return found.st_dev, found.st_ino
