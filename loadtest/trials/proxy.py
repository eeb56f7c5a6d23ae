"""A link between the gateway and its upstream that breaks as one seed says, and keeps a book of what it let pass.

One process, a Trio task per direction. It understands just enough HTTP to know which exchange the bytes belong to and
whether the whole response has passed. Invariants: bytes that pass are the upstream's, in order and unchanged; every
attempt leaves one line in the book, also when somebody else ended it.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, final

import trio

from loadtest.processes import ROOT, Process, started
from loadtest.trials.faults import ENDS, Fault, draw
from loadtest.wire import Malformed, Response

__all__ = ["FaultProxy", "LinkProcess", "link_process", "serve"]

READ = 65_536
HOLD = 30.0  # seconds: a stalled connection that nobody closes is closed then
_IDENT = re.compile(rb"lt-([\w.-]+)")
_DONE = b"data: [DONE]\n\n"


class _Break(Exception):
    """The fault's moment has come: the connection is over."""


@dataclass(slots=True)
class Passing:
    """An attempt on its way through the link."""

    ident: str = ""
    attempt: int = 0
    fault: Fault = field(default_factory=Fault)
    request: bytes = b""  # its beginning, until it says who it is
    up: int = 0
    down: int = 0
    response: Response = field(default_factory=Response)
    terminal: bool = False  # `[DONE]` has passed whole
    tail: bytes = b""
    broke: bool = False  # the fault has happened
    ended: float = 0.0  # when the last byte of `[DONE]` was about to pass


@final
class FaultProxy:
    """Listens, dials `upstream` for every connection, and breaks what passes. `book` takes a line per attempt."""

    def __init__(self, upstream: tuple[str, int], seed: str, book: IO[str], calm: float | None = None) -> None:
        self.upstream = upstream
        self.seed = seed
        self.book = book
        self.calm = calm
        self.attempts: Counter[str] = Counter()

    async def handle(self, near: trio.SocketStream) -> None:
        """One connection of the gateway's."""
        try:
            far = await trio.open_tcp_stream(*self.upstream)
        except OSError:  # our upstream is down: so is the link
            near.socket.close()
            return
        connection = _Connection(self, near, far)
        await connection.run()

    def identified(self, passing: Passing) -> None:
        """It has said who it is: its fault is known."""
        self.attempts[passing.ident] += 1
        passing.attempt = self.attempts[passing.ident]
        passing.fault = draw(self.seed, passing.ident, passing.attempt, self.calm)

    def note(self, passing: Passing) -> None:
        """The attempt is over."""
        line = {
            "ident": passing.ident, "attempt": passing.attempt, "fault": passing.fault.kind, "broke": passing.broke,
            "up": passing.up, "down": passing.down, "whole": passing.response.done, "terminal": passing.terminal,
            "since_done": trio.current_time() - passing.ended if passing.ended else 0.0,
        }  # fmt: skip
        self.book.write(json.dumps(line) + "\n")


class _Connection:
    def __init__(self, proxy: FaultProxy, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.proxy = proxy
        self.near = near
        self.far = far
        self.passing: Passing | None = None
        self.stalled = False
        self.slices = 0

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._up, nursery)
                nursery.start_soon(self._down, nursery)
        except* _Break:
            pass
        finally:
            self.near.socket.close()
            self.far.socket.close()
            if self.passing is not None and self.passing.ident:
                self.proxy.note(self.passing)

    # -- the request ---------------------------------------------------------------------------------------------------

    async def _up(self, nursery: trio.Nursery) -> None:
        try:
            while data := bytes(await self.near.receive_some(READ)):
                if self.passing is None:
                    self.passing = Passing()
                passing = self.passing
                if not passing.ident:
                    passing.request += data
                    found = _IDENT.search(passing.request)
                    if found is None or found.end() == len(passing.request):
                        continue  # it will say who it is soon; until then nothing passes
                    passing.ident = found[1].decode()
                    self.proxy.identified(passing)
                    data = passing.request
                if not self.stalled:
                    await self._send_up(passing, data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.cancel()  # the gateway has left: so do we

    async def _send_up(self, passing: Passing, data: bytes) -> None:
        fault = passing.fault
        if fault.kind in ("deaf", "cut_request") and passing.up + len(data) > fault.at:
            await self._to_upstream(passing, data[: fault.at - passing.up])
            passing.broke = True
            if fault.kind == "cut_request":
                self._reset()
            self.stalled = True
            with trio.move_on_after(HOLD):
                await trio.sleep_forever()  # not read any more, so that the gateway's writes block
            raise _Break
        await self._to_upstream(passing, data)

    async def _to_upstream(self, passing: Passing, data: bytes) -> None:
        passing.up += len(data)
        if data:
            await self.far.send_all(data)

    # -- the response --------------------------------------------------------------------------------------------------

    async def _down(self, nursery: trio.Nursery) -> None:
        try:
            while data := bytes(await self.far.receive_some(READ)):
                if self.passing is not None:
                    await self._send_down(self.passing, data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, Malformed):
            pass
        if not self.stalled:
            nursery.cancel_scope.cancel()

    async def _send_down(self, passing: Passing, data: bytes) -> None:
        fault = passing.fault
        room = self._room(passing, data)
        if room is not None:
            await self._to_gateway(passing, data[:room])
            passing.broke = True
            await self._break(fault.kind)
        if fault.delay and fault.kind == "latency":
            await trio.sleep(fault.delay)
        if fault.kind == "slicer":
            await self._sliced(passing, data)
        else:
            await self._to_gateway(passing, data)
        if passing.response.done:
            self.proxy.note(passing)
            self.passing = None

    def _room(self, passing: Passing, data: bytes) -> int | None:
        """How much of `data` passes before the break; None if there is none in it."""
        fault = passing.fault
        if fault.kind not in ENDS:
            return None
        if not fault.tail:
            if passing.down + len(data) <= fault.at:
                return None
            return 0 if fault.boundary else max(fault.at - passing.down, 0)
        last = data.endswith(b"\r\n0\r\n\r\n") or (b"[DONE]" not in data and data.endswith(b"}"))
        return max(len(data) - fault.tail, 0) if last else None

    async def _sliced(self, passing: Passing, data: bytes) -> None:
        size, delay = passing.fault.size, passing.fault.delay
        for at in range(0, len(data), size):
            if self.slices > 100:  # enough of it: a large body must not take for ever
                await self._to_gateway(passing, data[at:])
                return
            self.slices += 1
            await self._to_gateway(passing, data[at : at + size])
            await trio.sleep(delay)

    async def _to_gateway(self, passing: Passing, data: bytes) -> None:
        if not data:
            return
        passing.down += len(data)
        passing.tail = (passing.tail + passing.response.feed(data))[-len(_DONE) :]
        if not passing.terminal and passing.tail.endswith(_DONE):
            passing.terminal = True
            passing.ended = trio.current_time()  # before it can be read: on a busy machine the send may wake us late
        await self.near.send_all(data)

    # -- the break -----------------------------------------------------------------------------------------------------

    async def _break(self, kind: str) -> None:
        if kind == "reset":
            self._reset()
        if kind == "cut":
            raise _Break
        self.stalled = True
        if kind == "half_close":
            await self.near.send_eof()
        self.far.socket.close()
        with trio.move_on_after(HOLD):
            await trio.sleep_forever()  # the other task takes what comes, and sees the gateway leave
        raise _Break

    def _reset(self) -> None:
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Break


async def serve(proxy: FaultProxy) -> None:
    """Listen on a free port of loopback, say where, and serve until SIGTERM."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, proxy.handle, [listener])
            print(f"listening on http://127.0.0.1:{listener.socket.getsockname()[1]}", file=sys.stderr, flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
    proxy.book.flush()


@dataclass(slots=True)
class LinkProcess:
    """The link in a process of its own."""

    process: Process
    port: int
    book: Path

    def attempts(self) -> list[dict[str, object]]:
        """Its book; complete once the process was stopped."""
        return [json.loads(line) for line in self.book.read_text().splitlines()]


@contextmanager
def link_process(upstream_port: int, seed: str, folder: Path, calm: float | None = None) -> Iterator[LinkProcess]:
    """`python -m loadtest link` for the length of the block."""
    book = folder / "book"
    argv = [sys.executable, "-m", "loadtest", "link", "--upstream", f"127.0.0.1:{upstream_port}", "--seed", seed]
    argv += ["--book", str(book)] + ([] if calm is None else ["--calm", str(calm)])
    with started("link", argv, cwd=ROOT) as process:
        found = process.saying(r"^listening on http://127\.0\.0\.1:(\d+)$")
        yield LinkProcess(process, int(found[1]), book)
