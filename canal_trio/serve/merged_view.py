"""All workers as one gateway, for the admin listener: asked when somebody looks, told as of then.

A worker that does not answer in time is left out of what is now, and kept in what was counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import trio
from prometheus_client import CollectorRegistry

from canal_trio.serve import merge
from canal_trio.serve.control import Ask, Family, Report
from canal_trio.serve.spawn import Worker

__all__ = ["MergedView"]

PATIENCE = 2.0  # seconds for an answer
_WHAT = {"/metrics": "metrics", "/streams": "streams", "/readyz": "state"}


@final
class MergedView:
    """What `observe.admin.Admin` shows. `registry` has the supervisor's own families, `stopping` says it drains."""

    def __init__(self, workers: Sequence[Worker], registry: CollectorRegistry, stopping: Callable[[], bool]) -> None:
        self._workers = workers
        self._registry = registry
        self._stopping = stopping
        self._gone: list[Family] = []
        self._ready = False
        self._exchanges: list[dict[str, Any]] = []

    async def refresh(self, path: str) -> None:
        """Ask every worker for what the page at `path` needs. A checkpoint."""
        await trio.lowlevel.checkpoint()
        what = _WHAT.get(path)
        if what is None:
            return
        reports: dict[int, Report] = {}

        async def ask(worker: Worker) -> None:
            report = await worker.ask(Ask(0, what), Report, within=PATIENCE)
            if report is not None:
                reports[worker.number] = report

        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(ask, worker)
        if what == "state":
            self._ready = any(report.ready for report in reports.values())
        elif what == "streams":
            rows = [{**row, "worker": number} for number, report in sorted(reports.items()) for row in report.streams]
            self._exchanges = sorted(rows, key=lambda row: -float(row.get("age", 0)))

    def bury(self, worker: Worker) -> None:
        """Keep what a dead worker had counted when it was last heard of."""
        self._gone = merge.retired(self._gone, worker.metrics)
        worker.metrics = []

    @property
    def draining(self) -> bool:
        """See `observe.admin.Shown`; so for what follows."""
        return self._stopping()

    def ready(self) -> bool:
        """A worker is ready, as of the last `refresh`."""
        return self._ready

    def exchanges(self) -> list[dict[str, Any]]:
        """The exchanges of all workers with the number of theirs, oldest first."""
        return self._exchanges

    def page(self) -> bytes:
        """One page of metrics for all."""
        workers = {str(worker.number): worker.metrics for worker in self._workers}
        return merge.page(merge.merged(workers, merge.snapshot(self._registry), self._gone))
