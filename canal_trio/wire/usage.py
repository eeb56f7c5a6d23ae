"""The tap on what a generation used: token counts out of bytes that pass, however they are split.

Two shapes of answer tell it: a JSON object with `usage` at its top, and an event stream in which some event's JSON has
`usage` at its top (a usage chunk, a last chunk), in its `response` (the Responses API) or in its `message` (Anthropic's
Messages, which vLLM and others serve, too). Both are skimmed, not parsed: a few bytes of state follow strings and
depth, and only the value of such a `usage` is kept, up to 8 KiB. The last one that is an object counts, but one in a
`message` comes before anything was generated: the prompt is taken from it if the last one does not name it. A text that
comes in one piece, as most do, is read by msgspec instead, where that says the same: it takes a tenth of the time.
Invariants: the result does not depend on how the bytes are split; memory is bounded however long an event or a body is;
what is not JSON is looked at and forgotten.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, final

import msgspec
from msgspec import UNSET

from canal_trio.hooks import Usage
from canal_trio.wire.skim import Skimmer

__all__ = ["BodyUsage", "StreamUsage", "says_nothing", "usage_of"]

USAGE_BYTES: Final = 8192  # of one `usage` value; a real one has some hundred
_MOST_TOKENS: Final = 10**9  # a larger count is no count: no model comes near, and at any price 64 bits hold it

_USAGE: Final = b'usage"'
_MESSAGE: Final = b'message"'
_AROUND: Final = (b'response"', _MESSAGE)

_LINE_END: Final = re.compile(rb"\r\n?|\n")
_NULLS: Final = (b'"usage":null', b'"usage": null')  # as nearly everybody writes it


_Tokens = Annotated[int, msgspec.Meta(ge=0, lt=_MOST_TOKENS)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Tokens | None = 0


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Tokens | None = 0


class _Usual(msgspec.Struct):
    """A `usage` as nearly everybody writes it. Under other names it is not looked for here."""

    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    input_tokens_details: None = None
    output_tokens_details: None = None


class _Text(msgspec.Struct):
    """A whole text, of which only this is looked at: `usage`, and whether there is anything that may hold another."""

    usage: _Usual | msgspec.UnsetType = UNSET
    response: msgspec.Raw | msgspec.UnsetType = UNSET
    message: msgspec.Raw | msgspec.UnsetType = UNSET


_ENDS: Final = (b"}", b"}\n", b"}\r\n", b"}\n\n")  # of a whole text
_decode_text: Final = msgspec.json.Decoder(_Text).decode


def _whole(data: bytes) -> _Usual | msgspec.UnsetType | None:
    """The `usage` at the top of a whole text. None: it is none, or has to be read more closely."""
    if data.find(b'"usage"', 0, -USAGE_BYTES) >= 0:
        return None  # its value may be too long
    if b"\\u00" in data and (b"\\u006" in data or b"\\u007" in data):
        return None  # a letter of a member's name may be escaped: such a name is none that is looked for
    try:
        text = _decode_text(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return text.usage if text.response is UNSET and text.message is UNSET else None


def says_nothing(data: bytes, start: int, stop: int) -> bool:
    """Does `data[start:stop]`, from between two events on, hold whole events that do not tell what was used: without a
    `usage`, or with `null` only? Of a few odd spellings of that it says no."""
    if not data.endswith(b"\n\n", start, stop):
        return False
    at = data.find(b'"usage"', start, stop)
    while at >= 0:
        if not data.startswith(_NULLS, at):
            return False
        at = data.find(b'"usage"', at + 1, stop)
    return True


def usage_of(raw: object, before: Usage | None = None) -> Usage | None:
    """The counts in a decoded `usage`, by Chat Completions' names or by those of the Responses API and of Messages.

    None if it has none, or one that is no number of tokens: then an estimate is more honest than half of the truth.
    `before` is what was said at the beginning: the last one of a stream of Messages need not repeat the prompt.
    """
    if not isinstance(raw, dict):
        return None
    prompt, completion = _count(raw, "prompt_tokens", "input_tokens"), _count(raw, "completion_tokens", "output_tokens")
    if _NONE in (prompt, completion) or prompt is completion is None:
        return None
    cached = _detail(_part(raw, "prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    reasoning = _detail(_part(raw, "completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    if prompt is None and before is not None:
        prompt, cached = before.prompt, before.cached
    elif prompt is not None and raw.keys().isdisjoint(("prompt_tokens", "input_tokens_details")):
        # As in Messages, which counts what was cached beside the rest of the prompt.
        cached = _detail(raw, "cache_read_input_tokens")
        prompt += cached + _detail(raw, "cache_creation_input_tokens")
    return Usage(prompt or 0, completion or 0, cached, reasoning)


_NONE: Final = -1  # something stands there, and it is no count


def _count(raw: dict[str, Any], *names: str) -> int | None:
    """The first of these that is there and not null; None where none is."""
    for name in names:
        value = raw.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None:
            counts = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS
            return value if counts else _NONE
    return None


def _detail(raw: dict[str, Any], name: str) -> int:
    return max(_count(raw, name) or 0, 0)


def _part(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        value = raw.get(name)
        if isinstance(value, dict):
            return value
    return {}


@final
class BodyUsage(Skimmer):
    """The tap on a JSON text.

    A piece that may be the whole text is only decoded when that is asked for, or more follows: mostly in the accounting
    behind an exchange, which is for many of them at once.
    """

    __slots__ = ("_around", "_before", "_usage", "_waiting")

    _most = USAGE_BYTES

    def __init__(self) -> None:
        self._usage: Usage | None = None
        self._before: Usage | None = None  # said at the beginning, when nothing was generated: its prompt counts
        self._waiting: bytes | None = b""  # what may be the whole text; empty: nothing of it has come; None: skimmed

    @property
    def usage(self) -> Usage | None:
        """The counts of the last `usage` that was an object; None until one was seen."""
        if self._waiting:
            self._look(self._waiting)
        return self._usage

    def reset(self) -> None:
        """Another text begins. `usage` stays."""
        if self._waiting:
            self._look(self._waiting)
        self._waiting = b""

    def feed(self, data: bytes) -> bytes:
        """Take note of `data`, which passes: it is given back."""
        if self._waiting:
            self._look(self._waiting)
        if self._waiting is not None and data.endswith(_ENDS):
            self._waiting = data
        elif data:
            self._skim(data)
        return data

    def passes(self, data: bytes, start: int, stop: int) -> bool:
        """Nothing does unseen."""
        return False

    def flush(self) -> bytes:
        """What is held back: nothing."""
        return b""

    def _look(self, data: bytes) -> None:
        """Take note of what waits. Where that could be read as a text, what follows is another one."""
        said = _whole(data)
        if said is None:
            self._skim(data)
            return
        self._waiting = b""
        if said is not UNSET:
            prompt, completion = said.prompt_tokens_details, said.completion_tokens_details
            fields = (
                said.prompt_tokens,
                said.completion_tokens,
                (prompt.cached_tokens or 0) if prompt else 0,
                (completion.reasoning_tokens or 0) if completion else 0,
            )
            self._usage = tuple.__new__(Usage, fields)  # as `Usage`, in half the time

    def _skim(self, data: bytes) -> None:
        if self._waiting is not None:
            self._waiting = None  # and the rest of the state is there
            self.begin()
        self.skim(data)

    def _opens(self) -> None:
        self._around = b""  # the present member at the top, if it is one in which a `usage` may be

    def _wanted(self) -> bool:
        if self._depth == 1:
            self._around = self._name if self._name in _AROUND else b""
        return self._name == _USAGE and (self._depth == 1 or (self._depth == 2 and bool(self._around)))

    def _take(self, value: bytes, whole: bool) -> None:
        if not whole:
            return
        try:
            found = usage_of(msgspec.json.decode(value), self._before)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if found is not None and self._kept_depth == 2 and self._around == _MESSAGE:
            self._before = found
        elif found is not None:
            self._usage = found


@final
class StreamUsage:
    """The tap on an event stream. `usage` is None until one was seen."""

    __slots__ = ("_after_cr", "_body", "_fresh", "_name", "_payload", "idle")

    def __init__(self) -> None:
        self._body: BodyUsage | None = None  # made when there is something to be looked at
        self._after_cr = False
        self.idle = True  # between two events, with nothing pending
        self._fresh = True  # at the beginning of a line
        self._name = b""  # the beginning of the line
        self._payload = False  # the line is a `data:` line, and past its name

    @property
    def usage(self) -> Usage | None:
        """The counts of the last `usage` that was an object."""
        return None if self._body is None else self._body.usage

    def passes(self, data: bytes, start: int, stop: int) -> bool:
        """Is `data[start:stop]` whole events without anything that has to be noted?"""
        return self.idle and says_nothing(data, start, stop)

    def feed(self, piece: bytes) -> bytes:
        """Take note of `piece`, which passes: it is given back."""
        if self.passes(piece, 0, len(piece)):
            return piece
        if self._body is None:
            self._body = BodyUsage()
        self._look(piece, self._body)
        return piece

    def flush(self) -> bytes:
        """What is held back: nothing."""
        return b""

    def _look(self, piece: bytes, body: BodyUsage) -> None:
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        at = 0
        for match in _LINE_END.finditer(piece):
            self._part(piece, at, match.start(), body)
            self._end_line(body)
            at = match.end()
        self._part(piece, at, len(piece), body)
        if piece.endswith(b"\r"):
            self._after_cr, self.idle = True, False

    def _part(self, piece: bytes, start: int, end: int, body: BodyUsage) -> None:
        """Bytes of the present line."""
        if start == end:
            return
        self._fresh = self.idle = False
        missing = 5 - len(self._name)
        if missing > 0:
            self._name += piece[start : min(end, start + missing)]
            start += missing
            self._payload = self._name == b"data:"
        if self._payload and start < end:
            body.feed(piece[start:end])

    def _end_line(self, body: BodyUsage) -> None:
        if self._fresh:
            body.reset()
            self.idle = True
        elif self._payload:
            body.feed(b"\n")  # where the data of two lines meet
        self._fresh, self._name, self._payload = True, b"", False
