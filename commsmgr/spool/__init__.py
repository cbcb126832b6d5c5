"""What must not be lost: the outbox, the inbox, and the one SQLite database that holds both."""

from __future__ import annotations

from commsmgr.spool.inbox import Inbox
from commsmgr.spool.outbox import Outbox
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
    StoredCommand,
)
from commsmgr.spool.spool import Spool

__all__ = [
    "RESULT_KIND",
    "Accepted",
    "DeadLetter",
    "Duplicate",
    "Entry",
    "Inbox",
    "Lane",
    "Loss",
    "Opened",
    "Outbox",
    "OutboxStats",
    "Reader",
    "Spool",
    "StoredCommand",
]
