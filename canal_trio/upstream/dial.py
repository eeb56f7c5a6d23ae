"""From an upstream's settings to a stream: resolve, connect, perhaps a proxy's tunnel, and TLS for `https`.

Invariants: what cannot be had is a `Failure` (nothing was sent, so it may be tried elsewhere); whatever is cancelled
half way, a handshake included, leaves no socket. A connection, name lookup and proxy included, stands within
`deadlines.connect`, TLS within `deadlines.connect_tls` more. The receive buffer is set before the connection is made,
because it bounds the window that is offered (tcp(7)): a client that stalls must stop its upstream early, not megabytes
later.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import ssl
from typing import Protocol, final

import trio
from trio.abc import Stream

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry, Side
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.tls import TlsStream
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.upstream.resolve import Address, Resolver
from canal_trio.upstream.tunnel import Proxy, open_tunnel, parse_proxy
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["Dialer", "TcpDialer"]

STAGGER = 0.25  # seconds before the next address is tried beside the one before (RFC 8305 5)
UNSENT_BYTES = 128 * 1024  # TCP_NOTSENT_LOWAT: an upload is not megabytes ahead of an upstream that does not read
KEEP_IDLE, KEEP_INTERVAL, KEEP_COUNT = 60, 15, 4  # a vanished upstream is noticed in two minutes of silence

# We lack something: not the upstream's fault, and no other upstream would fare better for it.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN})

_log = logging.getLogger("canal_trio.upstream")


class Dialer(Protocol):
    """Opens a stream to an upstream. Tests put a simulated network here."""

    async def __call__(self, upstream: Upstream) -> Stream | Failure:
        """A connected stream that can be closed in one step (`relay.streams.handover_end`), or why there is none."""


@final
class TcpDialer:
    """Dials over TCP, through `upstream.proxy` if there is one, and TLS for `https`."""

    def __init__(self, *, bounds: Bounds, deadlines: Deadlines, resolver: Resolver | None = None) -> None:
        self._bounds = bounds
        self._deadlines = deadlines
        self._resolver = resolver or Resolver()
        self._contexts: dict[tuple[str | None, tuple[str, ...]], ssl.SSLContext] = {}
        self._loading = trio.Lock()  # one reads the trust store, the others wait for what it found

    async def __call__(self, upstream: Upstream) -> Stream | Failure:
        """See `Dialer`. A checkpoint."""
        base = parse_base_url(upstream.base_url)
        if isinstance(base, str):
            raise CanalError(base)  # the configuration was checked
        proxy = parse_proxy(upstream.proxy) if upstream.proxy is not None else None
        started = trio.current_time()
        stream = await self._reach(base, proxy, prior_knowledge=upstream.http2 and base.scheme == "http")
        if isinstance(stream, Failure) or base.scheme == "http":
            return stream
        alpn = ("h2", "http/1.1") if upstream.http2 else ("http/1.1",)
        until = started + self._deadlines.connect + self._deadlines.connect_tls
        return await self.secure(stream, base.host, until=until, alpn=alpn, ca_file=upstream.ca_file)

    # -- TCP -----------------------------------------------------------------------------------------------------------

    async def connect(self, host: str, port: int) -> TcpStream | Failure:
        """A TCP connection, within `deadlines.connect`, name lookup included. A checkpoint."""
        return await self._reach(BaseUrl("http", host, port, b"", b""), None)

    async def _reach(
        self, base: BaseUrl, proxy: Proxy | None, *, prior_knowledge: bool = False
    ) -> TcpStream | Failure:
        """A connection on which the upstream listens, or the proxy that forwards for it."""
        limit = self._deadlines.connect
        result: TcpStream | Failure | None = None
        place = base if proxy is None else proxy
        with trio.move_on_after(limit):
            addresses = await self._resolver.resolve(place.host, place.port)
            stream = addresses if isinstance(addresses, Failure) else await self._first(_interleaved(addresses))
            tunnel = proxy is not None and (prior_knowledge or not proxy.forwards(base))
            if proxy is None or not tunnel or isinstance(stream, Failure):
                result = stream
            else:
                result = await open_tunnel(stream, proxy, base)
        if result is None:
            return _failure(Kind.TIMEOUT, f"{_shown(place.host, place.port)} did not answer within {limit:g} s.")
        return result

    async def _first(self, addresses: list[Address]) -> TcpStream | Failure:
        """The first of `addresses` that accepts; each gets a head start before the next one is tried too."""
        if len(addresses) == 1:
            return await self._one(addresses[0])
        won: list[TcpStream] = []
        failures: list[Failure] = []
        try:
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

                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(attempt, address, failed)
                    with trio.move_on_after(STAGGER):
                        await failed.wait()
        except BaseException:
            for stream in won:  # cancelled from outside just then: nobody will take it
                stream.close()
            raise
        return won[0] if won else failures[-1]

    async def _one(self, address: Address) -> TcpStream | Failure:
        family, where = address
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:
            return _refused(where, exc)
        try:
            self._set_options(sock)
            await sock.connect(where)
        except OSError as exc:
            sock.close()
            return _refused(where, exc)
        except BaseException:
            sock.close()
            raise
        return TcpStream(socket.socket(fileno=sock.detach()))

    def _set_options(self, sock: trio.socket.SocketType) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._bounds.upstream_receive_bytes)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):  # tuning; the kernel's defaults serve as well
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_IDLE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_INTERVAL)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_COUNT)
            if not math.isinf(self._deadlines.upstream_idle):
                # Sent and not acknowledged, or refused by a window of zero: the kernel must not give up before we do.
                milliseconds = max(1, round(self._deadlines.upstream_idle * 1000))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    # -- TLS -----------------------------------------------------------------------------------------------------------

    async def secure(
        self,
        stream: TcpStream,
        host: str,
        *,
        until: float | None = None,
        alpn: tuple[str, ...] = ("http/1.1",),
        ca_file: str | None = None,
    ) -> Stream | Failure:
        """`stream` inside TLS with a peer that proves to be `host`. Failed or cancelled, the stream is closed.

        What comes out can hand over, and tells a bare FIN from close_notify, or a cut body would look complete. The
        handshake is done at `until` (Trio's clock; None: `deadlines.connect_tls` from now). A checkpoint.
        """
        name = host.rstrip(".")  # RFC 6066 3: without the trailing dot
        result: Stream | Failure = _failure(Kind.TIMEOUT, f"{host} did not finish the TLS handshake in time.")
        try:
            with trio.move_on_at(trio.current_time() + self._deadlines.connect_tls if until is None else until):
                context = await self._context(ca_file, alpn)
                if isinstance(context, Failure):
                    result = context
                else:
                    tls = TlsStream(stream, context, server_hostname=name)
                    await tls.do_handshake()
                    result = tls
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            result = _failure(Kind.TLS, f"{host}: {_reason(exc)}.")
        except ValueError as exc:  # from `wrap_bio`, or as the name is encoded for it
            result = _failure(Kind.TLS, f"{host} is no name to ask for in TLS: {exc}.")
        except BaseException:
            stream.close()
            raise
        if isinstance(result, Failure):
            stream.close()
        return result

    async def _context(self, ca_file: str | None, alpn: tuple[str, ...]) -> ssl.SSLContext | Failure:
        key = (ca_file, alpn)
        if key in self._contexts:
            return self._contexts[key]
        async with self._loading:
            if key not in self._contexts:
                try:
                    # Reading a trust store takes tens of milliseconds, which no stream shall wait.
                    self._contexts[key] = await trio.to_thread.run_sync(_client_context, *key, abandon_on_cancel=True)
                except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
                    _log.error("no certificates can be read from %s: %s", ca_file or "the system's trust store", exc)
                    detail = "The certificates to trust cannot be read; the log says more."
                    return _failure(Kind.UNAVAILABLE, detail, Side.GATEWAY)
        return self._contexts[key]


def _client_context(ca_file: str | None, alpn: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(alpn))
    return context


def _interleaved(addresses: list[Address]) -> list[Address]:
    """The families by turns, beginning with the first one's (RFC 8305 4): a family without a route costs one try."""
    first = [address for address in addresses if address[0] == addresses[0][0]]
    other = [address for address in addresses if address[0] != addresses[0][0]]
    mixed: list[Address] = []
    while first or other:
        mixed += first[:1] + other[:1]
        first, other = first[1:], other[1:]
    return mixed


def _failure(kind: Kind, detail: str, side: Side = Side.UPSTREAM) -> Failure:
    return Failure(side, Phase.DIAL, kind, detail, Retry.UNSENT)


def _refused(where: tuple[object, ...], exc: OSError) -> Failure:
    reason = os.strerror(exc.errno) if exc.errno else str(exc)  # Trio's own text repeats the address
    if exc.errno in _OURS:
        return _failure(Kind.UNAVAILABLE, f"The gateway cannot open a connection: {reason}.", Side.GATEWAY)
    kind = Kind.TIMEOUT if exc.errno == errno.ETIMEDOUT else Kind.REFUSED
    return _failure(kind, f"{_shown(where[0], where[1])}: {reason}.")


def _shown(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _reason(exc: BaseException) -> str:
    cause = exc.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.replace("_", " ").lower()
    return "the connection was closed during the TLS handshake"
