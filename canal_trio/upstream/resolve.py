"""Names to addresses, without ever waiting for a resolver longer than one must.

`getaddrinfo` blocks, so it runs in threads: our own few, because a lookup that is given up keeps its thread until the
system's resolver lets go, and Trio's common limiter is shared with everything else. One lookup per name at a time,
whoever asks (single flight); answers are kept for `ttl` seconds, and for `stale` more they are better than none.
Numeric addresses are not looked up.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side

__all__ = ["Address", "Resolver"]

Address: TypeAlias = "tuple[int, tuple[Any, ...]]"
"""An address family and a socket address of it."""

MOST_NAMES = 1024  # kept; only configured names are ever asked for


@dataclass(slots=True)
class _Entry:
    addresses: list[Address]
    at: float


@final
class Resolver:
    """A cache over `lookup` (default `socket.getaddrinfo`), for one process."""

    def __init__(
        self,
        *,
        ttl: float = 30.0,
        stale: float = 600.0,
        threads: int = 8,
        lookup: Callable[..., Any] = socket.getaddrinfo,
    ) -> None:
        self._ttl = ttl
        self._stale = stale
        self._limiter = trio.CapacityLimiter(threads)
        self._lookup = lookup
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._flights: dict[tuple[str, int], trio.Event] = {}

    async def resolve(self, host: str, port: int) -> list[Address] | Failure:
        """At least one address, or Kind.DNS. A checkpoint. Cancelling it lets another waiter take the lookup over."""
        numeric = _numeric(host, port)
        if numeric is not None:
            await trio.lowlevel.checkpoint()
            return [numeric]
        name = (host, port)
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            entry = self._entries.get(name)
            if entry is not None and trio.current_time() - entry.at < self._ttl:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return entry.addresses
            flight = self._flights.get(name)
            if flight is None:
                return await self._fly(name, entry)
            await flight.wait()
            if name not in self._entries and name not in self._flights:
                # It came to nothing, or whoever flew it was cancelled: take over.
                continue

    async def _fly(self, name: tuple[str, int], known: _Entry | None) -> list[Address] | Failure:
        landed = self._flights[name] = trio.Event()
        try:
            addresses = await self._ask(name)
        finally:
            del self._flights[name]
            landed.set()
        if isinstance(addresses, Failure):
            if known is not None and trio.current_time() - known.at < self._ttl + self._stale:
                known.at = trio.current_time() - self._ttl + min(1.0, self._ttl)  # ask again in a second
                return known.addresses
            return addresses
        if len(self._entries) >= MOST_NAMES:
            self._entries.pop(next(iter(self._entries)))
        self._entries[name] = _Entry(addresses, trio.current_time())
        return addresses

    async def _ask(self, name: tuple[str, int]) -> list[Address] | Failure:
        host, port = name
        try:
            found = await trio.to_thread.run_sync(
                lambda: self._lookup(host, port, type=socket.SOCK_STREAM), limiter=self._limiter, abandon_on_cancel=True
            )
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.DNS, f"{host}: {reason}.", Retry.UNSENT)
        addresses = [(family, address) for family, _, _, _, address in found]
        if not addresses:
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.DNS, f"{host} has no address.", Retry.UNSENT)
        return addresses


def _numeric(host: str, port: int) -> Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.version == 4:
        return socket.AF_INET, (host, port)
    return socket.AF_INET6, (host, port, 0, 0)
