"""
Public names of a package that are loaded when first asked for (PEP 562): whatever imports a part of it, as the command
line does, need not load the rest, and the network, with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def names(package: str, homes: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Return ``__getattr__`` and ``__dir__`` for ``package``.

    :param homes: by the name of each module below it: the public names that come from there.
    """
    home_of = {name: module for module, found in homes.items() for name in found}
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(f"{package}.{home_of[name]}"), name)
        return value

    return get, lambda: sorted({*namespace, *home_of})
