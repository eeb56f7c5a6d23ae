"""Event streams: a full parser for tests and tools, and a scanner for the hot path.

Both follow the WHATWG rules (HTML, "Server-sent events"): a line ends with LF, CR or CRLF, one byte order mark may come
first, an empty line dispatches the event if it has data. The scanner never alters or holds back what passes: it
counts, and knows whether the stream stands between two events; only of an event that came in parts some 2 KiB may be
held. Both are invariant under how the bytes are split.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final, final

from canal_trio.wire.event_text import LAST, EventText, may_tell

__all__ = ["BlindScanner", "Event", "EventParser", "EventScanner"]

_BOM: Final = b"\xef\xbb\xbf"
_LINE_END: Final = re.compile(rb"\r\n?|\n")


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. `retry` is the reconnection time in milliseconds that holds after it, if one was sent."""

    event: str
    data: str
    id: str
    retry: int | None = None


@final
class EventParser:
    """Turns the bytes of an event stream into events. Keeps one event at most, however large."""

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._held = bytearray()  # the present line
        self._after_cr = False
        self._first = True
        self._data: list[str] = []
        self._event = ""
        self._id = ""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes."""
        if not piece:
            return []
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        events: list[Event] = []
        start = 0
        for match in _LINE_END.finditer(piece):
            self._held += piece[start : match.start()]
            start = match.end()
            line, self._held = bytes(self._held), bytearray()
            event = self._line(line)
            if event is not None:
                events.append(event)
        self._held += piece[start:]
        self._after_cr = piece.endswith(b"\r")
        return events

    def _line(self, line: bytes) -> Event | None:
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        if not line:
            return self._dispatch()
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id" and "\0" not in value:
            self._id = value
        elif name == b"retry" and value.isascii() and value.isdigit() and len(value) <= 15:
            self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, self._data = self._data, []
        name, self._event = self._event, ""
        if not data:
            return None
        return Event(name or "message", "\n".join(data), self.last_event_id, self.retry)


# The usual piece is one LF event of one `data:` line with a JSON object, perhaps with an `event:` line before it, and
# with nothing in it that the scanner reports. Next come several such events, with any data. Anything else is looked at
# line by line, and the data of events that may tell something, or are not here whole, by `EventText`.
_NOTABLE: Final = rb"error\n|response\.(?:completed|failed|incomplete)\n"
_NAMED: Final = rb"(?:event: (?!%b).*\n)?" % _NOTABLE
_TYPE: Final = rb'type":"response\.(?!(?:completed|failed|incomplete)")'  # the first one decides
_USUAL: Final = re.compile(rb'%bdata: \{"(%b)?.*\n\n' % (_NAMED, _TYPE)).fullmatch  # unless there is a CR in it
_PLAIN: Final = re.compile(rb"(?:%bdata: (?!\[DONE\]).*\n\n)+" % _NAMED).match
_DONE: Final = b"data: [DONE]\n\n"
_BLANK: Final = (b"\n\n", b"\r\n\r\n")  # behind the last line of an event
_KEPT: Final = 96  # bytes kept of the present line: more than any line that is looked into needs


class EventScanner:
    """The tap on a relayed event stream. Memory is two KiB at the most, however long an event or a line is."""

    legible: ClassVar[bool] = True  # what passes can be read

    __slots__ = (
        "_after_cr",
        "_bom",
        "_has_data",
        "_in_block",
        "_kept",
        "_length",
        "_plain",
        "_text",
        "at_boundary",
        "error",
        "events",
        "terminal",
    )

    def __init__(self) -> None:
        self.events = 0  # dispatched, as a client counts them
        self.at_boundary = True  # nothing of an event has passed since the last one ended
        self.terminal = False  # the last event passed: `[DONE]`, response.completed, .failed or .incomplete
        self.error = False  # the upstream reported an error in band
        self._plain = False  # at a boundary with nothing pending: the straight line may be taken
        self._bom: bytes | None = b""  # what may be the beginning of a byte order mark; None: past it
        self._after_cr = False
        self._kept = b""  # the beginning of the present line
        self._length = 0  # of the present line
        self._in_block = False
        self._has_data = False
        self._text: EventText | None = None  # made when there is something to be looked at

    def feed(self, piece: bytes) -> None:
        """Take note of `piece`, which has passed."""
        self.feed_part(piece, 0, len(piece))

    def feed_part(self, data: bytes, start: int, stop: int) -> None:
        """Take note of `data[start:stop]`, which has passed."""
        if (
            self._plain
            and (usual := _USUAL(data, start, stop))
            and data.find(b"\r", start, stop) < 0
            and (data.find(b'"error"', start, stop) < 0 or not may_tell(data, start, stop))
            and (usual.lastindex or data.find(b'"response.', start, stop) < 0 or not may_tell(data, start, stop))
        ):
            self.events += 1
        else:
            self._look(data[start:stop])

    def _look(self, piece: bytes) -> None:
        if self._bom is not None:
            piece = self._skip_bom(piece)
        at, size = 0, len(piece)
        lf_only = piece.find(b"\r") < 0
        while at < size:
            if self._plain and lf_only and (match := _PLAIN(piece, at)):
                end = match.end()
                if may_tell(piece, at, end):
                    self._events(piece, at, end)
                else:
                    self.events += piece.count(b"\n\n", at, end)
            elif self._plain and piece.startswith(_DONE, at):
                end = at + len(_DONE)
                self.events += 1
                self.terminal = True
            else:
                # Line by line up to the next blank line, where whole events may begin again.
                blank = piece.find(b"\n\n", at) if lf_only else -1
                end = size if blank < 0 else blank + 2
                self._lines(piece, at, end)
                self._plain = self._between() and not self._after_cr
            at = end
        self.at_boundary = self._between()

    def _events(self, piece: bytes, at: int, end: int) -> None:
        """Whole events of `_PLAIN`, one by one."""
        while at < end:
            stop = piece.index(b"\n\n", at) + 2
            if may_tell(piece, at, stop):
                self._lines(piece, at, stop)
            else:
                self.events += 1
            at = stop

    def _between(self) -> bool:
        return not (self._in_block or self._length or self._bom)

    def _skip_bom(self, piece: bytes) -> bytes:
        begin = (self._bom or b"") + piece
        if len(begin) < 3 and _BOM.startswith(begin):
            self._bom = begin
            return b""
        self._bom = None
        self._plain = True
        return begin.removeprefix(_BOM)

    def _lines(self, piece: bytes, start: int, size: int) -> None:
        if self._after_cr:
            self._after_cr = False
            start += piece.startswith(b"\n", start)
        lf, cr = piece.find(b"\n", start, size), piece.find(b"\r", start, size)
        while lf >= 0 or cr >= 0:
            end = lf if cr < 0 or 0 <= lf < cr else cr
            self._extend(piece, start, end)
            self._end_line()
            start = end + 1
            if end == cr:
                if lf == start:
                    start += 1
                elif start == size:
                    self._after_cr = True
                cr = piece.find(b"\r", start, size)
            if 0 <= lf < start:
                lf = piece.find(b"\n", start, size)
        self._extend(piece, start, size)

    def _extend(self, piece: bytes, start: int, end: int) -> None:
        if end > start:
            room = _KEPT - len(self._kept)
            if room > 0:
                self._kept += piece[start : min(end, start + room)]
            before = self._length
            self._length += end - start
            if self._kept.startswith(b"data:"):
                if self._text is None:
                    self._text = EventText()
                data = piece[max(start, start + 5 - before) : end]
                if not before and not self._has_data and piece.startswith(_BLANK, end):
                    self._text.whole(data)
                else:
                    self._text.feed(data)

    def _end_line(self) -> None:
        line, length = self._kept, self._length
        self._kept, self._length = b"", 0
        text = self._text
        if not length:
            self.events += self._has_data
            self._in_block = self._has_data = False
            if text is not None:
                text.reset()
        elif not line.startswith(b":"):
            self._in_block = True
            name, colon, value = line.partition(b":")
            self._field(name, bool(colon), value.removeprefix(b" "), whole=length == len(line))
            if text is not None and name == b"data":
                text.end_line()
                self.error = self.error or text.error
                self.terminal = self.terminal or text.terminal

    def _field(self, name: bytes, colon: bool, value: bytes, *, whole: bool) -> None:
        if name == b"data":
            self._has_data = True
            if whole and value.rstrip(b" \t") == b"[DONE]":
                self.terminal = True
        elif name == b"event":
            if whole and value in LAST:
                self.terminal = True
                self.error = self.error or value == b"response.failed"
            elif whole and value == b"error":
                self.error = True
        elif name == b"error" and colon:
            self.error = True  # llama.cpp before 2025 sent the object in a field of this name


@final
class BlindScanner(EventScanner):
    """In its place where an event stream is compressed: nothing is counted, and it never stands between two events."""

    __slots__ = ()
    legible = False

    def __init__(self) -> None:
        super().__init__()
        self.at_boundary = False

    def feed_part(self, data: bytes, start: int, stop: int) -> None:
        """Nothing can be read."""
