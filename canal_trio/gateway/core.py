"""The gateway: what all client connections share, and the door to the floors above.

Settings, router and pools form a `Generation`, swapped as one by `reload`; an exchange keeps the one it began with.
The gateway counts and lists, drains and stops; the work is done by `ClientConnection`.
"""

from __future__ import annotations

import heapq
import ipaddress
import logging
import math
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import trio

from canal_trio.errors import Failure, Kind, Side
from canal_trio.gateway.balancing import Balancing, Standings, UpstreamStatistics
from canal_trio.gateway.booking import Booking
from canal_trio.gateway.catalogue import Catalogue
from canal_trio.gateway.checks import Checks
from canal_trio.gateway.connection import ClientConnection
from canal_trio.gateway.drain import Drains
from canal_trio.gateway.exchange import Exchange, ExchangeView
from canal_trio.gateway.places import Places
from canal_trio.gateway.record import record_of
from canal_trio.hooks import Admission, Admissions, Bookkeeper, ExchangeRecord, Recorder
from canal_trio.policy.listing import Listing
from canal_trio.policy.prices import Prices
from canal_trio.policy.routing import Router
from canal_trio.relay.idle import Reaper, clock_of_run
from canal_trio.relay.poller import after_round
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.connect import Connector, Dialer
from canal_trio.upstream.pool import Pool, PoolStatistics

__all__ = ["Gateway", "GatewayStatistics", "Generation"]

_MAY_ASK = 1.0  # seconds

_log = logging.getLogger("canal_trio.gateway")


@dataclass(frozen=True, slots=True)
class GatewayStatistics:
    """A snapshot of what the gateway holds."""

    connections: int
    in_flight: int
    held_bytes: int
    pools: dict[str, PoolStatistics]
    waiting: int = 0  # exchanges that wait for a place
    flow_bytes: int = 0
    memory_limit: float = math.inf
    upstreams: dict[str, UpstreamStatistics] = field(default_factory=dict)
    retries_refused: int = 0  # that there was no budget for


@dataclass(frozen=True, slots=True)
class Generation:
    """One configuration at work."""

    settings: Settings
    router: Router
    pools: dict[str, Pool]
    balancing: Balancing
    listing: Listing
    catalogue: Catalogue
    booking: Booking | None = None  # takes note of each admitted exchange
    admission: Admission | None = None  # None: everything is admitted
    drains: Drains = field(default_factory=Drains)
    prices: Prices | None = None  # none: nothing has a cost
    accounts: bool = field(init=False)  # what answers use is read from their bytes

    def __post_init__(self) -> None:
        asked = self.admission is not None and self.admission.wants_usage
        object.__setattr__(self, "accounts", asked or self.settings.accounting)

    def crowded(self) -> Failure | None:
        """No upstream has room, not even in its queue: why nothing can be done for any request, whatever it wants."""
        pools = self.pools.values()
        for pool in pools:
            if not pool.crowded:
                return None
        refusals = [pool.refuse() for pool in pools]
        return min(refusals, key=lambda refusal: refusal.retry_after or 0.0, default=None)


@final
class Gateway:
    """Relays the requests of every stream given to `handle`. Made inside `trio.run`; `run` must be running meanwhile.

    `recorders` receive each exchange's record. `dialer` reaches upstreams; tests put a simulated network here.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        recorders: Sequence[Recorder] = (),
        dialer: Dialer | None = None,
    ) -> None:
        self._recorders = tuple(recorders)
        self._booking: Booking | None = None  # of the next exchanges
        self._bookings: tuple[Booking, ...] = ()  # and those of some that are in flight
        self._admissions: Admissions = _admit_all
        self._drains = Drains()
        self._dialer = dialer
        self.connections: set[ClientConnection] = set()  # each is here while it runs
        self._exchanges: dict[Exchange, None] = {}
        self._ended: list[Exchange] = []  # not accounted for
        self._networks = _networks(settings)
        self.trusts_any = bool(self._networks)
        self._standings = Standings()
        self._checks = Checks()
        self.reaper = Reaper()
        self.clock = clock_of_run()
        self.places = Places(settings)
        self.draining = False
        self._drained_by = math.inf
        self._prepared: tuple[Settings, Router] | None = None
        self.generation = self._generation(settings, {})

    @property
    def settings(self) -> Settings:
        """What new exchanges use."""
        return self.generation.settings

    def _generation(self, settings: Settings, before: dict[Upstream, Pool], refused: int = 0) -> Generation:
        connector = Connector(settings, self.reaper, self._dialer)
        pools: dict[str, Pool] = {}
        for upstream in settings.upstreams:
            pools[upstream.name] = (
                before[upstream]
                if upstream in before
                else Pool(
                    upstream,
                    bounds=settings.bounds,
                    deadlines=settings.deadlines,
                    connect=connector.connect,
                    reaper=self.reaper,
                )
            )
        balancing = Balancing(settings, self._standings.configure(settings), refused)
        self._checks.configure(settings, connector, balancing.standings)
        prepared, self._prepared = self._prepared, None
        router = prepared[1] if prepared is not None and prepared[0] is settings else Router(settings)
        return Generation(
            settings,
            router,
            pools,
            balancing,
            Listing(settings, router),
            Catalogue(settings, connector),
            self._booking,
            self._admissions(settings, self.account),
            self._drains,
            Prices(settings.prices) if settings.prices else None,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The background work: deadlines, active checks. Until cancelled; idle upstream connections are closed then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._checks.run)
                await self.reaper.run(task_status=task_status)
        finally:
            for pool in self.generation.pools.values():
                pool.close()

    def handle(
        self, stream: trio.abc.Stream, *, peer: str = "", scheme: str = "http", certificate: str | None = None
    ) -> Coroutine[Any, Any, None]:
        """Serve one client connection to its end and close it. Raises nothing but `Cancelled`.

        `certificate` is whom the client's own one names, if it has shown one that was verified.
        """
        return ClientConnection(self, stream, peer=peer, scheme=scheme, certificate=certificate).run()

    def prepare(self, settings: Settings) -> None:
        """Do what a reload with `settings` would take long for, with thousands of keys. In any thread."""
        self._prepared = settings, Router(settings)

    def reload(self, settings: Settings) -> None:
        """New requests use `settings`; exchanges in flight keep what they began with. Not a checkpoint."""
        unchanged = self.settings.bounds == settings.bounds and self.settings.deadlines == settings.deadlines
        old = self.generation
        keep = {u: old.pools[u.name] for u in old.settings.upstreams} if unchanged else {}
        self.generation = self._generation(settings, keep, old.balancing.refused())
        self._networks = _networks(settings)
        self.trusts_any = bool(self._networks)
        self.places.configure(settings)
        current = set(self.generation.pools.values())
        for pool in old.pools.values():
            if pool not in current:
                pool.close()

    def keep_books(self, books: Bookkeeper | None) -> None:
        """Have each exchange that begins from now on noted in `books` (None: nowhere) before anything of it goes
        upstream. Those in flight keep the books they began with: `drop_books`. Not a checkpoint."""
        self._booking = None if books is None else Booking(books)
        if self._booking is not None:
            self._bookings = (self._booking, *self._bookings)
        self.generation = replace(self.generation, booking=self._booking)

    def drop_books(self, books: Bookkeeper) -> None:
        """Forget `books` that are not kept any more, behind `settled`: nothing in flight is noted in them."""
        self._bookings = tuple(one for one in self._bookings if one.books is not books)

    def limit_by(self, admissions: Admissions) -> None:
        """Have exchanges admitted by the hook that `admissions` gives for a configuration (None: it limits nothing).
        Before anything is handled."""
        self._admissions = admissions
        self.generation = replace(self.generation, admission=admissions(self.settings, self.account))

    def trusts(self, address: str) -> bool:
        """Is `address` one of the trusted proxies?"""
        if not self._networks:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    # -- the book of exchanges -----------------------------------------------------------------------------------------

    def begin(self, exchange: Exchange) -> None:
        """An exchange's first byte was read."""
        self._exchanges[exchange] = None

    def end(self, exchange: Exchange) -> None:
        """An exchange is over. It is accounted for at the end of the poller's round, together with others."""
        if self._exchanges.pop(exchange, exchange) is exchange:
            return  # was not in the book: recorded already
        exchange.finish()
        self._ended.append(exchange)
        if len(self._ended) == 1 and not after_round(self.account):
            self.account()

    def account(self) -> bool:
        """Make the records of those that have ended: limits settle by them, books note them, recorders get them. False:
        there are none that this was not done for. Not a checkpoint.

        A bug in one of these is logged and goes no further: the poller would end the run.
        """
        if not self._ended:
            return False
        for booking in self._bookings:
            booking.settle()  # first, for it may be one of those that have ended
        ended, self._ended = self._ended, []
        books = None if self._booking is None else self._booking.books
        prices, records, noted = self.generation.prices, [], []
        elsewhere: list[tuple[Bookkeeper, tuple[int, ExchangeRecord]]] = []
        for exchange in ended:
            try:
                record = record_of(exchange, prices)
                records.append(record)
                if exchange.entry is not None:
                    if exchange.books is books:
                        noted.append((exchange.entry, record))
                    else:
                        elsewhere.append((exchange.books, (exchange.entry, record)))
                if exchange.slot is not None:
                    exchange.slot.release(record)
            except Exception:
                _log.exception("the accounting failed on the record of %s", exchange.id)
        if noted and books is not None:
            _tell(books, noted)
        if elsewhere:  # the books were changed while these ran
            for booking in self._bookings:
                if theirs := [ending for old, ending in elsewhere if old is booking.books]:
                    _tell(booking.books, theirs)
        for recorder in self._recorders:
            for record in records:
                try:
                    recorder.finished(record)
                except Exception:
                    _log.exception("a recorder failed on the record of %s", record.request_id)
        return True

    async def settled(self) -> None:
        """Wait until all exchanges that are in flight now have ended and are accounted for. A checkpoint.

        Looks at them once a second: who asks has changed what the next ones use, and is in no hurry.
        """
        now = list(self._exchanges)
        while any(one in self._exchanges for one in now):  # noqa: ASYNC110  # no exchange pays for telling somebody
            await trio.sleep(1)
        self.account()
        await trio.lowlevel.checkpoint()

    def bug(self, group: BaseExceptionGroup[Exception], exchange: Exchange | None) -> None:
        """Something raised that must not: log it with its traceback. The connection's other half goes on."""
        trace = "".join(traceback.format_exception(group))
        _log.error("a bug ended a connection, in exchange %s:\n%s", exchange.id if exchange else "-", trace)

    def exchanges(self) -> list[ExchangeView]:
        """The exchanges in flight, oldest first."""
        now = trio.current_time()
        return [exchange.view(now, self._drained_by) for exchange in self._exchanges]

    def statistics(self) -> GatewayStatistics:
        """A snapshot for metrics."""
        pools = {name: pool.statistics() for name, pool in self.generation.pools.items()}
        places = self.places
        return GatewayStatistics(
            len(self.connections),
            len(self._exchanges),
            places.budget.held,
            pools,
            waiting=places.waiting,
            flow_bytes=places.meter.bytes,
            memory_limit=places.ceiling,
            upstreams=self.generation.balancing.statistics(),
            retries_refused=self.generation.balancing.refused(),
        )

    def make_room(self, most: int = 32) -> int:
        """Close up to `most` client connections that ask for nothing, idle for the longest time; how many it were.

        None that was idle for less than a second: it may be about to ask. Walks over all connections: call it seldom.
        """
        before = trio.current_time() - _MAY_ASK
        idle = [(since, id(one), one) for one in self.connections if (since := one.idle_since()) is not None]
        chosen = heapq.nsmallest(most, [entry for entry in idle if entry[0] <= before])
        for _, _, connection in chosen:
            connection.drain()
        return len(chosen)

    # -- the end -------------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Would a request have an upstream to go to?"""
        return not self.draining and self.generation.balancing.ready()

    def drain(self, deadline: float) -> None:
        """Serve what is in flight until `deadline` (Trio's clock), take no new requests. Not a checkpoint."""
        self.draining = True
        self._drained_by = deadline
        for connection in list(self.connections):
            connection.drain()
        for exchange in list(self._exchanges):
            if exchange.draining and exchange.drain is not None:
                exchange.drain.stop()
        self.reaper.add(self._expire, deadline)

    def _expire(self, _now: float) -> float:
        for exchange in list(self._exchanges):
            exchange.fail(Failure(Side.GATEWAY, exchange.phase, Kind.DRAINING, "The time to finish is over."))
        return math.inf


def _tell(books: Bookkeeper, endings: list[tuple[int, ExchangeRecord]]) -> None:
    try:
        books.ended(endings)
    except Exception:
        _log.exception("the books failed on the records of %d exchanges", len(endings))


def _admit_all(_: Settings, _account: Callable[[], bool]) -> Admission | None:
    return None


def _networks(settings: Settings) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]
