"""
Room kept for the worst moment: a file that holds disk space and nothing else.

On a full disk SQLite cannot even delete, for deleting writes to the log first, and a checkpoint that would free the log
has to grow the database. So receipts would be lost exactly when they are the way out. The ballast is given up at the
first sign of a full disk; from then until it can be had again only essential jobs are done, those that make the spool
smaller or settle what the agent has already begun.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

NAME: Final = "spool.ballast"
SIZE = 8 << 20
"""Twice what the log may grow to before it is folded into the database."""


class Ballast:
    """
    :param directory: the spool's, for it is that disk's space that counts.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = os.path.join(directory, NAME)
        self._held = False

    def restore(self) -> bool:
        """
        Take the space if it is not held, leaving as much again free.

        :return: whether it is held.
        """
        if self._held:
            return True
        try:
            held = os.lstat(self._path).st_size if os.path.lexists(self._path) else 0
            space = os.statvfs(self._directory)
            if held < SIZE and space.f_bavail * space.f_frsize < 2 * SIZE:
                return False
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, SIZE)
            finally:
                os.close(descriptor)
        except OSError:
            self.drop()
            return False
        self._held = True
        return True

    def drop(self) -> None:
        """Give the space up."""
        self._held = False
        with suppress(OSError):
            os.unlink(self._path)
