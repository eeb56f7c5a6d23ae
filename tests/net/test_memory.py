"""Bounded always (design, section 1): clients that never read stop their upstreams, nothing grows, all can resume.

Measured in bytes, over real sockets with the kernel's own buffers. What is taken from an upstream is what it could
send: the flow's pieces, the client's unsent bytes, and every kernel buffer on the way, the upstream's own included.
"""

from __future__ import annotations

import gc

import pytest
import trio
from kit import Client, Response, chat, running_gateway, settings_for

from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds
from canal_trio.testing.scripts import Script, Send, Stall, WaitFor
from canal_trio.testing.upstreams import ScriptedUpstream

CLIENTS = 200
MIB = 1024 * 1024
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"data: " + b"x" * 1000 + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
BATCH = 64  # events per send: an upstream as fast as it can
FORMULA = (2 * 4 + 2) * 16_384 + 32_768  # the bound of one direction by default


def resident() -> int:
    """This process's resident memory, in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


async def standing_still(upstream: ScriptedUpstream) -> int:
    """Wait until no upstream can send anything more; the bytes sent in all."""
    before = -1
    while before != (now := sum(seen.sent for seen in upstream.requests)):
        before = now
        await trio.sleep(0.5)
    return before


@pytest.mark.slow
async def test_clients_that_never_read() -> None:
    """200 of them before upstreams that never rest: each upstream is stopped, nothing grows after that, all resume."""
    begin, go = trio.Event(), trio.Event()
    flood = (Send(CHUNK * BATCH, EVENT * BATCH),) * 25
    script = Script((Send(HEAD), WaitFor(begin), *flood, WaitFor(go), Send(b"0\r\n\r\n")))
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        clients = [await gateway.connect() for _ in range(CLIENTS)]
        for client in clients:
            await client.send(chat())
        heads = [await client.final_head() for client in clients]
        gc.collect()
        before = resident()  # everything is there but the bytes
        begin.set()
        stopped = await standing_still(upstream)
        assert max(seen.sent for seen in upstream.requests) < 1.5 * MIB < len(script.wire), (
            "an upstream was not stopped"
        )
        gc.collect()
        grown = resident() - before
        assert grown < CLIENTS * FORMULA, f"{grown // CLIENTS} bytes per stream"
        await trio.sleep(1)
        assert await standing_still(upstream) == stopped, "something grows although nobody reads"
        go.set()

        async def resume(client: Client, head: Response) -> None:
            await client.body(head)
            assert head.complete
            assert head.body == script.payload

        async with trio.open_nursery() as nursery:
            for client, head in zip(clients, heads, strict=True):
                nursery.start_soon(resume, client, head)
        records = await gateway.records.wait(CLIENTS, seconds=30)
        assert {record.outcome for record in records} == {Outcome.COMPLETED}


KERNELS = 150_000  # bytes: what four sockets' buffers of 16 KiB hold, as Linux doubles and counts them


async def test_what_is_taken_from_an_upstream_follows_the_capacity() -> None:
    """Kernel buffers being equal, what a client that never reads costs its upstream is decided by the flow's bound."""
    script = Script((Send(HEAD), *(Send(CHUNK * BATCH),) * 100, Stall()))
    taken = []
    for capacity in (1, 24):
        bounds = Bounds(piece_bytes=65_536, capacity=capacity, handover_bytes=65_536, upstream_receive_bytes=16_384)
        async with (
            ScriptedUpstream(script, send_buffer=16_384) as upstream,
            running_gateway(settings_for(upstream.url, bounds=bounds), send_buffer=16_384) as gateway,
        ):
            client = await gateway.connect(receive_buffer=16_384)
            await client.send(chat())
            await client.final_head()
            taken.append(await standing_still(upstream))
            assert taken[-1] < (2 * capacity + 3) * 65_536 + KERNELS
    assert taken[1] - taken[0] > 250_000
