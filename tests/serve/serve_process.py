"""The gateway as its own process, started as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from canal_trio.testing.scripts import Script
from canal_trio.testing.upstreams import ScriptedUpstream

COMMAND = (sys.executable, "-m", "canal_trio")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("CANAL_")}


class Process:
    """A running `canal-trio` and what it has said on stderr."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.said = ""
        self.clients: list[trio.SocketStream] = []
        self._more = trio.Event()

    async def listen(self) -> None:
        """Collect what it says until it says no more."""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.said += bytes(data).decode(errors="replace")
            self._more.set()
        self._more.set()

    async def saying(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """Wait until it has said `pattern`."""
        with trio.move_on_after(seconds):
            while not (found := re.search(pattern, self.said, re.MULTILINE)):
                self._more = trio.Event()
                await self._more.wait()
            return found
        raise AssertionError(f"never said {pattern!r}, but:\n{self.said}")

    async def address(self) -> tuple[str, int]:
        """Where it listens, once it does."""
        found = await self.saying(r"^listening on https?://(\S+):(\d+)$")
        return found[1], int(found[2])

    async def admin(self) -> tuple[str, int]:
        """Where its admin pages are."""
        found = await self.saying(r"^admin on http://(\S+):(\d+)$")
        return found[1], int(found[2])

    async def connect(self, address: tuple[str, int]) -> trio.SocketStream:
        """A client; closed at the end of the test if it still is there."""
        stream = await trio.open_tcp_stream(*address)
        self.clients.append(stream)
        return stream

    async def ask(self, address: tuple[str, int], path: str, body: bytes | None = None) -> trio.SocketStream:
        """A client that has sent one request."""
        stream = await self.connect(address)
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        await stream.send_all(head.encode() + b"\r\n" + (body or b""))
        return stream

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self, seconds: float = 20) -> int:
        """Its exit code."""
        with trio.fail_after(seconds):
            return await self.process.wait()


@asynccontextmanager
async def running(
    *arguments: str,
    environ: dict[str, str] | None = None,
    command: Sequence[str] = COMMAND,
    admin: str = "127.0.0.1:0",
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Process]:
    """`canal-trio serve` on a free port, killed at the end of the block if it still runs."""
    argv = [*command, "serve", "--listen", "127.0.0.1:0", "--admin", admin, *arguments]
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process,
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=CLEAN | (environ or {}),
            pass_fds=pass_fds,
        )
        process = Process(await nursery.start(start))
        nursery.start_soon(process.listen)
        try:
            yield process
            nursery.cancel_scope.cancel()
        finally:
            for client in process.clients:
                client.socket.close()


@asynccontextmanager
async def fronting(
    script: Script, *arguments: str, command: Sequence[str] = COMMAND
) -> AsyncIterator[tuple[Process, ScriptedUpstream]]:
    """The process in front of a scripted upstream."""
    upstream = ScriptedUpstream(script)
    async with upstream, running("--upstream", upstream.base_url, *arguments, command=command) as process:
        yield process, upstream


async def until(stream: trio.SocketStream, words: bytes) -> bytes:
    """Read until `words` have come."""
    data = b""
    with trio.fail_after(20):
        while words not in data:
            piece = await stream.receive_some()
            assert piece, f"ended before {words!r}: {data!r}"
            data += piece
    return data
