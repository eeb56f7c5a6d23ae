"""What httpcore sees of our stream: reads, writes and a close that httpcore can neither delay nor be delayed by.

HTTP/2 only. Between the socket and httpcore, the frames that arrive are looked at (RFC 9113 4.1), because httpcore
1.0.9 gives up a response that is under way when its upstream says GOAWAY, even if only to say that it will take no
*further* requests, as every upstream does that restarts gracefully. Such a GOAWAY is kept from it and remembered. A
frame that is too large is refused by its first bytes; h2 would wait for all of it, up to 16 MiB.

Invariants: bytes reach httpcore in order, whole frames are dropped or none; it holds at most one read, which is a
piece, and one frame; what arrives while a request is still being sent is bounded by `early_bytes`.
"""

from __future__ import annotations

from typing import final

import httpcore
import trio
from trio.abc import Stream

from canal_trio.relay.streams import HandoverStream

__all__ = ["FrameFault", "FrameFilter", "NetworkStream"]

_HEADER = 9
_GOAWAY = 7
_FRAME_BYTES = 16_384  # what we allow: SETTINGS_MAX_FRAME_SIZE at its default
_TROUBLE = (trio.BrokenResourceError, trio.ClosedResourceError)


class FrameFault(httpcore.RemoteProtocolError):
    """What arrives cannot be HTTP/2."""


@final
class FrameFilter:
    """Takes graceful GOAWAY frames out. `stream_id` is the newest stream we opened."""

    def __init__(self) -> None:
        self.stream_id = 0
        self.going_away = False
        self._left = 0  # bytes of the current frame that are still to come
        self._held = b""  # the beginning of a frame about which nothing can be said yet

    def feed(self, data: bytes) -> bytes:
        """What of `data` goes on, perhaps nothing. Raises FrameFault."""
        if not self._held and self._left >= len(data):
            self._left -= len(data)
            return data
        data = self._held + data
        out = b""
        start, at = 0, self._left
        self._left = 0
        while len(data) - at >= _HEADER:
            size = int.from_bytes(data[at : at + 3], "big")
            end = at + _HEADER + size
            if size > _FRAME_BYTES:
                raise FrameFault(f"a frame of {size} bytes, where {_FRAME_BYTES} is the most")
            if data[at + 3] == _GOAWAY:
                if end > len(data):
                    break
                if self._graceful(data[at + _HEADER : end]):
                    self.going_away = True
                    out += data[start:at]
                    start = end
            at = end
            if at > len(data):
                self._left = at - len(data)
                at = len(data)
        self._held = data[at:]
        return out + data[start:at]

    def _graceful(self, payload: bytes) -> bool:
        """Our stream is to be served to its end (RFC 9113 6.8)."""
        if len(payload) < 8:
            return False
        last = int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF
        return last >= self.stream_id and payload[4:8] == b"\0\0\0\0"


@final
class NetworkStream(httpcore.AsyncNetworkStream):
    """`stream` for httpcore; `raw` is its socket end, for a close in one step. Deadlines are not its business."""

    def __init__(self, stream: Stream, raw: HandoverStream, *, piece_bytes: int, early_bytes: int) -> None:
        self._stream = stream
        self._raw = raw
        self._piece_bytes = piece_bytes
        self._early_bytes = early_bytes
        self._early = 0
        self._closed = False
        self.frames = FrameFilter()
        self.uploading = False  # the request is not complete, so what comes can only be kept

    def begin(self) -> None:
        """Another request is sent: the next stream."""
        self.frames.stream_id = self.frames.stream_id + 2 if self.frames.stream_id else 1
        self.uploading = True
        self._early = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At most a piece; `b""` at the end. Raises httpcore.ReadError and FrameFault."""
        while True:
            try:
                data = bytes(await self._stream.receive_some(min(max_bytes, self._piece_bytes)))
            except _TROUBLE as exc:
                raise httpcore.ReadError(str(exc)) from exc
            if self.uploading:
                self._early += len(data)
                if self._early > self._early_bytes:
                    raise httpcore.ReadError("it answers at length without reading the request")
            passed = self.frames.feed(data)
            if passed or not data:
                return passed

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """All of it. Raises httpcore.WriteError; after a close also for nothing, so that nobody goes on."""
        if self._closed:
            raise httpcore.WriteError("this stream was closed")
        if buffer:
            try:
                await self._stream.send_all(buffer)
            except _TROUBLE as exc:
                raise httpcore.WriteError(str(exc)) from exc

    def close(self) -> None:
        """Close the socket in this very step. Idempotent."""
        self._closed = True
        self._raw.disarm()
        self._raw.close()

    async def aclose(self) -> None:
        """`close()`. Not a checkpoint: httpcore calls it in shields that have no deadline."""
        self.close()
