"""
The spool's directory: made for this user alone, and refused where others could put a file or a link of theirs into it.

An agent has privileges, and what it writes to a file of its spool it would write to whatever a link of that name leads
to. The names are looked at, and opened without following links; but between two looks nobody else must be able to
change them, and against hard links looking does not help at all. So it is the directory that keeps others out.
"""

from __future__ import annotations

import os
import stat

from commsmgr.errors import SpoolUnusable


def make(path: str) -> None:
    """
    Create the directory ``path`` with mode 0700 if it is not there, and those above it that are missing likewise.

    :raise OSError: it cannot be made, or something else has its name.
    """
    above = os.path.dirname(path)
    if above and not os.path.lexists(above):
        make(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def require_private(path: str) -> None:
    """
    See that the directory ``path`` belongs to this process's user, and that nobody else can write to it.

    It may be a symbolic link (systemd makes one for a ``StateDirectory=``), but not one that another user has made, who
    could lead us elsewhere the next time. The directories above are not looked at.

    :raise SpoolUnusable: others could change what is in it.
    """
    user = os.geteuid()
    link, found = os.lstat(path), os.stat(path)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (user, 0):
        raise SpoolUnusable(
            f"{path} is a symbolic link that user {link.st_uid} has made, who could let it lead elsewhere: set"
            f" spool.path to {os.path.realpath(path)} itself"
        )
    if found.st_uid != user:
        raise SpoolUnusable(
            f"{path} belongs to user {found.st_uid}, and this process runs as user {user}: run it as that user, or give"
            f" it the directory with all files in it (chown -R {user} {path})"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SpoolUnusable(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: others than its owner could put files of theirs in the"
            f" place of the spool's. See that there are none, then: chmod 700 {path}"
        )
