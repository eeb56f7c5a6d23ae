"""From an upstream's settings to a connection that can run an exchange: which protocol, over what.

HTTP/1.1 is ours (the hot path), through a proxy as well: its tunnel is a stream like any other, and one that forwards
is told where to. HTTP/2 goes through httpcore: by ALPN for `https`, where an upstream may also choose HTTP/1.1, by
prior knowledge for `http`.
"""

from __future__ import annotations

from typing import final

import trio
from trio.abc import Stream

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry, Side
from canal_trio.relay.idle import Reaper
from canal_trio.relay.streams import handover_end
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.dial import Dialer, TcpDialer
from canal_trio.upstream.forward import ForwardedConnection
from canal_trio.upstream.http1 import Http1Connection
from canal_trio.upstream.httpcore import Http2Connection
from canal_trio.upstream.interface import Connection
from canal_trio.upstream.tunnel import parse_proxy
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["Connector", "Dialer", "speaks_http2"]


@final
class Connector:
    """Makes connections for the pools of one gateway."""

    def __init__(self, settings: Settings, reaper: Reaper, dialer: Dialer | None = None) -> None:
        self._settings = settings
        self._reaper = reaper
        self._dialer: Dialer = dialer or TcpDialer(bounds=settings.bounds, deadlines=settings.deadlines)

    async def connect(self, upstream: Upstream) -> Connection | Failure:
        """A new connection to `upstream`, or why there is none. Cancelled, it leaves no socket."""
        base = parse_base_url(upstream.base_url)
        if isinstance(base, str):
            raise CanalError(base)  # the configuration was checked
        stream = await self.dial(upstream)
        if isinstance(stream, Failure):
            return stream
        raw = handover_end(stream)
        if raw is None:
            raise CanalError(f"the dialer gave {stream!r}, which cannot be closed in one step")
        settings = self._settings
        bounds, deadlines = settings.bounds, settings.deadlines
        if speaks_http2(upstream, base, stream):
            return Http2Connection(stream, raw, base, reaper=self._reaper, bounds=bounds, deadlines=deadlines)
        connection = Http1Connection(stream, raw, reaper=self._reaper, bounds=bounds, deadlines=deadlines)
        proxy = parse_proxy(upstream.proxy) if upstream.proxy is not None else None
        if proxy is not None and proxy.forwards(base):
            return ForwardedConnection(connection, proxy, base)
        return connection

    async def dial(self, upstream: Upstream) -> Stream | Failure:
        """What the dialer gives, whichever it is, within the deadlines of dialling."""
        deadlines = self._settings.deadlines
        limit = deadlines.connect + (deadlines.connect_tls if upstream.base_url.startswith("https:") else 0.0)
        with trio.move_on_after(limit):
            return await self._dialer(upstream)
        detail = f"No connection was made within {limit:g} s."
        return Failure(Side.UPSTREAM, Phase.DIAL, Kind.TIMEOUT, detail, Retry.UNSENT)


def speaks_http2(upstream: Upstream, base: BaseUrl, stream: Stream) -> bool:
    """Is HTTP/2 to be spoken on this connection?"""
    return upstream.http2 and (base.scheme == "http" or _alpn(stream) == "h2")


def _alpn(stream: Stream) -> str | None:
    """What TLS agreed on; None without TLS, or if the upstream knows nothing of ALPN."""
    selected = getattr(stream, "selected_alpn_protocol", None)
    return selected() if selected is not None else None
