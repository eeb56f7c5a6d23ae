"""Dialers and listeners for the tests of dialling."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from canal_trio.errors import Failure, Phase, Retry
from canal_trio.settings import Bounds, Deadlines
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.resolve import Address, Resolver

V4, V6 = socket.AF_INET, socket.AF_INET6


def dialer(*, bounds: Bounds | None = None, resolver: Resolver | None = None, **deadlines: float) -> TcpDialer:
    """A dialer with these deadlines."""
    return TcpDialer(bounds=bounds or Bounds(), deadlines=Deadlines(**deadlines), resolver=resolver)


def told(*addresses: Address) -> Resolver:
    """A resolver that says this."""
    return Resolver(lookup=lambda _host, _port: list(addresses))


def refused(result: Any) -> Failure:
    """It must be a failure of dialling: nothing was sent."""
    assert isinstance(result, Failure), result
    assert (result.phase, result.retry) == (Phase.DIAL, Retry.UNSENT)
    return result


@asynccontextmanager
async def listening(*, backlog: int | None = None, accept: bool = True) -> AsyncIterator[tuple[int, list[Any]]]:
    """A listener on loopback; its port and what it accepted. `accept=False` leaves them in the backlog."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=backlog)
    accepted: list[Any] = []

    async def keep() -> None:
        while True:
            accepted.append(await listener.accept())

    async with listener, trio.open_nursery() as nursery:
        if accept:
            nursery.start_soon(keep)
        yield listener.socket.getsockname()[1], accepted
        nursery.cancel_scope.cancel()
    for stream in accepted:
        stream.socket.close()
