"""Connected pairs of streams for the tests of the relay floor."""

from __future__ import annotations

import fcntl
import socket
import struct

import trio

from canal_trio.relay.streams import TcpStream
from canal_trio.testing.simstream import SimStream, sim_stream_pair


def socket_pair(*, small: bool = False) -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets on the loopback; `small`: with the least buffers the kernel grants."""
    with socket.socket() as listener:
        if small:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.socket()
        if small:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    for sock in (client, server):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return client, server


async def tcp_pair(*, small: bool = False) -> tuple[TcpStream, TcpStream]:
    """Two connected TcpStreams."""
    one, other = socket_pair(small=small)
    return TcpStream(one), TcpStream(other)


def local_pair() -> tuple[TcpStream, TcpStream]:
    """Two TcpStreams over Unix sockets: what is sent has arrived when the send returns, which the loopback delays."""
    one, other = socket.socketpair()
    return TcpStream(one), TcpStream(other)


async def clogged_tcp_pair() -> tuple[TcpStream, TcpStream]:
    """Two connected TcpStreams that take no more bytes in either direction, until some are read."""
    pair = await tcp_pair(small=True)
    await clog(*pair)
    return pair


async def clog(*streams: TcpStream) -> None:
    """Send until the kernels take no more, also after they have passed on what they took.

    However long that takes on a busy machine: they have when no byte is under way and some are left, which wait for
    room at the other end. (A TLS stream has no socket to be asked; it is given some time.)
    """
    with trio.fail_after(30):
        quiet = 0
        while quiet < 5:
            # A full kernel may refuse a large piece and still take small ones, until its last page is full as well.
            taken = sum(stream.try_send(bytes(size)) for stream in streams for size in (65_536, 4_096, 256, 16, 1))
            still = not taken and all(map(_passes_nothing_on, streams))
            quiet = quiet + 1 if still else 0
            await trio.sleep(0.0 if taken else 0.002)


_SIOCOUTQ, _SIOCOUTQNSD = 0x5411, 0x894B  # tcp(7), sockios.h: bytes not acknowledged, and of these the ones not sent


def _passes_nothing_on(stream: TcpStream) -> bool:
    if stream.socket is None:
        return True
    unacknowledged, unsent = (
        struct.unpack("i", fcntl.ioctl(stream.socket, request, bytes(4)))[0] for request in (_SIOCOUTQ, _SIOCOUTQNSD)
    )
    return unacknowledged == unsent > 0


def reset(stream: TcpStream) -> None:
    """Close so that the peer sees a reset."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.close()


async def sim_pair() -> tuple[SimStream, SimStream]:
    """Two connected SimStreams with hand-over."""
    return sim_stream_pair()
