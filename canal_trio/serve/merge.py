"""One page of metrics for several workers. Pure.

Counters, histograms and plain gauges are added up; what a sum would make nonsense of gets a label `worker` instead, and
what is the same everywhere is told once. Invariant: a counter never goes down because a worker ended: what it had
counted when it was last asked stays in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from canal_trio.serve.control import Family

__all__ = ["merged", "page", "retired", "snapshot"]

_SAME = frozenset({"canal_build_info"})
_BY_WORKER = frozenset({"canal_ready", "canal_draining"})
_SUPERVISORS = frozenset({"canal_reloads"})  # it reloads once, whatever the number of workers
_KEPT = frozenset({"counter", "histogram"})

_Key = tuple[str, tuple[tuple[str, str], ...]]


def snapshot(registry: CollectorRegistry) -> list[Family]:
    """Everything in `registry`, as plain data. Not a checkpoint."""
    return [
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]


def merged(
    workers: Mapping[str, Sequence[Family]], supervisor: Sequence[Family] = (), gone: Sequence[Family] = ()
) -> list[Family]:
    """The families of all `workers` (by their label) as one, with the supervisor's own and what `gone` ones counted."""
    families: dict[str, _Sum] = {}
    for worker, found in (*workers.items(), ("supervisor", supervisor), ("", gone)):
        for family in found:
            if family.name in _SUPERVISORS and worker != "supervisor":
                continue
            total = families.get(family.name)
            if total is None:
                total = families[family.name] = _Sum(family)
            total.add(family, worker)
    return [total.family() for total in families.values()]


def retired(gone: Sequence[Family], last: Sequence[Family]) -> list[Family]:
    """`gone`, and what another worker that ended had counted by then."""
    kept = [one for one in last if one.kind in _KEPT and not _by_worker(one.name)]
    return merged({"": kept}, gone=gone)


def page(families: Sequence[Family]) -> bytes:
    """The text for Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def _by_worker(name: str) -> bool:
    return name in _BY_WORKER or name.startswith("process_")


class _Sum:
    def __init__(self, first: Family) -> None:
        self._first = first
        self._values: dict[_Key, float] = {}

    def add(self, family: Family, worker: str) -> None:
        own = {"worker": worker} if _by_worker(family.name) else {}
        for name, labels, value in family.samples:
            key = (name, tuple((labels | own).items()))
            before = self._values.get(key)
            if before is None:
                self._values[key] = value
            elif family.name in _SAME:
                self._values[key] = max(before, value)
            elif name.endswith("_created"):
                self._values[key] = min(before, value)
            else:
                self._values[key] = before + value

    def family(self) -> Family:
        samples = [(name, dict(labels), value) for (name, labels), value in self._values.items()]
        return Family(self._first.name, self._first.kind, self._first.text, samples)


@final
class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: they are all there."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families as the library's own."""
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            metric.samples = [Sample(name, labels, value) for name, labels, value in family.samples]
            yield metric
