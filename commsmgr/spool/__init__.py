"""What must not be lost: the outbox, the inbox, and the one SQLite database that holds both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commsmgr.spool.executor import Executor
    from commsmgr.spool.inbox import Inbox
    from commsmgr.spool.losses import Losses
    from commsmgr.spool.outbox import Outbox
    from commsmgr.spool.patience import PatientOpening
    from commsmgr.spool.reader import Reader
    from commsmgr.spool.records import (
        RESULT_KIND,
        Accepted,
        DeadLetter,
        Duplicate,
        Entry,
        Lane,
        Loss,
        LossReceipt,
        Opened,
        OutboxStats,
        Salvaged,
        StoredCommand,
    )
    from commsmgr.spool.spool import Spool

__all__ = [
    "RESULT_KIND",
    "Accepted",
    "DeadLetter",
    "Duplicate",
    "Entry",
    "Executor",
    "Inbox",
    "Lane",
    "Loss",
    "LossReceipt",
    "Losses",
    "Opened",
    "Outbox",
    "OutboxStats",
    "PatientOpening",
    "Reader",
    "Salvaged",
    "Spool",
    "StoredCommand",
]

# Looked up when first asked for: the command line uses the modules below this without loading Deferreds.
_HOMES = {
    "executor": ("Executor",),
    "inbox": ("Inbox",),
    "losses": ("Losses",),
    "outbox": ("Outbox",),
    "patience": ("PatientOpening",),
    "reader": ("Reader",),
    "records": (
        "RESULT_KIND",
        "Accepted",
        "DeadLetter",
        "Duplicate",
        "Entry",
        "Lane",
        "Loss",
        "LossReceipt",
        "Opened",
        "OutboxStats",
        "Salvaged",
        "StoredCommand",
    ),
    "spool": ("Spool",),
}


def __getattr__(name: str) -> Any:
    """Load a public name."""
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"commsmgr.spool.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
