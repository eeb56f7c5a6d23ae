"""From a base URL to a stream: resolve, connect, and TLS where the scheme says so. Every step has a deadline.

Invariants: what cannot be had is a `Failure` (nothing was sent, so it may be tried elsewhere); whatever is cancelled
half way leaves no socket. The receive buffer is set before the connection is made, because it bounds the window that
is offered (tcp(7)): a client that stalls must stop its upstream early, not megabytes later.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Protocol, final

import trio
from trio.abc import Stream

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry, Side
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.upstream.resolve import Address, Resolver
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["Dialer", "TcpDialer"]

STAGGER = 0.25  # seconds before the next address is tried beside the one before (RFC 8305 5)
KEEP_IDLE, KEEP_INTERVAL, KEEP_COUNT = 60, 15, 4  # a vanished upstream is noticed in two minutes of silence
USER_TIMEOUT_MS = 30_000  # unacknowledged bytes


class Dialer(Protocol):
    """Opens a stream to an upstream. Tests put a simulated network here."""

    async def __call__(self, upstream: Upstream) -> Stream | Failure:
        """A connected stream that can be closed in one step (`relay.streams.handover_end`), or why there is none."""


@final
class TcpDialer:
    """Dials over TCP, and TLS for `https`. `ssl_context` replaces the system's trust store, for tests."""

    def __init__(
        self,
        *,
        bounds: Bounds,
        deadlines: Deadlines,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._bounds = bounds
        self._deadlines = deadlines
        self._resolver = resolver or Resolver()
        self._given_context = ssl_context
        self._contexts: dict[tuple[str | None, tuple[str, ...]], ssl.SSLContext] = {}

    async def __call__(self, upstream: Upstream) -> Stream | Failure:
        """See `Dialer`. A checkpoint."""
        base = parse_base_url(upstream.base_url)
        if isinstance(base, str):
            raise CanalError(base)  # the configuration was checked
        alpn = ("h2", "http/1.1") if upstream.http2 else ("http/1.1",)
        return await self.dial(base, alpn=alpn, ca_file=upstream.ca_file)

    async def dial(
        self, base: BaseUrl, *, alpn: tuple[str, ...] = ("http/1.1",), ca_file: str | None = None
    ) -> Stream | Failure:
        """A stream to `base`'s host and port, inside TLS if its scheme is https. A checkpoint."""
        stream = await self.connect(base.host, base.port)
        if isinstance(stream, Failure) or base.scheme != "https":
            return stream
        return await self.secure(stream, base.host, alpn=alpn, ca_file=ca_file)

    async def connect(self, host: str, port: int) -> TcpStream | Failure:
        """A TCP connection, within `deadlines.connect`, name lookup included. A checkpoint."""
        result: TcpStream | Failure | None = None
        with trio.move_on_after(self._deadlines.connect):
            addresses = await self._resolver.resolve(host, port)
            result = addresses if isinstance(addresses, Failure) else await self._first(addresses)
        if result is None:
            detail = f"{host}:{port} did not accept within {self._deadlines.connect:g} s."
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.TIMEOUT, detail, Retry.UNSENT)
        return result

    async def _first(self, addresses: list[Address]) -> TcpStream | Failure:
        """The first of `addresses` that accepts; each gets a head start before the next one is tried too."""
        if len(addresses) == 1:
            return await self._one(addresses[0])
        won: list[TcpStream] = []
        failures: list[Failure] = []
        async with trio.open_nursery() as nursery:

            async def attempt(address: Address, failed: trio.Event) -> None:
                result = await self._one(address)
                if isinstance(result, Failure):
                    failures.append(result)
                    failed.set()
                elif won:
                    result.close()
                else:
                    won.append(result)
                    nursery.cancel_scope.cancel(reason="another address accepted first")

            try:
                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(attempt, address, failed)
                    with trio.move_on_after(STAGGER):
                        await failed.wait()
            except BaseException:
                if not nursery.cancel_scope.cancel_called:  # cancelled from outside: nobody will take the winner
                    _close(won)
                raise
        return won[0] if won else failures[-1]

    async def _one(self, address: Address) -> TcpStream | Failure:
        family, where = address
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._bounds.upstream_receive_bytes)
            await sock.connect(where)
            _set_options(sock)
        except OSError as exc:
            sock.close()
            detail = f"{where[0]}:{where[1]}: {exc.strerror or exc}."
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.REFUSED, detail, Retry.UNSENT)
        except BaseException:
            sock.close()
            raise
        return TcpStream(socket.socket(fileno=sock.detach()))

    async def secure(
        self, stream: TcpStream, host: str, *, alpn: tuple[str, ...] = ("http/1.1",), ca_file: str | None = None
    ) -> Stream | Failure:
        """`stream` inside TLS, within `deadlines.connect_tls`. Failed or cancelled, the stream is closed."""
        # Not https_compatible: a bare FIN must be told from close_notify, or a cut body would look complete.
        tls = trio.SSLStream(stream, self._context(ca_file, alpn), server_hostname=host, https_compatible=False)
        try:
            with trio.fail_after(self._deadlines.connect_tls):
                await tls.do_handshake()
        except trio.TooSlowError:
            stream.close()
            detail = f"The TLS handshake with {host} took more than {self._deadlines.connect_tls:g} s."
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.TIMEOUT, detail, Retry.UNSENT)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            stream.close()
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.TLS, f"{host}: {_reason(exc)}.", Retry.UNSENT)
        except BaseException:
            stream.close()
            raise
        return tls

    def _context(self, ca_file: str | None, alpn: tuple[str, ...]) -> ssl.SSLContext:
        if self._given_context is not None:
            return self._given_context
        key = (ca_file, alpn)
        if key not in self._contexts:
            context = ssl.create_default_context(cafile=ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(list(alpn))
            self._contexts[key] = context
        return self._contexts[key]


def _close(streams: list[TcpStream]) -> None:
    for stream in streams:
        stream.close()


def _set_options(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # tuning; the kernel's defaults serve as well
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_COUNT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def _reason(exc: BaseException) -> str:
    cause = exc.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.replace("_", " ").lower()
    return "the connection was closed during the TLS handshake"
