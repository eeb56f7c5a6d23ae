"""Where the limits of a gateway are counted: the memory that one process owns, and the stores on top of it.

The process that owns it (the only one, or the supervisor) keeps the memory and the file with what was spent; each
worker gets the memory's descriptor and makes a store of its own. With Redis configured the memory is what a worker
counts in while Redis is away. Invariant: a worker that dies leaves nothing in flight behind.

A reload may bring another file, and another store. The memory stays, with what it has counted: another file is raised
to that, and never the other way round. Another store counts from nothing; the former one settles what it let in.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, final

import trio

from canal_trio.errors import ConfigError
from canal_trio.observe.metrics import Metrics
from canal_trio.policy.calendar import Calendar
from canal_trio.quota.admission import Limits, Store
from canal_trio.quota.memory import Busy, MemoryStore, SharedMemory, memory_for
from canal_trio.quota.spending import Spending
from canal_trio.quota.table import Table
from canal_trio.serve.reload import in_a_thread
from canal_trio.settings import LimitStore, Settings

if TYPE_CHECKING:
    from canal_trio.quota.redis import RedisStore

__all__ = ["Change", "Counting", "Stores", "show_limits", "stores_of_worker"]

PATIENCE = 3.0  # seconds that a reload waits for another Redis: with the usual timeout it has answered, or is away
_TRIES = 3

_log = logging.getLogger("canal_trio.serve")


def stores_of_worker(settings: Settings, descriptor: int | None, column: int, columns: int) -> Stores:
    """The stores of one worker of `columns`, on the memory behind `descriptor` (None: on its own)."""
    if descriptor is None:
        table = SharedMemory.make(memory_for(settings), 1).table(0)
        table.own()
        return Stores(settings, table)
    return Stores(settings, SharedMemory.attach(descriptor, columns).table(column))


def show_limits(metrics: Metrics, stores: Stores) -> None:
    """Have a scrape read how limits fare."""
    limits, text = stores.limits, "Times that what counts the limits did not answer."
    limits.rejections = metrics.limit_rejections.values
    about = "Workers that cannot reach what counts the limits."
    metrics.gauge("canal_limit_store_away", about, lambda: limits.store.away)
    metrics.gauge("canal_limit_store_errors", text, lambda: stores.errors)


class Change(NamedTuple):
    """What a reload has prepared: the settings, the Redis they name, and who keeps the file they name."""

    chosen: LimitStore
    redis: RedisStore | None
    spending: Spending | None


@final
class Stores:
    """The store of one process, in `limits`, and those that reloads have replaced, until what they let in has ended.

    `owner` keeps the file, if that is this process.
    """

    def __init__(self, settings: Settings, table: Table, owner: Counting | None = None) -> None:
        self._owner = owner
        self._chosen = settings.limit_store
        self._memory = MemoryStore(table, clock=time.monotonic)
        self._redis = self._redis_of(settings.limit_store)
        self._former: list[RedisStore] = []
        self._past = 0  # errors of those that are gone
        self._scopes: dict[Store, trio.CancelScope] = {}  # around those that run
        self._services: trio.Nursery | None = None
        self._settled: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._begun = trio.Event()
        self.limits = Limits(self._redis or self._memory)

    def _redis_of(self, chosen: LimitStore) -> RedisStore | None:
        if chosen.redis is None:
            return None
        from canal_trio.quota.redis import RedisStore  # late: an extra, and slow to import

        return RedisStore(chosen, self._memory)

    @property
    def errors(self) -> int:
        """How often one of them, or of those that are gone, did not answer."""
        present = self._memory.errors + (0 if self._redis is None else self._redis.errors)
        return self._past + present + sum(former.errors for former in self._former)

    async def begin(self, services: trio.Nursery, settled: Callable[[], Awaitable[None]]) -> None:
        """Have the store run in `services`. `settled` waits until what is in flight when it is called has ended."""
        self._services, self._settled = services, settled
        await self._start(services, self.limits.store)
        self._begun.set()

    async def _start(self, services: trio.Nursery, store: Store) -> None:
        """Have it run, and wait until it has begun. Cancelled, it still runs."""
        self._scopes[store] = trio.CancelScope()
        begun = trio.Event()
        services.start_soon(self._run, store, begun)
        await begun.wait()

    async def _run(self, store: Store, begun: trio.Event) -> None:
        try:
            with self._scopes[store]:
                async with trio.open_nursery() as nursery:
                    await nursery.start(store.run)
                    begun.set()
        finally:
            del self._scopes[store]

    async def prepare(self, new: LimitStore) -> Change:
        """Open what `new` names and we do not have. Raises `ConfigError`; then, and cancelled, nothing is left open.
        `swap` is due without a checkpoint in between. A Redis that is not there is away, as at the start."""
        await self._begun.wait()
        assert self._services is not None
        old, redis, owner = self._chosen, self._redis, self._owner
        made: RedisStore | None = None
        spending = None if owner is None else await owner.opened(new.state)
        try:
            if new.redis is None:
                redis = None
            elif (new.redis, new.prefix) != (old.redis, old.prefix):
                await in_a_thread(importlib.import_module, "canal_trio.quota.redis")
                redis = made = self._redis_of(new)
                assert made is not None
                with trio.move_on_after(PATIENCE):
                    await self._start(self._services, made)
        except BaseException:
            if made is not None:
                self._scopes[made].cancel(reason="not needed after all")
            if owner is not None:
                owner.drop(spending)
            raise
        return Change(new, redis, spending)

    def swap(self, change: Change) -> None:
        """Count as was prepared, from the next hook of `limits` on. Not a checkpoint; `swapped` is due."""
        assert self._services is not None
        if self._owner is not None:
            self._owner.keep(change.spending)
        if change.redis is self._redis:
            if self._redis is not None and change.chosen != self._chosen:
                self._redis.configure(change.chosen)
        else:
            former, self._redis = self._redis, change.redis
            self.limits.store = self._redis or self._memory
            if former is not None:
                former.replaced()
                self._former.append(former)
                self._services.start_soon(self._retire, former)
        self._chosen = change.chosen

    async def _retire(self, former: RedisStore) -> None:
        await self._settled()
        await former.finish()
        self._scopes[former].cancel(reason="replaced")
        self._former.remove(former)
        self._past += former.errors

    async def swapped(self) -> None:
        """Wait until the files are as the swap wants them."""
        if self._owner is not None:
            await self._owner.kept()

    async def flush(self) -> None:
        """Wait, but not for long, until what was settled is known where it is counted."""
        async with trio.open_nursery() as nursery:
            for store in (self.limits.store, *self._former):
                nursery.start_soon(store.flush)


@final
class Counting:
    """The owner's part, for `columns` workers. Raises `ConfigError` if the file cannot be used. Close it at the end."""

    def __init__(self, settings: Settings, columns: int = 1) -> None:
        self.columns = columns
        self.memory = SharedMemory.make(memory_for(settings), columns)
        self.table = self.memory.table(0)
        self._state = settings.limit_store.state
        self._former: Spending | None = None  # to be left, and what it is to say
        self._last: bytes | None = None
        self._unwritten = False  # the present one does not know yet what was counted before
        self._turn = trio.CancelScope()  # around the keeping of the present one
        try:
            self._spending = self._opened(self._state)
            if self._spending is not None:
                self._spending.restore()
        except BaseException:
            self.memory.close()
            raise

    def _opened(self, state: str | None) -> Spending | None:
        moment = partial(Calendar(time.time).moment, 0.0)  # its own: it writes in a thread
        return None if state is None else Spending(state, self.table, moment)

    def stores(self, settings: Settings) -> Stores:
        """For a process that serves alone."""
        self.table.own()
        return Stores(settings, self.table, self)

    def bury(self, column: int) -> None:
        """The worker of that column has died. Not a checkpoint."""
        if not self._patiently(partial(self.table.bury, column)):
            _log.error("limits: what the dead worker %d had in flight stays counted: the lock is held", column + 1)

    @staticmethod
    def _patiently(job: Callable[[], None]) -> bool:
        """Do it; False: others have the lock all the time."""
        for _ in range(_TRIES):
            try:
                job()
            except Busy:
                continue
            return True
        return False

    # -- another file --------------------------------------------------------------------------------------------------

    async def change(self, state: str | None) -> None:
        """Keep what was spent in `state` from now on. A checkpoint. Raises `ConfigError`, with nothing changed."""
        spending = await self.opened(state)
        try:
            self.keep(spending)
        except BaseException:
            self.drop(spending)
            raise
        await self.kept()

    async def opened(self, state: str | None) -> Spending | None:
        """Who keeps `state`: the present one, or another, for `keep` or `drop`. Raises `ConfigError`."""
        if state == self._state:
            return self._spending
        return await trio.to_thread.run_sync(self._opened, state)  # not abandoned: it has the file then

    def drop(self, spending: Spending | None) -> None:
        """It is not needed after all."""
        if spending is not None and spending is not self._spending:
            spending.drop()

    def keep(self, spending: Spending | None) -> None:
        """Have it keep what was spent: what was counted stays, and what its file says beyond that counts from now on.

        Not a checkpoint; `kept` is due. Raises `ConfigError` where workers share the memory and one keeps it locked.
        """
        if spending is self._spending:
            return
        last = None if self._spending is None else self._spending.unsaid()  # nothing of the other's past
        if spending is not None and not self._patiently(partial(spending.restore, anew=True)):
            raise ConfigError("limits.state: a worker holds the lock of what is counted")
        self._last = last
        self._former, self._spending = self._spending, spending
        self._state = None if spending is None else spending.path
        self._unwritten = spending is not None
        self._turn.cancel(reason="another file")

    async def kept(self) -> None:
        """Wait until the present file knows what was counted, and another may have the former one."""
        if self._former is not None or self._unwritten:
            await trio.to_thread.run_sync(self._hand_over)

    def _hand_over(self) -> None:
        if self._unwritten and self._spending is not None:
            self._spending.write()
        if self._former is not None:
            self._former.leave(self._last)
        self._former, self._unwritten = None, False

    async def run(self) -> None:
        """Keep what was spent, until cancelled."""
        while True:
            with trio.CancelScope() as self._turn:
                if self._spending is None:
                    await trio.sleep_forever()
                else:
                    await self._spending.run()

    def close(self) -> None:
        """Write what was spent for the last time, and give the memory back."""
        self._hand_over()
        if self._spending is not None:
            self._spending.close()
        self.memory.close()
