"""Which byte breaks a head: the one place that decides, byte position by byte position.

A `Scanner` walks over a start line and its fields, or over a trailer section, and stops at the first byte that cannot
belong there or that passes a limit. Whatever it decides is a function of the bytes up to that position, so it cannot
depend on how reads are split. It resumes where it stopped, so dripped bytes are looked at once.

It knows the grammar of RFC 9112 without its leniences: CRLF only (2.2), no bare CR, no white space before the colon
(5.1), no obs-fold (5.2), no control byte but HTAB. What the fields mean is not decided here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, final

from canal_trio.errors import Kind

__all__ = ["FIELDS", "REQUEST", "REQUEST_HEAD", "RESPONSE", "RESPONSE_HEAD", "Fault", "Scanner"]

METHOD_BYTES: Final = 64  # the longest registered method has 17 (RFC 9110 16.1.1); more is not a method

_TCHAR = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
_TEXT = rb"\t\x20-\x7e\x80-\xff"
_FIELDS = rb"(?:[%b]+:[%b]*\r\n)*\r\n" % (_TCHAR, _TEXT)

# A whole head at once, for the usual case that it came in one read; the scanner decides everything else.
REQUEST_HEAD: Final = re.compile(rb"[%b]{1,%d} [\x21-\x7e]+ HTTP/1\.[01]\r\n%b" % (_TCHAR, METHOD_BYTES, _FIELDS))
RESPONSE_HEAD: Final = re.compile(rb"HTTP/1\.[01] [1-5][0-9]{2} [%b]*\r\n%b" % (_TEXT, _FIELDS))


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a head is refused."""

    kind: Kind
    detail: str


class _State:
    """A run of allowed bytes, and the byte that must follow it, with the state behind that byte."""

    __slots__ = ("detail", "follow", "least", "run")

    def __init__(self, run: bytes, detail: str, least: int = 0) -> None:
        self.run = re.compile(run)
        self.detail = detail
        self.least = least
        self.follow: dict[int, _State] = {}


_method = _State(rb"[%b]*" % _TCHAR, "The request line does not begin with a method.", 1)
_target = _State(rb"[\x21-\x7e]*", "The request target holds a byte that must be escaped.", 1)
_version = _State(
    rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9])?)?)?)?)?)?)?)?", "The request line does not end with a version.", 8
)
_status = _State(
    rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9](?: (?:[0-9](?:[0-9](?:[0-9])?)?)?)?)?)?)?)?)?)?)?)?",
    "The response does not begin with a status line.",
    12,
)
_reason = _State(rb"[%b]*" % _TEXT, "The reason phrase holds a control byte.")
_line_end = _State(rb"", "A line does not end with CRLF.")
_name = _State(rb"[%b]*" % _TCHAR, "A field line does not begin with a name and a colon.", 1)
_value = _State(rb"[%b]*" % _TEXT, "A field value holds a control byte.")
_last_end = _State(rb"", "The head does not end with CRLF.")
_done = _State(rb"", "")
_line = _State(rb"", "A field line does not begin with a name and a colon.")

_CR, _LF, _SP, _COLON = 13, 10, 32, 58
_method.follow = {_SP: _target}
_target.follow = {_SP: _version}
_version.follow = {_CR: _line_end}
_status.follow = {_SP: _reason, _CR: _line_end}  # a missing reason often lacks its space too
_reason.follow = {_CR: _line_end}
_line_end.follow = {_LF: _line}
_name.follow = {_COLON: _value}
_value.follow = {_CR: _line_end}
_last_end.follow = {_LF: _done}

REQUEST: Final = _method
RESPONSE: Final = _status
FIELDS: Final = _line


@final
class Scanner:
    """Walks over one head. `data` holds what was fed; `size` is the length of the head once it is complete.

    Limits: `head_bytes` counts the final empty line, `head_fields` the field lines, `target_bytes` the target.
    """

    __slots__ = ("_at", "_fields", "_head_bytes", "_left", "_start", "_state", "_target_bytes", "data", "size")

    def __init__(self, start: _State, head_bytes: int, head_fields: int, target_bytes: int = 0) -> None:
        self.data = bytearray()
        self.size: int | None = None
        self._state = start
        self._start = 0  # where the run of the present state began
        self._at = 0
        self._left = head_fields
        self._fields = head_fields
        self._head_bytes = head_bytes
        self._target_bytes = target_bytes

    def feed(self, more: bytes) -> Fault | None:
        """Go on with `more`; a fault ends the scan. Afterwards `size` tells whether the head is complete."""
        data = self.data
        data += more
        end = min(len(data), self._head_bytes)
        while self._at < end:
            fault = self._step(end)
            if fault is not None or self.size is not None:
                return fault
        if len(data) > self._head_bytes:
            return Fault(Kind.HEAD_TOO_LARGE, f"The head is longer than {self._head_bytes} bytes.")
        return None

    def _step(self, end: int) -> Fault | None:
        """One run and the byte after it, as far as they are here."""
        state, data = self._state, self.data
        if state is _line:
            return self._new_line()
        if state is _version or state is _status:
            self._at = self._start  # its pattern is not resumable, and at most twelve bytes long
        match = state.run.match(data, self._at, end)
        assert match is not None  # every run may be empty
        self._at = at = match.end()
        length = at - self._start
        if state is _target and length > self._target_bytes:
            return Fault(Kind.TARGET_TOO_LONG, f"The request target is longer than {self._target_bytes} bytes.")
        if state is _method and length > METHOD_BYTES:
            return Fault(Kind.METHOD_NOT_ALLOWED, f"No method is longer than {METHOD_BYTES} bytes.")
        if state is _version and length == 8 and data[at - 3] != 0x31:
            return Fault(Kind.UNSUPPORTED_VERSION, "Speak HTTP/1.1 or HTTP/1.0.")
        if at == end:
            return None
        following = state.follow.get(data[at])
        if following is None or length < state.least:
            return Fault(Kind.MALFORMED, state.detail)
        self._enter(following)
        if following is _done:
            self.size = self._at
        return None

    def _new_line(self) -> Fault | None:
        if self.data[self._at] == _CR:
            self._enter(_last_end)
            return None
        self._left -= 1
        if self._left < 0:
            return Fault(Kind.HEAD_TOO_LARGE, f"The head has more than {self._fields} fields.")
        self._state, self._start = _name, self._at
        return None

    def _enter(self, state: _State) -> None:
        self._at += 1
        self._start = self._at
        self._state = state
