"""Names to addresses, with a memory: a slow or dead resolver must not become the gateway's own outage.

A lookup (`getaddrinfo` blocks) runs in a thread, one per name at a time (single flight), a few at once by a limiter of
our own: a lookup cannot be interrupted, and Trio's common limiter is shared with everything else. It belongs to none of
those who ask: when the one who began it is cancelled, it still lands in the cache and wakes the others, with its
addresses or with what went wrong. An answer past its time is used while no new one can be had (RFC 8767).

Invariants: at most `threads` lookups run, at most one per name; `names` are kept at most; a cancelled `resolve` leaves
nothing but the thread, which nobody can stop.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import outcome
import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side

__all__ = ["Address", "Lookup", "Resolver", "system_lookup"]

Address: TypeAlias = "tuple[int, tuple[Any, ...]]"
"""An address family and a socket address of it."""

Lookup: TypeAlias = Callable[[str, int], list[Address]]
"""Blocks, so it runs in a thread. Raises OSError, or UnicodeError for what cannot be a name."""

TTL = 30.0  # getaddrinfo does not tell the record's own
PATIENCE = 1.8  # how long news is waited for while there is an old answer (RFC 8767 5)
STALE = 86_400.0  # an old answer serves for a day beyond its time (the same)
RECHECK = 5.0  # and for so long before the next question


def system_lookup(host: str, port: int) -> list[Address]:
    """What the operating system says, in its order of preference (RFC 6724), without duplicates."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


@dataclass(slots=True)
class _Entry:
    addresses: list[Address]
    good_until: float
    stale_until: float


@final
class _Flight:
    """One lookup under way, or landed."""

    __slots__ = ("addresses", "landed", "trouble")

    def __init__(self) -> None:
        self.landed = trio.Event()
        self.addresses: list[Address] = []
        self.trouble: BaseException | None = None


@final
class Resolver:
    """Answers for one process, kept for `ttl` seconds. `lookup` is what a thread runs. Used inside `trio.run`."""

    def __init__(
        self,
        *,
        ttl: float = TTL,
        stale: float = STALE,
        threads: int = 8,
        names: int = 1024,
        lookup: Lookup = system_lookup,
    ) -> None:
        self._ttl = ttl
        self._stale = stale
        self._names = names
        self._lookup = lookup
        self._limiter = trio.CapacityLimiter(threads)
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._flights: dict[tuple[str, int], _Flight] = {}

    def __repr__(self) -> str:
        return f"<Resolver {len(self._entries)} names, {len(self._flights)} lookups under way>"

    async def resolve(self, host: str, port: int) -> list[Address] | Failure:
        """At least one address, best first; or Kind.DNS. A checkpoint, without a deadline of its own.

        A numeric host and an answer that is still good take no thread.
        """
        await trio.lowlevel.checkpoint()
        numeric = _numeric(host, port)
        if numeric is not None:
            return [numeric]
        name = (host, port)
        entry, now = self._entries.get(name), trio.current_time()
        if entry is not None and now < entry.good_until:
            return entry.addresses
        if entry is None or now >= entry.stale_until:
            return await self._ask(name)
        news: list[Address] | Failure | None = None
        with trio.move_on_after(PATIENCE):
            news = await self._ask(name)
        if isinstance(news, list):
            return news
        entry.good_until = trio.current_time() + RECHECK
        return entry.addresses

    async def _ask(self, name: tuple[str, int]) -> list[Address] | Failure:
        flight = self._flights.get(name) or await self._take_off(name)
        await flight.landed.wait()
        if flight.addresses:
            return flight.addresses
        trouble = flight.trouble
        if isinstance(trouble, UnicodeError):
            reason = "this is not a host name"  # a label that is too long, for instance
        elif isinstance(trouble, OSError):
            reason = trouble.strerror or str(trouble)
        elif trouble is None:
            reason = "it has no address"
        else:
            raise trouble
        return Failure(Side.UPSTREAM, Phase.DIAL, Kind.DNS, f"{name[0]}: {reason}.", Retry.UNSENT)

    async def _take_off(self, name: tuple[str, int]) -> _Flight:
        flight = _Flight()
        await self._limiter.acquire_on_behalf_of(flight)
        # Somebody else may have been first while we waited for a thread: under way, or landed already.
        other, entry = self._flights.get(name), self._entries.get(name)
        if other is not None or (entry is not None and trio.current_time() < entry.good_until):
            self._limiter.release_on_behalf_of(flight)
            if other is not None:
                return other
            assert entry is not None
            flight.addresses = entry.addresses
            flight.landed.set()
            return flight
        self._flights[name] = flight
        token = trio.lowlevel.current_trio_token()

        def deliver(result: outcome.Outcome[list[Address]]) -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the gateway is gone, nobody wants to know
                token.run_sync_soon(self._land, name, flight, result)

        trio.lowlevel.start_thread_soon(lambda: self._lookup(*name), deliver, f"canal_trio resolver {name[0]}")
        return flight

    def _land(self, name: tuple[str, int], flight: _Flight, result: outcome.Outcome[list[Address]]) -> None:
        del self._flights[name]
        self._limiter.release_on_behalf_of(flight)
        try:
            flight.addresses = result.unwrap()
        except Exception as exc:  # nothing may be raised here, in Trio's own loop: those who asked are told
            flight.trouble = exc
        if flight.addresses:
            self._remember(name, flight.addresses)
        flight.landed.set()

    def _remember(self, name: tuple[str, int], addresses: list[Address]) -> None:
        self._entries.pop(name, None)
        while len(self._entries) >= self._names:
            del self._entries[next(iter(self._entries))]  # the one whose answer is the oldest
        now = trio.current_time()
        self._entries[name] = _Entry(addresses, now + self._ttl, now + self._ttl + self._stale)


def _numeric(host: str, port: int) -> Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return socket.AF_INET, (host, port)
    if address.scope_id is None:
        return socket.AF_INET6, (host, port, 0, 0)
    return None  # a zone is an interface's name: the system knows its number
