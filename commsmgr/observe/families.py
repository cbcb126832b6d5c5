"""
Numbers by label values, kept as plain dictionaries and made into Prometheus' families when somebody scrapes.

Written on one thread, read on any: a scrape works on copies.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf
from typing import TypeAlias

from msgspec import Struct, field
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

OTHER = "other"
MOST_SERIES = 500

Series: TypeAlias = dict[tuple[str, ...], float]


class Family(Struct):
    """
    A counter or a gauge: one number for each combination of label values.

    :ivar family: what a scrape makes of it.
    :ivar text: its help.
    :ivar labels: their names.
    :ivar values: by the labels' values, in the same order.
    """

    family: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    text: str
    labels: tuple[str, ...] = ()
    values: Series = field(default_factory=dict)

    def add(self, key: tuple[str, ...], amount: float) -> None:
        values = self.values
        if key not in values:
            if len(values) >= MOST_SERIES:
                key = (OTHER,) * len(key)
            values.setdefault(key, 0)
        values[key] += amount

    def collect(self, values: Series | None = None) -> Metric:
        family = self.family(f"commsmgr_{self.name}", self.text, labels=self.labels)
        # A copy, because another thread may scrape while the reactor's counts.
        for key, value in (self.values.copy() if values is None else values).items():
            family.add_metric(key, value)
        return family


class Histogram:
    """Durations in seconds: per combination of label values the count of each bucket, the last one without bound."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], labels: tuple[str, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._labels = labels
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: Series = {}

    def observe(self, key: tuple[str, ...], seconds: float) -> None:
        if key not in self._counts:
            if len(self._counts) >= MOST_SERIES:
                key = (OTHER,) * len(key)
            # The sum first: a scrape by another thread walks the counts and looks the sum up.
            self._sums.setdefault(key, 0.0)
            self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
        self._sums[key] += seconds
        self._counts[key][bisect_left(self._bounds, seconds)] += 1

    def collect(self) -> Metric:
        family = HistogramMetricFamily(f"commsmgr_{self._name}", self._text, labels=self._labels)
        for key, counts in self._counts.copy().items():
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*self._bounds, inf), counts.copy(), strict=True):
                total += count
                buckets.append(("+Inf" if bound == inf else str(bound), total))
            family.add_metric(key, buckets, self._sums[key])
        return family
