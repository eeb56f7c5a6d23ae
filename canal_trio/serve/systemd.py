"""What systemd hands over when it starts us (sockets), and what we tell it (state, and that we live).

Both are plain: descriptors from 3 on that the environment announces, and datagrams to a Unix socket. Without the
variables nothing happens and nothing costs. Invariants: the variables are taken out of the environment, so that no
child takes them for its own; telling never blocks and never raises, for a deaf systemd must not stop a stream; a
handed-over descriptor is either a socket that we can serve, or a `ListenError` before anything was started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import final

import trio

from canal_trio.serve.listen import ListenError

__all__ = ["Handed", "Notifier", "handed_over"]

FIRST = 3  # the first descriptor handed over
MOST = 256
ADMIN = "admin"  # the FileDescriptorName of sockets for the admin pages; every other one is for clients
STATUS_EVERY = 10.0  # seconds, where there is no watchdog
STATUS_BYTES = 400
_SOCKETS = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_TELLING = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@final
class Notifier:
    """Tells systemd how we are. `address` is that of its socket (None: nobody listens, and every call does nothing);
    `watchdog` is how many seconds it waits for a sign of life, None if it does not."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._socket: socket.socket | None = None
        self._status = ""
        self.watchdog = watchdog
        if address is not None:
            self._address = f"\0{address[1:]}" if address.startswith("@") else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def ready(self, status: str = "") -> None:
        """We accept connections; after `reloading`, the new settings are in use or refused. Not a checkpoint."""
        self._say("READY=1", *self._new(status))

    def reloading(self) -> None:
        """A reload has begun. Followed by `ready`. Not a checkpoint."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float, status: str = "") -> None:
        """The end has begun and may take so long: systemd is asked to wait, whatever its unit says."""
        patience = [] if math.isinf(seconds) else [f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"]
        self._say("STOPPING=1", *patience, *self._new(status))

    async def beat(self, status: Callable[[], str]) -> None:
        """Until cancelled: a sign of life at half the watchdog's time, and the status when it has changed.

        Runs in the loop that serves: while that one hangs, nothing is said, and systemd acts.
        """
        if self._socket is None:
            return
        while True:
            self._say(*(["WATCHDOG=1"] if self.watchdog else []), *self._new(status()))
            await trio.sleep(self.watchdog / 2 if self.watchdog else STATUS_EVERY)

    def _new(self, status: str) -> list[str]:
        if not status or status == self._status:
            return []
        self._status = status
        return [f"STATUS={' '.join(status.split())[:STATUS_BYTES]}"]

    def _say(self, *lines: str) -> None:
        if self._socket is not None and lines:
            with contextlib.suppress(OSError):  # gone, or too busy to listen: the next one may get through
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def close(self) -> None:
        """Say no more. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclasses.dataclass(slots=True)
class Handed:
    """What this process was started with: listening sockets for clients and for the admin pages, and whom to tell."""

    listening: list[socket.socket] = dataclasses.field(default_factory=list)
    admin: list[socket.socket] = dataclasses.field(default_factory=list)
    notifier: Notifier = dataclasses.field(default_factory=Notifier)

    def close(self) -> None:
        """Close what was not used. Sockets in use are their user's to close, and closing twice does no harm."""
        for sock in [*self.listening, *self.admin]:
            sock.close()
        self.notifier.close()


def handed_over(environ: MutableMapping[str, str] = os.environ, *, first: int = FIRST) -> Handed:
    """What systemd has handed to this process; its variables are taken out of `environ`. Not a checkpoint.

    Raises `ListenError` for a descriptor that is no listening TCP socket.
    """
    told = {name: environ.pop(name, "") for name in (*_SOCKETS, *_TELLING)}
    handed = Handed()
    if _ours(told["LISTEN_PID"]) and told["LISTEN_FDS"]:
        names = told["LISTEN_FDNAMES"].split(":")
        try:
            for number, fd in enumerate(range(first, first + _count(told["LISTEN_FDS"]))):
                name = names[number] if number < len(names) else ""
                (handed.admin if name == ADMIN else handed.listening).append(_socket(fd, name))
        except ListenError:
            handed.close()
            raise
    if (address := told["NOTIFY_SOCKET"])[:1] in ("/", "@"):
        handed.notifier = Notifier(address, _watchdog(told))
    return handed


def _ours(pid: str) -> bool:
    """Variables that were meant for a parent of ours are nobody's."""
    return pid == str(os.getpid())


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST:
        raise ListenError(f"LISTEN_FDS is {text!r}: expected a number of sockets up to {MOST}")
    return int(text)


def _watchdog(told: dict[str, str]) -> float | None:
    text = told["WATCHDOG_USEC"]
    if not text.isdecimal() or not int(text) or (told["WATCHDOG_PID"] and not _ours(told["WATCHDOG_PID"])):
        return None
    return int(text) / 1e6


def _socket(fd: int, name: str) -> socket.socket:
    """The descriptor as a socket of ours: non-blocking, and not for children."""
    what = f"systemd handed over descriptor {fd}" + (f" ({name})" if name else "")
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise ListenError(f"{what}, which is no socket: {exc.strerror or exc}") from None
    if (
        sock.family not in (socket.AF_INET, socket.AF_INET6)
        or sock.type != socket.SOCK_STREAM
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        sock.close()
        raise ListenError(f"{what}, which is no listening TCP socket; use ListenStream=HOST:PORT, with Accept=no")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock
