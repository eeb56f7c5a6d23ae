"""From an upstream's settings to a connection that can run an exchange: which transport, which protocol.

HTTP/1.1 over a stream of the dialer's is ours (the hot path). HTTP/2 and forward proxies go through httpcore.
"""

from __future__ import annotations

from typing import final

from canal_trio.errors import CanalError, Failure
from canal_trio.relay.idle import Reaper
from canal_trio.relay.streams import handover_end
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.dial import Dialer, TcpDialer
from canal_trio.upstream.http1 import Http1Connection
from canal_trio.upstream.interface import Connection

__all__ = ["Connector", "Dialer"]


@final
class Connector:
    """Makes connections for the pools of one gateway."""

    def __init__(self, settings: Settings, reaper: Reaper, dialer: Dialer | None = None) -> None:
        self._settings = settings
        self._reaper = reaper
        self._dialer: Dialer = dialer or TcpDialer(bounds=settings.bounds, deadlines=settings.deadlines)

    async def connect(self, upstream: Upstream) -> Connection | Failure:
        """A new connection to `upstream`, or why there is none. Cancelled, it leaves no socket."""
        stream = await self._dialer(upstream)
        if isinstance(stream, Failure):
            return stream
        raw = handover_end(stream)
        if raw is None:
            raise CanalError(f"the dialer gave {stream!r}, which cannot be closed in one step")
        settings = self._settings
        return Http1Connection(stream, raw, reaper=self._reaper, bounds=settings.bounds, deadlines=settings.deadlines)
