"""Runs the contenders of a benchmark in turns, and compares them."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.sample import Sample

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 600.0
"""Seconds that one run of a contender may take."""
PREPARING = 120.0
"""Seconds within which a server of ours listens; some make something first."""
OWN = ("commsmgr", "benchmarks")
"""Packages that are always there: a module of theirs that is not found is a mistake."""


class Missing(Exception):
    """Something that a benchmark needs is not on this machine."""


class Server(Struct, frozen=True):
    """
    What contenders talk to.

    :ivar command: a single word: a module of ``benchmarks.servers``, which says its address as a line of JSON. More:
        somebody's program, where ``{port}`` is a free port and ``{directory}`` an empty directory of its own.
    :ivar package: Debian's package that has the program.
    """

    command: tuple[str, ...]
    package: str = ""


class Contender(Struct, frozen=True):
    """
    What is measured.

    :ivar name: in the table.
    :ivar run: ``module:function`` in ``benchmarks.contenders``.
    :ivar arguments: of the function; the server's address comes on top.
    :ivar server: the name of the server that it talks to.
    """

    name: str
    run: str
    arguments: dict[str, Any] = {}
    server: str = ""


class Target(Struct, frozen=True):
    """
    What is to be reached: ``contender``'s value as a ratio to ``against``'s, or by itself when that is empty.

    :ivar metric: see :meth:`.Sample.value`.
    """

    contender: str
    metric: str
    against: str = ""
    at_most: float | None = None
    at_least: float | None = None


class Benchmark(Struct, frozen=True):
    """
    Contenders that do the same work.

    :ivar title: what one operation is.
    :ivar metrics: what the table shows of each, the first of them in the plot.
    :ivar reference: the contender that ratios are taken to.
    """

    name: str
    title: str
    contenders: tuple[Contender, ...]
    reference: str
    metrics: tuple[str, ...] = ("cpu", "wall")
    servers: dict[str, Server] = {}
    targets: tuple[Target, ...] = ()
    rounds: int = 3


class Figure(Struct, frozen=True):
    """A median with the least and the most of what was seen."""

    median: float
    least: float
    most: float


class Verdict(Struct, frozen=True):
    """What became of a target."""

    target: Target
    figure: Figure
    reached: bool


class Result(Struct, frozen=True):
    """
    What a benchmark has shown.

    :ivar figures: by contender, by metric.
    :ivar ratios: the same, each to the reference's within the same round.
    :ivar missing: contenders that were not measured, and why; targets that concern them are not judged.
    """

    name: str
    title: str
    reference: str
    rounds: int
    figures: dict[str, dict[str, Figure]]
    ratios: dict[str, dict[str, Figure]]
    verdicts: list[Verdict]
    missing: dict[str, str] = {}


def figure(values: Sequence[float]) -> Figure:
    """Return the median and the range of ``values``."""
    return Figure(statistics.median(values), min(values), max(values))


def ratios(samples: Mapping[str, Sequence[Sample]], metric: str, contender: str, against: str) -> Figure:
    """Return how ``contender`` compares with ``against``, round by round."""
    pairs = zip(samples[contender], samples[against], strict=True)
    return figure([one.value(metric) / (other.value(metric) or 1e-9) for one, other in pairs])


def compare(benchmark: Benchmark, rounds: int = 0, say: Any = None) -> Result:
    """
    Run a benchmark.

    :param rounds: how often each contender runs; the benchmark's own number when 0.
    :raise Missing: what the reference needs is not on this machine; what others need is noted.
    """
    rounds = rounds or benchmark.rounds
    samples: dict[str, list[Sample]] = {each.name: [] for each in benchmark.contenders}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        addresses: dict[str, dict[str, Any]] = {"": {}}
        for name, server in benchmark.servers.items():
            try:
                addresses[name] = stack.enter_context(serving(server))
            except Missing as error:
                missing |= {each.name: str(error) for each in benchmark.contenders if each.server == name}
        for turn in range(rounds):
            first = turn % len(benchmark.contenders)
            for contender in benchmark.contenders[first:] + benchmark.contenders[:first]:
                if contender.name in missing:
                    continue
                try:
                    sample = run(contender, addresses[contender.server])
                except Missing as error:
                    missing[contender.name] = str(error)
                    continue
                samples[contender.name].append(sample)
                if say is not None:
                    say(f"{benchmark.name} {turn + 1}/{rounds} {contender.name}: {sample.value('cpu'):.1f} us CPU")
    if benchmark.reference in missing:
        raise Missing(missing[benchmark.reference])
    for name in missing:
        del samples[name]
    metrics = benchmark.metrics
    return Result(
        benchmark.name,
        benchmark.title,
        benchmark.reference,
        rounds,
        {name: {each: figure([s.value(each) for s in found]) for each in metrics} for name, found in samples.items()},
        {name: {each: ratios(samples, each, name, benchmark.reference) for each in metrics} for name in samples},
        [
            verdict(samples, target)
            for target in benchmark.targets
            if not missing.keys() & {target.contender, target.against}
        ],
        missing,
    )


def verdict(samples: Mapping[str, Sequence[Sample]], target: Target) -> Verdict:
    """Say whether a target was reached, by the median."""
    if target.against:
        found = ratios(samples, target.metric, target.contender, target.against)
    else:
        found = figure([each.value(target.metric) for each in samples[target.contender]])
    reached = (target.at_least is None or found.median >= target.at_least) and (
        target.at_most is None or found.median <= target.at_most
    )
    return Verdict(target, found, reached)


def run(contender: Contender, address: Mapping[str, Any]) -> Sample:
    """Run a contender once, in a process of its own, in an empty directory of its own, where it may write."""
    with scratch() as directory:
        given = {**contender.arguments, **address}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", contender.run, msgspec.json.encode(given).decode()],
            cwd=directory,
            env=environment(),
            capture_output=True,
            timeout=LONGEST,
            check=False,
        )
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace")
        if package := not_installed(text):
            raise Missing(f"{contender.name}: {package} is not installed (pip install -e '.[bench]')")
        raise RuntimeError(f"{contender.name} ended with {done.returncode}:\n{text[-4000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Sample)


def not_installed(text: str) -> str:
    """
    Return which module of somebody else's package a process has not found, if it ended by that; else an empty string.

    :param text: what it wrote to standard error.
    """
    found = re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'[^\n]*\s*\Z", text, re.MULTILINE)
    return "" if found is None or found[1].partition(".")[0] in OWN else found[1]


@contextmanager
def serving(server: Server) -> Iterator[dict[str, Any]]:
    """Start a server, yield the address for contenders, and end it."""
    with scratch() as directory:
        own, port = len(server.command) == 1, free_port()
        if own:
            words = [sys.executable, "-m", f"benchmarks.servers.{server.command[0]}"]
        else:
            words = [each.format(port=port, directory=directory) for each in server.command]
            words[0] = program(words[0], package=server.package)
        errors = directory / "stderr"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                words,
                cwd=directory,
                env=environment(),
                stdout=subprocess.PIPE if own else subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            yield _first_line(process, errors) if own else _listening(process, port, errors)
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def program(name: str, *, package: str) -> str:
    """
    Return the path of a program.

    :raise Missing: it is not installed; says which of Debian's packages has it.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if path is None:
        raise Missing(f"{name} is not installed (as root: apt-get install {package})")
    return path


def _first_line(process: subprocess.Popen[bytes], errors: Path) -> dict[str, Any]:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], PREPARING)
    line = process.stdout.readline() if readable else b""
    if not line:
        text = errors.read_text(errors="replace")
        if package := not_installed(text):
            raise Missing(f"a server needs {package}, which is not installed (pip install -e '.[bench]')")
        raise RuntimeError(f"a server does not start:\n{text[-4000:]}")
    address: dict[str, Any] = msgspec.json.decode(line)
    return address


def _listening(process: subprocess.Popen[bytes], port: int, errors: Path) -> dict[str, Any]:
    ends = time.monotonic() + 30
    while time.monotonic() < ends and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return {"port": port}
        time.sleep(0.05)
    raise RuntimeError(f"a server does not start:\n{errors.read_text(errors='replace')[-4000:]}")


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty directory on a real disk: where /tmp is in memory, fsync would cost nothing."""
    with tempfile.TemporaryDirectory(prefix="commsmgr-bench-", dir="/var/tmp") as name:
        yield Path(name)


def environment() -> dict[str, str]:
    """Return what a child is started with."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}


def free_port() -> int:
    """Return a port of loopback that nobody uses, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
