"""
``commsmgr``: what an operator asks of the files that an agent leaves, and a unit for systemd. The agent itself is run
by ``twistd commsmgr``.

Answers go to standard output, a JSON object a line; an error is one sentence on standard error. Nothing here needs the
network or a reactor, and none of that is imported, so that an answer is there at once.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import TextIO

from commsmgr import systemd_unit
from commsmgr._version import __version__
from commsmgr.errors import CommsError, ConfigError
from commsmgr.redact import single_line
from commsmgr.spooltool import commands

FINE, FOUND, USAGE = 0, 1, 2
"""Exit statuses: all is well; something is wrong or was not done; the command line or the configuration is wrong."""

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(
        prog="commsmgr",
        description="Looks after what a commsmgr agent keeps on disk. The agent itself is run by twistd commsmgr.",
        epilog="Exit status: 0 fine; 1 something is wrong, or was not done; 2 a mistake on the command line.\n\n"
        "example:\n  commsmgr spool ls --config /etc/commsmgr/agent.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"commsmgr {__version__}")
    subcommands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add(subcommands)
    systemd_unit.add(subcommands)
    return top


def main(argv: Sequence[str] | None = None, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    """
    Do what the command line says.

    :param argv: without the program's name; None: this process's.
    :param stdout: None: this process's, as UTF-8, which is what JSON is.
    :return: the exit status.
    """
    if stdout is None:
        stdout = sys.stdout
        if isinstance(stdout, TextIOWrapper):
            stdout.reconfigure(encoding="utf-8")
    stderr = stderr or sys.stderr
    if stdout is None or stderr is None:  # they were closed before we began
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            return main(argv, stdout or nowhere, stderr or nowhere)
    try:
        status = _run(argv, stdout, stderr)
        stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read has seen enough. The interpreter flushes once more at its end, and must not fail there.
        if stdout is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return FINE
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: Sequence[str] | None, stdout: TextIO, stderr: TextIO) -> int:
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            options = parser().parse_args(argv)
            return FINE if options.run(options, stdout) else FOUND
    except SystemExit as end:  # the parser's way to end, after help and mistakes
        return int(end.code or 0)
    except BrokenPipeError:
        raise
    except ConfigError as error:
        complaint, status = str(error), USAGE
    except CommsError as error:
        complaint, status = str(error), FOUND
    except UnicodeEncodeError:
        complaint, status = "an argument is not UTF-8, and what it names cannot be written as JSON", USAGE
    except PermissionError as error:
        where = error.filename or "output"
        complaint, status = f"{where}: {error.strerror}; run it as the agent's user, or as the superuser", FOUND
    except OSError as error:
        complaint, status = f"{error.filename or 'output'}: {error.strerror or error}", FOUND
    except sqlite3.Error as error:
        complaint, status = f"the spool, or the copy of it that is read, cannot be used: {error}", FOUND
    except Exception as error:
        # Nobody should have to read a traceback to learn that; where it was will do for a report.
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        complaint, status = f"a fault of this program, which please report: {error!r} at {where}", FOUND
    print(f"commsmgr: {single_line(complaint)}", file=stderr)
    return status
