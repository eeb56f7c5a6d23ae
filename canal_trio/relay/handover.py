"""The protocol of hand-over on the spot: what a stream offers beside Trio's async methods.

The `try_` methods never checkpoint and never block. While a sink is armed it is called, in the step that sees them,
whenever there may be bytes, and the owning task sleeps in `wait_disarmed()`. `TcpStream`, `TlsStream` and the test
kit's `SimStream` have it; any other stream takes the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeGuard, final, runtime_checkable

import trio

__all__ = [
    "Answer",
    "Armed",
    "Buffer",
    "HandoverStream",
    "OneSender",
    "can_hand_over",
    "handover_end",
    "receive_limit",
    "settled",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
Answer: TypeAlias = bool | Callable[[], bool]
"""Of a sink. False: disarm me and wake my owner. A callable is the rest of its step (the sending), which answers so."""
Armed: TypeAlias = Callable[[], Answer]
"""Called when there may be bytes to receive; receives them itself."""


def settled(answer: Answer) -> bool:
    """The answer of a sink, after the rest of its step, if there is any. Not a checkpoint; raises what that raises."""
    return answer if answer is True or answer is False else answer()


@runtime_checkable
class HandoverStream(Protocol):
    """What a stream needs for hand-over on the spot. `TcpStream` and the test kit's `SimStream` have it."""

    hangup: bool
    """The peer was seen to hang up (FIN or reset). Bytes it sent before may still be waiting."""

    def try_receive(self, max_bytes: int) -> bytes | None:
        """Bytes that are here now, `b""` at the end of the stream, None if there is nothing yet."""

    def try_send(self, data: Buffer) -> int:
        """Pass on what the peer takes now; the number of bytes taken, perhaps 0.

        The bytes not taken are to be offered again before any other.
        """

    def try_send_batch(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """As `try_send` with several pieces in a row; answers what was not taken."""

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""

    def arm(self, sink: Armed) -> None:
        """Have `sink` called whenever there may be bytes, until it answers False."""

    def disarm(self) -> None:
        """Take the sink away, without waking anybody: a sleeper goes on sleeping. Idempotent."""

    async def wait_disarmed(self) -> None:
        """Sleep until the sink answered False, raised (raised here) or the stream was closed (ClosedResourceError)."""

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called, in the step that sees it, when the peer hangs up; None ends the watch."""

    def close(self) -> None:
        """Close in this very step. Idempotent."""

    def reset(self) -> None:
        """Break the connection in this very step: the peer sees a reset, what was not sent is dropped. Close after."""


_KNOWN: dict[type, bool] = {}  # asking a protocol costs microseconds, and a class does not change its mind


def can_hand_over(stream: object) -> TypeGuard[HandoverStream]:
    """Does `stream` have the whole protocol? Decided once per class, by its first instance. Not a checkpoint."""
    kind = type(stream)
    known = _KNOWN.get(kind)
    if known is None:
        known = _KNOWN[kind] = isinstance(stream, HandoverStream)
    return known


def handover_end(stream: object) -> HandoverStream | None:
    """The stream itself if it can hand over, else the nearest transport below it (TLS) that can, else None.

    That is where a hang-up is seen without reading, and what closes in one step.
    """
    while stream is not None:
        if can_hand_over(stream):
            return stream
        stream = getattr(stream, "transport_stream", None)
    return None


class _Sends(Protocol):
    _sending: bool


@final
class OneSender:
    """One task at a time sends on `stream`: a second one gets BusyResourceError instead of interleaved bytes."""

    __slots__ = ("_stream",)

    def __init__(self, stream: _Sends) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._stream._sending = True

    def __exit__(self, *_: object) -> None:
        self._stream._sending = False


def receive_limit(max_bytes: int | None, default: int) -> int:
    """The bytes that a `receive_some(max_bytes)` may give. Raises TypeError or ValueError as Trio's own streams do."""
    limit = default if max_bytes is None else max_bytes
    if not isinstance(limit, int):
        raise TypeError("max_bytes is an integer or None")
    if limit < 1:
        raise ValueError("max_bytes is at least 1")
    return limit
