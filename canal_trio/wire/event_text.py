"""What the JSON of an event says of its stream: that the upstream failed, or that this event is the last one.

An error is a member `error` at the top of the event's object, wherever it stands among the others (OpenRouter sends it
last but one), with an object or a text that is not empty; or a `type` at the top that is `error` or `response.failed`.
What is called so further inside (the error of a tool's call), or stands in a text, is none. Invariants: those of
`wire.skim`.
"""

from __future__ import annotations

import re
from typing import Final, final

import msgspec
from msgspec import UNSET

from canal_trio.wire.skim import Skimmer

__all__ = ["LAST", "EventText", "may_tell"]

LAST: Final = frozenset({b"response.completed", b"response.failed", b"response.incomplete"})
_ERROR, _TYPE = b'error"', b'type"'
_LAST_TYPES: Final = frozenset(b'"%b"' % name for name in LAST)
_FAILED_TYPES: Final = frozenset({b'"error"', b'"response.failed"'})
_HELD: Final = 2048
_SPACE: Final = b" \t\n"
_SAID: Final = re.compile(rb'[ \t\n]*(?:\{[ \t\n]*[^ \t\n}]|"[^"])').match  # of an `error`: there is something in it
_TYPE_FIRST: Final = re.compile(rb' ?\{"type": ?("[a-z_.]*")[,}]').match
_NOTHING: Final = rb'[ \t]*:[ \t]*(?:null|true|false|[-\d]|""|\{[ \t]*\})'
_CLOSELY: Final = re.compile(rb'"error"(?!%b)|"response\.(?:completed|failed|incomplete)"' % _NOTHING).search


def may_tell(data: bytes, start: int, stop: int) -> bool:
    """May whole events in `data[start:stop]` say something? If not, no `EventText` would find anything."""
    if data.find(b'"error"', start, stop) < 0 and data.find(b'"response.', start, stop) < 0:
        return False
    return _CLOSELY(data, start, stop) is not None


class _Text(msgspec.Struct):
    error: msgspec.Raw | msgspec.UnsetType = UNSET


_decode: Final = msgspec.json.Decoder(_Text).decode


def _has_no_error(data: bytes) -> bool:
    """It is JSON, and its object has no member `error`."""
    try:
        return _decode(data).error is UNSET
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


@final
class EventText(Skimmer):
    """The tap on the data of events, one after another.

    Nearly every event has nothing in it that may tell something. So what comes of it is held, up to `_HELD` bytes, and
    only skimmed where it has, or is more.
    """

    __slots__ = ("_held", "_is_object", "_of_error", "_typed", "error", "terminal")

    _most = 32

    def __init__(self) -> None:
        self.error = False
        self.terminal = False
        self._of_error = False  # what is kept is the value of an `error`
        self.reset()

    def reset(self) -> None:
        """Another event begins. What was found stays."""
        self._held: bytes | None = b""  # None: it is being skimmed
        self._is_object: bool | None = None  # None: nothing of it was skimmed
        self._typed = False  # it had a `type`: the first one decides

    def whole(self, data: bytes) -> None:
        """Take note of `data`, all there is of the event's data.

        Where it begins with its `type`, as in the Responses API, msgspec says whether there is an `error` at the top: a
        `response.completed` may be large, with a tool's schema in it, and would be skimmed in 20 times the time.
        """
        if not may_tell(data, 0, len(data)):
            return
        type_ = _TYPE_FIRST(data)
        if type_ and _has_no_error(data):
            self._is_of(type_[1])
        else:
            self._release(data)

    def feed(self, data: bytes) -> None:
        """Take note of `data`, the next bytes of the event's data."""
        if self._held is None:
            self._skim(data)
            return
        self._held += data
        if len(self._held) > _HELD:
            self._release(self._held)

    def end_line(self) -> None:
        """A line of data is over. Only now `error` and `terminal` are what they are to be."""
        self.feed(b"\n")  # where the data of two lines meet
        if self._held is not None and may_tell(self._held, 0, len(self._held)):
            self._release(self._held)

    def _release(self, held: bytes) -> None:
        self._held = None
        self._skim(held)

    def _skim(self, data: bytes) -> None:
        if self._is_object is None:
            data = data.lstrip(_SPACE)
            if not data:
                return
            self._is_object = data.startswith(b"{")
            self.begin()
        if self._is_object:
            self.skim(data)

    def _opens(self) -> None:
        """Nothing is known that would have to be forgotten."""

    def _wanted(self) -> bool:
        if self._depth != 1:
            return False
        if self._name == _TYPE and not self._typed:
            self._typed, self._of_error = True, False
            return True
        if self._name == _ERROR:
            self._of_error = True
            self._name = b""  # it has one value
            return True
        return False

    def _take(self, value: bytes, whole: bool) -> None:
        if self._of_error:
            self.error = self.error or _SAID(value) is not None
        elif whole:
            self._is_of(value.strip(_SPACE))

    def _is_of(self, type_: bytes) -> None:
        self.terminal = self.terminal or type_ in _LAST_TYPES
        self.error = self.error or type_ in _FAILED_TYPES
