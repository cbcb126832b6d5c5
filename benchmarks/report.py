"""Writes what the benchmarks have shown: a table for people, JSON for programs, a plot for the documentation."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from benchmarks.measure import Figure, Result, Verdict

PACKAGES = (
    "commsmgr",
    "twisted",
    "autobahn",
    "treq",
    "msgspec",
    "websockets",
    "aiohttp",
    "requests",
    "paho-mqtt",
    "nats-py",
    "python-socketio",
    "persist-queue",
    "diskcache",
    "picows",
)
"""Whose versions are noted with the figures."""


class Machine(msgspec.Struct, frozen=True):
    """
    What figures were measured on and with.

    :ivar versions: of :data:`PACKAGES`, those that were installed.
    """

    python: str
    system: str
    versions: dict[str, str]


class Kept(msgspec.Struct, frozen=True):
    """A run of the benchmarks, as it is kept."""

    machine: Machine
    results: list[Result]


def table(result: Result) -> str:
    """Return a benchmark's table as text."""
    metrics = list(next(iter(result.figures.values())))
    width = max(len(name) for name in result.figures)
    lines = [
        f"{result.name}: {result.title}",
        f"  {_rounds(result)}, medians [least to most], ratios to {result.reference}",
    ]
    for name, figures in result.figures.items():
        cells = []
        for metric in metrics:
            ratio = result.ratios[name][metric]
            cells.append(f"{unit(metric)} {plain(figures[metric], result.rounds)}  {times(ratio, result.rounds)}")
        lines.append(f"  {name:{width}}  " + "   ".join(cells))
    lines += [f"  {line}" for line in map(_judged, result.verdicts)]
    lines += [f"  not measured: {name}: {why}" for name, why in result.missing.items()]
    return "\n".join(lines)


def restructured(result: Result) -> str:
    """Return a benchmark's table as reStructuredText, for the documentation."""
    metrics = list(next(iter(result.figures.values())))
    alone = len(result.figures) == 1
    rows = [["", *(cell for metric in metrics for cell in (unit(metric), "ratio")[: 2 - alone])]]
    for name, figures in result.figures.items():
        row = [name]
        for each in metrics:
            ratio = "1" if name == result.reference else times(result.ratios[name][each], result.rounds)
            row += [plain(figures[each], result.rounds), ratio][: 2 - alone]
        rows.append(row)
    told = _rounds(result) if alone else f"{_rounds(result)}, ratios to {result.reference}"
    lines = [f".. list-table:: {result.title} ({told})", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'*' if not index else ' '} - {cell}" for index, cell in enumerate(row)]
    lines += ["", *(f"- {_judged(verdict)}" for verdict in result.verdicts)]
    return "\n".join([*lines, *(f"- not measured: {name}" for name in result.missing)])


def _rounds(result: Result) -> str:
    return f"{result.rounds} round" + "s" * (result.rounds > 1)


def unit(metric: str) -> str:
    """Return what a metric is called in a table."""
    return {"cpu": "us CPU", "wall": "us wall", "rate": "a second"}.get(metric, metric.replace("_", " "))


def plain(figure: Figure, rounds: int) -> str:
    """Return a figure with its range, which one round has not."""
    spread = f" [{_short(figure.least)} to {_short(figure.most)}]"
    return _short(figure.median) + spread * (rounds > 1)


def times(figure: Figure, rounds: int) -> str:
    """Return a ratio with its range, which one round has not."""
    return f"x{figure.median:.2f}" + f" [{figure.least:.2f} to {figure.most:.2f}]" * (rounds > 1)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _judged(verdict: Verdict) -> str:
    target = verdict.target
    bound = f"at least {target.at_least:g}" if target.at_most is None else f"at most {target.at_most:g}"
    against = f" to {target.against}" if target.against else ""
    told = "reached" if verdict.reached else "NOT REACHED"
    return (
        f"{told}: {target.contender}{against}, {unit(target.metric)}: {_short(verdict.figure.median)}, wanted {bound}"
    )


def machine() -> Machine:
    """Return what the figures are measured on and with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(sys.version.split()[0], platform.platform(), versions)


def measured_with(machine: Machine) -> str:
    """Return the same as a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return f"Measured with Python {machine.python}, {versions}, on {machine.system}."


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write all figures, with what they were measured on."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(Kept(machine(), list(results))), indent=1) + b"\n")


def read_json(path: Path) -> Kept:
    """Return what an earlier run has written."""
    return msgspec.json.decode(path.read_bytes(), type=Kept)


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Draw, for each benchmark with several contenders, the ratio of each to the reference, by the first metric."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "commsmgr"
    from matplotlib import pyplot

    results = [result for result in results if len(result.ratios) > 1]
    heights = [len(result.figures) + 1.2 for result in results]
    drawing, axes = pyplot.subplots(
        len(results), 1, figsize=(8, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for result, axis in zip(results, axes[:, 0], strict=True):
        metric = next(iter(next(iter(result.ratios.values()))))
        names = list(result.ratios)[::-1]
        found = [result.ratios[name][metric] for name in names]
        medians = [each.median for each in found]
        spread = [
            [each.median - each.least for each in found],
            [each.most - each.median for each in found],
        ]
        colours = ["#2a6f97" if "commsmgr" in name else "#b8c4cc" for name in names]
        axis.barh(names, medians, color=colours, xerr=spread, error_kw={"lw": 0.8, "capsize": 2})
        axis.axvline(1.0, color="#444444", lw=0.8, ls=":")
        # From the left of the drawing on, for some titles are longer than an axis.
        title = f"{result.title}: {unit(metric)}, {result.reference} = 1"
        axis.annotate(title, (0.0, 1.0), (4, 4), ("figure fraction", "axes fraction"), "offset points", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, metadata={"Date": None})
