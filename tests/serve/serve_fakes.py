"""A gateway of a few lines that keeps the contract, and clients' sockets to try the floor above it with."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from canal_trio.hooks import Recorder
from canal_trio.relay.streams import TcpStream
from canal_trio.serve import Served, serve
from canal_trio.settings import Settings, Upstream


@dataclass(frozen=True, slots=True)
class Numbers:
    """As a gateway reports itself."""

    connections: int
    in_flight: int
    held_bytes: int = 0
    waiting: int = 0
    flow_bytes: int = 0
    memory_limit: float = 1e9
    pools: Mapping[str, object] = field(default_factory=dict)
    upstreams: Mapping[str, object] = field(default_factory=dict)
    retries_refused: int = 0


class FakeGateway:
    """Serves one word per connection: `echo` answers and ends, `stay` stays until it is told, `bug` raises.

    `stay` sends `hello` and ends with `bye` when the client says so, with `drained` at the drain deadline; `stuck`
    ignores that deadline.
    """

    def __init__(self, settings: Settings, recorders: Sequence[Recorder]) -> None:
        self.settings = settings
        self.recorders = recorders
        self.draining = False
        self.reloads: list[Settings] = []
        self.peers: list[str] = []
        self.streams: list[TcpStream] = []
        self.drained = trio.Event()
        self.cancelled = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing to do in the background."""
        task_status.started()
        await trio.sleep_forever()

    async def handle(
        self, stream: TcpStream, *, peer: str = "", scheme: str = "http", certificate: str | None = None
    ) -> None:
        """One word, one behaviour."""
        self.peers.append(peer)
        self.streams.append(stream)
        try:
            await self._handle(stream)
        except BaseException as exc:
            self.cancelled += not isinstance(exc, Exception)
            raise
        finally:
            self.streams.remove(stream)
            stream.close()

    async def _handle(self, stream: TcpStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            word = (await stream.receive_some()).strip()
            if word == b"bug":
                raise ValueError("a planted bug")
            if word in (b"stay", b"stuck"):
                await stream.send_all(b"hello\n")
                async with trio.open_nursery() as nursery:
                    if word == b"stay":
                        nursery.start_soon(self._until_drained, stream, nursery)
                    if await stream.receive_some():
                        await stream.send_all(b"bye\n")
                    nursery.cancel_scope.cancel()
            else:
                await stream.send_all(b"echo " + word + b"\n")

    async def _until_drained(self, stream: TcpStream, nursery: trio.Nursery) -> None:
        await self.drained.wait()
        await trio.sleep_until(self.deadline)
        await stream.send_all(b"drained\n")
        nursery.cancel_scope.cancel()

    def prepare(self, settings: Settings) -> None:
        """There is nothing to prepare."""

    def reload(self, settings: Settings) -> None:
        """Noted."""
        self.reloads.append(settings)

    def limit_by(self, admissions: object) -> None:
        """Everything is admitted here."""

    async def settled(self) -> None:
        """Nothing is in flight here."""
        await trio.lowlevel.checkpoint()

    def make_room(self) -> int:
        """Nobody is idle here."""
        return 0

    def drain(self, deadline: float) -> None:
        """Noted."""
        self.draining = True
        self.deadline = deadline
        self.drained.set()

    def ready(self) -> bool:
        """Unless draining."""
        return not self.draining

    def exchanges(self) -> list[object]:
        """None."""
        return []

    def statistics(self) -> Numbers:
        """Connections count as exchanges."""
        return Numbers(len(self.streams), len(self.streams))


def settings(**changes: object) -> Settings:
    """Free ports on loopback, one upstream."""
    chosen: dict[str, object] = {
        "listen": (("127.0.0.1", 0),),
        "admin": ("127.0.0.1", 0),
        "upstreams": (Upstream("up", "http://127.0.0.1:1"),),
    }
    return Settings(**(chosen | changes))  # type: ignore[arg-type]  # names and kinds are the test's


class Running:
    """A server under test: its gateway, addresses, log so far, and exit code once it has ended."""

    def __init__(self, served: Served, log: Callable[[], str]) -> None:
        self.gateway: FakeGateway = served.gateway  # type: ignore[assignment]  # `serving` made it
        self.address = served.listen[0]
        self.served = served
        self.log = log
        self.ended = trio.Event()
        self.code: int | None = None
        self.clients: list[trio.SocketStream] = []
        self.keep_clients = False  # the test closes them

    async def connect(self, word: bytes = b"") -> trio.SocketStream:
        """A client that has said its word."""
        stream = await trio.open_tcp_stream(*self.address)
        self.clients.append(stream)
        if word:
            await stream.send_all(word + b"\n")
        return stream

    async def page(self, path: str) -> tuple[int, bytes]:
        """Status and body of an admin page."""
        stream = await trio.open_tcp_stream(*self.served.admin[0])
        async with stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
            data = await read_all(stream)
        return int(data.split()[1]), data.partition(b"\r\n\r\n")[2]

    async def logged(self, text: str, seconds: float = 10) -> str:
        """Wait until `text` is in the log; the whole log."""
        await eventually(lambda: text in self.log(), seconds)
        return self.log()


@asynccontextmanager
async def serving(chosen: Settings | None = None, **options: object) -> AsyncIterator[Running]:
    """A server in this process, with a fake gateway; cancelled at the end of the block if it still runs."""
    with tempfile.TemporaryFile() as file:

        def log() -> str:
            return os.pread(file.fileno(), 1 << 20, 0).decode()

        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[Served]) -> None:
                code = await serve(
                    chosen or settings(),
                    log_fd=file.fileno(),
                    task_status=task_status,
                    **({"make_gateway": FakeGateway} | options),  # type: ignore[arg-type]
                )
                running.code = code
                running.ended.set()

            served = await nursery.start(run)
            running = Running(served, log)
            try:
                yield running
                nursery.cancel_scope.cancel()
            finally:
                for client in running.clients:
                    if not running.keep_clients:
                        client.socket.close()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Until the end; a reset is an end."""
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while piece := await stream.receive_some():
            data += piece
    return data


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for a condition that another task or thread brings about; fail after `seconds` of the wall clock."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  # what it waits for may happen in a thread or in the kernel
            await trio.sleep(0.005)


def refused(address: tuple[str, int]) -> bool:
    """Does nobody listen there?"""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(address) != 0
