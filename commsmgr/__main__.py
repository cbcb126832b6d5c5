"""``python -m commsmgr`` is the command ``commsmgr``."""

from __future__ import annotations

import sys

from commsmgr.cli import main

if __name__ == "__main__":
    sys.exit(main())
