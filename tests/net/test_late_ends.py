"""What ends a body after its last event: a cut that came in time, or the gateway (`after_done`), over real sockets."""

from __future__ import annotations

import math
import socket
import struct
from functools import partial
from typing import Any

import pytest
import trio
from kit import chat, running_gateway, settings_for

from canal_trio.gateway.deliver import Delivery
from canal_trio.hooks import Outcome
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Deadlines, Upstream
from canal_trio.testing.scripts import DONE, stream

EVENTS = [b'data: {"n":1}\n\n', DONE]


@pytest.mark.parametrize("heartbeat", [None, 30.0], ids=["straight", "through-a-flow"])
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_link_that_broke_just_before_after_done_was_up_is_told_as_an_end(
    monkeypatch: pytest.MonkeyPatch, how: str, heartbeat: float | None
) -> None:
    """A cut that the kernel has and the poller has not read yet is a cut, also for a look at `after_done`'s time."""
    looks: list[Any] = []
    add = Reaper.add

    def seen(self: Reaper, check: Any, at: float) -> Any:
        if getattr(check, "__func__", None) is Delivery._late_end:
            looks.append(check)
        return add(self, check, at)

    monkeypatch.setattr(Reaper, "add", seen)
    wire = stream(EVENTS, head_alone=False).wire.removesuffix(b"0\r\n\r\n")
    go = trio.Event()

    async def upstream(connection: trio.SocketStream) -> None:
        await connection.receive_some()
        await connection.send_all(wire)
        await go.wait()
        if how == "rst":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.socket.close()
        else:
            connection.socket.shutdown(socket.SHUT_WR)
        [look] = looks
        assert look(trio.current_time()) == math.inf  # in the very step of the break: nobody can have read it
        if how == "fin":
            await connection.receive_some()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, upstream, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        settings = settings_for(Upstream("u0", url, heartbeat=heartbeat), deadlines=Deadlines(after_done=30))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.until(b"data: [DONE]\n\n\r\n")
            go.set()
            assert await client.rest() == b""
            record = await gateway.records.one()
            assert record.outcome is Outcome.COMPLETED
            assert record.flags == ("cut_after_terminal",)
        nursery.cancel_scope.cancel()
