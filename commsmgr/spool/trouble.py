"""What is wrong with the spool's disk or database now, as a sentence for operators, and how often to say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from commsmgr.instants import shown

LONGEST: Final = 60.0
"""Seconds between two log lines about one trouble, at most; the first two are a second apart."""


class Trouble:
    """
    Belongs to the writer. Damage stays until the spool is opened anew: a commit elsewhere in the file heals nothing.

    :param directory: the spool's, for the advice; empty when it is in memory.
    :param wall: seconds since the epoch.
    :ivar text: empty when all is well.
    :ivar damaged: whether the database was found damaged.
    """

    def __init__(self, directory: str, wall: Callable[[], float]) -> None:
        self._place = f"in {directory}" if directory else "in memory"
        self._wall = wall
        self._good_at = wall()
        self._logged_at = 0.0
        self._pause = 0.0
        self.text = ""
        self.damaged = False

    def failed(self, reason: str) -> None:
        """The last batch was not done, or not all of it."""
        if not self.damaged:
            self.text = f"the spool {self._place} has failed: {reason}; all was well at {shown(self._good_at)}"

    def found_damage(self, reason: str) -> bool:
        """Reading or writing fails because of what is in the file. Return whether that is news."""
        if self.damaged:
            return False
        self.damaged = True
        self.text = (
            f"the spool's database {self._place} is damaged: {reason}; all was well at {shown(self._good_at)};"
            " what is in the damaged part is not delivered; look at the disk, then restart the agent: it sets the"
            " database aside and takes over all that can be read"
        )
        return True

    def succeeded(self) -> None:
        """The last batch was done."""
        self._good_at = self._wall()
        if not self.damaged:
            self.text = ""
            self._pause = 0.0

    def worth_a_line(self) -> bool:
        """Say whether to log that it fails: at once, and then ever more rarely."""
        now = self._wall()
        if 0 <= now - self._logged_at < self._pause:
            return False
        self._logged_at = now
        self._pause = min(max(2 * self._pause, 1.0), LONGEST)
        return True
