"""Listening sockets made by hand, and the accept loop over them.

Trio's own listeners accept one connection per scheduler pass, cannot be told to stop at a number, and write a traceback
ten times a second when descriptors run out. Here: the number of connections is bounded by slots shared by all listeners
of a gateway, perhaps by others for each address it listens on, and at the bound nobody accepts, so that the kernel's
backlog holds what is too much, while idle connections are closed to make room for those who knock; a client address may
have a bound, too, beyond which it is refused; a wake-up accepts several connections; trouble with descriptors or memory
backs off and is told once in a while.

Options are set on the listening socket, from which Linux hands them down to every accepted one: no system call per
connection. Invariant: an accepted socket is always owned, by a slot and a task, or closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias, final

import trio

from canal_trio.errors import CanalError
from canal_trio.relay.streams import TcpStream
from canal_trio.serve.crowd import Crowd, Partings
from canal_trio.settings import Bounds, Deadlines, address_text

__all__ = ["Acceptor", "ListenError", "Slots", "listening_texts", "open_listeners", "reserve", "set_options"]

BACKLOG = 4096  # the kernel cuts it to net.core.somaxconn
ACCEPTS_PER_WAKE = 16  # before everybody else gets a turn: each of them costs a fraction of a millisecond
KEEP_IDLE, KEEP_INTERVAL, KEEP_COUNT = 60, 15, 4  # seconds, seconds, probes: a vanished client is seen in 2 minutes
BACK_OFF_FIRST, BACK_OFF_LAST = 0.05, 1.0  # seconds
ROOM_EVERY = 1.0  # seconds between two looks for idle connections to close, while somebody knocks at a full door
TELL_EVERY = 30.0  # seconds between two log lines about the same trouble

# What accept(2) reports about the connection in question, not about us: Trio ignores the same ones.
_PASSING = frozenset(
    {
        errno.EPERM, errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
        errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EINTR,
    }
)  # fmt: skip
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_TASK = "canal_trio.serve.listen.Acceptor._serve"  # Trio would make such a text for each of them

_log = logging.getLogger("canal_trio.serve")

Address: TypeAlias = tuple[str, int]
Handler: TypeAlias = Callable[[TcpStream, str], Awaitable[None]]
"""Serves one connection and closes it; gets the peer's address."""


class ListenError(CanalError):
    """An address cannot be listened on. The text says which one and why."""


async def open_listeners(
    addresses: Sequence[Address], *, backlog: int = BACKLOG, share: bool = False
) -> list[socket.socket]:
    """Bound, listening, non-blocking sockets, at least one for each of `addresses`; a name may give several.

    A port of 0 is chosen by the kernel. Bound without SO_REUSEPORT, which makes the bind itself the probe: whoever
    serves there already, with or without SO_REUSEPORT, is found. With `share` it is set, for one worker of several.
    Raises `ListenError`, with nothing left open. A checkpoint.
    """
    opened: list[socket.socket] = []
    try:
        for address in addresses:
            opened += await _open(address, backlog, share)
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return opened


async def reserve(addresses: Sequence[Address]) -> list[socket.socket]:
    """Sockets that hold `addresses` for workers who open them with `share`; they never listen themselves.

    The addresses are first opened as by somebody who shares with nobody: whoever serves there is found. A second
    gateway finds these sockets in the same way, before any worker listens. Raises as `open_listeners`; a checkpoint.
    """
    probes = await open_listeners(addresses)
    held: list[socket.socket] = []
    try:
        for probe in probes:
            family, where = probe.family, probe.getsockname()
            probe.close()
            held.append(sock := socket.socket(family, socket.SOCK_STREAM))
            _set_sharing(sock, share=True)
            try:
                sock.bind(where)
            except OSError as exc:
                raise ListenError(_complaint(where[:2], exc)) from None
            # Past connections in TIME_WAIT did not count; from now on we do, though we do not listen.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except BaseException:
        for sock in [*probes, *held]:
            sock.close()
        raise
    return held


async def _open(address: Address, backlog: int, share: bool) -> list[socket.socket]:
    host, port = address
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ListenError(f"cannot listen on {address_text(address)}: {exc.strerror or exc}") from None
    targets = {(family, sockaddr): None for family, _, _, _, sockaddr in found}
    opened: list[socket.socket] = []
    missing: OSError | None = None
    for family, sockaddr in targets:
        if opened and port == 0:  # `localhost:0` is one port on both of its addresses
            sockaddr = (sockaddr[0], opened[0].getsockname()[1], *sockaddr[2:])
        try:
            opened.append(_bound(family, sockaddr, backlog, share))
        except OSError as exc:
            # A name may stand for an address family that this machine does not have.
            if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(targets) > 1:
                missing = exc
                continue
            for sock in opened:
                sock.close()
            raise ListenError(_complaint(address, exc)) from None
    if not opened:
        assert missing is not None
        raise ListenError(_complaint(address, missing))
    return opened


def _set_sharing(sock: socket.socket, *, share: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections in TIME_WAIT do not count
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(share))
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 0.0.0.0 and [::] are two addresses


def _bound(family: int, sockaddr: tuple[object, ...], backlog: int, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_sharing(sock, share=share)
        sock.bind(sockaddr)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _complaint(address: Address, exc: OSError) -> str:
    text = address_text(address)
    match exc.errno:
        case errno.EADDRINUSE:
            return f"cannot listen on {text}: the address is in use; another program serves there"
        case errno.EACCES:
            return f"cannot listen on {text}: permission denied; ports below 1024 need a privilege"
        case errno.EADDRNOTAVAIL:
            return f"cannot listen on {text}: this machine has no such address"
        case _:
            return f"cannot listen on {text}: {exc.strerror or exc}"


def set_options(sock: socket.socket, bounds: Bounds, deadlines: Deadlines) -> None:
    """Set on a listening socket what every connection accepted from it is to have."""
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEP_IDLE)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEP_INTERVAL)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, KEEP_COUNT)
    # Since Linux 5.11 this also ends a connection whose peer keeps its window shut. Our own write deadline has to see
    # a stalled client first, or its record would say that the connection broke.
    patience = min(deadlines.client_write + 30.0, 86_400.0)
    sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, int(patience * 1000))
    # What makes a stalled client felt: without it the kernel takes megabytes that nobody reads.
    sock.setsockopt(tcp, socket.TCP_NOTSENT_LOWAT, bounds.client_unsent_bytes)


@final
class Slots:
    """How many connections there may be. Shared by the acceptors of one gateway; a part of `whole`, if there is one."""

    def __init__(self, total: float, whole: Slots | None = None) -> None:
        self.total = total
        self.used = 0
        self._whole = whole
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def free(self) -> float:
        """Slots left; negative after `total` was lowered below what is in use."""
        own = self.total - self.used
        return own if self._whole is None else min(own, self._whole.free)

    @property
    def bound(self) -> float:
        """The total that is in the way, now that none is free."""
        return self.total if self._whole is None or self.used >= self.total else self._whole.bound

    def take(self) -> None:
        """Use one slot; look at `free` first."""
        self.used += 1
        if self._whole is not None:
            self._whole.take()

    def give(self) -> None:
        """A connection has ended."""
        self.used -= 1
        self._waiting.unpark_all()
        if self._whole is not None:
            self._whole.give()

    def resize(self, total: float) -> None:
        """Change the bound. Connections beyond it live on; none is accepted until they have gone."""
        self.total = total
        self._waiting.unpark_all()

    async def wait_free(self) -> None:
        """Return once there is a slot; a checkpoint only if it had to wait."""
        while self.free <= 0:
            if self._whole is not None and self.used < self.total:
                await self._whole.wait_free()
            else:
                await self._waiting.park()


@final
class Acceptor:
    """The accept loop of one listening socket, which it owns. Each connection becomes a task of `connections`.

    `trouble(cause)` is called for each failed accept, `bug()` for what a handler raises; they count. `make_room()`
    closes idle connections. `crowd` knows who has too many already: they get the words of `refusal()` through
    `partings`.
    """

    def __init__(
        self,
        sock: socket.socket,
        slots: Slots,
        handler: Handler,
        connections: trio.Nursery,
        *,
        trouble: Callable[[str], None] | None = None,
        make_room: Callable[[], object] = lambda: None,
        crowd: Crowd | None = None,
        partings: Partings | None = None,
        refusal: Callable[[], bytes] = lambda: b"",
        bug: Callable[[], object] = lambda: None,
    ) -> None:
        self.socket = sock
        self.address: Address = sock.getsockname()[:2]
        self._slots = slots
        self._handler = handler
        self._connections = connections
        self._trouble = trouble or (lambda _cause: None)
        self._make_room = make_room
        self._crowd = Crowd(math.inf, ()) if crowd is None else crowd
        self._partings = Partings() if partings is None else partings
        self._refusal = refusal
        self._bug = bug
        self._back_off = BACK_OFF_FIRST
        self._tell_at = -TELL_EVERY
        self._untold = 0
        self._full_told_at = -TELL_EVERY

    async def run(self) -> None:
        """Accept until cancelled. Cancelling leaves the socket open and loses no connection."""
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            while self._slots.free <= 0:
                self._tell_full()
                self._make_room()
                with trio.move_on_after(ROOM_EVERY):
                    await self._slots.wait_free()
            if not self._accept(ACCEPTS_PER_WAKE):
                await trio.sleep(self._back_off)
                self._back_off = min(self._back_off * 2, BACK_OFF_LAST)

    def close(self) -> None:
        """Take in what the kernel has accepted already (a reset would be no answer), then stop listening."""
        with contextlib.suppress(OSError):
            self._accept(self._slots.free)
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()

    def _accept(self, most: float) -> bool:
        """Accept up to `most` connections, as far as there are slots. False: short of something, come back later."""
        for _ in range(int(min(most, BACKLOG))):
            if self._slots.free <= 0:
                return True
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return True
            except OSError as exc:
                if exc.errno in _PASSING:
                    continue
                if exc.errno not in _SHORTAGE:
                    raise
                self._short(exc)
                return False
            peer = _peer(address[0])
            mark = self._crowd.enter(peer)
            if mark is None:
                sock.setblocking(False)
                self._partings.part(sock, self._refusal())
                continue
            try:
                stream = TcpStream(sock)
            except OSError as exc:  # the poller is short of kernel memory
                sock.close()
                self._crowd.leave(mark)
                self._short(exc)
                return False
            self._back_off = BACK_OFF_FIRST
            self._slots.take()
            self._connections.start_soon(self._serve, stream, peer, mark, name=_TASK)
        return True

    async def _serve(self, stream: TcpStream, peer: str, mark: object) -> None:
        """The boundary of one connection: what gets here is a bug, and it ends nobody else's stream."""
        try:
            await self._handler(stream, peer)
        except* Exception as group:
            self._bug()
            _log.error("a bug ended a connection from %s", peer, exc_info=group)
        finally:
            stream.close()
            self._slots.give()
            self._crowd.leave(mark)

    def _short(self, exc: OSError) -> None:
        self._trouble(errno.errorcode.get(exc.errno or 0, "unknown"))
        self._untold += 1
        now = trio.current_time()
        if now >= self._tell_at:
            where, why = address_text(self.address), exc.strerror or str(exc)
            _log.error("cannot accept connections on %s: %s (%d times); trying again", where, why, self._untold)
            self._tell_at = now + TELL_EVERY
            self._untold = 0

    def _tell_full(self) -> None:
        now = trio.current_time()
        if now >= self._full_told_at + TELL_EVERY:
            where, total = address_text(self.address), self._slots.bound
            _log.warning("%s has all its %.0f connections: new ones wait", where, total)
            self._full_told_at = now


def _peer(host: str) -> str:
    return host.removeprefix("::ffff:").partition("%")[0]


def listening_texts(sockets: Iterable[socket.socket], scheme: str = "http") -> list[str]:
    """The URL of each listening socket."""
    return [f"{scheme}://{address_text(sock.getsockname()[:2])}" for sock in sockets]
