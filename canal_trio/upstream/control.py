"""Control calls: small requests of the gateway's own to an upstream (its list of models), through httpcore.

They are dialled as any connection is (proxy, TLS, trust), take the upstream's own key, and are over within a deadline
and a bound. One connection for each, closed at the end, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self, final

import httpcore
import trio
from trio.abc import Stream

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.relay.streams import handover_end
from canal_trio.settings import Upstream
from canal_trio.upstream.connect import Connector, speaks_http2
from canal_trio.upstream.tunnel import parse_proxy
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["fetch"]


async def fetch(
    connector: Connector,
    upstream: Upstream,
    path: bytes,
    *,
    fields: Iterable[tuple[bytes, bytes]],
    most: int,
    limit: float,
) -> tuple[int, bytes] | Failure:
    """GET `path` below the base URL: the status and the body, of `most` bytes; within `limit` seconds.

    `fields` go with it (the upstream's key). Cancelled, it leaves no socket.
    """
    base = parse_base_url(upstream.base_url)
    if isinstance(base, str):
        raise CanalError(base)  # the configuration was checked
    with trio.move_on_after(limit):
        stream = await connector.dial(upstream)
        if isinstance(stream, Failure):
            return stream
        try:
            return await _ask(stream, upstream, base, path, [(b"Host", base.authority), *fields], most)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ConnectionNotAvailable) as exc:
            return _failure(Kind.CUT, f"It did not answer: {str(exc).removesuffix('.')}.")
        except ValueError:  # httpcore reads an HTTP/2 status as a number without looking at it
            return _failure(Kind.MALFORMED, "The status code is not one of HTTP.")
        finally:
            raw = handover_end(stream)
            if raw is not None:
                raw.close()
            await trio.aclose_forcefully(stream)
    return _failure(Kind.TIMEOUT, f"It did not answer within {limit:g} s.")


async def _ask(
    stream: Stream, upstream: Upstream, base: BaseUrl, path: bytes, fields: list[tuple[bytes, bytes]], most: int
) -> tuple[int, bytes] | Failure:
    target = base.path + path
    proxy = parse_proxy(upstream.proxy) if upstream.proxy is not None else None
    if proxy is not None and proxy.forwards(base):
        target = b"%b://%b%b" % (base.scheme.encode(), base.authority, target)
    url = httpcore.URL(scheme=base.scheme, host=base.host, port=base.port, target=target)
    kind = httpcore.AsyncHTTP2Connection if speaks_http2(upstream, base, stream) else httpcore.AsyncHTTP11Connection
    connection = kind(url.origin, _Network(stream))
    response = await connection.handle_async_request(httpcore.Request(b"GET", url, headers=fields, content=_Nothing()))
    body = b""
    try:
        async for piece in response.stream:  # type: ignore[union-attr]  # the async kind, from an async connection
            body += piece
            if len(body) > most:
                await stream.aclose()  # what ends httpcore's generators is a read that fails
    except httpcore.NetworkError:
        if len(body) <= most:
            raise
    if len(body) > most:
        return _failure(Kind.MALFORMED, f"Its answer is longer than {most} bytes.")
    return response.status, body


def _failure(kind: Kind, detail: str) -> Failure:
    return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, kind, detail)


@final
class _Nothing:
    """No body. httpcore's own is an async generator, which a failed request leaves to the garbage collector."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


@final
class _Network(httpcore.AsyncNetworkStream):
    """A Trio stream as httpcore takes it. Its timeouts are the caller's deadline."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The next bytes, `b""` at the end."""
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise httpcore.ReadError(str(exc)) from exc

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        try:
            await self._stream.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise httpcore.WriteError(str(exc)) from exc

    async def aclose(self) -> None:
        """The caller closes it."""
