"""What must not be lost: the outbox, the inbox, and the one SQLite database that holds both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commsmgr.lazy import names as _names

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
        Opened,
        OutboxStats,
        PendingLossReport,
        Reason,
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
    "Losses",
    "Opened",
    "Outbox",
    "OutboxStats",
    "PatientOpening",
    "PendingLossReport",
    "Reader",
    "Reason",
    "Salvaged",
    "Spool",
    "StoredCommand",
]

__getattr__, __dir__ = _names(
    __name__,
    {
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
            "PendingLossReport",
            "Opened",
            "OutboxStats",
            "Reason",
            "Salvaged",
            "StoredCommand",
        ),
        "spool": ("Spool",),
    },
)
