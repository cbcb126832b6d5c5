"""Measures the same again and again in one process, with something else each time: larger, or more at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import structs

from benchmarks.sample import Sample

Grow = Mapping[str, Mapping[str, Any]]


async def grown(measure: Callable[..., Awaitable[Sample]], given: Mapping[str, Any], grow: Grow | None) -> Sample:
    """
    Measure with ``given``, which is the sample, and then with each of the changes to it.

    :param grow: the changes, by name; an extra of that name is the processor time of an operation, in microseconds, or,
        where the change says ``traced``, the bytes of memory by those of what is sent.
    """
    sample = await measure(**given)
    extra = dict(sample.extra)
    for name, change in (grow or {}).items():
        one = await measure(**{**given, **change})
        extra[name] = one.extra["copies"] if "traced" in change else one.value("cpu")
    return structs.replace(sample, extra=extra)
