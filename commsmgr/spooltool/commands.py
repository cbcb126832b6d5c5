"""``commsmgr spool``: its grammar, and what each of its commands writes."""

from __future__ import annotations

import argparse
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TextIO

import msgspec

from commsmgr import config
from commsmgr.errors import ConfigError, SpoolError
from commsmgr.settings import load_spool
from commsmgr.spool.faults import is_torn
from commsmgr.spooltool import access, changes, health, repair, snapshot
from commsmgr.spooltool.rows import Row, Table, listing, named

DROPPABLE = (Table.EVENTS, Table.STATES, Table.DEAD)
_NO_BOUND = 1 << 62


def add(top: Any) -> None:
    """
    Add ``spool`` to the commands.

    :param top: the sub-parsers. ``run``, of the options, takes these and the output, and says whether all is well.
    """
    spool = top.add_parser(
        "spool",
        help="look into a spool, mend it, send dead letters again",
        description="Looks into an agent's spool. ls, show, export and verify work beside a running agent, on a copy;"
        " requeue, drop and repair want it stopped, and say so.",
        epilog="Names are ids; or an event's number; or what a state is the state of.\n\n"
        "example:\n  commsmgr spool verify --config /etc/commsmgr/agent.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    under = spool.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ls = _command(under, "ls", _ls, "list what waits", "commsmgr spool ls dead --limit 20")
    ls.add_argument(
        "table",
        nargs="?",
        default=Table.EVENTS,
        type=_table,
        metavar="events|states|dead|commands|losses",
        help="events (default), states: the oldest first; dead letters: the latest first; commands: those without a"
        " result first; losses: what was given up and the backend has not acknowledged",
    )
    _limit(ls)

    show = _command(under, "show", _show, "show all that a name means, bodies included", "commsmgr spool show 4711")
    show.add_argument("name", metavar="NAME", help="an id, an event's number, or what a state is the state of")

    export = _command(under, "export", _export, "write everything, bodies included", "commsmgr spool export dead")
    export.add_argument(
        "tables", nargs="*", type=_table, metavar="TABLE", help="as for ls; without any: all of them, one after another"
    )
    export.add_argument("--output", metavar="FILE", help="a new file, which nobody else may read, and not the terminal")
    _limit(export)

    requeue = _command(
        under, "requeue", _requeue, "have dead letters sent again", "commsmgr spool requeue --all --reason refused"
    )
    requeue.add_argument("names", nargs="*", metavar="NAME", help="the dead letter's id or number")
    requeue.add_argument("--all", action="store_true", help="all that can be sent, the oldest first")
    requeue.add_argument("--reason", help="with --all: only those that died of this, such as refused or expired")
    _limit(requeue, "with --all: ")

    drop = _command(
        under, "drop", _drop, "give up what waits, delete dead letters", "commsmgr spool drop --all dead --yes"
    )
    drop.add_argument("names", nargs="*", metavar="NAME", help="ids, numbers, or what states are the state of")
    drop.add_argument("--all", type=_droppable, metavar="events|states|dead", help="all that is in there")
    drop.add_argument("--yes", action="store_true", help="really; nothing is dropped without this")
    _limit(drop, "with --all: ")

    _command(under, "verify", _verify, "say what is wrong with it, and its totals", "commsmgr spool verify | tail -1")
    _command(under, "repair", _repair, "mend what verify finds wrong", "commsmgr spool repair --path /var/lib/commsmgr")


def _command(under: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = under.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="FILE", help="the agent's configuration, whose spool.path and bounds count")
    where.add_argument("--path", metavar="DIR", help=f"the spool's directory; without both: {config.Spool().path}")
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def _limit(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument("--limit", type=_count, metavar="N", help=f"{when}so many at most")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 62):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _table(text: str) -> Table:
    try:
        return Table(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(each.value for each in Table)}") from None


def _droppable(text: str) -> Table:
    table = _table(text)
    if table not in DROPPABLE:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be dropped, only {', '.join(each.value for each in DROPPABLE)}"
        )
    return table


def _settings(options: argparse.Namespace) -> config.Spool:
    """Return the spool's settings; its path is absolute."""
    if options.config is not None:
        settings = load_spool(options.config)
        if settings.durability == "memory":
            raise ConfigError("is memory: nothing is on disk", key="spool.durability", source=options.config)
        if not settings.path:
            raise ConfigError("is empty", key="spool.path", source=options.config)
    else:
        if options.path == "":
            options.usage_error("--path is empty")
        settings = config.Spool() if options.path is None else config.Spool(path=options.path)
    return msgspec.structs.replace(settings, path=os.path.abspath(settings.path))


def _keeping(options: argparse.Namespace) -> config.Spool:
    """
    Return the settings to change the spool by. What the agent's own are nobody knows without its configuration, and by
    the defaults older dead letters might have to give way that it would keep: none do then.
    """
    settings = _settings(options)
    if options.config is None:
        settings = msgspec.structs.replace(settings, max_dead_letters=_NO_BOUND, max_bytes=_NO_BOUND)
    return settings


def write(rows: Iterable[Row], output: TextIO) -> int:
    """Write a line for each of ``rows``; return how many."""
    count = 0
    encode = msgspec.json.Encoder().encode
    for row in rows:
        output.write(encode(row).decode() + "\n")
        count += 1
    return count


def _listed(options: argparse.Namespace, tables: Iterable[Table], output: TextIO, *, bodies: bool) -> int:
    directory = _settings(options).path
    broken: list[sqlite3.DatabaseError] = []

    def rows(db: sqlite3.Connection) -> Iterator[Row]:
        for table in tables:
            try:
                yield from listing(db, table, bodies=bodies)
            except sqlite3.DatabaseError as error:  # the other tables may be whole
                broken.append(error)

    with snapshot.readable(directory) as db:
        count = write(islice(rows(db), options.limit), output)
    if broken:
        raise _in_words(broken[0], directory) from broken[0]
    return count


def _in_words(error: sqlite3.DatabaseError, directory: str) -> SpoolError:
    if is_torn(error):
        return snapshot.Unusable(f"not everything in {directory} can be read: {error}")
    return SpoolError(f"the copy of {directory} cannot be read: {error}")


def _ls(options: argparse.Namespace, output: TextIO) -> bool:
    _listed(options, [options.table], output, bodies=False)
    return True


def _export(options: argparse.Namespace, output: TextIO) -> bool:
    tables = options.tables or list(Table)
    if options.output is None:
        _listed(options, tables, output, bodies=True)
        return True
    try:
        descriptor = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SpoolError(f"{options.output} exists already; name a new file") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            count = _listed(options, tables, file, bodies=True)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(options.output)  # half of it could be taken for all
        raise
    write([{"done": "exported", "count": count, "output": options.output}], output)
    return True


def _show(options: argparse.Namespace, output: TextIO) -> bool:
    directory = _settings(options).path
    with snapshot.readable(directory) as db:
        try:
            count = write(named(db, options.name), output)
        except sqlite3.DatabaseError as error:
            raise _in_words(error, directory) from error
    if not count:
        raise SpoolError(f"nothing in {directory} is called {options.name}; ls shows what there is")
    return True


def _requeue(options: argparse.Namespace, output: TextIO) -> bool:
    if bool(options.names) == options.all:
        options.usage_error("say which dead letters, or --all")
    if not options.all and (options.reason is not None or options.limit is not None):
        options.usage_error("--reason and --limit go with --all")
    settings, now = _settings(options), time.time()
    if options.all:
        work = changes.requeue_all(options.reason, options.limit, settings, now)
    else:
        work = changes.requeue(options.names, settings, now)
    return _changed(options, work, output)


def _drop(options: argparse.Namespace, output: TextIO) -> bool:
    if bool(options.names) == (options.all is not None):
        options.usage_error("say what to drop, or --all events, states or dead")
    if options.all is None and options.limit is not None:
        options.usage_error("--limit goes with --all")
    if not options.yes:
        options.usage_error("nothing was dropped: say --yes if you mean it; what is dropped is never sent")
    now = time.time()
    if options.all is not None:
        work = changes.drop_all(options.all, options.limit, now)
    else:
        work = changes.drop(options.names, now)
    return _changed(options, work, output)


def _changed(options: argparse.Namespace, work: changes.Work, output: TextIO) -> bool:
    settings = _keeping(options)
    with access.locked(settings.path):
        done = access.change(settings, work)
    write(done, output)
    return True


def _verify(options: argparse.Namespace, output: TextIO) -> bool:
    report: Row = {}
    for report in health.verify(_settings(options).path):
        write([report], output)
    return bool(report["ok"])


def _repair(options: argparse.Namespace, output: TextIO) -> bool:
    write(repair.repair(_keeping(options), time.time), output)
    return True
