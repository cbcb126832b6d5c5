"""
What the agent may do once ``twistd`` has changed its user: said before it starts, and not in the middle of a night.

The configuration is read by whoever calls ``twistd``, as a rule the superuser. Token, certificates, spool and log
belong to the life after that, as the user that it is told to become (``--uid``, ``--gid``). So they are looked at, and
the log is opened, with that user's rights: a token that only root can read would work until somebody rotates it, a log
that only root can write to would never be rotated, and root would follow the links that somebody puts in its place.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from twisted.python.util import runAsEffectiveUser

from commsmgr.errors import ConfigError

T = TypeVar("T")


class User(NamedTuple):
    """Whom the process becomes."""

    uid: int
    gid: int
    name: str

    def acting(self, call: Callable[[], T]) -> T:
        """Return what ``call`` does with the rights of this user. This process has to be the superuser's."""
        groups = os.getgroups()
        # As twistd does it: the groups that the user is in, and no longer those of the superuser.
        os.setgroups(os.getgrouplist(self.name, self.gid))
        try:
            done: T = runAsEffectiveUser(self.uid, self.gid, call)
            return done
        finally:
            os.setgroups(groups)


def to_become(twistd: Mapping[str, Any]) -> User | None:
    """
    Return the user that ``twistd`` will change to; None when it stays who it is, or will say itself that it cannot.

    :param twistd: its options, of which ``uid`` and ``gid`` count.
    :raise ConfigError: there is no such user.
    """
    uid, gid = twistd.get("uid"), twistd.get("gid")
    if uid is None or os.geteuid() != 0:
        return None
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        raise ConfigError(f"there is no user {uid}", key="--uid", source="command line") from None
    return User(uid, user.pw_gid if gid is None else gid, user.pw_name)


def require_place(path: str, source: str) -> None:
    """
    See that the spool's directory can be used, or made.

    :raise ConfigError: it cannot, with the rights of this process.
    """
    there = path
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    if os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return
    cure = f"install -d -m 0700 -o {os.geteuid()} -g {os.getegid()} {path}"
    why = f"{path} cannot be written to" if there == path else f"{path} cannot be made, as {there} cannot be written to"
    raise ConfigError(f"{why}: as root, {cure}", key="spool.path", source=source)
