"""What contenders over WebSocket have in common: the messages that they send, and how those that come are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.sample import Sample, Watch

WARMING = 2000
"""Messages before those that count."""

SIZE = 256


def content(number: int) -> dict[str, Any]:
    """Return a message as a program has it; 256 bytes when it is encoded without blanks."""
    made: dict[str, Any] = {
        "type": "command_result",
        "id": f"r-{number:08}",
        "timestamp": "2026-01-01T00:00:00Z",
        "data": {"command_id": f"c-{number:08}", "status": "success", "exit_code": 0, "output": ""},
    }
    made["data"]["output"] = "o" * (SIZE - len(msgspec.json.encode(made)))
    return made


def message(number: int) -> bytes:
    """Return the same, encoded."""
    return msgspec.json.encode(content(number))


def counted(operations: int, finished: Callable[[Sample], None], before: int = WARMING) -> Callable[..., None]:
    """
    Return what is called with each message that comes.

    :param finished: called with the sample when so many have come.
    :param before: messages before those that count.
    """
    watch, came = Watch(), 0

    def arrived(*_: object) -> None:
        nonlocal came
        came += 1
        if came == before:
            watch.start()
        elif came == operations + before:
            finished(watch.stop(operations))

    return arrived
