"""Between an upstream task and its driver: what the upstream said, heads one by one, then the body's flow."""

from __future__ import annotations

import contextlib
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import ResponseHead
from canal_trio.relay.flow import FlowReceiver, FlowSender, Meter, open_flow
from canal_trio.settings import Bounds

__all__ = ["Port"]


@final
class Port:
    """The upstream task's side is an `upstream.interface.Answer`; the driver takes heads and then the flow."""

    def __init__(self, bounds: Bounds, meter: Meter) -> None:
        self._send, self._receive = trio.open_memory_channel[ResponseHead](1)
        self.body: FlowSender
        self.flow: FlowReceiver
        self.body, self.flow = open_flow(
            bounds.capacity, piece_bytes=bounds.piece_bytes, handover_bytes=bounds.handover_bytes, meter=meter
        )
        self._failure: Failure | None = None

    async def head(self, head: ResponseHead) -> None:
        """Pass a head on; a checkpoint, waits while the one before was not taken."""
        await self._send.send(head)

    def finish(self, failure: Failure | None) -> None:
        """The attempt is over. Not a checkpoint; idempotent."""
        self._failure = failure
        self._send.close()
        self.body.abort(failure)

    def close(self) -> None:
        """The driver wants no more of it. Not a checkpoint; idempotent."""
        self.flow.close()

    async def next_head(self) -> ResponseHead | Failure:
        """The next head, or the failure that came instead. A checkpoint."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return self._failure or Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT)

    async def over(self) -> Failure | None:
        """Wait for the end of the attempt, whose heads were taken; its failure if it had one. A checkpoint."""
        with contextlib.suppress(trio.EndOfChannel):
            await self._receive.receive()
        return self._failure
