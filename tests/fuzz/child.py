"""``python -m tests.fuzz.child TARGET [CORPUS ...] [-OPTION=VALUE ...]``: one target under libFuzzer, by atheris."""

from __future__ import annotations

import gc
import sys

import atheris
from twisted.logger import globalLogBeginner


def main(argv: list[str]) -> None:
    """Fuzz until the options say that it is enough; does not return."""
    from tests.fuzz.targets import TARGETS

    program, name, *options = argv
    assert name in TARGETS, name
    # Which modules are instrumented has to be known before they are imported, and the target imports them.
    with atheris.instrument_imports(include=_instrumented(name), enable_loader_override=False):
        from tests.fuzz.targets import load

        target = load(name)
    # Warnings about an address that is not there, and the like, are no news; errors are what targets look for.
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False, discardBuffer=True)
    # What is there by now stays; so looking for garbage after an input is cheap.
    gc.collect()
    gc.freeze()
    atheris.Setup([program, *options], target.one)
    atheris.Fuzz()


def _instrumented(name: str) -> list[str]:
    """Read a target's ``INSTRUMENT`` from its source, without importing it."""
    import ast

    from tests.fuzz.targets import FINDINGS

    tree = ast.parse((FINDINGS.parent / f"{name}.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTRUMENT":
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"{name} names no INSTRUMENT")


if __name__ == "__main__":
    main(sys.argv)
