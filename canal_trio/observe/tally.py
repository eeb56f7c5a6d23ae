"""Counters and histograms that cost an exchange next to nothing: plain numbers, made into families when asked.

prometheus-client's own children take a lock and a few microseconds for each number; an exchange has a dozen. Here the
loop's thread adds to dictionaries, and a scrape (the same thread) turns them into the library's metric families.
Invariant: a family shows the same names, labels and buckets as the library's own would.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Count", "Spread", "Tallies"]


@final
class Count:
    """A counter by label values. `values[labels]` may be added to directly."""

    __slots__ = ("_labels", "_name", "_text", "values")

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float, *labels: str) -> None:
        """Add `amount` for these label values."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def family(self) -> Metric:
        """The counter of now."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


@final
class Spread:
    """A histogram by label values. `bounds` are the buckets' upper limits, rising, without infinity."""

    __slots__ = ("_bounds", "_buckets", "_labels", "_name", "_sums", "_text")

    def __init__(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._labels = tuple(labels)
        self._buckets: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        if not labels:
            self._new(())

    def _new(self, labels: tuple[str, ...]) -> list[int]:
        self._sums[labels] = 0.0
        counts = self._buckets[labels] = [0] * (len(self._bounds) + 1)
        return counts

    def observe(self, value: float, *labels: str) -> None:
        """Count `value` in its bucket: the first whose limit is not below it."""
        counts = self._buckets.get(labels)
        if counts is None:
            counts = self._new(labels)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def family(self) -> Metric:
        """The histogram of now."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        limits = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, counts in self._buckets.items():
            total = 0
            cumulative: list[tuple[str, float]] = []
            for limit, count in zip(limits, counts, strict=True):
                total += count
                cumulative.append((limit, total))
            family.add_metric(labels, cumulative, self._sums[labels])
        return family


@final
class Tallies(Collector):
    """Some counts and spreads as one collector. `pour` is called before they are shown: what was added up elsewhere."""

    def __init__(self, pour: Callable[[], None] = lambda: None) -> None:
        self._pour = pour
        self._all: list[Count | Spread] = []

    def count(self, name: str, text: str, labels: Sequence[str] = ()) -> Count:
        """A new counter."""
        count = Count(name, text, labels)
        self._all.append(count)
        return count

    def spread(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> Spread:
        """A new histogram."""
        spread = Spread(name, text, bounds, labels)
        self._all.append(spread)
        return spread

    def collect(self) -> Iterator[Metric]:
        """Every family of now."""
        self._pour()
        for one in self._all:
            yield one.family()
