"""Latencies: cheap to record, exact enough to compare, kept as HDR histograms.

Invariant: recording is one dictionary increment; what is recorded is folded into an HDR histogram (1 µs to 10 min,
three significant digits) only when somebody asks. Nothing recorded is ever dropped: beyond the range counts as its end.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]  # it has no stubs

__all__ = ["Latency"]

LOWEST, HIGHEST, DIGITS = 1, 600_000_000, 3
SHOWN = (50.0, 90.0, 99.0, 99.9)


class Latency:
    """Times in whole microseconds. Use `counts[us] += 1` on the hot path, anything else after it."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)

    def record(self, microseconds: float) -> None:
        """Count one."""
        self.counts[int(microseconds)] += 1

    def add(self, other: Latency) -> None:
        """Count all of another's."""
        for value, count in other.counts.items():
            self.counts[value] += count

    def clear(self) -> None:
        """Forget everything."""
        self.counts.clear()

    def __len__(self) -> int:
        return sum(self.counts.values())

    def hdr(self) -> HdrHistogram:
        """As an HDR histogram."""
        histogram = HdrHistogram(LOWEST, HIGHEST, DIGITS)
        for value, count in self.counts.items():
            histogram.record_value(min(max(value, LOWEST), HIGHEST), count)
        return histogram

    @property
    def worst(self) -> float:
        """The largest, in microseconds, exactly; 0 if there is none."""
        return max(self.counts, default=0)

    def at(self, percentile: float) -> float:
        """The value at a percentile, in microseconds; 0 if there is none."""
        return float(self.hdr().get_value_at_percentile(percentile)) if self.counts else 0.0

    def summary(self) -> dict[str, Any]:
        """Milliseconds at the usual percentiles, and the curve for a plot."""
        histogram = self.hdr()
        if not self.counts:
            return {"count": 0}
        points = [0, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 100]
        return {
            "count": len(self),
            **{f"p{shown:g}": histogram.get_value_at_percentile(shown) / 1000 for shown in SHOWN},
            "max": self.worst / 1000,
            "curve": [[point, histogram.get_value_at_percentile(point) / 1000] for point in points],
        }
