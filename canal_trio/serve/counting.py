"""Where the limits of a gateway are counted: the memory that one process owns, and the stores on top of it.

The process that owns it (the only one, or the supervisor) keeps the memory and the file with what was spent; each
worker gets the memory's descriptor and makes a store of its own. With Redis configured the memory is what a worker
counts in while Redis is away. Invariant: a worker that dies leaves nothing in flight behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import final

import trio

from canal_trio.observe.metrics import Metrics
from canal_trio.policy.calendar import Calendar
from canal_trio.quota.admission import Limits, Store
from canal_trio.quota.memory import Busy, MemoryStore, SharedMemory, memory_for
from canal_trio.quota.spending import Spending
from canal_trio.quota.table import Table
from canal_trio.settings import Settings

__all__ = ["Counting", "limits_of_worker", "show_limits"]

_log = logging.getLogger("canal_trio.serve")


def _store(settings: Settings, table: Table, clock: Callable[[], float]) -> Store:
    memory = MemoryStore(table, clock=clock)
    if settings.limit_store.redis is None:
        return memory
    from canal_trio.quota.redis import RedisStore  # late: an extra, and slow to import

    return RedisStore(settings.limit_store, memory)


def limits_of_worker(settings: Settings, descriptor: int | None, column: int, columns: int) -> Limits:
    """The limits of one worker of `columns`, counted in the memory behind `descriptor` (None: in its own)."""
    if descriptor is None:
        table = SharedMemory.make(memory_for(settings), 1).table(0)
        table.own()
        return Limits(_store(settings, table, time.monotonic))
    return Limits(_store(settings, SharedMemory.attach(descriptor, columns).table(column), time.monotonic))


def show_limits(metrics: Metrics, limits: Limits) -> None:
    """Have a scrape read how limits fare."""
    store, text = limits.store, "Times that what counts the limits did not answer."
    limits.rejections = metrics.limit_rejections.values
    metrics.gauge("canal_limit_store_away", "Workers that cannot reach what counts the limits.", lambda: store.away)
    metrics.gauge("canal_limit_store_errors", text, lambda: store.errors)


@final
class Counting:
    """The owner's part, for `columns` workers. Raises `ConfigError` if the file cannot be used. Close it at the end."""

    def __init__(self, settings: Settings, columns: int = 1) -> None:
        self.columns = columns
        self.memory = SharedMemory.make(memory_for(settings), columns)
        self.table = self.memory.table(0)
        self._spending: Spending | None = None
        moment = partial(Calendar(time.time).moment, 0.0)
        try:
            if settings.limit_store.state is not None:
                self._spending = Spending(settings.limit_store.state, self.table, moment)
        except BaseException:
            self.memory.close()
            raise

    def limits(self, settings: Settings) -> Limits:
        """For a process that serves alone."""
        self.table.own()
        return Limits(_store(settings, self.table, time.monotonic))

    def bury(self, column: int) -> None:
        """The worker of that column has died. Not a checkpoint."""
        for _ in range(3):
            try:
                self.table.bury(column)
            except Busy:
                continue
            return
        _log.error("limits: what the dead worker %d had in flight stays counted: the lock is held", column + 1)

    async def run(self) -> None:
        """Keep what was spent, until cancelled."""
        if self._spending is None:
            await trio.sleep_forever()
        else:
            await self._spending.run()

    def close(self) -> None:
        """Write what was spent for the last time, and give the memory back. Idempotent."""
        if self._spending is not None:
            self._spending.close()
        self.memory.close()
