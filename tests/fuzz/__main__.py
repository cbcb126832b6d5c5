"""
``python -m tests.fuzz``: run the targets, each in a process of its own; or replay an input.

Exits with 1 when an input broke a promise; it then lies in ``findings/TARGET/``, and the output says how to replay it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.targets import FINDINGS, TARGETS, load, replay

MEGABYTES = 1024
"""Memory that a target's process may take. The interpreter, Twisted and atheris' tables need a quarter of that."""

LONGEST = 4096
"""Bytes of an input. Limits that need more to be reached have tests of their own."""

SLOWEST = 10
"""Seconds for one input."""

ROOT = Path(__file__).resolve().parent.parent.parent


def main(argv: list[str]) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"which, of {', '.join(TARGETS)}; default all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at once (default: one a processor)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 draws one (default)")
    parser.add_argument("--keep", metavar="DIRECTORY", help="a corpus to start from, that what is new is added to")
    parser.add_argument("--replay", metavar="FILE", nargs="+", help="inputs, in a directory with the target's name")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if arguments.replay:
        return int(sum(_replayed(Path(name)) for name in arguments.replay) > 0)
    targets = arguments.targets or list(TARGETS)
    for name in targets:
        load(name)  # not in threads, which would wait for each other's imports
    with ThreadPoolExecutor(arguments.jobs) as pool:
        kept = list(pool.map(lambda name: _fuzzed(name, arguments), targets))
    found = [name for name, good in zip(targets, kept, strict=True) if not good]
    print(f"{len(targets) - len(found)} targets kept their promises, {len(found)} did not {found or ''}")
    return int(bool(found))


def _replayed(path: Path) -> bool:
    """Replay one input; return whether it broke a promise."""
    try:
        replay(path.resolve().parent.name, path.read_bytes())
    except Exception:
        traceback.print_exc()
        print(f"{path}: broke a promise")
        return True
    print(f"{path}: all promises were kept")
    return False


def _fuzzed(name: str, arguments: argparse.Namespace) -> bool:
    """Run one target; return whether it kept its promises."""
    target = load(name)
    with tempfile.TemporaryDirectory(prefix="commsmgr-fuzz-") as work:
        corpus = Path(arguments.keep, name) if arguments.keep else Path(work, "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        seeds = Path(work, "seeds")
        seeds.mkdir()
        for seed in target.seeds():
            seeds.joinpath(hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        dictionary = Path(work, "tokens")
        dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in target.TOKENS), "ascii")
        crashes = Path(work, "crashes")
        crashes.mkdir()
        kept = FINDINGS / name
        command = [
            *(sys.executable, "-m", "tests.fuzz.child", name),
            *map(str, [corpus, seeds, *[kept] * kept.is_dir()]),
            *(f"-max_total_time={arguments.seconds}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"),
            *(f"-timeout={SLOWEST}", f"-dict={dictionary}", f"-artifact_prefix={crashes}/", f"-seed={arguments.seed}"),
            *("-print_final_stats=1", "-verbosity=1"),
        ]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                errors="backslashreplace",
                text=True,
                # libFuzzer looks at its clock between inputs only.
                timeout=arguments.seconds + 4 * SLOWEST + 60,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"== {name}: did not end within its time")
            return False
        inputs = sorted(crashes.iterdir())
        said = [f"== {name}: {_summary(done.stdout)}"]
        if wrong := done.returncode != 0 or inputs:
            said.append(done.stdout[-6000:])
        for path in inputs:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / path.name).write_bytes(path.read_bytes())
            said.append(f"again: python -m tests.fuzz --replay {(kept / path.name).relative_to(ROOT)}")
        print("\n".join(said), flush=True)
        return not wrong


def _summary(output: str) -> str:
    """Return the last line of libFuzzer's in which it says how far it has come."""
    lines = [line for line in output.splitlines() if line.startswith("#") and " cov: " in line]
    runs = [line for line in output.splitlines() if line.startswith("stat::number_of_executed_units")]
    return " | ".join([*lines[-1:], *runs]) or "it did not begin"


def _escaped(token: bytes) -> str:
    """Return a token as libFuzzer's dictionaries have it."""
    return "".join(f"\\x{byte:02x}" for byte in token)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
