"""The messages that all contenders send, so that all send the same."""

from __future__ import annotations

from typing import Any

import msgspec

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
