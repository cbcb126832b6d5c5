"""
Does the simulation find bugs? Each mutant is commsmgr with one mistake that somebody might make, or has made elsewhere.

    python -m tests.simulation.mutants [--seeds N] [NAME ...]

Every mutant is a copy of the package with one edit, and is run through the default seeds until a seed objects. The exit
status is 1 when one survives, or when its edit no longer fits the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
BATCH = 12
"""Seeds that are run before the next look at what the oracles say."""

SEEDS = 300
LONGEST = 900.0
"""Seconds that one mutant may take through all its seeds."""


@dataclass(frozen=True)
class Mutant:
    """
    One mistake.

    :ivar says: what is wrong with it, as its author would confess.
    :ivar before: occurs exactly once in ``module``, and becomes ``after``.
    :ivar oracles: those that have to notice, at least one of them.
    """

    name: str
    says: str
    module: str
    before: str
    after: str
    oracles: tuple[str, ...]


MUTANTS = (
    Mutant(
        "ack-before-commit",
        "a command is acknowledged when it arrives, not when it is in the inbox",
        "intake.py",
        "        self._accepting += 1\n",
        "        self._accepting += 1\n        source.acknowledge(arrived.id)\n",
        ("held_is_answered",),
    ),
    Mutant(
        "forget-on-send",
        "a result is forgotten when it was written to the socket, without a receipt",
        "delivery.py",
        "                link.send(fresh, self._timestamp())\n",
        "                link.send(fresh, self._timestamp())\n"
        "                self._forget([entry.seq for entry in fresh])\n",
        ("accepted_is_delivered",),
    ),
    Mutant(
        "no-redelivery",
        "what was in flight when a link ended is not sent again over HTTP",
        "delivery.py",
        "            self._sent.clear()\n            self._readers[Lane.EVENT].rewind()\n",
        "            self._sent.clear()\n",
        ("in_order", "accepted_is_delivered"),
    ),
    Mutant(
        "order-swap",
        "what is sent together is sent in the opposite order",
        "delivery.py",
        "link.send(fresh, self._timestamp())",
        "link.send(fresh[::-1], self._timestamp())",
        ("in_order",),
    ),
    Mutant(
        "done-not-stored",
        "the result goes into the outbox, but its command is not marked as finished",
        "spool/inbox_jobs.py",
        '                " WHERE key = ?",\n                (self.now,',
        '                " WHERE key = -?",\n                (self.now,',
        ("held_is_answered", "run_once"),
    ),
    Mutant(
        "offered-not-stored",
        "it is not written down that the agent has seen a command",
        "spool/inbox_jobs.py",
        "UPDATE command SET offered = 1 WHERE key = ?",
        "UPDATE command SET offered = 1 WHERE key = -?",
        ("run_once",),
    ),
    Mutant(
        "offered-too-late",
        "a command is handed to the agent before it is written down that it was",
        "channel.py",
        "            await self._mark_offered([command.key])\n",
        "            self._mark_offered([command.key])\n",
        ("run_once",),
    ),
    Mutant(
        "no-flush",
        "a commit does not wait for the disk",
        "spool/opening.py",
        'synchronous = "NORMAL" if self._settings.durability == "normal" else "FULL"',
        'synchronous = "NORMAL"',
        ("accepted_is_delivered", "held_is_answered", "run_once"),
    ),
    Mutant(
        "told-before-commit",
        "success is reported when the result was handed to the writer, not when it is committed",
        "spool/inbox.py",
        "        return self._store.submit(job)\n",
        "        self._store.submit(job).addErrback(lambda _: None)\n"
        "        told: Deferred[int] = Deferred()\n"
        "        told.callback(0)\n"
        "        return told\n",
        ("accepted_is_delivered", "held_is_answered"),
    ),
    Mutant(
        "duplicate-run-again",
        "a command that comes again is offered again",
        "intake.py",
        "            self._is_known(outcome, source, arrived)\n            return\n        source.acknowledge",
        "            self._is_known(outcome, source, arrived)\n"
        "            body = msgspec.json.encode(arrived.data)\n"
        "            outcome = Accepted(StoredCommand(outcome.key, arrived.id, arrived.digest, body, False, 0.0))\n"
        "        source.acknowledge",
        ("run_once",),
    ),
    Mutant(
        "interrupted-forgotten",
        "what the agent had begun when it died is neither reported nor offered again",
        "intake.py",
        "        for stored in opened.interrupted:\n",
        "        for stored in ():\n",
        ("held_is_answered",),
    ),
    Mutant(
        "waiting-forgotten",
        "what was in the inbox and not begun when the agent died is not offered",
        "intake.py",
        "        for stored in opened.waiting:\n",
        "        for stored in ():\n",
        ("held_is_answered",),
    ),
    Mutant(
        "barrier-too-generous",
        "a pong is taken as the receipt for what was sent after its ping as well",
        "session/barrier.py",
        "            receipted += self._batches.pop(0)[1]\n        return receipted",
        "            receipted += self._batches.pop(0)[1]\n"
        "        receipted += self._unpinged\n        self._unpinged = []\n        return receipted",
        ("accepted_is_delivered",),
    ),
    Mutant(
        "failure-is-a-receipt",
        "a result is forgotten although the request that carried it failed",
        "posting.py",
        "                self._failed(entry, error)\n                self._reader.rewind()\n",
        "                self._failed(entry, error)\n                self._given_up(entry, 'failed')\n",
        ("accepted_is_delivered",),
    ),
    Mutant(
        "commit-assumed",
        "after a failing flush the batch is taken for committed",
        "spool/writer.py",
        "        return attempt.commit is not None and self._books.counter.commits == attempt.commit",
        "        return attempt.commit is not None",
        ("accepted_is_delivered", "held_is_answered"),
    ),
    Mutant(
        "duplicate-answered-anew",
        "a duplicate of a finished command is answered with its result and with another one",
        "intake.py",
        "        if known.result_missing:\n",
        "        if known.finished:\n",
        ("effective_once",),
    ),
    Mutant(
        "reader-drops",
        "what is committed while the reader is behind is never read again",
        "spool/reader.py",
        "            else:\n                self._position = _Position.BEHIND\n        elif",
        "            else:\n                self._cursor = entry.seq\n        elif",
        ("accepted_is_delivered", "in_order"),
    ),
    Mutant(
        "timer-leak",
        "a timer is left behind when the news come first",
        "delivery.py",
        "            await self._news[lane].wait()\n        finally:\n            if timer.active():\n",
        "            await self._news[lane].wait()\n        finally:\n            if not timer.active():\n",
        ("nothing_is_left", "nothing_complains"),
    ),
    Mutant(
        "gives-up",
        "a refused upgrade is taken as final",
        "policy/reconnect.py",
        "            floor, base, cap = refused_delay / 2, refused_delay, refused_delay\n",
        "            floor, base, cap = 1e9, 1e9, 1e9\n",
        ("back_in_time",),
    ),
    Mutant(
        "nack-buries",
        "a result that the backend wants later is given up",
        "delivery.py",
        "        if refusal.retry_after is None:\n",
        "        if True:\n",
        ("accepted_is_delivered",),
    ),
    Mutant(
        "waiting-reported-interrupted",
        "what was in the inbox and not begun is reported as interrupted, and never run",
        "spool/spool.py",
        "interrupted = tuple(command for command, whole in unfinished if command.offered or not whole)",
        "interrupted, unfinished = tuple(command for command, _ in unfinished), []",
        ("held_is_answered",),
    ),
    Mutant(
        "bound-doubled",
        "twice as many events are held as may be",
        "spool/outbox.py",
        "        if events >= self._settings.max_events:\n",
        "        if events >= 2 * self._settings.max_events:\n",
        ("within_bounds",),
    ),
    Mutant(
        "slow-reconnect",
        "attempts are up to ten times as far apart as they may be",
        "policy/reconnect.py",
        "floor, base, cap = 0.0, settings.base, settings.cap",
        "floor, base, cap = 0.0, settings.base, 10 * settings.cap",
        ("back_in_time",),
    ),
    Mutant(
        "loss-counted-twice",
        "what a receipt tells of stays on the books for the next one",
        "spool/lossbook.py",
        '(1, ?, ?)", row)\n            self._db.execute("DELETE FROM loss")\n',
        '(1, ?, ?)", row)\n',
        ("losses_are_counted",),
    ),
    Mutant(
        "loss-forgotten",
        "a receipt is forgotten when it is made, before the backend has it",
        "spool/lossbook.py",
        '"INSERT INTO loss_receipt (one, id, body) VALUES (1, ?, ?)", row)',
        '"SELECT 1 WHERE ? IS ?", row)',
        ("losses_are_counted",),
    ),
    Mutant(
        "stale-state",
        "an unsent older state is sent after the newer one that should have replaced it",
        "spool/books.py",
        "            older = row[0]\n            self.delete([row[0]])\n",
        "            old = self._page(Lane.STATE, row[0] - 1, 0.0, 1).entries[0]\n"
        "            self.delete([old.seq])\n"
        "            later = first_seq(Lane.STATE) + counter.next_state + 1_000_000\n"
        "            self._insert(structs.replace(old, seq=later, key=old.id))\n"
        "            counter.states += 1\n",
        ("states_are_latest",),
    ),
    Mutant(
        "duplicate-unanswered",
        "a finished command that comes again is acknowledged, and its result is not sent again",
        "spool/inbox_jobs.py",
        "    if books.has(result_seq):\n",
        "    if True:\n",
        ("duplicates_are_answered",),
    ),
    Mutant(
        "flush-once",
        "what a failed flush has left in the log counts as durable when the log is opened anew",
        "spool/opening.py",
        '        files.write_again(self._path + "-wal")\n',
        "",
        ("accepted_is_delivered", "held_is_answered", "nothing_complains"),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant: ``caught`` by which seed, with the last lines that the simulation printed."""

    mutant: Mutant
    caught: bool
    seconds: float
    seeds: int
    output: str


def apply(mutant: Mutant, package: Path) -> None:
    """
    Make the mutant's edit in the copy at ``package``.

    :raise ValueError: the edit does not fit the source any more.
    """
    path = package / mutant.module
    source = path.read_text("utf-8")
    if source.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: what it replaces occurs {source.count(mutant.before)} times in {path.name}")
    path.write_text(source.replace(mutant.before, mutant.after), "utf-8")


def judge(mutant: Mutant, seeds: int) -> Verdict:
    """Run the simulation on a mutant until one of the oracles that should objects, or all seeds are through."""
    with TemporaryDirectory(prefix="mutant-") as directory:
        package = Path(directory) / "commsmgr"
        shutil.copytree(ROOT / "commsmgr", package, ignore=shutil.ignore_patterns("__pycache__"))
        apply(mutant, package)
        # The copy comes first on the path, and the directory that Python would put before it does not.
        environment = os.environ | {
            "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}",
            "PYTHONSAFEPATH": "1",
            "COVERAGE_PROCESS_START": "",  # a mutant's branches are nobody's
            "COVERAGE_PROCESS_CONFIG": "",
        }
        started = time.monotonic()
        done, caught, output = 0, False, ""
        while not caught and done < seeds and time.monotonic() - started < LONGEST:
            count = min(BATCH, seeds - done)
            run = subprocess.run(
                [sys.executable, "-m", "tests.simulation", "--seeds", str(count), "--from", str(done + 1)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LONGEST,
                check=False,
            )
            output = run.stdout
            if "objected to: [" not in output and run.returncode:
                break  # a mutant that cannot even run is not caught
            done += count
            caught = any(f"\n  {oracle}: " in output for oracle in mutant.oracles)
    return Verdict(mutant, caught, time.monotonic() - started, done, output)


def main(arguments: list[str], out: TextIO) -> int:
    """Judge the mutants that were named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which mutants; all by default")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds for each, at most")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    survivors = 0
    for mutant in chosen:
        verdict = judge(mutant, options.seeds)
        survivors += not verdict.caught
        word = "caught" if verdict.caught else "SURVIVED"
        print(
            f"{word:8} {verdict.seconds:6.1f} s  {verdict.seeds:4} seeds  {mutant.name}: {mutant.says}",
            file=out,
            flush=True,
        )
        if not verdict.caught:
            print(verdict.output[-2000:], file=out, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught", file=out)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout))
