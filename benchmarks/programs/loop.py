"""An event loop of asyncio with aiohttp imported, up to its first turn: the other place to begin from."""

from __future__ import annotations

import asyncio

import aiohttp  # noqa: F401  # it is the import that is measured

from benchmarks.programs.tick import tell


async def main() -> None:
    """Be called in the first turn."""
    tell()


if __name__ == "__main__":
    asyncio.run(main())
