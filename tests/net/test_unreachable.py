"""Upstreams that cannot be reached, with the real dialer: names, addresses, silence; the whole way to the answer."""

from __future__ import annotations

import socket

import pytest
import trio
from dial_kit import listening
from kit import chat, running_gateway, settings_for

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Deadlines
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.resolve import Address, Resolver

QUICK = Deadlines(connect=0.3, connect_tls=0.3)


async def outcome_of(url: str, *, kind: Kind, status: int, code: str, resolver: Resolver | None = None) -> None:
    """Ask for it: this answer, this record, and an invitation to try again, for nothing was sent."""
    dialer = TcpDialer(bounds=Bounds(), deadlines=QUICK, resolver=resolver)
    async with running_gateway(settings_for(url, deadlines=QUICK), dialer=dialer) as gateway:
        response = await gateway.ask(chat())
        assert response.status == status
        assert (response.error["type"], response.error["code"]) == ("upstream_error", code)
        assert response.header("x-should-retry") == "true"
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_FAILED
        assert record.failure is not None
        assert (record.failure.side, record.failure.phase, record.failure.kind) == (Side.UPSTREAM, Phase.DIAL, kind)


def nobody_there(_host: str, _port: int) -> list[Address]:
    """As the system's resolver says it."""
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def test_the_name_is_gone() -> None:
    """502 `upstream_unreachable`."""
    gone = Resolver(lookup=nobody_there)
    await outcome_of("http://gone.test/", kind=Kind.DNS, status=502, code="upstream_unreachable", resolver=gone)


async def test_the_resolver_is_slow() -> None:
    """It counts as connecting: 504 `upstream_timeout`, while the lookup goes on in its thread."""
    looked_up = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def slow(_host: str, _port: int) -> list[Address]:
        trio.from_thread.run(looked_up.wait, trio_token=token)
        return [(socket.AF_INET, ("127.0.0.1", 1))]

    await outcome_of(
        "http://slow.test/", kind=Kind.TIMEOUT, status=504, code="upstream_timeout", resolver=Resolver(lookup=slow)
    )
    looked_up.set()


async def test_nobody_listens() -> None:
    """502 `upstream_unreachable`."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        await outcome_of(f"http://127.0.0.1:{port}/", kind=Kind.REFUSED, status=502, code="upstream_unreachable")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_black_hole(scheme: str) -> None:
    """Packets go in and nothing comes out (the backlog is full, so a SYN is dropped): 504 `upstream_timeout`."""
    async with listening(backlog=1, accept=False) as (port, _):
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        await outcome_of(f"{scheme}://127.0.0.1:{port}/", kind=Kind.TIMEOUT, status=504, code="upstream_timeout")
        for filler in fillers:
            filler.close()


async def test_tls_that_never_answers() -> None:
    """The connection is made and the handshake is not: 504 `upstream_timeout`."""
    async with listening() as (port, accepted):
        await outcome_of(f"https://127.0.0.1:{port}/", kind=Kind.TIMEOUT, status=504, code="upstream_timeout")
        assert len(accepted) == 1
