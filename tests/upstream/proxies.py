"""Forward proxies: proxy.py in a process of its own, and a SOCKS5 proxy that says exactly what a test wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import trio
from peers import listening

__all__ = ["PASSWORD", "USER", "SocksProxy", "forward_proxy", "socks_proxy"]

USER, PASSWORD = "u%40ser", "p%3Ass%2Fword"  # u@ser, p:ss/word: percent-encoded, as a URL needs them
HOST = "127.0.0.1"


@contextmanager
def forward_proxy(*flags: str) -> Iterator[int]:
    """proxy.py on a port of loopback. It ends with the pipe to us, so also when the tests are killed."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "proxy", "--hostname", HOST, "--port", str(port)]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--threaded", "--log-level", "ERROR", *flags]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    process = subprocess.Popen(
        ["sh", "-c", '"$@" & cat; trap "" TERM; kill 0; wait', "sh", *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        for _ in range(400):
            with socket.socket() as probe:
                probe.settimeout(0.05)
                if probe.connect_ex((HOST, port)) == 0:
                    break
            assert process.poll() is None, "proxy.py ended at once"
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        else:
            raise AssertionError("proxy.py does not listen")
        yield port
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


@dataclass
class SocksProxy:
    """What a SOCKS5 proxy does, and what it saw."""

    port: int = 0
    user: bytes | None = None
    password: bytes = b""
    reply: int = 0  # RFC 1928 6
    version: int = 5
    drop_after: int | None = None  # close after so many messages
    bytewise: bool = False  # answer in single bytes
    targets: list[tuple[str, int]] = field(default_factory=list)
    open: int = 0


@asynccontextmanager
async def socks_proxy(proxy: SocksProxy) -> AsyncIterator[SocksProxy]:
    """A SOCKS5 proxy on loopback for the block."""

    async def serve(stream: trio.SocketStream) -> None:
        proxy.open += 1
        try:
            async with stream:
                await _socks(proxy, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass
        finally:
            proxy.open -= 1

    async with listening(serve) as proxy.port:
        yield proxy


async def _socks(proxy: SocksProxy, stream: trio.SocketStream) -> None:
    said = 0

    async def take(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await stream.receive_some(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    async def say(data: bytes) -> None:
        nonlocal said
        if proxy.drop_after is not None and said >= proxy.drop_after:
            raise EOFError
        said += 1
        for piece in [data[i : i + 1] for i in range(len(data))] if proxy.bytewise else [data]:
            await stream.send_all(piece)

    version, count = await take(2)
    methods = await take(count)
    assert version == 5
    wanted = 0 if proxy.user is None else 2
    if wanted not in methods:
        await say(bytes((proxy.version, 255)))
        return
    await say(bytes((proxy.version, wanted)))
    if proxy.user is not None:
        user = await take((await take(2))[1])
        password = await take((await take(1))[0])
        good = (user, password) == (proxy.user, proxy.password)
        await say(bytes((1, 0 if good else 1)))
        if not good:
            return
    _, command, _, kind = await take(4)
    assert command == 1
    if kind == 3:
        host = (await take((await take(1))[0])).decode()
    else:
        host = socket.inet_ntop(*((socket.AF_INET, await take(4)) if kind == 1 else (socket.AF_INET6, await take(16))))
    port = int.from_bytes(await take(2), "big")
    proxy.targets.append((host, port))
    if proxy.reply:
        await say(bytes((proxy.version, proxy.reply, 0, 1, 0, 0, 0, 0, 0, 0)))
        return
    far = await trio.open_tcp_stream(host, port)
    async with far:
        bound = b"\x03\x05proxy" if proxy.bytewise else b"\x01\x7f\0\0\1"
        await say(bytes((proxy.version, 0, 0)) + bound + b"\x1f\x90")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, stream, far, nursery.cancel_scope)
            await _copy(far, stream, nursery.cancel_scope)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await sink.send_all(data)
    scope.cancel()
