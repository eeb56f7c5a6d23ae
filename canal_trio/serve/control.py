"""What the supervisor and a worker say to each other, over a pair of sockets that nobody else can reach.

The supervisor says `Start`, then orders; the worker says `Accepting` once, or `Failed`, and answers. Whoever ends the
connection is gone: a worker drains then. Settings go this way, with their secrets, and not through the file again, so
that all workers have the same. Invariant: a message is whole or it is not there; one that was begun and not finished
breaks the channel.
"""

from __future__ import annotations

import socket
from typing import Any, final

import msgspec
import trio

from canal_trio.settings import Settings

__all__ = [
    "Accepting",
    "Ask",
    "Channel",
    "Drain",
    "Failed",
    "Family",
    "Message",
    "Reload",
    "Reloaded",
    "Report",
    "Start",
    "Stop",
]

MESSAGE_BYTES = 256 * 1024 * 1024  # far more than ten thousand streams need: beyond, something is broken
_LENGTH = 4


class Family(msgspec.Struct, array_like=True, frozen=True):
    """A family of metrics: name, type, help, and its samples as (name, labels, value)."""

    name: str
    kind: str
    text: str
    samples: list[tuple[str, dict[str, str], float]]


class Start(msgspec.Struct, tag=True):
    """The first order: be worker `number` (from 1) and listen on `addresses` together with the others.

    With `sockets` these inherited descriptors are accepted from, instead: all workers have the same ones. `memory` is
    the descriptor of the memory in which the limits of all `workers` are counted; None: there is none but its own.
    """

    number: int
    settings: Settings
    addresses: list[tuple[str, int]]
    sockets: list[int] = []
    memory: int | None = None
    workers: int = 1


class Reload(msgspec.Struct, tag=True):
    """Use these settings for the next requests. Answered by `Reloaded`."""

    settings: Settings


class Drain(msgspec.Struct, tag=True):
    """Finish what runs, then end."""


class Stop(msgspec.Struct, tag=True):
    """End now."""


class Ask(msgspec.Struct, tag=True):
    """Tell `what`: "metrics", "streams" or "state". Answered by a `Report` with the same `id`."""

    id: int
    what: str


class Accepting(msgspec.Struct, tag=True):
    """Connections are accepted: so many at most, of so many descriptors; `wanted` is what there are too few for."""

    connections: int
    descriptors: int
    wanted: int | None


class Failed(msgspec.Struct, tag=True):
    """This worker cannot start."""

    reason: str


class Reloaded(msgspec.Struct, tag=True):
    """The answer to `Reload`: empty, or why the old settings stay."""

    refusal: str


class Report(msgspec.Struct, tag=True):
    """The answer to `Ask`; with `id` 0 the last words of a worker that ends."""

    id: int
    ready: bool
    draining: bool
    metrics: list[Family] = []
    streams: list[dict[str, Any]] = []


Message = Start | Reload | Drain | Stop | Ask | Accepting | Failed | Reloaded | Report


@final
class Channel:
    """One end. Owns `sock`, which is a connected stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
        self._sending = trio.Lock()
        self._received = bytearray()

    async def send(self, message: Message) -> bool:
        """Send `message`; one waits for the other. False: nobody is there. A checkpoint; cancelled, it is broken."""
        body = self._encoder.encode(message)
        async with self._sending:
            try:
                await self._stream.send_all(len(body).to_bytes(_LENGTH, "big") + body)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            except BaseException:
                self.close()
                raise
        return True

    async def receive(self) -> Message | None:
        """The next message; None when the other end has gone, or says what it must not. A checkpoint."""
        try:
            head = await self._exactly(_LENGTH)
            if head is None or (size := int.from_bytes(head, "big")) > MESSAGE_BYTES:
                return None
            body = await self._exactly(size)
            return None if body is None else self._decoder.decode(body)
        except (trio.BrokenResourceError, trio.ClosedResourceError, msgspec.DecodeError):
            return None

    async def _exactly(self, size: int) -> bytes | None:
        while len(self._received) < size:
            data = await self._stream.receive_some(65_536)
            if not data:
                return None
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def close(self) -> None:
        """Close in this very step. Idempotent."""
        if self._stream.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._stream.socket)
            self._stream.socket.close()
