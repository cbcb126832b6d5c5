"""
Hands out the entries of one lane in order, to the one who sends them.

Theory of operation
===================

While it keeps up, committed entries come to it straight from the writer and the database is never read. When it cannot
keep up, it stops taking them and reads pages from the database, until a page says that there is nothing more.

The order holds because everything passes through one point in one order. The writer does jobs in the order in which
they were handed over, and their results are settled in that order. Let a page be read between the commits of entries A
and B. A was written before: the page has it, and if A's own notice came while the page was asked for, it was ignored. B
was written after: its number is greater than any on the page, and its notice comes after the page, when the reader has
caught up (and appends it) or has not (and ignores it, for a later page has it). No entry can be in both, or in neither.

After :meth:`Reader.rewind` the next page is asked for after all receipts handed over so far, so it lacks what they
delete. Receipts handed over later remove what they name from memory, and from a page that is under way, by the outbox's
set of receipts not yet committed. A page asked for before a rewind is recognised by its generation and dropped, or not
read any more: while a disk fails each rewind adds one.

A page that cannot be read is not asked for again here, but by the store, after a pause (see :attr:`.Job.persistent`).

An entry that was replaced, expired or buried leaves the memory when that is committed; handed out before that it is
sent although it need not be, which does no harm: a state older than the next one, an event a little over its time.

Memory is bounded by :data:`MAX_ENTRIES` and :data:`MAX_BYTES` plus one page and one message, whatever the backlog.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from enum import Enum, auto
from typing import Final

from commsmgr.spool.records import Entry, Lane, Page, first_seq

MAX_ENTRIES: Final = 1000
MAX_BYTES: Final = 1 << 20


class _Position(Enum):
    IDLE = auto()
    """The spool is not open."""
    BEHIND = auto()
    """There may be more in the database than in memory."""
    FETCHING = auto()
    """The same, and a page is under way."""
    CAUGHT_UP = auto()
    """All that is committed and not handed out is in memory."""


class Reader:
    """
    One consumer per lane. Made by :meth:`commsmgr.spool.outbox.Outbox.reader`.

    :param fetch: asks for the page after a number, for a generation; the answer comes to :meth:`paged` or
        :meth:`unpaged`.
    :param receipted: entries that need not be sent any more although they may still be in the database.
    :ivar on_ready: called, once per batch, when :meth:`take` could return something new.
    """

    def __init__(self, lane: Lane, fetch: Callable[[Lane, int, int], None], receipted: Container[int]) -> None:
        self.lane = lane
        self.on_ready: Callable[[], None] | None = None
        self._fetch = fetch
        self._receipted = receipted
        self._position = _Position.IDLE
        self._generation = 0
        self._ahead: OrderedDict[int, Entry] = OrderedDict()
        self._ahead_bytes = 0
        self._cursor = self._taken = first_seq(lane)
        self._fresh = False

    # -- for the one who sends

    def take(self, max_count: int, max_bytes: int) -> list[Entry]:
        """
        Take the next entries.

        :param max_count: at most so many.
        :param max_bytes: bytes of bodies together, which the first may exceed: ask :meth:`peek_size` before.
        :return: in order, [] when nothing is ready now.
        """
        ahead = self._ahead
        if len(ahead) <= max_count and self._ahead_bytes <= max_bytes:
            taken = list(ahead.values())
            ahead.clear()
            self._ahead_bytes = 0
        else:
            taken = self._some(max_count, max_bytes)
        if taken:
            self._taken = taken[-1].seq
        if self._position is _Position.BEHIND:
            self._refill()
        return taken

    def _some(self, max_count: int, max_bytes: int) -> list[Entry]:
        """Take as many of what is in memory as the bounds admit."""
        taken: list[Entry] = []
        ahead = self._ahead
        while ahead and len(taken) < max_count:
            seq, entry = ahead.popitem(last=False)
            size = len(entry.body)
            max_bytes -= size
            if max_bytes < 0 and taken:
                ahead[seq] = entry
                ahead.move_to_end(seq, last=False)
                break
            self._ahead_bytes -= size
            taken.append(entry)
        return taken

    def peek_size(self) -> int | None:
        """Return the number of bytes of the next entry's body; None when nothing is ready now."""
        return len(next(iter(self._ahead.values())).body) if self._ahead else None

    def rewind(self) -> None:
        """Begin again with the oldest entry not yet forgotten: what was taken and not forgotten comes again."""
        if self._position is _Position.IDLE or (self._is_at_the_beginning and self._position is not _Position.BEHIND):
            return
        self.start()

    # -- for the outbox

    @property
    def _is_at_the_beginning(self) -> bool:
        """Whether no entry was seen since it began, as with each link that is there before the first result."""
        return self._cursor == first_seq(self.lane)

    @property
    def taken(self) -> int:
        """The greatest number handed out since the last rewind: what is not greater is in flight, or forgotten."""
        return self._taken

    def start(self) -> None:
        """Begin with the oldest entry, having forgotten all."""
        self.stop()
        self._position = _Position.BEHIND
        self._refill()

    def stop(self) -> None:
        """Hand out nothing any more."""
        self._generation += 1
        self._position = _Position.IDLE
        self._ahead.clear()
        self._ahead_bytes = 0
        self._cursor = self._taken = first_seq(self.lane)
        self._fresh = False

    def committed(self, entry: Entry) -> None:
        """``entry`` is in the database now."""
        if self._position is _Position.CAUGHT_UP:
            if len(self._ahead) < MAX_ENTRIES and self._ahead_bytes < MAX_BYTES:
                self._append(entry)
                self._cursor = entry.seq
            else:
                self._position = _Position.BEHIND
        elif self._position is _Position.BEHIND and not self._ahead:
            # A page could not be read, and nobody has anything left to take that would ask for it again.
            self._refill()

    def lost_track(self) -> None:
        """
        There may be entries in the database of which nobody was told.

        Their numbers are greater than all that were handed out, but not than all that stand ready: what was committed
        by the very batch that found them has come already.
        """
        if self._position is _Position.CAUGHT_UP:
            self._ahead.clear()
            self._ahead_bytes = 0
            self._cursor = self._taken
            self._refill()

    def discard(self, seqs: Iterable[int]) -> None:
        """The entries need not be handed out any more."""
        if not self._ahead:
            return
        for seq in seqs:
            entry = self._ahead.pop(seq, None)
            if entry is not None:
                self._ahead_bytes -= len(entry.body)
                if self._position is _Position.BEHIND:
                    self._refill()

    def awaits(self, generation: int) -> bool:
        """Say, in any thread, whether a page that was asked for in ``generation`` would be used."""
        return generation == self._generation

    def paged(self, generation: int, page: Page) -> None:
        """The page that was asked for."""
        if not self.awaits(generation):
            return
        self._cursor = page.last
        self._position = _Position.CAUGHT_UP if page.complete else _Position.BEHIND
        for entry in page.entries:
            if entry.seq not in self._receipted:
                self._append(entry)
        if not page.complete:
            self._refill()

    def unpaged(self, generation: int) -> None:
        """The page that was asked for could not be read; the next :meth:`take`, or commit of the lane, asks again."""
        if self.awaits(generation):
            self._position = _Position.BEHIND

    def announce(self) -> None:
        """Call :attr:`on_ready` if there is something new."""
        if self._fresh:
            self._fresh = False
            if self._ahead and self.on_ready is not None:
                self.on_ready()

    def _append(self, entry: Entry) -> None:
        self._ahead[entry.seq] = entry
        self._ahead_bytes += len(entry.body)
        self._fresh = True

    def _refill(self) -> None:
        if 2 * len(self._ahead) < MAX_ENTRIES and 2 * self._ahead_bytes < MAX_BYTES:
            self._position = _Position.FETCHING
            self._fetch(self.lane, self._cursor, self._generation)
