"""After `101 Switching Protocols`: raw bytes both ways, until both directions have ended (RFC 9110 7.8).

Each direction is a flow, and its bound is its backpressure. Invariant: an end is passed on as an end, anything else
closes the connection and is noted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import final

import trio
from trio.abc import HalfCloseableStream, Stream

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import End
from canal_trio.relay.flow import Aborted, FlowSender
from canal_trio.upstream.interface import BodySource
from canal_trio.upstream.turns import Turns

__all__ = ["Tunnel"]

_PEER_TROUBLE = (trio.BrokenResourceError, trio.ClosedResourceError)


@final
class Tunnel:
    """The upstream's half of a tunnel. `note` keeps a failure, `abort` closes the connection in this very step."""

    def __init__(
        self,
        stream: Stream,
        turns: Turns,
        piece_bytes: int,
        note: Callable[[Failure], None],
        abort: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._turns = turns
        self._piece_bytes = piece_bytes
        self._note = note
        self._abort = abort
        self._broken = False

    async def run(
        self, early: bytes, send: Callable[[list[bytes]], Awaitable[None]], body: BodySource | None, sender: FlowSender
    ) -> None:
        """Relay until both directions have ended, or one broke. `early` came with the 101. A checkpoint."""
        async with trio.open_nursery() as nursery:
            if body is not None:
                nursery.start_soon(self._up, body, send)
            await self._down(early, sender)
            if self._broken:  # else the client's direction goes on to its own end
                nursery.cancel_scope.cancel(reason="the tunnel broke")

    def _break(self, failure: Failure) -> None:
        self._broken = True
        self._note(failure)
        self._abort()

    def _reset(self, exc: Exception) -> None:
        self._break(Failure(Side.UPSTREAM, Phase.STREAM, Kind.RESET, str(exc)))

    async def _down(self, data: bytes, sender: FlowSender) -> None:
        try:
            if data:
                await sender.put(data)
            while data := bytes(await self._stream.receive_some(self._piece_bytes)):
                self._turns.moved = trio.current_time()
                await sender.put(data)
                self._turns.moved = trio.current_time()
            sender.end(End())
        except _PEER_TROUBLE as exc:
            self._reset(exc)

    async def _up(self, body: BodySource, send: Callable[[list[bytes]], Awaitable[None]]) -> None:
        try:
            while body.ending is None:
                await send(await body.take())
                self._turns.moved = trio.current_time()
            if isinstance(body.ending, Aborted):
                self._abort()
            elif isinstance(self._stream, HalfCloseableStream):
                await self._stream.send_eof()
            else:
                gone = Failure(Side.CLIENT, Phase.STREAM, Kind.GONE, "The client ended its side of the tunnel.")
                self._break(gone)  # there is no other way to pass that on
        except _PEER_TROUBLE as exc:
            self._reset(exc)
