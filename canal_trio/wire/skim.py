"""What a JSON text says in a few of its members, skimmed out of bytes that pass, however they are split.

A few bytes of state follow strings and depth; only the value of a member that is wanted is kept, up to a bound. Who
uses it says which that is, and what it tells. Invariants: the result does not depend on how the bytes are split; memory
is bounded; what is not JSON is looked at and forgotten.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Final

__all__ = ["Skimmer"]

_TEXT: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # inside of a string, up to its end
_NEAR: Final = re.compile(rb'[^"\[\]{}:,]*')  # outside of strings, where members are looked at
_DEEP: Final = re.compile(rb'[^"\[\]{}]*')  # the same, where they are not
_NAME_BYTES: Final = 12  # of a string: enough for the names that are looked for
_QUOTE, _BACKSLASH, _COLON, _COMMA = b'"\\:,'
_OPENING, _CLOSING = frozenset(b"{["), frozenset(b"}]")


class Skimmer(ABC):
    """Follows a JSON text. `begin` comes first."""

    __slots__ = ("_depth", "_in_string", "_kept", "_kept_depth", "_name", "_open_escape")

    _most: ClassVar[int]  # bytes of a value that is kept

    def begin(self) -> None:
        """Another text begins."""
        self._depth = 0
        self._in_string = False
        self._open_escape = False  # a string's last byte so far is a backslash that escapes what follows
        self._name = b""  # the beginning of the last string, with its closing quote
        self._kept: bytearray | None = None  # the value of a member that is wanted, as far as it is here
        self._kept_depth = 0
        self._opens()

    def skim(self, data: bytes) -> None:
        """Take note of `data`, the next bytes of the text."""
        at, size = 0, len(data)
        while at < size:
            end = self._string(data, at) if self._in_string else self._outside(data, at)
            kept = self._kept
            if kept is not None:
                kept += data[at:end]
                self._bound(kept)
            if end < size and not self._in_string:
                end = self._token(data, end)
            at = end

    # -- what its users say --------------------------------------------------------------------------------------------

    @abstractmethod
    def _opens(self) -> None:
        """An object or array begins at the top: nothing before it counts."""

    @abstractmethod
    def _wanted(self) -> bool:
        """Is the member wanted that is called `_name`, at `_depth`?"""

    @abstractmethod
    def _take(self, value: bytes, whole: bool) -> None:
        """The value of a member that was wanted; of a longer one than `_most` bytes, as many."""

    # -- the bytes -----------------------------------------------------------------------------------------------------

    def _string(self, data: bytes, at: int) -> int:
        """Through a string, up to its closing quote and beyond it, or to the end of what is here."""
        start = at
        if self._open_escape:
            self._open_escape = False
            at += 1
        end = data.find(b'"', at)
        if end < 0:
            end = len(data)
        if data.find(b"\\", at, end) >= 0:
            match = _TEXT.match(data, at)
            assert match is not None  # it may be empty
            end = match.end()
        if end < len(data):
            if data[end] == _QUOTE:
                self._in_string = False
            else:
                self._open_escape = True  # a backslash, and the last byte that is here
            end += 1
        room = _NAME_BYTES - len(self._name)
        if room > 0:
            self._name += data[start : min(end, start + room)]
        return end

    def _bound(self, kept: bytearray) -> None:
        if len(kept) > self._most:
            self._kept = None
            self._take(bytes(kept[: self._most]), whole=False)

    def _outside(self, data: bytes, at: int) -> int:
        match = (_NEAR if self._depth <= 2 else _DEEP).match(data, at)
        assert match is not None  # it may be empty
        return match.end()

    def _token(self, data: bytes, at: int) -> int:
        """The one byte that the run of others stopped at; the place behind it."""
        byte = data[at]
        if self._kept is not None and self._depth == self._kept_depth and (byte == _COMMA or byte in _CLOSING):
            self._take(bytes(self._kept), whole=True)
            self._kept = None
        if self._kept is not None:
            self._kept.append(byte)
            self._bound(self._kept)
        if byte == _QUOTE:
            self._in_string = True
            self._name = b""
        elif byte in _OPENING:
            if self._depth == 0:
                self._name = b""
                self._opens()
            self._depth += 1
        elif byte in _CLOSING:
            self._depth -= 1
        elif byte == _COLON and self._wanted():
            self._kept, self._kept_depth = bytearray(), self._depth
        return at + 1
