"""The process that a contender runs in: ``python -m benchmarks.child MODULE:FUNCTION ARGUMENTS-AS-JSON``."""

from __future__ import annotations

import gc
import importlib
import os
import sys

import msgspec

from benchmarks.sample import Sample


def main() -> None:
    """Run the function, and write its sample to standard output as one line of JSON."""
    module, _, function = sys.argv[1].partition(":")
    run = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
    arguments = msgspec.json.decode(sys.argv[2])
    # What was imported does not belong to what is measured.
    gc.collect()
    gc.freeze()
    sample: Sample = run(**arguments)
    sys.stdout.write(msgspec.json.encode(sample).decode() + "\n")
    sys.stdout.flush()
    # Without taking apart what there is: of thousands of managers that takes as long as what was measured.
    os._exit(0)


if __name__ == "__main__":
    main()
