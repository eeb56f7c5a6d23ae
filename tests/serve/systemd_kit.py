"""What systemd does for a service, done by a test: sockets opened before the program starts, a socket that listens."""

from __future__ import annotations

import os
import pathlib
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

import trio
from serve_process import COMMAND, Process, running

# Puts the descriptors in its first argument where systemd would, names its own process, and becomes the rest.
_LAUNCHER = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",") if fd]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()), LISTEN_FDS=str(len(high)))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """A notify socket, and what came over it: each message a list of its lines."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.address = str(folder / "notify")
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.messages: list[list[str]] = []

    async def __aenter__(self) -> Self:
        await self._socket.bind(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def told(self, line: str, seconds: float = 20) -> list[str]:
        """The next message with a line that begins so; what came before it is in `messages`, too."""
        with trio.move_on_after(seconds):
            while True:
                message = (await self._socket.recv(4096)).decode().split("\n")
                self.messages.append(message)
                if any(one.startswith(line) for one in message):
                    return message
        raise AssertionError(f"never told {line!r}, but {self.messages}")

    def count(self, line: str) -> int:
        """How many messages said exactly this."""
        return sum(line in message for message in self.messages)


def listener() -> socket.socket:
    """A listening socket as a socket unit makes it: blocking, no option of ours set."""
    return socket.create_server(("127.0.0.1", 0))


@asynccontextmanager
async def activated(
    sockets: Sequence[socket.socket], *arguments: str, names: str = "", environ: dict[str, str] | None = None
) -> AsyncIterator[Process]:
    """The program started with these sockets, which stay open here, as systemd's do."""
    fds = [sock.fileno() for sock in sockets]
    command = [sys.executable, "-c", _LAUNCHER, ",".join(map(str, fds)), *COMMAND]
    told = {"LISTEN_FDNAMES": names} | (environ or {})
    async with running(*arguments, command=command, environ=told, pass_fds=fds) as process:
        yield process


def own_pid() -> str:
    """For variables that name a process."""
    return str(os.getpid())
