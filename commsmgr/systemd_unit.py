"""
``commsmgr systemd-unit``: the unit that comes with the package, with the path of the ``twistd`` that goes with it.

systemd wants absolute paths, and an environment of Python can be anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from importlib.resources import files
from typing import Any, TextIO

from commsmgr.errors import UsageError

PLACE = "/opt/commsmgr/bin/twistd"
"""Where twistd is in the unit as it comes."""

HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What ``ProtectHome=`` and ``PrivateTmp=`` hide from the service."""


def add(commands: Any) -> None:
    """Add the command to those of an :mod:`argparse` parser."""
    parser = commands.add_parser(
        "systemd-unit",
        help="print a hardened systemd unit for the agent",
        description="Prints a hardened systemd unit, which runs the twistd of this very environment. Its comments say"
        " what it expects, and what to loosen for an agent that runs commands.",
        epilog="example:\n  commsmgr systemd-unit > /etc/systemd/system/commsmgr.service",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)


def unit(twistd: str) -> str:
    """
    Return the unit.

    :param twistd: the absolute path of the program.
    :raise UsageError: it is not there, or its path cannot stand in a unit.
    """
    if not os.path.isfile(twistd):
        raise UsageError(
            f"{twistd} is not there: install commsmgr into an environment together with Twisted's programs"
        )
    if any(character in "%\\\"'$;" or character.isspace() for character in twistd):
        raise UsageError(f"{twistd} has characters that mean something else in a unit: install it elsewhere")
    return files("commsmgr").joinpath("data/commsmgr.service").read_text("utf-8").replace(PLACE, twistd)


def hidden(paths: tuple[str, ...]) -> str:
    """Return which of ``paths`` the service could not see, or nothing."""
    real = (os.path.realpath(path) for path in paths)
    return next((path for path in real if path.startswith(tuple(f"{top}/" for top in HIDDEN))), "")


def _run(options: argparse.Namespace, output: TextIO) -> bool:
    twistd = os.path.join(sysconfig.get_path("scripts"), "twistd")
    output.write(unit(twistd))
    place = hidden((twistd, sys.executable, os.path.dirname(__file__)))
    if place:
        print(f"commsmgr: the service will not see {place} (ProtectHome=, PrivateTmp=): use /opt, say", file=sys.stderr)
    return not place
