"""Torn spools: whatever was done to the files, what can be read is served, nothing is invented, nothing comes twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import config
from commsmgr.spool import Accepted, Duplicate, Entry, Lane, Opened, Spool, ballast, files, image, schema, wal
from commsmgr.spool.salvage import Salvage
from commsmgr.spooltool.health import wrong_totals

PAGE = 4096
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Nothing here depends on a real disk, and hundreds of starts would wait for it."""

T = TypeVar("T")


class AtOnce:
    """An executor that does everything where it stands."""

    linger = 0.0

    def __call__(self, work: Callable[[], T], /) -> Deferred[T]:
        return maybeDeferred(work)

    def stop(self) -> Deferred[None]:
        return maybeDeferred(lambda: None)


class Torn(SynchronousTestCase):
    """
    A spool with known content, whose files are then ruined.

    :ivar told: the entries that were accepted, not forgotten and not buried, by id.
    :ivar forgotten: the ids of those that the backend has.
    """

    def setUp(self) -> None:
        self.patch(ballast, "SIZE", PAGE)
        self.directory = Path(tempfile.mkdtemp(prefix="commsmgr-salvage-", dir=MEMORY))
        self.addCleanup(shutil.rmtree, self.directory)
        self.database = self.directory / files.DATABASE
        self.log = self.directory / f"{files.DATABASE}-wal"
        self.told: dict[str, Entry] = {}
        self.forgotten: set[str] = set()
        self.random = Random(7)

    # -- making

    def spool(self) -> Spool:
        settings = config.Spool(path=str(self.directory), durability="normal")
        clock = Clock()
        clock.advance(1000.0)
        return Spool(settings, reactor=clock, wall=clock.seconds, executor=AtOnce())

    def open(self, spool: Spool) -> Opened:
        return self.successResultOf(spool.open())

    def put(self, spool: Spool, id: str, size: int = 500) -> int:
        return self.successResultOf(
            spool.outbox.put(lane=Lane.EVENT, kind="note", id=id, body=self.random.randbytes(size), ttl=None)
        )

    def command(self, spool: Spool, id: str, *, offered: bool = False, result: bool = False) -> None:
        answer = self.successResultOf(spool.inbox.accept(id=id, digest="d", body=id.encode()))
        assert isinstance(answer, Accepted)
        if offered:
            self.successResultOf(spool.inbox.offered([answer.command.key]))
        if result:
            body = self.random.randbytes(200)
            done = spool.inbox.complete(
                key=answer.command.key, command_id=id, status="success", result_id=f"r-{id}", body=body
            )
            self.successResultOf(done)

    def served(self, spool: Spool) -> list[Entry]:
        got: list[Entry] = []
        for lane in Lane:
            reader = spool.outbox.reader(lane)
            reader.rewind()
            while entries := reader.take(10_000, 1 << 40):
                got += entries
        return got

    def fill(self, events: int = 240) -> None:
        """Fill the spool, close it, and note what is in it."""
        spool = self.spool()
        self.open(spool)
        for n in range(events):
            self.put(spool, f"e{n}", 9000 if n % 40 == 7 else 500)
            if n % 40 == 20:
                self.command(spool, f"done{n}", offered=True, result=True)
        self.command(spool, "running", offered=True)
        self.command(spool, "waiting")
        for key in ("inventory", "other", "inventory"):
            put = spool.outbox.put(lane=Lane.STATE, kind=key, id=f"s-{key}", body=b"state", key=key)
            self.successResultOf(put)
        held = self.served(spool)
        # The last of them free whole pages, which keep what stood on them.
        receipted = {"e3", "e4", "e50", "e51", "e52", "r-done20", *(f"e{n}" for n in range(100, 140))}
        gone = [entry for entry in held if entry.id in receipted]
        self.successResultOf(spool.outbox.forget(entry.seq for entry in gone))
        (buried,) = [entry for entry in held if entry.id == "e9"]
        self.successResultOf(spool.outbox.bury(buried.seq, "refused"))
        self.forgotten = {entry.id for entry in gone}
        self.told = {entry.id: entry for entry in self.served(spool)}
        self.successResultOf(spool.close())
        self.pristine = self.database.read_bytes()

    def crash(self, events: int) -> None:
        """Add events, and leave the files as a killed process would: the latest commits are in the log alone."""
        spool = self.spool()
        self.open(spool)
        for n in range(events):
            self.put(spool, f"late{n}")
        self.told |= {entry.id: entry for entry in self.served(spool)}
        kept = {path: path.read_bytes() for path in (self.database, self.log)}
        self.successResultOf(spool.close())
        for path, content in kept.items():
            path.write_bytes(content)
        self.pristine = kept[self.database]

    def mark(self) -> None:
        files.mark(str(self.directory), "found by the test")

    def reset(self) -> None:
        """Remove all that the last start has made, and put the database as it was."""
        for path in self.directory.iterdir():
            path.unlink()
        self.database.write_bytes(self.pristine)

    # -- judging

    def places(self) -> dict[str, set[int]]:
        """The numbers of the pages on which parts of each entry's body stood, older copies of it included."""
        found: dict[str, set[int]] = {}
        for name, entry in self.told.items():
            if len(entry.body) < 50:
                continue
            found[name] = set()
            for at in range(0, len(entry.body) - 20, 400):
                piece, start = entry.body[at : at + 20], -1
                while (start := self.pristine.find(piece, start + 1)) >= 0:
                    found[name] |= {start // PAGE + 1, (start + 19) // PAGE + 1}
        return found

    def start(self) -> tuple[Opened, list[Entry]]:
        """Start; judge what holds whatever happened; return what was found."""
        spool = self.spool()
        opened = self.open(spool)
        entries = self.served(spool)
        for lane in Lane:
            numbers = [entry.seq for entry in entries if entry.lane is lane]
            self.assertEqual(numbers, sorted(set(numbers)), "in order, none twice")
        for entry in entries:
            if entry.id in self.told:
                self.assertEqual(entry, self.told[entry.id])
            else:
                # The result of a finished command may come again: whether it was forgotten cannot be known.
                self.assertIn(entry.id, self.forgotten)
                self.assertEqual(entry.kind, "command_result")
        stats = spool.outbox.stats
        self.assertEqual(stats.events + stats.states, len(entries))
        self.successResultOf(spool.close())
        db = sqlite3.connect(self.database)
        self.assertEqual(list(wrong_totals(db)), [])
        (following,) = db.execute("SELECT next_event FROM counter").fetchone()
        self.assertGreater(following, max((entry.seq for entry in entries if entry.lane is Lane.EVENT), default=0))
        db.close()
        return opened, entries

    def missing(self, entries: list[Entry]) -> set[str]:
        return self.told.keys() - {entry.id for entry in entries}

    def losses(self) -> int:
        db = sqlite3.connect(self.database)
        (count,) = db.execute("SELECT total(n) FROM loss WHERE reason = 'damaged'").fetchone()
        db.close()
        return int(count)


class DamagedTests(Torn):
    """Damage within the database, found while it was in use."""

    def test_nothing_damaged(self) -> None:
        """A mark on a database that is whole costs nothing: all is taken over, and the next start is a normal one."""
        self.fill()
        content = self.pristine
        self.mark()
        opened, entries = self.start()
        self.assertEqual(self.missing(entries), set())
        assert opened.set_aside is not None and opened.salvaged is not None
        self.assertEqual(Path(opened.set_aside).read_bytes(), content)
        self.assertEqual(
            (opened.salvaged.events + opened.salvaged.states, opened.salvaged.finished, opened.salvaged.lost),
            (len(self.told), 6, 0),
        )
        self.assertEqual(opened.salvaged.dead_letters, 1)
        self.assertEqual([command.id for command in opened.interrupted], ["running"])
        self.assertEqual([command.id for command in opened.waiting], ["waiting"])
        opened, entries = self.start()
        self.assertIsNone(opened.set_aside)
        spool = self.spool()
        self.open(spool)
        duplicate = self.successResultOf(spool.inbox.accept(id="done20", digest="d", body=b""))
        self.assertIsInstance(duplicate, Duplicate)
        self.assertEqual((duplicate.finished, duplicate.result_id), (True, "r-done20"))
        self.assertFalse(duplicate.result_missing)
        self.successResultOf(spool.close())

    def test_each_page(self) -> None:
        """Whichever page is zeroed: all entries but those that have a part of themselves on it are served."""
        self.fill()
        places = self.places()
        pages = len(self.pristine) // PAGE
        self.assertGreater(pages, 60)
        for page in range(1, pages + 1):
            self.reset()
            self.mark()
            with self.database.open("r+b") as file:
                file.seek((page - 1) * PAGE)
                file.write(bytes(PAGE))
            opened, entries = self.start()
            self.assertIsNotNone(opened.set_aside, page)
            lost = self.missing(entries)
            self.assertEqual({name for name in lost if name in places and page not in places[name]}, set(), page)
            self.assertEqual({name for name in lost if name.startswith("r-")}, set(), "these are remembered elsewhere")
            assert opened.salvaged is not None
            self.assertGreaterEqual(opened.salvaged.lost, len(lost), page)
            # The one loss of before is counted again when its row is lost.
            self.assertIn(self.losses() - opened.salvaged.lost, (0, 1), page)

    def test_flipped_bits(self) -> None:
        """A flipped bit, wherever it is, costs at most what stands on its page."""
        self.fill()
        places = self.places()
        for seed in range(60):
            self.reset()
            self.mark()
            bit = Random(seed).randrange(100 * 8, len(self.pristine) * 8)
            content = bytearray(self.pristine)
            content[bit // 8] ^= 1 << bit % 8
            self.database.write_bytes(content)
            _, entries = self.start()
            page = bit // 8 // PAGE + 1
            lost = self.missing(entries)
            self.assertEqual({name for name in lost if name in places and page not in places[name]}, set(), seed)

    def test_many_ruined_pages(self) -> None:
        """Noise on a tenth of all pages: the rest is served."""
        self.fill()
        places = self.places()
        pages = len(self.pristine) // PAGE
        for seed in range(20):
            random = Random(seed)
            ruined = set(random.sample(range(3, pages + 1), pages // 10))
            self.reset()
            self.mark()
            with self.database.open("r+b") as file:
                for page in ruined:
                    file.seek((page - 1) * PAGE)
                    file.write(random.randbytes(PAGE))
            _, entries = self.start()
            lost = self.missing(entries)
            self.assertEqual({name for name in lost if name in places and not ruined & places[name]}, set(), seed)

    def test_cut_short(self) -> None:
        """A file that ends too early: what stands before the end is served, without any mark."""
        self.fill()
        places = self.places()
        size = len(self.pristine)
        for length in (50, 99, 512, 3000, *range(PAGE, size, size // 23)):
            self.reset()
            os.truncate(self.database, length)
            opened, entries = self.start()
            self.assertIsNotNone(opened.set_aside, length)
            lost = self.missing(entries)
            whole = {name for name, pages in places.items() if max(pages) * PAGE <= length}
            self.assertEqual(lost & whole, set(), length)

    def test_totals_lost(self) -> None:
        """Where nothing says any more how many there were, that is said, and told to the backend as one at least."""
        self.fill(50)
        for length in (0, 50, PAGE, 2 * PAGE):
            self.reset()
            os.truncate(self.database, length)
            opened, entries = self.start()
            assert opened.salvaged is not None
            self.assertEqual(entries, [], length)
            self.assertTrue(opened.salvaged.uncounted, length)
            self.assertGreater(opened.salvaged.lost, 0, length)
            self.assertEqual(self.losses(), opened.salvaged.lost, length)
            self.assertIn(f"at least {opened.salvaged.lost} unreadable", str(opened.salvaged), length)

    def test_dropped_table(self) -> None:
        """The totals are found wherever they are, and tell how many are missing."""
        spool = self.spool()
        self.open(spool)
        for n in range(50):
            self.put(spool, f"e{n}")
        self.successResultOf(spool.close())
        with closing(sqlite3.connect(self.database)) as db:
            db.executescript("PRAGMA secure_delete = ON; DROP TABLE entry")
        opened, entries = self.start()
        assert opened.salvaged is not None
        self.assertEqual((entries, opened.salvaged.lost, self.losses()), ([], 50, 50))
        self.assertFalse(opened.salvaged.uncounted)

    def test_lost_result(self) -> None:
        """A result whose entry is damaged is put back from what is remembered for duplicates of its command."""
        self.fill()
        db = sqlite3.connect(self.database)
        with db:
            db.execute("UPDATE entry SET body = zeroblob(9) WHERE id = 'r-done60'")
            db.execute("UPDATE entry SET body = zeroblob(9) WHERE id = 'e61'")
        db.close()
        self.mark()
        opened, entries = self.start()
        self.assertEqual(self.missing(entries), {"e61"})
        assert opened.salvaged is not None
        self.assertEqual((opened.salvaged.lost, self.losses(), opened.salvaged.dead_letters), (1, 1, 2))

    def test_numbers(self) -> None:
        """No number comes a second time, though the entry that had it has gone."""
        self.fill()
        spool = self.spool()
        self.open(spool)
        last = self.put(spool, "last")
        self.successResultOf(spool.outbox.forget([last]))
        self.successResultOf(spool.close())
        self.mark()
        self.open(spool)
        self.assertGreater(self.put(spool, "next"), last)
        self.successResultOf(spool.close())

    def test_wild_key(self) -> None:
        """A command whose number is damaged does not use up all numbers for those to come."""
        self.fill()
        with closing(sqlite3.connect(self.database)) as db, db:
            db.execute("UPDATE command SET key = ? WHERE id = 'waiting'", ((1 << 63) - 1,))
        self.mark()
        opened, _ = self.start()
        assert opened.salvaged is not None
        self.assertEqual((opened.waiting, opened.salvaged.lost), ((), 1))
        spool = self.spool()
        self.open(spool)
        self.command(spool, "new")
        self.successResultOf(spool.close())

    def test_older_version(self) -> None:
        """A spool of the first layout is ours as well."""
        self.fill()
        older = self.directory / "older"
        db = sqlite3.connect(older, isolation_level=None)
        first = self.patch(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        schema.prepare(db, synchronous="OFF", in_memory=False)
        first.restore()
        db.execute("ATTACH ? AS newer", (str(self.database),))
        db.execute("INSERT INTO entry SELECT * FROM newer.entry")
        db.close()
        older.replace(self.database)
        self.mark()
        _, entries = self.start()
        self.assertEqual(self.missing(entries), set())

    def test_salvage_that_breaks(self) -> None:
        """A mistake in the salvage itself is logged, and never stops the start."""
        self.fill()
        self.mark()

        def broken(*_: Any) -> int:
            raise ZeroDivisionError

        self.patch(Salvage, "_command", broken)
        _, entries = self.start()
        self.assertEqual(self.missing(entries), set())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class LogTests(Torn):
    """Damage to the write-ahead log, or to what it belongs to."""

    def late(self) -> set[str]:
        return {name for name in self.told if name.startswith("late")}

    def test_database_lost(self) -> None:
        """Without the database, or with one of no bytes, what stands in the log is served."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        for keep in (True, False):
            self.reset()
            self.log.write_bytes(log)
            if keep:
                self.database.write_bytes(b"")
            else:
                self.database.unlink()
            opened, entries = self.start()
            self.assertIn(".empty" if keep else ".missing", opened.set_aside or "")
            self.assertEqual(self.missing(entries) & self.late(), set())
            self.assertEqual(Path(f"{opened.set_aside}-wal").read_bytes(), log)

    def test_garbage_at_the_beginning(self) -> None:
        """A log whose first bytes are bad, but whose frames are whole, is as good as ever."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        for header in (bytes(32), os.urandom(32)):
            self.reset()
            self.log.write_bytes(header + log[32:])
            opened, entries = self.start()
            self.assertIn(".garbage-wal", opened.set_aside or "")
            self.assertEqual(self.missing(entries), set())
            self.assertEqual([command.id for command in opened.waiting], ["waiting"])

    def test_flipped_bit_in_the_header(self) -> None:
        """Whichever byte of the log's header is wrong, all that stands in the log is served."""
        self.fill()
        self.crash(20)
        log = self.log.read_bytes()
        for place in range(wal.HEADER):
            for bit in (1 << place % 8, 1 << (place + 5) % 8):
                self.reset()
                self.log.write_bytes(log[:place] + bytes((log[place] ^ bit,)) + log[place + 1 :])
                opened, entries = self.start()
                self.assertIn(".garbage-wal", opened.set_aside or "", place)
                self.assertEqual(self.missing(entries), set(), place)

    def test_flipped_bit_in_a_frame(self) -> None:
        """A bad frame that others follow costs what stands in it; what was lost is counted, no command begun twice."""
        self.fill()
        self.crash(30)
        log = self.log.read_bytes()
        frames = (len(log) - wal.HEADER) // wal.FRAME
        ends = [n for n in range(frames) if any(log[wal.HEADER + n * wal.FRAME + 4 :][:4])]
        before, worst = self.commits(), 0
        for number in range(ends[-2] + 1):
            random = Random(number)
            place = (random.randrange(4), 8 + random.randrange(16), 24 + random.randrange(PAGE))[number % 3]
            self.reset()
            at = wal.HEADER + number * wal.FRAME + place
            self.log.write_bytes(log[:at] + bytes((log[at] ^ 1 << random.randrange(8),)) + log[at + 1 :])
            opened, entries = self.start()
            self.assertIn(".damaged-wal", opened.set_aside or "", (number, place))
            assert opened.salvaged is not None
            lost = self.missing(entries)
            worst = max(worst, len(lost))
            self.assertGreaterEqual(opened.salvaged.lost, len(lost), (number, place))
            self.assertEqual(opened.waiting, ())
            self.assertGreaterEqual(self.commits(), before, (number, place))
        self.assertLess(worst, 10)

    def commits(self) -> int:
        with closing(sqlite3.connect(self.database)) as db:
            return int(db.execute("SELECT commits FROM counter").fetchone()[0])

    def test_torn_last_transaction(self) -> None:
        """Whatever a power cut does to the transaction that was being written: it is no damage."""
        self.fill()
        self.crash(30)
        log = self.log.read_bytes()
        ends = [at for at in range(wal.HEADER, len(log), wal.FRAME) if any(log[at + 4 : at + 8])]
        for at in range(ends[-2] + wal.FRAME, len(log), wal.FRAME):
            for hole in (bytes(wal.FRAME), self.random.randbytes(wal.FRAME), log[at : at + 99] + bytes(wal.FRAME - 99)):
                self.reset()
                self.log.write_bytes(log[:at] + hole + log[at + wal.FRAME :])
                opened, entries = self.start()
                self.assertIsNone(opened.set_aside)
                self.assertEqual(self.missing(entries), {"late29"})

    def test_rest_of_an_unfinished_transaction(self) -> None:
        """A transaction that was being written over the rest of a larger one, never finished: no damage."""
        self.fill()
        self.crash(30)
        log = self.log.read_bytes()
        frames = [log[at : at + wal.FRAME] for at in range(wal.HEADER, len(log), wal.FRAME)]
        ends = [number for number, frame in enumerate(frames) if any(frame[4:8])]
        # The last transaction once more, which changes nothing.
        again = gone_on(log, frames[ends[-2] + 1 :])
        unfinished = gone_on(log, [frame[:4] + bytes(4) + frame[8:] for frame in reversed(frames[-12:])])
        self.assertGreater(len(unfinished), len(again) + 2 * wal.FRAME)
        for size in (*range(0, len(again), 512), len(again) - wal.FRAME + 24, len(again) - 1, len(again)):
            self.reset()
            self.log.write_bytes(log + again[:size] + unfinished[size:])
            opened, entries = self.start()
            self.assertIsNone(opened.set_aside, size)
            self.assertEqual(self.missing(entries), set())

    def test_unfinished_transaction_behind_a_flipped_bit(self) -> None:
        """Whatever goes on from a bad transaction was written after it was flushed, though it was never finished."""
        self.fill()
        self.crash(30)
        log = self.log.read_bytes()
        behind = gone_on(log, [log[-wal.FRAME :][:4] + bytes(4) + log[-wal.FRAME :][8:]])
        for place in (20, 100):  # the checksum, and the page
            self.reset()
            at = len(log) - wal.FRAME + place
            self.log.write_bytes(log[:at] + bytes((log[at] ^ 1,)) + log[at + 1 :] + behind)
            opened, _ = self.start()
            self.assertIn(".damaged-wal", opened.set_aside or "", place)

    def test_log_about_to_begin_anew(self) -> None:
        """A header that is half-written is no damage if all that the log holds is in the database."""
        self.fill()
        self.crash(20)
        log = self.log.read_bytes()
        with self.database.open("r+b") as file, self.log.open("rb") as source:
            image._fold_in(source, file)
        folded = self.database.read_bytes()
        for size in range(4, wal.HEADER):
            self.reset()
            self.database.write_bytes(folded)
            self.log.write_bytes(log[:4] + os.urandom(size - 4) + log[size:])
            opened, entries = self.start()
            self.assertIsNone(opened.set_aside, size)
            self.assertEqual(self.missing(entries), set())

    def test_torn_first_sector(self) -> None:
        """The log's beginning and its first frame are lost together, but not what was written behind them."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        for size in (64, 512, PAGE):
            for sector in (bytes(size), self.random.randbytes(size)):
                self.reset()
                self.log.write_bytes(sector + log[size:])
                opened, entries = self.start()
                self.assertIn(".garbage-wal", opened.set_aside or "")
                self.assertEqual(self.missing(entries), set())
                # What was begun in the transaction that is lost nobody knows.
                self.assertEqual([command.id for command in opened.interrupted], ["running", "waiting"])

    def test_zeros_at_the_beginning(self) -> None:
        """Zeros would be the frames of a log of zeros, to which no other belongs: they are none."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        for size in (32, PAGE, 4151, 4152, 4176, 4200, 8192, 8300, 20_000, wal.HEADER + 7 * wal.FRAME):
            for start in (0, wal.HEADER):
                self.reset()
                self.log.write_bytes(log[:start] + bytes(size - start) + log[size:])
                opened, entries = self.start()
                self.assertEqual(self.missing(entries), set(), (size, start))
                if size > start:
                    self.assertIn("-wal", opened.set_aside or "", (size, start))

    def test_emptied_under_the_agent(self) -> None:
        """A log that was cut to nothing, and went on behind a hole: what was written since is served."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        frames = (len(log) - wal.HEADER) // wal.FRAME
        for hole in range(1, frames - 12, 7):
            self.reset()
            start = wal.HEADER + hole * wal.FRAME
            self.log.write_bytes(bytes(start) + log[start:])
            opened, entries = self.start()
            self.assertIn(".garbage-wal", opened.set_aside or "")
            self.assertIn("late49", {entry.id for entry in entries}, hole)
            assert opened.salvaged is not None
            self.assertGreaterEqual(opened.salvaged.lost, len(self.missing(entries)), hole)

    def test_hole_behind(self) -> None:
        """A log that somebody has made large without writing to it is nothing to be filled, nor any damage."""
        self.fill(40)
        self.crash(10)
        os.truncate(self.log, 1 << 26)
        content = self.log.read_bytes()
        files.write_again(str(self.log))
        self.assertEqual(self.log.read_bytes(), content)
        self.assertLess(self.log.stat().st_blocks * 512, 1 << 23)
        opened, entries = self.start()
        self.assertIsNone(opened.set_aside)
        self.assertEqual(self.missing(entries), set())

    def test_page_that_is_none(self) -> None:
        """A frame of page 0 is none, whatever its checksum."""
        self.fill()
        self.crash(5)
        log = self.log.read_bytes()
        first = bytes(7) + b"\1" + log[wal.HEADER + 8 : wal.HEADER + wal.FRAME]
        seed = wal.frame_checksum(wal._order(log), first, wal._PAIR.unpack(log[24:32]))
        self.log.write_bytes(log[: wal.HEADER] + first[:16] + wal._PAIR.pack(*seed) + first[24:])
        with self.log.open("rb") as file:
            self.assertEqual(wal.read(file, 0, wal.part).latest, {})

    def test_absurd_page(self) -> None:
        """A frame that nothing proves, and that speaks of a database of terabytes, makes no file of that size."""
        self.fill()
        self.crash(5)
        log = self.log.read_bytes()
        scratch = self.directory / "image"
        for number, committed in ((2, 1 << 31), (1 << 31, 1 << 31), (1 << 31, 2)):
            head = bytes(wal.HEADER) + number.to_bytes(4, "big") + committed.to_bytes(4, "big")
            for end in (wal.HEADER + wal.FRAME, len(log)):
                self.log.write_bytes(head + log[len(head) : end])
                image.make(str(self.database), str(scratch), self.pristine[:PAGE], use_log=True)
                self.assertLessEqual(scratch.stat().st_size, len(self.pristine) + len(log))

    def test_garbage(self) -> None:
        """Without any log the database is served; what was not offered as of then may have been offered since."""
        self.fill()
        self.crash(50)
        self.log.write_bytes(bytes(self.log.stat().st_size))
        opened, entries = self.start()
        self.assertEqual(self.missing(entries) - self.late(), set())
        self.assertEqual([command.id for command in opened.interrupted], ["running", "waiting"])
        self.assertEqual(opened.waiting, ())
        # The totals are of before the log: how many it held nobody knows.
        assert opened.salvaged is not None
        self.assertEqual((opened.salvaged.lost, opened.salvaged.uncounted, self.losses()), (1, True, 1))

    def test_log_and_totals_lost(self) -> None:
        """Of a log that is lost one is counted, though all rows that are there can be read."""
        self.fill(40)
        with closing(sqlite3.connect(self.database)) as db, db:
            db.execute("DELETE FROM counter")
        for log, lost in ((b"", 0), (bytes(20_000), 1), (self.random.randbytes(20_000), 1)):
            content = self.database.read_bytes()
            self.log.write_bytes(log)
            opened, entries = self.start()
            assert opened.salvaged is not None
            self.assertEqual(self.missing(entries), set())
            self.assertEqual((opened.salvaged.lost, opened.salvaged.uncounted), (lost, bool(lost)))
            self.pristine = content
            self.reset()

    def test_numbers_of_a_lost_log(self) -> None:
        """No number comes a second time, though nothing is left of the rows that had them, nor of the totals."""
        self.fill(40)
        spool = self.spool()
        self.open(spool)
        for n in range(20):
            last = self.put(spool, f"late{n}")
            accepted = self.successResultOf(spool.inbox.accept(id=f"late{n}", digest="d", body=b""))
        content = self.database.read_bytes()
        self.successResultOf(spool.close())
        self.database.write_bytes(content)
        self.log.write_bytes(bytes(50_000))
        spool = self.spool()
        self.assertIn(".garbage-wal", self.open(spool).set_aside or "")
        self.assertGreater(self.put(spool, "next"), last)
        again = self.successResultOf(spool.inbox.accept(id="next", digest="d", body=b""))
        self.assertGreater(again.command.key, accepted.command.key)
        self.successResultOf(spool.close())

    def test_foreign(self) -> None:
        """Another database's log, of whatever page size, is not applied."""
        self.fill()
        for size in (4096, 1024):
            path = self.directory / "foreign"
            db = sqlite3.connect(path, isolation_level=None)
            db.execute(f"PRAGMA page_size = {size}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE entry (seq)")
            log = Path(f"{path}-wal").read_bytes()
            db.close()
            self.reset()
            self.log.write_bytes(log)
            opened, entries = self.start()
            self.assertIn(".foreign-wal", opened.set_aside or "")
            self.assertEqual(self.missing(entries), set())
            self.assertEqual(Path(f"{opened.set_aside}-wal").read_bytes(), log)

    def test_cut_short(self) -> None:
        """A log that ends too early is what a crash leaves: its whole transactions count, in order, and no more."""
        self.fill()
        self.crash(30)
        log = self.log.read_bytes()
        before = -1
        for length in range(0, len(log), len(log) // 15):
            self.reset()
            self.log.write_bytes(log[:length])
            opened, entries = self.start()
            self.assertIsNone(opened.set_aside)
            late = [entry.id for entry in entries if entry.id.startswith("late")]
            self.assertEqual(late, [f"late{n}" for n in range(len(late))])
            self.assertEqual(self.missing(entries) - self.late(), set())
            self.assertGreaterEqual(len(late), before)
            before = len(late)

    def test_damaged_database_beside_a_log(self) -> None:
        """The log is folded into the copy that is read, up to the first frame that is damaged; the originals stay."""
        self.fill()
        self.crash(50)
        log = self.log.read_bytes()
        places = self.places()
        for tear in (len(log), len(log) // 2):
            self.reset()
            self.mark()
            self.log.write_bytes(log[:tear] + log[tear + 1 :])
            page = len(self.pristine) // PAGE // 2
            with self.database.open("r+b") as file:
                file.seek((page - 1) * PAGE)
                file.write(bytes(PAGE))
            hashes = {path: hashlib.sha256(path.read_bytes()).digest() for path in (self.database, self.log)}
            opened, entries = self.start()
            lost = self.missing(entries)
            if tear < len(log):
                lost -= self.late()
            self.assertEqual({name for name in lost if page not in places.get(name, set())}, set())
            for path, digest in hashes.items():
                aside = f"{opened.set_aside}{path.name.removeprefix(files.DATABASE)}"
                self.assertEqual(hashlib.sha256(Path(aside).read_bytes()).digest(), digest)

    def test_newer_in_the_log_alone(self) -> None:
        """What a newer version has written into the log is not read, whatever is wrong with the database."""
        self.fill()
        db = sqlite3.connect(self.database, isolation_level=None)
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        log = self.log.read_bytes()
        db.close()
        self.reset()
        self.database.unlink()
        self.log.write_bytes(log)
        opened, entries = self.start()
        self.assertIn(".missing", opened.set_aside or "")
        self.assertEqual(entries, [])


def gone_on(log: bytes, frames: list[bytes]) -> bytes:
    """Return ``frames`` as SQLite would have written them behind the last one of ``log``."""
    order = wal._order(log)
    seed = wal._PAIR.unpack(log[-wal.FRAME :][16:24])
    written = b""
    for frame in frames:
        seed = wal.frame_checksum(order, frame, seed)
        written += frame[:16] + wal._PAIR.pack(*seed) + frame[24:]
    return written
