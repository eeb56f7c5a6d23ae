"""The heads that clients get: an upstream's head, as one client shall see it.

An upstream's heads are often the same for seconds. The last one is remembered for one client connection: of a head that
is the same and goes out in the same way, only the request's id is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from canal_trio.messages import Headers, ResponseHead
from canal_trio.wire.headers import ForClient, for_client
from canal_trio.wire.heads import write_response_head

__all__ = ["ClientHeads", "with_fields", "without_fields"]

_LINE = b"\r\nX-Request-Id: %b\r\n"
_BESIDE = b"\r\nX-Canal-Request-Id: %b\r\n"  # where the upstream has one of its own


@dataclass(frozen=True, slots=True)
class _Last:
    """A head that was written before, and what it was made of."""

    head: ResponseHead
    way: tuple[object, ...]
    request_id: bytes
    block: bytes


@final
class ClientHeads:
    """Those of one client connection."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: _Last | None = None

    def forget(self) -> None:
        """Remember nothing: a stream goes on for long, and thousands of them each have a connection."""
        self._last = None

    def block(self, head: ResponseHead, options: ForClient) -> bytes:
        """`head` as bytes for the client that `options` describes. Not a checkpoint."""
        last, way = self._last, options[1:]
        if last is not None and last.way == way and (last.head is head or last.head == head):
            if last.request_id == options.request_id:
                return last.block
            line = _BESIDE if b"x-request-id" in head.headers else _LINE
            return last.block.replace(line % last.request_id, line % options.request_id, 1)
        block = write_response_head(for_client(head, options))
        self._last = _Last(head, way, options.request_id, block)
        return block


def without_fields(head: ResponseHead, fields: bytes) -> ResponseHead:
    """`head` without what it says under the names in `fields` (lines), which tell of limits: those of another."""
    names = {line.partition(b":")[0] for line in fields.split(b"\r\n")}
    kept = Headers([(name, value) for name, lower, value in head.headers.lowered() if lower not in names])
    return ResponseHead(head.status, kept, head.reason, head.version)


def with_fields(block: bytes, fields: bytes) -> bytes:
    """The head `block`, with `fields` (lines) at its end."""
    return b"%b%b\r\n" % (block[:-2], fields)
