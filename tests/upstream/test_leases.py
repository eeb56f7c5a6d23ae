"""Leases: who gets a connection, in which order, within which time, and that nothing is ever left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.upstream.pool import Lease, Pool

UPSTREAM = Upstream("u", "http://upstream.test")
DEADLINES = Deadlines(lease=10, upstream_keep_alive=60)
NO_ROUTE = Failure(Side.UPSTREAM, Phase.DIAL, Kind.REFUSED, "no route", Retry.UNSENT)


class FakeConnection:
    """A connection as the pool sees one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.open = True
        self.quiet = True
        self.reusable = True
        self.died: Callable[[], None] | None = None
        self.looks = 0

    def __repr__(self) -> str:
        return f"c{self.number}"

    def usable(self) -> bool:
        """One look."""
        self.looks += 1
        return self.quiet

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """Remember whom to tell."""
        self.died = died

    def abort(self) -> None:
        """Close."""
        self.open = False

    async def run(self, *_: Any) -> None:
        """Not here."""
        raise NotImplementedError

    def hang_up(self) -> None:
        """The peer closes."""
        self.quiet = False
        if self.died is not None:
            self.died()


class Network:
    """Makes the connections; `seconds` is how long that takes, `failing` that it fails."""

    def __init__(self) -> None:
        self.made: list[FakeConnection] = []
        self.seconds = 0.0
        self.failing = False
        self.dialling = 0

    async def connect(self, upstream: Upstream) -> Any:
        """A pool's `Connect`."""
        assert upstream is UPSTREAM or upstream.name == UPSTREAM.name
        self.dialling += 1
        try:
            await trio.sleep(self.seconds)
        finally:
            self.dialling -= 1
        if self.failing:
            return NO_ROUTE
        self.made.append(FakeConnection(len(self.made)))
        return self.made[-1]


@asynccontextmanager
async def pool_of(limit: float | None, *, waiters: int = 100) -> AsyncIterator[tuple[Pool, Network]]:
    """A pool with its reaper running. At the end of the block no lease, waiter or dial may be left."""
    reaper, network = Reaper(), Network()
    upstream = Upstream("u", "http://upstream.test", connections=limit)
    pool = Pool(upstream, bounds=Bounds(waiters=waiters), deadlines=DEADLINES, connect=network.connect, reaper=reaper)
    async with trio.open_nursery() as nursery:
        await nursery.start(reaper.run)
        yield pool, network
        nursery.cancel_scope.cancel()
    statistics = pool.statistics()
    assert (statistics.used, statistics.waiting, network.dialling) == (0, 0, 0), statistics
    pool.close()
    assert not [made for made in network.made if made.open], network.made


def granted(lease: Lease | Failure) -> Lease:
    """It must be a lease."""
    assert isinstance(lease, Lease), lease
    return lease


def refused(lease: Lease | Failure) -> Failure:
    """It must be a failure."""
    assert isinstance(lease, Failure), lease
    return lease


async def test_a_released_connection_is_used_again_newest_first(autojump_clock: trio.testing.MockClock) -> None:
    """LIFO, with one look before each reuse and the watch taken off."""
    async with pool_of(None) as (pool, network):
        first, second = granted(await pool.lease()), granted(await pool.lease())
        assert not first.reused
        first.release()
        second.release()
        assert network.made[1].died is not None
        again = granted(await pool.lease())
        assert again.connection is second.connection
        assert again.reused
        assert network.made[1].died is None
        assert network.made[1].looks == 1
        older = granted(await pool.lease())
        assert older.connection is first.connection
        assert pool.statistics().reused == 2
        for lease in (first, second):
            lease.abort()  # their time is over: of no effect on those who have the connections now
        assert pool.statistics().used == 2
        again.abort()
        older.abort()


async def test_waiters_get_their_turn_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """FIFO: the connection is handed over directly, and nobody who comes later gets in between."""
    served: list[int] = []

    async def wait(pool: Pool, number: int) -> None:
        lease = granted(await pool.lease())
        served.append(number)
        await trio.sleep(1)
        lease.release()

    async with pool_of(1) as (pool, network):
        holder = granted(await pool.lease())
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(wait, pool, number)
                await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().waiting == 5
            holder.release()
            nursery.start_soon(wait, pool, 5)
        assert served == [0, 1, 2, 3, 4, 5]
        assert len(network.made) == 1


async def test_when_a_lease_is_aborted_the_next_waiter_dials(autojump_clock: trio.testing.MockClock) -> None:
    """The slot moves on although the connection is gone."""
    async with pool_of(1) as (pool, network):
        holder = granted(await pool.lease())

        async def wait() -> None:
            lease = granted(await pool.lease())
            assert not lease.reused
            lease.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            holder.abort()
        assert [made.open for made in network.made] == [False, False]


async def test_a_dial_that_fails_gives_the_slot_to_the_next_waiter(autojump_clock: trio.testing.MockClock) -> None:
    """Each in the queue gets a try of its own, and its own failure."""
    async with pool_of(1) as (pool, network):
        network.failing, network.seconds = True, 1
        failures: list[Failure] = []

        async def wait() -> None:
            failures.append(refused(await pool.lease()))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
        assert failures == [NO_ROUTE] * 3
        assert trio.current_time() == 3
        assert pool.statistics().failed == 3


async def test_the_queue_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """The one beyond is told at once, nobody is blamed."""
    async with pool_of(1, waiters=2) as (pool, _network), trio.open_nursery() as nursery:
        holder = granted(await pool.lease())
        for _ in range(2):
            nursery.start_soon(pool.lease)
            await trio.testing.wait_all_tasks_blocked()
        failure = refused(await pool.lease())
        assert (failure.side, failure.phase, failure.kind) == (Side.GATEWAY, Phase.LEASE, Kind.UNAVAILABLE)
        assert failure.retry is Retry.UNSENT
        assert trio.current_time() == 0
        assert pool.statistics().refused == 1
        nursery.cancel_scope.cancel()
        holder.abort()


async def test_a_wait_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """After ten seconds in the queue: unavailable, and the place in the queue is gone."""
    async with pool_of(1) as (pool, _network):
        holder = granted(await pool.lease())
        failure = refused(await pool.lease())
        assert failure.kind is Kind.UNAVAILABLE
        assert trio.current_time() == DEADLINES.lease
        assert pool.statistics().waiting == 0
        assert pool.statistics().timeouts == 1
        holder.abort()


async def test_a_grant_in_the_instant_of_the_deadline_is_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    """The connection is given back at the very time the wait would end: lease or failure, but no slot lost."""
    async with pool_of(1) as (pool, _network):
        holder = granted(await pool.lease())

        async def give_back() -> None:
            await trio.sleep(DEADLINES.lease)
            holder.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_back)
            lease = await pool.lease()
        if isinstance(lease, Lease):
            lease.abort()
        statistics = pool.statistics()
        assert statistics.used == statistics.waiting == 0


async def test_a_waiter_cancelled_in_the_step_of_its_grant_gives_it_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Once granted, the lease is received, whatever was cancelled meanwhile; what follows gives it back."""
    async with pool_of(1) as (pool, network):
        holder = granted(await pool.lease())
        received: list[Lease | Failure] = []
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                received.append(await pool.lease())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            holder.release()
            scope.cancel()
        lease = granted(received[0])
        assert lease.connection is network.made[0]
        lease.abort()


async def test_a_waiter_cancelled_before_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    """The next in the queue is served."""
    async with pool_of(1) as (pool, _network):
        holder = granted(await pool.lease())
        scope = trio.CancelScope()
        served: list[Lease] = []

        async def give_up() -> None:
            with scope:
                await pool.lease()

        async def stay() -> None:
            served.append(granted(await pool.lease()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(stay)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            holder.release()
        served[0].abort()


async def test_a_cancelled_dial_gives_its_slot_back(autojump_clock: trio.testing.MockClock) -> None:
    """And the next waiter dials in it."""
    async with pool_of(1) as (pool, network):
        network.seconds = 5
        with trio.move_on_after(1):
            await pool.lease()
        assert pool.statistics().used == 0
        granted(await pool.lease()).abort()


async def test_a_bug_in_dialling_gives_the_slot_back(autojump_clock: trio.testing.MockClock) -> None:
    """An exception propagates, the slot does not go with it."""
    async with pool_of(1) as (pool, network):

        async def broken(_: Upstream) -> Any:
            raise ZeroDivisionError

        pool._connect = broken
        for _ in range(3):
            try:
                await pool.lease()
            except ZeroDivisionError:
                continue
            raise AssertionError
        assert pool.statistics().used == 0
        pool._connect = network.connect


async def test_a_connection_that_is_not_quiet_is_not_reused(autojump_clock: trio.testing.MockClock) -> None:
    """Bytes nobody asked for, or an end, in a connection's idle time: it is closed and a new one made."""
    async with pool_of(None) as (pool, network):
        granted(await pool.lease()).release()
        network.made[0].quiet = False
        lease = granted(await pool.lease())
        assert lease.connection is network.made[1]
        assert not network.made[0].open
        assert pool.statistics().stale == 1
        lease.abort()


async def test_a_waiter_is_not_handed_a_dying_connection(autojump_clock: trio.testing.MockClock) -> None:
    """The upstream closed behind its last response: the waiter dials instead of failing and retrying."""
    async with pool_of(1) as (pool, network):
        holder = granted(await pool.lease())
        received: list[Lease] = []

        async def wait() -> None:
            received.append(granted(await pool.lease()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            network.made[0].quiet = False
            holder.release()
        assert received[0].connection is network.made[1]
        assert not received[0].reused
        assert not network.made[0].open
        received[0].abort()


async def test_an_idle_connection_leaves_the_pool_when_its_peer_hangs_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """In that very step, not at the next reuse."""
    async with pool_of(None) as (pool, network):
        granted(await pool.lease()).release()
        network.made[0].hang_up()
        assert pool.statistics().idle == 0
        assert not network.made[0].open
        granted(await pool.lease()).abort()


async def test_idle_connections_are_closed_after_their_time(autojump_clock: trio.testing.MockClock) -> None:
    """Within twice the keep-alive time at the latest, although nobody asks."""
    async with pool_of(None) as (pool, network):
        leases = [granted(await pool.lease()) for _ in range(3)]
        for lease in leases:
            lease.release()
        await trio.sleep(2 * DEADLINES.upstream_keep_alive + 1)
        assert pool.statistics().idle == 0
        assert not any(made.open for made in network.made)


async def test_an_expired_connection_is_never_reused(autojump_clock: trio.testing.MockClock) -> None:
    """Even when the sweep has not come by yet."""
    async with pool_of(None) as (pool, network):
        await trio.sleep(1)
        granted(await pool.lease()).release()
        await trio.sleep(DEADLINES.upstream_keep_alive)
        lease = granted(await pool.lease())
        assert lease.connection is network.made[1]
        assert not network.made[0].open
        lease.abort()


async def test_fresh_refuses_what_was_used(autojump_clock: trio.testing.MockClock) -> None:
    """The retry after a stale connection dials, and makes room if it must."""
    async with pool_of(1) as (pool, network):
        granted(await pool.lease()).release()
        lease = granted(await pool.lease(fresh=True))
        assert lease.connection is network.made[1]
        assert not network.made[0].open
        lease.abort()


async def test_dialling_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """Once per dial, not for a reuse."""
    async with pool_of(None) as (pool, _network):
        told: list[float] = []
        granted(await pool.lease(dialling=lambda: told.append(1))).release()
        granted(await pool.lease(dialling=lambda: told.append(2))).abort()
        assert told == [1]


async def test_a_closed_pool_keeps_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Idle ones are closed at once, leased ones when they come back."""
    async with pool_of(None) as (pool, network):
        idle, leased = granted(await pool.lease()), granted(await pool.lease())
        idle.release()
        pool.close()
        pool.close()
        assert [made.open for made in network.made] == [False, True]
        leased.release()
        assert [made.open for made in network.made] == [False, False]
        assert pool.statistics().idle == 0


async def test_release_and_abort_count_once(autojump_clock: trio.testing.MockClock) -> None:
    """The first call wins, in both orders, and the book stays right."""
    async with pool_of(None) as (pool, network):
        one, two = granted(await pool.lease()), granted(await pool.lease())
        one.release()
        one.abort()
        one.release()
        assert network.made[0].open
        two.abort()
        two.release()
        two.abort()
        assert (pool.statistics().used, pool.statistics().idle) == (0, 1)
        assert "over" in repr(one)
        assert "1 idle" in repr(pool)
