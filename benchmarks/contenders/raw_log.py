"""A file that is appended to and synchronised: what durable costs without a database."""

from __future__ import annotations

import os

from benchmarks.sample import Sample, Watch


def run(operations: int, size: int, batch: int) -> Sample:
    """Append ``operations`` records of ``size`` bytes, ``batch`` of them at a time, each time with fdatasync(2)."""
    record, watch = b"r" * size * batch, Watch()
    with open("log", "ab", buffering=0) as log:
        for count in range(operations // batch + 10):
            if count == 10:
                watch.start()
            log.write(record)
            os.fdatasync(log.fileno())
    return watch.stop(operations // batch * batch)
