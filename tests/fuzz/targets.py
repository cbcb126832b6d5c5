"""Which targets there are, and how one is had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

TARGETS = ("frames", "upgrade", "envelopes", "answers", "configuration", "tokens", "log")

FINDINGS = Path(__file__).resolve().parent / "findings"


class Target(Protocol):
    """A module of this package."""

    INSTRUMENT: Sequence[str]
    TOKENS: Sequence[bytes]

    @staticmethod
    def one(data: bytes) -> None: ...

    @staticmethod
    def seeds() -> Iterator[bytes]: ...


def load(name: str) -> Target:
    """Return the target of that name."""
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}; there are {', '.join(TARGETS)}")
    return cast(Target, import_module(f"tests.fuzz.{name}"))


def replay(name: str, data: bytes) -> None:
    """Let a target take an input; raises when it breaks a promise."""
    load(name).one(data)


def findings() -> Iterator[tuple[str, Path]]:
    """Yield each kept input with its target's name, in order."""
    for path in sorted(FINDINGS.glob("*/*")):
        yield path.parent.name, path
