"""The one edit of a stream: taking out the usage chunk that the gateway asked for and the client did not.

Whole events pass as they come. Of an event that is not whole yet at most `most` bytes are held, until its end shows
what it is, or its beginning shows that it is not the one (it has a choice); a longer one is released unjudged. Removed
is only the chunk with `choices: []` and a non-null `usage`, and only one: behind it everything passes. Invariants: what
comes out is what went in, apart from that one event; whoever ends the stream passes on `flush()` first.
"""

from __future__ import annotations

import re
from typing import Any, Final, final

import msgspec

from canal_trio.wire.usage import says_nothing

__all__ = ["UsageEdit"]

_END: Final = rb"(?:\r\n|\n|\r(?=[^\n]))"  # of a line; a CR that is the last byte may be half of one
_BLANK: Final = re.compile(_END * 2)
_LINE_END: Final = re.compile(rb"\r\n?|\n")
_CHOICE: Final = re.compile(rb'"choices"[ \t]*:[ \t]*\[[ \t]*\{')


class _Chunk(msgspec.Struct):
    """What is looked at of an event's JSON."""

    choices: list[Any] | None = None
    usage: dict[str, Any] | None = None


@final
class UsageEdit:
    """Edits one stream. `removed`: the chunk was found and taken out; `held`: what waits for the rest of its event;
    `idle`: between two events, so that whole ones pass of which `says_nothing` is true."""

    __slots__ = ("_done", "_most", "_passed", "held", "idle", "removed")

    def __init__(self, most: int = 16 * 1024) -> None:
        self._most = most
        self._done = False
        self._passed: bytes | None = None  # in an event that was released: the last bytes of it, for its end may be cut
        self.held = b""
        self.idle = True
        self.removed = False

    def feed(self, piece: bytes) -> bytes:
        """What may go out now, perhaps nothing."""
        if self._done:
            return piece
        if self.idle and says_nothing(piece, 0, len(piece)):
            return piece
        out = self._look(piece)
        self.idle = self._done or (not self.held and self._passed is None)
        return out

    def flush(self) -> bytes:
        """What is held, at the end of the stream."""
        held, self.held = self.held, b""
        self._done = self.idle = True
        return held

    def _look(self, piece: bytes) -> bytes:
        out = b""
        if self._passed is not None:
            known = len(self._passed)
            match = _BLANK.search(self._passed + piece)
            if match is None:
                self._passed = (self._passed + piece)[-3:]
                return piece
            cut = match.end() - known
            out, piece, self._passed = piece[:cut], piece[cut:], None
        piece, self.held = self.held + piece, b""
        at = 0
        for match in _BLANK.finditer(piece):
            if _is_usage(piece[at : match.end()]):
                self.removed = self._done = True
                return out + piece[:at] + piece[match.end() :]
            at = match.end()
        rest = piece[at:]
        if len(rest) > self._most or _CHOICE.search(rest):
            self._passed = rest[-3:]
            return out + piece
        self.held = rest
        return out + piece[:at]


def _is_usage(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    lines = [line[5:] for line in _LINE_END.split(event) if line.startswith(b"data:")]
    try:
        chunk = msgspec.json.decode(b"\n".join(lines), type=_Chunk)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return chunk.choices == [] and chunk.usage is not None
