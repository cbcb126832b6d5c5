"""
``twistd commsmgr`` with careless code around it: whatever fails tells in its exception what the token is. Run by
test_secrets, which looks for it in all that this leaves.

The file that ``CARELESS_TOKEN`` names holds the token that is told.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from twisted.scripts.twistd import run

from commsmgr import tap
from commsmgr.handlers import BuiltinHandler
from commsmgr.messages import Command


def told() -> str:
    """Return the token, as one may find it in an exception's text."""
    token = Path(os.environ["CARELESS_TOKEN"]).read_text()
    return f"cannot reach the vault with {token!r} (Authorization: Bearer {token})"


class CarelessHandler(BuiltinHandler):
    """Fails on the commands that ask for it."""

    def __call__(self, command: Command) -> Any:
        if command.type == "crash":
            # Beside the manager, and in the handler.
            from twisted.internet import reactor

            reactor.callLater(0, crash)  # type: ignore[attr-defined]  # the module stands for the reactor
            crash()
        return super().__call__(command)


def crash() -> None:
    """Fail."""
    raise RuntimeError(told())


tap.BuiltinHandler = CarelessHandler  # type: ignore[misc]  # in place of the agent's
sys.argv[0] = "twistd"
run()
